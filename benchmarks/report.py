"""From a result file to a table and a picture: nothing here is measured, everything is computed from raw times."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import peers
from workloads import Workload

Record = dict[str, Any]
Results = dict[str, Any]


def workload_of(name: str) -> Workload:
    shape, dtype = name.split()
    batch, depth, classes = map(int, shape.split("x"))
    return Workload(batch, depth, classes, dtype)


def main_times(record: Record) -> list[float]:
    """Device time where there is one, else wall time; empty where nothing was measured."""
    return record.get("device") or record.get("wall") or []


def median(record: Record) -> float:
    return statistics.median(main_times(record))


def ratio(record: Record, other: Record) -> float:
    """How many times the other's time this one takes: the median over rounds, each compared with its own round."""
    return statistics.median(a / b for a, b in zip(main_times(record), main_times(other), strict=False))


def by_workload(results: Results) -> dict[str, dict[str, Record]]:
    """Of each workload, the records of the implementations that ran."""
    found: dict[str, dict[str, Record]] = {}
    for record in results["records"]:
        if main_times(record):
            found.setdefault(record["workload"], {})[record["implementation"]] = record
    return found


def environment_line(results: Results) -> str:
    e = results["environment"]
    where = f"{e['device']}, driver {e['driver']}" if "driver" in e else f"{e['cpu']}, {e['threads']} threads"
    return f"{where}; torch {e['torch']}, Triton {e['triton']}; commit {e['commit']}, {e['time']}"


def duration(seconds: float) -> str:
    factor, unit, digits = (1e6, "µs", 1) if seconds < 1e-3 else (1e3, "ms", 2) if seconds < 1 else (1, "s", 2)
    return f"{seconds * factor:.{digits}f} {unit}"


def markdown(headings: list[str], rows: list[list[str]], names: int = 1) -> str:
    """A table whose first columns, the names, are set to the left."""
    rule = "|" + "---|" * names + "---:|" * (len(headings) - names)
    return "\n".join([f"| {' | '.join(headings)} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)])


def table(results: Results) -> str:
    """Per workload: our time, and the slowdown of the others relative to it."""
    found = by_workload(results)
    names = [n for n in peers.ALL if n != peers.OURS and any(n in records for records in found.values())]
    headings = [f"{n} ({used})" if (used := peers.ALL[n].used_by) else n for n in names]
    rows = []
    for name, records in found.items():
        ours = records[peers.OURS]
        ratios = [ratio(records[n], ours) if n in records else None for n in names]
        cells = ["-" if r is None else f"{r:.2f}x" if r < 10 else f"{r:.0f}x" for r in ratios]
        last = [f"{ours['extra_memory'] / 2**20:.1f} MiB", f"{ours['relative_error']:.1e}"]
        rows.append([name, duration(median(ours)), *cells, *last])
    return markdown(["B x D x C", peers.OURS, *headings, "extra memory", "relative error"], rows)


def headline(results: Results) -> str:
    """The ratios that matter, for the largest ImageNet-sized batch that was measured."""
    found = {workload_of(name): records for name, records in by_workload(results).items()}
    dtype = "bfloat16" if "driver" in results["environment"] else "float32"
    w = max((w for w in found if (w.depth, w.classes, w.dtype) == (2048, 1000, dtype)), key=lambda w: w.batch)
    ours, loop, vmap, matmul = (found[w][n] for n in (peers.OURS, "autograd loop", "vmap", peers.BASELINE))
    e = results["environment"]
    where = e["device"] if "driver" in e else f"{e['threads']} threads of an {e['cpu']}"
    return (
        f"**{ratio(loop, ours):.0f} times as fast as the loop** of the official code and OpenOOD, "
        f"**{ratio(vmap, ours):.0f} times as fast as vmap** (pytorch-ood).\n"
        f"{w.batch} rows of {w.depth} features and {w.classes} classes in {w.dtype} take {duration(median(ours))}, "
        f"{ratio(ours, matmul):.2f} times the matmul alone,\non {where}. `make bench` measures it on yours."
    )


def details(results: Results) -> str:
    """Every implementation with its quartiles, memory and distance from the floor: the larger of least bytes over copy
    bandwidth and operations over matmul rate."""
    ceilings, rows = results["ceilings"], []
    rates = ceilings["matmul_flop_per_s"]
    for record in results["records"]:
        names = [record["workload"], record["implementation"]]
        if "skipped" in record:
            rows.append([*names, f"not run: {record['skipped']}", *[""] * 6])
            continue
        if "scaled_from_rows" in record:
            names[1] += f" (timed on {record['scaled_from_rows']} rows)"
        w = workload_of(record["workload"])
        floor = max(w.bytes / ceilings["copy_bytes_per_s"], w.flops / rates.get(w.dtype, max(rates.values())))
        times = main_times(record)
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        rows.append([
            *names, duration(middle), f"{duration(low)} to {duration(high)}",
            *(duration(statistics.median(record[k])) if record.get(k) else "-" for k in ("wall", "graph")),
            f"{floor / middle:.0%}", f"{record['extra_memory'] / 2**20:.1f} MiB",
            f"{record['relative_error']:.1e}" if "relative_error" in record else "",
        ])  # fmt: skip
    headings = ["B x D x C", "implementation", "median", "quartiles", "wall", "graph", "of floor", "extra memory"]
    return markdown([*headings, "error"], rows, names=2)


def render(results: Results, folder: Path) -> str:
    """Write bench.md and bench.png beside the result file; the short table."""
    c = results["ceilings"]
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in c["matmul_flop_per_s"].items())
    head = f"{environment_line(results)}\n\nCeilings: copy {c['copy_bytes_per_s'] / 1e9:.4g} GB/s; matmul {rates}."
    short = table(results)
    (folder / "bench.md").write_text(
        f"# Benchmarks\n\n{head}\n\nOther implementations: slowdown relative to fast_gradnorm.\n\n{short}\n\n"
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
    from matplotlib.figure import Figure

    found = by_workload(results)
    names = [n for n in peers.ALL if any(n in records for records in found.values())]
    figure = Figure(figsize=(11, 1.3 + 0.42 * len(found)), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(names):
        ran = [(y, records[name], records[peers.OURS]) for y, records in enumerate(found.values()) if name in records]
        style = {"marker": "|", "markersize": 16} if name == peers.OURS else {"marker": "o", "markersize": 7}
        style |= {"linestyle": "", "color": f"C{i}", "label": name}
        rows = [y for y, _, _ in ran]
        left.plot([ratio(record, ours) for _, record, ours in ran], rows, **style)
        right.plot([record["extra_memory"] / 2**20 for _, record, _ in ran], rows, **style)
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
