"""p-norms of each sample's gradient, and how the norms of several parameters combine."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def p_norm(values: Tensor, p: float, dim: int = 1) -> Tensor:
    """‖values‖_p along one dimension in float32 or float64, scaled by the largest magnitude where powers need it."""
    if not values.shape[dim]:
        return values.new_zeros(values.shape[:dim] + values.shape[dim + 1 :], dtype=norm_dtype(values.dtype))
    dtype = norm_dtype(values.dtype)
    if p in (1.0, math.inf):
        return torch.linalg.vector_norm(values, p, dim=dim, dtype=dtype)
    largest = torch.linalg.vector_norm(values, math.inf, dim=dim, keepdim=True, dtype=dtype)
    # 0/0 and inf/inf would be NaN
    unit = torch.where((largest > 0) & (largest < math.inf), largest, torch.ones_like(largest))
    return torch.linalg.vector_norm(values.to(dtype) / unit, p, dim=dim) * unit.squeeze(dim)


def combined(norms: list[Tensor], p: float) -> Tensor:
    """The norm of a concatenation, from the norms (B,) of its parts."""
    return p_norm(torch.stack(norms, 1), p)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
