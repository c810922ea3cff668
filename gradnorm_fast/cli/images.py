"""Images to scores: read and preprocessed by worker processes, scored by a detector in batches."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import digest
from ..detector import GradNorm
from ..functional import HeadScores
from .run_log import run
from .tables import Table


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
    """Score images by a detector; see `run_log.run`. With strict an unreadable image is a ValueError."""

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
    settings = [
        *options,
        preprocessing,
        digest(v for v in detector.model.state_dict().values() if isinstance(v, Tensor)),
    ]
    return run(paths, settings, batches, out, "images", resume, progress)
