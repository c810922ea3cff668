"""Images to scores: read and preprocessed by worker processes, scored by a detector in batches."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._files import digest, digest_of
from ..detector import GradNorm
from .feature_file import FeatureFile
from .inputs import Input, identities, read_bytes
from .run_log import Batch, Job, rank_and_world, run
from .tables import FIELDS, Table

MAX_ASPECT = 100  # resized by their shorter side, longer images take gigabytes
MAX_PIXELS = 178_956_970  # where PIL, too, takes an image for an attack


class Preprocessing(NamedTuple):
    """From a file to what the model is given."""

    transform: Callable[[Any], Tensor]  #: of an RGB image of PIL
    exif: bool = True  #: whether the image is turned as its EXIF orientation says
    side: int = 256  #: about what the shorter side is resized to


class Scores(NamedTuple):
    """Computes something other than the detector's scores in a pass over images."""

    fields: tuple[str, ...]
    of: Callable[[Tensor], Mapping[str, Tensor]]  #: images (B, ...) to each field's (B,)
    settings: dict[str, Any]  #: what they depend on beside the detector's options, as JSON knows it


def read_image(item: Input, exif: bool = True, side: int = 256) -> Any:
    """An image as 8 bit RGB of PIL.

    Args:
        exif: turn it as its EXIF orientation says.
        side: about what its shorter side will be resized to.

    Raises:
        ValueError: it cannot be read, or would be too large once resized.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images, odd palettes
            with Image.open(io.BytesIO(read_bytes(item))) as image:
                _check_size(image.width, image.height, side)
                orientation = image.getexif().get(0x0112, 1) if exif else 1
                if image.mode[0] not in "IF":
                    rgb = image.convert("RGB")
                else:
                    pixels = np.asarray(image)  # 16 bits: PIL's own conversion would make all but the darkest white
                    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 0xFFFF:
                        raise ValueError(f"pixels of {image.mode!r}, which have no fixed range")
                    rgb = Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
        if orientation != 1:
            rgb.getexif()[0x0112] = orientation
            rgb = ImageOps.exif_transpose(rgb)
        return rgb
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Exception as error:  # whatever PIL's decoders stumble over in a broken file
        raise ValueError(_reason(error)) from None


def _check_size(width: int, height: int, side: int) -> None:
    short, long = sorted((width, height))
    if long > MAX_ASPECT * short:
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")
    resized = max(short, side) ** 2 * long // short
    if resized > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels: resized to {side} it would have {resized}, more than {MAX_PIXELS}")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def first_readable(inputs: list[Input], preprocessing: Preprocessing) -> tuple[str, Any]:
    """The first image that can be read, with its name; ValueError where none can."""
    reasons = []
    for item in inputs:
        try:
            return item.name, read_image(item, preprocessing.exif, preprocessing.side)
        except ValueError as error:
            reasons.append(f"{item.name}: {error}")
    raise ValueError(f"images: none of {len(inputs)} can be read: {reasons[0]}" + (", ..." if reasons[1:] else ""))


def transformed(image: Any, transform: Callable[[Any], Tensor], name: str) -> Tensor:
    """The preprocessed image; ValueError where the preprocessing fails, which is no fault of the file."""
    try:
        tensor = transform(image)
    except Exception as error:
        raise ValueError(f"images: the preprocessing fails on {name}: {_reason(error)}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"images: expected the preprocessing to return a tensor, got {type(tensor).__name__}")
    return tensor


class _Images(torch.utils.data.Dataset[Any]):
    def __init__(self, inputs: list[Input], preprocessing: Preprocessing) -> None:
        self.inputs, self.preprocessing = inputs, preprocessing

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> Tensor | str | ValueError:
        """The image, or why it cannot be read, or what is wrong with all of them."""
        try:
            image = read_image(self.inputs[i], self.preprocessing.exif, self.preprocessing.side)
        except ValueError as error:
            return str(error)
        try:
            return transformed(image, self.preprocessing.transform, self.inputs[i].name)
        except ValueError as error:
            return error


def _collate(items: list[Tensor | str | ValueError]) -> tuple[Tensor | None, list[str | None]] | ValueError:
    """One tensor of the images, stacked by the worker, and for each item why it is not among them, or None."""
    wrong = [item for item in items if isinstance(item, ValueError)]
    images = [item for item in items if isinstance(item, Tensor)]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        wrong.append(ValueError(f"images: expected one size, got {sorted(shapes)[:2]}; use --resize N"))
    if wrong:
        return wrong[0]
    return torch.stack(images) if images else None, [item if isinstance(item, str) else None for item in items]


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one ends the workers


def _default_workers(images: _Images, batch_size: int) -> int:
    """Processes that read images: one per core of this process's share, at most 8.

    None for fewer than four batches, or where the preprocessing, as a lambda, cannot be sent to a process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if len(images) < 4 * batch_size or share < 2:
        return 0
    if multiprocessing.get_start_method() != "fork":
        try:
            pickle.dumps(images.preprocessing)
        except Exception:  # pickle raises whatever the object does
            return 0
    return min(8, share)


