"""The public calls: what they accept, what they refuse, and the shapes they return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from . import _ops
from ._backends import BACKENDS, why_not_triton

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REDUCTIONS = ("mean", "sum")
_FLOAT32_MAX = 3.4028234663852886e38


class HeadScores(NamedTuple):
    """Scores from one pass over the logits, each of shape features.shape[:-1]; larger = more in-distribution.

    With T the temperature, x the features, z the logits, p = softmax(z/T):
    """

    gradnorm: Tensor  #: feature_norm·output_norm, or (feature_norm + 1)·output_norm with the bias's gradient
    feature_norm: Tensor  #: ‖x‖₁
    output_norm: Tensor  #: Σ_c |p_c − 1/C|/T, times C with reduction="sum"
    prediction: Tensor  #: argmax of z, int64; the lowest class on ties, 0 in a row whose scores are NaN
    max_logit: Tensor  #: max z (Hendrycks et al., ICML 2022)
    msp: Tensor  #: max p (Hendrycks & Gimpel, ICLR 2017)
    energy: Tensor  #: T·logsumexp(z/T) (Liu et al., NeurIPS 2020)


# torch.export saves a program that returns HeadScores only if it knows the type by name.
_pytree._register_namedtuple(HeadScores, serialized_type_name="gradnorm_fast.HeadScores")


def fast_gradnorm(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    include_bias: bool = False,
    backend: str = "auto",
) -> Tensor:
    """GradNorm score of every row of features under a linear head; larger = more in-distribution.

    The L1 norm of the gradient of KL(uniform ‖ softmax(z/T)) with respect to the weight (Huang, Geng & Li, NeurIPS
    2021), z = x·Wᵀ + b. That gradient is the outer product (p − 1/C)/T ⊗ x, so the score is ‖x‖₁·Σ_c |p_c − 1/C|/T.

    Args:
        features: (..., D), what the head multiplies: float16, bfloat16, float32 or float64; any strides.
        weight: (C, D), or (C, D, 1, 1) of a 1x1 convolution after pooling; dtype and device of features.
        bias: (C,) or None; −inf masks a class.
        temperature: T > 0, finite, with a finite float32 reciprocal. It divides the logits and so, by the chain rule,
            the gradient.
        reduction: "mean" over classes in the loss, as in the paper, or "sum", C times that, as in the official code
            and OpenOOD.
        include_bias: count the bias's gradient too: ‖x‖₁ + 1 in place of ‖x‖₁.
        backend: "auto" (Triton on a GPU where it can run, else torch), "triton" or "torch".

    Returns:
        (...), float32, or float64 for float64 features. NaN where a row's features are not finite, or where their norm
        or a logit overflows. Differentiable once in features, weight and bias, with sign(0) = 0 at kinks.

    Raises:
        TypeError: an argument that is not a tensor, not floating point, or not of the dtype of features (under
            torch.autocast all are cast as in torch.nn.functional.linear); a temperature that is not a number, an
            include_bias that is not a bool.
        ValueError: a shape, device, temperature, reduction or backend that does not fit.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.eye(2)
        >>> fast_gradnorm(features, weight)
        tensor([1.3864, 0.0000])
    """
    features, weight, bias = _autocast(features, weight, bias)
    weight = _check_head(features, weight, bias, include_bias)
    temperature = _check_options(features, temperature, reduction, backend, include_bias)
    out, _ = _ops.scores(_rows(features), None, weight, bias, temperature, reduction, include_bias, backend, False)
    return out.reshape(features.shape[:-1])


def head_scores(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    include_bias: bool = False,
    backend: str = "auto",
) -> HeadScores:
    """GradNorm, its two factors, and the usual baselines from the same single pass over the logits.

    Takes and raises what `fast_gradnorm` does. Where GradNorm fails, feature_norm and output_norm show which factor is
    at fault. Every field but prediction is differentiable.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.eye(2)
        >>> scores = head_scores(features, weight)
        >>> scores.feature_norm, scores.prediction
        (tensor([3., 0.]), tensor([1, 0]))
        >>> torch.equal(scores.gradnorm, scores.feature_norm * scores.output_norm)
        True
    """
    features, weight, bias = _autocast(features, weight, bias)
    weight = _check_head(features, weight, bias, include_bias)
    temperature = _check_options(features, temperature, reduction, backend, include_bias)
    out, prediction = _ops.scores(
        _rows(features), None, weight, bias, temperature, reduction, include_bias, backend, True
    )
    gradnorm, feature_norm, output_norm, max_logit, msp, energy = (
        row.reshape(features.shape[:-1]) for row in out.unbind(0)
    )
    prediction = prediction.reshape(features.shape[:-1])
    return HeadScores(gradnorm, feature_norm, output_norm, prediction, max_logit, msp, energy)


def gradnorm_from_logits(
    features: Tensor,
    logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    include_bias: bool = False,
    backend: str = "auto",
) -> Tensor:
    """GradNorm score of every row for those who already have the logits: one read of them, nothing else.

    Args:
        features: (..., D), what the last layer multiplied.
        logits: (..., C), what it returned, bias included, not divided by T; dtype and device of features (under
            torch.autocast the dtypes may differ; nothing is cast).
        temperature, reduction, include_bias, backend: as in `fast_gradnorm`.

    Returns:
        (...), float32, or float64 for float64 input; differentiable once in features and logits.

    Raises:
        TypeError, ValueError: as `fast_gradnorm`.

    Example:
        >>> features, head = torch.tensor([[1.0, 2.0]]), torch.nn.Linear(2, 5)
        >>> with torch.no_grad():
        ...     torch.allclose(gradnorm_from_logits(features, head(features)),
        ...                    fast_gradnorm(features, head.weight, head.bias))
        True
    """
    _check_tensor("features", features)
    _check_tensor("logits", logits)
    if features.dim() == 0:
        raise ValueError("features: expected shape (..., D), got a tensor without dimensions")
    if logits.dim() == 0 or logits.shape[:-1] != features.shape[:-1] or logits.shape[-1] == 0:
        lead = "".join(f"{n}, " for n in features.shape[:-1])
        raise ValueError(f"logits: expected shape ({lead}C) with C >= 1, got {tuple(logits.shape)}")
    _check_like("logits", logits, features, mixed=_autocasting(features.device))
    temperature = _check_options(features, temperature, reduction, backend, include_bias)
    out, _ = _ops.scores(
        _rows(features), _rows(logits), None, None, temperature, reduction, include_bias, backend, False
    )
    return out.reshape(features.shape[:-1])


def warmup(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    batch_sizes: Iterable[int] = (1, 32, 256, 4096),
    dtype: torch.dtype | None = None,
) -> None:
    """Compile and load every kernel that `fast_gradnorm` and `head_scores` need for this head and these batch sizes.

    The first call of a kernel compiles it, which takes 1 to 3 seconds each unless Triton has it in its cache. Call this
    once at start-up, and before capturing a CUDA graph: it also tries the library's matmul, which cannot be tried
    during a capture. Where no Triton kernel runs (a CPU), it only checks its arguments.

    Args:
        weight: (C, D), on the device where the head will run.
        bias: (C,) or None.
        batch_sizes: numbers of rows, each at least 1.
        dtype: of features, weight and bias at run time; None for that of weight.

    Raises:
        TypeError, ValueError: as `fast_gradnorm`; a batch size that is not a positive integer.

    Example:
        >>> import torch
        >>> from gradnorm_fast import warmup
        >>> head = torch.nn.Linear(512, 10)
        >>> warmup(head.weight, head.bias, batch_sizes=(1, 64))
    """
    sizes = list(batch_sizes)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_sizes: expected positive integers, got {size!r}")
    weight = weight.detach() if dtype is None else weight.detach().to(dtype)
    bias = bias if bias is None else bias.detach().to(weight.dtype)
    cuda = weight.device.type == "cuda"
    for size in sizes if cuda else [1]:
        features = weight.new_zeros((size, weight.shape[1])) if weight.dim() > 1 else weight
        fast_gradnorm(features, weight, bias)
        head_scores(features, weight, bias)
    if cuda:
        torch.cuda.synchronize(weight.device)


def _rows(t: Tensor) -> Tensor:
    """(..., N) to (B, N), a view wherever the strides allow one."""
    return t if t.dim() == 2 else t.unsqueeze(0) if t.dim() == 1 else t.flatten(0, -2)


def _autocasting(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under torch.autocast, what torch.nn.functional.linear does: all but float64 to the autocast dtype."""
    if not isinstance(tensors[0], Tensor) or not _autocasting(tensors[0].device):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {got}")


