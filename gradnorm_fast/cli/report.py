"""``--report``: the HTML page that `score` and `eval` write beside their tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import check_output
from .options import check_out

if TYPE_CHECKING:
    from .scorers import Scorer
    from .tables import Table


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        metavar="HTML",
        help="also write one page with plots and the most and the least in-distribution images",
    )


def check(args: argparse.Namespace, read: Iterable[str | Path | None], new_folder: Path | None = None) -> None:
    """Refuse, before any work, a page that cannot be written or would overwrite a file of the run.

    Args:
        read: files and folders that the page must not overwrite or lie in.
        new_folder: one that the run makes, where it is not there yet.
    """
    if args.report is None:
        return
    path = Path(args.report)
    check_out(path, ".html", option="report", new_folder=new_folder)
    check_output("report", path, read)
    if find_spec("matplotlib") is None or find_spec("PIL") is None:
        raise ImportError('report needs matplotlib and Pillow: pip install "gradnorm_fast[eval]"')


def write(args: argparse.Namespace, scorer: Scorer, tables: Mapping[str, Table], **shown: Any) -> None:
    """The page, if it is asked for; `shown`: score, threshold and results, as in `write_report`."""
    if args.report is None:
        return
    from ..report import write_report
    from .scorers import HeadScorer, ModelScorer

    details = {name: getattr(args, name, None) for name in ("model", "weights", "checkpoint", "weight", "detector")}
    if scorer.detector is not None:
        details |= {"head": scorer.detector.head_name, "layers": scorer.detector.layers}
        details |= {name: getattr(scorer.detector, name) for name in ("temperature", "reduction", "preprocessing")}
    details = {name: value for name, value in details.items() if value is not None}
    if isinstance(scorer, HeadScorer):  # rows of features have no pictures
        shown["gallery"] = 0
    if isinstance(scorer, ModelScorer):
        shown["classes"] = scorer.classes
    write_report(args.report, tables, details=details, read_image=_pictures(scorer), **shown)


def _pictures(scorer: Scorer) -> Callable[[str], Any] | None:
    """By the name of a row, read as for scoring; None: the name is a path."""
    from .images import read_image
    from .scorers import ModelScorer

    if not isinstance(scorer, ModelScorer):
        return None
    inputs = {item.name: item for items in scorer.inputs.values() for item in items}
    exif, side = scorer.preprocessing.exif, scorer.preprocessing.side
    return lambda name: read_image(inputs[name], exif, side)
