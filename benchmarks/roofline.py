"""What each kernel should take, from bytes, operations and the rates of one GPU: a prediction, to be held to account.

    python benchmarks/roofline.py --write                          the tables in docs/performance.md
    python benchmarks/compile_matrix.py --json matrix.json && python benchmarks/roofline.py --matrix matrix.json --write

The model: a launch takes the longest of three: its DRAM traffic at the copy rate; the operands of all its programs at
the L2 rate; and, since programs are dealt to the multiprocessors in turn, the operations of those on the busiest one at
its share of the matmul rate. The library's matmul runs at that rate by definition. 2 µs pass
between launches. Where a result file of a GPU is committed, the measured time stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, whatever else is installed

from gradnorm_fast.kernels import cluster, cooperative, few_rows, library, one_tile, split
from gradnorm_fast.kernels.targets import Config

import report
from workloads import DTYPES, SHAPES, Workload

ROOT = Path(__file__).resolve().parents[1]
# An H200, as reported for it: to be replaced by what the benchmarks measure.
ARCH, PROCESSORS = "sm_90", 132
COPY, L2, RATE = 4.3e12, 5.5e12, {"bfloat16": 790e12, "float16": 790e12}
LAUNCH = 2e-6


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def matmul_seconds(w: Workload, config: Config, tiles_c: int, slices: int = 1) -> float:
    """Of one launch of tiles."""
    depth = cdiv(w.depth, slices)
    programs = cdiv(w.batch, config.block_b) * tiles_c * slices * config.num_ctas
    width = config.block_c // config.num_ctas
    operations = cdiv(programs, PROCESSORS) * PROCESSORS * 2 * config.block_b * width * depth / RATE[w.dtype]
    operands = programs * (config.block_b + width) * depth * w.itemsize / L2
    return max(operations, operands, w.bytes / COPY)


def predicted(kernel: str, w: Workload) -> float | None:
    """Seconds, launches included; None for a shape the kernel does not take."""
    dtype, shape = DTYPES[w.dtype], (w.batch, w.classes, w.depth)
    if kernel == "one_tile":
        if w.classes > one_tile.MAX_CLASSES:
            return None
        return LAUNCH + matmul_seconds(w, one_tile.configuration(*shape, dtype, ARCH), 1)
    if w.classes <= one_tile.MAX_CLASSES:
        return None
    if kernel == "few_rows":
        if w.batch > few_rows.MAX_ROWS or w.classes > few_rows.MAX_CLASSES:
            return None
        config = few_rows.configuration(*shape, dtype, ARCH, PROCESSORS)
        partial = 8 * config.slices * w.batch * w.classes / L2
        return 2 * LAUNCH + matmul_seconds(w, config, cdiv(w.classes, config.block_c), config.slices) + partial
    if kernel == "split":
        config = split.configuration(*shape, dtype, ARCH)
        logits = 4 * w.batch * w.classes
        chunks = max(1, cdiv(logits, max(config.workspace * 2**20, 4 * split.MIN_ROWS * w.classes)))
        rows = Workload(cdiv(w.batch, chunks), w.depth, w.classes, w.dtype)
        matmul = chunks * matmul_seconds(rows, config, cdiv(w.classes, config.block_c))
        return 2 * chunks * LAUNCH + matmul + 2 * logits / L2
    if kernel == "library":
        logits, features = 4 * w.batch * w.classes, w.batch * w.depth * w.itemsize
        chunks = max(1, cdiv(logits, max(library.CONFIGURATION.workspace * 2**20, 4 * library.MIN_ROWS * w.classes)))
        return 2 * chunks * LAUNCH + max(w.flops / RATE[w.dtype], w.bytes / COPY) + (2 * logits + features) / L2
    if kernel == "cooperative":
        config = cooperative.configuration(*shape, dtype, ARCH)
        tiles = cdiv(w.classes, config.block_c)
        if tiles > PROCESSORS:
            return None
        blocks = cdiv(w.batch, config.block_b)
        turns = cdiv(blocks, PROCESSORS // tiles)
        return LAUNCH + matmul_seconds(w, config, tiles) + turns * 2e-6  # two barriers a turn
    if w.classes > 4096:
        return None
    return LAUNCH + matmul_seconds(w, cluster.configuration(*shape, dtype, ARCH), 1)


KERNELS = ("one_tile", "few_rows", "split", "library", "cooperative", "cluster")


def lines_of(results: list[dict[str, Any]]) -> str:
    """The roofline table: one line per workload, half precision."""
    head = ["B x D x C, bfloat16", "bytes", "operations", "floor", *KERNELS, "measured, default", "of floor"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    measured = {
        r["workload"]: report.main_times(r)
        for result in results
        for r in result["records"]
        if r["implementation"] == "fast_gradnorm" and "skipped" not in r
    }
    for shape in SHAPES:
        w = Workload(*shape, "bfloat16")
        floor = max(w.bytes / COPY, w.flops / RATE[w.dtype])
        cells = [str(w).split()[0], f"{w.bytes / 1e6:.1f} MB", f"{w.flops / 1e9:.3g} GFLOP", us(floor)]
        cells += ["-" if (t := predicted(k, w)) is None else us(t) for k in KERNELS]
        times = measured.get(str(w))
        seconds = report.summary(times)["median"] if times else None
        cells += ["-", "-"] if seconds is None else [us(seconds), f"{floor / seconds:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.{0 if seconds > 1e-4 else 1}f} µs"


def evidence(matrix: list[dict[str, Any]]) -> str:
    """What the compiler made of the half-precision kernels for sm_90."""
    lines = [
        "| kernel, sm_90, bfloat16 | tile | warps | registers | spills | shared | matmul instructions | waits |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for o in matrix:
        e, of = o["entry"], dict(o["entry"]["constexprs"])
        if e["arch"] != ARCH or e["dtype"] != "bf16" or of.get("HEAD"):
            continue
        tile = f"{of['BLOCK_B']}x{of['BLOCK_C']}x{of['BLOCK_D']}" if of.get("STEP") != 2 else f"1x{of['ROW_C']}"
        flags = [k.lower() for k in ("TMA", "LONG", "RESIDENT") if of.get(k)]
        flags += [f"{e['num_ctas']} CTAs"] if e["num_ctas"] > 1 else []
        flags += [f"step {of['STEP']}"] if of.get("STEP") else []
        name = " ".join([e["kernel"], *flags])
        counts = ", ".join(f"{n} {k}" for k, n in o["instructions"].items())
        waits = "-" if "wgmma" not in o["instructions"] else "after each" if o["serialized"] else "asynchronous"
        cells = [name, tile, e["num_warps"], o["registers"], o["spills"], o["shared"], counts or "-", waits]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--matrix", type=Path, metavar="JSON", help="of compile_matrix.py: the compiler's evidence too")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md, not on the screen")
    args = parser.parse_args()
    files = [p for p in (ROOT / "benchmarks/results").glob("*/bench.json") if p.parent.name not in ("cpu", "dry_run")]
    try:
        tables = {"roofline": lines_of([json.loads(p.read_text()) for p in files])}
        if args.matrix:
            tables["evidence"] = evidence(json.loads(args.matrix.read_text()))
        for mark, text in tables.items():
            if args.write:
                report.put(ROOT / "docs/performance.md", mark, text)
            else:
                print(text)
    except (ValueError, OSError) as error:
        print(f"roofline.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
