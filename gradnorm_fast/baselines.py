"""The baselines of the GradNorm paper that need more than one pass over the logits: ODIN and Mahalanobis.

Larger scores are more in-distribution, as for all scores of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import heads
from .functional import _check_options
from .layers.logit_gradient import target_gradient

CHUNK_BYTES = 64 * 2**20  #: of distances at a time


def odin_from_logits(logits: Tensor, temperature: float = 1000.0) -> Tensor:
    """C·max softmax(z/T) − 1 of each row: the ranking of ODIN (Liang, Li & Srikant, ICLR 2018) without its rounding.

    At T = 1000 the softmax is nearly uniform; max p is 1/C and a few last digits of float32, so that different rows
    tie. The excess over 1/C keeps them apart.

    Args:
        logits: (..., C), not divided by T.
        temperature: T > 0.

    Returns:
        (...), float32, or float64 for float64 logits; 0 … C − 1. NaN where a row has a NaN or +inf.

    Examples:
        >>> odin_from_logits(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist()[0]
        0.0
    """
    temperature = _check_options(torch.empty(0), temperature, "mean", "auto")
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 1 or not logits.shape[-1]:
        got = f"{tuple(logits.shape)} {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating-point tensor of shape (..., C), got {got}")
    rows = logits.reshape(-1, logits.shape[-1])
    excess = target_gradient(rows, "uniform", temperature, temperature).amax(1)
    return (excess * logits.shape[-1]).reshape(logits.shape[:-1])


def odin(
    model: nn.Module,
    images: Tensor,
    *,
    temperature: float = 1000.0,
    epsilon: float = 0.0,
    std: Sequence[float] | None = None,
) -> Tensor:
    """ODIN (Liang, Li & Srikant, ICLR 2018): `odin_from_logits` of images moved towards their predicted class.

    The images become x − ε·sign(−∂ log max p/∂x), which takes a forward, a backward and another forward pass; ε = 0, as
    in the ImageNet code of the GradNorm authors, takes one forward pass. The model is run in evaluation mode and left
    as it was.

    Args:
        model: a classifier; its output is logits (B, C), or an object with `.logits`.
        images: (B, ...), on the model's device.
        temperature: T > 0.
        epsilon: ε >= 0, in the units of the images, or of the pixels before normalisation if `std` is given.
        std: what each channel (dimension 1) was divided by when the images were normalised.

    Returns:
        (B,), float32, or float64 for a float64 model.

    Examples:
        >>> scores = odin(model, images, temperature=1000.0, epsilon=0.0014)
    """
    _check_epsilon(epsilon)
    temperature = _check_options(torch.empty(0), temperature, "mean", "auto")
    if not isinstance(images, Tensor) or images.dim() < 2:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a batch of shape (B, ...), got {got}")
    if std is not None and (np.shape(std) != images.shape[1:2] or not all(s > 0 for s in std)):
        raise ValueError(f"std: expected a positive number for each of the {images.shape[1]} channels, got {std!r}")
    model = heads.unwrap(model)
    with heads.evaluating(model):
        if epsilon > 0 and len(images):
            images = images - epsilon * _descent(model, images, temperature, std)
        return odin_from_logits(heads.logits_of(model(images)), temperature)


def _descent(model: nn.Module, images: Tensor, temperature: float, std: Sequence[float] | None) -> Tensor:
    """sign(−∂ log max p/∂x), divided by std."""
    with torch.inference_mode(False), torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        logits = heads.logits_of(model(x.clone()))  # a model may write into its input
        gradient = target_gradient(logits, "predicted", temperature, 1.0)
        # Confident rows have tiny gradients: only their sign is wanted, and it must not underflow on the way.
        largest = gradient.abs().amax(1, keepdim=True)
        gradient = gradient / torch.where(largest > 0, largest, 1.0)
        (direction,) = torch.autograd.grad(logits, x, gradient.to(logits.dtype))
    direction = direction.sign()
    if std is not None:
        direction = direction / direction.new_tensor(std).view(1, -1, *[1] * (images.dim() - 2))
    return direction


class Mahalanobis:
    """−min_c (x − μ_c)ᵀ Σ⁻¹ (x − μ_c): the distance to the nearest class mean under one covariance.

    From Lee et al., NeurIPS 2018. Of the last features only; the authors' code combines several layers. The covariance
    and its (pseudo-)inverse are scikit-learn's, in float64.

    Examples:
        >>> features, labels = torch.rand(100, 8), torch.randint(0, 5, (100,))
        >>> scores = Mahalanobis().fit(features, labels).score(torch.rand(3, 8))
        >>> scores.shape
        torch.Size([3])

    Attributes, after `fit`:
        classes: (C,) int64, the labels that there are.
        means: (C, D) float64.
        precision: (D, D) float64, Σ⁻¹.
    """

    def fit(self, features: Tensor | np.ndarray[Any, Any], labels: Tensor | np.ndarray[Any, Any]) -> Mahalanobis:
        """Class means and shared covariance.

        Args:
            features: (N, D) of in-distribution images, at best those that the model was trained on.
            labels: (N,), integer.

        Raises:
            TypeError: features or labels that are not numbers.
            ValueError: shapes that do not fit, features that are not finite, fewer than two images.
            ImportError: without scikit-learn.
        """
        x = _matrix("features", features)
        try:
            y = torch.as_tensor(labels).detach().cpu()
        except (TypeError, ValueError, RuntimeError):  # not numbers
            raise TypeError(f"labels: expected a tensor or an array, got {type(labels).__name__}") from None
        if y.shape != (len(x),) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"labels: expected integers of shape ({len(x)},), got {tuple(y.shape)} {y.dtype}")
        bad = int((~x.isfinite().all(1)).sum())
        if len(x) < 2 or bad:
            raise ValueError(f"features: expected at least two finite rows, got {len(x)} rows, {bad} not finite")
        try:
            from sklearn.covariance import EmpiricalCovariance
        except ImportError:
            raise ImportError('Mahalanobis needs scikit-learn: pip install "gradnorm_fast[eval]"') from None
        self.classes, place = y.long().unique(return_inverse=True)
        counts = torch.bincount(place, minlength=len(self.classes)).double()
        self.means = torch.zeros(len(self.classes), x.shape[1], dtype=torch.float64).index_add_(0, place, x)
        self.means /= counts[:, None]
        centred = EmpiricalCovariance(store_precision=True, assume_centered=True).fit((x - self.means[place]).numpy())
        self.precision = torch.from_numpy(centred.precision_)
        values, vectors = torch.linalg.eigh(self.precision)
        self._whitening = vectors * values.clamp(min=0.0).sqrt()  # Σ⁻¹ = W·Wᵀ
        self._centre = self.means.mean(0)  # so that the squares below stay small
        self._whitened_means = (self.means - self._centre) @ self._whitening
        return self

    def score(self, features: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """(N,) float64 on the CPU of features (N, D), at most 0; NaN where a row is not finite."""
        if not hasattr(self, "means"):
            raise ValueError("the detector has no class means yet: call fit with in-distribution features first")
        x = _matrix("features", features)
        if x.shape[1] != self.means.shape[1]:
            raise ValueError(f"features: expected shape (N, {self.means.shape[1]}) as in fit, got {tuple(x.shape)}")
        means, scores = self._whitened_means, torch.empty(len(x), dtype=torch.float64)
        step = max(1, CHUNK_BYTES // (8 * len(means)))
        for start in range(0, len(x), step):
            rows = (x[start : start + step] - self._centre) @ self._whitening
            squares = torch.addmm(means.square().sum(1), rows, means.T, alpha=-2.0).amin(1) + rows.square().sum(1)
            scores[start : start + step] = -squares.clamp(min=0.0)
        return torch.where(x.isfinite().all(1), scores, torch.nan)


def _matrix(name: str, value: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"{name}: expected a tensor or an array of shape (N, D), got {type(value).__name__}")
    x = torch.as_tensor(value).detach()
    if x.dim() != 2:
        raise ValueError(f"{name}: expected shape (N, D), got {tuple(x.shape)}")
    return x.cpu().double()


def _check_epsilon(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"epsilon: expected a number, got {type(value).__name__}")
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"epsilon: expected a finite number >= 0, got {value!r}")
