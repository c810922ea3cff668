"""Largest relative error of Σ|p − 1/C| for given float32 logits, over the hard rows of the tests: the table of
docs/numerics.md. Beside the torch path and the kernels, the form of 0.1.0 and the formula as it stands.

    python benchmarks/accuracy.py            without a GPU, the kernels run in Triton's interpreter
    python benchmarks/accuracy.py --matmul   instead: of a logit, by how float32 is multiplied
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from gradnorm_fast import gradnorm_from_logits  # noqa: E402

from families import deviation, families  # noqa: E402


def ours(logits: torch.Tensor, temperature: float, backend: str) -> torch.Tensor:
    logits = logits.cuda() if CUDA else logits
    features = torch.ones(len(logits), 1, device=logits.device)
    return gradnorm_from_logits(features, logits, temperature=temperature, backend=backend).cpu()


def naive(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    p = torch.softmax(logits / temperature, 1)
    return (p - 1 / logits.shape[1]).abs().sum(1) / temperature


def switched(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The form of 0.1.0: expm1 about the maximum where Σ exp > C/2, else exp."""
    classes = logits.shape[1]
    d = (logits - logits.amax(1, keepdim=True)) / temperature
    near = d.exp().sum(1, keepdim=True) > classes / 2
    t = torch.where(near, d.expm1(), d.exp())
    u = t - t.sum(1, keepdim=True) / classes
    total = u.abs().sum(1) - u.sum(1) * u.sign().sum(1) / classes
    return total / (t.sum(1) + torch.where(near[:, 0], classes, 0)) / temperature


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits of mantissa, to nearest, ties away from zero, as the tensor cores' conversion does."""
    return (x.view(torch.int32) + 0x1000).bitwise_and_(-0x2000).view(torch.float32)


def matmul_errors(depths: list[int]) -> None:
    """The largest error of a logit over Σ|terms|, by how float32 is multiplied; tf32 emulated, sums in float32."""
    print("| D | float32 | tf32x3 | tf32 |\n|---:|---:|---:|---:|")
    for depth in depths:
        g = torch.Generator().manual_seed(depth)
        x, w = torch.randn(256, depth, generator=g).relu(), torch.randn(depth, 256, generator=g)
        x_high, w_high = tf32(x), tf32(w)
        x_low, w_low = tf32(x - x_high), tf32(w - w_high)
        results = (x @ w, x_low @ w_high + x_high @ w_low + x_high @ w_high, x_high @ w_high)
        truth, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
        errors = [((z.double() - truth).abs() / size).max().item() for z in results]
        print(f"| {depth} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 1000, 32000, 128256])
    parser.add_argument("--rows", type=int, default=1000, help="hard rows for each C, beside the listed ones")
    parser.add_argument("--matmul", action="store_true", help="instead: of float32 matmuls, tf32 ones emulated")
    args = parser.parse_args()
    if args.matmul:
        matmul_errors([64, 512, 2048, 4096])
        return
    forms: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
        "torch path": partial(ours, backend="torch"),
        "kernels": partial(ours, backend="triton"),
        "0.1.0": switched,
        "as it stands": naive,
    }
    print(f"| C | {' | '.join(forms)} | worst row of the kernels |\n|---:|{'---:|' * len(forms)}---|")
    for classes in args.classes:
        worst = dict.fromkeys(forms, (0.0, ""))
        for name, logits, temperature in families(classes, most=args.rows):
            truth = deviation(logits, temperature)
            for form, score in forms.items():
                error = ((score(logits, temperature).double() - truth).abs() / truth).max().item()
                worst[form] = max(worst[form], (error, name))
        errors = " | ".join(f"{error:.1e}" for error, _ in worst.values())
        print(f"| {classes} | {errors} | {worst['kernels'][1]} |", flush=True)


if __name__ == "__main__":
    main()
