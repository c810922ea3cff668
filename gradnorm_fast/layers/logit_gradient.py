"""The gradient of each sample's loss with respect to its logits, in closed form without cancellation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._targets import IGNORE
from .norms import norm_dtype


def target_gradient(logits: Tensor, target: str | Tensor, temperature: float, scale: float) -> Tensor:
    """scale·(softmax(z/T) − target)/T of logits z (B, C), in float32 or float64.

    The gradient of the cross entropy to the target distribution: uniform, one-hot at a label, or one-hot at the
    predicted class. No step subtracts nearly equal numbers: the deviation from uniform comes from expm1((z − r)/T) with
    the log-mean-exp r, and 1 − p_y is a sigmoid of the other classes' logsumexp.
    """
    z = logits.detach().to(norm_dtype(logits.dtype))
    if isinstance(target, Tensor):
        gradient = _one_hot_gradient(z, target.to(z.device), temperature)
    elif target == "predicted":
        gradient = _one_hot_gradient(z, z.argmax(1), temperature)
    else:
        gradient = _uniform_gradient(z, temperature)
    return gradient * (scale / temperature)


def loss_gradient(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """∂loss_b/∂z_b of a callable that returns one loss per row of logits (B, C)."""
    z = logits.detach().clone().requires_grad_()
    losses = loss(z)
    if not isinstance(losses, Tensor) or losses.shape != z.shape[:1]:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss: expected it to return one loss per image, shape ({len(z)},), got {got}")
    if not losses.requires_grad:
        raise ValueError("loss: expected a differentiable function of the logits, its result does not require grad")
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    return gradient.to(norm_dtype(z.dtype))


def _uniform_gradient(z: Tensor, temperature: float) -> Tensor:
    """p − 1/C. Centred twice, because the first log-mean-exp has a rounding error relative to the maximum."""
    classes = z.shape[1]
    d = z - z.amax(1, keepdim=True)
    r = temperature * (torch.exp(d / temperature).sum(1, keepdim=True) / classes).log()
    off = torch.expm1((d - r) / temperature).sum(1, keepdim=True) / classes
    r = torch.where(off.abs() < 0.5, r + temperature * torch.log1p(off), r)
    q = torch.expm1((d - r) / temperature)
    total = q.sum(1, keepdim=True)
    return (q - total / classes) / (classes + total)


def _one_hot_gradient(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """p − e_y, from the softmax over the other classes; 0 for ignored rows, NaN for invalid labels."""
    classes = z.shape[1]
    ignored, exists = labels == IGNORE, (labels >= 0) & (labels < classes)
    y = torch.where(exists, labels, 0)[:, None]
    own = z.gather(1, y)
    others = z.scatter(1, y, -math.inf)
    highest = others.amax(1, keepdim=True)
    shift = torch.where(highest == -math.inf, 0.0, highest)  # there is one class, or all others are masked
    weights = torch.exp((others - shift) / temperature)
    total = weights.sum(1, keepdim=True)
    epsilon = torch.sigmoid((shift - own) / temperature + total.log())  # 1 − p_y
    gradient = torch.where(total > 0, epsilon * weights / total, 0.0).scatter(1, y, -epsilon)
    gradient = torch.where(exists[:, None], gradient, torch.nan)
    return torch.where(ignored[:, None], 0.0, gradient)
