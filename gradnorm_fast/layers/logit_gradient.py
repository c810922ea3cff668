"""The gradient of each sample's loss with respect to its logits, in closed form without cancellation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._backends import on_cpu_without_float64
from .._targets import IGNORE
from .._torch_forward import deviations, shifted
from .norms import norm_dtype


def target_gradient(logits: Tensor, target: str | Tensor, temperature: float, scale: float) -> Tensor:
    """scale·(softmax(z/T) − target)/T of logits z (B, C), in float32 or float64.

    The gradient of the cross entropy to the target distribution: uniform, one-hot at a label, or one-hot at the
    predicted class. No step subtracts nearly equal numbers: p − 1/C comes from the score's own formula, in float64, and
    1 − p_y is a sigmoid of the other classes' logsumexp.
    """
    dtype = norm_dtype(logits.dtype)
    if isinstance(target, str) and target == "uniform":
        (gradient,) = _uniform_gradient(logits.detach(), 1.0 / temperature, scale / temperature, dtype)
        return gradient
    z = logits.detach().to(dtype)
    if isinstance(target, Tensor):
        gradient = _one_hot_gradient(z, target.to(z.device), temperature)
    else:
        gradient = _one_hot_gradient(z, z.argmax(1), temperature)
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
    (gradient,) = torch.autograd.grad(losses.sum(), z, allow_unused=True)
    if gradient is None:
        raise ValueError("loss: expected a function of the logits, its result does not depend on them")
    return gradient.to(norm_dtype(z.dtype))


@on_cpu_without_float64
def _uniform_gradient(z: Tensor, inv_temperature: float, factor: float, dtype: torch.dtype) -> tuple[Tensor]:
    """factor·(p − 1/C), computed in float64 and rounded once."""
    u, t = deviations(shifted(z, inv_temperature))
    return (u.div_(t).mul_(factor).to(dtype),)


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
