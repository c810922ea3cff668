"""``gradnorm-fast fit``: a threshold from in-distribution inputs, saved as a detector."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from . import PROG, options
from .inputs import check_output
from .parsing import Parser, Subparsers, fraction


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "fit",
        parents=[common],
        help="find the threshold from in-distribution images",
        description="Find the threshold that keeps a fraction of in-distribution images (not those of the training) "
        "and save it with the head's fingerprint. In place of images, features with --weight, or a file of scores.",
        epilog=f"examples:\n"
        f"  {PROG} fit --model resnet50 --weights DEFAULT --id val/ --tpr 0.95 --out gate.json\n"
        f"  {PROG} fit --id features.npy --weight W.npy --bias b.npy --head fc --out gate.json",
    )
    parser.add_argument("--id", nargs="+", required=True, metavar="PATH", help=f"in-distribution: {options.SETS}")
    parser.add_argument("--tpr", type=fraction, default=0.95, metavar="P", help="fraction to keep (%(default)s)")
    parser.add_argument("--out", required=True, metavar="JSON", help="the detector, for score --detector")
    options.add_options(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """A threshold from in-distribution inputs, saved as a detector."""
    from . import run_log
    from .scorers import scorer

    out = Path(args.out)
    options.check_out(out, ".json")
    check_output("out", out, [*args.id, *options.files_read(args)])
    with run_log.locked(out):
        run_log.check_progress(out, args.resume, args.restart)
        chosen = scorer(args, {"id": args.id})
        table = chosen.table("id", args.id, out)
        if table is None:
            return
        if chosen.detector is None:
            raise ValueError(
                "fit: a file of scores does not tell whose they are: expected --model and --head, or --weight"
            )
        if message := table.nan_message():
            raise ValueError(f"fit: expected finite scores, but {message}")
        chosen.detector.fit_scores(table.scores["gradnorm"], args.tpr)
        with run_log.resumable(out):
            chosen.detector.save(out)
        run_log.discard_parts(out)
    n, threshold = len(table.names), chosen.detector.threshold
    print(f"{out}: threshold {threshold:.6g} from {n} inputs keeps {100 * args.tpr:g}% of such inputs")
    if math.isinf(threshold):
        print(f"{n} inputs are too few to reject any: about {math.ceil(1 / (1 - args.tpr)) - 1} are needed")
