"""The table that a run makes, one row per input, and the files that hold it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._files import replacing
from ..functional import HeadScores

FIELDS = ("gradnorm", "prediction", "feature_norm", "output_norm", "max_logit", "msp", "energy")


class Table(NamedTuple):
    """One entry per input that could be read, in the order given."""

    paths: list[str]  #: the image, or the row's number
    scores: dict[str, np.ndarray[Any, Any]]  #: by field of HeadScores, each (N,)
    skipped: list[str]  #: inputs that could not be read

    def head_scores(self) -> HeadScores:
        return HeadScores(**{name: torch.from_numpy(values) for name, values in self.scores.items()})


def write_table(table: Table, path: Path, is_ood: np.ndarray[Any, Any] | None = None) -> None:
    """One row per input: path, score, prediction, feature_norm, output_norm, is_ood if given; CSV, NPY or Parquet.

    ValueError for another suffix; ImportError for Parquet without pyarrow.
    """
    columns: dict[str, Any] = {"path": table.paths, "score": table.scores["gradnorm"]}
    columns |= {name: table.scores[name] for name in ("prediction", "feature_norm", "output_norm")}
    if is_ood is not None:
        columns["is_ood"] = is_ood
    check_suffix(path)
    if path.suffix == ".csv":
        with replacing(path, newline="", encoding="utf-8", errors="surrogateescape") as file:  # names are any bytes
            writer = csv.writer(file)
            writer.writerow(columns)
            for start in range(0, len(table.paths), 1 << 16):
                some = (c[start : start + (1 << 16)] for c in columns.values())
                writer.writerows(
                    zip(*(c if isinstance(c, list) else c.astype(str).tolist() for c in some), strict=True)
                )
    elif path.suffix == ".npy":
        arrays = {k: np.asarray(v) for k, v in columns.items()}
        rows = np.empty(len(table.paths), dtype=[(k, a.dtype) for k, a in arrays.items()])
        for k, a in arrays.items():
            rows[k] = a
        with replacing(path, "wb") as binary:
            np.save(binary, rows)
    else:
        import pyarrow
        import pyarrow.parquet

        with replacing(path, "wb") as binary:
            pyarrow.parquet.write_table(pyarrow.table(columns), binary)


def check_suffix(path: Path) -> None:
    if path.suffix not in (".csv", ".npy", ".parquet"):
        raise ValueError(f"out: expected a name ending in .csv, .npy or .parquet, got {path.name!r}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError("out: .parquet needs pyarrow: pip install pyarrow") from error
