"""A classifier and its preprocessing from a name: torchvision's, timm's, or a function of the user's own."""

from __future__ import annotations

import argparse
import importlib
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import bit

Transform = Callable[[Any], torch.Tensor]  #: a PIL image to a tensor (3, H, W)
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")  #: under which checkpoints keep the state dict
BIT = "bits_r101x1"  #: the network of the paper
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_model(
    name: str, weights: str | None = None, checkpoint: str | os.PathLike[str] | None = None, classes: int | None = None
) -> tuple[nn.Module, Transform | None]:
    """The model, and its own preprocessing where its weights come with one.

    Args:
        name: a torchvision classifier ("resnet50"), "timm:NAME", "bits_r101x1" (`gradnorm_fast.bit`), or
            "module:function", a function without arguments that returns the model or (model, transform); the current
            folder is searched first, and stays on sys.path for what the model imports as it runs.
        weights: torchvision: "DEFAULT" or an enum name as "IMAGENET1K_V1"; timm: "DEFAULT" for the pretrained ones.
        checkpoint: a state dict file, read without executing what is in it; also one under the key "state_dict",
            "model_state_dict", "model" or "net", and with a prefix before all names, as of DataParallel or Lightning;
            of "bits_r101x1" also the .npz file that its authors publish.
        classes: of torchvision and timm models that are not ImageNet's.

    Raises:
        ValueError: an unknown name, weights or checkpoint that do not fit. ImportError: what the name needs is missing.
    """
    transform: Transform | None = None
    if name.startswith("timm:"):
        model, transform = _timm(name.removeprefix("timm:"), weights, classes)
    elif ":" in name:
        if weights is not None:
            raise ValueError(f"weights: {name!r} brings its own; use --checkpoint for a state dict")
        if classes is not None:
            raise ValueError(f"classes: {name!r} decides that itself; --classes is for torchvision's and timm's models")
        model, transform = _own(name)
    elif name == BIT:
        model, transform = _bit(weights, classes)
    else:
        model, transform = _torchvision(name, weights, classes)
    if checkpoint is not None and isinstance(model, bit.ResNetV2) and os.fspath(checkpoint).endswith(".npz"):
        bit.load_npz(model, checkpoint)
    elif checkpoint is not None:
        _load_checkpoint(model, checkpoint)
    return model.eval(), transform


def class_names(model: nn.Module, name: str, weights: str | None = None) -> list[str] | None:
    """The classes in the order of the logits, where torchvision's weights or a Hugging Face config name them."""
    if weights is not None and ":" not in name:
        import torchvision

        return list(torchvision.models.get_model_weights(name)[weights].meta["categories"])
    named = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(named, Mapping) and all(i in named for i in range(len(named))):
        return [str(named[i]) for i in range(len(named))]
    return None


