"""GradNorm for a model and images: scores, a threshold with a guarantee, and a warning where not to trust them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import gate, heads
from ._autocast import autocast_in_force, without_autocast
from .batches import batches
from .capture import Inputs
from .functional import HeadScores, _check_options, fast_gradnorm, head_scores
from .layers.scores import layer_scores
from .layers.selection import Layers, check_layers
from .serving import Prediction, ServedModel
from .verification import Verdicts


class GradNorm:
    """Scores a classifier's images by GradNorm, one forward pass, no backward.

    The model is left as it was: mode, gradients, hooks, device and dtype. It is scored in evaluation mode, on the
    device and in the dtype it has; DataParallel, DistributedDataParallel and torch.compile wrappers are looked through.
    Threads may share a detector, and a model, but not train the model meanwhile.

    The closed form holds if the head makes the model's logits. One row of every batch, a different one each time, is
    held against x·Wᵀ + b, to within rounding (derived in `gradnorm_fast.verification`): relative to |x|·|W|ᵀ + |b|,
    1e-5 in float32, 2e-3 in float16 and TF32, 1.6e-2 in bfloat16. Smaller changes of the logits pass. On a CPU a batch
    that fails raises ValueError at once. On a GPU nothing waits for the outcome: the scores of that batch are NaN, its
    images OOD, and the ValueError comes with the next call of this detector, from `fit` and the `_loader` methods
    before they return, or from `raise_refusals`.

    Args:
        model: a classifier; its output is logits (B, C), or an object with `.logits`.
        head: the last linear layer (or 1x1 convolution on pooled features), by name or as the module. None: found on
            the first batch, as the one whose output is the model's.
        layers: in place of the head, the layers whose parameters' gradients GradNorm is the norm of, as in
            `layer_gradnorms`: "all", "head", a list of module names or a predicate; biases count. It takes a backward
            pass, and works where no linear layer makes the logits. The other scores are those of the logits, and
            feature_norm is gradnorm/output_norm. None: the weight of the head, in closed form.
        score: which score of the pass `score`, `fit` and `predict` take: "gradnorm", "msp", "energy", "max_logit",
            "feature_norm" or "output_norm", the fields of `HeadScores`.
        temperature, reduction, include_bias: as in `fast_gradnorm`.
        preprocessing: the transform of the images, or words for it, to be saved with the threshold. None: unknown.

    Raises:
        TypeError, ValueError: an argument that does not fit; on a batch, a head that does not make the logits, or whose
            weight another layer uses too.

    Examples:
        >>> detector = GradNorm(model).fit(id_loader, tpr=0.95)
        >>> labels, scores, is_ood = detector.predict(images)
        >>> energy = detector.head_scores(images).energy  # a baseline, from the same pass
        >>> report = str(detector.diagnose(id_loader, ood_loader))
        >>> detector.save("gate.json")
        >>> torch.equal(GradNorm.load("gate.json", model).score(images), scores)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | nn.Module | None = None,
        *,
        layers: Layers | None = None,
        score: str = "gradnorm",
        temperature: float = 1.0,
        reduction: str = "mean",
        include_bias: bool = False,
        preprocessing: object = None,
    ) -> None:
        self.model = heads.unwrap(model)
        if not isinstance(score, str) or score not in gate.SCORES:
            raise ValueError(f"score: expected one of {', '.join(gate.SCORES)}, got {score!r}")
        if layers is not None and head is not None:
            raise ValueError(f"head: expected None where layers are given, got {head!r}")
        if layers is not None and include_bias:
            raise ValueError("include_bias: expected False where layers are given: their biases count")
        self.layers = None if layers is None else check_layers(self.model, layers)
        self.score_name = score
        self.temperature = _check_options(torch.empty(0), temperature, reduction, "auto", include_bias)
        self.reduction, self.include_bias = reduction, bool(include_bias)
        self.preprocessing = gate.describe_preprocessing(preprocessing)
        self.head_name: str | None = None
        self._head: nn.Module | None = None
        self._verified = False
        self._batches = 0  # scored so far: says which row of the next one is verified
        self._verdicts = Verdicts()
        if head is not None:
            self.head_name, self._head = heads.module_named(self.model, head)
        self._calibration: Tensor | None = None  # sorted scores of in-distribution images
        self._fitted_to: dict[str, dict[str, Any]] | None = None  # the model's tensors at that time
        self._autocast: str | None = None  # in force when the calibration was scored; None: unknown
        self._tpr = 0.95

    def __repr__(self) -> str:
        scored = "head found on the first batch"
        if self.layers is not None:
            scored = f"layers {getattr(self.layers, '__name__', repr(self.layers))}"
        elif self._head is not None:
            weight: Any = self._head.weight
            shape = "" if nn.parameter.is_lazy(weight) else f" {tuple(weight.shape[:2])}"
            scored = f"head {self.head_name!r}{shape}"
        options = f"temperature={self.temperature:g}, reduction={self.reduction!r}"
        if self.layers is None:
            options += f", include_bias={self.include_bias}"
        fitted = "not fitted"
        if self._calibration is not None:
            fitted = f"threshold {self.threshold:.6g} from {len(self._calibration)} images at tpr {self._tpr:g}"
        return (
            f"GradNorm({type(self.model).__name__}, {scored}, score={self.score_name!r}, {options}; {fitted}; "
            f"preprocessing {self.preprocessing or 'unknown'})"
        )

    # Scores

    def score(self, images: Inputs) -> Tensor:
        """The score of images (B, ...): (B,) float32 on the model's device, larger = more in-distribution.

        A mapping, as a tokenizer returns, is passed to the model as keyword arguments.
        """
        if self.score_name == "gradnorm" and self.layers is None:
            return self._apply(fast_gradnorm, images).float()
        return self._chosen(self.head_scores(images))

    def head_scores(self, images: Inputs) -> HeadScores:
        """GradNorm, its factors and the usual baselines of images (B, ...), from the same pass; each (B,)."""
        if self.layers is None:
            return self._apply(head_scores, images)
        inputs, first = self._placed(images)
        if not len(first):
            return self._apply(head_scores, images)
        with heads.evaluating(self.model), heads.explained(inputs, RuntimeError):
            return layer_scores(self.model, inputs, self.layers, self.temperature, self.reduction)

    def score_loader(self, loader: Iterable[Any], progress: bool = True, numpy: bool = False) -> Any:
        """The score of all images of a loader, in its order: (N,) float32 on the CPU, a tensor or a NumPy array.

        Batches are images, or tuples with the images first, or dictionaries with the images under "pixel_values",
        "image", "images" or "data", or with "input_ids": then all tensors but labels are the model's keyword arguments.
        A torch Dataset is taken in batches of 64. Warns of scores that are NaN.
        """
        scores = self._scores_of(loader, progress)
        _warn_of_nan(scores)
        return scores.numpy() if numpy else scores

    def head_scores_loader(self, loader: Iterable[Any], progress: bool = True) -> HeadScores:
        """`head_scores` of all images of a loader, in its order, on the CPU."""
        parts = [HeadScores(*(s.cpu() for s in self.head_scores(inputs))) for inputs in batches(loader, progress)]
        self.raise_refusals()
        if not parts:
            raise ValueError("loader: expected at least one batch, got none")
        scores = HeadScores(*(torch.cat(field) for field in zip(*parts, strict=True)))
        _warn_of_nan(scores.gradnorm)
        return scores

    def raise_refusals(self) -> None:
        """Raise the ValueError of a batch scored before in which the head did not make the logits, if one is known.

        All methods that score do so first. After the last batch on a GPU, call it once the scores are on the CPU.
        """
        self._verdicts.raise_refusals()

    # Threshold

    def fit(self, id_loader: Iterable[Any], tpr: float = 0.95, progress: bool = True) -> GradNorm:
        """Set the threshold from in-distribution images that the model was not trained on, loaded as in `score_loader`.

        A further in-distribution image, drawn alike, is then accepted with probability at least `tpr`, on average over
        draws of these images (split conformal prediction); one fitted detector may accept somewhat less.

        Raises:
            ValueError: tpr not in (0, 1); no images; a score that is not finite.
        """
        check_tpr(tpr)
        return self.fit_scores(self._scores_of(id_loader, progress), tpr, autocast=self._autocast_now())

    def fit_scores(
        self, scores: Tensor | np.ndarray[Any, Any] | Sequence[float], tpr: float = 0.95, *, autocast: str | None = None
    ) -> GradNorm:
        """`fit` from scores (N,) of the chosen kind that are there already.

        Args:
            autocast: the dtype of torch.autocast in the pass that made them, as "bfloat16", or "off"; saved with the
                threshold. None: unknown.

        Raises:
            TypeError: no numbers. ValueError: tpr not in (0, 1); another shape; a score that is not finite.
        """
        check_tpr(tpr)
        gate.check_autocast(autocast)
        scores = _as_scores(scores).cpu()
        if scores.dim() != 1:
            raise ValueError(f"scores: expected shape (N,), one per image, got {tuple(scores.shape)}")
        bad = int((~scores.isfinite()).sum())
        if len(scores) == 0 or bad:
            raise ValueError(
                f"scores: expected finite scores of at least one image, got {len(scores)} images, {bad} not finite"
                + ("; are the model's weights and the preprocessing finite?" if bad else "")
            )
        try:
            self._fitted_to = gate.describe_tensors(self.model)
        except ValueError:  # the model has no values yet: the scores are not its own
            self._fitted_to = None
        self._calibration, self._tpr, self._autocast = scores.sort().values, float(tpr), autocast
        return self

    @property
    def tpr(self) -> float:
        """The share of in-distribution images to accept, in the sense of `fit`; may be set after `fit` or `load`."""
        return self._tpr

    @tpr.setter
    def tpr(self, tpr: float) -> None:
        check_tpr(tpr)
        self._tpr = float(tpr)

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

    def p_value(self, scores: Tensor | np.ndarray[Any, Any] | Sequence[float] | float) -> Tensor:
        """(1 + #{calibration scores <= s})/(n + 1) of each score, float64: small where the image is unusual.

        NaN for NaN. TypeError for what are no numbers.
        """
        calibration = self._fitted()
        s = _as_scores(scores)
        below = torch.searchsorted(calibration.to(s.device), s, right=True)
        return torch.where(s.isnan(), torch.nan, (1.0 + below.double()) / (len(calibration) + 1))

    def predict(self, images: Inputs) -> Prediction:
        """The model's class, the score, and whether the image is OOD: exactly where p_value(score) <= 1 − tpr.

        A NaN score is OOD.
        """
        self._fitted()
        self._warn_of_autocast()
        all_scores = self.head_scores(images)
        scores = self._chosen(all_scores)
        return Prediction(all_scores.prediction, scores, self.is_ood(scores))

    def is_ood(self, scores: Tensor | np.ndarray[Any, Any] | Sequence[float] | float) -> Tensor:
        """Whether each score is below the threshold, or NaN."""
        return ~(self.p_value(scores) > 1.0 - self._tpr)

    # Health

    def diagnose(self, id_loader: Iterable[Any], ood_loader: Iterable[Any] | None = None, progress: bool = True) -> Any:
        """Whether to trust GradNorm on this model, and, given OOD images, which score to take in its place.

        It warns if feature_norm and output_norm are anti-correlated on the ID images (rank correlation below −0.3), if
        their product hardly differs (interquartile range below 1 % of the median), and, given OOD images, if GradNorm
        is larger on them (AUROC below 0.5) or another score has a larger AUROC by more than 0.01.

        Returns a `gradnorm_fast.diagnosis.Diagnosis`, whose str is the report. Its `best` goes into `GradNorm(score=)`.
        """
        from .diagnosis import diagnose

        outside = None if ood_loader is None else self.head_scores_loader(ood_loader, progress)
        return diagnose(self.head_scores_loader(id_loader, progress), outside)

    # Saving and serving

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a gate as JSON: threshold, options, preprocessing, and digests of the model's parameters and buffers.

        ValueError before the head is known; where the model has changed since `fit`; and for layers given as a
        predicate, which a file cannot hold.
        """
        if callable(self.layers):
            raise ValueError("save: a file cannot hold the predicate that layers is; give the names of modules")
        if self.layers is None and self.head_name is None:
            raise ValueError("save: the head is not known yet; score or fit first, or name it")
        if self._fitted_to is not None:
            changed, _ = gate.differences(self._fitted_to, self.model)
            if changed:
                raise ValueError(
                    f"save: the model has changed since fit, {len(changed)} of {len(self._fitted_to)} tensors differ: "
                    f"{gate.at_most(changed)}; fit again"
                )
        options = {name: getattr(self, name) for name in ("temperature", "reduction", "include_bias")}
        options["score"] = self.score_name
        calibration = None if self._calibration is None else self._calibration.tolist()
        tensors = gate.describe_tensors(self.model)
        saved = gate.Gate(
            self.head_name,
            options,
            self._tpr,
            calibration,
            self.preprocessing,
            tensors,
            layers=self.layers,
            autocast=self._autocast,
        )
        gate.write(saved, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        preprocessing: object = None,
        autocast: str | None = None,
        force: bool = False,
    ) -> GradNorm:
        """A saved detector for this model.

        The model has to be the one it was fitted to: parameters and floating point buffers are compared by name. In
        another dtype they are compared after rounding, with a warning. What has no tensors, as a changed forward,
        cannot be seen.

        Args:
            path: what `save` wrote. Files of version 0.1 (format 1) know only the head: they load with a warning.
            model: on any device.
            preprocessing: as in `GradNorm`; compared with the saved one, with a warning where that is unknown.
            autocast: the dtype of torch.autocast in which images will be scored, as "bfloat16", or "off"; compared
                likewise. Left out, `predict` warns of another one than that of `fit`.
            force: load in spite of differences, with a warning that names them.

        Raises:
            ValueError: the file is no such thing, with the key at fault; or the model or the preprocessing is another,
                with what differs.
            OSError: the file cannot be read.
        """
        gate.check_autocast(autocast)
        saved = gate.read(path)
        given = gate.describe_preprocessing(preprocessing)
        try:
            described = given or saved.preprocessing
            detector = cls(model, saved.head, layers=saved.layers, preprocessing=described, **saved.options)
            if saved.head is not None and detector._head is not None:
                heads.check_tied(detector.model, saved.head, detector._head, saved.options["include_bias"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        wrong, rounded = list[str](), list[str]()
        if given is not None and saved.preprocessing is not None and given != saved.preprocessing:
            wrong.append(f"the preprocessing was {saved.preprocessing}, it is {given}")
        if None not in (autocast, saved.autocast) and autocast != saved.autocast:
            wrong.append(f"autocast was {saved.autocast}, it is {autocast}")
        if saved.tensors is None:
            unknown = "knows the head alone: neither the rest of the model nor the preprocessing was compared"
            warnings.warn(
                f"{path}: a file of format 1, which {unknown}. Fit and save it again"
                if saved.version == 1
                else f"{path}: fitted to features, it {unknown}",
                stacklevel=2,
            )
            if detector._fingerprint() != saved.head_digest:
                wrong.append(f"the model has other weights of {saved.head!r}")
        else:
            try:
                different, rounded = gate.differences(saved.tensors, detector.model)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            if different:
                wrong.append(f"{len(different)} of {len(saved.tensors)} tensors differ: {gate.at_most(different)}")
        if given is not None and saved.preprocessing is None and saved.tensors is not None:
            warnings.warn(f"{path}: the preprocessing of its images is unknown and was not compared", stacklevel=2)
        if wrong and not force:
            raise ValueError(
                f"{path}: this gate does not match: {'; '.join(wrong)}. Fit it again, or load with force=True"
            )
        if wrong:
            warnings.warn(f"{path}: loaded by force, does not match: {'; '.join(wrong)}", stacklevel=2)
        if rounded:
            warnings.warn(
                f"{path}: the model has another dtype than the one it was fitted to. {len(rounded)} tensors are "
                f"equal after rounding ({gate.at_most(rounded)}); scores near the threshold may cross it",
                stacklevel=2,
            )
        if saved.calibration is not None:
            detector.fit_scores(torch.tensor(saved.calibration), saved.tpr, autocast=saved.autocast)
        detector._tpr = saved.tpr
        return detector

    def module(self) -> nn.Module:
        """The fitted detector as an nn.Module, images (B, ...) -> Prediction, for torch.export, torch.compile, threads.

        It shares the model's memory and has the threshold of now: a `gradnorm_fast.serving.ServedModel`.

        Raises:
            ValueError: before `fit` and `load`; with layers, whose gradients need a backward pass.
        """
        self._fitted()
        if self.layers is not None:
            raise ValueError("module: gradients of layers need a backward pass; call predict of the detector instead")
        if self._head is None:
            raise ValueError("module: the head is not known yet; score or fit first, or name it")
        return ServedModel(self)

    # The parts

    def _scores_of(self, loader: Iterable[Any], progress: bool) -> Tensor:
        parts = [self.score(inputs).cpu() for inputs in batches(loader, progress)]
        self.raise_refusals()
        return torch.cat(parts) if parts else torch.empty(0)

    def _apply(self, function: Callable[..., Any], images: Inputs) -> Any:
        """fast_gradnorm or head_scores of what the head multiplies on these images."""
        self.raise_refusals()
        inputs, first = self._placed(images)
        if not len(first):
            return function(first.new_empty(0, 1, dtype=torch.float32), first.new_ones(1, 1, dtype=torch.float32))
        with heads.evaluating(self.model):
            if not self._verified:
                self._find(inputs)
            assert self._head is not None and self.head_name is not None
            features, logits, eps = heads.head_pass(self.model, self._head, inputs)
            row = self._batches % len(features)
            self._batches += 1
            verification = heads.check_row(self.head_name, self._head, features, logits, row, eps)
            weight, bias = self._weights()
        features = features.to(weight.dtype)  # under autocast the features are halves, the weight is not
        options = {"temperature": self.temperature, "reduction": self.reduction, "include_bias": self.include_bias}
        with without_autocast(features.device):
            bias = self._verdicts.add(verification, bias, weight)
            return function(features, weight, bias, **options)

    def _chosen(self, scores: HeadScores) -> Tensor:
        chosen: Tensor = getattr(scores, self.score_name)
        return chosen.float()

    def _find(self, images: Inputs) -> None:
        """Find the head, or refuse the one that was named, on the first batch."""
        name, head = self.head_name, self._head
        if head is None or name is None:
            name, head = heads.find_head(self.model, images)
        else:
            heads.check_head(self.model, name, head, images)
        if self.include_bias and head.bias is None:
            raise ValueError(f"include_bias: expected a head with a bias, {name!r} has none")
        heads.check_tied(self.model, name, head, self.include_bias)
        self.head_name, self._head, self._verified = name, head, True

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        weight: Tensor = self._head.weight  # type: ignore[assignment, union-attr]
        bias: Tensor | None = self._head.bias  # type: ignore[assignment, union-attr]
        return weight.detach(), None if bias is None else bias.detach()

    def _autocast_now(self) -> str:
        return autocast_in_force(next((p.device for p in self.model.parameters()), torch.device("cpu")))

    def _warn_of_autocast(self) -> None:
        now = self._autocast_now()
        if self._autocast not in (None, now):
            warnings.warn(
                f"the detector was fitted with autocast {self._autocast}, it predicts with autocast {now}: scores near "
                "the threshold may cross it",
                stacklevel=3,
            )

    def _placed(self, images: Any) -> tuple[Inputs, Tensor]:
        """The inputs on the device and, if they are floating point, in the dtype of the model; the first of them."""
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)

        def placed(t: Tensor) -> Tensor:
            if parameter is None:
                return t
            return t.to(parameter.device, parameter.dtype if t.is_floating_point() else None)

        if isinstance(images, Mapping):
            wrong = [f"{k}: {type(t).__name__}" for k, t in images.items() if not isinstance(t, Tensor) or t.dim() == 0]
            if wrong or not images:
                got = ", ".join(wrong) or "an empty one"
                raise TypeError(f"images: expected a mapping to tensors (B, ...), got {got}")
            keywords = {name: placed(t) for name, t in images.items()}
            return keywords, next(iter(keywords.values()))
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a torch.Tensor of shape (B, ...), got {type(images).__name__}")
        if images.dim() < 2 or images.is_complex() or images.layout != torch.strided:
            got = f"{images.dtype} of shape {tuple(images.shape)}"
            got += "" if images.layout == torch.strided else f", {images.layout}"
            raise ValueError(f"images: expected a batch of shape (B, ...), dense and real, got {got}")
        images = placed(images)
        return images, images

    def _fitted(self) -> Tensor:
        if self._calibration is None:
            raise ValueError("the detector has no threshold yet: call fit with in-distribution images first")
        return self._calibration

    def _fingerprint(self) -> str:
        return gate.head_digest(*self._weights())


def check_tpr(tpr: float) -> None:
    if isinstance(tpr, bool) or not isinstance(tpr, Real) or not 0.0 < tpr < 1.0:
        raise ValueError(f"tpr: expected a fraction between 0 and 1, as 0.95, got {tpr!r}")


def _as_scores(scores: Any) -> Tensor:
    """As float32, on the device they are on; TypeError where they are no real numbers."""
    expected = "scores: expected real numbers, a tensor, an array or a list,"
    if isinstance(scores, tuple) and hasattr(scores, "_fields"):
        raise TypeError(f"{expected} got {type(scores).__name__}; give one of its fields, {', '.join(scores._fields)}")
    if not isinstance(scores, Tensor):
        try:
            array = np.asarray(scores)
        except Exception:  # lists of uneven length, tensors on a GPU among them
            raise TypeError(f"{expected} got a {type(scores).__name__} of something else") from None
        if array.dtype.kind not in "iuf":
            of = "" if array.dtype == object else f" of {array.dtype}"
            raise TypeError(f"{expected} got {type(scores).__name__}{of}")
        scores = torch.from_numpy(np.ascontiguousarray(array.astype(np.float32)).reshape(array.shape))
    if scores.is_complex() or scores.is_quantized or scores.dtype == torch.bool or scores.is_meta:
        got = "a tensor without values, on meta" if scores.is_meta else f"a tensor of {scores.dtype}"
        raise TypeError(f"{expected} got {got}")
    if scores.layout != torch.strided:
        raise TypeError(f"{expected} got a tensor of layout {scores.layout}")
    return scores.detach().float().contiguous()


def _warn_of_nan(scores: Tensor) -> None:
    bad = int(scores.isnan().sum())
    if bad:
        warnings.warn(
            f"{bad} of {len(scores)} scores are NaN: images, preprocessing or weights are not finite, "
            "or overflow in the model's dtype",
            stacklevel=3,
        )
