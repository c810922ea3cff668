"""The table that a run makes, one row per input, and the files that hold it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._files import replacing
from ..functional import HeadScores

FIELDS = HeadScores._fields
FIRST_FIELDS = FIELDS[:7]  #: those of files and parts that earlier versions wrote
FORMATS = (".csv", ".npy", ".parquet")

Array = np.ndarray[Any, Any]


class Table(NamedTuple):
    """One entry per input that could be read, in the order given."""

    names: list[str]  #: the image's path, or the row's number
    scores: dict[str, Array]  #: by field, mostly those of HeadScores, each (N,): float32, prediction int64
    labels: Array  #: (N,) int64, −1 where unknown
    indices: Array  #: (N,) int64, the number of each among all inputs
    skipped: list[str]  #: inputs that could not be read

    def head_scores(self) -> HeadScores:
        """NaN in fields that a file of an earlier version does not have."""
        absent = np.full(len(self.names), np.nan, np.float32)
        return HeadScores(**{name: torch.from_numpy(self.scores.get(name, absent)) for name in FIELDS})

    @property
    def accuracy(self) -> float | None:
        """Accuracy on the inputs with a known label; None without any."""
        known = self.labels >= 0
        return float((self.scores["prediction"] == self.labels)[known].mean()) if known.any() else None

    def nan_message(self, score: str = "gradnorm") -> str:
        """How many scores are NaN and which is the first; empty where none is."""
        bad = np.flatnonzero(np.isnan(self.scores[score]))
        return f"{len(bad)} of {len(self.names)} scores are NaN, the first of {self.names[bad[0]]}" if len(bad) else ""


def columns_of(table: Table, is_ood: Array | None = None) -> dict[str, Any]:
    """path, the prediction if there is one, the other scores; label where one is known; is_ood if given."""
    columns: dict[str, Any] = {"path": table.names}
    columns |= {name: table.scores[name] for name in ("prediction", *table.scores) if name in table.scores}
    if (table.labels >= 0).any():
        columns["label"] = table.labels
    if is_ood is not None:
        columns["is_ood"] = is_ood
    return columns


def write_table(table: Table, path: Path, is_ood: Array | None = None) -> None:
    """A row per input with `columns_of`, as CSV, NPY (a structured array) or Parquet, by the suffix."""
    columns = columns_of(table, is_ood)
    if path.suffix == ".csv":
        with replacing(path, newline="", encoding="utf-8", errors="surrogateescape") as file:  # names are any bytes
            writer = csv.writer(file)
            writer.writerow(columns)
            for start in range(0, len(table.names), 1 << 16):
                some = (c[start : start + (1 << 16)] for c in columns.values())
                writer.writerows(
                    zip(*(c if isinstance(c, list) else c.astype(str).tolist() for c in some), strict=True)
                )
    elif path.suffix == ".npy":
        arrays = {k: np.asarray(v) for k, v in columns.items()}
        rows = np.empty(len(table.names), dtype=[(k, a.dtype) for k, a in arrays.items()])
        for k, a in arrays.items():
            rows[k] = a
        with replacing(path, "wb") as binary:
            np.save(binary, rows)
    else:
        import pyarrow
        import pyarrow.parquet

        with replacing(path, "wb") as binary:
            pyarrow.parquet.write_table(pyarrow.table(columns), binary)


def read_table(path: Path, fields: Iterable[str] = FIELDS, optional: Iterable[str] = ()) -> Table:
    """The table in a file that `write_table` wrote, with these fields of its scores, and the optional ones it has.

    ValueError where it is no such file, a column is missing, or a value is no number.
    """
    try:
        columns = _read_columns(path)
    except FileNotFoundError:
        raise ValueError(f"scores: no file {path}") from None
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"scores: cannot read {path} as a table of scores: {error}") from None
    scores = {}
    for name in dict.fromkeys((*fields, *(name for name in optional if name in columns))):
        if name not in columns:
            raise ValueError(
                f"scores: expected the column {name!r} in {path}, as score writes, got {', '.join(columns) or 'none'}"
            )
        scores[name] = _numbers(columns, name, np.int64 if name == "prediction" else np.float32, path)
    n = len(next(iter(scores.values())))
    if n == 0:
        raise ValueError(f"scores: no row in {path}")
    labels = _numbers(columns, "label", np.int64, path) if "label" in columns else np.full(n, -1)
    names = np.asarray(columns.get("path", np.arange(n))).astype(str).tolist()
    return Table(names, scores, labels, np.arange(n), [])


def _numbers(columns: dict[str, Any], name: str, dtype: Any, path: Path) -> Array:
    try:
        return np.asarray(columns[name]).astype(dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"scores: expected numbers in column {name!r} of {path}: {error}") from None


def _read_columns(path: Path) -> dict[str, Any]:
    if path.suffix == ".csv":
        with open(
            path, newline="", encoding="utf-8-sig", errors="surrogateescape"
        ) as file:  # a spreadsheet adds a mark
            lines = list(csv.reader(file))
        if not lines:
            raise ValueError("it is empty")
        header, *rows = lines
        twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
        if twice is not None:
            raise ValueError(f"it has the column {twice!r} twice")
        uneven = next((i for i, row in enumerate(rows, 2) if len(row) != len(header)), None)
        if uneven is not None:
            raise ValueError(f"line {uneven} has {len(rows[uneven - 2])} values, the header {len(header)}")
        return dict(zip(header, zip(*rows, strict=True), strict=False)) if rows else dict.fromkeys(header, ())
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        return {name: array[name] for name in array.dtype.names or ()}
    check_format(path)
    import pyarrow.parquet

    parquet = pyarrow.parquet.read_table(path)
    return {name: parquet[name].to_numpy() for name in parquet.column_names}


def check_format(path: Path, names: Iterable[str] = ()) -> None:
    """Refuse, before any work, a file that these rows could not be written to.

    ValueError: another suffix, or a name that Parquet, which holds UTF-8 alone, cannot hold. ImportError: pyarrow is
    missing.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"out: expected a name ending in .csv, .npy or .parquet, got {path.name!r}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError("out: .parquet needs pyarrow: pip install pyarrow") from error
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ValueError(f"out: .parquet holds UTF-8 alone, {name!r} is not; write .csv or .npy") from None
