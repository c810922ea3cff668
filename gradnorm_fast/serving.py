"""A fitted detector as an nn.Module without hooks or modes: for torch.export, torch.compile and threads.

A process that loads an exported detector needs neither the model's code nor the gate file, but it has to import this
module first: that registers the operators and the type in the program. ``import gradnorm_fast`` alone does not.

    import gradnorm_fast.serving
    gate = torch.export.load("gate.pt2").module()
    labels, scores, is_ood = gate(images)
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from . import heads
from .capture import Inputs, call, watching
from .functional import head_scores

if TYPE_CHECKING:
    from .detector import GradNorm


class Prediction(NamedTuple):
    """What `GradNorm.predict` returns, each of shape (B,)."""

    labels: Tensor  #: int64, the model's class
    scores: Tensor  #: float32, larger = more in-distribution
    is_ood: Tensor  #: bool


# torch.export saves a program that returns a Prediction only if it knows the type by name.
_pytree._register_namedtuple(Prediction, serialized_type_name="gradnorm_fast.Prediction")


class ServedModel(nn.Module):
    """Images (B, ...), or a mapping of keyword arguments, to `Prediction(labels, scores, is_ood)`.

    The head is taken out of a copy of the model, which thus returns the features; labels and scores come from one
    product of them with the head's weight. So it costs less than the model and a score. The copy shares memory with the
    model, needs no gradients, and stays in evaluation mode. It does not verify the head in each batch: score some
    batches with the detector first. Inputs have to be on the module's device and in its dtype.

    Examples:
        >>> gate = GradNorm.load("gate.json", model).module()
        >>> program = torch.export.export(gate, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        >>> torch.export.save(program, "gate.pt2")
    """

    def __init__(self, detector: GradNorm) -> None:
        super().__init__()
        model, head = detector.model, detector._head
        assert head is not None
        if not any(module is head for module in model.modules()):
            raise ValueError(f"head: {detector.head_name!r} was replaced since the detector was fitted; fit it again")
        shared: dict[int, Any] = {}
        for parameter in model.parameters():
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        for buffer in model.buffers():
            shared[id(buffer)] = buffer.detach()
        weight, bias = detector._weights()
        removed = shared[id(head)] = _HeadRemoved(head, weight, bias)
        self.backbone: nn.Module = copy.deepcopy(model, shared)
        self._checked = False  # whether the backbone has been seen to return what the head was given
        self.weight = removed.weight if weight.dim() == 2 else nn.Parameter(weight.flatten(1), requires_grad=False)
        self.bias = removed.bias
        self.threshold = detector.threshold  # no buffer: half() would round it
        self.score_name = detector.score_name
        self.options: dict[str, Any] = {
            "temperature": detector.temperature,
            "reduction": detector.reduction,
            "include_bias": detector.include_bias,
        }
        self.eval()

    def train(self, mode: bool = True) -> ServedModel:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    def forward(self, images: Inputs) -> Prediction:
        if self._checked or torch.compiler.is_compiling():
            features = heads.logits_of(call(self.backbone, images)).flatten(1)
        else:
            features = self._checked_features(images)
        if features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"model: expected features (B, {self.weight.shape[1]}) of it without its head, got "
                f"{tuple(features.shape)}: it does more with the head's output than return it"
            )
        features = features.to(self.weight.dtype)
        if torch.is_autocast_enabled(features.device.type):
            with torch.autocast(features.device.type, enabled=False):
                return self._prediction(features)
        return self._prediction(features)

    def _checked_features(self, images: Inputs) -> Tensor:
        """The features; ValueError where the model changes the head's output, as by a clamp that logits seldom meet."""
        given: list[Tensor] = []
        places = [module for module in self.backbone.modules() if isinstance(module, _HeadRemoved)]
        with watching(places, lambda _, features, output: given.append(features)):
            features = heads.logits_of(call(self.backbone, images)).flatten(1)
        if given and len(features) and not features.is_meta:
            expected = given[0].flatten(1).to(features.dtype)
            if features.shape == expected.shape and not torch.allclose(features, expected, 0.0, 0.0, equal_nan=True):
                raise ValueError(
                    "model: it does more with the head's output than return it, so it cannot be served without its "
                    "head: leave that out of the model, or use GradNorm.predict"
                )
            self._checked = True
        return features

    def _prediction(self, features: Tensor) -> Prediction:
        scores = head_scores(features, self.weight, self.bias, **self.options)
        chosen = getattr(scores, self.score_name).float()
        return Prediction(scores.prediction, chosen, ~(chosen >= self.threshold))

    def extra_repr(self) -> str:
        return f"score={self.score_name!r}, threshold={self.threshold:.6g}"


class _HeadRemoved(nn.Module):
    """In the place of the head: returns what it is given. Models may ask it for the head's sizes, weight and bias."""

    def __init__(self, head: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        for name in ("in_features", "out_features", "in_channels", "out_channels"):
            if hasattr(head, name):
                setattr(self, name, getattr(head, name))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        return features
