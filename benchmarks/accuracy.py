"""Largest relative error of Σ|p − 1/C| for given float32 logits, over the hard rows of the tests: the table of
docs/numerics.md.

    python benchmarks/accuracy.py            the torch path, and the naive float32 form beside it
    TRITON_INTERPRET=1 python benchmarks/accuracy.py --backend triton
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from gradnorm_fast import gradnorm_from_logits  # noqa: E402

from families import deviation, hard_logits  # noqa: E402


def naive(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    p = torch.softmax(logits / temperature, 1)
    return (p - 1 / logits.shape[1]).abs().sum(1) / temperature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="auto", choices=("auto", "torch", "triton"))
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 1000, 21843, 128256])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| C | ours | on | naive | on |\n|---:|---:|---|---:|---|")
    for classes in args.classes:
        worst: list[tuple[float, str]] = [(0.0, ""), (0.0, "")]
        for name, logits, temperature in hard_logits(classes):
            truth = deviation(logits, temperature)
            ones = torch.ones(len(logits), 1, device=device)
            ours = gradnorm_from_logits(ones, logits.to(device), temperature=temperature, backend=args.backend)
            for i, got in enumerate((ours.cpu(), naive(logits, temperature))):
                error = ((got.double() - truth).abs() / truth).max().item()
                worst[i] = max(worst[i], (error, name))
        cells = " | ".join(f"{error:.1e} | {name}" for error, name in worst)
        print(f"| {classes} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
