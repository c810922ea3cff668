"""``gradnorm-fast eval``: ID against OOD folders, as table, plots, and a JSON with what is needed to repeat it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from . import model
from .env import version_of
from .inputs import find_images
from .parsing import PROG, Parser, Subparsers, count

if TYPE_CHECKING:
    from ..detector import GradNorm
    from ..evaluation import Results
    from .tables import Table


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "eval",
        parents=[common],
        help="table and plots of one ID and several OOD folders",
        description="Tell ID from OOD folders by GradNorm and, from the same pass, MSP, MaxLogit, Energy and the "
        "feature norm: table (Markdown, CSV), plot, scores, and a JSON with what is needed to repeat it.",
        epilog=f"example: {PROG} eval --model resnet50 --weights DEFAULT --id imagenet/val \\\n"
        "    --ood places=places/ --ood textures=dtd/ --out results/",
    )
    parser.add_argument("--id", nargs="+", required=True, metavar="DIR", help="in-distribution images")
    parser.add_argument("--ood", action="append", required=True, metavar="NAME=DIR", help="may be given several times")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--bootstrap", type=count, default=0, metavar="N", help="resamples for confidence intervals")
    model.add_options(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """ID against OOD folders: table, plots, and a JSON with what is needed to repeat it."""
    from ..evaluation import compare_methods, results_table
    from .images import first_readable
    from .run_log import discard_parts, rank_and_world
    from .tables import write_table

    out = Path(args.out)
    ood = {}
    for item in args.ood:
        name, separator, folder = item.partition("=")
        if not separator or not name or not folder:
            raise ValueError(f"--ood: expected NAME=DIR, got {item!r}")
        if os.path.basename(name) != name or not name.isprintable():
            raise ValueError(f"--ood: expected a name that can be part of a file's, got {name!r}")
        if name in ood or name in ("id", "average"):
            raise ValueError(f"--ood: the name {name!r} is taken")
        ood[name] = folder
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, {out} is a file")
    sets = {"id": find_images(args.id)}
    sets |= {name: find_images([folder]) for name, folder in ood.items()}
    if find_spec("sklearn") is None or find_spec("matplotlib") is None:
        raise ImportError('eval needs scikit-learn and matplotlib: pip install "gradnorm_fast[eval]"')
    for paths in sets.values():
        first_readable(paths)
    detector, transform = model.detector_of(args, sets["id"])
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"scores-{name}.csv" for name in sets}
    tables = {}
    for name, paths in sets.items():
        if not args.quiet and rank_and_world()[0] == 0:
            print(f"{name}: {len(paths)} images", file=sys.stderr)
        table = model.score_images(args, detector, transform, paths, files[name])
        if table is not None:
            tables[name] = table
            write_table(table, files[name])
    if not tables:
        return
    scores = {name: table.head_scores() for name, table in tables.items()}
    id_scores = scores.pop("id")
    results = compare_methods(id_scores, scores, bootstrap=args.bootstrap)
    _write_evaluation(out, results, args, detector, transform, tables)
    _draw(out / "scores.png", id_scores, scores)
    for file in files.values():  # only now: an interrupted run goes on with the sets that are complete
        discard_parts(file)
    print(results_table(results))
    print(
        f"\nFPR95 with ID positive, in %. Files in {out}: table.md, table.csv, results.json, scores.png, scores-*.csv"
    )
    if results["average"]["GradNorm"]["auroc"] < 0.5:
        print("GradNorm is worse than chance here: compare the feature norm and the baselines")


def _write_evaluation(
    out: Path,
    results: Results,
    args: argparse.Namespace,
    detector: GradNorm,
    transform: Any,
    tables: dict[str, Table],
) -> None:
    from ..evaluation import results_csv, results_table

    note = "In %; FPR95: the share of OOD images accepted when 95 % of the ID images are."
    (out / "table.md").write_text(f"{results_table(results)}\n\n{note}\n", encoding="utf-8")
    (out / "table.csv").write_text(results_csv(results), encoding="utf-8")
    repeat = {
        "versions": {"gradnorm_fast": __version__}
        | {p: version_of(p) for p in ("torch", "torchvision", "scikit-learn")},
        "folder": os.getcwd(),
        "arguments": {name: value for name, value in vars(args).items() if name != "command"},
        "device": str(next(detector.model.parameters()).device),
        "preprocessing": str(transform),
        "temperature": detector.temperature,
        "reduction": detector.reduction,
        "include_bias": detector.include_bias,
        "head": detector.head_name,
        "fingerprint": detector._fingerprint(),
        "images": {name: len(table.paths) for name, table in tables.items()},
        "unreadable": {name: table.skipped for name, table in tables.items()},
        "results": results,
    }
    (out / "results.json").write_text(json.dumps(repeat, indent=1, default=str), encoding="utf-8")


def _draw(path: Path, id_scores: Any, ood_scores: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from ..evaluation import METHODS, plot_roc, plot_scores

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    field = METHODS["GradNorm"]
    outside = {name: getattr(scores, field) for name, scores in ood_scores.items()}
    plot_scores(getattr(id_scores, field), outside, left, xlabel="GradNorm (larger = more in-distribution)")
    plot_roc(getattr(id_scores, field), outside, right)
    figure.savefig(path, dpi=120)
    plt.close(figure)
