"""``gradnorm-fast fit``: a threshold from in-distribution inputs, saved as a detector."""

from __future__ import annotations

import argparse
import math
import sys
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
        "and save it with digests of the model or head. Instead of images: features with --weight, or a score file.",
        epilog=f"examples:\n"
        f"  {PROG} fit --model resnet50 --weights DEFAULT --id val/ --tpr 0.95 --out gate.json\n"
        f"  {PROG} fit --model resnet50 --weights DEFAULT --id val/ --ood textures/ --score auto --out gate.json\n"
        f"  {PROG} fit --id features.npy --weight W.npy --bias b.npy --head fc --out gate.json",
    )
    parser.add_argument("--id", nargs="+", required=True, metavar="PATH", help=f"in-distribution: {options.SETS}")
    parser.add_argument(
        "--ood",
        nargs="+",
        metavar="PATH",
        help="out-of-distribution, for --score auto: the score that tells them apart best",
    )
    parser.add_argument("--tpr", type=fraction, default=0.95, metavar="P", help="fraction to keep (%(default)s)")
    parser.add_argument("--out", required=True, metavar="JSON", help="the detector, for score --detector")
    options.add_options(parser, gates=True)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """A threshold from in-distribution inputs, saved as a detector."""
    from ..diagnosis import diagnose
    from . import run_log
    from .scorers import save_gate, scorer

    out = Path(args.out)
    options.check_out(out, ".json")
    check_output("out", out, [*args.id, *(args.ood or ()), *options.files_read(args)])
    if (args.score == "auto") != (args.ood is not None):
        raise ValueError("score: expected --score auto and --ood together: the score is chosen by what it tells apart")
    sets = {"id": args.id} if args.ood is None else {"id": args.id, "ood": args.ood}
    files = {name: out if name == "id" else out.with_name(f"{out.stem}-{name}.json") for name in sets}
    with run_log.locked(out):
        for file in files.values():
            run_log.check_progress(file, args.resume, args.restart)
        chosen = scorer(args, sets)
        tables = {}
        for name, sources in sets.items():
            table = chosen.table(name, sources, files[name])
            if table is not None:
                tables[name] = table
        if not tables:  # another process writes
            return
        detector = chosen.detector
        if detector is None:
            raise ValueError(
                "fit: a file of scores does not say which model made it: add --model and --head, or --weight"
            )
        for name, table in tables.items():
            if message := table.nan_message(detector.score_name):
                raise ValueError(f"fit: expected finite scores, but in {name} {message}")
        if args.score == "auto":
            found = diagnose(tables["id"].head_scores(), tables["ood"].head_scores())
            print(found)
            assert found.best is not None
            detector.score_name = found.best
        detector.fit_scores(tables["id"].scores[detector.score_name], args.tpr, autocast=chosen.autocast)
        with run_log.resumable(out):
            save_gate(detector, out)
        for file in files.values():
            run_log.discard_parts(file)
    if detector.preprocessing is None:
        print(f"note: {out} does not know the preprocessing: `score` cannot compare it", file=sys.stderr)
    n, threshold = len(tables["id"].names), detector.threshold
    print(f"{out}: {detector.score_name} of {threshold:.6g}, from {n} inputs, keeps {100 * args.tpr:g}% of such inputs")
    if math.isinf(threshold):
        print(f"{n} inputs are too few to reject any: about {math.ceil(1 / (1 - args.tpr)) - 1} are needed")
