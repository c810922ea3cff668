"""``gradnorm-fast score``: scores of images, or of rows of features, into a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import model
from .inputs import find_images
from .parsing import PROG, Parser, Subparsers, finite, refuse

if TYPE_CHECKING:
    from .tables import Table


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "score",
        parents=[common],
        help="score images by a model, or features by a head",
        description="Score images by a model, or features by a head, into a CSV, NPY or Parquet file with one row per "
        "input. Rows are kept as they come: an interrupted run goes on with --resume. Under torchrun each process "
        "takes its share.",
        epilog="examples:\n"
        f"  {PROG} score --model resnet50 --weights DEFAULT --images photos/ --out scores.csv\n"
        f"  {PROG} score --features F.npy --weight W.npy --bias b.npy --out scores.npy\n"
        f"  torchrun --nproc-per-node=4 -m gradnorm_fast score --model resnet50 --weights DEFAULT --images photos/ \\\n"
        "    --detector gate.json --out scores.csv --resume",
    )
    parser.add_argument("--images", nargs="+", metavar="DIR", help="folders, searched through, or image files")
    parser.add_argument("--features", metavar="NPY", help="(N, D), in place of a model and images; may exceed memory")
    parser.add_argument("--weight", metavar="NPY", help="(C, D)")
    parser.add_argument("--bias", metavar="NPY", help="(C,)")
    parser.add_argument("--out", required=True, metavar="FILE", help=".csv, .npy or .parquet")
    parser.add_argument("--detector", metavar="JSON", help="from `fit`: adds is_ood")
    parser.add_argument("--threshold", type=finite, metavar="S", help="adds is_ood: a score below S")
    model.add_options(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Scores of images, or of rows of features, into a file."""
    from .run_log import discard_parts
    from .tables import check_suffix, write_table

    out = Path(args.out)
    check_suffix(out)
    model.check_out(out)
    if (args.features is None) == (args.images is None):
        raise ValueError("score: expected --images with --model, or --features with --weight")
    threshold = args.threshold
    if args.features is not None:
        refuse(
            args, "--features", "model", "weights", "checkpoint", "classes", "head", "resize", "mean", "std", "detector"
        )
        table = _score_features(args, out)
    else:
        refuse(args, "--images", "weight", "bias")
        if args.detector is not None:
            refuse(args, "--detector", "threshold", "head", *model.SCORE_OPTIONS)
        paths = find_images(args.images)
        detector, transform = model.detector_of(args, paths)
        if args.detector is not None:
            threshold = detector.threshold
        table = model.score_images(args, detector, transform, paths, out)
    if table is None:  # another process writes
        return
    scores = table.scores["gradnorm"]
    is_ood = None if threshold is None else ~(scores >= threshold)
    write_table(table, out, is_ood)
    discard_parts(out)
    print(f"{out}: {len(table.paths)} scored" + (f", {len(table.skipped)} unreadable" if table.skipped else ""))
    if is_ood is not None:
        print(f"{int(is_ood.sum())} of {len(is_ood)} below the threshold {threshold:.6g}")


def _score_features(args: argparse.Namespace, out: Path) -> Table | None:
    import numpy as np
    import torch

    from .features import load_array, score_features

    if args.weight is None:
        raise ValueError("weight: expected --weight W.npy with --features")
    features = load_array("features", args.features, mapped=True)
    weight = torch.from_numpy(np.array(load_array("weight", args.weight)))
    bias = None if args.bias is None else torch.from_numpy(np.array(load_array("bias", args.bias)))
    if features.ndim != 2:
        raise ValueError(f"features: expected shape (N, D) in {args.features}, got {features.shape}")
    if bias is not None:
        bias = bias.to(weight.dtype)
    return score_features(
        features,
        weight,
        bias,
        out,
        batch_size=max(args.batch_size, 1024),
        resume=args.resume,
        progress=not args.quiet,
        device=model.device_of(args.device),
        **model.score_options(args),
    )
