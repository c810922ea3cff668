"""``gradnorm-fast eval``: ID against OOD sets, as table, plots, and a JSON with what is needed to repeat it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import __version__
from .._files import replacing
from . import PROG, options, plan, report
from .env import version_of
from .inputs import check_apart, check_output
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
        description="Compare ID with OOD sets by GradNorm and, from the same pass, MSP, MaxLogit, Energy and the "
        "feature norm, or other --methods: table (Markdown, CSV), plot, scores, and a JSON with what is needed "
        "to repeat it. A set is images, features (.npy, with --weight), or a file that `score` wrote.",
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
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="rows of the table, in place of the five: GradNorm, MSP, MaxLogit, Energy, 'feature norm', Entropy, "
        "SumSquares, ExGrad, KL",
    )
    parser.add_argument("--bootstrap", type=count, default=0, metavar="N", help="resamples for confidence intervals")
    report.add_option(parser)
    plan.add_options(parser)
    options.add_options(parser)
    parser.set_defaults(command=run)


class Outcome(NamedTuple):
    """The results of an evaluation."""

    results: Results
    ablation: dict[str, Results]  #: by part
    tables: dict[str, Table]  #: of the one pass, the ID set first
    notes: list[str]
    features: bool  #: whether there is a file of features for each set


def run(args: argparse.Namespace) -> int:
    """ID against OOD sets: table, plots, and a JSON with what is needed to repeat it."""
    outcome = evaluate_sets(args)
    if outcome is not None:  # else another process writes
        show(args, outcome)
    return 0


def evaluate_sets(args: argparse.Namespace) -> Outcome | None:
    """Score the sets and write all files to --out; None in all processes but the first."""
    from ..evaluation import CONVENTIONS, by_method, fields_of
    from . import ablation, run_log
    from .scorers import ModelScorer, scorer
    from .tables import write_table

    out = Path(args.out)
    sets, groups = _sets(args)
    wanted = plan.Plan.of(args)
    fields_of(args.methods)  # refuses unknown ones
    if args.convention not in (None, *CONVENTIONS):
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {args.convention!r}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, {out} is a file")
    scored = sets if args.train is None else sets | {"train": [args.train]}
    files = {name: out / f"scores-{name}.csv" for name in scored}
    second_files = {name: out / f"gradients-{name}.csv" for name in sets if wanted.second_pass}
    read = [*(source for sources in scored.values() for source in sources), *options.files_read(args)]
    for path in (out, *files.values(), *second_files.values()):
        check_output("out", path, read)
    report.check(args, read, new_folder=out)
    if find_spec("matplotlib") is None:
        raise ImportError('eval needs matplotlib: pip install "gradnorm_fast[eval]"')
    if "mahalanobis" in wanted.baselines and find_spec("sklearn") is None:
        raise ImportError('baselines: mahalanobis needs scikit-learn: pip install "gradnorm_fast[eval]"')
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    shown = not args.quiet and run_log.rank_and_world()[0] == 0
    try:
        with run_log.locked(out / "eval"):
            for file in (*files.values(), *second_files.values()):
                run_log.check_progress(file, args.resume, args.restart)
            chosen = scorer(args, scored)
            if isinstance(chosen, ModelScorer):
                drawn = [out / "scores.png", *(out / f"ablation-{part}.png" for part in wanted.parts)]
                check_apart("out", drawn, (item for items in chosen.inputs.values() for item in items))
            wanted.check(chosen)
            tables, features = {}, {}
            for name, sources in scored.items():
                if shown:
                    print(f"{name}:", file=sys.stderr)
                if wanted.features:  # features that are given need no file of their own
                    features[name] = out / f"features-{name}.npy" if chosen.makes_features else Path(sources[0])
                table = chosen.table(name, sources, files[name], features.get(name))
                if table is not None:
                    tables[name] = table
                    with run_log.resumable(files[name]):
                        write_table(table, files[name])
            second = {}
            for name, file in second_files.items():
                assert isinstance(chosen, ModelScorer)
                if shown:
                    print(f"{name}, gradients:", file=sys.stderr)
                table = chosen.second_pass(name, file, wanted.epsilon, "layers" in wanted.parts)
                if table is not None:
                    second[name] = table
                    with run_log.resumable(file):
                        write_table(table, file)
            if not tables:
                return None
            for name, table in tables.items():
                if message := table.nan_message():
                    raise ValueError(f"eval: expected finite scores, but in {name} {message}")
            train = tables.pop("train", None) if args.train is not None else None
            more = ablation.scores_of(wanted, chosen, tables, features, second, train, shown)
            ablation.check_finite(more, tables)
            rows = {
                name: by_method(table.head_scores(), args.methods) | more.baselines[name]
                for name, table in tables.items()
            }
            how = {"convention": args.convention, "bootstrap": args.bootstrap}
            results = _with_groups(ablation.results_of(rows, **how), groups)
            parts = {
                part: _with_groups(ablation.results_of(scores, **how), groups) for part, scores in more.ablation.items()
            }
            outcome = Outcome(results, parts, tables, more.notes, bool(features) and chosen.makes_features)
            with run_log.resumable(out):
                _write(out, outcome, args, chosen)
                _draw(out / "scores.png", tables)
                report.write(args, chosen, tables, results=results)
            for part, by_setting in parts.items():
                ablation.write(out, part, by_setting)
            # Only now: an interrupted run goes on with the sets that are complete.
            for file in (*files.values(), *second_files.values()):
                run_log.discard_parts(file)
    finally:
        if not existed and not any(out.iterdir()):
            out.rmdir()
    return outcome


def show(args: argparse.Namespace, outcome: Outcome) -> None:
    """Print the tables, and what there is to say of them."""
    from ..evaluation import results_table

    print(results_table(outcome.results))
    how = "FPR95 with ID positive, in %" if args.convention is None else f"In %, as {args.convention} computes it"
    files = ["table.md", "table.csv", "results.json", "scores.png", "scores-*.csv"]
    for part, by_setting in outcome.ablation.items():
        print(f"\nGradNorm by {plan.TITLES[part]}:\n\n{results_table(by_setting)}")
        files.append(f"ablation-{part}.*")
    if outcome.features:
        files.append("features-*.npy")
    print(f"\n{how}. Files in {args.out}: {', '.join(files)}")
    for note in outcome.notes:
        print(note)
    accuracy = outcome.tables["id"].accuracy
    if accuracy is not None:
        print(f"ID accuracy: {100 * accuracy:.2f}%")
    if outcome.results["average"].get("GradNorm", {}).get("auroc", 1.0) < 0.5:
        print("GradNorm is worse than chance here: compare the feature norm and the baselines")


def _sets(args: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The paths of each set, the ID set first; and the names of the sets in each group."""
    sets: dict[str, list[str]] = {"id": args.id}
    groups: dict[str, list[str]] = {}
    taken = {"id", "average", *_GROUPS, *(["train"] if args.train is not None else [])}
    for option in ("ood", *_GROUPS):
        for item in getattr(args, option):
            name, separator, source = item.partition("=")
            if not separator or not name or not source:
                raise ValueError(f"--{option}: expected NAME=PATH, got {item!r}")
            if os.path.basename(name) != name or not name.isprintable():
                raise ValueError(f"--{option}: expected a name that can be part of a file name, got {name!r}")
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


