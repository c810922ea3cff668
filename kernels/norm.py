"""‖x‖_p of rows, in registers or in memory: relative to M = max|x|, no power overflows or underflows.

‖x‖_p = M·(Σ (|x|/M)^p)^(1/p)        the norm of the norms of x's parts is the norm of x
"""

import math

import triton
import triton.language as tl

NORMS = {1.0: 1, 2.0: 2, math.inf: 0}  # the orders that are compiled in; any other p is an argument of GENERAL
GENERAL = 3


def compiled(p: float) -> tuple[int, float]:
    """NORM and the argument p of the kernels."""
    return NORMS.get(p, GENERAL), 1.0 if p == math.inf else p


@triton.jit
def square(a):
    """a² for a >= 0. The compiler would fuse a bare product into a sum across threads, fma(a, a, a shuffled a²), and
    leave the threads with different last digits of the same sum."""
    return tl.where(a > 0.0, a * a, a)


@triton.jit
def power(a, p, NORM: tl.constexpr):
    """a^p for a >= 0 and NORM 2 or GENERAL."""
    return square(a) if NORM == 2 else tl.exp(p * tl.log(a))


@triton.jit
def scaled_root(largest, total, p, NORM: tl.constexpr):
    """largest·total^(1/p), for NORM 2 or GENERAL."""
    if NORM == 2:
        return largest * tl.sqrt(total)
    half = tl.exp(tl.log(total) * 0.5 / p)  # total^(1/p) alone may overflow
    return largest * half * half


@triton.jit
def positive(x):
    """x, or 1 where it is 0: what to divide by."""
    return tl.where(x > 0.0, x, 1.0)


@triton.jit
def norm_in_registers(u, whole, p, NORM: tl.constexpr):
    """‖u‖_p/whole over the columns; whole (B,). p = ∞ ignores NaN.  # (B, N) -> (B,)"""
    a = tl.abs(u)
    if NORM == 1:
        return tl.sum(a, 1) / whole
    largest = tl.max(a, 1)
    if NORM == 0:
        return largest / whole
    return scaled_root(largest / whole, tl.sum(power(a / positive(largest)[:, None], p, NORM), 1), p, NORM)


@triton.jit
def with_bias(norm, bias_norm, p, NORM: tl.constexpr):
    """‖(x, bias_norm)‖_p from ‖x‖_p, NaN where that is not finite: such a row has no score.  # (B,) -> (B,)"""
    norm += norm - norm
    if NORM == 1:
        return norm + bias_norm
    largest = tl.maximum(norm, bias_norm) + (norm - norm)  # a maximum ignores NaN
    if NORM == 0:
        return largest
    unit = positive(largest)
    return scaled_root(largest, power(norm / unit, p, NORM) + power(bias_norm / unit, p, NORM), p, NORM)


@triton.jit
def norm_in_memory(
    X, rows, B, first, last, step, stride_xb, stride_xd, p,
    NORM: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, dtype,
):  # fmt: skip
    """‖x‖_p over the blocks of BLOCK_D features at first, first + step, ..., below last; NaN where an x is not finite,
    for p = 1 possibly inf.  # X (B, D), rows (B',) int64 -> (B',)"""
    columns = tl.arange(0, BLOCK_D)
    x_rows = X + rows[:, None] * stride_xb
    live = (rows < B)[:, None]
    sums = tl.zeros((rows.shape[0], BLOCK_D), dtype)
    maxima = tl.zeros((rows.shape[0], BLOCK_D), dtype)
    for d in tl.range(first, last, step, num_stages=STAGES):  # without a dot, Triton pipelines only if told to
        mask = live & (columns < last - d)[None, :]
        x = tl.load(x_rows + (d + columns).to(tl.int64)[None, :] * stride_xd, mask=mask, other=0.0).to(dtype)
        if NORM == 1:
            sums += tl.abs(x)
        else:
            sums += x - x  # a maximum ignores NaN
            maxima = tl.maximum(maxima, tl.abs(x))
    if NORM == 1:
        return tl.sum(sums, 1)
    largest = tl.max(maxima, 1) + tl.sum(sums, 1)
    if NORM == 0:
        return largest
    unit = positive(largest)[:, None]
    powers = tl.zeros((rows.shape[0], BLOCK_D), dtype)
    for d in tl.range(first, last, step, num_stages=STAGES):
        mask = live & (columns < last - d)[None, :]
        x = tl.load(x_rows + (d + columns).to(tl.int64)[None, :] * stride_xd, mask=mask, other=0.0).to(dtype)
        powers += power(tl.abs(x) / unit, p, NORM)
    return scaled_root(largest, tl.sum(powers, 1), p, NORM)
