"""Rows of features to scores, from arrays that may exceed memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import digest
from ..functional import HeadScores, head_scores
from .run_log import run
from .tables import Table


def load_array(name: str, path: str, mapped: bool = False) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{name}: no file {path}") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: cannot read {path} as a NumPy array: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"{name}: expected float16, float32 or float64 in {path}, got {getattr(array, 'dtype', 'an archive')}"
        )
    return array


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
    """Score rows (N, D) of an array, which may be memory-mapped and larger than memory; see `run_log.run`."""

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
    return run([str(i) for i in range(len(features))], settings, batches, out, "rows", resume, progress)
