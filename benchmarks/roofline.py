"""Predict each kernel's time from bytes, operations and the rates of one GPU, to compare with measurements.

    python benchmarks/roofline.py --write        the table in docs/performance.md

The model: a launch takes the longest of three times. Its DRAM traffic at the copy rate; the operands of all its
programs at the L2 rate; and the operations of the busiest multiprocessor at its share of the matmul rate, for programs
are dealt out in turn. The library's matmul runs at the matmul rate. 2 µs pass between launches. Where a result file
of a GPU is committed, the measured time stands beside the prediction.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, whatever else is installed

import torch

from gradnorm_fast.kernels import dispatch, library, one_tile, tiled
from gradnorm_fast.kernels.config import Config, Shape, cdiv
from gradnorm_fast.kernels.experimental import cluster
from gradnorm_fast.kernels.problem import Problem
from gradnorm_fast.kernels.rows import rows_per_chunk

import report
from workloads import DTYPES, SHAPES, Workload

ROOT = Path(__file__).resolve().parents[1]
# An H200, as reported for it: to be replaced by what the benchmarks measure.
ARCH, PROCESSORS = "sm_90", 132
COPY, L2, RATE = 4.3e12, 5.5e12, 790e12  # bytes, bytes and operations per second; the last of halves
LAUNCH = 2e-6
KERNELS = {"one_tile": one_tile, "tiled": tiled, "library": library, "cluster": cluster}


def matmul_seconds(w: Workload, config: Config, tiles_c: int = 1, slices: int = 1) -> float:
    """Of one launch of tiles."""
    programs = cdiv(w.batch, config.block_b) * tiles_c * slices * config.num_ctas
    depth, width = cdiv(w.depth, slices), config.block_c // config.num_ctas
    operations = cdiv(programs, PROCESSORS) * PROCESSORS * 2 * config.block_b * width * depth / RATE
    operands = programs * (config.block_b + width) * depth * w.itemsize / L2
    return max(operations, operands, w.bytes / COPY)


def predicted(kernel: str, w: Workload) -> float:
    """Seconds, launches included."""
    shape = Shape(w.batch, w.classes, w.depth, DTYPES[w.dtype], ARCH, PROCESSORS)
    config, tiles = KERNELS[kernel].configuration(shape), kernel == "tiled"
    if kernel in ("one_tile", "cluster"):
        return LAUNCH + matmul_seconds(w, config)
    logits = 4 * w.batch * w.classes * config.slices
    chunks = cdiv(w.batch, rows_per_chunk(w.batch, logits // w.batch, config))
    if tiles:
        rows = Workload(cdiv(w.batch, chunks), w.depth, w.classes, w.dtype)
        matmul = chunks * matmul_seconds(rows, config, cdiv(w.classes, config.block_c), config.slices)
    else:
        matmul = max(w.flops / RATE, w.bytes / COPY)
    beside = 0 if tiles else w.batch * w.depth * w.itemsize  # the features once more
    return 2 * chunks * LAUNCH + matmul + (2 * logits + beside) / L2


def table() -> str:
    """One line per shape, in bfloat16; the kernel that is chosen where the library may multiply halves in bold."""
    measured: dict[str, dict[str, report.Record]] = {}
    for path in (ROOT / "benchmarks/results").glob("*/bench.json"):
        if path.parent.name not in ("cpu", "dry_run"):
            measured |= report.by_workload(json.loads(path.read_text()))
    rows = []
    for shape in SHAPES:
        w = Workload(*shape, "bfloat16")
        problem = Problem(*(torch.empty(n, w.depth, dtype=DTYPES[w.dtype], device="meta") for n in shape[::2]), None)
        chosen = dispatch.preferred(problem, ARCH)
        floor = max(w.bytes / COPY, w.flops / RATE)
        cells = [str(w).split()[0], f"{w.bytes / 1e6:.1f} MB", f"{w.flops / 1e9:.3g} GFLOP", us(floor)]
        for kernel in KERNELS:
            refused = KERNELS[kernel].why_not(problem, ARCH) or (
                kernel != "one_tile" and w.classes <= one_tile.MAX_CLASSES
            )
            bold = "**" if kernel == chosen else ""
            cells.append("-" if refused else f"{bold}{us(predicted(kernel, w))}{bold}")
        ours = measured.get(str(w), {}).get("fast_gradnorm")
        rows.append(
            [*cells, us(report.median(ours)), f"{floor / report.median(ours):.0%}"] if ours else [*cells, "-", "-"]
        )
    headings = ["B x D x C, bfloat16", "bytes", "operations", "floor", *KERNELS, "measured", "of floor"]
    return report.markdown(headings, rows)


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.{0 if seconds > 1e-4 else 1}f} µs"


if __name__ == "__main__":
    if "--write" in sys.argv:
        report.put(ROOT / "docs/performance.md", "roofline", table())
    else:
        print(table())