def _write(out: Path, outcome: Outcome, args: argparse.Namespace, scorer: Scorer) -> None:
    from ..evaluation import results_csv, results_table

    results, tables = outcome.results, outcome.tables
    note = "In %; FPR95: the share of OOD images accepted when 95 % of the ID images are."
    if args.convention is not None:
        note = f"In %, by the convention of {args.convention}."
    accuracy = tables["id"].accuracy
    if accuracy is not None:
        note += f" ID accuracy: {100 * accuracy:.2f}."
    note = " ".join([note, *outcome.notes])
    repeat = {
        "versions": {"gradnorm_fast": __version__} | {p: version_of(p) for p in ("torch", "torchvision")},
        "folder": os.getcwd(),
        "arguments": {name: value for name, value in vars(args).items() if name != "command"},
        **scorer.description(),
        "images": {name: len(table.names) for name, table in tables.items()},
        "unreadable": {name: table.skipped for name, table in tables.items()},
        "id_accuracy": accuracy,
        "results": results,
        "ablation": outcome.ablation,
        "notes": outcome.notes,
    }
    texts = {
        "table.md": f"{results_table(results)}\n\n{note}\n",
        "table.csv": results_csv(results),
        "results.json": json.dumps(repeat, indent=1, default=str),
    }
    for name, text in texts.items():
        with replacing(out / name, encoding="utf-8") as file:
            file.write(text)


def _draw(path: Path, tables: dict[str, Table]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..evaluation import METHODS, plot_roc, plot_scores
    from ..report import plot_label

    figure = Figure(figsize=(12, 4.5), layout="constrained")  # pyplot would choose a window system
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    outside = {plot_label(name): table.scores[METHODS["GradNorm"]] for name, table in tables.items()}
    inside = outside.pop("id")
    plot_scores(inside, outside, left, xlabel="GradNorm (larger = more in-distribution)")
    plot_roc(inside, outside, right)
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
