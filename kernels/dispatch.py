"""Chooses the kernel and configuration for a problem: one_hot for labels and the predicted target, rows for given
logits; else

    C <= 256                                    one_tile; halves read 2 bytes at a time: library if it takes them
    B <= 64, 256 < C <= 4096                    tiled, in slices of the features
    otherwise, and float64                      library if it takes the problem, else tiled

Each kernel's `why_not` says what it cannot run; this module only sets the order. With batch_invariant every batch uses
the configuration of a large batch, and never the library, so the bits of a row's score do not depend on the other rows.
The price: a small batch runs on few programs. (float64 is the exception: its matmul is always the library's.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from . import library, one_hot, one_tile, rows, tiled
from .config import ANY, Config, Shape
from .device import architecture, vector
from .problem import Problem, Scores


class Kernel(Protocol):
    """A kernel is a module of this folder."""

    def score(self, problem: Problem, scores: Scores, config: Config) -> None:
        """Write the scores of a problem that the kernel takes."""

    def configuration(self, shape: Shape) -> Config:
        """The configuration for problems of this shape."""

    def why_not(self, problem: Problem, arch: str) -> str:
        """Why the kernel does not take the problem on this architecture; empty if it does."""


KERNELS: dict[str, Kernel] = {
    "one_tile": one_tile, "tiled": tiled, "library": library, "rows": rows, "one_hot": one_hot
}  # fmt: skip


class Choice(NamedTuple):
    """The name of a kernel in KERNELS, and its configuration."""

    kernel: str
    config: Config


def choose(problem: Problem, batch_invariant: bool = False) -> Choice:
    """The default for this problem, on the device of its tensors. ValueError where `why_not` says so."""
    kernel = preferred(problem, architecture(problem.features.device), batch_invariant)
    return Choice(kernel, _configuration(kernel, Shape.of(problem, ANY if batch_invariant else 0)))


def preferred(problem: Problem, arch: str, batch_invariant: bool = False) -> str:
    """The name of the first kernel, in order of preference, that takes the problem."""
    x, w, c = problem.features, problem.weight, problem.classes
    few = len(x) <= tiled.SLICED_MAX_ROWS and one_tile.MAX_CLASSES < c <= tiled.SLICED_MAX_CLASSES
    order: tuple[str, ...]
    if not problem.uniform:
        order = ("one_hot",)
    elif problem.logits is not None:
        order = ("rows",)
    elif batch_invariant and x.dtype != torch.float64:
        order = ("one_tile", "tiled")
    elif w is not None and x.dtype.itemsize == 2 and vector(x.shape[1], x.stride(0), w.stride(0)) == 1:
        # only 2-byte loads can read these rows
        order = ("library", "one_tile", "tiled")
    else:
        order = ("one_tile", "tiled", "library") if few else ("one_tile", "library", "tiled")
    for name in order:
        reason = KERNELS[name].why_not(problem, arch)
        if not reason:
            return name
    raise ValueError(f"{order[-1]} {reason}")


def why_not(problem: Problem) -> str:
    """Why no kernel takes the problem; empty if one does: for the uniform target always."""
    if problem.uniform:
        return ""
    reason = one_hot.why_not(problem, architecture(problem.features.device))
    return reason and f"the kernel for labels and the predicted target {reason}"


def score(problem: Problem, scores: Scores, batch_invariant: bool = False) -> None:
    """Scores, or token statistics (one_hot.score), by the default kernel. ValueError where `why_not` says so."""
    problem = _as_allocated(problem) if batch_invariant else problem
    kernel, config = choose(problem, batch_invariant)
    KERNELS[kernel].score(problem, scores, config)


def run(kernel: Kernel, problem: Problem, scores: Scores, config: Config | None = None) -> None:
    """Scores by any kernel, by default in its own configuration. ValueError if it does not take the problem."""
    if reason := kernel.why_not(problem, architecture(problem.features.device)):
        raise ValueError(f"{kernel.__name__.rpartition('.')[2]} {reason}")  # type: ignore[attr-defined]
    kernel.score(problem, scores, config or kernel.configuration(Shape.of(problem)))


def _as_allocated(problem: Problem) -> Problem:
    """The problem with features and logits contiguous and 16-byte aligned, copied if needed: load width depends on
    alignment, and sum order on load width."""

    def copied(t: torch.Tensor) -> torch.Tensor:
        fits = t.stride() == (t.shape[1], 1) and t.data_ptr() % 16 == 0  # a row alone is contiguous at any stride
        return t if fits else t.new_empty(t.shape).copy_(t)

    logits = None if problem.logits is None else copied(problem.logits)
    return problem._replace(features=copied(problem.features), logits=logits)


@lru_cache(4096)
def _configuration(kernel: str, shape: Shape) -> Config:
    return KERNELS[kernel].configuration(shape)
