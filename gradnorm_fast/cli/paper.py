"""``gradnorm-fast paper``: Table 1 and the ablations of the GradNorm paper, as a preset of ``eval``."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import replacing
from . import PROG, eval, options, plan, report
from .parsing import Parser, Subparsers, count

if TYPE_CHECKING:
    from ..evaluation import Results

SETS = {"inaturalist": "iNaturalist", "sun": "SUN", "places": "Places", "textures": "Textures"}
ROWS = ("MSP", "ODIN", "Mahalanobis", "Energy", "GradNorm")  # of Table 1
# FPR95 and AUROC in % that Huang, Geng & Li (NeurIPS 2021) give for ImageNet as ID and BiT-S R101x1: of each set, or
# averages over the four alone.
PUBLISHED = {
    "MSP": {"average": (76.96, 79.29)},
    "Energy": {"average": (71.03, 82.74)},
    "GradNorm": {
        "iNaturalist": (50.03, 90.33),
        "SUN": (46.48, 89.03),
        "Places": (60.86, 84.82),
        "Textures": (61.42, 81.07),
        "average": (54.70, 86.31),
    },
}
UNKNOWN = (math.nan, math.nan)


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "paper",
        parents=[common],
        help="Table 1 and the ablations of the GradNorm paper",
        description="Score ImageNet and the four OOD sets of the GradNorm paper. Lays the results out as its Table 1, "
        "the published figures beside them, with the ablations over norms, temperatures, factors and, for images, "
        "layers. It is `eval` with the paper's settings and the official code's metrics; --limit N takes a first look.",
        epilog="examples:\n"
        f"  {PROG} paper --checkpoint BiT-S-R101x1.npz --imagenet imagenet/val --inaturalist iNaturalist/ \\\n"
        "    --sun SUN/ --places Places/ --textures dtd/images --train imagenet/train --out paper/\n"
        f"  {PROG} paper --model resnet50 --weights DEFAULT --imagenet imagenet/val --textures dtd/images \\\n"
        "    --limit 500 --out look/",
    )
    parser.add_argument("--imagenet", nargs="+", required=True, metavar="PATH", help=f"ID images: {options.IMAGES}")
    for name, shown in SETS.items():
        parser.add_argument(f"--{name}", metavar="PATH", help=f"OOD images: {shown}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--bootstrap", type=count, default=0, metavar="N", help="resamples for confidence intervals")
    report.add_option(parser)
    plan.add_options(parser)
    options.add_options(parser)
    parser.set_defaults(command=run, methods=None, baselines=list(plan.BASELINES))


def run(args: argparse.Namespace) -> int:
    """Table 1 and the ablations of the GradNorm paper."""
    from ..evaluation import results_table
    from ..models import BIT
    from .run_log import resumable

    if args.model is None and args.weight is None:
        args.model = BIT
    if args.model == BIT and args.checkpoint is None:
        raise ValueError(
            f"checkpoint: {BIT} needs its published weights, --checkpoint BiT-S-R101x1.npz (from the Big Transfer "
            "authors) or the GradNorm authors' .pth.tar; or give another --model"
        )
    args.id, args.near, args.far, args.convention = args.imagenet, [], [], "official"
    args.ood = [f"{shown}={path}" for name, shown in SETS.items() if (path := getattr(args, name)) is not None]
    if not args.ood:
        raise ValueError(f"paper: expected at least one OOD set, by {', '.join(f'--{name}' for name in SETS)}")
    if args.ablation is None:  # features have no gradients of other layers
        args.ablation = [part for part in plan.PARTS if part != "layers" or args.weight is None]
    args.folder_labels = _in_class_folders(args.imagenet)
    outcome = eval.evaluate_sets(args)
    if outcome is None:  # another process writes
        return 0
    same_network = args.model == BIT
    results, rows = beside_published(outcome.results, same_network)
    table = results_table(results, rows)
    note = "In %, as the official code computes it. Published: Huang, Geng & Li (NeurIPS 2021), Table 1, BiT-S R101x1"
    note += "." if same_network else f"; this is another network, {args.model or args.weight}."
    if args.limit is not None:
        note += f" At most {args.limit} images of each set: a first look."
    with resumable(Path(args.out)), replacing(Path(args.out) / "table1.md", encoding="utf-8") as file:
        file.write(f"{table}\n\n{' '.join([note, *outcome.notes])}\n")
    eval.show(args, outcome)
    print(f"\nTable 1, also in {Path(args.out) / 'table1.md'}:\n\n{table}\n\n{note}")
    return 0


def beside_published(results: Results, same_network: bool) -> tuple[Results, list[str]]:
    """Our results and the published ones, and the names of the rows in the order of Table 1."""
    sets = [name for name in SETS.values() if name in results]
    columns = [*sets, "average"] if len(sets) == len(SETS) else sets  # an average over other sets says nothing
    merged, rows = {name: dict(results[name]) for name in [*sets, "average"]}, []
    for method in ROWS:
        rows += [method] if method in results["average"] else []
        published = {name: PUBLISHED.get(method, {}).get(name, UNKNOWN) for name in columns}
        if all(figures is UNKNOWN for figures in published.values()):
            continue
        mark = f"{method}, published" + ("" if same_network else " (another network)")
        rows.append(mark)
        for name, column in merged.items():
            fpr95, auroc = published.get(name, UNKNOWN)
            column[mark] = {"fpr95": fpr95 / 100, "auroc": auroc / 100}
    return merged, rows


def _in_class_folders(sources: list[str]) -> bool:
    """Whether the images are one folder with a folder for each class, as torchvision's ImageFolder."""
    if len(sources) != 1 or not os.path.isdir(sources[0]):
        return False
    from .inputs import find_inputs, labelled_if_in_folders

    return all(item.label is not None for item in labelled_if_in_folders(find_inputs(sources), sources[0]))
