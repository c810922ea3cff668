"""exp(x) − 1 and log(1 + x), and what they differ from x by, with the digits of small x."""

import triton
import triton.language as tl


@triton.jit
def _expm1_series(x):
    """exp(x) − 1 − x for |x| < 1/2: Taylor's polynomial."""
    if x.dtype == tl.float64:
        p = x * 0.0 + 1.0
        for k in tl.static_range(18, 2, -1):  # truncated below 1e-20
            p = p * (x * (1.0 / k)) + 1.0
        return p * 0.5 * x * x
    p = x * (1.0 / 40320.0) + 1.0 / 5040.0  # truncated below 1.1e-8
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    return p * x * x


@triton.jit
def expm1(x):
    """exp(x) − 1."""
    return tl.where(tl.abs(x) < 0.5, x + _expm1_series(x), tl.exp(x) - 1.0)


@triton.jit
def expm1_excess(x):
    """exp(x) − 1 − x."""
    return tl.where(tl.abs(x) < 0.5, _expm1_series(x), tl.exp(x) - 1.0 - x)


@triton.jit
def _log1p_series(x):
    """log(1 + x) − x for |x| < 1/2: 2·atanh(s) = 2s + s³·2/3 + ..., s = x/(2 + x), and 2s − x = −s·x."""
    s = x / (2.0 + x)
    s2 = s * s
    LAST: tl.constexpr = 37 if x.dtype == tl.float64 else 13  # truncated below 1e-18, 1e-7
    p = 1.0 / LAST
    for k in tl.static_range(LAST - 2, 1, -2):
        p = p * s2 + 1.0 / k
    return s * (2.0 * s2 * p - x)


@triton.jit
def log1p(x):
    """log(1 + x)."""
    return tl.where(tl.abs(x) < 0.5, x + _log1p_series(x), tl.log(1.0 + x))


@triton.jit
def log1p_excess(x):
    """log(1 + x) − x."""
    return tl.where(tl.abs(x) < 0.5, _log1p_series(x), tl.log(1.0 + x) - x)
