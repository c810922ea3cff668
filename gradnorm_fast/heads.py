"""The linear head of a classifier: found by what it does on a batch, never by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

LinearHead: TypeAlias = nn.Linear | nn.Conv2d


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile wrappers: hooks reach only that."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returns: a tensor, `.logits` (Hugging Face), ["logits"], or the first of several.

    Raises TypeError for anything else.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, dict) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"model: expected it to return logits, a tensor or an object with .logits, got {type(output).__name__}"
    )


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, or a convolution that is one on a 1x1 image."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; each module's own mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def features_and_logits(model: nn.Module, head: nn.Module, images: Any) -> tuple[Tensor, Tensor]:
    """One forward pass: what the head was given, as rows (B, D), and the model's logits.

    Raises ValueError where the head was not run, or more than once.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args, kwargs: seen.append(_input(args, kwargs)), with_kwargs=True)
    try:
        logits = logits_of(model(images))
    finally:
        handle.remove()
    if not seen:
        raise ValueError("head: the model did not call it; is it the head of another model?")
    if len(seen) > 1:
        raise ValueError(
            f"head: expected one call of it in a pass, the model made {len(seen)}: its gradient is then a sum of outer "
            "products, for which the closed form does not hold"
        )
    return _rows(seen[0], len(logits)), logits


def find_head(model: nn.Module, images: Any) -> tuple[str, LinearHead]:
    """The last linear layer, or pooled 1x1 convolution, whose output on these images is the model's logits.

    Returns its name in the model and the module. ValueError where there is none, saying what was looked at.
    """
    candidates = {module: name for name, module in model.named_modules() if is_linear(module)}
    calls, logits = _recorded(model, candidates, images)
    for module in reversed(calls):
        if _same(calls[module].output, logits):
            _check_product(candidates[module], module, calls[module])
            return candidates[module], module  # type: ignore[return-value]
    raise ValueError(_no_head({candidates[m]: (m, call) for m, call in calls.items()}, logits))


def check_head(model: nn.Module, name: str, head: nn.Module, images: Any) -> None:
    """Refuse a named head that does not make the model's logits; ValueError."""
    calls, logits = _recorded(model, [head], images)
    if not calls:
        raise ValueError(f"head: the model did not call {name!r}")
    if not _same(calls[head].output, logits):
        raise ValueError(
            f"head: the output of {name!r}, shape {calls[head].shape}, is not the model's logits, shape "
            f"{tuple(logits.shape)}; leave head out to have it found"
        )
    _check_product(name, head, calls[head])


def module_named(model: nn.Module, head: str | nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a head given as either; ValueError where the model has none such, or it is not linear."""
    modules = dict(model.named_modules())
    if isinstance(head, nn.Module):
        name = next((name for name, module in modules.items() if module is head), None)
        if name is None:
            raise ValueError(f"head: this {type(head).__name__} is no part of the model")
    elif isinstance(head, str):
        name = head
    else:
        raise TypeError(f"head: expected a module's name or the module, got {type(head).__name__}")
    if name not in modules:
        near = [n for n, module in modules.items() if is_linear(module)][-3:]
        raise ValueError(
            f"head: the model has no module {name!r}; its last linear layers are {', '.join(near) or 'none'}"
        )
    if not is_linear(modules[name]):
        kind = type(modules[name]).__name__
        raise ValueError(f"head: expected a linear layer or a 1x1 convolution, {name!r} is a {kind}")
    return name, modules[name]


def compile_backbone(model: nn.Module, head: nn.Module, compiler: Callable[[nn.Module], None]) -> None:
    """Compile, in place, the largest parts of the model without the head in them, whose hook must stay visible."""
    for child in model.children():
        never_called = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if never_called or any(module is head for module in child.modules()):
            if child is not head:
                compile_backbone(child, head, compiler)
        else:
            compiler(child)


class _Call(NamedTuple):
    shape: tuple[int, ...]  #: of the output
    features: Tensor | None  #: the input; both None where the output is more than a vector per image
    output: Tensor | None


def _recorded(model: nn.Module, modules: Iterable[nn.Module], images: Any) -> tuple[dict[nn.Module, _Call], Tensor]:
    """The last call of each of the modules in one forward pass, in the order of the calls, and the model's logits."""
    calls: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        calls.pop(module, None)
        if not isinstance(output, Tensor):
            return
        # Only vectors: the tokens of a ViT's linear layers, the maps of a ResNet's 1x1 convolutions, are gigabytes.
        kept = (_input(args, kwargs), output) if _is_vectors(output) else (None, None)
        calls[module] = _Call(tuple(output.shape), *kept)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        logits = logits_of(model(images))
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def _input(args: Any, kwargs: Any) -> Tensor:
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor


def _is_vectors(t: Tensor) -> bool:
    """Whether it is (B, D), (B, D, 1, 1) or with other dimensions of size 1."""
    return t.dim() > 1 and math.prod(t.shape[1:]) == max(t.shape[1:])


def _check_product(name: str, head: nn.Module, call: _Call) -> None:
    """Refuse a head that does more than x·Wᵀ + b, as a cosine classifier derived from nn.Linear; ValueError."""
    if call.features is None or call.output is None or call.output.is_meta:
        return
    weight: Tensor = head.weight  # type: ignore[assignment]
    output = call.output.flatten(1)
    if weight.is_floating_point():
        features = call.features.flatten(1).to(weight.dtype)
        product = nn.functional.linear(features, weight.flatten(1), head.bias).to(output.dtype)  # type: ignore[arg-type]
        finite = output[output.isfinite()].abs()
        atol = 0.02 * finite.max().item() if len(finite) else 0.0  # far above rounding to bfloat16
        if torch.isclose(product, output, rtol=0.02, atol=atol, equal_nan=True).all():
            return
    raise ValueError(
        f"head: {name!r}, a {type(head).__name__}, does not compute x·Wᵀ + b of its input; the closed form needs that"
    )


def _rows(features: Tensor, batch: int) -> Tensor:
    """(B, D) of what the head was given: (B, D), (B, D, 1, 1) or with other dimensions of size 1."""
    if features.shape[0] != batch or not _is_vectors(features):
        raise ValueError(f"head: expected one feature vector per image, it was given shape {tuple(features.shape)}")
    return features.flatten(1)


def _same(output: Tensor | None, logits: Tensor) -> bool:
    if output is None or output.numel() != logits.numel() or output.shape[:1] != logits.shape[:1]:
        return False
    if logits.is_meta:  # no values to compare: the shape has to do
        return True
    return torch.equal(output.reshape(logits.shape), logits) or bool(
        torch.isclose(output.reshape(logits.shape), logits, rtol=1e-3, atol=0.0, equal_nan=True).all()
    )


def _no_head(calls: dict[str, tuple[nn.Module, _Call]], logits: Tensor) -> str:
    message = f"head: no linear layer's output is the model's output, shape {tuple(logits.shape)}"
    if not calls:
        return f"{message}; the model called none"
    name, (module, call) = list(calls.items())[-1]
    if isinstance(module, nn.Conv2d) and call.output is None:
        return (
            f"{message}: {name!r} is a convolution whose output, shape {call.shape}, is pooled afterwards, as "
            "in SqueezeNet. Its gradient is a sum of outer products over positions, for which the closed form does "
            "not hold; choose a model with a linear head after pooling"
        )
    return (
        f"{message}; the last one called is {name!r}, shape {call.shape}. If the model ends in a softmax, "
        "scales its logits or averages several heads, take that off"
    )
