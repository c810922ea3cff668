"""GradNorm as a postprocessor of OpenOOD v1.5, which need not be installed. One line changes; docs/migration.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .._progress import with_bar
from ..functional import fast_gradnorm

try:  # OpenOOD's Evaluator takes only what inherits from its own class
    from openood.postprocessors import BasePostprocessor  # type: ignore
except ImportError:
    BasePostprocessor = object


class GradNormPostprocessor(BasePostprocessor):
    """Drop-in for OpenOOD's postprocessor of that name: the same scores, without its loop, on any device.

    A net has, as in OpenOOD, `get_fc()`, returning weight (C, D) and bias (C,) or None as NumPy arrays or tensors, and
    `net(data, return_feature=True)`, returning logits (B, C) and features (B, D). Where `get_fc()` cannot do it, as for
    a bfloat16 head or one without a bias, `get_fc_layer()` is asked. The net is run in the mode and on the device it is
    in. The loss is summed over classes, T = 1, the bias's gradient left out.

    Args:
        config: OpenOOD's, needed for `args` and `num_classes` only: GradNorm has no options there.

    Attributes:
        config: as given.
        args: `config.postprocessor.postprocessor_args`, None without a config.
        num_classes: of the data set that the config names, None where it names none that is known.

    Examples:
        >>> features, weight = torch.rand(4, 8), torch.randn(5, 8)
        >>> GradNormPostprocessor().gradnorm(features, weight).shape  # as OpenOOD's evaluator calls it
        (4,)
    """

    # What OpenOOD's evaluator asks for: there is no hyperparameter to search.
    APS_mode = False
    hyperparam_search_done = False

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.args = getattr(getattr(config, "postprocessor", None), "postprocessor_args", None)
        self.num_classes = _num_classes(getattr(config, "dataset", None))

    def setup(self, net: nn.Module, id_loader_dict: Any = None, ood_loader_dict: Any = None) -> None:
        """Nothing: GradNorm needs no data beforehand."""

    @torch.no_grad()
    def gradnorm(self, x: Any, w: Any, b: Any = None) -> npt.NDArray[Any]:
        """Scores of features under a head, larger = more in-distribution. `postprocess` calls this.

        Args:
            x: features (B, D), a tensor on any device or a NumPy array.
            w, b: the head's weight (C, D) and bias (C,) or None, tensors or NumPy arrays.

        Returns:
            (B,), float32, or float64 where the head is.

        Raises:
            ValueError: features that do not fit the head.
        """
        x = torch.as_tensor(x)
        w = torch.as_tensor(w).to(x.device)
        b = None if b is None else torch.as_tensor(b).to(w)
        scores: npt.NDArray[Any] = fast_gradnorm(x.to(w.dtype), w, b, reduction="sum").cpu().numpy()
        return scores

    @torch.no_grad()
    def postprocess(self, net: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """Predictions (B,) int64 on the net's device and scores (B,) on the CPU, as OpenOOD's own, of one batch.

        The head is fetched again when a parameter or buffer of the net has changed. A change that leaves no trace, in
        place through `.data`, is seen by the next `inference`.

        Raises:
            TypeError: a net without `get_fc` and `get_fc_layer`, or whose output is not logits and features.
            ValueError: features that do not fit the head.
        """
        output = net(data, return_feature=True)
        if not (isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(t, Tensor) for t in output)):
            got = [type(t).__name__ for t in output] if isinstance(output, tuple | list) else type(output).__name__
            raise TypeError(f"net: expected (logits, features) of net(data, return_feature=True), got {got}")
        logits, features = output
        return logits.argmax(dim=1), torch.from_numpy(self.gradnorm(features, *_head(net, features.device)))

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
            if not isinstance(batch, Mapping) or not {"data", "label"} <= batch.keys():
                got = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
                raise TypeError(f'data_loader: expected dictionaries with the keys "data" and "label", got {got}')
            pred, conf = self.postprocess(net, batch["data"].to(device))
            batches.append((pred.cpu(), conf.cpu(), batch["label"].cpu()))
        if not batches:
            raise ValueError("data_loader: expected at least one batch, got none")
        preds, confs, labels = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
        return preds.astype(int), confs, labels.astype(int)


def register() -> None:
    """Put this class in place of OpenOOD's own under the name "gradnorm", wherever OpenOOD looks it up.

    There are two registries: one of `main.py` and the shell scripts, one of `Evaluator` and `scripts/eval_ood.py`.
    Call it at the top of the script that is run, so that worker processes call it too.

    Raises:
        ImportError: OpenOOD is not installed.
        RuntimeError: an OpenOOD whose registries are not those of v1.5.

    Examples:
        >>> register()  # doctest: +SKIP
    """
    import openood.postprocessors as postprocessors  # type: ignore
    from openood.postprocessors import utils

    if not hasattr(utils, "get_postprocessor") or not hasattr(utils, "GradNormPostprocessor"):
        raise RuntimeError("openood.postprocessors.utils: expected the get_postprocessor of OpenOOD v1.5, found none")
    # get_postprocessor looks the class up among its module's names at every call.
    utils.GradNormPostprocessor = postprocessors.GradNormPostprocessor = GradNormPostprocessor
    try:
        from openood.evaluation_api import postprocessor as api  # type: ignore
    except ImportError:  # it needs packages that main.py does not; without them there is no Evaluator to serve
        return
    api.postprocessors["gradnorm"] = api.GradNormPostprocessor = GradNormPostprocessor


def _num_classes(dataset: Any) -> int | None:
    try:
        from openood.postprocessors.info import num_classes_dict  # type: ignore
    except ImportError:
        num_classes_dict = {}
    name = getattr(dataset, "name", None)
    known: int | None = num_classes_dict.get(name, getattr(dataset, "num_classes", None))
    return known


class _Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    made_of: list[tuple[Tensor, int]]  #: the net's tensors, held so that no other takes their memory, and versions

    def is_current(self, tensors: list[Tensor], device: torch.device) -> bool:
        return (
            self.weight.device == device
            and len(tensors) == len(self.made_of)
            and not any(t.is_inference() for t in tensors)  # such a tensor tells nobody that it has changed
            and all(
                t.data_ptr() == then.data_ptr() and t._version == version
                for t, (then, version) in zip(tensors, self.made_of, strict=True)
            )
        )


# Of each net: get_fc() copies the head from the GPU to NumPy, too slow for every batch. Kept here and not in the
# postprocessor, which OpenOOD pickles.
_heads: WeakKeyDictionary[nn.Module, _Head] = WeakKeyDictionary()


def _head(net: nn.Module, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the net's head on the device, fetched again only when a parameter or buffer has changed."""
    tensors = [*net.parameters(), *net.buffers()]
    known = _heads.get(net)
    if known is None or not known.is_current(tensors, device):
        made_of = [(t.detach(), 0 if t.is_inference() else t._version) for t in tensors]
        weight, bias = _fetch_head(net)
        weight = torch.as_tensor(weight).detach().to(device)
        bias = None if bias is None else torch.as_tensor(bias).detach().to(weight)
        known = _heads[net] = _Head(weight, bias, made_of)
    return known.weight, known.bias


def _fetch_head(net: nn.Module) -> tuple[Any, Any]:
    if hasattr(net, "get_fc"):
        try:
            weight, bias = net.get_fc()  # type: ignore[operator]
            return weight, bias
        except (AttributeError, TypeError):
            # The get_fc of OpenOOD's networks stumbles over a head without a bias (AttributeError) and over bfloat16,
            # which NumPy does not know (TypeError); most also give the layer itself.
            if not hasattr(net, "get_fc_layer"):
                raise
    if not hasattr(net, "get_fc_layer"):
        raise TypeError(f"net: expected OpenOOD's get_fc() on it, {type(net).__name__} has none")
    layer = net.get_fc_layer()  # type: ignore[operator]
    return layer.weight, layer.bias


def _with_bar(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not progress or (distributed and torch.distributed.get_rank() != 0):
        return loader
    return with_bar(loader)
