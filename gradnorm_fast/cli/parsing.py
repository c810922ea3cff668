"""The argument parser that all subcommands share, and the types of their options."""

from __future__ import annotations

import argparse
import math
import textwrap
from typing import Any, NoReturn, TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Keeps the lines of the epilog, so that the examples can be copied."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.description = self.description and textwrap.fill(self.description, 80)

    def error(self, message: str) -> NoReturn:
        """Leave the reporting to `main`: one line, where argparse would print the usage as well."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> int:
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("expected a whole number above 0, got 0")
    return value


def count(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:  # 64 bits
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text[:40]!r}")
    return int(text)


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def fraction(text: str) -> float:
    value = finite(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, as 0.95, got {text!r}")
    return value


def refuse(args: argparse.Namespace, given: str, *names: str) -> None:
    """Refuse options that would have no effect beside the one that was given."""
    for name in names:
        if getattr(args, name) is not None:
            hint = " (pretrained weights are --weights)" if name == "weight" else ""
            raise ValueError(f"{name}: it cannot be combined with {given}{hint}")
