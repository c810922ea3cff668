"""The file of a saved detector: what it was fitted to, and whether a model is still that."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import replacing

SCORES = ("gradnorm", "feature_norm", "output_norm", "msp", "max_logit", "energy")  #: fields of HeadScores to gate by
FORMAT = 2
AUTOCASTS = ("off", "bfloat16", "float16", "float32")  #: what torch.autocast may have a model compute in
_HALVES = (torch.bfloat16, torch.float16)
_HEX = 16  # digits of a tensor's digest


@dataclass(frozen=True)
class Gate:
    """The contents of a gate file. Format 1 has no preprocessing and only the head of the model."""

    head: str | None  #: None: scored by layers
    options: dict[str, Any]  #: of GradNorm: score, temperature, reduction, include_bias
    tpr: float
    calibration: list[float] | None  #: None: not fitted
    preprocessing: str | None  #: None: unknown
    tensors: dict[str, dict[str, Any]] | None  #: by `describe_tensors`; None: unknown, as in format 1
    head_digest: str | None = None  #: where the head is all that is known
    version: int = FORMAT  #: of the file
    layers: str | list[str] | None = None  #: "all", "head" or names of modules; None: scored by the head
    autocast: str | None = None  #: one of AUTOCASTS; None: unknown


def write(gate: Gate, path: str | os.PathLike[str]) -> None:
    """As JSON, whole or not at all; through a symbolic link into the file it points to."""
    state = {
        "format": FORMAT,
        "head": gate.head,
        "layers": gate.layers,
        **gate.options,
        "tpr": gate.tpr,
        "calibration": gate.calibration,
        "preprocessing": gate.preprocessing,
        "autocast": gate.autocast,
        "tensors": gate.tensors,
    }
    if gate.head_digest is not None:
        state["fingerprint"] = gate.head_digest
    with replacing(path, encoding="utf-8") as file:
        json.dump(state, file, allow_nan=False)


def read(path: str | os.PathLike[str]) -> Gate:
    """ValueError with the file and the key where it is no such file; OSError where it cannot be read."""
    content = Path(path).read_bytes()
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: expected a detector saved by GradNorm.save, got something else ({reason})") from None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f'{path}: expected a detector saved by GradNorm.save, an object with the key "format"')
    get = _Keys(path, state)
    number = state["format"]
    if type(number) is not int or number not in (1, FORMAT):
        newer = "; it is written by a newer gradnorm_fast" if type(number) is int and number > FORMAT else ""
        raise ValueError(f'{path}: "format": expected 1 or {FORMAT}, got {_short(number)}{newer}')
    options = {"temperature": get.number("temperature"), "include_bias": get.of_type("include_bias", bool)}
    options["reduction"] = get.one_of("reduction", ("mean", "sum"))
    options["score"] = get.one_of("score", SCORES) if number > 1 else "gradnorm"
    tpr = get.number("tpr")
    if not 0 < tpr < 1:
        raise get.wrong("tpr", "a fraction between 0 and 1")
    head_alone = number == 1 or ("tensors" in state and state["tensors"] is None and "fingerprint" in state)
    layers = get.layers() if number > 1 else None
    autocast = get.one_of("autocast", AUTOCASTS) if state.get("autocast") is not None else None
    return Gate(
        get.of_type("head", str if layers is None else type(None)),
        options,
        tpr,
        get.calibration(),
        get.of_type("preprocessing", str, type(None)) if number > 1 else None,
        None if head_alone else get.tensors(),
        get.of_type("fingerprint", str) if head_alone else None,
        number,
        layers,
        autocast,
    )


class _Keys:
    """The keys of a file, each of the type it has to have."""

    def __init__(self, path: str | os.PathLike[str], state: dict[str, Any]) -> None:
        self.path, self.state = path, state

    def wrong(self, key: str, expected: str) -> ValueError:
        got = _short(self.state[key]) if key in self.state else "no such key"
        return ValueError(f'{self.path}: "{key}": expected {expected}, got {got}')

    def of_type(self, key: str, *types: type) -> Any:
        if key not in self.state or type(self.state[key]) not in types:
            raise self.wrong(key, " or ".join(_JSON_NAMES[t] for t in types))
        return self.state[key]

    def one_of(self, key: str, values: tuple[str, ...]) -> str:
        if not isinstance(self.state.get(key), str) or self.state[key] not in values:
            raise self.wrong(key, f"one of {', '.join(values)}")
        return str(self.state[key])

    def number(self, key: str) -> float:
        value = _finite(self.state.get(key))
        if value is None:
            raise self.wrong(key, "a finite number")
        return value

    def layers(self) -> str | list[str] | None:
        layers = self.state.get("layers")
        named = isinstance(layers, list) and layers and all(isinstance(name, str) for name in layers)
        if layers not in (None, "all", "head") and not named:
            raise self.wrong("layers", 'null, "all", "head" or names of modules')
        return layers

    def calibration(self) -> list[float] | None:
        scores = self.of_type("calibration", list, type(None))
        if scores is None:
            return None
        if not scores:
            raise self.wrong("calibration", "null or at least one score")
        numbers = [_finite(score) for score in scores]
        for i, number in enumerate(numbers):
            if number is None:
                raise ValueError(
                    f'{self.path}: "calibration": expected finite float32 scores, got {_short(scores[i])} at {i}'
                )
        return numbers  # type: ignore[return-value]

    def tensors(self) -> dict[str, dict[str, Any]]:
        tensors: dict[str, dict[str, Any]] = self.of_type("tensors", dict)
        for name, entry in tensors.items():
            good = (
                isinstance(entry, dict)
                and isinstance(entry.get("shape"), list)
                and isinstance(getattr(torch, str(entry.get("dtype")), None), torch.dtype)
                and isinstance(entry.get("persistent"), bool)
                and all(isinstance(entry.get(str(d).removeprefix("torch.")), str) for d in (torch.float32, *_HALVES))
            )
            if not good:
                expected = f"shape, dtype and digests of {name!r}"
                raise ValueError(f'{self.path}: "tensors": expected {expected}, got {_short(entry)}')
        return tensors


_JSON_NAMES = {str: "a string", bool: "true or false", list: "a list", dict: "an object", type(None): "null"}


def _finite(value: object) -> float | None:
    """As a float, if it is a number and finite in float32."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None
    return number if abs(number) <= torch.finfo(torch.float32).max else None


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer too long to print
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


