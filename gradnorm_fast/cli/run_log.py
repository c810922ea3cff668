"""Rows kept as they are computed, so that an interrupted run can go on, in any number of processes.

A run that writes NAME.csv keeps its rows in NAME.part-RANK-of-WORLD as it goes; the last step gathers them in the order
of the inputs. The parts stay until the caller has written what it makes of them and calls `discard_parts`. So nothing
is lost when a run is interrupted, and `resume` goes on with the rows that are there, into a file of another format too.

A part begins with a line of JSON: the inputs, fields and settings of its run. Each row has the input's number, its
identity (see `inputs.identities`) and a checksum: what is damaged, or of an input that has changed since, is not used.
"""

from __future__ import annotations

import json
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from .._files import digest_of, replacing
from .._progress import Progress
from .tables import FIELDS, FIRST_FIELDS, Array, Table

_MAGIC = b'{"gradnorm_fast part": '  #: how a part begins; then the version of its format
_OWNER = b"process "  #: how a lock file begins
_NOTHING, _UNREADABLE, _SCORED = 0, 1, 2  #: what is known of an input


class Job(NamedTuple):
    """The inputs and settings of a run. It never reuses rows of another job."""

    names: list[str]  #: of the inputs
    identities: Array  #: (N,) uint64: equal as long as the input is the same
    labels: Array  #: (N,) int64, −1 where unknown
    settings: dict[str, Any]  #: all that scores depend on beside the inputs, as JSON knows it
    unit: str = "images"
    fields: tuple[str, ...] = FIELDS  #: names of the scores

    @property
    def row(self) -> np.dtype[Any]:
        scores = ("scores", "<f8", (len(self.fields),))
        return np.dtype([("index", "<i8"), ("identity", "<u8"), ("state", "u1"), scores, ("checksum", "<u4")])


class Batch(NamedTuple):
    """The results of some inputs."""

    indices: list[int]  #: the inputs that were scored
    scores: Mapping[str, torch.Tensor] | None  #: theirs by field, each (len(indices),); None for none
    unreadable: list[tuple[int, str]]  #: the others, and why
    waited: float = 0.0  #: seconds that scoring waited for them to be read


Batches: TypeAlias = Callable[[list[int]], Iterator[Batch]]  # of the inputs with these numbers, in this order


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says; ValueError for a number that none of them has."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world:
        raise ValueError(f"RANK: expected 0 ... {world - 1} for WORLD_SIZE={world}, got {rank}")
    return rank, world


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other runs from writing to `out`; ValueError, naming the process, where one does already.

    The system releases the lock when the process ends, however it ends. Of torchrun's processes the first one locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None  # type: ignore[assignment]
    if fcntl is None or rank_and_world()[0]:
        yield
        return
    path = _beside(out, ".lock")
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read().strip() or "another process"
            raise ValueError(f"out: {owner} is writing {out} ({path})") from None
        except OSError:  # a file system without locks
            pass
        if path.exists() and path.stat().st_size and not _starts_with(path, _OWNER):
            file.close()
            raise ValueError(f"out: {path} is in the way: it is not the lock of a run; choose another name")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()  # its owner removed it in between
    with file:
        with suppress(OSError):  # a full disk: what is written next says so, and the lock holds without a name
            file.truncate(0)
            os.write(file.fileno(), _OWNER + f"{os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_progress(out: Path, resume: bool, restart: bool) -> None:
    """Refuse to start over where an interrupted run has rows, unless the user says what to do with them; ValueError."""
    if resume and restart:
        raise ValueError("resume: it cannot be combined with --restart")
    for part, magic in ((_part(out, *rank_and_world()), _MAGIC), (features_part(out), b"\x93NUMPY")):
        if part.exists() and part.stat().st_size and not _starts_with(part, magic):
            raise ValueError(f"out: {part} is in the way: it is not a part of a run; choose another name")
    if resume or restart:
        return
    kept = sum(_rows_in(part) for part in parts_of(out))
    if kept:
        raise ValueError(
            f"out: an interrupted run of {out} has kept {kept} rows; --resume goes on with them, --restart drops them"
        )


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Say of a file that cannot be written, as on a full disk, that nothing is lost."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{reason}; --resume goes on with the rows that are kept", str(path)) from error


