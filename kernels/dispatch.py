"""Chooses the kernel and configuration for a problem: one_hot for labels and the predicted target; for the uniform
target

    C <= 256                                    one_tile; half precision with odd D: library if it takes them
    B <= 64, 256 < C <= 4096                    tiled, in slices of the features
    otherwise, and float64                      library if it takes the problem, else tiled

Each kernel's `why_not` says what it cannot run; this module only sets the order. With batch_invariant every batch uses
the configuration of a large batch, and never the library, so the bits of a row's score do not depend on the other rows.
The price: a small batch runs on few programs. (float64 is the exception: its matmul is always the library's.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from . import library, one_hot, one_tile, rows, tiled
from .config import ANY, Config
from .device import architecture, multiprocessors
from .problem import Problem, Scores


class Kernel(NamedTuple):
    name: str
    score: Callable[[Problem, Scores, Config | None], None]
    why_not: Callable[[Problem, str], str]  #: of a problem and an architecture: "" if the kernel takes it


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("one_tile", one_tile.score_one_tile, one_tile.why_not),
        Kernel("tiled", tiled.score_tiled, tiled.why_not),
        Kernel("library", library.score_library, library.why_not),
        Kernel("rows", rows.score_rows, rows.why_not),
    )
}


class Choice(NamedTuple):
    """The name of a kernel in KERNELS, and its configuration."""

    kernel: str
    config: Config


def choose(problem: Problem, batch_invariant: bool = False) -> Choice:
    """The default for this problem, on the device of its tensors."""
    x, c = problem.features, problem.classes
    (b, d), device = x.shape, x.device
    if problem.logits is not None:
        return Choice(
            "rows", _configuration("rows", ANY, c, d, torch.promote_types(x.dtype, problem.logits.dtype), device)
        )
    kernel = preferred(problem, architecture(device), batch_invariant)
    return Choice(kernel, _configuration(kernel, ANY if batch_invariant else b, c, d, x.dtype, device))


def preferred(problem: Problem, arch: str, batch_invariant: bool = False) -> str:
    """The name of the first kernel, in order of preference, that takes the problem."""
    x, c = problem.features, problem.classes
    odd_halves = x.dtype.itemsize == 2 and x.shape[1] % 2 == 1  # only 2-byte loads can read these rows
    few = len(x) <= tiled.SLICED_MAX_ROWS and one_tile.MAX_CLASSES < c <= tiled.SLICED_MAX_CLASSES
    order: tuple[str, ...]
    if batch_invariant and x.dtype != torch.float64:
        order = ("one_tile", "tiled")
    elif odd_halves:
        order = ("library", "one_tile", "tiled")
    else:
        order = ("one_tile", "tiled", "library") if few else ("one_tile", "library", "tiled")
    return next(name for name in order if not KERNELS[name].why_not(problem, arch))


def why_not(problem: Problem) -> str:
    """Why no kernel takes the problem; empty where one does."""
    if problem.uniform:
        return ""
    reason = one_hot.why_not(problem, architecture(problem.features.device))
    return reason and f"the kernel for labels and the predicted target {reason}"


def score(problem: Problem, scores: Scores, batch_invariant: bool = False) -> None:
    """Scores by the default kernel. ValueError where `why_not` says so."""
    if batch_invariant:
        logits = problem.logits
        problem = problem._replace(
            features=_as_allocated(problem.features), logits=None if logits is None else _as_allocated(logits)
        )
    if not problem.uniform:
        one_hot.score_one_hot(problem, scores, _one_hot_configuration(problem, batch_invariant))
        return
    kernel, config = choose(problem, batch_invariant)
    KERNELS[kernel].score(problem, scores, config)


def token_statistics(problem: Problem, out: torch.Tensor, batch_invariant: bool = False) -> None:
    """one_hot.token_statistics; ValueError where `why_not` says so."""
    if batch_invariant:
        problem = problem._replace(features=_as_allocated(problem.features))
    one_hot.token_statistics(problem, out, _one_hot_configuration(problem, batch_invariant))


def _one_hot_configuration(problem: Problem, batch_invariant: bool) -> Config:
    x = problem.features
    return one_hot.configuration(ANY if batch_invariant else len(x), problem.classes, x.dtype, architecture(x.device))


def _as_allocated(x: torch.Tensor) -> torch.Tensor:
    """A contiguous, 16-byte aligned copy if needed: load width depends on alignment, and sum order on load width."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@lru_cache(4096)
def _configuration(kernel: str, b: int, c: int, d: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration in the kernel's table: a pure function of shape, dtype and device."""
    arch = architecture(device)
    if kernel == "one_tile":
        return one_tile.configuration(b, c, dtype, arch)
    if kernel == "tiled":
        return tiled.configuration(b, c, d, dtype, arch, multiprocessors(device))
    return rows.configuration(b, c, dtype, arch) if kernel == "rows" else library.CONFIGURATION
