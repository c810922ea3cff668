"""The public calls: what they accept, what they refuse, and the shapes they return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from . import _ops
from ._autocast import autocasting
from ._backends import BACKENDS, check_differentiable, why_not_triton
from ._targets import check_labels, check_p, check_target
from .kernels.problem import FIELDS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REDUCTIONS = ("mean", "sum")
_FLOAT32_MAX = 3.4028234663852886e38


class HeadScores(NamedTuple):
    """Scores from one pass over the logits, each of shape features.shape[:-1]; larger = more in-distribution, except
    that entropy and exgrad are larger for uncertain rows.

    With T the temperature, x the features, z the logits, C classes, p = softmax(z/T), and natural logarithms. Where the
    bias's gradient is included, ‖x‖₁ + 1 takes the place of ‖x‖₁ in gradnorm and exgrad.
    """

    gradnorm: Tensor  #: feature_norm·output_norm
    feature_norm: Tensor  #: ‖x‖₁
    output_norm: Tensor  #: Σ_c |p_c − 1/C|/T, times C with reduction="sum"
    prediction: Tensor  #: argmax of z, int64; the lowest class on ties, 0 in a row whose scores are NaN
    max_logit: Tensor  #: max z (Hendrycks et al., ICML 2022)
    msp: Tensor  #: max p (Hendrycks & Gimpel, ICLR 2017)
    energy: Tensor  #: T·logsumexp(z/T) (Liu et al., NeurIPS 2020)
    entropy: Tensor  #: −Σ_c p_c log p_c, in nats (Shannon 1948)
    sum_squares: Tensor  #: Σ_c p_c², 1 minus the Gini impurity: the score of DOCTOR (Granese et al., NeurIPS 2021)
    exgrad: Tensor  #: 2‖x‖₁(1 − Σp²)/T: the mean of ‖∂ log p_y/∂W‖₁ over y drawn from p (Igoe et al. 2022)
    kl_uniform: Tensor  #: KL(uniform ‖ p), the loss whose gradient GradNorm takes; inf if a class is masked


class TokenStatistics(NamedTuple):
    """Of p = softmax(z/T) and a label y for each row, each of shape features.shape[:-1]; logarithms are natural."""

    log_prob: Tensor  #: log p_y
    entropy: Tensor  #: −Σ_c p_c log p_c
    sum_squares: Tensor  #: Σ_c p_c²; not differentiable
    residual_norm: Tensor  #: ‖p − e_y‖₂, EL2N (Paul et al., NeurIPS 2021); not differentiable


# torch.export saves a program that returns these only if it knows the type by name.
for _type in (HeadScores, TokenStatistics):
    _pytree._register_namedtuple(_type, serialized_type_name=f"gradnorm_fast.{_type.__name__}")


def fast_gradnorm(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    target: str | Tensor = "uniform",
    p: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    include_bias: bool = False,
    backend: str = "auto",
) -> Tensor:
    """GradNorm score of every row of features under a linear head; larger = more in-distribution.

    The L1 norm of the gradient of KL(uniform ‖ softmax(z/T)) with respect to the weight (Huang, Geng & Li, NeurIPS
    2021), z = x·Wᵀ + b. That gradient is the outer product (p − 1/C)/T ⊗ x, so the score is ‖x‖₁·Σ_c |p_c − 1/C|/T.

    Other targets q and norms give the other gradient norms of the last layer, ‖x‖_p·‖softmax(z/T) − q‖_p/T: that of the
    cross entropy to a label or to the predicted class. docs/gradients.md has the names they go by elsewhere. With those
    targets larger does not mean more in-distribution.

    Args:
        features: (..., D), what the head multiplies: float16, bfloat16, float32 or float64; any strides.
        weight: (C, D), or (C, D, 1, 1) of a 1x1 convolution after pooling; dtype and device of features.
        bias: (C,) or None; −inf masks a class.
        target: of the cross entropy: "uniform"; "predicted", the class of the largest logit, the lowest on ties; or
            int64 labels of shape features.shape[:-1]. A row with label −100 scores 0; other labels outside 0 … C − 1
            are a ValueError on a CPU, and give NaN on a GPU, where checking would wait for the data.
        p: order of the norm, 0.1 … 64 or inf.
        temperature: T > 0, finite, with a finite float32 reciprocal. It divides the logits and so, by the chain rule,
            the gradient.
        reduction: "mean" over classes in the loss, as in the paper, or "sum", C times that, as in the official code
            and OpenOOD. For the uniform target only.
        include_bias: count the bias's gradient too: ‖(x, 1)‖_p in place of ‖x‖_p, which is ‖x‖₁ + 1 for p = 1.
        backend: "auto" (Triton on a GPU where it can run, else torch), "triton" or "torch". No kernel takes
            logits or float64 with another target than the uniform one; "auto" takes torch for those.

    Returns:
        (...), float32, or float64 for float64 features. NaN where a row's features are not finite, or where their norm
        or a logit overflows. For p = 1 and 2 differentiable once in features, weight and bias, with sign(0) = 0 at
        kinks; the predicted class is taken as constant.

    Raises:
        TypeError: an argument that is not a tensor, not floating point, or not of the dtype of features (under
            torch.autocast all are cast as in torch.nn.functional.linear); a temperature or p that is not a number, an
            include_bias that is not a bool, labels that are not int64.
        ValueError: a shape, device, target, p, temperature, reduction or backend that does not fit.
        NotImplementedError: p is neither 1 nor 2 and an input requires grad.

    Examples:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.eye(2)
        >>> fast_gradnorm(features, weight)
        tensor([1.3864, 0.0000])
    """
    features, weight, bias = _autocast(features, weight, bias)
    weight = _check_head(features, weight, bias, include_bias)
    temperature = _check_options(features, temperature, reduction, backend, include_bias)
    gradient = _check_gradient(features, target, p, reduction, (features, weight, bias))
    out, _ = _ops.scores(
        _rows(features), None, weight, bias, *gradient, temperature, reduction, include_bias, backend, False
    )
    return _shaped(out[0], features)


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
    at fault. Every field but prediction is differentiable. Where gradnorm is NaN, so are the other fields, and
    prediction is 0.

    Examples:
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
        _rows(features), None, weight, bias, None, "uniform", 1.0, temperature, reduction, include_bias, backend, True
    )
    fields = dict(zip(FIELDS, (_shaped(row, features) for row in out.unbind(0)), strict=True))
    return HeadScores(prediction=_shaped(prediction, features), **fields)


def gradnorm_from_logits(
    features: Tensor,
    logits: Tensor,
    *,
    target: str | Tensor = "uniform",
    p: float = 1.0,
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
        target, p, temperature, reduction, include_bias, backend: as in `fast_gradnorm`.

    Returns:
        (...), float32, or float64 for float64 input; differentiable once in features and logits for p = 1 and 2.

    Raises:
        TypeError, ValueError, NotImplementedError: as `fast_gradnorm`.

    Examples:
        >>> features, head = torch.tensor([[1.0, 2.0]]), torch.nn.Linear(2, 5)
        >>> with torch.no_grad():
        ...     torch.allclose(gradnorm_from_logits(features, head(features)),
        ...                    fast_gradnorm(features, head.weight, head.bias))
        True
    """
    _check_tensor("features", features)
    _check_tensor("logits", logits, features, mixed=autocasting(features.device))
    if features.dim() == 0:
        raise ValueError("features: expected shape (..., D), got a tensor without dimensions")
    if logits.dim() == 0 or logits.shape[:-1] != features.shape[:-1] or logits.shape[-1] == 0:
        lead = "".join(f"{n}, " for n in features.shape[:-1])
        raise ValueError(f"logits: expected shape ({lead}C) with C >= 1, got {tuple(logits.shape)}")
    temperature = _check_options(features, temperature, reduction, backend, include_bias)
    gradient = _check_gradient(features, target, p, reduction, (features, logits))
    out, _ = _ops.scores(
        _rows(features), _rows(logits), None, None, *gradient, temperature, reduction, include_bias, backend, False
    )
    return _shaped(out[0], features)