def run(job: Job, batches: Batches, out: Path, *, resume: bool = False, progress: bool = True) -> Table | None:
    """Score this process's share of the inputs, then gather everyone's in rank 0, which returns it.

    Every input is scored once: of those to do, process r of n takes r, r + n, r + 2n, ..., in their order. With
    resume, what is in the parts of an interrupted run of this job is not done again; without, they are dropped.
    """
    rank, world = rank_and_world()
    if world > 1 and not torch.distributed.is_initialized():
        # one process may have much more to do than another: waiting long is no error
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    header = _header(job)
    part = _part(out, rank, world)
    old = parts_of(out)
    bar = Progress(len(job.names), job.unit, progress and rank == 0)
    values, state = _read(old if resume else [], header, job, bar.say if rank == 0 else None)
    _barrier(world)  # nobody writes before everybody has read
    scored = np.flatnonzero((state == _SCORED) & ~np.isnan(values).any(1))  # a NaN may be of a refused batch
    if rank == 0:  # takes over all rows, and only then do the parts that had them go
        with resumable(part), replacing(part, "wb") as file:
            file.write(header + _rows(job, scored, _SCORED, values[scored], header))
        for p in old:
            if p != part:
                p.unlink()
    _barrier(world)
    if rank:
        with resumable(part), replacing(part, "wb") as file:
            file.write(header)
    todo = np.setdiff1d(np.arange(len(job.names)), scored)[rank::world].tolist()  # unreadable and NaN ones again
    bar.start(len(todo))
    if rank == 0 and progress and resume:
        bar.say(f"{len(scored)} of {len(job.names)} {job.unit} are already scored")
    try:
        with open(part, "ab", buffering=0) as file:
            for batch in batches(todo):
                rows = b""
                if batch.scores is not None:
                    columns = [batch.scores[name].cpu().double().numpy() for name in job.fields]
                    rows = _rows(job, np.array(batch.indices), _SCORED, np.column_stack(columns), header)
                for i, reason in batch.unreadable:
                    bar.say(f"cannot read {job.names[i]}: {reason}")
                    rows += _rows(job, np.array([i]), _UNREADABLE, np.full((1, len(job.fields)), np.nan), header)
                with resumable(part):
                    _append(file, rows)
                bar.advance(len(batch.indices) + len(batch.unreadable), batch.waited)
    except BaseException:
        if part.stat().st_size == len(header):  # nothing to go on with
            part.unlink()
            if world == 1:
                features_part(out).unlink(missing_ok=True)
        raise
    bar.close()
    _barrier(world)
    if rank:
        return None
    values, state = _read([_part(out, r, world) for r in range(world)], header, job, bar.say)
    missing = int((state == _NOTHING).sum())
    if missing:
        raise ValueError(f"{out}: {missing} of {len(job.names)} inputs have no row; is a process missing?")
    good = state == _SCORED
    types = {name: np.int64 if name == "prediction" else np.float32 for name in job.fields}
    fields = {name: values[good, k].astype(types[name]) for k, name in enumerate(job.fields)}
    skipped = [job.names[i] for i in np.flatnonzero(~good)]
    indices = np.flatnonzero(good)
    return Table([job.names[i] for i in indices], fields, job.labels[good], indices, skipped)


def discard_parts(out: Path) -> None:
    """Remove the parts of a run, once all that was to come of them is written."""
    for part in parts_of(out):
        part.unlink()
    features_part(out).unlink(missing_ok=True)


