"""``gradnorm-fast demo``: GradNorm beside other scores, on handwritten digits or on photographs."""

from __future__ import annotations

import argparse

from .parsing import PROG, Parser, Subparsers


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
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    from .. import demo, demo_imagenet

    if args.images and not args.imagenet:
        raise ValueError("images: they go with --imagenet")
    if args.imagenet:
        demo_imagenet.run(args.output or "gradnorm_imagenet.png", args.images, args.device)
    else:
        demo.run(args.output or "gradnorm_demo.png", args.device, args.seed)
