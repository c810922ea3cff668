"""One watched forward pass: evaluation mode, and what layers were given and returned, for each thread by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]  #: of a model: images (B, ...), or keywords such as input_ids
Record: TypeAlias = Callable[[nn.Module, Tensor, Any], None]  #: a layer, its input, its output

_lock = threading.Lock()  # held while the two tables below change, never during a pass
_modes: dict[nn.Module, list[Any]] = {}  # modules in evaluation for some thread: [threads, training before]
_hooks: dict[nn.Module, list[Any]] = {}  # modules watched by some thread: [threads, handle of the hook]
_thread = threading.local()  # .watches: what this thread watches


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for images, or for a mapping of keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; each module's own mode is put back when the last thread leaves."""
    modules = list(model.modules())
    with _lock:
        for module in modules:
            threads, training = _modes.get(module, (0, False))
            _modes[module] = [threads + 1, training or module.training]
    try:
        with _lock:
            for module in modules:
                _set_mode(module, False)
        with torch.no_grad():  # not inference_mode: what a forward pass keeps in the model has to be of use in training
            yield
    finally:
        with _lock:
            restored = []
            for module in modules:
                _modes[module][0] -= 1
                if _modes[module][0] == 0:
                    restored.append((module, _modes.pop(module)[1]))
            for module, training in restored:
                _set_mode(module, training)


def _set_mode(module: nn.Module, training: bool) -> None:
    """Set this module's mode only, unless it overrides `train`, which may do more, such as merging LoRA weights."""
    if module.training != training:
        if type(module).train is nn.Module.train:
            module.training = training
        else:
            module.train(training)


@contextmanager
def watching(modules: Iterable[nn.Module], record: Record) -> Iterator[None]:
    """Call record(module, input, output) after each call that this thread makes of one of the modules.

    Threads share one hook per module: adding and removing hooks while another thread runs the module would race.
    """
    watched = frozenset(modules)
    watches: list[tuple[frozenset[nn.Module], Record]] = _thread.__dict__.setdefault("watches", [])
    with _lock:
        for module in watched:
            if module in _hooks:
                _hooks[module][0] += 1
            else:
                _hooks[module] = [1, module.register_forward_hook(_report, with_kwargs=True)]
    watches.append((watched, record))
    try:
        yield
    finally:
        watches.pop()
        with _lock:
            for module in watched:
                _hooks[module][0] -= 1
                if _hooks[module][0] == 0:
                    _hooks.pop(module)[1].remove()


def _report(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
    """The hook. torch leaves the keywords out of `rest` if it is removed during the call, by another thread's pass."""
    for modules, record in getattr(_thread, "watches", ()):
        if module in modules:
            given = args or (tuple(rest[0].values()) if len(rest) == 2 else ())
            record(module, given[0] if given else None, rest[-1])
