"""The score in plain torch, for CPUs and for devices without Triton.

Rows are processed in chunks. The logits of a chunk are computed once, then scored piece by piece in float64.
Extra memory does not grow with B·C (see Budget). docs/numerics.md has the formulas and the reasons for them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear

from ._torch_spread import BUFFERS, spread_of_sums, spread_sums
from .kernels.problem import Problem, Scores, copies

MIB = 2**20
MEMORY = 32 * MIB  # extra memory of a forward on a CPU, unless three rows of logits or features need more


class Budget(NamedTuple):
    """Bytes that a call may allocate besides its result; a single row may exceed them."""

    chunk: int  # logits, and the temporaries of a piece
    piece: int  # rows that are scored at once; sized for the caches on a CPU
    operand: int  # features, or classes of the weight, converted for the matmul: each


CPU, GPU = Budget(22 * MIB, 4 * MIB, 4 * MIB), Budget(1792 * MIB, 256 * MIB, 256 * MIB)

# Measured on CPUs: with up to FEW rows, or fewer than NARROW classes, BLAS is up to five times as fast if the logits
# are transposed in memory. The passes over 10 classes take 1.5 times as long if the classes of a row are contiguous.
FEW = 128
NARROW = 16
STATISTICS = 512  # bytes that the statistics and fields of a row take
FLOOR = -1000.0  # replaces −inf, which times 0 is NaN; its exp is 0 too


def budget_of(t: Tensor) -> Budget:
    """The budget of its device."""
    return CPU if t.is_cpu else GPU


def part(t: Tensor, start: int, stop: int, dim: int = 0) -> Tensor:
    """t[start:stop], or t itself if that is all of it: a view costs as much as a sum over a row."""
    size = t.shape[dim]
    return t if start == 0 and stop >= size else t.narrow(dim, start, min(stop, size) - start)


def usable(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether BLAS can read this matrix without a copy."""
    return matrix.dtype == dtype and not copies(matrix)


def converted(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype, memory_format=torch.contiguous_format, copy=True)


