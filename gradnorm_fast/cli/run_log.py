"""Rows kept as they are computed, so that an interrupted run goes on, in as many processes as one likes.

A run writes its rows as it goes into PATH.part-RANK-of-WORLD; the last step gathers them in the order of the inputs.
The parts stay until the caller has written what it makes of them and says `discard_parts`. So nothing is lost when a
run is interrupted, and `resume` goes on with the rows that are there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from .._files import replacing
from .._progress import Progress
from ..functional import HeadScores
from .tables import FIELDS, Table

Batches: TypeAlias = Callable[[list[int]], Iterator[tuple[list[int], HeadScores | None, list[tuple[int, str]]]]]


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def run(
    names: list[str], settings: list[Any], batches: Batches, out: Path, unit: str, resume: bool, progress: bool
) -> Table | None:
    """Score this process's share of the inputs, then gather everyone's in rank 0, which returns it.

    Every input is scored once: of those to do, process r of n takes r, r + n, r + 2n, ..., in the order of `names`.
    With resume, what is in the parts of a run over the same names with the same settings is not done again.
    """
    rank, world = rank_and_world()
    if world > 1 and not torch.distributed.is_initialized():
        # one process may have much more to do than another: waiting long is no error
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    header = b"gradnorm_fast " + hashlib.sha256(json.dumps([names, settings]).encode()).hexdigest().encode() + b"\n"
    part = out.with_name(f"{out.name}.part-{rank}-of-{world}")
    old = _parts(out)
    values = _read(old if resume else [], header, len(names))
    _barrier(world)  # nobody writes before everybody has read
    scored = np.flatnonzero(values[:, _PREDICTION] >= 0)
    if rank == 0:
        with replacing(part, "wb") as file:
            file.write(header)
            file.write(np.column_stack([scored, values[scored]]).tobytes())
        for p in old:
            if p != part:
                p.unlink()
    _barrier(world)
    todo = np.setdiff1d(np.arange(len(names)), scored)[rank::world].tolist()  # unreadable ones are tried again
    bar = Progress(len(todo), unit, progress and rank == 0)
    if rank == 0 and progress and resume:
        bar.say(f"{len(scored)} of {len(names)} {unit} are there already")
    try:
        with open(part, "wb" if rank else "ab") as file:
            if rank:
                file.write(header)
            for indices, scores, bad in batches(todo):
                if scores is not None:
                    columns = [getattr(scores, name).cpu().double().numpy() for name in FIELDS]
                    file.write(np.column_stack([indices, *columns]).tobytes())
                for i, reason in bad:
                    bar.say(f"cannot read {names[i]}: {reason}")
                    file.write(np.array([i, *[_UNREADABLE] * len(FIELDS)]).tobytes())
                file.flush()
                bar.advance(len(indices) + len(bad))
    except BaseException:
        if part.stat().st_size == len(header):  # nothing to go on with
            part.unlink()
        raise
    bar.close()
    _barrier(world)
    if rank:
        return None
    values = _read([out.with_name(f"{out.name}.part-{r}-of-{world}") for r in range(world)], header, len(names))
    missing = int((values[:, _PREDICTION] == _NOTHING).sum())
    if missing:
        raise ValueError(f"{out}: {missing} of {len(names)} inputs have no row; is a process missing?")
    good = values[:, _PREDICTION] >= 0
    types = {name: np.int64 if name == "prediction" else np.float32 for name in FIELDS}
    fields = {name: values[good, k].astype(types[name]) for k, name in enumerate(FIELDS)}
    return Table([names[i] for i in np.flatnonzero(good)], fields, [names[i] for i in np.flatnonzero(~good)])


_PREDICTION = FIELDS.index("prediction")  #: which also says that there is no score
_UNREADABLE, _NOTHING = -1.0, -2.0


def _read(parts: list[Path], header: bytes, n: int) -> np.ndarray[Any, Any]:
    """FIELDS of each of n inputs, float64, from parts: rows of the input's number and its fields, behind a header.

    ValueError where a part is of another run.
    """
    values = np.full((n, len(FIELDS)), _NOTHING)
    for part in parts:
        with open(part, "rb") as file:
            if file.readline() != header:
                raise ValueError(
                    f"{part}: is of a run over other inputs, or with another model or options; remove it, or leave out "
                    "--resume"
                )
            numbers = np.fromfile(file)
        columns = 1 + len(FIELDS)
        rows = numbers[: len(numbers) // columns * columns].reshape(-1, columns)  # the last may have been cut off
        values[rows[:, 0].astype(np.int64)] = rows[:, 1:]
    return values


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def _parts(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.part-*-of-*[0-9]"))


def discard_parts(out: Path) -> None:
    """Remove the parts of a run, once all that was to come of them is written."""
    for part in _parts(out):
        part.unlink()
