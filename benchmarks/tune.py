"""Time every plausible configuration of every kernel, per workload, to choose the tables in kernels/.

    python benchmarks/tune.py --out benchmarks/results/h200          on a GPU
    python benchmarks/tune.py --dry-run --out dry_run                without one: tiny shapes, in the interpreter

Each candidate is checked against the torch path first. Results are written after every workload, the fastest first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, whatever else is installed
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton

from gradnorm_fast import fast_gradnorm
from gradnorm_fast._files import replacing
from gradnorm_fast.kernels import dispatch, library, one_tile, tiled
from gradnorm_fast.kernels.config import Config, Shape, cdiv
from gradnorm_fast.kernels.device import INTERPRETED, architecture, dot_precision, has_tma, multiprocessors
from gradnorm_fast.kernels.dispatch import Choice, choose
from gradnorm_fast.kernels.experimental import cluster
from gradnorm_fast.kernels.problem import Problem, Scores

import measure
from peers import KERNELS
from workloads import Workload

# The most important first, in case time runs out.
GPU = [
    Workload(b, d, c, dtype)
    for dtype in ("bfloat16", "float32")
    for b, d, c in [
        (4096, 2048, 1000), (256, 2048, 1000), (32, 2048, 1000), (1, 2048, 1000), (10000, 512, 10),
        (10000, 512, 100), (4096, 768, 1000), (4096, 2048, 21843),
    ]
]  # fmt: skip
DRY = [Workload(20, 24, 40), Workload(20, 32, 300, "bfloat16"), Workload(70, 32, 300, "bfloat16")]
WORKERS = 8  # processes that compile before anything is timed


def candidates(problem: Problem) -> Iterator[Choice]:
    """The configurations worth timing, the default first; in the interpreter two of each kernel."""
    seen: list[Choice] = []
    for candidate in (choose(problem), *_candidates(problem)):
        alike = sum(p.kernel == candidate.kernel for p in seen)
        if candidate not in seen and (not INTERPRETED or alike < 2):
            seen.append(candidate)
            yield candidate


def _candidates(problem: Problem) -> Iterator[Choice]:
    x, c = problem.features, problem.classes
    (b, d), half = x.shape, x.dtype.itemsize == 2
    arch, processors = architecture(x.device), multiprocessors(x.device)
    amd = arch.startswith("gfx")
    exact = ("ieee",) if half or amd or dot_precision(x.dtype, arch) == "tf32" else ("tf32x3", "ieee")
    stages = (2,) if amd else (3, 4)

    def tiles(kernel: str, *shapes: tuple[int, int, int, int], tma: tuple[bool, ...] = (False,)) -> Iterator[Choice]:
        for (rows, classes, step, warps), n, t, e in product(shapes, stages, tma, exact):
            yield Choice(kernel, Config(rows, classes, step, warps, n, t, float32=e))

    if c <= one_tile.MAX_CLASSES:
        width = one_tile.configuration(Shape.of(problem)).block_c
        shapes = product((16, 32, 64, 128), (width,), (64, 128) if half else (32, 64), (4, 8))
        yield from tiles("one_tile", *(s for s in shapes if s[0] * width <= 64 * 32 * s[3] and s[0] <= max(16, b)))
        return
    if not library.why_not(problem, arch):
        yield from (Choice("library", library.CONFIGURATION._replace(workspace=n)) for n in (64, 24))
    if b <= tiled.SLICED_MAX_ROWS and c <= tiled.SLICED_MAX_CLASSES:
        few = tiled.configuration(Shape.of(problem))
        for classes, step, n in product((16, 32, 64), (64, 128, 256) if half else (32, 64), (1, 2, 4, 8, 16)):
            if n * step <= d and processors // 4 <= cdiv(c, classes) * n <= 4 * processors:
                yield Choice("tiled", few._replace(block_c=classes, block_d=step, slices=n))
        return
    wide: tuple[tuple[int, int, int, int], ...] = ((128, 128, 32, 8), (64, 128, 32, 8), (64, 64, 32, 4))
    if half:
        wide = ((128, 256, 64, 8), (128, 128, 64, 8), (64, 256, 64, 8), (256, 128, 64, 8), (64, 128, 64, 4))
    for by_tile in tiles("tiled", *wide, tma=(False, True) if has_tma(arch) else (False,)):
        yield by_tile
        if 4 * b * c > 24 * 2**20:  # chunks that stay in L2
            yield by_tile._replace(config=by_tile.config._replace(workspace=24))
    if not cluster.why_not(problem, arch):
        whole = max(512, triton.next_power_of_2(c))
        for rows, classes, n in product((64, 128), (128, 256), stages):
            if whole // classes <= 16 and rows * classes <= 128 * 128:
                yield Choice("cluster", Config(rows, whole, 64, 8, n, tma=True, num_ctas=whole // classes))


def call_of(chosen: Choice, inputs: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    out = torch.full((1, len(inputs[0])), torch.nan, device=inputs[0].device)  # not what the last candidate left there

    def call() -> torch.Tensor:
        dispatch.run(KERNELS[chosen.kernel], Problem(*inputs), Scores(out, None), chosen.config)
        return out[0]

    return call


def tune(w: Workload, device: str, deadline: float) -> list[dict[str, Any]]:
    """One row per candidate, the fastest first; candidates that fail say why."""
    first = w.inputs(device)
    copies = [first, *(tuple(t.clone() for t in first) for _ in range(measure.copies_beyond_l2(w, device, 32) - 1))]
    expected = fast_gradnorm(*first, backend="torch")
    rows: list[dict[str, Any]] = []
    for chosen in candidates(Problem(*first)):
        if time.monotonic() > deadline:
            break
        row: dict[str, Any] = {"workload": str(w), "kernel": chosen.kernel, "config": chosen.config._asdict()}
        row["default"] = not rows
        rows.append(row)
        try:
            calls = [call_of(chosen, inputs) for inputs in copies]
            row["error"] = ((calls[0]() - expected).abs() / expected).max().item()
            if not row["error"] <= 1e-3:
                raise AssertionError(f"relative error {row['error']:.2g}")
            times = measure.device_times(calls, max(10, len(calls)), device) if device == "cuda" else [0.0]
            row["seconds"] = statistics.median(times)
        except Exception as error:  # out of shared memory or registers: a finding
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
    return sorted(rows, key=lambda r: r.get("seconds", float("inf")))


def compile_share(share: int, deadline: float) -> None:
    """Every WORKERS-th candidate of each workload into Triton's cache on disk, by launching it once."""
    for w in GPU:
        _, weight, bias = Workload(1, w.depth, w.classes, w.dtype).inputs("cuda")
        x = weight.new_zeros(w.batch, w.depth)
        for chosen in list(candidates(Problem(x, weight, bias)))[share::WORKERS]:
            if time.monotonic() > deadline:
                return
            try:
                call_of(chosen, (x[:128], weight, bias))()
                torch.cuda.synchronize()
            except Exception:  # tune reports it
                continue


def described(row: dict[str, Any]) -> str:
    tile = "x".join(str(row["config"][k]) for k in ("block_b", "block_c", "block_d"))
    time_of = f"{row['seconds'] * 1e6:.1f} µs" if "seconds" in row else row["failed"]
    return f"{row['kernel']} {tile}{' (default)' if row['default'] else ''} {time_of}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for tune.json")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this long (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter, no times")
    parser.add_argument("--compile", action="store_true", help="only compile the candidates, in parallel processes")
    args = parser.parse_args()
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("tune.py: error: torch sees no GPU here; --dry-run does without", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.seconds
    if args.compile:
        if not args.dry_run:  # the interpreter compiles nothing
            with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
                pool.starmap(compile_share, [(i, deadline) for i in range(WORKERS)])
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tune.json"
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results["environment"] = measure.environment(device)
    done = {r["workload"] for r in results["rows"]}
    for w in DRY if args.dry_run else GPU:
        if str(w) in done or time.monotonic() > deadline:
            continue
        rows = tune(w, device, deadline)
        results["rows"] += rows
        with replacing(path) as file:
            json.dump(results, file, indent=1)
        best = {r["kernel"]: r for r in reversed(rows)}
        print(f"{w}: " + "; ".join(described(r) for r in best.values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
