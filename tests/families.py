"""Rows of logits on which Σ|p − 1/C| is hard to compute, and its value in float64."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def deviation(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Σ|p − 1/C|/T of float64 rows, without ever subtracting nearly equal numbers: |expm1(z/T − logmeanexp)|/C."""
    d = (logits.double() - logits.double().amax(1, keepdim=True)) / temperature
    classes = logits.shape[1]
    # logmeanexp = log1p(mean expm1 d) keeps its digits where d is small; plain log where it is not.
    mean = torch.expm1(d).mean(1, keepdim=True)
    log_mean = torch.where(mean > -0.5, torch.log1p(mean), torch.logsumexp(d, 1, keepdim=True) - math.log(classes))
    return torch.expm1(d - log_mean).abs().sum(1) / classes / temperature


def deviation_norm(logits: Tensor, temperature: float, p: float) -> Tensor:
    """‖p − 1/C‖_p of float64 rows, likewise."""
    d = (logits.double() - logits.double().amax(1, keepdim=True)) / temperature
    mean = torch.expm1(d).mean(1, keepdim=True)
    log_mean = torch.where(mean > -0.5, torch.log1p(mean), torch.logsumexp(d, 1, keepdim=True) - math.log(d.shape[1]))
    return _norm(torch.expm1(d - log_mean).abs() / d.shape[1], p)


def residual_norm(logits: Tensor, labels: Tensor, temperature: float, p: float) -> Tensor:
    """‖p − e_y‖_p of float64 rows, where p_y rounds to 1 too: p_c of the others, and their sum."""
    z = logits.double() / temperature
    log_p = z - torch.logsumexp(z, 1, keepdim=True)
    others = log_p.exp().scatter(1, labels[:, None], 0.0)
    return _norm(torch.cat([others, others.sum(1, keepdim=True)], 1), p)


def _norm(values: Tensor, p: float) -> Tensor:
    largest = values.amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    return torch.linalg.vector_norm(values / unit, p, 1) * unit[:, 0]


def hard_logits(classes: int, rows: int = 2) -> Iterator[tuple[str, Tensor, float]]:
    """(name, float32 logits (rows, C), temperature)."""
    normal = torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes))
    yield "normal", normal, 1.0
    yield "sharp", normal * 30, 1.0
    yield "saturated by scale", normal * 1000, 1.0
    for temperature in (0.01, 30.0, 1e3, 1e6):
        yield f"T={temperature:g}", normal * 4, temperature
    for spread in (1e-1, 1e-3, 1e-4, 1e-6):
        yield f"within {spread:g}", normal * spread, 1.0
    yield "within 1e-3 around 100", normal * 1e-3 + 100, 1.0
    for height in (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.3, 0.51, 0.69, 0.7, 1.0, 3.0, 10.0, 80.0, 3e4):
        for sign in (1, -1):
            z = torch.zeros(rows, classes)
            z[:, classes // 3] = sign * height
            yield f"one class {'above' if sign > 0 else 'below'} by {height:g}", z, 1.0
    half = torch.zeros(rows, classes)
    half[:, : classes // 2] = 0.69
    yield "two groups", half, 1.0
    if classes > 2:
        masked = normal.clone()
        masked[:, ::2] = -torch.inf
        yield "masked classes", masked, 1.0
        tied = normal.clone()
        tied[:, -2:] = 5.0
        yield "ties", tied, 1.0
