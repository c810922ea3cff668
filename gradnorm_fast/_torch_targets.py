"""Label and predicted targets, and token statistics, in plain torch: one pass over the logits, in tiles of classes.

For target y the gradient's factor is p − e_y. To avoid subtracting from 1, everything comes from sums over the classes
other than y, with m = max z_c, d_c = (z_c − m)/T and softmax p̃, and S leaves out the 1 of one class with z_c = m:

    S = Σ exp(d_c) − 1      R_p = Σ exp(p·d_c)      Q = Σ d_c·exp(d_c)      a = (m − z_y)/T
    1 + W = Σ exp((z − max z)/T) over all classes      W = S·exp(min(a, 0)) + exp(−|a|)
    log p_y = min(−a, 0) − log1p(W)      log p_m = min(a, 0) − log1p(W), of a class with z_c = m
    ε = 1 − p_y = (1 + S)·p_m      entropy = −p_y·log p_y − ε·(log p_m + Q/(1 + S))
    ρ_p = Σ p̃_c^p = R_p/(1 + S)^p      ‖p − e_y‖_p = ε·(1 + ρ_p)^(1/p)      Σp² = p_y² + ε²·ρ₂

Only log p_y and the entropy need S itself, not just 1 + S. Sums within a tile have the dtype of the scores; merging
tiles and everything after it is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ._autocast import without_autocast
from ._targets import IGNORE
from ._torch_backward import norm_gradient
from ._torch_forward import (
    FLOOR,
    budget_of,
    converted,
    feature_norms,
    logits_of,
    part,
    row_norm,
    usable,
    with_bias,
)
from .kernels.problem import Problem, Scores

BUFFERS = 4  # live at once, each the size of a tile
FEWEST = 64  # count a row as at least this many classes: its sums take as much memory


class Others(NamedTuple):
    """Sums over all classes of a row except y, each (R, 1)."""

    y: Tensor  #: the class, int64; −1 if there is none
    z_y: Tensor  #: its logit; −inf if there is none
    m: Tensor  #: max z_c
    s: Tensor  #: Σ exp(d_c) − 1, d_c = (z_c − m)/T; 0 if there are no other classes
    powers: Tensor  #: Σ exp(p·d_c)
    products: Tensor  #: Σ d_c·exp(d_c)


class Probabilities:
    """Of each row (R, 1) and its class y, from the sums over the other classes; the cached ones when asked for."""

    def __init__(self, others: Others, inv_temperature: float, powers: float) -> None:
        _, z_y, m, self._s, self._r, self._q = others
        self._a = (m - z_y.masked_fill(z_y == torch.inf, torch.nan)) * inv_temperature
        self._top, self._powers = self._a.clamp_max(0.0), powers
        e_top = self._top.exp()
        self._w = self._a.abs().neg_().exp_().addcmul_(self._s, e_top)
        self.rest = e_top.addcmul(self._s, e_top).div_(1.0 + self._w)  # ε

    @cached_property
    def p_y(self) -> Tensor:
        return self._a.clamp_min(0.0).neg_().exp_().div_(1.0 + self._w)

    @cached_property
    def log_p_y(self) -> Tensor:
        return -self._a.clamp_min(0.0) - self._w.log1p()

    @cached_property
    def log_p_m(self) -> Tensor:
        return self._top - self._w.log1p()

    @cached_property
    def rho(self) -> Tensor:
        """ρ_p."""
        return (self._r.log() - self._powers * self._s.log1p()).exp()

    @cached_property
    def entropy(self) -> Tensor:
        of_others = self.log_p_m + self._q / (1.0 + self._s)
        return -_times(self.p_y, self.log_p_y) - _times(self.rest, of_others)

    @property
    def sum_squares(self) -> Tensor:
        """Σp², if ρ is ρ₂."""
        return self.p_y.square() + self.rest.square() * self.rho

    def residual_norm(self, p: float) -> Tensor:
        """‖p − e_y‖_p, if ρ is ρ_p."""
        if p in (1.0, math.inf):
            return self.rest * (2.0 if p == 1.0 else 1.0)
        return self.rest * (1.0 + self.rho) ** (1.0 / p)


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value, 0 where the weight is 0."""
    return torch.where(weight == 0, 0.0, weight * value)


