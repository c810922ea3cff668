"""What each kernel should take, from bytes, operations and the rates of one GPU: a prediction, to be compared.

    python benchmarks/roofline.py --write        the table in docs/performance.md

The model: a launch takes the longest of three times. Its DRAM traffic at the copy rate; the operands of all its
programs at the L2 rate; and the operations of the busiest multiprocessor at its share of the matmul rate, for programs
are dealt out in turn. The library's matmul runs at the matmul rate. 2 µs pass between launches. Where a result file
of a GPU is committed, the measured time stands beside the prediction.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, whatever else is installed

import torch

from gradnorm_fast.kernels import dispatch, library, one_tile, tiled
from gradnorm_fast.kernels.config import Config, cdiv
from gradnorm_fast.kernels.experimental import cluster
from gradnorm_fast.kernels.problem import Problem
from gradnorm_fast.kernels.rows import rows_per_chunk

import report
from workloads import DTYPES, SHAPES, Workload

ROOT = Path(__file__).resolve().parents[1]
# An H200, as reported for it: to be replaced by what the benchmarks measure.
ARCH, PROCESSORS = "sm_90", 132
COPY, L2, RATE = 4.3e12, 5.5e12, {"bfloat16": 790e12, "float16": 790e12}
LAUNCH = 2e-6


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
    if kernel == "cluster":
        if w.classes > 4096:
            return None
        return LAUNCH + matmul_seconds(w, cluster.configuration(*shape, dtype, ARCH), 1)
    if kernel == "tiled":
        config = tiled.configuration(*shape, dtype, ARCH, PROCESSORS)
        tiles, beside = cdiv(w.classes, config.block_c), 0
    else:
        config, tiles, beside = library.CONFIGURATION, 0, w.batch * w.depth * w.itemsize  # the features once more
    logits = 4 * w.batch * w.classes * config.slices
    chunks = cdiv(w.batch, rows_per_chunk(w.batch, 4 * w.classes * config.slices, config))
    if kernel == "tiled":
        rows = Workload(cdiv(w.batch, chunks), w.depth, w.classes, w.dtype)
        matmul = chunks * matmul_seconds(rows, config, tiles, config.slices)
    else:
        matmul = max(w.flops / RATE[w.dtype], w.bytes / COPY)
    return 2 * chunks * LAUNCH + matmul + (2 * logits + beside) / L2


KERNELS = ("one_tile", "tiled", "library", "cluster")


def default(w: Workload) -> str:
    """The kernel that is chosen where halves may be multiplied by the library."""
    x, weight = (torch.empty(n, w.depth, dtype=DTYPES[w.dtype], device="meta") for n in (w.batch, w.classes))
    return dispatch.preferred(Problem(x, weight, None), ARCH)


def lines_of(results: list[dict[str, Any]]) -> str:
    """One line per workload, in bfloat16; the kernel that is chosen in bold."""
    head = ["B x D x C, bfloat16", "bytes", "operations", "floor", *KERNELS, "measured", "of floor"]
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
        for kernel in KERNELS:
            seconds = predicted(kernel, w)
            bold = "**" if kernel == default(w) else ""
            cells.append("-" if seconds is None else f"{bold}{us(seconds)}{bold}")
        times = measured.get(str(w))
        seconds = report.summary(times)["median"] if times else None
        cells += ["-", "-"] if seconds is None else [us(seconds), f"{floor / seconds:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.{0 if seconds > 1e-4 else 1}f} µs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/performance.md, not on the screen")
    args = parser.parse_args()
    files = [p for p in (ROOT / "benchmarks/results").glob("*/bench.json") if p.parent.name not in ("cpu", "dry_run")]
    table = lines_of([json.loads(p.read_text()) for p in files])
    if args.write:
        report.put(ROOT / "docs/performance.md", "roofline", table)
    else:
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
