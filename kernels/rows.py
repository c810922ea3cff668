"""GradNorm scores from logits in memory: each program reads its rows of logits and features.

    score = ‖(x, bias_norm)‖_p·‖softmax(z/T) − 1/C‖_p·scale/T

Rows of up to MAX_RESIDENT classes (float64: 1024) stay in registers. It reads longer rows twice, once for m and S
and once for the deviations; three more times if they need the careful form (deviation.py), once more for p other than
1, and twice more for all fields. Traffic: B·C logits and B·D features, which p other than 1 and ∞ reads twice. tiled.py
and library.py launch this kernel after their matmul. The logits may come in slices, which are summed here, and long
rows with m and S of each tile, which saves the first read.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from .config import ANY, Config, Line, Shape, cdiv, choose
from .deviation import deviation_of_rows
from .device import architecture, vector
from .launch import launch
from .long_rows import (
    deviation_of_long_rows,
    load_logits,
    merged,
    spread_of_long_rows,
    statistics_of_long_rows,
)
from .norm import compiled, norm_in_memory
from .output import store_scores
from .problem import UNIFORM_ALONE, Problem, Scores
from .spread import spread_of_rows

MAX_RESIDENT = 8192
MIN_ROWS = 512  # that a workspace holds at least


@triton.jit(do_not_specialize=["B", "n_slices", "scale", "stride_o"])
def rows_kernel(
    X,  # (B, D): features, or shares of ‖x‖_p; row stride stride_xb * VEC
    Z,  # (B, C): logits; or (n_slices, B, width), to be summed; row stride stride_zb * VEC_Z
    BIAS,  # (C,), added to the logits, or None
    STATISTICS,  # (2, B, D): m and S of the tiles of classes whose shares of ‖x‖_p X has; or None
    OUT,  # (1, B), or (10, B) with PREDICTION; its dtype, float32 or float64, is that of all sums
    PREDICTION,  # (B,) int64, or None
    B, C, D, width, n_slices,
    inv_temperature, inv_temperature_low, p, p_low, scale, bias_norm,
    stride_xb, stride_xd, stride_zb, stride_zc, stride_b, stride_o,
    VEC: tl.constexpr, VEC_Z: tl.constexpr,
    NORM: tl.constexpr, RESIDENT: tl.constexpr, SLICED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """width >= C: how many columns of logits may be read. D and stride_xb are passed divided by VEC, width and
    stride_zb divided by VEC_Z."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    width = width * VEC_Z
    stride_zb = tl.cast(stride_zb, tl.int64) * VEC_Z
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = tl.minimum(rows, B - 1)  # rows beyond B read the last one
    dtype = OUT.dtype.element_ty
    # Triton passes floats as float32: what that rounds off comes separately
    inv_temperature = tl.cast(inv_temperature, dtype) + tl.cast(inv_temperature_low, dtype) * 2.0**-24
    p = tl.cast(p, dtype) + tl.cast(p_low, dtype) * 2.0**-24

    # 1. ‖x‖_p
    norm = norm_in_memory(X, rows, B, 0, D, BLOCK_D, stride_xb, stride_xd, p, NORM, BLOCK_D, STAGES, dtype)

    # 2. ‖p − 1/C‖_p
    z_rows = Z + inside[:, None] * stride_zb
    if RESIDENT:
        z, valid = load_logits(z_rows, BIAS, 0, C, width, stride_zc, stride_b, BLOCK_C, dtype)
        if SLICED:
            for k in tl.range(1, n_slices, num_stages=STAGES):
                z_slice = z_rows + tl.cast(k, tl.int64) * B * stride_zb
                z += load_logits(z_slice, None, 0, C, width, stride_zc, 0, BLOCK_C, dtype)[0]
        m, s, deviation = deviation_of_rows(z, valid, C, p, inv_temperature, NORM)
        index, entropy, sum_squares, gini, kl = spread_of_rows(
            z, valid, m, s, C, inv_temperature, PREDICTION is not None
        )
    else:
        if STATISTICS is not None:
            m, s = merged(STATISTICS, inside, B, D, inv_temperature)
        else:
            m, s = statistics_of_long_rows(
                z_rows, BIAS, C, width, inv_temperature, stride_zc, stride_b,
                BLOCK_C, STAGES,
            )  # fmt: skip
        s, deviation, index = deviation_of_long_rows(
            z_rows, BIAS, m, s, C, width, inv_temperature, p, stride_zc, stride_b,
            NORM, PREDICTION is not None, BLOCK_C, STAGES,
        )  # fmt: skip
        entropy, sum_squares, gini, kl = m, m, m, m
        if PREDICTION is not None:
            entropy, sum_squares, gini, kl = spread_of_long_rows(
                z_rows, BIAS, m, s, index, C, width, inv_temperature, stride_zc, stride_b,
                BLOCK_C, STAGES,
            )  # fmt: skip
    store_scores(
        OUT, PREDICTION, rows, B, stride_o,
        norm, deviation, m, index, s, entropy, sum_squares, gini, kl,
        inv_temperature, scale, bias_norm, p,
        NORM,
    )  # fmt: skip


