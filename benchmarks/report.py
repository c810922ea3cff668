"""From a result file to a table and a picture: nothing here is measured, everything is computed from raw times."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import peers
from workloads import Workload

Results = dict[str, Any]
DETAILS = (
    "B x D x C", "implementation", "median", "quartiles", "outliers", "wall", "graph", "of floor", "extra memory",
    "error",
)  # fmt: skip


def workload_of(name: str) -> Workload:
    shape, dtype = name.split()
    batch, depth, classes = map(int, shape.split("x"))
    return Workload(batch, depth, classes, dtype)


def summary(times: list[float]) -> dict[str, float]:
    """Median, quartiles and the number of outliers, beyond 1.5 interquartile ranges above the third quartile."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    outliers = sum(t > high + 1.5 * (high - low) for t in times)
    return {"median": middle, "first_quartile": low, "third_quartile": high, "outliers": outliers}


def main_times(record: dict[str, Any]) -> list[float] | None:
    """Device time where there is one, else wall time."""
    return record.get("device") or record.get("wall")


def ratio(record: dict[str, Any], other: dict[str, Any]) -> float | None:
    """How many times the other's time this one takes: the median over rounds, each compared with its own round."""
    mine, theirs = main_times(record), main_times(other)
    if not mine or not theirs:
        return None
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=False))


