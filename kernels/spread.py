"""Entropy, Σp², 1 − Σp² and KL(uniform ‖ p) of a row of logits, p = softmax(z/T), without cancellation.

    d = (z − m)/T, m = max z;  S = Σe^d, R = Σe^2d, Q = Σd·e^d over all classes but the first with logit m
    entropy = log(1 + S) − Q/(1 + S)      Σp² = (1 + R)/(1 + S)²      1 − Σp² = (2S + S² − R)/(1 + S)²
    q = expm1((z − r)/T)                  KL(uniform ‖ p) = log1p(mean q) − mean q + mean(q − (z − r)/T)    for any r

With r at the log-mean-exp to rounding, as in deviation.py's careful form, mean q is negligible and no
q − (z − r)/T is negative: near-uniform rows keep their digits.
"""

import triton
import triton.language as tl

from .deviation import finite_max, first_at, log_mean_exp_of_rows
from .exponential import expm1, expm1_excess, log1p, log1p_excess
from .norm import square


@triton.jit
def spread_terms(z, valid, classes, index, m, r, inv_temperature):
    """What S, R, Q, Σq and Σ(q − (z − r)/T) are sums of.

    z, valid: logits (B, C') of `classes` (1, C'), −inf where not valid; index, m, r: (B,).  # -> 5 x (B, C')
    """
    d = (z - finite_max(m)[:, None]) * inv_temperature
    t = tl.where(classes == index[:, None], 0.0, tl.exp(d))
    e = (z - r[:, None]) * inv_temperature
    q = tl.where(valid, expm1(e), 0.0)
    return t, square(t), tl.where(t > 0.0, d * t, t), q, tl.where(valid, expm1_excess(e), 0.0)


@triton.jit
def spread(s, squares, products, q, excess, C):
    """Entropy, Σp², 1 − Σp² and KL(uniform ‖ p) from the sums of the terms.  # 5 x (B,) -> 4 x (B,)"""
    whole = 1.0 + s
    entropy = log1p(s) - products / whole
    sum_squares = (1.0 + squares) / (whole * whole)
    gini = (2.0 * s + (s * s - squares)) / (whole * whole)
    return entropy, sum_squares, gini, log1p_excess(q / C) + excess / C


@triton.jit
def spread_of_rows(z, valid, m, s, C, inv_temperature, ALL_FIELDS: tl.constexpr):
    """The first class with logit m, and `spread`, of whole rows of logits z (B, C'), −inf where not valid, from
    their m and S; with ALL_FIELDS, else nothing of use.  # -> 5 x (B,)"""
    if ALL_FIELDS:
        classes = tl.arange(0, z.shape[1])[None, :]
        index = first_at(z, m, classes)
        r = log_mean_exp_of_rows(z, valid, m, s, C, inv_temperature)
        t, squares, products, q, excess = spread_terms(z, valid, classes, index, m, r, inv_temperature)
        entropy, sum_squares, gini, kl = spread(
            tl.sum(t, 1), tl.sum(squares, 1), tl.sum(products, 1), tl.sum(q, 1), tl.sum(excess, 1), C
        )
        return index, entropy, sum_squares, gini, kl
    else:
        return m, m, m, m, m
