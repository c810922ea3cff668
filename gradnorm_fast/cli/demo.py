"""``gradnorm-fast demo``: a small network on real images, GradNorm beside other scores, in seconds."""

from __future__ import annotations

import argparse

from . import PROG
from .parsing import Parser, Subparsers


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "demo",
        parents=[common],
        help="train a small network on handwritten digits and score several OOD sets",
        description="Train a small network on the handwritten digits 0-6, score four OOD sets (digits 7-9, inverted "
        "digits, photograph patches, noise) with GradNorm and three other scores, and draw the result. Takes seconds.",
        epilog=f"example: {PROG} demo --output gradnorm_demo.png --device cpu --seed 0",
    )
    parser.add_argument("--output", default="gradnorm_demo.png", metavar="PNG", help="picture to write (%(default)s)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    from .. import demo

    demo.run(output=args.output, device=args.device, seed=args.seed)
