"""GradNorm scores from logits in memory: each program reads its rows of logits and features once.

    score = (‖x‖₁ + bias_norm)·Σ_c |p_c − 1/C|·scale/T,   p = softmax(z/T)

Rows of up to MAX_RESIDENT classes stay in registers. A program reads longer rows twice, once for m and S and once for
the deviations, and three more times if they need the careful form (deviation.py). Traffic: B·C logits and B·D features.
tiled.py and library.py launch this kernel after their matmul. Their `Workspace` may hold the logits in slices, which
are summed here, and m and S of each tile of long rows, which saves the first read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from .config import ANY, Config, Line, Table, cdiv, choose
from .deviation import (
    any_row,
    centred_again,
    deviation_of_rows,
    expm1,
    finite_max,
    first_at,
    log_mean_exp,
    needs_careful_form,
    sign_of,
    statistics_of_tile,
)
from .device import architecture, vector
from .launch import launch
from .output import store_scores
from .problem import Problem, Scores

MAX_RESIDENT = 8192
TILES = 256  # class tiles whose statistics are read at once
MIN_ROWS = 512  # that a workspace holds at least


@triton.jit
def _logits(
    Z, BIAS, first, C, width, live, stride_zc, stride_b,
    HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, dtype,
):  # fmt: skip
    """Logits of the classes from `first` on of rows Z (B, 1), −inf beyond C; which are valid.  # -> 2 x (B, BLOCK_C)"""
    classes = tl.arange(0, BLOCK_C)[None, :]
    valid = classes < C - first
    at = (first + classes).to(tl.int64)
    readable = classes < width - first  # four at a time if the width is a multiple of 16
    z = tl.load(Z + at * stride_zc, mask=live & readable, other=0.0).to(dtype)
    if HAS_BIAS:
        z += tl.load(BIAS + at * stride_b, mask=valid, other=0.0).to(dtype)
    return tl.where(live & valid, z, float("-inf")), valid


@triton.jit
def _sum_of_expm1(
    Z, BIAS, r, C, width, live, inv_temperature, stride_zc, stride_b,
    HAS_BIAS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, dtype,
):  # fmt: skip
    """Σ expm1((z − r)/T) of rows longer than a block.  # Z (B, 1), r (B,) -> (B,)"""
    total = tl.zeros((BLOCK_B,), dtype)
    for start in range(0, C, 16 * BLOCK_C):  # two levels: in a long sum of equal terms the rounding errors add up
        sums = tl.zeros((BLOCK_B, BLOCK_C), dtype)
        for c in tl.range(start, tl.minimum(start + 16 * BLOCK_C, C), BLOCK_C, num_stages=STAGES):
            z, valid = _logits(Z, BIAS, c, C, width, live, stride_zc, stride_b, HAS_BIAS, BLOCK_C, dtype)
            sums += tl.where(valid, expm1((z - r[:, None]) * inv_temperature), 0.0)
        total += tl.sum(sums, 1)
    return total