def _check_like(name: str, value: Tensor, features: Tensor, mixed: bool = False) -> None:
    if value.dtype != features.dtype and not mixed:
        raise TypeError(
            f"{name}: expected the dtype of features, {features.dtype}, got {value.dtype}; "
            "convert one of them, or call under torch.autocast"
        )
    if value.device != features.device:
        raise ValueError(f"{name}: expected the device of features, {features.device}, got {value.device}")


def _check_head(features: Tensor, weight: Tensor, bias: Tensor | None, include_bias: bool) -> Tensor:
    """Refuse a head that does not fit; the weight as (C, D)."""
    _check_tensor("features", features)
    _check_tensor("weight", weight)
    if features.dim() == 0:
        raise ValueError("features: expected shape (..., D), got a tensor without dimensions")
    if weight.dim() not in (2, 4):
        raise ValueError(f"weight: expected shape (C, D) or (C, D, 1, 1), got {tuple(weight.shape)}")
    if weight.dim() == 4:
        if weight.shape[2] != 1 or weight.shape[3] != 1:
            raise ValueError(
                f"weight: expected shape (C, D) or (C, D, 1, 1), got {tuple(weight.shape)}: the gradient of a larger "
                "convolution is not an outer product"
            )
        weight = weight[:, :, 0, 0]
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one class, got shape {tuple(weight.shape)}")
    if weight.shape[1] != features.shape[-1]:
        raise ValueError(
            f"features: expected shape (..., {weight.shape[1]}) to match weight {tuple(weight.shape)}, "
            f"got {tuple(features.shape)}"
        )
    _check_like("weight", weight, features)
    if bias is not None:
        _check_tensor("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"bias: expected shape ({weight.shape[0]},) to match weight {tuple(weight.shape)}, "
                f"got {tuple(bias.shape)}"
            )
        _check_like("bias", bias, features)
    elif include_bias:
        raise ValueError("include_bias: expected a bias whose gradient to include, got bias=None")
    return weight


def _check_options(
    features: Tensor, temperature: object, reduction: object, backend: object, include_bias: object = False
) -> float:
    """Refuse options that do not fit; the temperature as a float."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float, np.floating, np.integer)):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}")
    try:
        t = float(temperature)
    except OverflowError:
        t = float("inf")
    if not (0.0 < t <= _FLOAT32_MAX and 1.0 / t <= _FLOAT32_MAX):
        raise ValueError(
            f"temperature: expected a finite positive number with a finite float32 reciprocal, got {temperature!r}"
        )
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f'reduction: expected "mean" (the paper) or "sum" (the official code), got {reduction!r}')
    if not isinstance(include_bias, (bool, np.bool_)):
        raise TypeError(f"include_bias: expected a bool, got {type(include_bias).__name__}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f'backend: expected "auto", "triton" or "torch", got {backend!r}')
    if backend == "triton" and why_not_triton(features.device):
        raise ValueError(f"backend: {backend!r} cannot run here: {why_not_triton(features.device)}")
    return t
