"""The scores of a batch, with GradNorm from the gradients of any layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..functional import HeadScores
from . import LayerNorms, layer_gradnorms
from .logit_gradient import target_gradient
from .norms import combined
from .selection import Layers


def layer_scores(
    model: nn.Module, images: Any, layers: Layers, temperature: float = 1.0, reduction: str = "mean"
) -> HeadScores:
    """`HeadScores` whose gradnorm is the L1 norm by `layer_gradnorms`; from one forward and one backward pass.

    The other scores are those of the logits. feature_norm is gradnorm/output_norm, so gradnorm is the product of the
    two here too. For the weight of a linear head it is ‖x‖₁.
    """
    norms = layer_gradnorms(model, images, layers=layers, temperature=temperature, reduction=reduction, per_layer=True)
    assert isinstance(norms, LayerNorms)
    z, gradnorm = norms.logits, combined(list(norms.values()), 1.0)
    z = z.to(gradnorm.dtype)
    scale = z.shape[1] if reduction == "sum" else 1.0
    output_norm = target_gradient(z, "uniform", temperature, scale).abs().sum(1)
    feature_norm = torch.where(output_norm == 0, 0.0, gradnorm / output_norm)
    max_logit, prediction = z.max(1)
    shifted = (z - max_logit[:, None]) / temperature  # before dividing: T may be small
    log_sum = shifted.logsumexp(1)
    poison = gradnorm - gradnorm  # if the score is NaN, so are all other fields
    known = (gradnorm, feature_norm, output_norm, max_logit, (-log_sum).exp(), max_logit + temperature * log_sum)
    gradnorm, feature_norm, output_norm, max_logit, msp, energy = (score + poison for score in known)
    prediction = torch.where(poison == 0, prediction, 0)
    return HeadScores(gradnorm, feature_norm, output_norm, prediction, max_logit, msp, energy)
