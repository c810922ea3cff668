"""The command ``gradnorm-fast``.

Each subcommand is one function, listed in `_SUBCOMMANDS`, that adds its parser and says what to run. What it runs
raises ValueError, OSError or ImportError for what the user can put right; `main` turns those into one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from . import __version__

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction["_Parser"]

_PROG = "gradnorm-fast"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 user error, 130 interrupted."""
    debug = False
    try:
        args = _build_parser().parse_args(argv)
        debug = "debug" in args
        args.command(args)
    except KeyboardInterrupt:
        print(f"{_PROG}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"{_PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Leave the reporting to `main`: one line, where argparse would print the usage as well."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def _add_demo(subparsers: Subparsers, common: _Parser) -> None:
    def command(args: argparse.Namespace) -> None:
        from . import demo

        demo.run(output=args.output, device=args.device, seed=args.seed)

    parser = subparsers.add_parser(
        "demo",
        parents=[common],
        help="train a small network on handwritten digits and score several OOD sets",
        description="Train a small network on the handwritten digits 0-6, score four OOD sets (digits 7-9, inverted "
        "digits, photograph patches, noise) with GradNorm and three other scores, and draw the result. Takes seconds.",
        epilog=f"example: {_PROG} demo --output gradnorm_demo.png --device cpu --seed 0",
    )
    parser.add_argument("--output", default="gradnorm_demo.png", metavar="PNG", help="picture to write (%(default)s)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    parser.set_defaults(command=command)


_SUBCOMMANDS = (_add_demo,)


def _build_parser() -> _Parser:
    # --debug may stand before or after the subcommand; SUPPRESS keeps the subcommand's default from overwriting it.
    common = _Parser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = _Parser(
        prog=_PROG,
        description="GradNorm out-of-distribution scores from features and a linear head, without backpropagation.",
        epilog=f"example: {_PROG} demo --output gradnorm_demo.png",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(subparsers, common)
    return parser
