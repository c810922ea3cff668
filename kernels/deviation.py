"""‖p − 1/C‖_p of a row of logits, p = softmax(z/T), accurate to float32 rounding; shared by every kernel.

    m = max z    t = exp((z − m)/T)    S = Σt              subtract first: dividing first costs 4e-3 at T = 1000
    quick        u = t − S/C           ‖u‖/S               accurate if v = Σ|u|/S >= 1/4
    careful      r = m + T·log(S/C), then r += T·log1p(mean expm1((z − r)/T))                log-mean-exp, in two steps
                 q = expm1((z − r)/T)  Q = Σq   u = q − Q/C   ‖u‖/(C + Q)

If v is small, most classes lie near 1/C, and t − S/C subtracts nearly equal numbers. The log-mean-exp r lies among
these classes' logits, so their q is small and keeps its digits. The rounding of S/C, 6e-8, shifts r by T·6e-8; the
second step corrects that. Rounding S and S/C leaves Σu other than 0: Σu is added to S, and u is centred once more.

For a row in tiles only m and S need merging: with m_j and S_j of tile j, S = Σ S_j·exp((m_j − m)/T).

A trained network's v is far above 1/4, so a block computes the careful form only if one of its rows needs it.
"""

import triton
import triton.language as tl

from .exponential import expm1, log1p
from .norm import norm_in_registers, positive


@triton.jit
def finite_max(m):
    """What to subtract from a row whose maximum is m; 0 if all its logits are −inf, as −inf − (−inf) is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def first_at(z, m, classes):
    """The lowest class with logit m; cheaper than tl.argmax, which carries an index with every value.  # -> (B,)"""
    return tl.min(tl.where(z == m[:, None], classes, 2147483647), 1)


@triton.jit
def log_mean_exp(m, s, C, inv_temperature):
    """The first estimate of r, from a row's maximum m and S = s; finite where S is 0.  # (B,)"""
    return finite_max(m) + tl.log(positive(s) / C) / inv_temperature


@triton.jit
def centred_again(r, q, C, inv_temperature):
    """The corrected r, from the first r and q = Σ expm1((z − r)/T).  # (B,)"""
    mean = q / C
    return tl.where(tl.abs(mean) < 0.5, r + log1p(mean) / inv_temperature, r)


@triton.jit
def log_mean_exp_of_rows(z, valid, m, s, C, inv_temperature):
    """The corrected r of whole rows of logits z (B, C'), −inf where not valid, from their m and S = s.  # -> (B,)"""
    r = log_mean_exp(m, s, C, inv_temperature)
    q = tl.sum(tl.where(valid, expm1((z - r[:, None]) * inv_temperature), 0.0), 1)
    return centred_again(r, q, C, inv_temperature)


@triton.jit
def _centred(t, total, valid, C):
    """u = t − mean t, 0 where not valid, from a rounded total; and Σt − total.  # (B, C'), (B,) -> (B, C'), (B,)"""
    u = tl.where(valid, t - (total / C)[:, None], 0.0)
    residual = tl.sum(u, 1)
    return tl.where(valid, u - (residual / C)[:, None], 0.0), residual


@triton.jit
def statistics_of_tile(z, inv_temperature):
    """m and S of a tile of logits, padded with −inf.  # (B, C') -> 2 x (B,)"""
    m = tl.max(z, 1)
    return m, tl.sum(tl.exp((z - finite_max(m)[:, None]) * inv_temperature), 1)


@triton.jit
def deviation_of_rows(z, valid, C, p, inv_temperature, NORM: tl.constexpr):
    """m, S and ‖softmax(z/T) − 1/C‖_p, each (B,), of whole rows of logits z (B, C'), C' >= C, −inf where not valid."""
    m = tl.max(z, 1)
    t = tl.exp((z - finite_max(m)[:, None]) * inv_temperature)
    s = tl.sum(t, 1)
    u, residual = _centred(t, s, valid, C)
    s += residual
    deviation = norm_in_registers(u, s, p, NORM)
    v = deviation if NORM == 1 else tl.sum(tl.abs(u), 1) / s
    small = v < 0.25  # where the quick form loses digits
    if tl.max(small.to(tl.int32), 0) > 0:
        r = log_mean_exp_of_rows(z, valid, m, s, C, inv_temperature)
        e = tl.where(valid, expm1((z - r[:, None]) * inv_temperature), 0.0)
        q = tl.sum(e, 1)
        e, q_residual = _centred(e, q, valid, C)
        careful = norm_in_registers(e, C + (q + q_residual), p, NORM)
        deviation = tl.where(small, careful, deviation)
    return m, s, deviation