def by_workload(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in results["records"]:
        found.setdefault(record["workload"], {})[record["implementation"]] = record
    return found


def floor_seconds(w: Workload, ceilings: Results) -> float:
    """The larger of least bytes over copy bandwidth and operations over matmul rate."""
    rates = ceilings["matmul_flop_per_s"]
    rate = rates.get(w.dtype) or max(rates.values())
    return max(w.bytes / ceilings["copy_bytes_per_s"], w.flops / rate)


def environment_line(results: Results) -> str:
    e = results["environment"]
    where = f"{e['device']}, driver {e['driver']}" if "driver" in e else f"{e['cpu']}, {e['threads']} threads"
    return f"{where}; torch {e['torch']}, Triton {e['triton']}; commit {e['commit']}, {e['time']}"


def duration(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.1f} µs"
        if seconds < 1e-3
        else f"{seconds * 1e3:.2f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def table(results: Results) -> str:
    """Per workload: our time, and how many times longer the others take."""
    names = [n for n in peers.ALL if n != peers.OURS and any(r["implementation"] == n for r in results["records"])]
    headings = [f"{n} ({used})" if (used := peers.ALL[n].used_by) else n for n in names]
    lines = [
        f"| B x D x C | {peers.OURS} | " + " | ".join(headings) + " | extra memory | relative error |",
        "|---|" + "---:|" * (len(names) + 3),
    ]
    for name, records in by_workload(results).items():
        ours = records.get(peers.OURS)
        if ours is None or not main_times(ours):
            continue
        cells = []
        for peer in names:
            record = records.get(peer, {})
            value = ratio(record, ours) if main_times(record) else None
            cells.append("-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x")
        own = duration(summary(main_times(ours))["median"])
        cells += [f"{ours['extra_memory'] / 2**20:.1f} MiB", f"{ours['relative_error']:.1e}"]
        lines.append(f"| {name} | {own} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline(results: Results) -> str:
    """One sentence: the largest ImageNet-sized batch that was measured."""
    found = {workload_of(name): records for name, records in by_workload(results).items()}
    dtype = "bfloat16" if "driver" in results["environment"] else "float32"
    w = max((w for w in found if (w.depth, w.classes, w.dtype) == (2048, 1000, dtype)), key=lambda w: w.batch)
    ours, loop, vmap, matmul = (found[w][n] for n in (peers.OURS, "autograd loop", "vmap", peers.BASELINE))
    e = results["environment"]
    where = e["device"] if "driver" in e else f"{e['threads']} threads of an {e['cpu']}"
    return (
        f"**{ratio(loop, ours):.0f} times faster than the loop** of the official code and OpenOOD, "
        f"**{ratio(vmap, ours):.0f} times faster than vmap** as in pytorch-ood, {ratio(ours, matmul):.2f} times the "
        f"time of the matmul alone: {w.batch} rows of {w.depth} features, {w.classes} classes, {w.dtype}, "
        f"{duration(summary(main_times(ours))['median'])} on {where}. `make bench` measures it on yours."
    )


def details(results: Results) -> str:
    """Every implementation with its quartiles, memory and distance from the floor."""
    lines = [
        "| " + " | ".join(DETAILS) + " |",
        "|---|---|" + "---:|" * (len(DETAILS) - 2),
    ]
    for name, records in by_workload(results).items():
        for peer, record in records.items():
            if "skipped" in record:
                lines.append(f"| {name} | {peer} | not run: {record['skipped']} | | | | | | | |")
                continue
            s = summary(main_times(record))
            of_floor = floor_seconds(workload_of(name), results["ceilings"]) / s["median"]
            other = [duration(summary(record[k])["median"]) if record.get(k) else "-" for k in ("wall", "graph")]
            scaled = f" (timed on {record['scaled_from_rows']} rows)" if "scaled_from_rows" in record else ""
            error = f"{record['relative_error']:.1e}" if "relative_error" in record else ""
            cells = [
                name,
                peer + scaled,
                duration(s["median"]),
                f"{duration(s['first_quartile'])} to {duration(s['third_quartile'])}",
                f"{s['outliers']} of {len(main_times(record))}",
                *other,
                f"{of_floor:.0%}",
                f"{record['extra_memory'] / 2**20:.1f} MiB",
                error,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(results: Results, folder: Path) -> str:
    """Write bench.md and bench.png beside the result file; the short table."""
    c = results["ceilings"]
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in c["matmul_flop_per_s"].items())
    head = f"{environment_line(results)}\n\nCeilings: copy {c['copy_bytes_per_s'] / 1e9:.4g} GB/s; matmul {rates}."
    short = table(results)
    (folder / "bench.md").write_text(
        f"# Benchmarks\n\n{head}\n\nColumns of peers: how many times our time they take.\n\n{short}\n\n"
        f'## Every figure\n\n"of floor": the time that the least bytes or the operations need at the ceilings, over '
        f"the median.\n\n{details(results)}\n"
    )
    try:
        draw(results, folder / "bench.png")
    except ImportError as error:
        print(f"no picture: {error}")
    return f"{head}\n\n{short}"


def draw(results: Results, path: Path) -> None:
    """Per workload: the time of every implementation relative to ours, and the memory it takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = by_workload(results)
    names = [n for n in peers.ALL if any(n in records for records in found.values())]
    figure = Figure(figsize=(11, 1.3 + 0.42 * len(found)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(names):
        for ax, value in (
            (left, lambda r, n=name: ratio(r[n], r[peers.OURS])),
            (right, lambda r, n=name: r[n].get("extra_memory", 0) / 2**20),
        ):
            rows = [(v, j) for j, r in enumerate(found.values()) if {name, peers.OURS} <= set(r) and (v := value(r))]
            if rows:
                style = "|" if name == peers.OURS else "o"
                ax.plot(*zip(*rows, strict=True), style, color=f"C{i}", label=name, markersize=16 - 9 * (style == "o"))
    left.axvline(1, color="C0", linewidth=1, zorder=0)
    left.set(xscale="log", title=f"time, as a multiple of {peers.OURS}'s (lower is better)")
    right.set(xscale="log", title="extra memory in MiB (lower is better)")
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    for ax in (left, right):
        ax.grid(axis="both", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, format="png", metadata={"Description": environment_line(results)})


def put(page: Path, mark: str, text: str) -> None:
    """Replace what stands between the two marks of a page."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    old = page.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ValueError(f"{page}: expected the marks {begin} and {end} once each")
    before, after = old.split(begin)[0], old.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def update_readme(readme: Path, results: Results, source: Path) -> None:
    """Put the headline, and the table with where it comes from, into the README."""
    put(readme, "headline", headline(results))
    origin = (
        f"{environment_line(results)}. From [{source.name}]({source}), by `make bench`, rendered by "
        f"`python benchmarks/compare.py --render {source} --readme`."
    )
    put(readme, "benchmark", f"{table(results)}\n\n{origin}")
