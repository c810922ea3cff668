"""Rows of logits longer than a block of registers: deviation.py and spread.py by reads of the row.

Z: pointers to the rows' first logits, (BLOCK_B, 1); BIAS: (C,) or None.

Sums over classes have two levels: in one long sum of equal terms the rounding errors add up.
"""

import triton
import triton.language as tl

from .deviation import (
    centred_again,
    finite_max,
    first_at,
    log_mean_exp,
    statistics_of_tile,
)
from .exponential import expm1
from .norm import positive, power, scaled_root
from .spread import spread, spread_terms


@triton.jit
def load_logits(
    Z, BIAS, first, C, width, stride_zc, stride_b,
    BLOCK_C: tl.constexpr, dtype,
):  # fmt: skip
    """Logits of the classes from `first` on of rows Z (B, 1), −inf beyond C; which are valid.  # -> 2 x (B, BLOCK_C)"""
    classes = tl.arange(0, BLOCK_C)[None, :]
    valid = classes < C - first
    at = (first + classes).to(tl.int64)
    readable = classes < width - first  # four at a time if the width is a multiple of 16
    z = tl.load(Z + at * stride_zc, mask=readable, other=0.0).to(dtype)
    if BIAS is not None:
        z += tl.load(BIAS + at * stride_b, mask=valid, other=0.0).to(dtype)
    return tl.where(valid, z, float("-inf")), valid


@triton.jit
def merged(STATISTICS, rows, B, tiles, inv_temperature):
    """m and S of whole rows from their tiles' values.  # STATISTICS (2, B, tiles), rows (B',) -> 2 x (B',)"""
    TILES: tl.constexpr = 256  # at once
    at = STATISTICS + rows[:, None] * tiles
    m = tl.full((rows.shape[0],), float("-inf"), tl.float32)
    s = tl.zeros((rows.shape[0],), tl.float32)
    for j in range(0, tiles, TILES):
        tile = j + tl.arange(0, TILES)[None, :]
        tile_m = tl.load(at + tile, mask=tile < tiles, other=float("-inf"))
        tile_s = tl.load(at + tl.cast(B, tl.int64) * tiles + tile, mask=tile < tiles, other=0.0)
        new = tl.maximum(m, tl.max(tile_m, 1))
        shift = finite_max(new)
        s *= tl.exp((m - shift) * inv_temperature)
        s += tl.sum(tile_s * tl.exp((tile_m - shift[:, None]) * inv_temperature), 1)
        m = new
    return m, s


