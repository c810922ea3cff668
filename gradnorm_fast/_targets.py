"""Which targets a loss and which orders a norm may have: the one place that says so."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .kernels.problem import IGNORE


def check_p(p: object) -> float:
    """The order of a norm as a float; TypeError or ValueError where it is none."""
    if isinstance(p, bool) or not isinstance(p, (int, float, np.floating, np.integer)):
        raise TypeError(f"p: expected a number, got {type(p).__name__}")
    if not (0.1 <= p <= 64.0 or p == math.inf):
        raise ValueError(f"p: expected 0.1 … 64, or inf, got {p!r}")
    return float(p)


def check_target(target: object, shape: tuple[int, ...], reduction: str = "mean") -> None:
    """Refuse what is not "uniform", "predicted" or int64 labels of this shape."""
    if isinstance(target, Tensor):
        check_labels(target, shape)
    elif not isinstance(target, str):
        raise TypeError(f'target: expected "uniform", "predicted" or int64 labels, got {type(target).__name__}')
    elif target not in ("uniform", "predicted"):
        raise ValueError(f'target: expected "uniform", "predicted" or int64 labels, got {target!r}')
    if reduction == "sum" and not (isinstance(target, str) and target == "uniform"):
        raise ValueError('reduction: "sum" over classes is defined for the uniform target only; leave it out')


def check_labels(labels: object, shape: tuple[int, ...], name: str = "target") -> None:
    """Refuse what is not an int64 tensor of this shape."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected int64 labels, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected labels of dtype int64, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{name}: expected labels of shape {tuple(shape)}, got {tuple(labels.shape)}")


def check_classes(labels: Tensor, classes: int, name: str = "target") -> None:
    """Refuse labels of classes that do not exist, on a CPU; on a GPU that would wait for the data."""
    if labels.device.type != "cpu" or not labels.numel():
        return
    lowest, highest = map(int, labels.masked_fill(labels == IGNORE, 0).aminmax())
    if lowest < 0 or highest >= classes:
        got = lowest if lowest < 0 else highest
        raise ValueError(f"{name}: expected labels 0 … {classes - 1}, or {IGNORE} to ignore a row, got {got}")
