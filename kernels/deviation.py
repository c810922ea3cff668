"""Σ_c |p_c − 1/C| of a row of logits, accurate to float32 rounding; shared by every kernel.

    m = max z    t = exp((z − m)/T)    S = Σt              subtract first: dividing first costs 4e-3 at T = 1000
    quick        u = t − S/C           v = (Σ|u| − Σu·Σsign(u)/C)/S                          accurate if v >= 1/4
    careful      r = m + T·log(S/C), then r += T·log1p(mean expm1((z − r)/T))                log-mean-exp, in two steps
                 q = expm1((z − r)/T)  Q = Σq   u = q − Q/C   v = (Σ|u| − Σu·Σsign(u)/C)/(C + Q)

If v is small, most classes lie near 1/C, and t − S/C subtracts nearly equal numbers. The log-mean-exp r lies among
these classes' logits, so their q is small and keeps its digits. The rounding of S/C, 6e-8, shifts r by T·6e-8; the
second step corrects that. Σu would be 0 without the rounding of the mean. Subtracting Σu·Σsign(u)/C makes the sum
stationary in the mean, so an error ε in the mean affects only classes within ε of it.

For a row in tiles only m and S need merging: with m_j and S_j of tile j, S = Σ S_j·exp((m_j − m)/T).

A trained network's v is far above 1/4, so a block computes the careful form only if one of its rows needs it.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) − 1: a Taylor polynomial for |x| < 1/2, where exp(x) − 1 would cancel."""
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
    return tl.where(tl.abs(x) < 0.5, p * x, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for |x| < 1/2, to 2e-6: 2·atanh(x/(2 + x)) by its series."""
    s = x / (2.0 + x)
    s2 = s * s
    return 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0 + s2 * (1.0 / 9.0)))))


@triton.jit
def finite_max(m):
    """What to subtract from a row whose maximum is m; 0 if all its logits are −inf, as −inf − (−inf) is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def first_at(z, m, classes):
    """The lowest class with logit m; cheaper than tl.argmax, which carries an index with every value.  # -> (B,)"""
    return tl.min(tl.where(z == m[:, None], classes, 2147483647), 1)


@triton.jit
def any_row(flags):
    """Whether any row has the flag: a scalar, to branch on."""
    return tl.max(flags.to(tl.int32), 0) > 0


@triton.jit
def needs_careful_form(v):
    """Whether the quick form's result is too small to be accurate.  # (B,)"""
    return v < 0.25


@triton.jit
def log_mean_exp(m, s, C, inv_temperature):
    """The first estimate of r, from a row's maximum m and S = s.  # (B,)"""
    return finite_max(m) + tl.log(s / C) / inv_temperature


@triton.jit
def centred_again(r, q, C, inv_temperature):
    """The corrected r, from the first r and q = Σ expm1((z − r)/T).  # (B,)"""
    mean = q / C
    return tl.where(tl.abs(mean) < 0.5, r + log1p(mean) / inv_temperature, r)


@triton.jit
def sign_of(u):
    return (tl.where(u > 0.0, 1.0, 0.0) - tl.where(u < 0.0, 1.0, 0.0)).to(u.dtype)


@triton.jit
def sum_deviations(u, C):
    """Σ|u| − Σu·Σsign(u)/C over the classes.  # (B, C') -> (B,)"""
    return tl.sum(tl.abs(u), 1) - tl.sum(u, 1) * tl.sum(sign_of(u), 1) / C


@triton.jit
def statistics_of_tile(z, inv_temperature):
    """m and S of a tile of logits, padded with −inf.  # (B, C') -> 2 x (B,)"""
    m = tl.max(z, 1)
    return m, tl.sum(tl.exp((z - finite_max(m)[:, None]) * inv_temperature), 1)


@triton.jit
def deviation_of_rows(z, valid, C, inv_temperature):
    """m, S and Σ|p − 1/C|, each (B,), of whole rows of logits z (B, C'), C' >= C, −inf where not valid."""
    m = tl.max(z, 1)
    t = tl.exp((z - finite_max(m)[:, None]) * inv_temperature)
    s = tl.sum(t, 1)
    v = sum_deviations(tl.where(valid, t - (s / C)[:, None], 0.0), C) / s
    small = needs_careful_form(v)
    if any_row(small):
        r = log_mean_exp(m, s, C, inv_temperature)
        q = tl.sum(tl.where(valid, expm1((z - r[:, None]) * inv_temperature), 0.0), 1)
        r = centred_again(r, q, C, inv_temperature)
        e = tl.where(valid, expm1((z - r[:, None]) * inv_temperature), 0.0)
        q = tl.sum(e, 1)
        careful = sum_deviations(tl.where(valid, e - (q / C)[:, None], 0.0), C) / (C + q)
        v = tl.where(small, careful, v)
    return m, s, v
