"""p-norms of each sample's gradient, and how the norms of several parameters combine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIECE = 2**16  #: numbers that stay in the cache between two passes
RUN = 2**12  #: numbers that can be added one by one without losing accuracy


def p_norm(values: Tensor, p: float, dim: int = 1) -> Tensor:
    """‖values‖_p along one dimension in float32 or float64, scaled by the largest magnitude if powers need it."""
    if not values.numel():
        return values.new_zeros(values.shape[:dim] + values.shape[dim + 1 :], dtype=norm_dtype(values.dtype))
    dtype = norm_dtype(values.dtype)
    if p in (1.0, math.inf):
        return _norm(values, p, dim, dtype)
    if p == 2.0 and not values.is_mps:  # float64, which Apple lacks, holds the squares of float32
        return torch.linalg.vector_norm(values, p, dim=dim, dtype=torch.float64).to(dtype)
    largest = torch.linalg.vector_norm(values, math.inf, dim=dim, keepdim=True, dtype=dtype)
    # 0/0 and inf/inf would be NaN
    unit = torch.where((largest > 0) & (largest < math.inf), largest, torch.ones_like(largest))
    return _norm(values.to(dtype) / unit, p, dim, dtype) * unit.squeeze(dim)


def _norm(values: Tensor, p: float, dim: int, dtype: torch.dtype) -> Tensor:
    """In pieces on a CPU: torch's norm adds sequentially there and loses three digits over a million numbers."""
    if values.device.type != "cpu" or p == math.inf:
        return torch.linalg.vector_norm(values, p, dim=dim, dtype=dtype)
    length = values.shape[dim]
    if p == 1.0:  # torch.sum adds pairwise, and is twice as fast
        pieces = values.split(max(RUN, PIECE * length // values.numel()), dim)
        return torch.stack([piece.abs().sum(dim, dtype=dtype) for piece in pieces]).sum(0)
    parts = [torch.linalg.vector_norm(piece, p, dim=dim, dtype=dtype) for piece in values.split(RUN, dim)]
    return torch.linalg.vector_norm(torch.stack(parts), p, dim=0)


def combined(norms: list[Tensor], p: float) -> Tensor:
    """The norm of a concatenation, from the norms (B,) of its parts."""
    return p_norm(torch.stack(norms, 1), p)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
