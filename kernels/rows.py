"""GradNorm scores from logits that are in memory: each program reads its rows of logits and features once.

    score = (‖x‖₁ + bias_norm)·Σ_c |p_c − 1/C|·scale/T,   p = softmax(z/T)

Rows of up to MAX_RESIDENT classes stay in registers. A longer row is read twice by the program that owns it: first for
max, Σexp and Σexpm1, merged over blocks; then, from L2 where it fits, for the deviations. Traffic: one read of B·C
logits and B·D features. This is also the second launch of `split.py`, whose features are the shares of ‖x‖₁ and whose
tiles have left the statistics of a long row, so that it is read once.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from .deviation import (
    any_of,
    deviation_of_rows,
    expm1,
    first_at,
    shift_of,
    statistics_of_tile,
    store_scores,
)
from .launch import launch
from .targets import ANY, Choice, Config, Table, architecture, cdiv, choose
from .tile import merged_statistics

MAX_RESIDENT = 8192
TILES = 256  # class tiles whose statistics are read at a time


@triton.jit
def _logits(Z, BIAS, first, C, width, live, stride_zc, stride_b, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, dtype):
    """Of classes first, first + 1, ... of the rows at Z, −inf beyond C; and which are not.  # -> 2 x (B, BLOCK_C)"""
    classes = tl.arange(0, BLOCK_C)[None, :]
    valid = classes < C - first
    at = (first + classes).to(tl.int64)
    readable = classes < width - first  # four at a time where the width is a multiple of 16
    z = tl.load(Z + at * stride_zc, mask=live & readable, other=0.0).to(dtype)
    if HAS_BIAS:
        z += tl.load(BIAS + at * stride_b, mask=valid, other=0.0).to(dtype)
    return tl.where(live & valid, z, float("-inf")), valid


