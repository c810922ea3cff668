"""GradNorm scores from the vendor library's matmul: z = x·Wᵀ in float32 (or float64) to a workspace, then rows.py.

Traffic: that of the matmul; 8·B·C bytes of logits, written and read; the features once more, for ‖x‖_p. Rows are
processed in chunks: as many as fit a workspace of 64 MiB (`Config.workspace`), but at least 512. For half precision the
library must return float32 from half operands (torch 2.8 on CUDA); this is tried once per device and dtype.
"""

from __future__ import annotations

import torch

from . import rows
from .config import Config, Shape, cdiv
from .problem import UNIFORM_ALONE, Problem, Scores, copies

CONFIGURATION = Config(0, 0, 0, 0, 0)  # only the workspace matters
HALF_TO_FLOAT32 = "dtype_out" in torch.ops.aten.mm.overloads()
_tried: dict[tuple[torch.device, torch.dtype], str] = {}


def configuration(shape: Shape) -> Config:
    return CONFIGURATION


def why_not(problem: Problem, arch: str) -> str:
    x, w = problem.features, problem.weight
    if w is None or not problem.uniform:
        return "takes a weight, not logits" if w is None else UNIFORM_ALONE
    if x.dtype != torch.float64 and (copies(x) or copies(w)):
        return "would copy a matrix: neither its rows nor its columns are contiguous"
    return "" if x.dtype.itemsize > 2 else why_not_halves(x.device, x.dtype)


def why_not_halves(device: torch.device, dtype: torch.dtype) -> str:
    """Why the library's matmul of halves cannot be used on this device; empty if it can."""
    if not HALF_TO_FLOAT32 or device.type not in ("cuda", "meta"):
        return "needs torch 2.8 and CUDA to multiply halves into float32"
    if device.type == "cuda" and (device, dtype) not in _tried:
        if torch.cuda.is_current_stream_capturing():
            return "has not been tried on this device before the CUDA graph's capture"
        _tried[device, dtype] = _try_halves(device, dtype)
    return _tried.get((device, dtype), "")


def _try_halves(device: torch.device, dtype: torch.dtype) -> str:
    """Multiply integers into padded float32 rows, as `score` does. The sums are exact in float32 in any order
    but too large for half precision: this detects a library that rounds to half precision on the way."""
    a = torch.arange(24 * 40, device=device).remainder(61).view(24, 40).to(dtype)
    w = torch.arange(20 * 40, device=device).remainder(53).view(20, 40).to(dtype)
    out = torch.full((24, 32), -1.0, dtype=torch.float32, device=device)
    try:
        torch.mm(a, w.t(), out=out[:, :20], out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise  # says nothing about the library
    except (RuntimeError, TypeError) as error:
        return f"failed to multiply {dtype} into float32 here: {' '.join(str(error).split())[:200]}"
    right = torch.equal(out[:, :20], a.float() @ w.float().t()) and bool((out[:, 20:] == -1.0).all())
    return "" if right else f"multiplied {dtype} into padded float32 rows wrongly here"


def score(problem: Problem, scores: Scores, config: Config) -> None:
    """Scores of features (B, D) under the head's weight (C, D) and bias (C,)."""
    features, w, out = problem.features, problem.weight, scores.out
    assert w is not None
    b, c = len(features), len(w)
    width = cdiv(c, 16) * 16
    chunk = rows.rows_per_chunk(b, out.itemsize * width, config)
    logits = torch.empty((1, chunk, width), dtype=out.dtype, device=features.device)
    options = {"out_dtype": torch.float32} if features.dtype.itemsize == 2 else {}
    for start in range(0, b, chunk):
        part = problem.rows(start, start + chunk)
        z = logits[:, : len(part.features)]
        torch.mm(part.features, w.t(), out=z[0, :, :c], **options)
        rows.score(part, scores.rows(start, start + chunk), logits=z)
