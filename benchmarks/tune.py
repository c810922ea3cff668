"""Time every plausible configuration of every kernel, per workload: what the tables in kernels/ are to be chosen by.

    python benchmarks/tune.py --out benchmarks/results/h200          on a GPU
    python benchmarks/tune.py --dry-run --out dry_run                without: tiny shapes, in the interpreter

Each candidate is checked against the torch path first. Results are written after every workload, best first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, whatever else is installed
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from gradnorm_fast import fast_gradnorm
from gradnorm_fast.kernels import plan

import measure
from workloads import Workload

# In the order of what matters most, should time run out.
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


def plans(w: Workload, x: torch.Tensor, weight: torch.Tensor) -> Iterator[plan.Plan]:
    """The default first, then what is worth timing; in a dry run two of each kernel."""
    default = plan.by_table(w.batch, w.classes, w.depth, x.dtype, x.device)
    seen: list[plan.Plan] = []
    for candidate in (default, *plan.candidates(x, weight)):
        alike = sum(p.kernel == candidate.kernel for p in seen)
        if candidate not in seen and (x.device.type == "cuda" or alike < 2):
            seen.append(candidate)
            yield candidate


def call_of(chosen: plan.Plan, inputs: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    x, weight, bias = inputs
    out = torch.full((1, len(x)), torch.nan, device=x.device)  # not what the last candidate left there

    def call() -> torch.Tensor:
        plan.KERNELS[chosen.kernel](x, weight, bias, out, None, 1.0, 1.0, 0.0, chosen.config)
        return out[0]

    return call


def tune(w: Workload, device: str, deadline: float) -> list[dict[str, Any]]:
    """One row per candidate, the fastest first; candidates that fail say why."""
    cuda = device == "cuda"
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if cuda else 0
    copies = min(32, 1 + -(-2 * l2 // w.bytes))
    inputs = [w.inputs(device, seed) for seed in range(min(copies, 4))]
    inputs = [inputs[i] if i < 4 else tuple(t.clone() for t in inputs[i % 4]) for i in range(copies)]
    expected = fast_gradnorm(*inputs[0], backend="torch")
    rows = []
    for chosen in plans(w, *inputs[0][:2]):
        if time.monotonic() > deadline:
            break
        row: dict[str, Any] = {"workload": str(w), "kernel": chosen.kernel, "config": chosen.config._asdict()}
        row["default"] = not rows
        try:
            calls = [call_of(chosen, i) for i in inputs]
            row["error"] = ((calls[0]() - expected).abs() / expected).max().item()
            if not row["error"] <= 1e-3:
                raise AssertionError(f"relative error {row['error']:.2g}")
            times = measure.device_times(calls, max(10, copies), device) if cuda else [0.0]
            row["seconds"] = statistics.median(times)
        except Exception as error:  # out of shared memory or registers: a finding
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
        rows.append(row)
    return sorted(rows, key=lambda r: r.get("seconds", float("inf")))


def compile_all(seconds: float) -> int:
    """Every candidate into Triton's cache on disk, by WORKERS processes; their number that failed."""
    command = [sys.executable, __file__, "--out", ".", "--compile", "--seconds", str(seconds), "--share"]
    workers = [subprocess.Popen([*command, str(i)]) for i in range(WORKERS)]
    return sum(worker.wait() != 0 for worker in workers)


def compile_share(share: int, deadline: float) -> None:
    """Compile every WORKERS-th candidate by launching it once."""
    for w in GPU:
        _, weight, bias = Workload(1, w.depth, w.classes, w.dtype).inputs("cuda")
        x = weight.new_zeros(w.batch, w.depth)
        for chosen in list(plans(w, x, weight))[share::WORKERS]:
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for tune.json")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this long (%(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: tiny shapes in the interpreter, no times"
    )
    parser.add_argument("--compile", action="store_true", help="only compile the candidates, in parallel processes")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("tune.py: error: torch sees no GPU here; --dry-run does without", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.seconds
    if args.share is not None:
        compile_share(args.share, deadline)
        return 0
    if args.compile:
        failed = compile_all(args.seconds)
        print(f"compiled by {WORKERS} processes, {failed} of which failed")
        return int(failed > 0)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tune.json"
    results = {"environment": measure.environment(device), "rows": []}
    if path.exists():
        results["rows"] = json.loads(path.read_text())["rows"]
    done = {r["workload"] for r in results["rows"]}
    for w in DRY if args.dry_run else GPU:
        if str(w) in done or time.monotonic() > deadline:
            continue
        rows = tune(w, device, deadline)
        results["rows"] += rows
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        os.replace(partial, path)
        best = {r["kernel"]: r for r in reversed(rows)}
        print(f"{w}: " + "; ".join(described(r) for r in best.values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