@triton.jit(do_not_specialize=["B", "stride_o"])
def rows_kernel(
    X, Z, BIAS, STATISTICS, OUT, PREDICTION,
    B, C, D, width,
    inv_temperature, inv_temperature_low, scale, bias_norm,
    stride_xb, stride_xd, stride_zb, stride_zc, stride_b, stride_o,
    HAS_BIAS: tl.constexpr, HEAD: tl.constexpr, RESIDENT: tl.constexpr,
    TILE_C: tl.constexpr, TILES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """width >= C: how many columns of logits may be read.

    TILE_C: of how many classes each are the tiles whose m, S and Q are in STATISTICS (3, B, tiles); 0 of none.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = (rows < B)[:, None]
    dtype = OUT.dtype.element_ty  # float32, or float64 for float64 logits
    # float arguments are float32
    inv_temperature = tl.cast(inv_temperature, dtype) + tl.cast(inv_temperature_low, dtype)

    # 1. ‖x‖₁
    columns = tl.arange(0, BLOCK_D)
    norm = tl.zeros((BLOCK_B, BLOCK_D), dtype)
    for start in range(0, D, BLOCK_D):
        x = tl.load(
            X + rows[:, None] * stride_xb + (start + columns)[None, :].to(tl.int64) * stride_xd,
            mask=live & (columns < D - start)[None, :],
            other=0.0,
        )
        norm += tl.abs(x.to(dtype))

    # 2. Σ|p − 1/C|
    z_rows = Z + rows[:, None] * stride_zb
    classes = tl.arange(0, BLOCK_C)[None, :]
    if RESIDENT:
        z, valid = _logits(z_rows, BIAS, 0, C, width, live, stride_zc, stride_b, HAS_BIAS, BLOCK_C, dtype)
        m, s, deviation = deviation_of_rows(z, valid, C, inv_temperature)
        index = first_at(z, m, classes) if HEAD else 0
    else:
        if TILE_C:
            tiles = tl.cdiv(C, TILE_C)
            at = STATISTICS + tl.where(rows < B, rows, 0) * tiles
            kind = tl.cast(B, tl.int64) * tiles
            m, near, mean = merged_statistics(at, kind, C, tiles, inv_temperature, TILE_C, TILES)
        else:  # a first read, merging as it goes
            m = tl.full((BLOCK_B,), float("-inf"), dtype)
            s = tl.zeros((BLOCK_B,), dtype)
            q = tl.zeros((BLOCK_B,), dtype)
            for c in range(0, C, BLOCK_C):
                z, valid = _logits(z_rows, BIAS, c, C, width, live, stride_zc, stride_b, HAS_BIAS, BLOCK_C, dtype)
                n = tl.minimum(C - c, BLOCK_C)
                block_m, block_s, block_q = statistics_of_tile(z, valid, n, inv_temperature)
                shift = shift_of(tl.maximum(m, block_m))
                d = (m - shift) * inv_temperature
                delta = expm1(d, tl.exp(d))
                block_d = (block_m - shift) * inv_temperature
                block_delta = expm1(block_d, tl.exp(block_d))
                s = s * (1.0 + delta) + block_s * (1.0 + block_delta)
                q = q * (1.0 + delta) + c * delta + (block_q * (1.0 + block_delta) + n * block_delta)
                m = tl.maximum(m, block_m)
            near = s > 0.5 * C
            mean = tl.where(near, q, s) / C
        shift = shift_of(m)
        some_near = any_of(near)
        index = tl.full((BLOCK_B,), 2147483647, tl.int32)
        total = tl.zeros((BLOCK_B,), dtype)
        delta = tl.zeros((BLOCK_B,), dtype)
        sigma = tl.zeros((BLOCK_B,), dtype)
        for start in range(0, C, 16 * BLOCK_C):  # sums of many equal numbers round all one way: 16 blocks at a time
            totals = tl.zeros((BLOCK_B, BLOCK_C), dtype)
            deltas = tl.zeros((BLOCK_B, BLOCK_C), dtype)
            sigmas = tl.zeros((BLOCK_B, BLOCK_C), dtype)
            for c in range(start, tl.minimum(start + 16 * BLOCK_C, C), BLOCK_C):
                z, valid = _logits(z_rows, BIAS, c, C, width, live, stride_zc, stride_b, HAS_BIAS, BLOCK_C, dtype)
                if HEAD:
                    index = tl.minimum(index, first_at(z, m, c + classes))
                d = (z - shift[:, None]) * inv_temperature
                t = tl.exp(d)
                if some_near:
                    t = tl.where(near[:, None], expm1(d, t), t)
                u = tl.where(valid, t - mean[:, None], 0.0)
                totals += tl.abs(u)
                deltas += u
                sigmas += tl.where(u > 0.0, 1.0, 0.0) - tl.where(u < 0.0, 1.0, 0.0)
            total += tl.sum(totals, 1)
            delta += tl.sum(deltas, 1)
            sigma += tl.sum(sigmas, 1)
        s = mean * C + delta + tl.where(near, C, 0)  # Σt once more, now without the many merges
        deviation = (total - delta * sigma / C) / s
    store_scores(
        OUT, PREDICTION, rows, B, stride_o,
        tl.sum(norm, 1), m, index, s, deviation,
        inv_temperature, scale, bias_norm,
        HEAD,
    )  # fmt: skip


# About 16 logits to a thread: enough loads in flight to stream, few enough to stay in registers.
TABLE: Table = {
    "any": [
        Choice("any", ANY, 16, Config(64, 16, 32, 4, 2)),
        Choice("any", ANY, 128, Config(8, 128, 256, 4, 2)),
        Choice("any", ANY, 1024, Config(2, 1024, 1024, 4, 2)),
        Choice("float64", ANY, 2048, Config(1, 2048, 1024, 8, 2)),
        Choice("float64", ANY, ANY, Config(1, 1024, 256, 8, 2)),
        Choice("any", ANY, 4096, Config(1, 4096, 2048, 8, 2)),
        Choice("any", ANY, MAX_RESIDENT, Config(1, 8192, 2048, 16, 2)),
        Choice("any", ANY, ANY, Config(1, 1024, 256, 8, 2)),
    ],
    "sm_80": [Choice("float64", ANY, ANY, Config(1, 1024, 256, 4, 2))],
}


def configuration(b: int, c: int, dtype: torch.dtype, arch: str) -> Config:
    return choose(TABLE, b, c, dtype, arch)


def score_rows(
    features: torch.Tensor,
    logits: torch.Tensor,
    out: torch.Tensor,
    prediction: torch.Tensor | None,
    temperature: float,
    scale: float,
    bias_norm: float,
    bias: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    tile_c: int = 0,
    padded: bool = False,
    config: Config | None = None,
) -> None:
    """Scores of features (B, D) with logits (B, C), into out (1, B), or (6, B) with prediction.

    bias (C,) is added to the logits where those are still without. Padded logits have rows of logits.stride(0) columns,
    of which the first C count.

    A row of more than MAX_RESIDENT classes is read once if m, S and Q of its tiles of tile_c classes are in statistics
    (3, B, tiles), else twice.
    """
    (b, d), c = features.shape, logits.shape[1]
    cfg = config or configuration(b, c, out.dtype, architecture(logits.device))
    high = float(np.float32(1.0 / temperature))
    launch(rows_kernel, cdiv(b, cfg.block_b), cfg, (
        features, logits, logits if bias is None else bias, out if statistics is None else statistics,
        out, out if prediction is None else prediction,
        b, c, d, logits.stride(0) if padded else c,
        high, 1.0 / temperature - high, scale, bias_norm,
        features.stride(0), features.stride(1), logits.stride(0), logits.stride(1),
        0 if bias is None else bias.stride(0), out.stride(0),
    ), dict(
        HAS_BIAS=bias is not None, HEAD=prediction is not None, RESIDENT=c <= cfg.block_c,
        TILE_C=0 if statistics is None else tile_c, TILES=TILES,
        BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
    ))  # fmt: skip