@triton.jit
def _deviations(
    Z, BIAS, m, centre, mean, C, width, live, inv_temperature, stride_zc, stride_b,
    CAREFUL: tl.constexpr, FIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, dtype,
):  # fmt: skip
    """Σ|u| − Σu·Σsign(u)/C and Σu of rows longer than a block, where u = exp((z − centre)/T) − mean, with expm1 for exp
    if CAREFUL; with FIND also the first class whose logit is m.  # Z (B, 1), m, centre, mean (B,) -> 3 x (B,)"""
    classes = tl.arange(0, BLOCK_C)[None, :]
    index = tl.full((BLOCK_B,), 2147483647, tl.int32)
    total = tl.zeros((BLOCK_B,), dtype)
    delta = tl.zeros((BLOCK_B,), dtype)
    sigma = tl.zeros((BLOCK_B,), dtype)
    for start in range(0, C, 16 * BLOCK_C):
        totals = tl.zeros((BLOCK_B, BLOCK_C), dtype)
        deltas = tl.zeros((BLOCK_B, BLOCK_C), dtype)
        sigmas = tl.zeros((BLOCK_B, BLOCK_C), dtype)
        for c in tl.range(start, tl.minimum(start + 16 * BLOCK_C, C), BLOCK_C, num_stages=STAGES):
            z, valid = _logits(Z, BIAS, c, C, width, live, stride_zc, stride_b, HAS_BIAS, BLOCK_C, dtype)
            if FIND:
                index = tl.minimum(index, first_at(z, m, c + classes))
            d = (z - centre[:, None]) * inv_temperature
            t = expm1(d) if CAREFUL else tl.exp(d)
            u = tl.where(valid, t - mean[:, None], 0.0)
            totals += tl.abs(u)
            deltas += u
            sigmas += sign_of(u)
        total += tl.sum(totals, 1)
        delta += tl.sum(deltas, 1)
        sigma += tl.sum(sigmas, 1)
    return total - delta * sigma / C, delta, index


@triton.jit
def _merged(STATISTICS, rows, B, tiles, inv_temperature, BLOCK_B: tl.constexpr, TILES: tl.constexpr):
    """m and S of whole rows from their tiles' values.  # STATISTICS (2, B, tiles), rows (BLOCK_B,) -> 2 x (BLOCK_B,)"""
    at = STATISTICS + tl.where(rows < B, rows, 0)[:, None] * tiles
    m = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    for j in range(0, tiles, TILES):
        tile = j + tl.arange(0, TILES)[None, :]
        m = tl.maximum(m, tl.max(tl.load(at + tile, mask=tile < tiles, other=float("-inf")), 1))
    s = tl.zeros((BLOCK_B,), tl.float32)
    for j in range(0, tiles, TILES):
        tile = j + tl.arange(0, TILES)[None, :]
        tile_m = tl.load(at + tile, mask=tile < tiles, other=float("-inf"))
        tile_s = tl.load(at + tl.cast(B, tl.int64) * tiles + tile, mask=tile < tiles, other=0.0)
        s += tl.sum(tile_s * tl.exp((tile_m - finite_max(m)[:, None]) * inv_temperature), 1)
    return m, s


