"""The readable truth: GradNorm by real autograd on a real linear layer, one sample at a time.

Slow on purpose. Tests and benchmarks hold every kernel against it in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._autocast import without_autocast
from ._targets import IGNORE, check_classes
from .functional import _check_gradient, _check_head, _check_options


def autograd_gradnorm(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    target: str | Tensor = "uniform",
    p: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    include_bias: bool = False,
) -> Tensor:
    """GradNorm score of every row of features as its authors define it (Huang, Geng & Li, NeurIPS 2021).

    For each sample: loss = −(mean or sum over classes of) log softmax(z/T), the cross entropy to the uniform
    distribution, whose gradient is that of KL(uniform ‖ softmax); score = ‖∂loss/∂W‖₁ (+ ‖∂loss/∂b‖₁). With a label or
    the predicted class y as target, loss = −log softmax(z/T)_y. Other norms are those of all entries together.

    Args:
        features: (..., D): float16, bfloat16, float32 or float64; the computation stays in it.
        weight: (C, D) or (C, D, 1, 1).
        bias: (C,) or None.
        target, p: as in `gradnorm_fast.fast_gradnorm`.
        temperature: T > 0.
        reduction: "mean" (the paper) or "sum" over classes (the official code, OpenOOD).
        include_bias: with the entries of the bias's gradient.

    Returns:
        (...), in the dtype of features; larger = more in-distribution.

    Raises:
        TypeError, ValueError: as `gradnorm_fast.fast_gradnorm`, but torch.autocast casts nothing here.

    Examples:
        >>> from gradnorm_fast import fast_gradnorm
        >>> features, weight = torch.rand(4, 8), torch.randn(5, 8)
        >>> exact = autograd_gradnorm(features.double(), weight.double())
        >>> torch.allclose(fast_gradnorm(features, weight).double(), exact, rtol=1e-5)
        True
    """
    weight = _check_head(features, weight, bias, include_bias)
    temperature = _check_options(features, temperature, reduction, "torch", include_bias)
    labels, target, p = _check_gradient(features, target, p, reduction, ())
    classes, depth = weight.shape
    if labels is not None:
        check_classes(labels, classes)
    scores = []
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(features.device):
        layer = torch.nn.Linear(depth, classes, bias=bias is not None, device="meta")  # nothing to initialise
        layer.weight = torch.nn.Parameter(weight.detach().clone())
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach().clone())
        wanted = [layer.weight, layer.bias] if include_bias else [layer.weight]
        for i, sample in enumerate(features.detach().clone().reshape(features.shape[:-1].numel(), depth)):
            logits = layer(sample)
            losses = -torch.log_softmax(logits / temperature, dim=-1)
            if target == "uniform":
                loss = losses.mean() if reduction == "mean" else losses.sum()
            else:
                label = logits.argmax() if labels is None else labels[i]
                loss = losses[label] if label != IGNORE else 0.0 * losses.sum()
            gradients = torch.autograd.grad(loss, wanted)
            scores.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]), p))
        empty = torch.zeros(features.shape[:-1], dtype=features.dtype, device=features.device)
        return torch.stack(scores).reshape(features.shape[:-1]) if scores else empty
