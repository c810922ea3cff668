"""How spread out a softmax is: entropy, Σp², 1 − Σp² and KL(uniform ‖ p), in float64 without cancellation.

From d = (z − max z)/T. With sums over all classes but the first maximum, S = Σ exp d, R = Σ exp 2d, Q = Σ d·exp d,

    entropy = log(1 + S) − Q/(1 + S)      Σp² = (1 + R)/(1 + S)²      1 − Σp² = (2S + S² − R)/(1 + S)²

where −Q >= 0 and R <= S. With h = d − mean d, whose sum is 0,

    KL = log mean exp h = log(1 + mean φ(h))      φ(h) = expm1(h) − h >= 0

Rounding the mean by ε moves the KL by at most ε·KL. exp h overflows where −mean d is large; there
log((1 + S)/C) − mean d loses nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

BUFFERS = 3  # live at once, each the size of d; d is one of them
# Below SMALL the two terms h²/2 + h³/6 replace φ: their error is h²/12 < 4e-11, that of expm1(h) − h above it
# 2⁻⁵¹/h < 3e-11, both relative.
SMALL = 2e-5
# Where −mean d > FAR, the difference of logarithms is exact to (FAR + log C)/(FAR − log C) roundings.
FAR = 64.0


class Spread(NamedTuple):
    """Of rows of probabilities p, each (R, 1)."""

    entropy: Tensor  #: −Σ p log p
    mean: Tensor  #: Σ p·d, so log p + entropy = d − mean
    sum_squares: Tensor  #: Σp²
    gini: Tensor  #: 1 − Σp²
    kl_uniform: Tensor  #: KL(uniform ‖ p); inf if a class is masked


Sums = list[Tensor]  #: S, R, Q, Σd, and Σh², Σh³ and Σφ(h) of the small, small and other h; each (R, 1)


def spread_of(d: Tensor, top: Tensor) -> Spread:
    """The statistics of rows d = (z − max z)/T, given a class `top` of the maximum, (R, 1).  # (R, C) -> (R, 1) each

    d is written to and restored.
    """
    return spread_of_sums(spread_sums(d, top), d.shape[1])


def spread_of_sums(sums: Sums, classes: int) -> Spread:
    """The statistics of rows of so many classes, from `spread_sums`."""
    s, r, q, total_d, squares, cubes, excess = sums
    total = s + 1.0
    mean, squared, centre = q / total, total.square(), total_d / classes
    far = (total / classes).log() - centre
    kl_uniform = torch.where(centre < -FAR, far, ((squares / 2.0 + cubes / 6.0 + excess) / classes).log1p())
    return Spread(s.log1p() - mean, mean, (r + 1.0) / squared, ((s + 2.0) * s - r) / squared, kl_uniform)


def spread_sums(d: Tensor, top: Tensor, part: int | None = None) -> Sums:
    """The sums over rows d that the statistics are made of.  # (R, C), (R, 1) -> 7 x (R, 1)

    d is written to and restored. A single row is read in parts of `part` classes, to bound the memory; None: at once.
    """
    parts = (d,) if part is None or len(d) > 1 else d.split(part, 1)
    at_top = d.gather(1, top)  # 0, or NaN
    d.scatter_(1, top, -math.inf)
    sums = _added([_sums(some) for some in parts])
    d.scatter_(1, top, at_top)
    total = d.sum(1, keepdim=True)
    centre = total / d.shape[1]
    return [*sums, total, *_added([_excess(some - centre) for some in parts])]


def _added(found: list[Sums]) -> Sums:
    """The sums over all parts."""
    return found[0] if len(found) == 1 else [torch.stack(terms).sum(0) for terms in zip(*found, strict=True)]


def _sums(d: Tensor) -> Sums:
    """Σ exp d, Σ exp 2d and Σ d·exp d.  # (R, C) -> 3 x (R, 1)"""
    e = d.exp()
    s, r = e.sum(1, keepdim=True), vector_norm(e, 2, 1, keepdim=True).square_()
    return [s, r, e.mul_(d).nansum(1, keepdim=True)]  # −inf·0 is NaN


def _excess(h: Tensor) -> Sums:
    """Σh² and Σh³ of the small h, Σφ(h) of the others; overwrites h.  # (R, C) -> 3 x (R, 1)"""
    large = torch.nn.functional.hardshrink(h, SMALL)
    small = h.sub_(large)
    squares, cubes = vector_norm(small, 2, 1, keepdim=True).square_(), small.pow_(3).sum(1, keepdim=True)
    return [squares, cubes, torch.expm1(large, out=small).sub_(large).sum(1, keepdim=True)]
