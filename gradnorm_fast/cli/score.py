"""``gradnorm-fast score``: scores of images, or of rows of features, into a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import PROG, options, report
from .inputs import check_output
from .parsing import Parser, Subparsers, finite, refuse


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "score",
        parents=[common],
        help="score images by a model, or features by a head",
        description="Score images by a model, or features by a head, into a CSV, NPY or Parquet file with one row per "
        "input: GradNorm, its two factors, the usual baselines and the prediction. Rows are kept as they come: an "
        "interrupted run goes on with --resume. Under torchrun each process takes its share.",
        epilog="examples:\n"
        f"  {PROG} score --model resnet50 --weights DEFAULT --images photos/ --out scores.csv\n"
        f"  {PROG} score --features F.npy --weight W.npy --bias b.npy --out scores.npy\n"
        f"  find photos -name '*.jpg' | {PROG} score --model resnet50 --weights DEFAULT --images - --out scores.csv\n"
        f"  torchrun --nproc-per-node=4 -m gradnorm_fast score --model resnet50 --weights DEFAULT --images photos/ \\\n"
        "    --detector gate.json --out scores.csv --resume",
    )
    parser.add_argument("--images", nargs="+", metavar="PATH", help=options.IMAGES)
    parser.add_argument("--features", metavar="NPY", help="(N, D), in place of a model and images; may exceed memory")
    parser.add_argument("--out", required=True, metavar="FILE", help=".csv, .npy or .parquet")
    parser.add_argument("--detector", metavar="JSON", help="from `fit`: adds is_ood")
    parser.add_argument("--force", action="store_true", help="use it for another model or preprocessing too")
    parser.add_argument("--threshold", type=finite, metavar="S", help="adds is_ood: a score below S")
    parser.add_argument("--save-features", metavar="NPY", help="write what the head is given, (N, D), of each row")
    report.add_option(parser)
    options.add_options(parser, gates=True)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Scores of images, or of rows of features, into a file."""
    from . import run_log
    from .scorers import HeadScorer, ModelScorer
    from .tables import check_format, write_table

    out = Path(args.out)
    check_format(out)
    options.check_out(out)
    if (args.features is None) == (args.images is None):
        raise ValueError("score: expected --images with --model, or --features with --weight")
    if args.score == "auto":
        raise ValueError("score: auto is for fit alone, which has OOD images to choose by; name a score")
    if args.features is not None:
        refuse(args, "--features", "head", *options.MODEL_OPTIONS)
    if args.detector is not None:
        refuse(args, "--detector", "threshold", "head", "layers", "score", *options.SCORE_OPTIONS)
    read = [*(args.images or ()), args.features, *options.files_read(args)]
    check_output("out", out, read)
    features = None if args.save_features is None else Path(args.save_features)
    if features is not None:
        refuse(args, "--save-features", "features", "layers")
        options.check_out(features, ".npy", option="save-features")
        check_output("save-features", features, [*read, out])
    report.check(args, [*read, out, features])
    with run_log.locked(out):
        run_log.check_progress(out, args.resume, args.restart)
        sources = args.images or [args.features]
        scorer = HeadScorer(args) if args.images is None else ModelScorer(args, {"images": sources})
        if isinstance(scorer, ModelScorer):
            check_format(out, [item.name for item in scorer.inputs["images"]])
        threshold = args.threshold if args.detector is None else scorer.detector.threshold
        table = scorer.table("images", sources, out, features)
        if table is None:  # another process writes
            return 0
        score = scorer.detector.score_name
        scores = table.scores[score]
        is_ood = None if threshold is None else ~(scores >= threshold)
        with run_log.resumable(out):
            write_table(table, out, is_ood)
            report.write(args, scorer, {"images": table}, score=score, threshold=threshold)
        run_log.discard_parts(out)
    print(f"{out}: {len(table.names)} scored" + (f", {len(table.skipped)} unreadable" if table.skipped else ""))
    if is_ood is not None:
        print(f"{int(is_ood.sum())} of {len(is_ood)} below the threshold {threshold:.6g} of {score}")
    return options.report_nan(table, args.strict, score)