def _header(job: Job) -> bytes:
    inputs = [len(job.names), digest_of("\0".join(job.names))]
    settings = {"gradnorm_fast part": 3, "inputs": inputs, "fields": job.fields} | job.settings
    return json.dumps(settings).encode() + b"\n"


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _header_of(part: Path) -> bytes:
    """The part's first line; empty where it is no part."""
    with open(part, "rb") as file:
        header = file.readline()
    return header if header.startswith(_MAGIC) and header.endswith(b"\n") else b""


def _rows_in(part: Path) -> int:
    """How many rows a part has, whatever job it is of."""
    header = _header_of(part)
    try:
        fields = json.loads(header)["fields"]
    except (ValueError, KeyError):  # of another version
        fields = FIRST_FIELDS
    size = Job([], np.empty(0), np.empty(0), {}, fields=tuple(fields)).row.itemsize
    return max(0, part.stat().st_size - len(header)) // size


def _rows(job: Job, indices: Array, state: int, scores: Array, header: bytes) -> bytes:
    rows = np.zeros(len(indices), job.row)
    rows["index"], rows["identity"], rows["state"], rows["scores"] = indices, job.identities[indices], state, scores
    rows["checksum"] = _checksums(rows, header)
    return rows.tobytes()


def _checksums(rows: Array, header: bytes) -> list[int]:
    seed = zlib.crc32(header)
    size = rows.dtype.itemsize
    body = rows.view(np.uint8).reshape(len(rows), size)[:, : size - rows.dtype["checksum"].itemsize]
    return [zlib.crc32(row.tobytes(), seed) for row in body]


def _append(file: Any, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _read(parts: list[Path], header: bytes, job: Job, say: Callable[[str], None] | None) -> tuple[Array, Array]:
    """From parts, the scores of each of the job's inputs, float64 (N, fields), and what is known of each, (N,).

    ValueError where a part is of another job, naming what differs.
    """
    values = np.full((len(job.names), len(job.fields)), np.nan)
    state = np.full(len(job.names), _NOTHING)
    changed = 0
    for part in parts:
        data = part.read_bytes()
        if not data:
            continue
        start = data.find(b"\n") + 1
        if data[:start] != header:
            raise ValueError(
                f"{part}: kept by a run that differs in {_difference(data[:start], header)}; --restart drops it"
            )
        whole = (len(data) - start) // job.row.itemsize
        rows = np.frombuffer(data, job.row, whole, start)
        good = np.array(_checksums(rows, header), dtype=np.uint32) == rows["checksum"]
        kept = whole if good.all() else int(good.argmin())
        if (kept < whole or (len(data) - start) % job.row.itemsize) and say is not None:
            say(f"{part}: row {kept + 1} is damaged or cut off; the {kept} rows before it are kept")
        rows = rows[:kept]
        same = job.identities[rows["index"]] == rows["identity"]
        changed += int((~same).sum())
        values[rows["index"][same]], state[rows["index"][same]] = rows["scores"][same], rows["state"][same]
    if changed and say is not None:
        say(f"inputs that have changed since and are scored again: {changed}")
    return values, state


def _difference(theirs: bytes, ours: bytes) -> str:
    try:
        a, b = json.loads(theirs), json.loads(ours)
    except ValueError:
        return "version"
    names = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
    return " and ".join(names)


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def _beside(out: Path, suffix: str) -> Path:
    """NAME + suffix for NAME.csv, where the file itself lies if `out` is a link."""
    real = Path(os.path.realpath(out))
    return real.with_name(real.stem + suffix)


def features_part(out: Path) -> Path:
    """The temporary file for the features of a run into `out`."""
    return _beside(out, ".part-features")


def _part(out: Path, rank: int, world: int) -> Path:
    return _beside(out, f".part-{rank}-of-{world}")


def parts_of(out: Path) -> list[Path]:
    """The parts of runs into `out`; files that only have the name of one are left alone."""
    stem = _beside(out, "")
    pattern = re.compile(re.escape(stem.name) + r"\.part-\d+-of-\d+")
    named = (stem.with_name(name) for name in sorted(os.listdir(stem.parent)) if pattern.fullmatch(name))
    return [part for part in named if part.is_file() and _header_of(part)]