def token_statistics(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> TokenStatistics:
    """Log probability of a label, entropy, Σp² and ‖p − e_y‖₂ of every row, without the logits in memory.

    p = softmax(z/T), z = x·Wᵀ + b. One pass over tiles of classes: extra memory does not grow with the vocabulary, in
    the backward pass too. Exact down to 1 − p_y = 1e-30, where 1 − 2p_y + Σp² would give 0.

    Args:
        features: (..., D), such as the last hidden states of a language model; dtypes as in `fast_gradnorm`.
        weight: (C, D), dtype and device of features.
        labels: int64 of shape features.shape[:-1]. A row with label −100 is 0 in every field; other labels outside
            0 … C − 1 are a ValueError on a CPU, and give NaN on a GPU.
        bias: (C,) or None; −inf masks a class.
        temperature: T > 0, as in `fast_gradnorm`.
        backend: as in `fast_gradnorm`; the kernel does not take float64.

    Returns:
        float32, or float64 for float64 features. log_prob and entropy are differentiable once in features, weight and
        bias; sum_squares and residual_norm are not. NaN where a row's features are not finite or a logit overflows.

    Raises:
        TypeError, ValueError: as `fast_gradnorm`.

    Examples:
        >>> features, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> token_statistics(features, weight, torch.tensor([1])).log_prob
        tensor([-0.3133])
    """
    features, weight, bias = _autocast(features, weight, bias)
    weight = _check_head(features, weight, bias, False)
    temperature = _check_options(features, temperature, "mean", backend)
    check_labels(labels, features.shape[:-1], "labels")
    _check_device("labels", labels, features)
    fields = _ops.token_statistics(_rows(features), weight, bias, labels.reshape(-1), temperature, backend)
    return TokenStatistics(*(_shaped(row, features) for out in fields for row in out.unbind(0)))


def warmup(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    batch_sizes: Iterable[int] = (1, 32, 256, 4096),
    dtype: torch.dtype | None = None,
) -> None:
    """Compile and load every kernel that GradNorm and `head_scores` need for this head and these batch sizes.

    The first call of a kernel compiles it, which takes 1 to 3 seconds each unless Triton has it in its cache. Call this
    once at start-up, and before capturing a CUDA graph: it also tries the library's matmul, which cannot be tried
    during a capture. Other targets and norms compile at their first call. Where no Triton kernel runs (a CPU), it only
    checks its arguments.

    Args:
        weight: (C, D), on the device where the head will run.
        bias: (C,) or None.
        batch_sizes: numbers of rows, each at least 1.
        dtype: of features, weight and bias at run time; None for that of weight.

    Raises:
        TypeError, ValueError: as `fast_gradnorm`; a batch size that is not a positive integer.

    Examples:
        >>> import torch
        >>> from gradnorm_fast import warmup
        >>> head = torch.nn.Linear(512, 10)
        >>> warmup(head.weight, head.bias, batch_sizes=(1, 64))
    """
    if not isinstance(batch_sizes, Iterable):
        raise TypeError(f"batch_sizes: expected several integers, got {batch_sizes!r}")
    sizes = list(batch_sizes)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"batch_sizes: expected positive integers, got {size!r}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype!r}")
    _check_tensor("weight", weight)
    if bias is not None:
        _check_tensor("bias", bias)
    if weight.dim() not in (2, 4):
        raise ValueError(f"weight: expected shape (C, D) or (C, D, 1, 1), got {tuple(weight.shape)}")
    weight = weight.detach() if dtype is None else weight.detach().to(dtype)
    bias = bias if bias is None else bias.detach().to(weight.dtype)
    cuda = weight.device.type == "cuda"
    for size in sizes if cuda else [1]:
        features = weight.new_zeros((size, weight.shape[1]))
        fast_gradnorm(features, weight, bias)
        head_scores(features, weight, bias)
    if cuda:
        torch.cuda.synchronize(weight.device)


