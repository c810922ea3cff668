"""``gradnorm-fast fit``: a threshold from in-distribution images, saved as a detector."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from . import model
from .inputs import find_images
from .parsing import PROG, Parser, Subparsers


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "fit",
        parents=[common],
        help="find the threshold from in-distribution images",
        description="Find the threshold that keeps a fraction of in-distribution images (not those of the training) "
        "and save it with the head's fingerprint.",
        epilog=f"example: {PROG} fit --model resnet50 --weights DEFAULT --id val/ --tpr 0.95 --out gate.json",
    )
    parser.add_argument("--id", nargs="+", required=True, metavar="DIR", help="in-distribution images")
    parser.add_argument("--tpr", type=float, default=0.95, metavar="P", help="fraction to keep (%(default)s)")
    parser.add_argument("--out", required=True, metavar="JSON", help="the detector, for score --detector")
    model.add_options(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """A threshold from in-distribution images, saved as a detector."""
    from ..detector import check_tpr
    from .run_log import discard_parts

    out = Path(args.out)
    model.check_out(out)
    check_tpr(args.tpr)
    paths = find_images(args.id)
    detector, transform = model.detector_of(args, paths)
    table = model.score_images(args, detector, transform, paths, out)
    if table is None:
        return
    detector.fit_scores(table.scores["gradnorm"], args.tpr)
    detector.save(out)
    discard_parts(out)
    n = len(table.paths)
    print(f"{out}: threshold {detector.threshold:.6g} from {n} images keeps {100 * args.tpr:g}% of such images")
    if math.isinf(detector.threshold):
        print(f"{n} images are too few to reject any: about {math.ceil(1 / (1 - args.tpr)) - 1} are needed")
