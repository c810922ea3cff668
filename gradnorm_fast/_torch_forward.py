"""The score in plain torch: what runs on CPUs and on devices without Triton.

Rows come in chunks. The logits of a chunk are written once and then worked on in pieces that stay in the cache. Extra
memory never depends on B·C (see Budget). docs/numerics.md has the formulas, and why each line is as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.problem import Problem, Scores, copies

MIB = 2**20
MEMORY = 32 * MIB  # what a forward takes on a CPU beside its result, unless three rows of logits or features take more


class Budget(NamedTuple):
    """Bytes that the buffers of a call may take, longer rows apart."""

    chunk: int  # logits, scratch memory, and a copy of the rows that need the careful form
    piece: int  # of each of those but the logits
    operand: int  # features, and classes of the weight, converted for the matmul: each


CPU, GPU = Budget(22 * MIB, 2 * MIB, 4 * MIB), Budget(1024 * MIB, 256 * MIB, 256 * MIB)

# As measured on CPUs: BLAS is up to five times as fast if the logits of FEW rows, or of NARROW rows, lie transposed in
# memory; softmax over 10 contiguous classes takes five times as long as across them.
FEW = 128
NARROW = 16

QUICK = 0.25  # Σ|p − 1/C| from which the quick form is exact


def budget_of(device: torch.device) -> Budget:
    return CPU if device.type == "cpu" else GPU


def slices(count: int, size: int, budget: int) -> Iterator[slice]:
    """range(count) in slices whose items of `size` bytes fit the budget, at least one item each."""
    step = max(1, budget // max(1, size))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def _cut(t: Tensor, part: slice, dim: int = 0) -> Tensor:
    """The slice of t, and t itself where that is all of it: a view costs as much as a sum over a row."""
    size = part.stop - part.start
    return t if size == t.shape[dim] else t.narrow(dim, part.start, size)


def operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix as BLAS reads it in this dtype: itself, or a converted copy."""
    return matrix if _usable(matrix, dtype) else matrix.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _usable(matrix: Tensor, dtype: torch.dtype) -> bool:
    return matrix.dtype == dtype and not copies(matrix)


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias, x, w.t(), out=out)


