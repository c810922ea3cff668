"""Rows of features to scores, from arrays that may exceed memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import digest
from ..functional import head_scores
from .run_log import Batch, Job, run
from .tables import Array, Table


def load_array(name: str, path: str, mapped: bool = False) -> Array:
    """A .npy array of floats; ValueError, naming the option, for anything else."""
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{name}: no file {path}") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path} as a NumPy array: {error.strerror or error}") from None
    except (ValueError, EOFError, OverflowError, MemoryError):  # with advice to unpickle what is not trusted
        raise ValueError(f"{name}: cannot read {path} as a NumPy array: it is damaged, or no .npy file") from None
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"{name}: expected float16, float32 or float64 in {path}, got {getattr(array, 'dtype', 'an archive')}"
        )
    return array


def score_features(
    path: str,
    weight: Tensor,
    bias: Tensor | None,
    out: Path,
    *,
    batch_size: int = 4096,
    resume: bool = False,
    content: bool = False,
    progress: bool = True,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Table | None:
    """Score the rows (N, D) of a .npy file, which may exceed memory, into the parts of `out`; see `run_log.run`.

    Args:
        content: tell the file by its content, not by size and time of change.
        options: temperature, reduction and include_bias, as in `head_scores`.
    """
    features = load_array("features", path, mapped=True)
    if features.ndim != 2:
        raise ValueError(f"features: expected shape (N, D) in {path}, got {features.shape}")
    head = digest([weight, bias])
    # The wider of the two dtypes: float32 features may overflow as float16, in which heads are often saved.
    dtype = torch.promote_types(weight.dtype, torch.from_numpy(np.empty(0, features.dtype)).dtype)
    weight, bias = weight.to(device, dtype), None if bias is None else bias.to(device, dtype)

    def batches(todo: list[int]) -> Iterator[Batch]:
        for start in range(0, len(todo), batch_size):
            indices = todo[start : start + batch_size]
            rows = torch.from_numpy(np.array(features[indices[0] : indices[-1] + 1])[np.array(indices) - indices[0]])
            yield Batch(indices, head_scores(rows.to(device, dtype), weight, bias, **options)._asdict(), [])

    x, b = torch.empty(features.shape, dtype=dtype, device="meta"), None if bias is None else bias.to("meta")
    head_scores(x, weight.to("meta"), b, **options)  # refuses what does not fit, without reading anything
    status = os.stat(path)
    of_file = _content(path) if content else [status.st_size, status.st_mtime_ns]
    settings = {**options, "features": of_file, "head": head}
    n = len(features)
    job = Job([str(i) for i in range(n)], np.zeros(n, np.uint64), np.full(n, -1), settings, "rows")
    return run(job, batches, out, resume=resume, progress=progress)


def _content(path: str) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()
