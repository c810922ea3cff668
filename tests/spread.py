"""Entropy, Σp², 1 − Σp² and KL(uniform ‖ p) of rows of logits, by other formulas than the package's."""

import math
from typing import NamedTuple

import mpmath
import torch
from torch import Tensor


class Truth(NamedTuple):
    entropy: Tensor
    sum_squares: Tensor
    gini: Tensor  #: 1 − Σp²
    kl_uniform: Tensor


def spread(logits: Tensor, temperature: float) -> Truth:
    """In float64, from ε = 1 − max p, as log odds, and the other classes' own softmax p̃; (n,) each.

    entropy = H(ε) + ε·H(p̃) with H(ε) the binary entropy, and 1 − Σp² = ε(2 − ε(1 + Σp̃²)). The KL divergence is the
    log mean exp of the logits about their mean; where h is small, exp h − 1 − h is 2 sinh²(h/2) and the series of
    sinh h − h.
    """
    z = logits.double()
    top = z.argmax(1, keepdim=True)
    d = (z - z.gather(1, top)) / temperature
    others = d.scatter(1, top, -torch.inf)
    log_odds = others.logsumexp(1)
    rest, log_rest = log_odds.sigmoid(), torch.nn.functional.logsigmoid(log_odds)
    log_p = torch.where(others.isneginf(), -torch.inf, others - log_odds[:, None])
    p = log_p.exp()
    rho, of_others = p.square().sum(1), -(p * log_p).nansum(1)
    binary = (1 - rest) * torch.nn.functional.softplus(log_odds)  # −(1 − ε) log(1 − ε)
    entropy = binary - (rest * log_rest).nan_to_num() + rest * of_others
    return Truth(entropy, (1 - rest) ** 2 + rest**2 * rho, rest * (2 - rest * (1 + rho)), _kl_uniform(d))


def _kl_uniform(d: Tensor) -> Tensor:
    mean = d.mean(1, keepdim=True)
    h = d - mean
    odd = h**3 / 6 * (1 + h**2 / 20 * (1 + h**2 / 42 * (1 + h**2 / 72 * (1 + h**2 / 110))))
    excess = torch.where(h.abs() < 0.5, 2 * (h / 2).sinh() ** 2 + odd, h.expm1() - h)
    far = d.logsumexp(1) - math.log(d.shape[1]) - mean[:, 0]
    return torch.where(mean[:, 0] < -50, far, excess.mean(1).log1p())


def exact_spread(logits: list[float], temperature: float) -> tuple[mpmath.mpf, ...]:
    """The same of one row, by their definitions, in mpmath's current precision."""
    z = [mpmath.mpf(v) / mpmath.mpf(temperature) for v in logits]
    top, classes = max(z), len(z)
    terms = [mpmath.exp(v - top) for v in z]
    total = mpmath.fsum(terms)
    p = [t / total for t in terms]
    squares = mpmath.fsum(v * v for v in p)
    kl = mpmath.log(total / classes) - mpmath.fsum(v - top for v in z) / classes
    return -mpmath.fsum(v * mpmath.log(v) for v in p if v), squares, 1 - squares, kl