def _rows(t: Tensor) -> Tensor:
    """(..., N) to (B, N), a view wherever the strides allow one."""
    return t if t.dim() == 2 else t.unsqueeze(0) if t.dim() == 1 else t.flatten(0, -2)


def _shaped(row: Tensor, features: Tensor) -> Tensor:
    """(B,) to features.shape[:-1]."""
    return row if features.dim() == 2 else row.reshape(features.shape[:-1])


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under torch.autocast, what torch.nn.functional.linear does: all but float64 to the autocast dtype."""
    if not isinstance(tensors[0], Tensor) or not autocasting(tensors[0].device):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _check_tensor(name: str, value: object, features: Tensor | None = None, mixed: bool = False) -> None:
    """Refuse what is no dense floating-point tensor, or has another device or, unless mixed, dtype than features."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    dtype = value.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {dtype}")
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {got}")
    if features is None:
        return
    if dtype != features.dtype and not mixed:
        raise TypeError(
            f"{name}: expected the dtype of features, {features.dtype}, got {dtype}; "
            "convert one of them, or call under torch.autocast"
        )
    _check_device(name, value, features)


def _check_device(name: str, value: Tensor, features: Tensor) -> None:
    if value.device != features.device:
        raise ValueError(f"{name}: expected the device of features, {features.device}, got {value.device}")


