"""The implementations that are measured: every way to get GradNorm for a batch, and the bare matmul as the yardstick.

Each maker takes the head (weight, bias) and gives a function from features (B, D) to scores (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from gradnorm_fast import fast_gradnorm
from gradnorm_fast.kernels import dispatch
from gradnorm_fast.kernels.experimental import cluster
from gradnorm_fast.kernels.problem import Problem, Scores
from gradnorm_fast.reference import autograd_gradnorm

from workloads import Workload

Score = Callable[[Tensor], Tensor]
VMAP_CHUNK = 32  # as pytorch-ood: without it, ImageNet-1k at batch 1024 takes 8 GB of gradients
LOOP_ROWS = 16  # the loop's time is proportional to the batch: it is timed on so many rows and scaled
KERNELS: dict[str, dispatch.Kernel] = {**dispatch.KERNELS, "cluster": cluster}


def matmul(weight: Tensor, bias: Tensor) -> Score:
    """Not a score: the yardstick, the logits without bias."""
    return lambda features: features @ weight.T


def ours(weight: Tensor, bias: Tensor, backend: str = "auto") -> Score:
    return lambda features: fast_gradnorm(features, weight, bias, backend=backend)


def kernel(weight: Tensor, bias: Tensor, name: str) -> Score:
    """One kernel by itself, chosen or not; ValueError for a shape it does not take."""

    def score(features: Tensor) -> Tensor:
        out = torch.empty(1, len(features), device=features.device)
        dispatch.run(KERNELS[name], Problem(features, weight, bias), Scores(out, None))
        return out[0]

    return score


def closed_form(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a good engineer writes in three lines: float32 from the logits on, but p − 1/C subtracted as it stands."""
    p = torch.softmax(linear(features, weight, bias).float(), 1)
    return features.float().abs().sum(1) * (p - 1 / weight.shape[0]).abs().sum(1)


def eager(weight: Tensor, bias: Tensor) -> Score:
    return lambda features: closed_form(features, weight, bias)


def compiled(weight: Tensor, bias: Tensor) -> Score:
    torch._dynamo.reset()
    function = torch.compile(closed_form, mode="max-autotune", dynamic=False)
    return lambda features: function(features, weight, bias)


def vmap(weight: Tensor, bias: Tensor) -> Score:
    """Per-sample gradients of the head by torch.func, in chunks of samples."""

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return -log_softmax(linear(x, weight, bias), 0).mean()

    def norm(x: Tensor) -> Tensor:
        return torch.func.grad(loss)(weight, x).abs().sum(dtype=torch.float32)

    return torch.func.vmap(norm, chunk_size=VMAP_CHUNK)


def autograd_loop(weight: Tensor, bias: Tensor) -> Score:
    """One sample at a time, as the official code and OpenOOD."""
    return lambda features: autograd_gradnorm(features, weight, bias)


class Implementation(NamedTuple):
    make: Callable[[Tensor, Tensor], Score]
    max_rows: int | None = None  #: timed on so many rows, and scaled to the batch
    scores: bool = True  #: whether what it returns is the score
    capturable: bool = True  #: whether a CUDA graph can hold it
    tolerance: float = 0.1  #: largest relative error accepted; peers in half precision are that bad
    used_by: str = ""  #: who computes the score like this today


BASELINE = "matmul"
OURS = "fast_gradnorm"
# In the order of the tables: what people use today first. On a CPU fast_gradnorm is its torch path.
CPU = {
    OURS: Implementation(ours, tolerance=1e-4),
    "autograd loop": Implementation(
        autograd_loop, max_rows=LOOP_ROWS, capturable=False, used_by="official code, OpenOOD"
    ),
    "vmap": Implementation(vmap, capturable=False, used_by="pytorch-ood"),
    "eager": Implementation(eager),
    "torch.compile": Implementation(compiled),
    BASELINE: Implementation(matmul, scores=False),
}
ALL = CPU | {
    "fast_gradnorm, torch path": Implementation(partial(ours, backend="torch"), tolerance=1e-4),
    **{name: Implementation(partial(kernel, name=name), tolerance=1e-4) for name in ("tiled", "library", "cluster")},
}


def for_device(device: str) -> dict[str, Implementation]:
    return ALL if device.startswith("cuda") else CPU


def memory_needed(name: str, w: Workload) -> int:
    """An estimate in bytes, to refuse what cannot fit before it takes the machine down."""
    rows = {"vmap": min(VMAP_CHUNK, w.batch), "autograd loop": 1}.get(name, 0)  # whose gradients are in memory at once
    gradients, logits = rows * w.classes * w.depth * w.itemsize, 4 * w.batch * w.classes
    return (w.batch + w.classes) * w.depth * w.itemsize + 3 * gradients + 4 * logits
