"""``gradnorm-fast demo``: GradNorm beside other scores, on handwritten digits or on photographs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import PROG
from .parsing import Parser, Subparsers


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "demo",
        parents=[common],
        help="GradNorm beside other scores, on handwritten digits or on photographs",
        description="Train a small network on the handwritten digits 0-6, score four OOD sets (digits 7-9, inverted "
        "digits, photograph patches, noise) with GradNorm and four other scores, and draw the result. Takes seconds. "
        "With --imagenet a network trained on ImageNet scores photographs, yours too.",
        epilog=f"examples:\n  {PROG} demo --output gradnorm_demo.png\n  {PROG} demo --imagenet --images photos/",
    )
    parser.add_argument("--imagenet", action="store_true", help="photographs (pip install 'gradnorm_fast[imagenet]')")
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="with --imagenet: your images, folders")
    parser.add_argument("--output", metavar="PNG", help="picture to write (gradnorm_demo.png, gradnorm_imagenet.png)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the digits' split, training and noise (0)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    if args.images and not args.imagenet:
        raise ValueError("images: only with --imagenet")
    if args.seed is not None and args.imagenet:
        raise ValueError("seed: it cannot be combined with --imagenet, where nothing is random")
    from .. import demo, demo_imagenet
    from ..models import device_of
    from .inputs import check_output

    device = device_of(args.device)
    if args.imagenet:
        output = args.output or "gradnorm_imagenet.png"
        check_output("output", output, args.images)
        demo_imagenet.run(output, _read(args.images), device)
    else:
        demo.run(args.output or "gradnorm_demo.png", device, args.seed or 0)


def _read(sources: list[str]) -> dict[str, Any]:
    """Every image that can be read, by its name; the others are named on standard error."""
    from .images import read_image
    from .inputs import find_inputs

    images = {}
    for item in find_inputs(sources) if sources else []:
        try:
            images[item.name] = read_image(item)
        except ValueError as error:
            print(f"skipped {item.name}: {error}", file=sys.stderr)
    return images
