"""``gradnorm-fast eval``: ID against OOD sets, as table, plots, and a JSON with what is needed to repeat it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .._files import replacing
from . import PROG, options, report
from .env import version_of
from .inputs import check_output
from .parsing import Parser, Subparsers, count

if TYPE_CHECKING:
    from ..evaluation import Results
    from .scorers import Scorer
    from .tables import Table

_GROUPS = ("near", "far")  # of OOD sets, as OpenOOD has them


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "eval",
        parents=[common],
        help="table and plots of one ID and several OOD sets",
        description="Tell ID from OOD sets by GradNorm and, from the same pass, MSP, MaxLogit, Energy and the feature "
        "norm: table (Markdown, CSV), plot, scores, and a JSON with what is needed to repeat it. A set is images, "
        "features (.npy, with --weight), or a file that `score` wrote.",
        epilog="examples:\n"
        f"  {PROG} eval --model resnet50 --weights DEFAULT --id imagenet/val --near ssb=ssb_hard/ \\\n"
        "    --far places=places/ --far textures=dtd/ --out results/\n"
        f"  {PROG} eval --id id.csv --ood noise=noise.csv --out results/",
    )
    parser.add_argument("--id", nargs="+", required=True, metavar="PATH", help=f"in-distribution: {options.SETS}")
    for name, what in (("ood", "a set"), ("near", "a set of the group near"), ("far", "a set of the group far")):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="NAME=PATH", help=f"{what}; may be given several times"
        )
    parser.add_argument(
        "--folder-labels",
        action="store_true",
        help="the folders in the --id folder are the classes, sorted by name; for the ID accuracy, which labels in "
        "lists and shards give too",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--convention", metavar="CODE", help="AUPR and FPR95 as computed by official, openood or pytorch_ood"
    )
    parser.add_argument("--bootstrap", type=count, default=0, metavar="N", help="resamples for confidence intervals")
    report.add_option(parser)
    options.add_options(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """ID against OOD sets: table, plots, and a JSON with what is needed to repeat it."""
    from ..evaluation import CONVENTIONS, compare_methods, results_table
    from . import run_log
    from .scorers import scorer
    from .tables import write_table

    out = Path(args.out)
    sets, groups = _sets(args)
    if args.convention not in (None, *CONVENTIONS):
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {args.convention!r}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, {out} is a file")
    files = {name: out / f"scores-{name}.csv" for name in sets}
    read = [*(source for sources in sets.values() for source in sources), *options.files_read(args)]
    for path in (out, *files.values()):
        check_output("out", path, read)
    report.check(args, read, new_folder=out)
    if find_spec("matplotlib") is None:
        raise ImportError('eval needs matplotlib: pip install "gradnorm_fast[eval]"')
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with run_log.locked(out / "eval"):
            for file in files.values():
                run_log.check_progress(file, args.resume, args.restart)
            chosen = scorer(args, sets)
            tables = {}
            for name, sources in sets.items():
                if not args.quiet and run_log.rank_and_world()[0] == 0:
                    print(f"{name}:", file=sys.stderr)
                table = chosen.table(name, sources, files[name])
                if table is not None:
                    tables[name] = table
                    with run_log.resumable(files[name]):
                        write_table(table, files[name])
            if not tables:
                return 0
            for name, table in tables.items():
                if message := table.nan_message():
                    raise ValueError(f"eval: expected finite scores, but in {name} {message}")
            scores = {name: table.head_scores() for name, table in tables.items()}
            id_scores = scores.pop("id")
            results = compare_methods(id_scores, scores, convention=args.convention, bootstrap=args.bootstrap)
            results = _with_groups(results, groups)
            with run_log.resumable(out):
                _write(out, results, args, chosen, tables)
                _draw(out / "scores.png", id_scores, scores)
                report.write(args, chosen, tables, results=results)
            for file in files.values():  # only now: an interrupted run goes on with the sets that are complete
                run_log.discard_parts(file)
    finally:
        if not existed and not any(out.iterdir()):
            out.rmdir()
    print(results_table(results))
    how = "FPR95 with ID positive, in %" if args.convention is None else f"In %, as {args.convention} computes it"
    print(f"\n{how}. Files in {out}: table.md, table.csv, results.json, scores.png, scores-*.csv")
    if tables["id"].accuracy is not None:
        print(f"ID accuracy: {100 * tables['id'].accuracy:.2f}%")
    if results["average"]["GradNorm"]["auroc"] < 0.5:
        print("GradNorm is worse than chance here: compare the feature norm and the baselines")
    return 0


def _sets(args: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What each set is read from, the ID set first; and the names of the sets in each group."""
    sets: dict[str, list[str]] = {"id": args.id}
    groups: dict[str, list[str]] = {}
    taken = {"id", "average", *_GROUPS}
    for option in ("ood", *_GROUPS):
        for item in getattr(args, option):
            name, separator, source = item.partition("=")
            if not separator or not name or not source:
                raise ValueError(f"--{option}: expected NAME=PATH, got {item!r}")
            if os.path.basename(name) != name or not name.isprintable():
                raise ValueError(f"--{option}: expected a name that can be part of a file's, got {name!r}")
            if name in taken:
                raise ValueError(f"--{option}: the name {name!r} is taken")
            taken.add(name)
            sets[name] = [source]
            if option in _GROUPS:
                groups.setdefault(option, []).append(name)
    if len(sets) == 1:
        raise ValueError("ood: expected at least one set, by --ood, --near or --far NAME=PATH")
    return sets, groups


def _with_groups(results: Results, groups: dict[str, list[str]]) -> Results:
    """The mean over each group's sets, before the average of all."""
    average = results.pop("average")
    for group, names in groups.items():
        results[group] = {
            method: {key: sum(results[name][method][key] for name in names) / len(names) for key in metrics}
            for method, metrics in average.items()
        }
    return results | {"average": average}


def _write(out: Path, results: Results, args: argparse.Namespace, scorer: Scorer, tables: dict[str, Table]) -> None:
    from ..evaluation import results_csv, results_table

    note = "In %; FPR95: the share of OOD images accepted when 95 % of the ID images are."
    if args.convention is not None:
        note = f"In %, by the convention of {args.convention}."
    accuracy = tables["id"].accuracy
    if accuracy is not None:
        note += f" ID accuracy: {100 * accuracy:.2f}."
    repeat = {
        "versions": {"gradnorm_fast": __version__} | {p: version_of(p) for p in ("torch", "torchvision")},
        "folder": os.getcwd(),
        "arguments": {name: value for name, value in vars(args).items() if name != "command"},
        **scorer.description(),
        "images": {name: len(table.names) for name, table in tables.items()},
        "unreadable": {name: table.skipped for name, table in tables.items()},
        "id_accuracy": accuracy,
        "results": results,
    }
    texts = {
        "table.md": f"{results_table(results)}\n\n{note}\n",
        "table.csv": results_csv(results),
        "results.json": json.dumps(repeat, indent=1, default=str),
    }
    for name, text in texts.items():
        with replacing(out / name, encoding="utf-8") as file:
            file.write(text)


def _draw(path: Path, id_scores: Any, ood_scores: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..evaluation import METHODS, plot_roc, plot_scores

    figure = Figure(figsize=(12, 4.5), layout="constrained")  # pyplot would choose a window system
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    field = METHODS["GradNorm"]
    outside = {name: getattr(scores, field) for name, scores in ood_scores.items()}
    plot_scores(getattr(id_scores, field), outside, left, xlabel="GradNorm (larger = more in-distribution)")
    plot_roc(getattr(id_scores, field), outside, right)
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
