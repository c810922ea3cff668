"""The linear head of a classifier: found by what it does on a batch, never by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

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

    Raises ValueError where the head was not run.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        logits = logits_of(model(images))
    finally:
        handle.remove()
    if not seen:
        raise ValueError("head: the model did not call it; is it the head of another model?")
    return _rows(seen[-1], len(logits)), logits


def find_head(model: nn.Module, images: Any) -> tuple[str, LinearHead]:
    """The last linear layer, or pooled 1x1 convolution, whose output on these images is the model's logits.

    Returns its name in the model and the module. ValueError where there is none, saying what was looked at.
    """
    outputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.pop(module, None)  # the order is that of the last calls
        outputs[module] = output

    candidates = {module: name for name, module in model.named_modules() if is_linear(module)}
    handles = [module.register_forward_hook(record) for module in candidates]
    try:
        logits = logits_of(model(images))
    finally:
        for handle in handles:
            handle.remove()
    for module in reversed(outputs):
        if _same(outputs[module], logits):
            return candidates[module], module  # type: ignore[return-value]
    raise ValueError(_no_head({candidates[m]: (m, o) for m, o in outputs.items()}, logits))


def check_head(model: nn.Module, name: str, head: nn.Module, images: Any) -> None:
    """Refuse a named head that does not make the model's logits; ValueError."""
    if not is_linear(head):
        raise ValueError(f"head: expected a linear layer or a 1x1 convolution, {name!r} is a {type(head).__name__}")
    made: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: made.append(output))
    try:
        logits = logits_of(model(images))
    finally:
        handle.remove()
    if not made:
        raise ValueError(f"head: the model did not call {name!r}")
    if not _same(made[-1], logits):
        raise ValueError(
            f"head: the output of {name!r}, shape {tuple(made[-1].shape)}, is not the model's logits, shape "
            f"{tuple(logits.shape)}; leave head out to have it found"
        )


def module_named(model: nn.Module, head: str | nn.Module) -> tuple[str, nn.Module]:
    """A module of the model by its name, or the name of a module; ValueError where there is none."""
    modules = dict(model.named_modules())
    if isinstance(head, nn.Module):
        name = next((name for name, module in modules.items() if module is head), None)
        if name is None:
            raise ValueError(f"head: this {type(head).__name__} is no part of the model")
        return name, head
    if not isinstance(head, str):
        raise TypeError(f"head: expected a module's name or the module, got {type(head).__name__}")
    if head not in modules:
        linear = [name for name, module in modules.items() if is_linear(module)]
        near = linear[-3:] if linear else []
        raise ValueError(
            f"head: the model has no module {head!r}; its last linear layers are {', '.join(near) or 'none'}"
        )
    return head, modules[head]


def compile_backbone(model: nn.Module, head: nn.Module, compiler: Callable[[nn.Module], None]) -> None:
    """Compile, in place, the largest parts of the model without the head in them, whose hook must stay visible."""
    for child in model.children():
        if any(module is head for module in child.modules()):
            if child is not head:
                compile_backbone(child, head, compiler)
        else:
            compiler(child)


def _rows(features: Tensor, batch: int) -> Tensor:
    """(B, D) of what the head was given: (B, D), (B, D, 1, 1) or with other dimensions of size 1."""
    if (
        features.numel() % max(batch, 1)
        or features.shape[0] != batch
        or features.flatten(1).shape[1] != max(features.shape[1:], default=1)
    ):
        raise ValueError(f"head: expected one feature vector per image, it was given shape {tuple(features.shape)}")
    return features.flatten(1)


def _same(output: Tensor, logits: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.numel() != logits.numel() or output.shape[:1] != logits.shape[:1]:
        return False
    if logits.is_meta:  # no values to compare: the shape has to do
        return True
    return torch.equal(output.reshape(logits.shape), logits) or bool(
        torch.isclose(output.reshape(logits.shape), logits, rtol=1e-3, atol=0.0, equal_nan=True).all()
    )


def _no_head(outputs: dict[str, tuple[nn.Module, Tensor]], logits: Tensor) -> str:
    message = f"head: no linear layer's output is the model's output, shape {tuple(logits.shape)}"
    if not outputs:
        return f"{message}; the model called none"
    name, (module, output) = list(outputs.items())[-1]
    if isinstance(module, nn.Conv2d) and output.dim() == 4 and output.shape[2:] != (1, 1):
        return (
            f"{message}: {name!r} is a convolution whose output, shape {tuple(output.shape)}, is pooled afterwards, as "
            "in SqueezeNet. Its gradient is a sum of outer products over positions, for which the closed form does "
            "not hold; choose a model with a linear head after pooling"
        )
    return (
        f"{message}; the last one called is {name!r}, shape {tuple(output.shape)}. If the model ends in a softmax or "
        "scales its logits, take that off"
    )