def check_autocast(autocast: object) -> None:
    if autocast is not None and (not isinstance(autocast, str) or autocast not in AUTOCASTS):
        raise ValueError(f"autocast: expected None or one of {', '.join(AUTOCASTS)}, got {autocast!r}")


# Which model


def describe_tensors(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape, dtype and digest of the values as float32, for each parameter and floating-point buffer by name.

    Digests of the values rounded to each half precision identify the same model in another dtype. Device, layout and
    integers (counters) do not matter.
    """
    return {name: _describe(tensor, persistent) for name, tensor, persistent in _tensors(model)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether it is more than a cache (a buffer that is left out of the state dict)."""
    caches = {
        (f"{prefix}." if prefix else "") + name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            if nn.parameter.is_lazy(tensor) or tensor.is_meta:
                raise ValueError(f"model: expected values in {name!r}, it has none yet")
            if tensor.is_floating_point():
                yield name.replace("_orig_mod.", ""), tensor.detach(), name not in caches


def _describe(tensor: Tensor, persistent: bool) -> dict[str, Any]:
    digests = {_name(d): _digest(tensor, d) for d in (torch.float32, *_HALVES)}
    return {"shape": list(tensor.shape), "dtype": _name(tensor.dtype), "persistent": persistent, **digests}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(tensor: Tensor, rounded_to: torch.dtype = torch.float32) -> str:
    values = tensor.to(rounded_to).to("cpu", torch.float32).contiguous()
    return hashlib.sha256(values.reshape(-1).numpy().data).hexdigest()[:_HEX]


def head_digest(weight: Tensor, bias: Tensor | None) -> str:
    """Digest of the head only, as in format 1."""
    digest = hashlib.sha256()
    for tensor in (weight, bias):
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def differences(saved: dict[str, dict[str, Any]], model: nn.Module) -> tuple[list[str], list[str]]:
    """In which tensors a model is another than the saved one, in words; and the names of those equal after rounding."""
    different: list[str] = []
    rounded: list[str] = []
    here = {name: (tensor, persistent) for name, tensor, persistent in _tensors(model)}
    for name, entry in saved.items():
        if name not in here:
            if entry["persistent"]:  # a cache may be filled or not
                different.append(f"{name} is missing")
            continue
        tensor, _ = here[name]
        if list(tensor.shape) != entry["shape"]:
            different.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(entry['shape'])}")
        elif _digest(tensor) != entry["float32"]:
            then, now = getattr(torch, entry["dtype"]), tensor.dtype
            narrowed = now in _HALVES and _digest(tensor) == entry[_name(now)]
            widened = then in _HALVES and now != then and _digest(tensor, then) == entry["float32"]
            (rounded if narrowed or widened else different).append(name)
    different += [f"{name} is new" for name, (_, persistent) in here.items() if persistent and name not in saved]
    return different, rounded


def describe_preprocessing(preprocessing: object) -> str | None:
    """A description of a transform; None if its text does not say what it does, as for a lambda."""
    if preprocessing is None or isinstance(preprocessing, str):
        return preprocessing
    text = re.sub(r"\s+", " ", repr(preprocessing))
    return None if re.search(r" at 0x[0-9a-fA-F]+|<function|<lambda>", text) else text


def at_most(items: list[str], n: int = 3) -> str:
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")
