"""The score in plain torch: what runs on CPUs and on devices without Triton.

Rows come in chunks. The logits of a chunk are written once and then worked on in pieces that stay in the cache. Extra
memory never depends on B·C (see Budget). docs/numerics.md has the formulas, and why each line is as it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .kernels.problem import Problem, Scores, copies

MIB = 2**20
MEMORY = 32 * MIB  # what a forward takes on a CPU beside its result, unless three rows of logits or features take more


class Budget(NamedTuple):
    """Bytes that the tensors of a call may take beside its result, longer rows apart."""

    chunk: int  # logits, and what is computed from a piece of them
    piece: int  # of rows that are worked on at once: on a CPU, what its caches hold
    operand: int  # features, and classes of the weight, converted for the matmul: each


CPU, GPU = Budget(22 * MIB, MIB, 4 * MIB), Budget(1792 * MIB, 256 * MIB, 256 * MIB)

# As measured on CPUs: BLAS is up to five times as fast if the logits of FEW rows, or of NARROW rows, lie transposed in
# memory; softmax over 10 contiguous classes takes five times as long as across them.
FEW = 128
NARROW = 16

QUICK = 0.25  # Σ|p − 1/C| from which the quick form is exact


def budget_of(device: torch.device) -> Budget:
    return CPU if device.type == "cpu" else GPU


def part(t: Tensor, start: int, stop: int, dim: int = 0) -> Tensor:
    """t[start:stop], and t itself where that is all of it: a view costs as much as a sum over a row."""
    size = t.shape[dim]
    return t if start == 0 and stop >= size else t.narrow(dim, start, min(stop, size) - start)


def usable(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether BLAS reads this matrix as it lies."""
    return matrix.dtype == dtype and not copies(matrix)


def converted(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype, memory_format=torch.contiguous_format, copy=True)


