"""Gradient norms and token statistics beside what others compute, in one run on a CPU: python benchmarks/gradients.py

Processor time, interleaved, the median of the rounds. The peers are written here: DeepCore's GraNd by its formula, and
the usual expressions on a logits tensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, log_softmax

from gradnorm_fast import fast_gradnorm, token_statistics

ROUNDS = 9


def grand(x: Tensor, w: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    """GraNd of the last layer as DeepCore computes it, with the gradients (B, C, D + 1) in memory."""
    logits = linear(x, w, b).requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), logits)
    return torch.cat([g, (x[:, None] * g[:, :, None]).flatten(1)], 1).norm(dim=1)


def expressions(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Log probability, entropy and Σp² from one log_softmax of the logits."""
    log_p = log_softmax(x @ w.T, 1)
    p = log_p.exp()
    return log_p.gather(1, labels[:, None])[:, 0], -(p * log_p).sum(1), p.square().sum(1)


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if k:  # the first warms up
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, calls: dict[str, Callable[[], object]], unit: str) -> None:
    found = medians(calls)
    print(f"\n{title}\n| | ms | / {unit} |\n|---|---:|---:|")
    for name, value in found.items():
        print(f"| {name} | {value:.1f} | {value / found[unit]:.2f} |")


def main() -> None:
    with torch.no_grad():
        x, w, labels = torch.rand(1024, 2048), torch.randn(1000, 2048) / 45, torch.randint(0, 1000, (1024,))
        calls: dict[str, Callable[[], object]] = {"matmul": lambda: x @ w.T}
        for name, target in (("uniform", "uniform"), ("label", labels), ("predicted", "predicted")):
            for p in (1.0, 2.0, float("inf"), 3.0):
                calls[f"{name}, p = {p:g}"] = lambda t=target, p=p: fast_gradnorm(x, w, target=t, p=p)  # type: ignore[misc]
        calls["token_statistics"] = lambda: token_statistics(x, w, labels)
        show("1024 x 2048 x 1000", calls, "matmul")

        x, w, labels = torch.randn(256, 64), torch.randn(32000, 64) / 8, torch.randint(0, 32000, (256,))
        calls = {
            "token_statistics": lambda: token_statistics(x, w, labels),
            "log_softmax and three expressions": lambda: expressions(x, w, labels),
        }
        show("256 x 64 x 32000", calls, "token_statistics")

    x, w, b = torch.rand(64, 2048), torch.randn(1000, 2048) / 45, torch.zeros(1000)
    labels = torch.randint(0, 1000, (64,))
    calls = {
        "fast_gradnorm": lambda: fast_gradnorm(x, w, b, target=labels, p=2.0, include_bias=True),
        "DeepCore's GraNd": lambda: grand(x, w, b, labels),
    }
    show("GraNd, 64 x 2048 x 1000", calls, "fast_gradnorm")


if __name__ == "__main__":
    main()
