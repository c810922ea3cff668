"""torch.autocast: whether it is on for a device, in which dtype, and how to do without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasting(device: torch.device) -> bool:
    """Whether torch.autocast is on for this device."""
    kind = device.type  # torch makes the string anew each time
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast_in_force(device: torch.device) -> str:
    """The dtype that torch.autocast has this device compute in, as "bfloat16", or "off"."""
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if autocasting(device) else "off"


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which torch.autocast is off for this device."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else nullcontext()
