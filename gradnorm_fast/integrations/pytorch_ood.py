"""GradNorm as a detector of pytorch-ood: its interface, sign and scaling. One line changes; docs/migration.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import heads
from ..functional import _check_options, fast_gradnorm

try:
    from pytorch_ood.api import Detector, ModelNotSetException  # type: ignore
except ImportError as error:
    raise ImportError("gradnorm_fast.integrations.pytorch_ood needs pytorch-ood: pip install pytorch-ood") from error


class GradNorm(Detector):
    """The scores of pytorch-ood's own GradNorm with `param_filter` on the head's parameters, from one forward pass.

    The loss is averaged over classes and the score negated: larger = more out-of-distribution. The model is scored in
    evaluation mode, whatever mode it is in, and left as it was.

    Args:
        model: a classifier that returns logits (B, C).
        head: the last linear layer (or 1x1 convolution after pooling), by name or as the module. None: found on the
            first batch, as the last one whose output is the model's.
        temperature: T > 0, divides the logits.
        include_bias: count the gradient of the head's bias, if it has one, as a filter like
            `lambda name: name.startswith("fc.")` does. False is `lambda name: name == "fc.weight"`, the paper's score.

    Raises:
        ModelNotSetException: model is None.
        TypeError, ValueError: an argument that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | nn.Module | None = None,
        *,
        temperature: float = 1.0,
        include_bias: bool = True,
    ) -> None:
        if model is None:
            raise ModelNotSetException("model: expected a torch.nn.Module, got None")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = heads.unwrap(model)
        self.temperature = _check_options(torch.empty(0), temperature, "mean", "auto")
        self.include_bias = include_bias
        self.head: Any = None
        self._name = ""
        self._verified = False
        if head is not None:
            self._name, self.head = heads.module_named(self.model, head)

    def fit(self, data_loader: Any = None, **kwargs: Any) -> GradNorm:
        """Nothing to fit; returns the detector."""
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores of a batch of inputs.

        Args:
            x: (B, ...), moved to the model's device.

        Returns:
            (B,) without gradient on the model's device, float32, or float64 for a float64 head.

        Raises:
            ValueError: no head found, or the named one does not make the logits; both on the first batch.
        """
        x = x.to(self.device)
        if len(x) == 0:  # nothing to know the head by
            return torch.empty(0, device=x.device)
        with heads.evaluating(self.model):
            if not self._verified and self.head is None:
                self._name, self.head = heads.find_head(self.model, x)
            elif not self._verified:
                heads.check_head(self.model, self._name, self.head, x)
            self._verified = True
            features, _ = heads.features_and_logits(self.model, self.head, x)
        return self.predict_features(features)

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores of features (B, D), what the head multiplies; returns what `predict` does.

        Raises:
            ValueError: the head is not known yet, or does not fit x.
        """
        if self.head is None:
            raise ValueError("head: expected its name or module where features come before the first predict, got None")
        weight, bias = self.head.weight, self.head.bias
        include_bias = self.include_bias and bias is not None
        return -fast_gradnorm(x.to(weight), weight, bias, temperature=self.temperature, include_bias=include_bias)
