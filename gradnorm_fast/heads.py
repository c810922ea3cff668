"""The linear head of a classifier: found by what it does on a batch, never by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .capture import Inputs, call, evaluating, watching
from .verification import BY_HAND, check_row, epsilon

__all__ = [
    "check_head",
    "check_row",
    "check_tied",
    "compile_backbone",
    "evaluating",
    "explained",
    "features_and_logits",
    "find_head",
    "head_pass",
    "is_linear",
    "logits_of",
    "module_named",
    "run",
    "unwrap",
]

LinearHead: TypeAlias = nn.Linear | nn.Conv2d


def unwrap(model: Any) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile wrappers: hooks reach only that.

    TypeError, with what to do, for what is no Python module that can be looked into.
    """
    while isinstance(model, nn.Module):
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "model: expected a torch.nn.Module in Python, got a TorchScript module (of torch.jit.script, trace, "
                f"freeze or load), whose layers cannot be watched. Give the model it was made from. {BY_HAND}"
            )
        else:
            return model
    hint = ""
    if isinstance(model, torch.export.ExportedProgram):
        hint = f", a program without layers. Give the model it was exported from. {BY_HAND}"
    elif isinstance(model, torch.jit.ScriptFunction):
        hint = f", compiled code without layers. Give the model it was made from. {BY_HAND}"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got the class {model.__name__}; give an instance")
    raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}{hint}")


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
    got = type(output).__name__
    if isinstance(output, dict):
        got += f" with the keys {', '.join(map(repr, output))}"
    elif isinstance(output, tuple | list) and output:
        got += f" of {', '.join(type(o).__name__ for o in output)}"
    raise TypeError(
        f"model: expected it to return logits, a tensor or an object with .logits, got {got}; wrap the model so that "
        "it returns the logits of one head"
    )


def run(model: nn.Module, images: Inputs) -> Any:
    """`call`, its errors `explained`."""
    with explained(images):
        return call(model, images)


@contextmanager
def explained(images: Inputs, errors: type[Exception] = Exception) -> Iterator[None]:
    """Say what is unusual about the images where the user's model fails on them; ValueError, others pass."""
    try:
        yield
    except errors as error:
        unusual = _unusual(images)
        if not unusual or isinstance(error, torch.OutOfMemoryError):
            raise
        assert isinstance(images, Tensor)
        raise ValueError(
            f"images: the model fails on {images.dtype} of shape {tuple(images.shape)}: {unusual} "
            f"({' '.join(str(error).split()) or type(error).__name__})"
        ) from error


def _unusual(images: Inputs) -> str:
    """Advice for images of an unusual kind; empty for others."""
    if not isinstance(images, Tensor):
        return ""
    advice = []
    if not images.is_floating_point():
        advice.append("most models take floating point pixels, preprocessed as in training")
    if images.dim() == 3:
        advice.append("a single image needs a dimension in front, image[None]")
    return "; ".join(advice)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, or a convolution that is one on a 1x1 image."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


class HeadPass(NamedTuple):
    """What one forward pass shows about the head."""

    features: Tensor  #: (B, D), what the head was given
    logits: Tensor  #: (B, C), what the model returned
    eps: float  #: of the coarsest format in force when the head was called


def features_and_logits(model: nn.Module, head: nn.Module, images: Inputs) -> tuple[Tensor, Tensor]:
    """The first two of `head_pass`."""
    return head_pass(model, head, images)[:2]


def head_pass(model: nn.Module, head: nn.Module, images: Inputs) -> HeadPass:
    """Run one forward pass and record the head. ValueError if the head did not run, or ran more than once."""
    seen: list[Tensor] = []
    eps = 0.0

    def record(_: nn.Module, features: Tensor, output: Any) -> None:
        nonlocal eps
        seen.append(features)
        eps = epsilon(head, features, output) if isinstance(output, Tensor) else 0.0

    with watching([head], record):
        logits = logits_of(run(model, images))
    if not seen:
        raise ValueError("head: the model did not call it; is it the head of another model?")
    if len(seen) > 1:
        raise ValueError(
            f"head: expected one call of it in a pass, the model made {len(seen)}: its gradient is then a sum of outer "
            "products, for which the closed form does not hold"
        )
    return HeadPass(_rows(seen[0], logits), logits, eps)