def rows_at_once(problem: Problem, dtype: torch.dtype, size: int) -> int:
    """How many rows to take at a time, so that their logits and converted features fit."""
    step = size // (problem.classes * dtype.itemsize)
    if problem.weight is not None and not usable(problem.features, dtype):
        operand = budget_of(problem.features.device).operand
        step = min(step, operand // max(1, problem.features.shape[1] * dtype.itemsize))
    return max(1, step)


def logits_of(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The logits of all rows in dtype; the weight is converted, where it must be, in slices of classes.  # -> (R, C)"""
    x, weight, bias, logits = problem[:4]
    if logits is not None:
        return logits.to(dtype)
    assert weight is not None
    rows, classes = x.shape[0], weight.shape[0]
    bias = bias if bias is None else bias.to(dtype)
    if not usable(x, dtype):
        x = converted(x, dtype)
    transposed = rows > 1 and (rows <= FEW or classes < NARROW)
    if not transposed and usable(weight, dtype):
        return linear(x, weight, bias)
    z = x.new_empty((classes, rows)).t() if transposed else x.new_empty((rows, classes))
    step = classes
    if not usable(weight, dtype):
        step = max(1, budget_of(x.device).operand // max(1, x.shape[1] * dtype.itemsize))
    for i in range(0, classes, step):
        w, out = part(weight, i, i + step), part(z, i, i + step, 1)
        if step < classes or not usable(w, dtype):
            w = converted(w, dtype)
        if bias is None:
            torch.mm(x, w.t(), out=out)
        else:
            torch.addmm(part(bias, i, i + step), x, w.t(), out=out)
    return z


def softmax(z: Tensor, inv_temperature: float) -> Tensor:
    """softmax(z/T), shifted before it is divided."""
    if inv_temperature != 1.0:
        z = (z - z.amax(1, keepdim=True)).mul_(inv_temperature)
    rows, classes = z.shape
    return torch.softmax(z, 1) if classes >= NARROW or rows == 1 else torch.softmax(z.t(), 0).t()


def centred(z: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """The careful form: u = t·(p − 1/C) of each row, and t.  # (R, C) -> (R, C), (R, 1)

    With r = T·log mean exp(z/T), q = expm1((z − r)/T) is t·p − 1 for t = C + Σq. The first r errs by T times the
    rounding of its logarithm; the mean of q tells by how much.
    """
    classes, m = z.shape[1], z.amax(1, keepdim=True)
    s = (z - m).mul_(inv_temperature).exp_().sum(1, keepdim=True)
    r = m + (s / classes).log_() / inv_temperature
    error = (z - r).mul_(inv_temperature).expm1_().sum(1, keepdim=True) / classes
    r += torch.where(error.abs() < 0.5, error.log1p(), 0.0) / inv_temperature
    u = (z - r).mul_(inv_temperature).expm1_()
    q = row_sum(u)
    u.sub_(q, alpha=1.0 / classes)
    u.sub_(row_sum(u), alpha=1.0 / classes)  # the rounding of q, which may be large beside u
    return u, q + classes


def row_sum(u: Tensor) -> Tensor:
    """Σu of each row, rounded once: long float32 sums of equal terms round all one way.  # (R, N) -> (R, 1)"""
    exact = u.dtype if u.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    step = budget_of(u.device).piece // 16  # of classes: on a CPU, torch converts all it adds first
    total = part(u, 0, step, 1).sum(1, keepdim=True, dtype=exact)
    for i in range(step, u.shape[1], step):
        total += part(u, i, i + step, 1).sum(1, keepdim=True, dtype=exact)
    return total.to(u.dtype)


def row_norm(u: Tensor, p: float) -> Tensor:
    """‖u‖_p of each row, without overflow or underflow of the powers; overwrites u.  # (R, N) -> (R, 1)"""
    magnitudes = u.abs_()
    if p == 1.0:
        return row_sum(magnitudes)
    if not u.shape[1]:
        return u.new_zeros(len(u), 1)
    largest = magnitudes.amax(1, keepdim=True)
    if p == math.inf:
        return largest
    magnitudes.div_(torch.where(largest > 0, largest, 1.0))
    powers = magnitudes.square_() if p == 2.0 else magnitudes.pow_(p)
    root = powers.sum(1, keepdim=True).pow_(0.5 / p)  # half of it at a time: C^(1/p) alone may overflow
    return largest.mul_(root).mul_(root)


def with_bias(norm: Tensor, bias_norm: float, p: float) -> Tensor:
    """‖(x, bias_norm)‖_p, given ‖x‖_p.  # (R, 1) -> (R, 1)"""
    return row_norm(torch.cat([norm, torch.full_like(norm, bias_norm)], 1), p) if bias_norm else norm


def feature_norms(problem: Problem, out: Tensor) -> None:
    """‖x‖_p of each row into out (B,), NaN where that is not finite: such a row has no score."""
    features, p = problem.features, problem.p
    batch, depth = features.shape
    step = max(1, budget_of(out.device).piece // max(1, depth * out.itemsize))
    for i in range(0, batch, step):
        x, norm = part(features, i, i + step), part(out, i, i + step)
        if p == 1.0:
            torch.sum(x.abs(), 1, dtype=out.dtype, out=norm)
        else:
            norm.copy_(row_norm(converted(x, out.dtype), p)[:, 0])
        norm.nan_to_num_(torch.nan, torch.nan)


def quick_limit(classes: int, p: float) -> float:
    """The ‖p − 1/C‖_p from which the quick form is exact: where C^(1 − 1/p) times it is QUICK."""
    return min(QUICK * classes ** (1.0 / p - 1.0), 1e38)


def _score(problem: Problem, z: Tensor, scores: Scores) -> None:
    """Write the scores of rows with logits z; their feature norms are there already."""
    out, prediction = scores
    inv_temperature = 1.0 / problem.temperature
    p = softmax(z, inv_temperature)
    t = row_sum(p)
    if prediction is not None:
        msp = p.amax(1, keepdim=True).div_(t)
    order, limit = problem.p, quick_limit(problem.classes, problem.p)
    deviation = row_norm(p.sub_(t, alpha=1.0 / z.shape[1]), order).div_(t)
    if z.device.type != "cpu":  # never wait for the data
        u, t = centred(z, inv_temperature)
        deviation = torch.where(deviation < limit, row_norm(u, order).div_(t), deviation)
    elif not deviation.min().item() >= limit:  # NaN too
        rows = (deviation[:, 0] < limit).nonzero()[:, 0]
        u, t = centred(z if len(rows) == len(z) else z[rows], inv_temperature)
        deviation[rows] = row_norm(u, order).div_(t)
    v = deviation  # (R, 1)
    for factor in (problem.scale, inv_temperature):  # in this order: 0·inf is not 0
        if factor != 1.0:
            v = v * factor
    columns = out.t()  # (R, 1) or (R, 6)
    if prediction is None:
        if problem.bias_norm:
            columns.copy_(with_bias(columns, problem.bias_norm, order))
        columns.mul_(v)
        return
    m, index = z.max(1, keepdim=True)
    norm = columns[:, 1:2]
    poison = (norm + deviation).mul_(0.0)  # a row without a score has no other number either
    fields = [(norm + problem.bias_norm) * v, norm, v, m, msp, m - msp.log() / inv_temperature]
    torch.add(torch.cat(fields, 1), poison, out=columns)
    prediction.copy_(torch.where(poison == 0.0, index, 0)[:, 0])


def forward(problem: Problem, scores: Scores) -> None:
    """Scores of the problem's rows, for the uniform target."""
    out = scores.out
    batch, size, budget = problem.features.shape[0], out.itemsize, budget_of(out.device)
    feature_norms(problem, out[0 if scores.prediction is None else 1])
    row = problem.classes * size
    piece = max(budget.piece, row)
    step, rows = rows_at_once(problem, out.dtype, budget.chunk - 2 * piece - 2 * budget.piece), piece // row
    for i in range(0, batch, step):
        chunk, targets = problem.rows(i, i + step), scores.rows(i, i + step)
        z = logits_of(chunk, out.dtype)
        for j in range(0, z.shape[0], rows):
            _score(problem, part(z, j, j + rows), targets.rows(j, j + rows))
        del z  # before the next ones are allocated
