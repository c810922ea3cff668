"""Why a model has no head to score, and what to do: one sentence for each kind of classifier that people bring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .capture import Inputs, call, watching
from .heads import Call, _is_vectors, _same, is_linear, no_batch
from .verification import BY_HAND, constant_ratio, scaled


def no_head(model: nn.Module, images: Inputs, calls: dict[str, tuple[nn.Module, Call]], logits: Tensor) -> str:
    """The message for a model without a linear layer, of those called in a pass, that returned the logits."""
    message = f"head: no linear layer's output is the model's output, shape {tuple(logits.shape)}"
    reason = _positions(logits) or _pooled(calls) or _changed(calls, logits)
    if not reason:
        reason = _maker(model, images, logits) or _parameter(model, logits)
    if not reason:
        reason = f"the last one called is {list(calls)[-1]!r}" if calls else "the model called none"
        reason += ". If the model ends in a softmax, scales its logits or averages several heads, take that off"
    return f"{message}: {reason}. {BY_HAND}"


def _positions(logits: Tensor) -> str:
    if logits.dim() < 2:
        return no_batch(logits)
    if _is_vectors(logits):
        return ""
    return (
        "it has logits per token or position, as a language model or a segmenter, not per image. fast_gradnorm scores "
        "every position, given features (B, positions, D), the input of the last layer, and its weight"
    )


def _pooled(calls: dict[str, tuple[nn.Module, Call]]) -> str:
    if not calls:
        return ""
    name, (module, last) = list(calls.items())[-1]
    if not isinstance(module, nn.Conv2d) or last.output is not None:
        return ""
    return (
        f"{name!r} is a convolution whose output, shape {last.shape}, is pooled afterwards, as in SqueezeNet. Its "
        "gradient is a sum of outer products over positions, for which the closed form does not hold. "
        'GradNorm(model, layers="head") or `gradnorm-fast eval --layers head` scores it, by a backward pass'
    )


def _changed(calls: dict[str, tuple[nn.Module, Call]], logits: Tensor) -> str:
    """What happens to a linear layer's output, if that can be determined."""
    if logits.is_meta:
        return ""
    z = logits.detach().float().flatten(1)
    outputs = {
        name: last.output.detach().float().flatten(1)
        for name, (_, last) in calls.items()
        if last.output is not None and last.output.shape[:1] == z.shape[:1] and last.output[0].numel() == z.shape[1]
    }
    tolerance = max(1e-5, torch.finfo(logits.dtype).eps) * z.abs().amax()
    for name, output in outputs.items():
        scale = constant_ratio(z.flatten(), output.flatten(), tolerance)
        if scale is not None:
            return f"it is that of {name!r}, scaled (as by CLIP's logit_scale). {scaled(scale)}"
        for function in ("softmax", "log_softmax", "sigmoid"):
            if torch.allclose(getattr(output, function)(*[1] * (function != "sigmoid")), z, rtol=1e-4, atol=1e-7):
                return f"it is the {function} of what {name!r} returns. The score needs logits: take the {function} off"
    if len(outputs) > 1:
        mean = torch.stack(list(outputs.values())).mean(0)
        if torch.allclose(mean, z, rtol=1e-4, atol=tolerance.item()):
            return (
                f"it is the average of {', '.join(map(repr, outputs))}, as of an ensemble, or of a head distilled from "
                "a teacher beside the usual one. Wrap the model so that it returns the logits of one of them"
            )
    return ""


def _maker(model: nn.Module, images: Inputs, logits: Tensor) -> str:
    """The module that returned the logits, by one more pass; the innermost if they are nested."""
    made: list[nn.Module] = []
    names = {module: name for name, module in model.named_modules() if module is not model}
    watched = [m for m in names if not isinstance(m, torch.jit.ScriptModule)]

    def record(module: nn.Module, _: Tensor, output: object) -> None:
        if isinstance(output, Tensor) and not made and _same(output, logits):
            made.append(module)

    with watching(watched, record):
        call(model, images)
    scripts = [name for module, name in names.items() if isinstance(module, torch.jit.ScriptModule)]
    if not made:
        if scripts:
            return f"{scripts[0]!r} is TorchScript, whose layers cannot be watched. Use the module it was made from"
        return ""
    module, kind = made[0], type(made[0])
    message = f"it is that of {names[module]!r}, a {kind.__name__}"
    if "quant" in kind.__module__ + kind.__name__.lower():
        return (
            f"{message}, which is quantised; the closed form needs floating point weights. Score the model before that"
        )
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return (
            f"{message}, which is not a torch.nn.Linear: if it normalises its weight or features (as NormedLinear and "
            "cosine classifiers do), its gradient is another one. If it only multiplies, make it a torch.nn.Linear"
        )
    return f"{message}, not that of a linear layer. Take it off if it only changes the logits"


def _parameter(model: nn.Module, logits: Tensor) -> str:
    """A matrix that a functional call may have multiplied by."""
    classes = logits[0].numel()
    if isinstance(model, torch.fx.GraphModule):
        return "its layers are function calls, as in a traced or exported program. Give the model it was made from"
    for name, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            if not nn.parameter.is_lazy(p) and p.dim() == 2 and classes in p.shape and not is_linear(module):
                place = f"{name}.{key}" if name else key
                return (
                    f"the parameter {place!r}, shape {tuple(p.shape)}, may be its head, multiplied by a function "
                    "(F.linear, einsum, @). Make it a torch.nn.Linear layer of the model, and a factor a temperature"
                )
    return ""