@triton.jit
def statistics_of_long_rows(
    Z, BIAS, C, width, inv_temperature, stride_zc, stride_b,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """m and S, merged block by block.  # Z (B, 1) -> 2 x (B,)"""
    m = tl.full((Z.shape[0],), float("-inf"), inv_temperature.dtype)
    s = tl.zeros_like(m)
    for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        z, _valid = load_logits(Z, BIAS, c, C, width, stride_zc, stride_b, BLOCK_C, m.dtype)
        block_m, block_s = statistics_of_tile(z, inv_temperature)
        new = tl.maximum(m, block_m)
        shift = finite_max(new)
        s = s * tl.exp((m - shift) * inv_temperature) + block_s * tl.exp((block_m - shift) * inv_temperature)
        m = new
    return m, s


@triton.jit
def _sums(
    Z, BIAS, centre, C, width, inv_temperature, stride_zc, stride_b,
    CAREFUL: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σt and min t of rows longer than a block, t = exp((z − centre)/T), or expm1 of that if CAREFUL.

    # Z (B, 1), centre (B,) -> 2 x (B,)
    """
    total = tl.zeros_like(centre)
    lowest = tl.full((centre.shape[0],), float("inf"), centre.dtype)
    for start in range(0, C, 16 * BLOCK_C):
        sums = tl.zeros((centre.shape[0], BLOCK_C), centre.dtype)
        minima = tl.full((centre.shape[0], BLOCK_C), float("inf"), centre.dtype)
        for c in tl.range(start, tl.minimum(start + 16 * BLOCK_C, C), BLOCK_C, num_stages=STAGES):
            z, valid = load_logits(Z, BIAS, c, C, width, stride_zc, stride_b, BLOCK_C, centre.dtype)
            d = (z - centre[:, None]) * inv_temperature
            t = expm1(d) if CAREFUL else tl.exp(d)
            sums += tl.where(valid, t, 0.0)
            minima = tl.minimum(minima, tl.where(valid, t, float("inf")))
        total += tl.sum(sums, 1)
        lowest = tl.minimum(lowest, tl.min(minima, 1))
    return total, lowest


@triton.jit
def _log_mean_exp(
    Z, BIAS, m, s, C, width, inv_temperature, stride_zc, stride_b,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The corrected r, from m and S = s.  # Z (B, 1), m, s (B,) -> (B,)"""
    r = log_mean_exp(m, s, C, inv_temperature)
    q, _lowest = _sums(Z, BIAS, r, C, width, inv_temperature, stride_zc, stride_b, True, BLOCK_C, STAGES)
    return centred_again(r, q, C, inv_temperature)


@triton.jit
def _deviations(
    Z, BIAS, m, centre, mean, whole, unit, p, C, width, inv_temperature, stride_zc, stride_b,
    CAREFUL: tl.constexpr, FIND: tl.constexpr, NORM: tl.constexpr,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of rows longer than a block: ‖u‖_p/w, Σ|u|/w and w, where u = exp((z − centre)/T) − mean, with expm1 for exp if
    CAREFUL, and w = whole + Σu, which is without the rounding of the mean; with FIND also the first class whose logit
    is m. For p = 1 the mean may be rounded: with δ = Σu, the norm of u − δ/C is Σ|u| − δ·Σsign(u)/C. Powers are of
    |u|/unit.  # Z (B, 1), m, centre, mean, whole, unit (B,) -> 4 x (B,)
    """
    classes = tl.arange(0, BLOCK_C)[None, :]
    index = tl.full((m.shape[0],), 2147483647, tl.int32)
    total = tl.zeros_like(m)
    delta = tl.zeros_like(m)
    norm = tl.zeros_like(m)  # at first Σsign(u), max|u| or Σ|u/unit|^p
    for start in range(0, C, 16 * BLOCK_C):
        totals = tl.zeros((m.shape[0], BLOCK_C), m.dtype)
        deltas = tl.zeros((m.shape[0], BLOCK_C), m.dtype)
        norms = tl.zeros((m.shape[0], BLOCK_C), m.dtype)
        for c in tl.range(start, tl.minimum(start + 16 * BLOCK_C, C), BLOCK_C, num_stages=STAGES):
            z, valid = load_logits(Z, BIAS, c, C, width, stride_zc, stride_b, BLOCK_C, m.dtype)
            if FIND:
                index = tl.minimum(index, first_at(z, m, c + classes))
            d = (z - centre[:, None]) * inv_temperature
            t = expm1(d) if CAREFUL else tl.exp(d)
            u = tl.where(valid, t - mean[:, None], 0.0)
            totals += tl.abs(u)
            deltas += u
            if NORM == 1:
                norms += (tl.where(u > 0.0, 1.0, 0.0) - tl.where(u < 0.0, 1.0, 0.0)).to(m.dtype)
            elif NORM == 0:
                norms = tl.maximum(norms, tl.abs(u))
            else:
                norms += power(tl.abs(u) / unit[:, None], p, NORM)
        total += tl.sum(totals, 1)
        delta += tl.sum(deltas, 1)
        norm = tl.maximum(norm, tl.max(norms, 1)) if NORM == 0 else norm + tl.sum(norms, 1)
    whole += delta
    if NORM == 1:
        norm = (total - delta * norm / C) / whole
    elif NORM == 0:
        norm /= whole
    else:
        norm = scaled_root(unit / whole, norm, p, NORM)
    return norm, total / whole, whole, index


@triton.jit
def deviation_of_long_rows(
    Z, BIAS, m, s, C, width, inv_temperature, p, stride_zc, stride_b,
    NORM: tl.constexpr, FIND: tl.constexpr,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S, ‖softmax(z/T) − 1/C‖_p, and with FIND the first class whose logit is m, from m and a rounded S = s.

    # Z (B, 1), m, s (B,) -> 3 x (B,)
    """
    top = finite_max(m)
    if NORM != 1:
        s, _lowest = _sums(Z, BIAS, top, C, width, inv_temperature, stride_zc, stride_b, False, BLOCK_C, STAGES)
    mean = s / C
    unit = tl.maximum(1.0 - mean, 0.5 * mean)  # max|u| to half of it, where v >= 1/4
    deviation, v, s, index = _deviations(
        Z, BIAS, m, top, mean, s, unit, p, C, width, inv_temperature, stride_zc, stride_b,
        False, FIND, NORM, BLOCK_C, STAGES,
    )  # fmt: skip
    small = v < 0.25  # where the quick form loses digits
    if tl.max(small.to(tl.int32), 0) > 0:
        r = _log_mean_exp(Z, BIAS, m, s, C, width, inv_temperature, stride_zc, stride_b, BLOCK_C, STAGES)
        q, lowest = _sums(Z, BIAS, r, C, width, inv_temperature, stride_zc, stride_b, True, BLOCK_C, STAGES)
        mean = q / C
        unit = positive(tl.maximum(expm1((m - r) * inv_temperature) - mean, mean - lowest))  # max|u|
        careful, _v, _s, _index = _deviations(
            Z, BIAS, m, r, mean, C + q, unit, p, C, width, inv_temperature, stride_zc, stride_b,
            True, False, NORM, BLOCK_C, STAGES,
        )  # fmt: skip
        deviation = tl.where(small, careful, deviation)
    return s, deviation, index


@triton.jit
def spread_of_long_rows(
    Z, BIAS, m, s, index, C, width, inv_temperature, stride_zc, stride_b,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`spread` of rows longer than a block.  # Z (B, 1), m, s, index (B,) -> 4 x (B,)"""
    r = _log_mean_exp(Z, BIAS, m, s, C, width, inv_temperature, stride_zc, stride_b, BLOCK_C, STAGES)
    classes = tl.arange(0, BLOCK_C)[None, :]
    s = tl.zeros_like(m)
    squares = tl.zeros_like(m)
    products = tl.zeros_like(m)
    q = tl.zeros_like(m)
    excess = tl.zeros_like(m)
    for start in range(0, C, 16 * BLOCK_C):
        zero = tl.zeros((m.shape[0], BLOCK_C), m.dtype)
        s_sums, square_sums, product_sums, q_sums, excess_sums = zero, zero, zero, zero, zero
        for c in tl.range(start, tl.minimum(start + 16 * BLOCK_C, C), BLOCK_C, num_stages=STAGES):
            z, valid = load_logits(Z, BIAS, c, C, width, stride_zc, stride_b, BLOCK_C, m.dtype)
            t, t2, dt, e, over = spread_terms(z, valid, c + classes, index, m, r, inv_temperature)
            s_sums += t
            square_sums += t2
            product_sums += dt
            q_sums += e
            excess_sums += over
        s += tl.sum(s_sums, 1)
        squares += tl.sum(square_sums, 1)
        products += tl.sum(product_sums, 1)
        q += tl.sum(q_sums, 1)
        excess += tl.sum(excess_sums, 1)
    return spread(s, squares, products, q, excess, C)