@triton.jit(do_not_specialize=["B", "n_slices", "stride_o"])
def rows_kernel(
    X,  # (B, D): features, or shares of ‖x‖₁; row stride stride_xb * VEC
    Z,  # (B, C): logits; or (n_slices, B, width), to be summed; row stride stride_zb * VEC_Z
    BIAS,  # (C,), added to the logits
    STATISTICS,  # (2, B, tiles) of tiles of TILE_C classes: m and S; with TILE_C
    OUT,  # (1, B), or (6, B) with ALL_FIELDS; its dtype, float32 or float64, is that of all sums
    PREDICTION,  # (B,) int64, with ALL_FIELDS
    B, C, D, width, n_slices,
    inv_temperature, inv_temperature_low, scale, bias_norm,
    stride_xb, stride_xd, stride_zs, stride_zb, stride_zc, stride_b, stride_o,
    VEC: tl.constexpr, VEC_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALL_FIELDS: tl.constexpr, RESIDENT: tl.constexpr, SLICED: tl.constexpr,
    TILE_C: tl.constexpr, TILES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """width >= C: how many columns of logits may be read. D and stride_xb are passed divided by VEC, width and
    stride_zb divided by VEC_Z."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    width = width * VEC_Z
    stride_zb = tl.cast(stride_zb, tl.int64) * VEC_Z
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = (rows < B)[:, None]
    dtype = OUT.dtype.element_ty
    # Triton passes floats as float32: the rest of 1/T comes separately
    inv_temperature = tl.cast(inv_temperature, dtype) + tl.cast(inv_temperature_low, dtype)

    # 1. ‖x‖₁
    columns = tl.arange(0, BLOCK_D)
    norm = tl.zeros((BLOCK_B, BLOCK_D), dtype)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        x = tl.load(
            X + rows[:, None] * stride_xb + (start + columns)[None, :].to(tl.int64) * stride_xd,
            mask=live & (columns < D - start)[None, :],
            other=0.0,
        )
        norm += tl.abs(x.to(dtype))

    # 2. Σ|p − 1/C|
    z_rows = Z + rows[:, None] * stride_zb
    if RESIDENT:
        z, valid = _logits(z_rows, BIAS, 0, C, width, live, stride_zc, stride_b, HAS_BIAS, BLOCK_C, dtype)
        if SLICED:
            for k in tl.range(1, n_slices, num_stages=STAGES):
                z_slice = z_rows + tl.cast(k, tl.int64) * stride_zs
                z += _logits(z_slice, BIAS, 0, C, width, live, stride_zc, stride_b, False, BLOCK_C, dtype)[0]
        m, s, deviation = deviation_of_rows(z, valid, C, inv_temperature)
        index = first_at(z, m, tl.arange(0, BLOCK_C)[None, :]) if ALL_FIELDS else 0
    else:
        if TILE_C:
            m, s = _merged(STATISTICS, rows, B, tl.cdiv(C, TILE_C), inv_temperature, BLOCK_B, TILES)
        else:  # the first read: merge blocks as they come
            m = tl.full((BLOCK_B,), float("-inf"), dtype)
            s = tl.zeros((BLOCK_B,), dtype)
            for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
                z, valid = _logits(z_rows, BIAS, c, C, width, live, stride_zc, stride_b, HAS_BIAS, BLOCK_C, dtype)
                block_m, block_s = statistics_of_tile(z, inv_temperature)
                new = tl.maximum(m, block_m)
                shift = finite_max(new)
                s = s * tl.exp((m - shift) * inv_temperature) + block_s * tl.exp((block_m - shift) * inv_temperature)
                m = new
        total, delta, index = _deviations(
            z_rows, BIAS, m, finite_max(m), s / C, C, width, live, inv_temperature, stride_zc, stride_b,
            False, ALL_FIELDS, HAS_BIAS, BLOCK_B, BLOCK_C, STAGES, dtype,
        )  # fmt: skip
        s += delta  # Σt again, without the rounding of the merges
        deviation = total / s
        small = needs_careful_form(deviation)
        if any_row(small):
            r = log_mean_exp(m, s, C, inv_temperature)
            q = _sum_of_expm1(
                z_rows, BIAS, r, C, width, live, inv_temperature, stride_zc, stride_b,
                HAS_BIAS, BLOCK_B, BLOCK_C, STAGES, dtype,
            )  # fmt: skip
            r = centred_again(r, q, C, inv_temperature)
            q = _sum_of_expm1(
                z_rows, BIAS, r, C, width, live, inv_temperature, stride_zc, stride_b,
                HAS_BIAS, BLOCK_B, BLOCK_C, STAGES, dtype,
            )  # fmt: skip
            total, delta, _ = _deviations(
                z_rows, BIAS, m, r, q / C, C, width, live, inv_temperature, stride_zc, stride_b,
                True, False, HAS_BIAS, BLOCK_B, BLOCK_C, STAGES, dtype,
            )  # fmt: skip
            deviation = tl.where(small, total / (C + q), deviation)
    store_scores(
        OUT, PREDICTION, rows, B, stride_o,
        tl.sum(norm, 1), m, index, s, deviation,
        inv_temperature, scale, bias_norm,
        ALL_FIELDS,
    )  # fmt: skip


# About 16 logits per thread: enough loads in flight for full bandwidth, few enough to stay in registers. Small batches
# get one program per row.
TABLE: Table = {
    "any": [
        Line("float64", ANY, 16, Config(32, 16, 32, 4, 2)),
        Line("float64", ANY, 128, Config(4, 128, 256, 4, 2)),
        Line("float64", ANY, 1024, Config(1, 1024, 512, 8, 2)),
        Line("float64", ANY, 2048, Config(1, 2048, 1024, 16, 2)),
        Line("float64", ANY, ANY, Config(1, 1024, 256, 8, 2)),
        Line("any", ANY, 16, Config(64, 16, 32, 4, 2)),
        Line("any", 64, 512, Config(1, 512, 512, 4, 3)),
        Line("any", ANY, 128, Config(4, 128, 256, 4, 2)),
        Line("any", 64, 1024, Config(1, 1024, 512, 4, 3)),
        Line("any", ANY, 1024, Config(2, 1024, 1024, 4, 2)),
        Line("any", ANY, 4096, Config(1, 4096, 2048, 8, 2)),
        Line("any", ANY, MAX_RESIDENT, Config(1, 8192, 2048, 16, 2)),
        Line("any", ANY, ANY, Config(1, 1024, 2048, 8, 3)),
    ],
}


def configuration(b: int, c: int, dtype: torch.dtype, arch: str) -> Config:
    """The configuration for scores of this dtype."""
    return choose(TABLE, b, c, dtype, arch)


class Workspace(NamedTuple):
    """Logits as written by a matmul."""

    logits: torch.Tensor  #: (slices, B, width); slices are summed, columns beyond `classes` ignored
    classes: int
    statistics: torch.Tensor | None = None  #: m and S of each tile of long rows: (2, B, tiles)
    tile_c: int = 0  #: classes of such a tile


def rows_per_chunk(batch: int, row_bytes: int, config: Config) -> int:
    """How many rows the workspace holds at a time, for row_bytes bytes per row."""
    return min(batch, max(MIN_ROWS, config.workspace * 2**20 // row_bytes // MIN_ROWS * MIN_ROWS))


def why_not(problem: Problem, arch: str) -> str:
    """Why this kernel does not take the problem; empty if it does."""
    return "" if problem.logits is not None else "takes logits, not a weight"


def score_rows(
    problem: Problem, scores: Scores, config: Config | None = None, workspace: Workspace | None = None
) -> None:
    """Scores of features (B, D) with the problem's logits (B, C), or with the workspace's plus the problem's bias.

    ValueError if there is neither.
    """
    x, bias, out = problem.features, problem.bias, scores.out
    if workspace is not None:
        z, c, width = workspace.logits, workspace.classes, workspace.logits.shape[2]
    elif problem.logits is not None:
        z, c, width = problem.logits[None], problem.classes, problem.classes
    else:
        raise ValueError("rows takes logits, not a weight")
    b, d = x.shape
    statistics, tile_c = (None, 0) if workspace is None else workspace[2:]
    # Without slices the configuration must not depend on the batch size, and so a row's bits do not either.
    cfg = config or configuration(b if len(z) > 1 else ANY, c, out.dtype, architecture(x.device))
    vec, vec_z = vector(d, x.stride(0)), vector(width, z.stride(1))
    high = float(np.float32(1.0 / problem.temperature))
    launch(rows_kernel, cdiv(b, cfg.block_b), cfg, (
        x, z, z if bias is None else bias, out if statistics is None else statistics,
        out, out if scores.prediction is None else scores.prediction,
        b, c, d // vec, width // vec_z, len(z),
        high, 1.0 / problem.temperature - high, problem.scale, problem.bias_norm,
        x.stride(0) // vec, x.stride(1), z.stride(0) if len(z) > 1 else 0, z.stride(1) // vec_z, z.stride(2),
        0 if bias is None else bias.stride(0), out.stride(0),
    ), dict(
        VEC=vec, VEC_Z=vec_z, HAS_BIAS=bias is not None, ALL_FIELDS=scores.prediction is not None,
        RESIDENT=c <= cfg.block_c, SLICED=len(z) > 1, TILE_C=0 if statistics is None else tile_c, TILES=TILES,
        BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d, STAGES=cfg.num_stages,
    ))  # fmt: skip
