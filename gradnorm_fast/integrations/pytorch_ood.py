"""GradNorm as a detector of pytorch-ood 0.4: its interface, sign and scaling. One line changes; docs/migration.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import heads
from ..functional import _check_options, gradnorm_from_logits
from ..layers import layer_gradnorms

try:
    from pytorch_ood import api  # type: ignore
except ImportError as error:
    raise ImportError("gradnorm_fast.integrations.pytorch_ood needs pytorch-ood: pip install pytorch-ood") from error

# Before 0.4, pytorch-ood had no class of its own for detectors that need gradients, and no record of each detector.
_Base: Any = getattr(api, "GradientDetector", api.Detector)


class GradNorm(_Base):
    """Drop-in for pytorch-ood's detector of that name: the same scores, those of the head from one forward pass.

    The loss is averaged over classes and the score negated: larger = more out-of-distribution. Where `param_filter`
    selects weight, bias or both of the layer that makes the logits, as in the paper, the gradient has a closed form and
    nothing is stored per sample. Any other selection goes to `gradnorm_fast.layers`. The model is scored in evaluation
    mode, whatever mode it is in, and left as it was.

    Args:
        model: a classifier that returns logits (B, C).
        param_filter: says of a parameter's name whether its gradient counts. None: every parameter's does.
        micro_batch_size: the most samples at once where the selection goes beyond the head; the head's scores need no
            such bound.
        temperature: T > 0, divides the logits.

    Raises:
        ModelNotSetException: model is None.
        TypeError, ValueError: an argument that does not fit.

    Examples:
        >>> scores = GradNorm(model, param_filter=lambda name: name == "fc.weight").predict(images)
    """

    if hasattr(api, "DetectorInfo"):
        info = api.DetectorInfo(
            paper=api.Paper(
                title="On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
                venue="NeurIPS",
                year=2021,
                url="https://arxiv.org/abs/2110.00218",
                code="https://github.com/deeplearning-wisc/gradnorm_ood",
            ),
            tasks={api.Task.CLASSIFICATION},
        )

    def __init__(
        self,
        model: nn.Module,
        param_filter: Callable[[str], bool] | None = None,
        micro_batch_size: int = 32,
        temperature: float = 1.0,
    ) -> None:
        if model is None:
            raise api.ModelNotSetException("model: expected a torch.nn.Module, got None")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if param_filter is not None and not callable(param_filter):
            raise TypeError(
                f"param_filter: expected a function of a parameter's name, got {type(param_filter).__name__}"
            )
        if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int):
            raise TypeError(f"micro_batch_size: expected an int, got {type(micro_batch_size).__name__}")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: expected at least 1, got {micro_batch_size}")
        self.model = model
        self.param_filter = param_filter or (lambda name: True)
        self.micro_batch_size = micro_batch_size
        self.temperature = _check_options(torch.empty(0), temperature, "mean", "auto")
        self._batches = 0  # scored so far: says which row of the next one is held against the head

    def fit(self, data_loader: Any = None, **kwargs: Any) -> GradNorm:
        """Nothing to fit; returns the detector."""
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores of a batch of inputs.

        Args:
            x: (B, ...), moved to the model's device.

        Returns:
            (B,) without gradient on the model's device, float32, or float64 for a float64 model.

        Raises:
            ModelNotSetException: the model has been taken away.
            TypeError: x is not a tensor.
            ValueError: `param_filter` selects no parameter.
        """
        if self.model is None:
            raise api.ModelNotSetException("model: expected a torch.nn.Module, got None")
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor of shape (B, ...), got {type(x).__name__}")
        selected = {id(p) for name, p in self.model.named_parameters() if self.param_filter(name)}
        if not selected:
            raise ValueError("param_filter: expected it to select a parameter of the model, it selects none")
        parameter = next(self.model.parameters())
        x = x.to(parameter.device)
        if len(x) == 0:
            return parameter.new_empty(0, dtype=torch.promote_types(parameter.dtype, torch.float32))
        model = heads.unwrap(self.model)
        norms = self._head_norms(model, selected, x)
        if norms is None:
            norms = torch.cat([self._layer_norms(model, selected, part) for part in x.split(self.micro_batch_size)])
        return -norms

    def _head_norms(self, model: nn.Module, selected: set[int], x: Tensor) -> Tensor | None:
        """By the closed form, if the selected parameters are weight, bias or both of the head, and no other layer's.

        None where they are not, or where that layer does not make the logits of one row of this batch: layers may have
        been replaced, and logits scaled.
        """
        owners = [
            (name, module)
            for name, module in model.named_modules()
            if any(id(p) in selected for p in module.parameters(recurse=False))
        ]
        if len(owners) != 1:
            return None
        name, head = owners[0]
        if not heads.is_linear(head) or selected - {id(head.weight), id(head.bias)}:
            return None
        try:
            with heads.evaluating(model):
                features, logits, eps = heads.head_pass(model, head, x)
            verification = heads.check_row(name, head, features, logits, self._batches % len(x), eps)
        except ValueError:  # not called, more than once, on positions or tokens, or not with the logits' shape
            return None
        self._batches += 1
        if verification is not None and verification.failed:
            return None
        dtype = torch.promote_types(logits.dtype, torch.float32)
        features, logits = features.to(dtype), logits.flatten(1).to(dtype)
        if id(head.weight) not in selected:  # the gradient of the bias is that of a weight on a feature that is 1
            features = torch.ones_like(features[:, :1])
        include_bias = {id(head.weight), id(head.bias)} <= selected
        return gradnorm_from_logits(features, logits, temperature=self.temperature, include_bias=include_bias)

    def _layer_norms(self, model: nn.Module, selected: set[int], x: Tensor) -> Tensor:
        with heads.evaluating(model):
            norms = layer_gradnorms(
                model, x, layers=lambda name, parameter: id(parameter) in selected, temperature=self.temperature
            )
        assert isinstance(norms, Tensor)
        return norms