def rows_at_once(problem: Problem, dtype: torch.dtype, size: int) -> int:
    """How many rows to process at a time, so that their logits and converted features fit."""
    step = size // (problem.classes * dtype.itemsize)
    if problem.weight is not None and not usable(problem.features, dtype):
        operand = budget_of(problem.features).operand
        step = min(step, operand // max(1, problem.features.shape[1] * dtype.itemsize))
    return max(1, step)


def logits_of(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The logits of all rows in dtype. If the weight needs conversion, slices of classes are converted.  # -> (R, C)"""
    x, weight, bias, logits = problem[:4]
    if logits is not None:
        return logits.to(dtype)
    assert weight is not None
    rows, classes = x.shape[0], weight.shape[0]
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if not usable(x, dtype):
        x = converted(x, dtype)
    transposed = rows > 1 and (rows <= FEW or classes < NARROW)
    if not transposed and usable(weight, dtype):
        return linear(x, weight, bias)
    z = x.new_empty((classes, rows)).t() if transposed else x.new_empty((rows, classes))
    step = classes
    if not usable(weight, dtype):
        step = max(1, budget_of(x).operand // max(1, x.shape[1] * dtype.itemsize))
    for i in range(0, classes, step):
        w, out = part(weight, i, i + step), part(z, i, i + step, 1)
        if step < classes or not usable(w, dtype):
            w = converted(w, dtype)
        if bias is None:
            torch.mm(x, w.t(), out=out)
        else:
            torch.addmm(part(bias, i, i + step), x, w.t(), out=out)
    return z


def shifted(z: Tensor, inv_temperature: float) -> Tensor:
    """(z − max z)/T of each row in float64, in new memory.  # (R, C) -> (R, C)"""
    d = z.clone() if z.dtype == torch.float64 else z.double()
    d.sub_(d.amax(1, keepdim=True))
    return d if inv_temperature == 1.0 else d.mul_(inv_temperature)


def deviations(d: Tensor) -> tuple[Tensor, Tensor]:
    """u = t·(p − 1/C) and t = Σ exp d of rows d = (z − max z)/T; overwrites d.  # (R, C) -> (R, C), (R, 1)

    q = expm1(d) is t·p − 1, so u = q − mean q and t = C + Σq. Rounding in the sum, in 1/C and in their product changes
    the mean by at most 4·2⁻⁵³ of the largest |q|. Σ|u| is at least that |q|, so its relative error is at most C·2⁻⁵¹.
    """
    classes = float(d.shape[1])  # torch takes twice as long to add an int
    q = d.expm1_().sum(1, keepdim=True)
    return d.sub_(q, alpha=1.0 / classes), q.add_(classes)


def row_norm(u: Tensor, p: float) -> Tensor:
    """‖u‖_p of each row, without overflow or underflow of the powers; overwrites u.  # (R, N) -> (R, 1)"""
    magnitudes = u.abs_()
    if p == 1.0:
        return magnitudes.sum(1, keepdim=True)
    if not u.shape[1]:
        return u.new_zeros(len(u), 1)
    largest = magnitudes.amax(1, keepdim=True)
    if p == math.inf:
        return largest
    magnitudes.div_(largest.masked_fill(largest == 0, 1.0))
    powers = magnitudes.square_() if p == 2.0 else magnitudes.pow_(p)
    root = powers.sum(1, keepdim=True).pow_(0.5 / p)  # in two halves: C^(1/p) alone may overflow
    return largest.mul_(root).mul_(root)


def with_bias(norm: Tensor, bias_norm: float, p: float) -> Tensor:
    """‖(x, bias_norm)‖_p, given ‖x‖_p.  # (R, 1) -> (R, 1)"""
    if not bias_norm:
        return norm
    bias = torch.full_like(norm, bias_norm)
    return norm.hypot(bias) if p == 2.0 else row_norm(torch.cat([norm, bias], 1), p)


def feature_norms(problem: Problem, dtype: torch.dtype) -> Tensor:
    """‖x‖_p of each row, NaN if it is not finite: such a row has no score.  # -> (R, 1)"""
    x, p = problem.features, problem.p
    rows, depth = x.shape
    step = max(1, budget_of(x).piece // max(1, depth * torch.float64.itemsize))
    if rows > step:
        return torch.cat([feature_norms(problem._replace(features=some), dtype) for some in x.split(step)])
    if p == 1.0:
        norm = x.abs().sum(1, keepdim=True, dtype=dtype)
    elif p == 2.0 and dtype == torch.float32:  # the squares neither overflow nor underflow in float64
        norm = vector_norm(x, 2, 1, keepdim=True, dtype=torch.float64).to(dtype)
    else:
        norm = row_norm(converted(x, dtype), p)
    return norm.nan_to_num_(torch.nan, torch.nan)


def _output_norm(v: Tensor, problem: Problem, dtype: torch.dtype) -> Tensor:
    """output_norm in dtype, from ‖p − 1/C‖_p; overwrites v."""
    for factor in (problem.scale, 1.0 / problem.temperature):  # in this order, or 0·inf gives NaN
        if factor != 1.0:
            v.mul_(factor)
    return v.float() if dtype == torch.float32 else v  # `to` takes twice as long


def _score(problem: Problem, z: Tensor) -> Tensor:
    """The scores of the problem's rows, whose logits are z.  # -> (1, R)"""
    norm = with_bias(feature_norms(problem, z.dtype), problem.bias_norm, problem.p)
    u, t = deviations(shifted(z, 1.0 / problem.temperature))
    return _output_norm(row_norm(u, problem.p).div_(t), problem, z.dtype).mul_(norm).t()


def _statistics(z: Tensor, problem: Problem, at_once: int) -> tuple[Tensor, Tensor]:
    """Of rows of logits z: max z, t, ‖t·(p − 1/C)‖_p and the sums of `spread_of_sums`; and the class of max z. A single
    row is read `at_once` classes at a time.  # (R, C) -> (3 + 7, R, 1), (R, 1)"""
    m, top = z.max(1, keepdim=True)
    d = shifted(z, 1.0 / problem.temperature)
    sums = spread_sums(d, top, at_once)
    u, t = deviations(d)
    return torch.stack([m.to(t.dtype), t, row_norm(u, problem.p), *sums]), top


def _write_fields(problem: Problem, statistics: Tensor, top: Tensor, scores: Scores) -> None:
    """Write all fields of the problem's rows, from their statistics."""
    out, prediction = scores
    m, t, v, *sums = statistics.unbind(0)
    v, spread = v / t, spread_of_sums(sums, problem.classes)
    norm = feature_norms(problem, out.dtype)
    augmented = with_bias(norm, problem.bias_norm, problem.p)
    poison = (norm + v) * 0.0  # if the score is NaN, so are all other fields
    v = _output_norm(v, problem, out.dtype)
    exgrad = spread.gini * augmented * (2.0 / problem.temperature)
    fields = [augmented * v, norm, v, m, t.reciprocal(), m + t.log() * problem.temperature]
    fields += [spread.entropy, spread.sum_squares, exgrad, spread.kl_uniform]
    torch.add(torch.cat(fields, 1), poison, out=out.t())
    assert prediction is not None
    prediction.copy_(torch.where(poison == 0.0, top, 0)[:, 0])


def forward(problem: Problem, dtype: torch.dtype, all_fields: bool) -> Scores:
    """The scores of the problem's rows, for the uniform target."""
    features, wide = problem.features, problem.classes * torch.float64.itemsize
    batch, budget = features.shape[0], budget_of(features)
    piece = max(budget.piece, wide)
    step, rows = rows_at_once(problem, dtype, budget.chunk - piece - budget.piece), piece // wide
    if batch <= min(step, rows) and not all_fields:
        return Scores(_score(problem, logits_of(problem, dtype)), None)
    if all_fields:  # more buffers in the same memory, and their statistics
        step, rows = min(step, budget.piece // STATISTICS), max(1, 2 * budget.piece // (BUFFERS * wide))
    scores = Scores.empty(features, dtype, all_fields)
    for i in range(0, batch, step):
        chunk, results = problem.rows(i, i + step), scores.rows(i, i + step)
        z = logits_of(chunk, dtype)
        pieces = range(0, z.shape[0], rows)
        if all_fields:
            at_once = budget.piece // (BUFFERS * torch.float64.itemsize)
            found = [_statistics(part(z, j, j + rows), problem, at_once) for j in pieces]
            statistics, top = found[0] if len(found) == 1 else (torch.cat(t, -2) for t in zip(*found, strict=True))
            _write_fields(chunk, statistics, top, results)
        else:
            for j in pieces:
                part(results.out, j, j + rows, 1).copy_(_score(chunk.rows(j, j + rows), part(z, j, j + rows)))
        del z  # before the next chunk is allocated
    return scores
