"""Scores of many inputs into a file: streamed, resumable, and in several processes.

A run writes its rows as it goes into PATH.part-RANK-of-WORLD; the last step gathers them in the order of the inputs. So
nothing is lost when a run is interrupted, and `resume` goes on behind the rows that are there.
"""

from __future__ import annotations

import csv
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .detector import GradNorm
from .functional import HeadScores, head_scores

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"])
FIELDS = ("gradnorm", "prediction", "feature_norm", "output_norm", "max_logit", "msp", "energy")


class Table(NamedTuple):
    """One entry per input that could be read, in the order given."""

    paths: list[str]  #: the image, or the row's number
    scores: dict[str, np.ndarray[Any, Any]]  #: by field of HeadScores, each (N,)
    skipped: list[str]  #: inputs that could not be read

    def head_scores(self) -> HeadScores:
        return HeadScores(**{name: torch.from_numpy(values) for name, values in self.scores.items()})


def find_images(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """All images under the folders (or named themselves), sorted by path within each; ValueError if there are none."""
    found: list[str] = []
    for folder in map(Path, folders):
        if folder.is_file():
            found.append(str(folder))
            continue
        if not folder.is_dir():
            raise ValueError(f"images: no folder {folder}")
        inside = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not inside:
            raise ValueError(f"images: no image in {folder} (looked for {' '.join(sorted(EXTENSIONS))})")
        found += inside
    return found


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class _Images(torch.utils.data.Dataset[Any]):
    def __init__(self, paths: list[str], transform: Callable[[Any], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor | str:
        """The image, or why there is none."""
        from PIL import Image

        try:
            with Image.open(self.paths[i]) as image:
                return self.transform(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return " ".join(str(error).split()) or type(error).__name__


def score_images(
    detector: GradNorm,
    paths: list[str],
    transform: Callable[[Any], Tensor],
    out: Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    amp: bool = False,
    strict: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Table | None:
    """Score images by a detector; see `_run`. With strict an unreadable image is a ValueError."""

    def batches(todo: list[int]) -> Iterator[tuple[list[int], HeadScores | None, list[tuple[int, str]]]]:
        loader = torch.utils.data.DataLoader(
            _Images([paths[i] for i in todo], transform),
            batch_size,
            num_workers=workers,
            collate_fn=list,
            persistent_workers=False,
        )
        start = 0
        device = next(detector.model.parameters()).device.type
        for items in loader:
            indices, start = todo[start : start + len(items)], start + len(items)
            bad = [(i, item) for i, item in zip(indices, items, strict=True) if isinstance(item, str)]
            if bad and strict:
                raise ValueError(f"images: cannot read {paths[bad[0][0]]}: {bad[0][1]}")
            good = [(i, item) for i, item in zip(indices, items, strict=True) if not isinstance(item, str)]
            scores = None
            if good:
                shapes = {tuple(item.shape) for _, item in good}
                if len(shapes) > 1:
                    raise ValueError(f"images: of several sizes, {sorted(shapes)[:2]}; use --resize N")
                with torch.autocast(device, enabled=amp):
                    scores = detector.head_scores(torch.stack([item for _, item in good]))
            yield [i for i, _ in good], scores, bad

    return _run(paths, batches, out, "images", resume, progress)


def score_features(
    features: np.ndarray[Any, Any],
    weight: Tensor,
    bias: Tensor | None,
    out: Path,
    *,
    batch_size: int = 4096,
    resume: bool = False,
    progress: bool = True,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Table | None:
    """Score rows (N, D) of an array, which may be memory-mapped and larger than memory; see `_run`."""

    def batches(todo: list[int]) -> Iterator[tuple[list[int], HeadScores | None, list[tuple[int, str]]]]:
        for start in range(0, len(todo), batch_size):
            indices = todo[start : start + batch_size]
            rows = torch.from_numpy(np.array(features[indices[0] : indices[-1] + 1])[np.array(indices) - indices[0]])
            x, w, b = (None if t is None else t.to(device) for t in (rows, weight, bias))
            assert x is not None and w is not None
            yield indices, head_scores(x.to(w.dtype), w, b, **options), []

    return _run([str(i) for i in range(len(features))], batches, out, "rows", resume, progress)


Batches = Callable[[list[int]], Iterator[tuple[list[int], HeadScores | None, list[tuple[int, str]]]]]


def _run(names: list[str], batches: Batches, out: Path, unit: str, resume: bool, progress: bool) -> Table | None:
    """Score this process's share of the inputs, then gather everyone's in rank 0, which returns it.

    Every input is scored once: process r of n takes inputs r, r + n, r + 2n, ... Bitwise the order of `names`.
    """
    rank, world = rank_and_world()
    if world > 1 and not torch.distributed.is_initialized():
        # one process may have much more to do than another: waiting long is no error
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    part = out.with_name(f"{out.name}.part-{rank}-of-{world}")
    identity = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    part.parent.mkdir(parents=True, exist_ok=True)
    done = _rows_of(part, identity) if resume else {}
    fresh = part.with_name(part.name + ".partial")
    with open(fresh, "w", newline="") as file:
        csv.writer(file).writerows([["#", identity], *(done[i] for i in sorted(done))])
    os.replace(fresh, part)
    mine = range(rank, len(names), world)
    bar = _Bar(len(mine), len(done), unit, progress and rank == 0)
    with open(part, "a", newline="") as file:
        writer = csv.writer(file)
        for indices, scores, bad in batches([i for i in mine if i not in done]):
            if scores is not None:
                columns = [getattr(scores, name).tolist() for name in FIELDS]
                writer.writerows([i, *map(repr, row)] for i, *row in zip(indices, *columns, strict=True))
            for i, reason in bad:
                bar.say(f"cannot read {names[i]}: {reason}")
                writer.writerow([i, "unreadable"])
            file.flush()
            bar.advance(len(indices) + len(bad))
    bar.close()
    if world > 1:
        torch.distributed.barrier()
    if rank:
        torch.distributed.barrier()  # the parts are read before anybody starts another run
        return None
    parts = [out.with_name(f"{out.name}.part-{r}-of-{world}") for r in range(world)]
    rows = {i: row for p in parts for i, row in _rows_of(p, identity).items()}
    missing = len(names) - len(rows)
    if missing:
        raise ValueError(f"{out}: {missing} of {len(names)} inputs have no row; is a process missing?")
    good = [i for i in sorted(rows) if len(rows[i]) > 2]
    text = {name: np.array([rows[i][k] for i in good]) for k, name in enumerate(FIELDS, 1)}
    fields = {k: v.astype(np.int64 if k == "prediction" else np.float32) for k, v in text.items()}
    table = Table([names[i] for i in good], fields, [names[i] for i in sorted(rows) if len(rows[i]) == 2])
    for p in parts:
        p.unlink()
    if world > 1:
        torch.distributed.barrier()
    return table


def _rows_of(part: Path, identity: str) -> dict[int, list[str]]:
    """The whole rows of a part of a run over the same inputs; none where there is no such part."""
    if not part.exists():
        return {}
    with open(part, newline="") as file:
        lines = [line for line in file if line.endswith("\n")]  # the last may have been cut off
    rows = list(csv.reader(lines))
    if not rows or rows[0] != ["#", identity]:
        raise ValueError(f"{part}: is of a run over other inputs; remove it, or leave out --resume")
    return {int(row[0]): row for row in rows[1:] if len(row) in (2, 1 + len(FIELDS))}


def write_table(table: Table, path: Path, is_ood: np.ndarray[Any, Any] | None = None) -> None:
    """One row per input: path, score, prediction, feature_norm, output_norm, is_ood if given; CSV, NPY or Parquet.

    ValueError for another suffix; ImportError for Parquet without pyarrow.
    """
    columns: dict[str, Any] = {"path": table.paths, "score": table.scores["gradnorm"]}
    columns |= {name: table.scores[name] for name in ("prediction", "feature_norm", "output_norm")}
    if is_ood is not None:
        columns["is_ood"] = is_ood
    check_suffix(path)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".csv":
        with open(partial, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(
                zip(*(c if isinstance(c, list) else c.astype(str).tolist() for c in columns.values()), strict=True)
            )
    elif path.suffix == ".npy":
        arrays = {k: np.asarray(v) for k, v in columns.items()}
        rows = np.empty(len(table.paths), dtype=[(k, a.dtype) for k, a in arrays.items()])
        for k, a in arrays.items():
            rows[k] = a
        with open(partial, "wb") as binary:
            np.save(binary, rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    os.replace(partial, path)


def check_suffix(path: Path) -> None:
    if path.suffix not in (".csv", ".npy", ".parquet"):
        raise ValueError(f"out: expected a name ending in .csv, .npy or .parquet, got {path.name!r}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError("out: .parquet needs pyarrow: pip install pyarrow") from error


class _Bar:
    """tqdm on a terminal, a line every half minute elsewhere."""

    def __init__(self, total: int, done: int, unit: str, show: bool) -> None:
        self.total, self.done, self.unit, self.show = total, done, unit, show
        self.said = self.start = time.monotonic()
        self.first = done
        self.bar: Any = None
        if show and sys.stderr.isatty():
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, initial=done, unit=f" {unit}")

    def advance(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.show and (time.monotonic() - self.said > 30 or self.done == self.total):
            self.said = time.monotonic()
            rate = (self.done - self.first) / max(1e-9, self.said - self.start)
            print(f"{self.done}/{self.total} {self.unit}, {rate:.0f}/s", file=sys.stderr)

    def say(self, message: str) -> None:
        self.bar.write(message, file=sys.stderr) if self.bar is not None else print(message, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
