"""Environment variables that switch something on: "1" is on; "0", nothing, or not set is off."""

import os

SWITCHES = ("GRADNORM_FAST_BATCH_INVARIANT",)


def switch(name: str) -> bool:
    """Whether it is on; ValueError for another value."""
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        raise ValueError(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"
