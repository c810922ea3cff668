"""GradNorm as a postprocessor of OpenOOD v1.5, which need not be installed. One line changes; docs/migration.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..functional import fast_gradnorm

try:  # OpenOOD's Evaluator takes only what inherits from its own class
    from openood.postprocessors import BasePostprocessor  # type: ignore
except ImportError:
    BasePostprocessor = object

# The head of each net, and the state of the net's parameters when it was taken: get_fc() copies it from the GPU to
# NumPy, too slow for every batch. Kept here and not in the postprocessor, which OpenOOD pickles.
_heads: WeakKeyDictionary[nn.Module, tuple[object, Tensor, Tensor | None]] = WeakKeyDictionary()


class GradNormPostprocessor(BasePostprocessor):
    """Drop-in for OpenOOD's postprocessor of that name: the same scores, without its loop, on any device.

    A net has, as in OpenOOD, `get_fc()`, returning weight (C, D) and bias (C,) or None as NumPy arrays or tensors, and
    `net(data, return_feature=True)`, returning logits (B, C) and features (B, D). It is run in the mode it is in, on
    the device it is on. The loss is summed over classes, T = 1, the bias's gradient left out.

    Args:
        config: OpenOOD's, kept as `config` and otherwise not needed: GradNorm has no options there.
    """

    # What OpenOOD's evaluator asks for: there is no hyperparameter to search.
    APS_mode = False
    hyperparam_search_done = False

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def setup(self, net: nn.Module, id_loader_dict: Any = None, ood_loader_dict: Any = None) -> None:
        """Nothing: GradNorm needs no data beforehand."""

    @torch.no_grad()
    def postprocess(self, net: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """Predictions (B,) int64 and scores (B,) of one batch on the net's device; larger = more in-distribution.

        Scores are float32, or float64 where the head is. A parameter changed in place through `.data` is seen by
        the next `inference`, not here; every other change of one is seen at once.

        Raises:
            TypeError: a net without `get_fc` or whose output is not logits and features.
            ValueError: features that do not fit the head.
        """
        output = net(data, return_feature=True)
        if not (isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(t, Tensor) for t in output)):
            got = [type(t).__name__ for t in output] if isinstance(output, tuple | list) else type(output).__name__
            raise TypeError(f"net: expected (logits, features) of net(data, return_feature=True), got {got}")
        logits, features = output
        weight, bias = _head(net, features.device)
        return logits.argmax(dim=1), fast_gradnorm(features.to(weight.dtype), weight, bias, reduction="sum")

    def inference(
        self, net: nn.Module, data_loader: Iterable[Mapping[str, Any]], progress: bool = True
    ) -> tuple[npt.NDArray[np.int_], npt.NDArray[Any], npt.NDArray[np.int_]]:
        """Score all batches of a loader, dictionaries with the keys "data" and "label".

        Args:
            net: as above.
            data_loader: its batches are moved to the net's device.
            progress: show a bar, where tqdm is installed, in the main process.

        Returns:
            Predictions, scores and labels as NumPy arrays (N,) in the loader's order.

        Raises:
            TypeError, ValueError: as `postprocess`; a loader without batches.
        """
        _heads.pop(net, None)  # once per loader it costs nothing, and catches weights changed through .data
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        batches = []
        for batch in _with_bar(data_loader, progress):
            pred, conf = self.postprocess(net, batch["data"].to(device))
            batches.append((pred.cpu(), conf.cpu(), batch["label"].cpu()))
        if not batches:
            raise ValueError("data_loader: expected at least one batch, got none")
        preds, confs, labels = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
        return preds.astype(int), confs, labels.astype(int)


def _head(net: nn.Module, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the net's head on the device, taken anew only when a parameter has changed."""
    state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in net.parameters()]
    known = _heads.get(net)
    if known is not None and known[0] == state:
        return known[1], known[2]
    if not hasattr(net, "get_fc"):
        raise TypeError(f"net: expected OpenOOD's get_fc() on it, {type(net).__name__} has none")
    try:
        weight, bias = net.get_fc()  # type: ignore[operator]
    except AttributeError:
        # The get_fc of OpenOOD's networks stumbles over a head without a bias; most also give the layer itself.
        if not hasattr(net, "get_fc_layer"):
            raise
        weight, bias = net.get_fc_layer().weight, net.get_fc_layer().bias  # type: ignore[operator]
    weight = torch.as_tensor(weight).detach().to(device)
    bias = None if bias is None else torch.as_tensor(bias).detach().to(weight)
    _heads[net] = state, weight, bias
    return weight, bias


def _with_bar(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not progress or (distributed and torch.distributed.get_rank() != 0):
        return loader
    try:
        from tqdm.auto import tqdm
    except ImportError:  # a bar is not worth an error
        return loader
    return tqdm(loader)