def default_transform(
    resize: int | None = None, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Transform:
    """RGB / 255, less mean, over std; with resize the shorter side to that and the square in the centre."""
    from torchvision.transforms import v2

    steps: list[Any] = [v2.Resize(resize, antialias=True), v2.CenterCrop(resize)] if resize else []
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    transform: Transform = v2.Compose(steps)
    return transform


def normalisation_of(transform: Transform | None) -> dict[str, Sequence[float]]:
    """The mean and std that a transform normalises by, torchvision's or timm's; ImageNet's where it does not say."""
    for step in reversed(getattr(transform, "transforms", [transform])):
        if hasattr(step, "transforms"):
            return normalisation_of(step)
        if hasattr(step, "mean") and hasattr(step, "std"):
            return {"mean": [float(m) for m in step.mean], "std": [float(s) for s in step.std]}
    return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def device_of(name: str | torch.device | None) -> torch.device:
    """The device that is asked for, by default a CUDA GPU where there is one; ValueError where it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device).tolist()  # "meta" has no values
    except (RuntimeError, AssertionError):
        raise ValueError(f"device: expected cpu, cuda, cuda:N or another device here, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device: {name!r} is not there, torch sees {count or 'no'} CUDA GPU")
        if device.index is None:  # each process of torchrun its own
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    return device


def _torchvision(name: str, weights: str | None, classes: int | None) -> tuple[nn.Module, Transform | None]:
    import torchvision

    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        names = [n for n in known if n.startswith(name[:4])] or known
        near = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(
            f"model: torchvision has no classifier {name!r} (near: {near}); others are timm:NAME or module:function, "
            f"and {BIT}"
        )
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if weights is None:
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        return torchvision.models.get_model(name, weights=None, **options), None
    known_weights = torchvision.models.get_model_weights(name)
    try:
        chosen = known_weights[weights]
    except KeyError:
        raise ValueError(f"weights: {name} has {', '.join(w.name for w in known_weights)}, got {weights!r}") from None
    try:
        model = torchvision.models.get_model(name, weights=chosen, **options)
    except OSError as error:  # urllib's errors among them
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise ValueError(_no_download(f"{chosen} from {chosen.url}", folder, error)) from error
    except ValueError as error:
        raise ValueError(f"classes: {chosen} are for {len(chosen.meta['categories'])} classes: {error}") from None
    return model, chosen.transforms()


def _no_download(what: str, folder: str, error: Exception) -> str:
    reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
    return (
        f"weights: cannot download {what}: {reason}. Where there is a network, download them into {folder}; or give "
        "--checkpoint FILE in place of --weights"
    )


def _timm(name: str, weights: str | None, classes: int | None) -> tuple[nn.Module, Transform | None]:
    try:
        import timm
    except ImportError as error:
        raise ImportError("model: timm:NAME needs timm: pip install timm") from error
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if weights not in (None, "DEFAULT"):
        raise ValueError(f"weights: a timm model's name says which; expected DEFAULT or nothing, got {weights!r}")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:4]}*")[:5]) or "none"
        raise ValueError(f"model: timm has no model {name!r} (near: {near})")
    try:
        model = timm.create_model(name, pretrained=weights is not None, **options)
    except Exception as error:  # each hub client has its own; without weights nothing is downloaded
        if weights is None:
            raise
        folder = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise ValueError(_no_download(f"the weights of {name}", folder, error)) from error
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def _bit(weights: str | None, classes: int | None) -> tuple[nn.Module, Transform]:
    from torchvision.transforms import v2

    if weights is not None:
        raise ValueError(f"weights: those of {BIT} come from a local file; give --checkpoint BiT-S-R101x1.npz")
    resize = v2.Resize((bit.IMAGE_SIZE, bit.IMAGE_SIZE), antialias=True)  # whatever the image's proportions
    transform = v2.Compose([resize, default_transform(mean=[0.5] * 3, std=[0.5] * 3)])
    return bit.ResNetV2(classes=classes or 1000), transform


def _own(name: str) -> tuple[nn.Module, Transform | None]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"model: expected module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0]:
            raise
        raise ValueError(f"model: no module {module_name!r} here or installed") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"model: {module_name!r} has no function {function_name!r}")
    result = function()
    model, transform = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {name} to return a torch.nn.Module, got {type(model).__name__}")
    return model, transform


def _load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the state dict in a file, under the keys and prefixes of training programs; ValueError if none fits."""
    state = _state_dict(_read_checkpoint(path), path)
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # torch.compile, of a part too
    prefix = _prefix(state, model, path)
    within = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        missing, unexpected = model.load_state_dict(within, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise ValueError(f"checkpoint: {os.fspath(path)} does not fit the model: {reason}") from None
    if missing or unexpected:
        some = ", ".join([*(f"no {n}" for n in missing[:2]), *(f"unknown {n}" for n in unexpected[:2])])
        raise ValueError(
            f"checkpoint: {os.fspath(path)} is of another model: {len(missing)} missing, {len(unexpected)} unknown "
            f"({some})"
        )


def _read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Load a torch.save file without executing code from it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of the training, harmless
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint: no file {os.fspath(path)}") from None
    except Exception as error:  # torch raises whatever its unpickler does, with advice to unpickle what is not trusted
        reason = getattr(error, "strerror", None) or "expected what torch.save(model.state_dict()) writes"
        if isinstance(error, pickle.UnpicklingError) and (unsafe := _unsafe_globals(path)):
            reason = f"it holds {', '.join(unsafe[:3])}, and loading those may run code; save the state dict alone"
        raise ValueError(f"checkpoint: cannot read {os.fspath(path)}: {reason}") from None


def _unsafe_globals(path: str | os.PathLike[str]) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no checkpoint at all
        return []


def _state_dict(content: Any, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint: itself, or under one of _STATE_KEYS."""
    for key in (None, *_STATE_KEYS):
        state = content if key is None else content.get(key) if isinstance(content, dict) else None
        if (
            isinstance(state, dict)
            and state
            and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
        ):
            return state
    there = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
    raise ValueError(
        f"checkpoint: expected a state dict in {os.fspath(path)}, itself or under {', '.join(_STATE_KEYS)}, got {there}"
    )


def _prefix(state: dict[str, torch.Tensor], model: nn.Module, path: str | os.PathLike[str]) -> str:
    """What stands before the model's own names in a state dict, as "module." or Lightning's "model."; often nothing.

    Entries without it, of a loss or a second model, are not the model's. ValueError where several prefixes would do.
    """
    names = list(model.state_dict())
    first = names[0] if names else ""
    fitting = [
        prefix
        for name in state
        if name.endswith(first)
        for prefix in [name.removesuffix(first)]
        if not prefix or prefix.endswith(".")
        if all(prefix + n in state or n.endswith("num_batches_tracked") for n in names)
    ]
    for prefix in ("", "module.", "model.", "net."):
        if prefix in fitting:
            return prefix
    if len(fitting) > 1:
        raise ValueError(f"checkpoint: {os.fspath(path)} holds the model several times, as {', '.join(fitting)}")
    if fitting:
        return fitting[0]
    shared = next((p for p in ("module.", "model.") if all(name.startswith(p) for name in state)), "")
    return shared  # it does not fit: load_state_dict says in what
