"""Σ_c |p_c − 1/C| of a row of logits, in float32, to the last digits: what every kernel here shares.

    m = max z        d = (z − m)/T          shift before dividing: dividing first costs 4e-3 at T = 1000
    S = Σ exp(d)     near = S > C/2         most classes within a factor of the top one
    t = expm1(d) if near else exp(d)        p = (t + near)/S, so |p − 1/C| = |t − mean t|/S
    u = t − mean t;  δ = Σ u;  σ = Σ sign u
    Σ|p − 1/C| = (Σ|u| − δ·σ/C)/S           δ is 0 but for rounding of the mean; this takes that error out

The plain |p − 1/C| loses every digit on near-uniform rows; this form stays within 7e-7 relative on all that the tests
know. The correction makes the sum stationary in the mean: an error ε in it only counts for classes within ε of it.

A row in tiles of classes: each tile has m_j, S_j = Σ exp(d_j) and Q_j = Σ expm1(d_j), d_j relative to its own m_j. With
Δ_j = expm1((m_j − m)/T) the row's are S = Σ S_j(1 + Δ_j) and Q = Σ (Q_j(1 + Δ_j) + n_jΔ_j); the mean of t is Q/C or
S/C, and then the deviations add up.

expm1 costs three times what exp does, and rows of a trained network are not near uniform: a block computes it only if
one of its rows needs it.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x, exp_x):
    """exp(x) − 1 for x <= 0, given exp_x = exp(x): a Taylor polynomial above −1/2, where exp_x − 1 would cancel."""
    if x.dtype == tl.float64:
        p = x * 0.0 + 1.0
        for k in tl.static_range(17, 1, -1):  # truncated below 1e-20
            p = p * (x * (1.0 / k)) + 1.0
    else:
        p = x * (1.0 / 40320.0) + 1.0 / 5040.0  # truncated below 1.1e-8
        p = p * x + 1.0 / 720.0
        p = p * x + 1.0 / 120.0
        p = p * x + 1.0 / 24.0
        p = p * x + 1.0 / 6.0
        p = p * x + 0.5
        p = p * x + 1.0
    return tl.where(x > -0.5, p * x, exp_x - 1.0)


@triton.jit
def shift_of(m):
    """What to subtract from a row whose maximum is m: a row of −inf alone must not become −inf − (−inf)."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def first_at(z, m, classes):
    """The lowest class with logit m; cheaper than tl.argmax, which carries an index beside every value.  # -> (B,)"""
    return tl.min(tl.where(z == m[:, None], classes, 2147483647), 1)


@triton.jit
def any_of(flags):
    """Whether one of the rows has the flag: a scalar, to branch on."""
    return tl.max(flags.to(tl.int32), 0) > 0


@triton.jit
def sum_deviations(u):
    """Σ|u|, Σ u and Σ sign u over the classes.  # (B, C) -> 3 x (B,)"""
    sign = tl.where(u > 0.0, 1.0, 0.0) - tl.where(u < 0.0, 1.0, 0.0)
    return tl.sum(tl.abs(u), 1), tl.sum(u, 1), tl.sum(sign.to(u.dtype), 1)


@triton.jit
def _recomputed(m, inv_temperature):
    """m, in a way no compiler sees through: what a rare branch derives from it is computed there, not kept for it."""
    return m * tl.where(inv_temperature == inv_temperature, 1.0, 0.0)


@triton.jit
def deviation_of_rows(z, valid, C, inv_temperature):
    """Rows held whole: logits z (B, C'), −inf where not valid (C' >= C), to m, S and Σ|p − 1/C|, each (B,)."""
    m = tl.max(z, 1)
    shift = shift_of(m)
    t = tl.exp((z - shift[:, None]) * inv_temperature)
    q = tl.sum(t, 1)
    s = q
    near = s > 0.5 * C
    if any_of(near):
        d = (z - _recomputed(shift, inv_temperature)[:, None]) * inv_temperature
        t = tl.where(near[:, None], tl.where(valid, expm1(d, tl.exp(d)), 0.0), t)
        q = tl.sum(t, 1)
        s = tl.where(near, q + C, s)
    u = tl.where(valid, t - (q / C)[:, None], 0.0)
    total, delta, sigma = sum_deviations(u)
    return m, s, (total - delta * sigma / C) / s


@triton.jit
def statistics_of_tile(z, valid, n, inv_temperature):
    """m, S and Q of a tile of n classes by itself, logits −inf where not valid.  # (B, C') -> 3 x (B,)"""
    m = tl.max(z, 1)
    shift = shift_of(m)
    s = tl.sum(tl.exp((z - shift[:, None]) * inv_temperature), 1)
    q = s - n  # to the digits of n: enough where that is at least n/2
    near = s > 0.5 * n
    if any_of(near):
        d = (z - _recomputed(shift, inv_temperature)[:, None]) * inv_temperature
        q = tl.where(near, tl.sum(tl.where(valid, expm1(d, tl.exp(d)), 0.0), 1), q)
    return m, s, q


@triton.jit
def deviations_of_tile(z, valid, m, near, mean, inv_temperature):
    """Σ|u|, Σ u and Σ sign u of a tile, given the row's m, near and mean.  # (B, C') -> 3 x (B,)"""
    shift = shift_of(m)
    near_total, near_delta, near_sigma = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    if any_of(near):
        d = (z - _recomputed(shift, inv_temperature)[:, None]) * inv_temperature
        t = expm1(d, tl.exp(d))
        near_total, near_delta, near_sigma = sum_deviations(tl.where(valid, t - mean[:, None], 0.0))
    t = tl.exp((z - shift[:, None]) * inv_temperature)
    total, delta, sigma = sum_deviations(tl.where(valid, t - mean[:, None], 0.0))
    return (
        tl.where(near, near_total, total), tl.where(near, near_delta, delta), tl.where(near, near_sigma, sigma),
    )  # fmt: skip


@triton.jit
def store_scores(
    OUT, PREDICTION, rows, B, stride_o,
    norm, m, index, s, deviation,
    inv_temperature, scale, bias_norm,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Write the score (‖x‖₁ + bias_norm)·Σ|p − 1/C|·scale/T of each row, and with HEAD what else one pass gives.

    OUT is (1, B), or with HEAD (6, B): gradnorm, feature_norm, output_norm, max_logit, msp, energy.
    """
    live = rows < B
    norm += norm - norm  # a norm of inf becomes NaN: such a row has no score
    output_norm = deviation * scale * inv_temperature  # in this order: 0·inf is not 0
    out = OUT + rows
    tl.store(out, (norm + bias_norm) * output_norm, mask=live)
    if HEAD:
        # A row without a score has no other number either, and an index that is at least a valid one.
        poison = (norm - norm) + (deviation - deviation)
        out += stride_o
        tl.store(out, norm + poison, mask=live)
        out += stride_o
        tl.store(out, output_norm + poison, mask=live)
        out += stride_o
        tl.store(out, m + poison, mask=live)
        out += stride_o
        tl.store(out, 1.0 / s + poison, mask=live)
        out += stride_o
        tl.store(out, m + tl.log(s) / inv_temperature + poison, mask=live)
        tl.store(PREDICTION + rows, tl.where(poison == 0.0, index, 0).to(tl.int64), mask=live)
