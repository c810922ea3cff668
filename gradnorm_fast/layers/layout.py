"""Where a tensor keeps its samples. We learn this by running the model on two images and on one of them.

Most layers have the samples in dimension 0. Attention may put positions first, or fold windows or positions into the
batch. Mistaking one sample's rows for another's would give wrong norms without an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Dimension `dim` of a tensor runs over outer x samples x inner."""

    sizes: tuple[int, ...]  #: the tensor's shape for one sample
    dim: int = 0
    outer: int = 1
    inner: int = 1

    def shape(self, samples: int) -> tuple[int, ...]:
        """The tensor's shape for this many samples."""
        return tuple(n * samples if i == self.dim else n for i, n in enumerate(self.sizes))

    @property
    def leading(self) -> bool:
        """Whether each sample is one block of dimension 0."""
        return self.dim == 0 and self.outer == 1

    def unfolded(self, tensor: Tensor, samples: int) -> Tensor:
        """A view (samples, ..., outer, inner, ...) of a tensor that has this layout up to dimension `dim`."""
        return tensor.unflatten(self.dim, (self.outer, samples, self.inner)).movedim(self.dim + 1, 0)


def find_layout(two: Tensor, one: Tensor) -> Layout | None:
    """The layout of a result, from its values for two samples and for the second of them alone.

    None if no layout fits, or if two fit equally well.
    """
    if two.dim() != one.dim():
        return None
    unequal = [i for i, (m, n) in enumerate(zip(two.shape, one.shape, strict=True)) if m != n]
    if len(unequal) != 1 or two.shape[unequal[0]] != 2 * one.shape[unequal[0]]:
        return None
    sizes, dim = tuple(one.shape), unequal[0]
    found = []
    for outer in _divisors(one.shape[dim]):
        layout = Layout(sizes, dim, outer, one.shape[dim] // outer)
        found.append((_distance(layout.unfolded(two, 2)[1], layout.unfolded(one, 1)[0]), layout))
    found.sort(key=lambda item: item[0])
    tied = len(found) > 1 and found[1][0] <= 2 * found[0][0]  # also where all samples are alike
    return found[0][1] if found[0][0] <= 1.0 and not tied else None


def _divisors(n: int) -> Iterator[int]:
    return (d for d in range(1, n + 1) if n % d == 0)


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the rounding that another batch size may cause; NaN counts as inf."""
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    largest = torch.where(b.isfinite(), b.abs(), 0.0).max().item()
    tolerance = math.sqrt(torch.finfo(torch.float32).eps) * largest or 1.0
    distance = torch.where(a == b, 0.0, (a - b).abs()).max().item() / tolerance
    return math.inf if math.isnan(distance) else distance
