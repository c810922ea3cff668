"""Scores of many inputs into a file: streamed, resumable, and in several processes.

A run writes its rows as it goes into PATH.part-RANK-of-WORLD; the last step gathers them in the order of the inputs.
The parts stay until the caller has written what it makes of them and says `discard_parts`. So nothing is lost when a
run is interrupted, and `resume` goes on with the rows that are there, in as many processes as one likes.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """All images under the folders (or named themselves), each once, sorted by path within each folder.

    ValueError if there are none.
    """
    found: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            if not folder.exists():
                raise ValueError(f"images: no folder {folder}")
            found.append(str(folder))
            continue
        inside = _images_in(folder)
        if not inside:
            raise ValueError(f"images: no image in {folder} (looked for {' '.join(sorted(EXTENSIONS))})")
        found += inside
    return list(dict.fromkeys(found))


def _images_in(folder: Path) -> list[str]:
    """Sorted; linked folders are followed, each folder visited once, so that links in a circle end."""

    def unreadable(error: OSError) -> None:
        raise error

    found, visited = [], set()
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        images = (Path(root, file) for file in files if os.path.splitext(file)[1].lower() in EXTENSIONS)
        # no pipes; but links to nothing, which are then reported as unreadable
        found += [str(image) for image in images if image.is_file() or image.is_symlink()]
    return sorted(found)


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def read_image(path: str | os.PathLike[str]) -> Any:
    """An image file as an 8 bit RGB image of PIL; ValueError where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images, odd palettes
            with Image.open(path) as image:
                if image.mode[0] not in "IF":
                    return image.convert("RGB")
                pixels = np.asarray(image)  # 16 bits: PIL's own conversion would make all but the darkest white
        if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"pixels of {image.mode!r}, which have no fixed range")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Exception as error:  # whatever PIL's decoders stumble over in a broken file
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason) from None


def first_readable(paths: list[str]) -> tuple[str, Any]:
    """The first image that can be read, with its path; ValueError where none can."""
    reasons = []
    for path in paths:
        try:
            return path, read_image(path)
        except ValueError as error:
            reasons.append(f"{path}: {error}")
    raise ValueError(f"images: none of {len(paths)} can be read: {reasons[0]}" + (", ..." if reasons[1:] else ""))


def transformed(image: Any, transform: Callable[[Any], Tensor], path: str) -> Tensor:
    """The preprocessed image; ValueError where the preprocessing fails, which is no fault of the file."""
    try:
        tensor = transform(image)
    except Exception as error:
        raise ValueError(f"images: the preprocessing fails on {path}: {error or type(error).__name__}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"images: expected the preprocessing to return a tensor, got {type(tensor).__name__}")
    return tensor


class _Images(torch.utils.data.Dataset[Any]):
    def __init__(self, paths: list[str], transform: Callable[[Any], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor | str | ValueError:
        """The image, or why it cannot be read, or what is wrong with all of them."""
        try:
            image = read_image(self.paths[i])
        except ValueError as error:
            return str(error)
        try:
            return transformed(image, self.transform, self.paths[i])
        except ValueError as error:
            return error


def _collate(items: list[Tensor | str | ValueError]) -> tuple[Tensor | None, list[str | None]] | ValueError:
    """One tensor of the images, stacked by the worker, and for each item why it is not among them, or None."""
    wrong = [item for item in items if isinstance(item, ValueError)]
    images = [item for item in items if isinstance(item, Tensor)]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        wrong.append(ValueError(f"images: of several sizes, {sorted(shapes)[:2]}; use --resize N"))
    if wrong:
        return wrong[0]
    return torch.stack(images) if images else None, [item if isinstance(item, str) else None for item in items]


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
        images = _Images([paths[i] for i in todo], transform)
        loader = torch.utils.data.DataLoader(images, batch_size, num_workers=workers, collate_fn=_collate)
        start = 0
        device = next(detector.model.parameters()).device.type
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            tensor, reasons = batch
            indices, start = todo[start : start + len(reasons)], start + len(reasons)
            bad = [(i, reason) for i, reason in zip(indices, reasons, strict=True) if reason is not None]
            if bad and strict:
                raise ValueError(f"images: cannot read {paths[bad[0][0]]}: {bad[0][1]}")
            scores = None
            if tensor is not None:
                with torch.autocast(device, enabled=amp):
                    scores = detector.head_scores(tensor)
            yield [i for i, reason in zip(indices, reasons, strict=True) if reason is None], scores, bad

    options = [detector.temperature, detector.reduction, detector.include_bias, amp]
    preprocessing = re.sub(r" at 0x[0-9a-f]+", "", repr(transform))  # an address differs from run to run
    settings = [*options, preprocessing, digest(detector.model.state_dict().values())]
    return _run(paths, settings, batches, out, "images", resume, progress)


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

    x, b = torch.empty(features.shape, dtype=weight.dtype, device="meta"), None if bias is None else bias.to("meta")
    head_scores(x, weight.to("meta"), b, **options)  # refuses what does not fit, without reading anything
    sample = np.unique(np.linspace(0, max(len(features) - 1, 0), 16, dtype=int))[: len(features)]  # not terabytes
    of_all = digest([torch.from_numpy(np.array(features[sample])), weight, bias])
    settings = [sorted(options.items()), str(features.dtype), features.shape[1], of_all]
    return _run([str(i) for i in range(len(features))], settings, batches, out, "rows", resume, progress)


def digest(tensors: Iterable[Any]) -> str:
    """Of all values, to tell models and inputs apart; what is no tensor is left out."""
    hashed = hashlib.blake2b(digest_size=16)
    for t in tensors:
        if isinstance(t, Tensor):
            hashed.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


Batches = Callable[[list[int]], Iterator[tuple[list[int], HeadScores | None, list[tuple[int, str]]]]]


def _run(
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
        fresh = part.with_name(part.name + ".partial")
        with open(fresh, "wb") as file:
            file.write(header)
            file.write(np.column_stack([scored, values[scored]]).tobytes())
        os.replace(fresh, part)
        for p in old:
            if p != part:
                p.unlink()
    _barrier(world)
    todo = np.setdiff1d(np.arange(len(names)), scored)[rank::world].tolist()  # unreadable ones are tried again
    bar = _Bar(len(todo), unit, progress and rank == 0)
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
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # names are any bytes
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

    def __init__(self, total: int, unit: str, show: bool) -> None:
        self.total, self.done, self.unit, self.show = total, 0, unit, show
        self.said = self.start = time.monotonic()
        self.bar: Any = None
        if show and sys.stderr.isatty():
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit=f" {unit}")

    def advance(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.show and (time.monotonic() - self.said > 30 or self.done == self.total):
            self.said = time.monotonic()
            rate = self.done / max(1e-9, self.said - self.start)
            print(f"{self.done}/{self.total} {self.unit}, {rate:.0f}/s", file=sys.stderr)

    def say(self, message: str) -> None:
        self.bar.write(message, file=sys.stderr) if self.bar is not None else print(message, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