def find_head(model: nn.Module, images: Inputs) -> tuple[str, LinearHead]:
    """The linear layer, or pooled 1x1 convolution, whose output on these images is the model's logits.

    Returns its name in the model and the module. ValueError where there is none, or more than one, with what the model
    has instead and what to do.
    """
    names = {module: name for name, module in model.named_modules() if is_linear(module)}
    found = _recorded(model, names, images)
    matches = [module for module in found.calls if _same(found.calls[module].output, found.logits)]
    if not matches:
        from .refusals import no_head

        raise ValueError(no_head(model, images, {names[m]: (m, call) for m, call in found.calls.items()}, found.logits))
    if len(matches) > 1 and not found.logits.is_meta:  # a shape, all there is on meta, does not tell them apart
        raise ValueError(
            f"head: {' and '.join(repr(names[m]) for m in matches)} return the same logits, as the head of an averaged "
            f"or teacher model does; name the one that makes the model's output, as head={names[matches[0]]!r}"
        )
    head = matches[-1]
    parallel = [m for m in found.calls if m is not head and found.same_input(m, head) and found.is_other_output(m)]
    if parallel:
        raise ValueError(
            f"head: the model has several outputs, made by {', '.join(repr(names[m]) for m in [head, *parallel])}; the "
            f"score is of one. Name {names[head]!r} to take the first, or wrap the model so that it returns another"
        )
    _check_product(names[head], head, found.calls[head], found.logits)
    return names[head], head  # type: ignore[return-value]


def check_head(model: nn.Module, name: str, head: nn.Module, images: Inputs) -> None:
    """Refuse a named head that does not make the model's logits; ValueError."""
    found = _recorded(model, [head], images)
    if not found.calls:
        raise ValueError(f"head: the model did not call {name!r}")
    if not _is_vectors(found.logits):
        from .refusals import no_head

        raise ValueError(no_head(model, images, {name: (head, found.calls[head])}, found.logits))
    if not _same(found.calls[head].output, found.logits):
        raise ValueError(
            f"head: the output of {name!r}, shape {found.calls[head].shape}, is not the model's logits, shape "
            f"{tuple(found.logits.shape)}; leave head out to have it found"
        )
    _check_product(name, head, found.calls[head], found.logits)


def check_tied(model: nn.Module, name: str, head: nn.Module, include_bias: bool = False) -> None:
    """Refuse a head whose parameters another layer uses too; ValueError.

    The gradient of a shared parameter is the sum over all its uses; the closed form is that of the head's alone.
    """
    for field in ("weight", "bias") if include_bias else ("weight",):
        own = getattr(head, field, None)
        if own is None:
            continue
        for other, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if module is not head and _overlap(parameter, own):
                    place = f"{other}.{key}" if other else key
                    raise ValueError(
                        f"head: the {field} of {name!r} is tied to {place!r}: its gradient has a second part, through "
                        "that use, which the closed form lacks. To score the head alone, untie them: "
                        f"{name}.{field} = torch.nn.Parameter({name}.{field}.detach().clone())"
                    )


