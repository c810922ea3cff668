"""Selects parameters: all, the head's, those of named modules, or those that a predicate chooses."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .. import heads

Predicate: TypeAlias = Callable[[str, nn.Parameter], bool]
Layers: TypeAlias = str | Iterable[str] | Predicate


def check_layers(model: nn.Module, layers: Layers) -> str | list[str] | Predicate:
    """`layers`, with names as a list. Raises like `selected_parameters`, except for errors that need images."""
    expected = f'layers: expected "all", "head", a list of module names or a predicate, got {layers!r}'
    if isinstance(layers, str):
        if layers not in ("all", "head"):
            raise ValueError(expected)
        return layers
    if callable(layers):
        return layers
    try:
        return _module_names(model, layers)
    except TypeError:
        raise TypeError(expected) from None


def selected_parameters(model: nn.Module, images: Tensor, layers: Layers) -> list[str]:
    """Names of the parameters that `layers` selects, in the order of model.named_parameters().

    Raises:
        TypeError: layers has the wrong type.
        ValueError: the model has no such module, or no parameter is selected.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    layers = check_layers(model, layers)
    if layers == "all":
        chosen = list(parameters)
    elif isinstance(layers, str):
        chosen = _inside(parameters, [head_name(model, images)])
    elif callable(layers):
        chosen = [name for name, p in parameters.items() if layers(name, p)]
    else:
        chosen = _inside(parameters, layers)
    if not chosen:
        raise ValueError(f"layers: selects none of the model's {len(parameters)} floating-point parameters")
    return chosen


def head_name(model: nn.Module, images: Tensor) -> str:
    """The name of the layer whose output is the logits, directly or after pooling as in SqueezeNet.

    Runs the model on one image. ValueError if there is no such layer.
    """
    with torch.no_grad():
        try:
            return heads.find_head(model, images[:1])[0]
        except ValueError:
            name = _last_convolution(model, images[:1])
            if name is None:
                raise
            return name


def _last_convolution(model: nn.Module, image: Tensor) -> str | None:
    """The last layer that the model calls, if it is a convolution with one output channel per class."""
    calls: list[str] = []
    names = {m: n for n, m in model.named_modules() if not list(m.children()) and list(m.parameters(recurse=False))}
    handles = [m.register_forward_hook(lambda m, *_: calls.append(names[m])) for m in names]
    try:
        classes = heads.logits_of(model(image)).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    last = model.get_submodule(calls[-1]) if calls else None
    return calls[-1] if isinstance(last, nn.Conv2d) and last.out_channels == classes else None


def _module_names(model: nn.Module, layers: Iterable[str]) -> list[str]:
    names, modules = list(layers), dict(model.named_modules())
    for name in names:
        if not isinstance(name, str):
            raise TypeError
        if name not in modules:
            near = ", ".join(difflib.get_close_matches(name, modules, n=3))
            raise ValueError(f"layers: the model has no module {name!r}" + (f"; did you mean {near}?" if near else ""))
    return names


def _inside(parameters: dict[str, nn.Parameter], modules: list[str]) -> list[str]:
    prefixes = tuple(f"{name}." if name else "" for name in modules)
    return [name for name in parameters if name.startswith(prefixes)]