def score_images(
    detector: GradNorm,
    inputs: list[Input],
    preprocessing: Preprocessing,
    out: Path,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    amp: bool = False,
    strict: bool = False,
    resume: bool = False,
    content: bool = False,
    progress: bool = True,
    features: Path | None = None,
    module: str | None = None,
    scores: Scores | None = None,
) -> Table | None:
    """Score images by a detector into the parts of `out`; see `run_log.run`.

    Args:
        detector: has scored an image, so that its head is known.
        workers: processes that read images; None: by the number of cores.
        strict: an unreadable image is a ValueError; else it is skipped.
        content: tell images by their content, not by size and time of change.
        features: write what the head is given, (N, D), of the images of the table, to this .npy file.
        module: the module that made the model, whose source file a resumed run compares too.
        scores: others than the detector's.
    """
    if scores is None:
        scores = Scores(FIELDS, lambda images: detector.head_scores(images)._asdict(), {})
    store = None if features is None else FeatureFile(features, out, detector, len(inputs), resume)

    def batches(todo: list[int]) -> Iterator[Batch]:
        images = _Images([inputs[i] for i in todo], preprocessing)
        n = _default_workers(images, batch_size) if workers is None else workers
        loader = torch.utils.data.DataLoader(
            images,
            min(batch_size, max(1, len(images))),
            num_workers=n,
            collate_fn=_collate,
            worker_init_fn=_ignore_interrupts,
        )
        start = 0
        device = next(detector.model.parameters()).device.type
        for batch, waited in _timed(loader):
            if isinstance(batch, ValueError):
                raise batch
            tensor, reasons = batch
            indices, start = todo[start : start + len(reasons)], start + len(reasons)
            bad = [(i, reason) for i, reason in zip(indices, reasons, strict=True) if reason is not None]
            if bad and strict:
                raise ValueError(f"images: cannot read {inputs[bad[0][0]].name}: {bad[0][1]}")
            good = [i for i, reason in zip(indices, reasons, strict=True) if reason is None]
            found = None
            if tensor is not None:
                with torch.autocast(device, enabled=amp), nullcontext() if store is None else store.recording(good):
                    found = scores.of(tensor)
            yield Batch(good, found, bad, waited)
        detector.raise_refusals()

    if resume and progress and rank_and_world()[0] == 0:
        print(
            f"note: --resume compares the images' {'content' if content else 'size and time'}, options, weights "
            "and the source files of the model's classes; other code and files that they use are not compared",
            file=sys.stderr,
        )
    settings = {
        "temperature": detector.temperature,
        "reduction": detector.reduction,
        "include_bias": detector.include_bias,
        "layers": detector.layers,
        "amp": amp,
        "preprocessing": re.sub(r" at 0x[0-9a-f]+", "", repr(preprocessing)),  # an address differs from run to run
        "model's weights": digest([*detector.model.parameters(), *detector.model.buffers()]),
        "model's code": _code_digest(detector.model, preprocessing.transform, module),
        "--save-features": features is not None,
        "--content-hash": content,
        **scores.settings,
    }
    labels = np.array([-1 if item.label is None else item.label for item in inputs], dtype=np.int64)
    identity = np.fromiter(identities(inputs, content), np.uint64, len(inputs))
    job = Job([item.name for item in inputs], identity, labels, settings, fields=scores.fields)
    table = run(job, batches, out, resume=resume, progress=progress)
    if store is not None and table is not None:
        store.finish(table)
    return table


def _timed(loader: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch and the seconds it was waited for."""
    iterator = iter(loader)
    while True:
        start = time.monotonic()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch, time.monotonic() - start


def _code_digest(model: torch.nn.Module, transform: Any, module: str | None) -> str:
    """Digest of the source files of the module, the model and the preprocessing; not torch's."""
    steps = [transform, *getattr(transform, "transforms", ())]
    functions = [*steps, *(getattr(step, "lambd", None) for step in steps)]
    modules = {type(m).__module__ for m in model.modules()} | ({module} if module else set())
    modules |= {getattr(f, "__module__", None) or type(f).__module__ for f in functions if f is not None}
    sources = []
    for name in sorted(modules):
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is not None and os.path.isfile(path) and name.split(".")[0] != "torch":
            sources.append(digest_of(Path(path).read_bytes()))
    return digest_of(" ".join(sources))