def module_named(model: nn.Module, head: str | nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a head given as either; ValueError where the model has none such, or it is not linear."""
    modules = dict(model.named_modules())
    if isinstance(head, nn.Module):
        name = next((name for name, module in modules.items() if module is head), None)
        if name is None:
            raise ValueError(f"head: this {type(head).__name__} is not part of the model")
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


class Call(NamedTuple):
    """The last call of a layer in a pass."""

    shape: tuple[int, ...]  #: of the output
    features: Tensor | None  #: the input; both None where the output is more than a vector per image
    output: Tensor | None
    eps: float  #: of the coarsest format in force


class _Pass(NamedTuple):
    calls: dict[nn.Module, Call]  #: in their order
    logits: Tensor
    others: list[Tensor]  #: further tensors that the model returned

    def same_input(self, a: nn.Module, b: nn.Module) -> bool:
        x, y = self.calls[a].features, self.calls[b].features
        return x is not None and y is not None and (x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape))

    def is_other_output(self, module: nn.Module) -> bool:
        return any(_same(self.calls[module].output, other) for other in self.others)


def _recorded(model: nn.Module, modules: Iterable[nn.Module], images: Inputs) -> _Pass:
    """One forward pass, watching these modules."""
    calls: dict[nn.Module, Call] = {}

    def record(module: nn.Module, features: Tensor, output: Any) -> None:
        calls.pop(module, None)
        if not isinstance(output, Tensor):
            return
        # Only vectors: the tokens of a ViT's linear layers, the maps of a ResNet's 1x1 convolutions, are gigabytes.
        kept = _is_vectors(output)
        eps = epsilon(module, features, output)
        calls[module] = Call(tuple(output.shape), features if kept else None, output if kept else None, eps)

    with watching(modules, record):
        output = run(model, images)
    logits = logits_of(output)
    fields = list(output.values()) if isinstance(output, dict) else output if isinstance(output, tuple | list) else []
    return _Pass(calls, logits, [t for t in fields if isinstance(t, Tensor) and t is not logits])


def _is_vectors(t: Tensor) -> bool:
    """Whether it is (B, D), (B, D, 1, 1) or with other dimensions of size 1."""
    return t.dim() > 1 and math.prod(t.shape[1:]) == max(t.shape[1:])


def _check_product(name: str, head: nn.Module, call: Call, logits: Tensor) -> None:
    """Refuse a head that does more than x·Wᵀ + b, as a cosine classifier derived from nn.Linear; ValueError."""
    weight: Any = head.weight
    if not weight.is_floating_point() or type(weight.detach()) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"head: the weight of {name!r}, a {type(head).__name__}, is {weight.dtype} of the type "
            f"{type(weight.detach()).__name__}; the closed form needs a plain floating point weight. Score the model "
            f"before quantisation or sharding. {BY_HAND}"
        )
    assert call.features is not None
    verification = check_row(name, head, _rows(call.features, logits), logits, 0, call.eps)
    if verification is not None:
        verification.raise_if_failed()


def _rows(features: Tensor, logits: Tensor) -> Tensor:
    """(B, D) of what the head was given: (B, D), (B, D, 1, 1) or with other dimensions of size 1."""
    if logits.dim() < 2 or features.dim() < 2:
        raise ValueError(f"model: {no_batch(logits)}")
    if features.shape[0] != len(logits) or not _is_vectors(features):
        raise ValueError(f"head: expected one feature vector per image, it was given shape {tuple(features.shape)}")
    return features.flatten(1)


def no_batch(logits: Tensor) -> str:
    return (
        f"expected logits (B, C) of images (B, ...), got shape {tuple(logits.shape)}. A single image needs a dimension "
        "in front, image[None]; one output per image has to be made two classes"
    )


def _same(output: Tensor | None, logits: Tensor) -> bool:
    if output is None or output.numel() != logits.numel() or output.shape[:1] != logits.shape[:1]:
        return False
    if logits.is_meta:  # no values to compare: the shape has to do
        return True
    return torch.equal(output.reshape(logits.shape), logits) or bool(
        torch.isclose(output.reshape(logits.shape), logits, rtol=1e-3, atol=0.0, equal_nan=True).all()
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    if a is b:
        return True
    if any(nn.parameter.is_lazy(t) or t.is_meta or t.numel() == 0 or t.device != b.device for t in (a, b)):
        return False
    ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (a, b)]
    return max(start for start, _ in ends) < min(end for _, end in ends)