def chunks(problem: Problem, dtype: torch.dtype, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits, some `chunk` bytes of them at a time; those of a head overwrite the ones before."""
    features, weight, bias, logits = problem[:4]
    (batch, depth), classes, size = features.shape, problem.classes, dtype.itemsize
    if logits is not None:
        yield from ((rows, _cut(logits, rows)) for rows in slices(batch, classes * size, chunk))
        return
    assert weight is not None
    bytes_of_operand = budget_of(features.device).operand
    rows_of_operand = batch if _usable(features, dtype) else max(1, bytes_of_operand // max(1, depth * size))
    step = min(batch, max(1, chunk // (classes * size)), rows_of_operand)
    if weight.numel() * size <= bytes_of_operand:
        weight = operand(weight, dtype)
    bytes_of_class = 0 if _usable(weight, dtype) else depth * size
    bias = None if bias is None else bias.to(dtype)
    memory = torch.empty(step * classes, dtype=dtype, device=features.device)
    for rows in slices(batch, 1, step):
        x, n = operand(_cut(features, rows), dtype), rows.stop - rows.start
        transposed = 1 < n <= FEW or classes < NARROW
        z = memory.as_strided((n, classes), (1, n) if transposed else (classes, 1))
        for part in slices(classes, bytes_of_class, bytes_of_operand if bytes_of_class else classes):
            w = operand(_cut(weight, part), dtype)
            _linear(x, w, None if bias is None else _cut(bias, part), out=_cut(z, part, 1))
        yield rows, z


def shaped(memory: Tensor, like: Tensor) -> Tensor:
    """Scratch memory in the shape of `like`, laid out as softmax wants it."""
    rows, classes = like.shape
    return memory.as_strided(like.shape, (classes, 1) if classes >= NARROW else (1, rows))


def softmax(z: Tensor, inv_temperature: float, p: Tensor, scratch: Tensor) -> Tensor:
    """softmax(z/T) into p, shifted before it is divided; p and scratch are `shaped`."""
    if inv_temperature != 1.0:
        z = torch.sub(z, z.amax(1, keepdim=True), out=scratch).mul_(inv_temperature)
    elif z.stride() != p.stride():
        z = scratch.copy_(z)
    if z.shape[1] >= NARROW:
        torch.softmax(z, 1, out=p)
    else:
        torch.softmax(z.t(), 0, out=p.t())
    return p


def centred(z: Tensor, inv_temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """The careful form: t·(p − mean p) of each row into u, and t, up to which p is known.  # -> (R, C), (R, 1)

    With r = T·log mean exp(z/T), q = expm1((z − r)/T) is t·p − 1 for t = C + Σq. The first r errs by T times the
    rounding of its logarithm; the mean of q tells by how much.
    """
    classes, m = z.shape[1], z.amax(1, keepdim=True)

    def expm1_about(r: Tensor) -> Tensor:
        return torch.sub(z, r, out=u).mul_(inv_temperature).expm1_()

    s = torch.sub(z, m, out=u).mul_(inv_temperature).exp_().sum(1, keepdim=True)
    r = m + (s / classes).log_() / inv_temperature
    error = expm1_about(r).sum(1, keepdim=True) / classes
    r += torch.where(error.abs() < 0.5, error.log1p(), 0.0) / inv_temperature
    q = expm1_about(r).sum(1, keepdim=True)
    return u.sub_(q, alpha=1 / classes), q + classes


def deviation(u: Tensor, total: Tensor, scratch: Tensor) -> Tensor:
    """Σ|p − 1/C| from u = total·(p − mean p), where total and the mean may be rounded; overwrites u.  # -> (R, 1)

    2(P(1 − w) + N·w)/total for the sums P above and N below the mean and w the share of classes above: equal to
    Σ|u|/total, as P = N, and stationary in the mean.
    """
    below = torch.clamp_max(u, 0.0, out=scratch).sum(1, keepdim=True)
    above = u.clamp_min_(0.0).sum(1, keepdim=True)
    count = u.sign_().sum(1, keepdim=True)
    excess = above + below
    return above.addcmul_(count, excess, value=-1 / u.shape[1]).mul_(2.0).div_(total + excess)


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
    magnitudes.div_(torch.where(largest > 0, largest, 1.0))
    powers = magnitudes.square_() if p == 2.0 else magnitudes.pow_(p)
    root = powers.sum(1, keepdim=True).pow_(0.5 / p)  # half of it at a time: C^(1/p) alone may overflow
    return largest.mul_(root).mul_(root)


def with_bias(norm: Tensor, bias_norm: float, p: float) -> Tensor:
    """‖(x, bias_norm)‖_p, given ‖x‖_p (R, 1)."""
    return row_norm(torch.cat([norm, torch.full_like(norm, bias_norm)], 1), p) if bias_norm else norm


def deviation_norm(u: Tensor, total: Tensor, scratch: Tensor, p: float) -> Tensor:
    """‖p − 1/C‖_p from the same; overwrites u.  # -> (R, 1)"""
    if p == 1.0:
        return deviation(u, total, scratch)
    u.sub_(u.mean(1, keepdim=True))  # what the rounding of the first mean left
    return row_norm(u, p).div_(total)


def quick_limit(classes: int, p: float) -> float:
    """The ‖p − 1/C‖_p from which the quick form is exact: where C^(1 − 1/p) times it is QUICK."""
    return min(QUICK * classes ** (1.0 / p - 1.0), 1e38)


def _score(problem: Problem, z: Tensor, scores: Scores, memory: tuple[Tensor, Tensor]) -> None:
    """Write the scores of rows with logits z; their feature norms are there already."""
    out, prediction = scores
    inv_temperature = 1.0 / problem.temperature
    z = z.to(out.dtype)
    u, scratch = shaped(memory[0], z), shaped(memory[1], z)
    p = softmax(z, inv_temperature, u, scratch)
    total = p.sum(1, keepdim=True)
    msp = p.amax(1) / total[:, 0] if prediction is not None else total
    order, limit = problem.p, quick_limit(problem.classes, problem.p)
    v = deviation_norm(p.sub_(total, alpha=1 / problem.classes), total, scratch, order)
    if z.device.type != "cpu":  # never wait for the data
        v = torch.where(v < limit, deviation_norm(*centred(z, inv_temperature, u), scratch, order), v)
    elif not v.min().item() >= limit:  # NaN too
        small = (v[:, 0] < limit).nonzero()[:, 0]
        if len(small) == len(z):
            v = deviation_norm(*centred(z, inv_temperature, u), scratch, order)
        elif len(small):
            some = z[small]
            u, scratch = shaped(memory[0], some), shaped(memory[1], some)
            v[small] = deviation_norm(*centred(some, inv_temperature, u), scratch, order)
    output_norm = v[:, 0]
    for factor in (problem.scale, inv_temperature):  # in this order: 0·inf is not 0
        if factor != 1.0:
            output_norm = output_norm * factor
    if prediction is None:
        if problem.bias_norm:
            out[0] = with_bias(out[0, :, None], problem.bias_norm, order)[:, 0]
        out[0].mul_(output_norm)
        return
    m, index = z.max(1)
    torch.mul(out[1] + problem.bias_norm, output_norm, out=out[0])
    poison = (out[1] + v[:, 0]) * 0.0  # a row without a score has no other number either
    for field, value in enumerate((out[1], output_norm, m, msp, m - msp.log() / inv_temperature), 1):
        torch.add(value, poison, out=out[field])
    prediction.copy_(torch.where(poison == 0, index, 0))


def feature_norms(features: Tensor, p: float, out: Tensor, scratch: Tensor) -> None:
    """‖x‖_p of each row into out, NaN where that is not finite: such a row has no score."""
    depth = features.shape[1]
    for rows in slices(len(features), depth, len(scratch)):
        x, norm = _cut(features, rows), _cut(out, rows)
        magnitudes = scratch.as_strided(x.shape, (depth, 1))
        if x.dtype == scratch.dtype:
            torch.abs(x, out=magnitudes)
        else:
            magnitudes.copy_(x).abs_()
        if p == 1.0:
            torch.sum(magnitudes, 1, out=norm)
        else:
            norm.copy_(row_norm(magnitudes, p)[:, 0])
        norm += norm - norm


def forward(problem: Problem, scores: Scores) -> None:
    """Scores of the problem's rows, for the uniform target."""
    out, head = scores.out, scores.prediction is not None
    (batch, depth), classes, size = problem.features.shape, problem.classes, out.itemsize
    budget = budget_of(out.device)
    piece = max(budget.piece, classes * size)
    elements = min(batch * max(classes, depth), max(piece // size, depth))
    memory = out.new_empty(elements), out.new_empty(elements)
    feature_norms(problem.features, problem.p, out[1 if head else 0], memory[0])
    for rows, z in chunks(problem, out.dtype, budget.chunk - 2 * piece - budget.piece):
        for part in slices(len(z), classes * size, piece):
            start, stop = rows.start + part.start, rows.start + part.stop
            _score(problem, _cut(z, part), scores.rows(start, stop), memory)
