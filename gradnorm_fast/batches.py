"""From what loaders yield to what models take: images, or keyword arguments such as input_ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ._progress import with_bar
from .capture import Inputs

_IMAGE_KEYS = ("pixel_values", "image", "images", "data")  #: Hugging Face, timm, OpenOOD
_NOT_INPUTS = ("label", "labels", "idx", "index", "ids")
_BATCH_SIZE = 64  #: for a dataset in place of a loader


def batches(loader: Iterable[Any], progress: bool) -> Iterator[Inputs]:
    """The inputs in each batch of a loader, or of a dataset, which is loaded in batches of 64."""
    if isinstance(loader, Tensor):
        raise TypeError(f"loader: expected batches, got a tensor {tuple(loader.shape)}; give tensor.split(64)")
    if hasattr(loader, "__array__"):
        raise TypeError(
            f"loader: expected an iterable of batches, as a DataLoader, got a NumPy {type(loader).__name__}"
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(f"loader: expected an iterable of batches, as a DataLoader, got {type(loader).__name__}")
    if isinstance(loader, Mapping | str):
        raise TypeError(f"loader: expected an iterable of batches, got one {type(loader).__name__}; give [batch]")
    if isinstance(loader, torch.utils.data.Dataset) and not isinstance(loader, torch.utils.data.IterableDataset):
        loader = torch.utils.data.DataLoader(loader, _BATCH_SIZE, collate_fn=_collate)
    for batch in with_bar(loader) if progress else loader:
        yield inputs_of(batch)


def inputs_of(batch: Any) -> Inputs:
    """The images of a batch, or the keyword arguments that a text model takes; TypeError where there are neither."""
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        for key in _IMAGE_KEYS:
            if key in batch:
                return batch[key]
        if "input_ids" in batch:
            return {k: batch[k] for k in batch if isinstance(batch[k], Tensor) and k not in _NOT_INPUTS}
        raise TypeError(
            f"loader: expected batches with one of the keys {', '.join(_IMAGE_KEYS)} or input_ids, got "
            f"{', '.join(map(str, batch)) or 'none'}"
        )
    if isinstance(batch, tuple | list) and batch:
        return inputs_of(batch[0]) if hasattr(batch[0], "keys") else batch[0]
    return batch


def _collate(items: list[Any]) -> Any:
    try:
        return torch.utils.data.default_collate(items)
    except (TypeError, RuntimeError) as error:
        first = items[0][0] if isinstance(items[0], tuple | list) else items[0]
        raise TypeError(
            f"loader: the items of this dataset, the first a {type(first).__name__}, do not make a batch: give it a "
            f"transform to tensors of one size, or give a DataLoader ({error})"
        ) from error
