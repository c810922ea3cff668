"""The scores of a batch, with GradNorm from the gradients of any layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._backends import on_cpu_without_float64
from .._torch_forward import shifted
from .._torch_spread import spread_of
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
    two here too. For the weight of a linear head it is ‖x‖₁, for which it stands in exgrad.
    """
    norms = layer_gradnorms(model, images, layers=layers, temperature=temperature, reduction=reduction, per_layer=True)
    assert isinstance(norms, LayerNorms)
    z, gradnorm = norms.logits, combined(list(norms.values()), 1.0)
    z = z.to(gradnorm.dtype)
    scale = z.shape[1] if reduction == "sum" else 1.0
    output_norm = target_gradient(z, "uniform", temperature, scale).abs().sum(1)
    feature_norm = torch.where(output_norm == 0, 0.0, gradnorm / output_norm)
    max_logit, prediction = z.max(1)
    log_sum, entropy, sum_squares, gini, kl_uniform = _of_logits(z, prediction, temperature)
    fields = {
        "gradnorm": gradnorm,
        "feature_norm": feature_norm,
        "output_norm": output_norm,
        "max_logit": max_logit,
        "msp": (-log_sum).exp(),
        "energy": max_logit + temperature * log_sum,
        "entropy": entropy,
        "sum_squares": sum_squares,
        "exgrad": gini * feature_norm * (2.0 / temperature),
        "kl_uniform": kl_uniform,
    }
    poison = gradnorm - gradnorm  # if the score is NaN, so are all other fields
    fields = {name: score + poison for name, score in fields.items()}
    return HeadScores(prediction=torch.where(poison == 0, prediction, 0), **fields)


@on_cpu_without_float64
def _of_logits(z: Tensor, prediction: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """log Σ exp((z − max z)/T), entropy, Σp², 1 − Σp² and KL(uniform ‖ p) of each row, in the dtype of z."""
    d = shifted(z, 1.0 / temperature)
    found = spread_of(d, prediction[:, None])
    of_rows = found.entropy, found.sum_squares, found.gini, found.kl_uniform
    return tuple(t.to(z.dtype) for t in (d.logsumexp(1), *(t[:, 0] for t in of_rows)))
