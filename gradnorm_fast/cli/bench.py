"""``gradnorm-fast bench``: the benchmark suite of the repository, which is not part of the package."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from . import PROG
from .parsing import Parser, Subparsers


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "bench",
        parents=[common],
        help="the benchmark suite (in a clone of the repository)",
        description="Hands what follows over to benchmarks/compare.py.",
        epilog=f"example: {PROG} bench -- --workload x1000",
    )
    parser.add_argument("rest", nargs="*", metavar="OPTION", help="of benchmarks/compare.py, after --")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks/compare.py"
    if not script.exists():
        raise ValueError("bench: the benchmarks are in the repository, not in the package; clone it and run make bench")
    code = subprocess.run([sys.executable, str(script), *args.rest]).returncode
    if code:
        raise ValueError(f"bench: compare.py ended with exit code {code}")