# About 16 logits per thread: enough loads in flight for full bandwidth, few enough to stay in registers. Small batches
# get one program per row. Where `registers` is set, ptxas left alone spills for the sake of occupancy.
TABLE = [
    Line("float64", ANY, 16, Config(32, 16, 32, 4, 2)),
    Line("float64", ANY, 128, Config(4, 128, 256, 4, 2)),
    Line("float64", ANY, 1024, Config(1, 1024, 512, 8, 2)),
    Line("float64", ANY, ANY, Config(1, 1024, 256, 8, 2, registers=255)),
    Line("any", ANY, 16, Config(64, 16, 32, 4, 2)),
    Line("any", 64, 512, Config(1, 512, 512, 4, 3)),
    Line("any", ANY, 128, Config(4, 128, 256, 4, 2)),
    Line("any", 64, 1024, Config(1, 1024, 512, 4, 3)),
    Line("any", ANY, 1024, Config(2, 1024, 1024, 4, 2)),
    Line("any", ANY, 4096, Config(1, 4096, 2048, 8, 2)),
    Line("any", ANY, MAX_RESIDENT, Config(1, 8192, 2048, 16, 2)),
    Line("any", ANY, ANY, Config(1, 1024, 2048, 8, 3, registers=96)),
]


def configuration(shape: Shape) -> Config:
    """The configuration for logits in one piece. It does not depend on the batch size: neither do a row's bits."""
    return choose(TABLE, shape._replace(b=ANY))


def rows_per_chunk(batch: int, row_bytes: int, config: Config) -> int:
    """How many rows the workspace holds at a time, for row_bytes bytes per row."""
    return min(batch, max(MIN_ROWS, config.workspace * 2**20 // row_bytes // MIN_ROWS * MIN_ROWS))


def _two_floats(value: float) -> tuple[float, float]:
    """A float32 and 2^24 times the rest, which alone may be too small for float32."""
    high = float(np.float32(value))
    return high, (value - high) * 2.0**24


def why_not(problem: Problem, arch: str) -> str:
    if not problem.uniform:
        return UNIFORM_ALONE
    return "" if problem.logits is not None else "takes logits, not a weight"


def score(
    problem: Problem,
    scores: Scores,
    config: Config | None = None,
    logits: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
) -> None:
    """Scores of features (B, D) with the problem's logits (B, C); or with a matmul's (slices, B, width) plus the
    problem's bias: slices are contiguous and summed, columns beyond C ignored. With statistics (2, B, D), m and S of
    each tile of classes, the features are the tiles' shares of ‖x‖_p."""
    x, bias, out, c = problem.features, problem.bias, scores.out, problem.classes
    if logits is None:
        assert problem.logits is not None
        logits = problem.logits[None]
    (b, d), (n_slices, _, width) = x.shape, logits.shape
    shape = Shape(b if n_slices > 1 else ANY, c, d, out.dtype, architecture(x.device), 0)
    cfg = config or choose(TABLE, shape)
    vec, vec_z = vector(d, x.stride(0)), vector(width, logits.stride(1))
    norm, p = compiled(problem.p)
    (inv_temperature, inv_temperature_low), (p, p_low) = _two_floats(1.0 / problem.temperature), _two_floats(p)
    launch(rows_kernel, cdiv(b, cfg.block_b), cfg, (
        x, logits, bias, statistics, out, scores.prediction,
        b, c, d // vec, width // vec_z, n_slices,
        inv_temperature, inv_temperature_low, p, p_low, int(problem.scale), problem.bias_norm,
        x.stride(0) // vec, x.stride(1), logits.stride(1) // vec_z, logits.stride(2),
        0 if bias is None else bias.stride(0), out.stride(0),
    ), dict(
        VEC=vec, VEC_Z=vec_z, NORM=norm,
        RESIDENT=c <= cfg.block_c, SLICED=n_slices > 1,
        BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d, STAGES=cfg.num_stages,
    ))  # fmt: skip
