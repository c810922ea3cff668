"""The command ``gradnorm-fast``: one module per subcommand, each with its parser, its checks and its work.

A subcommand raises ValueError, OSError or ImportError for what the user can put right; `main` prints those, and
anything else, as one line. Modules that need torch are imported when a command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parsing import Parser

PROG = "gradnorm-fast"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 user error, 130 interrupted."""
    debug = False
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that has no arrows is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        args = _build_parser().parse_args(
            argv
        )  # imports are inside the try: Ctrl-C during one must also end in one line
        debug = "debug" in args
        _check_environment()
        return args.command(args) or 0
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # also what the user's own model raises
        if debug:
            raise
        foreseen = isinstance(error, ValueError | TypeError | OSError | ImportError)
        reason = str(error) if foreseen else f"{type(error).__name__}: {error} (--debug shows where)"
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}"
        print(f"{PROG}: error: {' '.join(reason.split())}", file=sys.stderr)
        return 2 if foreseen else 1


def _build_parser() -> Parser:
    import argparse

    from .. import __version__
    from . import bench, demo, env, eval, fit, paper, score
    from .parsing import Parser

    # --debug may stand before or after the subcommand; SUPPRESS keeps the subcommand's default from overwriting it.
    common = Parser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = Parser(
        prog=PROG,
        description="GradNorm out-of-distribution scores from features and a linear head, without backpropagation.",
        epilog=f"example: {PROG} demo --output gradnorm_demo.png",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for subcommand in (score, eval, paper, fit, demo, env, bench):
        subcommand.add_parser(subparsers, common)
    return parser


def _check_environment() -> None:
    """Refuse a misspelt switch, which would have no effect; ValueError."""
    import os

    from .._switches import SWITCHES, switch

    for name in os.environ:
        if name.startswith("GRADNORM_FAST_"):
            if name not in SWITCHES:
                raise ValueError(f"{name}: unknown environment variable; known: {', '.join(SWITCHES)}")
            switch(name)