def _check_gradient(
    features: Tensor, target: object, p: object, reduction: str, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, str, float]:
    """Refuse a gradient that does not fit; labels (B,) or None, the target's name and p."""
    p = check_p(p)
    check_target(target, features.shape[:-1], reduction)
    labels = target if isinstance(target, Tensor) else None
    if labels is not None:
        _check_device("target", labels, features)
    name = target if isinstance(target, str) else "labels"
    if p not in (1.0, 2.0) and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        check_differentiable(p)
    return None if labels is None else labels.reshape(-1), name, p


def _check_head(
    features: Tensor, weight: Tensor, bias: Tensor | None, include_bias: bool, prefix: str = "", fewest: int = 1
) -> Tensor:
    """Refuse a head that does not fit, or has fewer classes; the weight as (C, D). The prefix is of the names."""
    _check_tensor("features", features)
    _check_tensor(f"{prefix}weight", weight, features)
    if features.dim() == 0:
        raise ValueError("features: expected shape (..., D), got a tensor without dimensions")
    if weight.dim() != 2:
        if weight.dim() != 4:
            raise ValueError(f"{prefix}weight: expected shape (C, D) or (C, D, 1, 1), got {tuple(weight.shape)}")
        if weight.shape[2] != 1 or weight.shape[3] != 1:
            raise ValueError(
                f"{prefix}weight: expected shape (C, D) or (C, D, 1, 1), got {tuple(weight.shape)}: the gradient of a "
                "larger convolution is not an outer product"
            )
        weight = weight[:, :, 0, 0]
    classes, depth = weight.shape
    if classes < fewest:
        raise ValueError(f"{prefix}weight: expected at least one class, got shape {tuple(weight.shape)}")
    if features.shape[-1] != depth:
        raise ValueError(
            f"features: expected shape (..., {depth}) to match {prefix}weight {tuple(weight.shape)}, "
            f"got {tuple(features.shape)}"
        )
    if bias is not None:
        _check_tensor(f"{prefix}bias", bias, features)
        if bias.shape != (classes,):
            raise ValueError(
                f"{prefix}bias: expected shape ({classes},) to match {prefix}weight {tuple(weight.shape)}, "
                f"got {tuple(bias.shape)}"
            )
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