def blocks(problem: Problem, dtype: torch.dtype) -> Iterator[tuple[slice, Problem, int]]:
    """Blocks of rows: their slice, their problem with features converted for the matmul, and the classes per tile."""
    budget, size = budget_of(problem.features), dtype.itemsize
    (batch, depth), classes = problem.features.shape, problem.classes
    elements = budget.chunk // BUFFERS // size
    rows, columns = max(elements // max(classes, FEWEST), math.isqrt(elements)), max(1, classes)
    convertible = max(1, budget.operand // max(1, depth * size))
    if not usable(problem.features, dtype):
        rows = min(rows, convertible)
    if problem.weight is not None and not usable(problem.weight, dtype):
        columns = min(columns, convertible)
    rows = min(rows, batch)
    columns = min(columns, max(1, elements // max(1, rows)))
    for i in range(0, batch, rows):
        some = problem.rows(i, i + rows)
        if not usable(some.features, dtype):
            some = some._replace(features=converted(some.features, dtype))
        yield slice(i, i + len(some.features)), some, columns


def tiles_of(problem: Problem, dtype: torch.dtype, columns: int) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Tiles of the problem's logits: the classes, their weight, and z (R, C'), which the caller may overwrite."""
    _, weight, bias, logits = problem[:4]
    for i in range(0, problem.classes, columns):
        stop = min(i + columns, problem.classes)
        if weight is None:
            assert logits is not None
            yield slice(i, stop), None, part(logits, i, stop, 1).to(dtype, copy=True)
        else:
            w, b = part(weight, i, stop), None if bias is None else part(bias, i, stop)
            if not usable(w, dtype):
                w = converted(w, dtype)
            with without_autocast(w.device):  # it would undo the conversion
                z = logits_of(problem._replace(weight=w, bias=b), dtype)
            yield slice(i, stop), w, z


def _set_column(z: Tensor, classes: slice, y: Tensor, value: Tensor | float) -> tuple[Tensor, Tensor]:
    """Replace class y by `value` in rows whose y is in this tile; returns whether it is, and the old values."""
    at = y - classes.start
    inside = at.clamp(0, z.shape[1] - 1)
    here, old = at == inside, z.gather(1, inside)
    z.scatter_(1, inside, torch.where(here, value, old).to(z.dtype))
    return here, old


Sums = tuple[Tensor, Tensor, Tensor, Tensor]  #: m, s, powers and products of some classes; m = −inf, rest 0 for none


def _sums(z: Tensor, inv_temperature: float, powers: float, entropy: bool) -> Tensor:
    """The sums over all classes of a tile, in its dtype, for cache-sized groups of rows; overwrites z.  # -> (4, R, 1)

    softmax(d) = exp(d)/S is faster than exp(d) alone (2/3 of its time), and its maximum is 1/S.
    """
    squares = powers == 2.0
    found = z.new_zeros(6, len(z), 1)
    step = max(1, budget_of(z).piece // 2 // (z.shape[1] * z.itemsize)) if z.is_contiguous() else len(z)
    for i in range(0, len(z), step):
        d = part(z, i, i + step)
        m, s, r, q, top, ties = part(found, i, i + step, 1).unbind(0)
        d.sub_(torch.amax(d, 1, keepdim=True, out=m))
        if inv_temperature != 1.0:
            d.mul_(inv_temperature)
        if entropy:
            d.clamp_min_(FLOOR)
        p = torch.softmax(d, 1) if d.is_contiguous() else torch.softmax(d.t(), 0).t()
        torch.amax(p, 1, keepdim=True, out=top)
        if not squares and powers not in (1.0, math.inf):
            torch.sum((d * powers).exp_(), 1, keepdim=True, out=r)
        if entropy:
            lower = d.sign()  # −1, or 0 for the classes with logit m
            torch.sum(lower, 1, keepdim=True, out=ties).add_(d.shape[1])  # classes with logit m
            torch.sum(lower.mul_(p), 1, keepdim=True, out=s).neg_()
            torch.sum(d.mul_(p), 1, keepdim=True, out=q)
        else:
            torch.sum(p, 1, keepdim=True, out=s)
        if squares:
            torch.sum(p.square_(), 1, keepdim=True, out=r)
    scale, ties = found[4].reciprocal_(), found[5]
    found[1].mul_(scale).add_(ties.sub_(1.0))  # all but one of the ties count
    if entropy:
        found[3].mul_(scale)
    if squares:
        found[2].mul_(scale.square_())
    found[1:4].masked_fill_(found[0] == -torch.inf, 0.0)  # NaN from a softmax of nothing but −inf
    return found[:4]


def merged(a: Sums, b: Sums, inv_temperature: float, powers: float) -> Sums:
    """The sums over both sets of classes, relative to the larger maximum."""
    m = torch.maximum(a[0], b[0])
    shift = torch.where(m == -torch.inf, 0.0, m)
    s, r, q = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
    higher = (b[0] > a[0]).to(m.dtype)  # 1 where S leaves out a class of b, else 0
    for (old_m, old_s, old_r, old_q), one in ((a, higher), (b, 1.0 - higher)):
        d = (old_m - shift) * inv_temperature
        e = d.exp()
        s.addcmul_(one + old_s, e)
        r.addcmul_(old_r, (d * powers).exp() if powers < math.inf else e)
        q.addcmul_(old_q + (1.0 + old_s) * d.clamp_min(FLOOR), e)
    return m, s, r, q


def others_of(
    problem: Problem, tiles: Iterator[tuple[slice, Tensor | None, Tensor]], powers: float, entropy: bool
) -> Others:
    """The sums for the problem's target, in one pass. `powers` is p; the products are 0 unless `entropy`."""
    n, device, inv_temperature = len(problem.features), problem.features.device, 1.0 / problem.temperature
    dtype = torch.float64
    m = z_y = torch.full((n, 1), -torch.inf, dtype=dtype, device=device)
    sums: Sums = m, *(torch.zeros_like(m),) * 3  # a shard may have no classes
    given = isinstance(problem.target, Tensor)
    if isinstance(problem.target, Tensor):
        labels = problem.target[:, None]
        y = labels.masked_fill((labels < 0) | (labels >= problem.classes), -1)
    else:
        y = torch.full((n, 1), -1, dtype=torch.int64, device=device)
    for classes, _, z in tiles:
        if given:
            here, old = _set_column(z, classes, y, -torch.inf)
            z_y = torch.where(here, old.to(dtype), z_y)
        else:  # of the tile's maximum and the running one, the smaller belongs to the other classes
            top, at = z.max(1, keepdim=True)
            better = ~(top <= z_y)  # NaN too
            z.scatter_(1, at, torch.where(better, z_y, top.to(dtype)).to(z.dtype))
            z_y, y = torch.where(better, top.to(dtype), z_y), torch.where(better, at + classes.start, y)
        m, s, r, q = _sums(z, inv_temperature, powers, entropy).to(dtype).unbind(0)
        sums = merged(sums, (m, s, r, q), inv_temperature, powers) if classes.start else (m, s, r, q)
    return Others(y, z_y, *sums)


def _for_labels(problem: Problem, y: Tensor, values: Tensor) -> Tensor:
    """The values (R, 1) of the problem's rows and their `Others.y`: 0 if the label is IGNORE, NaN if it is no class."""
    if isinstance(problem.target, str):
        return values
    return values.masked_fill(y < 0, torch.nan).masked_fill_(problem.target[:, None] == IGNORE, 0.0)


def forward(problem: Problem, dtype: torch.dtype, all_fields: bool) -> Scores:
    """The scores of the problem's rows, for a label or the predicted target; there are no other fields for these."""
    assert not all_fields
    scores, inv_temperature, p = Scores.empty(problem.features, dtype, False), 1.0 / problem.temperature, problem.p
    for rows, some, columns in blocks(problem, dtype):
        others = others_of(some, tiles_of(some, dtype, columns), p, False)
        norm = Probabilities(others, inv_temperature, p).residual_norm(p) * inv_temperature
        norm *= with_bias(feature_norms(some, dtype), problem.bias_norm, p)
        scores.out[0, rows] = _for_labels(some, others.y, norm)[:, 0]
    return scores


def token_statistics(problem: Problem, out: Tensor) -> None:
    """Write log p_y, entropy, Σp² and ‖p − e_y‖₂ of each row to out (4, B)."""
    for rows, some, columns in blocks(problem, out.dtype):
        others = others_of(some, tiles_of(some, out.dtype, columns), 2.0, True)
        found = Probabilities(others, 1.0 / problem.temperature, 2.0)
        fields = found.log_p_y, found.entropy, found.sum_squares, found.residual_norm(2.0)
        for k, value in enumerate(fields):
            out[k, rows] = _for_labels(some, others.y, value)[:, 0]


class _Slope(NamedTuple):
    """Coefficients (R, 1) of ∂/∂z of a row's value: p̃_c·(constant + linear·p̃_c + log·d_c) for c ≠ y, own for y."""

    constant: Tensor
    linear: Tensor
    log: Tensor
    own: Tensor


def _propagate(
    problem: Problem,
    dtype: torch.dtype,
    needed: list[bool],
    powers: float,
    entropy: bool,
    slope_of: Callable[[slice, Problem, Probabilities, Others], tuple[_Slope, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, logits, weight and bias, empty if not needed, from each row's slope in z and x."""
    inputs = problem.features, problem.logits, problem.weight, problem.bias
    grad_x, grad_z, grad_w, grad_b = (
        torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format)
        if need and t is not None
        else problem.features.new_empty(0)
        for t, need in zip(inputs, needed, strict=True)
    )
    inv_temperature = 1.0 / problem.temperature
    for rows, some, columns in blocks(problem, dtype):
        x = some.features
        others = others_of(some, tiles_of(some, dtype, columns), powers, entropy)
        slope, of_x = slope_of(rows, some, Probabilities(others, inv_temperature, powers), others)
        constant, linear, log, own = (_for_labels(some, others.y, v).to(dtype) for v in slope)
        shift = torch.where(others.m == -torch.inf, 0.0, others.m).to(dtype)
        inv_s = (1.0 + others.s).reciprocal_().to(dtype)
        if needed[0] and of_x is not None:
            grad_x[rows] = of_x
        for classes, w, z in tiles_of(some, dtype, columns):
            _set_column(z, classes, others.y, -torch.inf)
            d = z.sub_(shift).mul_(inv_temperature).clamp_min_(FLOOR)
            p = d.exp().mul_(inv_s)
            dz = d.mul_(log).add_(constant).addcmul_(p, linear).mul_(p)
            _set_column(dz, classes, others.y, own)
            if needed[0] and w is not None:
                grad_x[rows].addmm_(dz, w)
            if needed[1]:
                grad_z[rows, classes] = dz
            if needed[2]:
                grad_w[classes].addmm_(dz.t(), x)
            if needed[3]:
                grad_b[classes] += dz.sum(0)
    grads = zip((grad_x, grad_z, grad_w, grad_b), inputs, strict=True)
    return tuple(g if t is None else g.to(t.dtype) for g, t in grads)  # type: ignore[return-value]


def backward(grad: Tensor, problem: Problem, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, logits, weight and bias, empty if not needed, from that of Scores.out (1, B).

    With N = ‖p − e_y‖_p:  N = 2ε for p = 1, so ∂N/∂z_c = 2 p_y ε p̃_c/T;  for p = 2, N = ε√(1 + ρ) and ∂N/∂z_c =
    ε p̃_c (p̃_c + p_y − ε ρ)/(√(1 + ρ) T). ∂N/∂z_y = −p_y N/T for both. The predicted class is treated as constant.
    """
    dtype, inv_temperature = grad.dtype, 1.0 / problem.temperature

    def slope_of(rows: slice, some: Problem, found: Probabilities, others: Others) -> tuple[_Slope, Tensor]:
        x, g, n = some.features, grad[0, rows, None], found.residual_norm(problem.p)
        norm = with_bias(row_norm(x.clone(), problem.p), problem.bias_norm, problem.p)
        to_z = g * norm * inv_temperature * inv_temperature
        zero = torch.zeros_like(n)
        if problem.p == 1.0:
            slope = _Slope(to_z * found.p_y * n, zero, zero, -to_z * found.p_y * n)
        else:
            root = (1.0 + found.rho).sqrt()
            constant = to_z * found.rest * (found.p_y - found.rest * found.rho) / root
            slope = _Slope(constant, to_z * found.rest / root, zero, -to_z * found.p_y * n)
        of_x = _for_labels(some, others.y, g * n * inv_temperature).to(dtype)
        return slope, norm_gradient(x, norm, problem.p) * of_x

    return _propagate(problem, dtype, needed, problem.p, False, slope_of)


def token_statistics_backward(grad: Tensor, problem: Problem, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias, empty if not needed, from those of log p_y and entropy (2, B).

    ∂log p_y/∂z = (e_y − p)/T;  ∂entropy/∂z_c = −p_c (log p_c + entropy)/T, with p_c = ε p̃_c = p_m exp(d_c).
    """
    inv_temperature = 1.0 / problem.temperature

    def slope_of(rows: slice, some: Problem, found: Probabilities, others: Others) -> tuple[_Slope, None]:
        g, h = (grad[:, rows, None] * inv_temperature).unbind(0)
        constant = -g * found.rest - h * _times(found.rest, found.log_p_m + found.entropy)
        own = g * found.rest - h * _times(found.p_y, found.log_p_y + found.entropy)
        return _Slope(constant, torch.zeros_like(constant), -h * found.rest, own), None

    x, _, w, b = _propagate(problem, grad.dtype, [needed[0], False, *needed[1:]], 2.0, True, slope_of)
    return x, w, b
