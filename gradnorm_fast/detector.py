"""GradNorm for a model and images: scores, a threshold with a guarantee, and a warning where not to trust them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import heads
from .functional import HeadScores, _check_options, fast_gradnorm, head_scores

_FORMAT = 1
_KEYS = {"head", "fingerprint", "temperature", "reduction", "include_bias", "tpr", "calibration"}


class Prediction(NamedTuple):
    """What `GradNorm.predict` returns, each of shape (B,)."""

    labels: Tensor  #: int64, the model's class
    scores: Tensor  #: float32, larger = more in-distribution
    is_ood: Tensor  #: bool


class GradNorm:
    """Scores a classifier's images by GradNorm, one forward pass, no backward.

    The model is left as it was: mode, gradients, hooks, device and dtype. It is scored in evaluation mode, on the
    device and in the dtype it has; DataParallel, DistributedDataParallel and torch.compile wrappers are looked through.

    Args:
        model: a classifier; its output is logits (B, C), or an object with `.logits`.
        head: the last linear layer (or 1x1 convolution on pooled features), by name or as the module. None: found on
            the first batch, as the last one whose output is the model's.
        temperature, reduction, include_bias: as in `fast_gradnorm`.

    Raises:
        TypeError, ValueError: an argument that does not fit; on the first batch, a head that does not make the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | nn.Module | None = None,
        *,
        temperature: float = 1.0,
        reduction: str = "mean",
        include_bias: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = heads.unwrap(model)
        self.temperature = _check_options(torch.empty(0), temperature, reduction, "auto")
        self.reduction, self.include_bias = reduction, include_bias
        self.head_name: str | None = None
        self._head: nn.Module | None = None
        self._verified = False
        if head is not None:
            self.head_name, self._head = heads.module_named(self.model, head)
        self._calibration: Tensor | None = None  # sorted scores of in-distribution images
        self._tpr = 0.95

    # Scores

    def score(self, images: Tensor) -> Tensor:
        """GradNorm of images (B, ...): (B,) float32 on the model's device, larger = more in-distribution."""
        return self._apply(fast_gradnorm, images).float()

    def head_scores(self, images: Tensor) -> HeadScores:
        """GradNorm, its factors and the usual baselines of images (B, ...), from the same pass; each (B,)."""
        return self._apply(head_scores, images)

    def score_loader(self, loader: Iterable[Any], progress: bool = True, numpy: bool = False) -> Any:
        """GradNorm of all images of a loader, in its order: (N,) float32 on the CPU, a tensor or a NumPy array.

        Batches may be images, or tuples or dictionaries with the images first or under "pixel_values" or "image".
        """
        parts = [self.score(images).cpu() for images in _batches(loader, progress)]
        scores = torch.cat(parts) if parts else torch.empty(0)
        return scores.numpy() if numpy else scores

    def head_scores_loader(self, loader: Iterable[Any], progress: bool = True) -> HeadScores:
        """`head_scores` of all images of a loader, in its order, on the CPU."""
        parts = [HeadScores(*(s.cpu() for s in self.head_scores(images))) for images in _batches(loader, progress)]
        if not parts:
            raise ValueError("loader: expected at least one batch, got none")
        return HeadScores(*(torch.cat(field) for field in zip(*parts, strict=True)))

    # Threshold

    def fit(self, id_loader: Iterable[Any], tpr: float = 0.95, progress: bool = True) -> GradNorm:
        """Set the threshold from in-distribution images that the model was not trained on.

        At least `tpr` of further in-distribution images, drawn alike, are then accepted (split conformal prediction).

        Raises:
            ValueError: tpr not in (0, 1); no images; a score that is not finite.
        """
        check_tpr(tpr)
        return self.fit_scores(self.score_loader(id_loader, progress), tpr)

    def fit_scores(self, scores: Tensor | np.ndarray[Any, Any], tpr: float = 0.95) -> GradNorm:
        """`fit` from scores (N,) that are there already."""
        check_tpr(tpr)
        scores = torch.as_tensor(scores).detach().cpu().float().flatten()
        bad = int((~scores.isfinite()).sum())
        if len(scores) == 0 or bad:
            raise ValueError(
                f"fit: expected finite scores of at least one image, got {len(scores)} images, {bad} not finite"
            )
        self._calibration, self._tpr = scores.sort().values, tpr
        return self

    @property
    def threshold(self) -> float:
        """An image is OOD when its score is below this; −inf where the calibration is too small for the tpr."""
        calibration = self._fitted()
        n, allowed = len(calibration), 1.0 - self._tpr
        rejected = max(0, min(n, math.floor(allowed * (n + 1)) + 1))  # then down to (1 + k)/(n + 1) <= allowed, exactly
        while rejected >= 0 and (1 + rejected) / (n + 1) > allowed:
            rejected -= 1
        if rejected < 0 or rejected == n:  # none is OOD; or all are, where 1 − tpr rounds to 1
            return math.copysign(math.inf, rejected)
        return float(calibration[rejected])

    def p_value(self, scores: Tensor) -> Tensor:
        """(1 + #{calibration scores <= s})/(n + 1) of each score, float64: small where the image is unusual.

        NaN for NaN.
        """
        calibration = self._fitted()
        s = torch.as_tensor(scores).detach()
        below = torch.searchsorted(calibration.to(s.device, torch.float32), s.float().contiguous(), right=True)
        return torch.where(s.isnan(), torch.nan, (1.0 + below.double()) / (len(calibration) + 1))

    def predict(self, images: Tensor) -> Prediction:
        """The model's class, the score, and whether the image is OOD: exactly where p_value(score) <= 1 − tpr.

        A NaN score is OOD.
        """
        self._fitted()
        scores = self.head_scores(images)
        return Prediction(scores.prediction, scores.gradnorm.float(), self.is_ood(scores.gradnorm))

    def is_ood(self, scores: Tensor) -> Tensor:
        """Whether each score is below the threshold, or NaN."""
        return ~(self.p_value(scores) > 1.0 - self._tpr)

    # Health

    def diagnose(self, id_loader: Iterable[Any], ood_loader: Iterable[Any] | None = None, progress: bool = True) -> Any:
        """Whether to trust the score on this model: a `gradnorm_fast.diagnosis.Diagnosis`, whose str is the report."""
        from .diagnosis import diagnose

        outside = None if ood_loader is None else self.head_scores_loader(ood_loader, progress)
        return diagnose(self.head_scores_loader(id_loader, progress), outside)

    # Saving

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write threshold, options and the head's fingerprint as JSON; ValueError before the head is known."""
        if self._head is None or self.head_name is None:
            raise ValueError("save: the head is not known yet; score or fit first, or name it")
        state = {
            "format": _FORMAT,
            "head": self.head_name,
            "fingerprint": self._fingerprint(),
            "temperature": self.temperature,
            "reduction": self.reduction,
            "include_bias": self.include_bias,
            "tpr": self._tpr,
            "calibration": None if self._calibration is None else self._calibration.tolist(),
        }
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(state))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> GradNorm:
        """A saved detector for this model; ValueError where the file is no such thing or the head is another one."""
        try:
            state = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: expected a detector saved by GradNorm.save, got something else ({error})"
            ) from None
        if not isinstance(state, dict) or state.get("format") != _FORMAT or not state.keys() >= _KEYS:
            raise ValueError(f"{path}: expected a detector saved by GradNorm.save, format {_FORMAT}")
        options = {key: state[key] for key in ("temperature", "reduction", "include_bias")}
        detector = cls(model, state["head"], **options)
        if detector._fingerprint() != state["fingerprint"]:
            raise ValueError(
                f"{path}: it was fitted to other weights of {state['head']!r} than this model has; fit it again"
            )
        if state["calibration"] is not None:
            detector.fit_scores(torch.tensor(state["calibration"]), state["tpr"])
        return detector

    # The parts

    def _apply(self, function: Callable[..., Any], images: Tensor) -> Any:
        """fast_gradnorm or head_scores of what the head multiplies on these images."""
        images = self._placed(images)
        if not len(images):
            return function(images.new_empty(0, 1), images.new_ones(1, 1))  # nothing to find a head by
        with heads.evaluating(self.model):
            if not self._verified:
                self._verify(images)
            assert self._head is not None
            features, _ = heads.features_and_logits(self.model, self._head, images)
        weight, bias = self._weights()
        features = features.to(weight.dtype)  # under autocast the features are halves, the weight is not
        options = {"temperature": self.temperature, "reduction": self.reduction, "include_bias": self.include_bias}
        with nullcontext() if features.is_meta else torch.autocast(features.device.type, enabled=False):
            return function(features, weight, bias, **options)

    def _verify(self, images: Tensor) -> None:
        """Find the head, or refuse the one that was named, on the first batch."""
        if self._head is None:
            self.head_name, self._head = heads.find_head(self.model, images)
        else:
            heads.check_head(self.model, self.head_name or "", self._head, images)
        if self.include_bias and self._head.bias is None:
            raise ValueError(f"include_bias: expected a head with a bias, {self.head_name!r} has none")
        self._verified = True

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        weight: Tensor = self._head.weight  # type: ignore[assignment, union-attr]
        bias: Tensor | None = self._head.bias  # type: ignore[assignment, union-attr]
        return weight.detach(), None if bias is None else bias.detach()

    def _placed(self, images: Tensor) -> Tensor:
        """The images on the device and, if they are floating point, in the dtype of the model."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a torch.Tensor of shape (B, ...), got {type(images).__name__}")
        if images.dim() < 2:
            raise ValueError(f"images: expected a batch of shape (B, ...), got shape {tuple(images.shape)}")
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if parameter is None:
            return images
        return images.to(parameter.device, parameter.dtype if images.is_floating_point() else None)

    def _fitted(self) -> Tensor:
        if self._calibration is None:
            raise ValueError("the detector has no threshold yet: call fit with in-distribution images first")
        return self._calibration

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tensor in self._weights():
            if tensor is not None:
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def check_tpr(tpr: float) -> None:
    if not isinstance(tpr, int | float) or not 0.0 < tpr < 1.0:
        raise ValueError(f"tpr: expected a fraction between 0 and 1, as 0.95, got {tpr!r}")


def _batches(loader: Iterable[Any], progress: bool) -> Iterator[Tensor]:
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:  # a bar is not worth an error
            pass
        else:
            loader = tqdm(loader, desc="GradNorm", unit="batch", leave=False)
    for batch in loader:
        yield _images(batch)


def _images(batch: Any) -> Tensor:
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        for key in ("pixel_values", "image", "images"):
            if key in batch:
                return batch[key]
        raise TypeError(
            f"loader: expected batches with the key pixel_values or image, got {', '.join(map(str, batch))}"
        )
    if isinstance(batch, tuple | list) and batch:
        return batch[0]
    return batch
