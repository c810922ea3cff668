"""GradNorm scores of a few rows: reading W is all the work, so that every multiprocessor takes part in it.

    1   z_k = x_k·W_kᵀ by tiles of classes x slices k of the features, one program each, and Σ|x_k|
    2   z = Σ_k z_k + b,   score = (‖x‖₁ + bias_norm)·Σ_c |p_c − 1/C|·scale/T, one row at a time

Traffic: C·D weights once, 8·B·C·slices bytes of partial logits through L2. Slices are added in their order: the same
bits from run to run. Steps 1 and 2 are two launches of one kernel, or (`one_launch`) one cooperative launch with a
barrier between them, which saves a launch where the launch is most of the time; it has not run on a GPU and is not
chosen by default.
"""

import torch
import triton
import triton.language as tl

from .deviation import deviation_of_rows, first_at, store_scores
from .launch import launch
from .targets import (
    ANY,
    INTERPRETED,
    Choice,
    Config,
    Table,
    architecture,
    cdiv,
    choose,
    dot_precision,
    multiprocessors,
    power_of_2,
    upcast,
)
from .tile import barrier, logits_tile, norm_share

MAX_ROWS = 64
MAX_CLASSES = 4096  # one program holds a row to finish it
MAX_SLICES = 16
BOTH = 0  # STEP: 1 and 2 with a barrier between


@triton.jit(do_not_specialize=["B", "stride_o"])
def few_rows_kernel(
    X, W, BIAS, OUT, PREDICTION, PARTIAL, NORMS, COUNTER,
    B, C, D, n_class_tiles, n_slices, slice_d,
    inv_temperature, scale, bias_norm,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_o,
    HAS_BIAS: tl.constexpr, HEAD: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    STEP: tl.constexpr, ROW_C: tl.constexpr, MAX_SLICES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """PARTIAL: (slices, B, C) logits of each slice; NORMS: (B, slices)."""
    pid = tl.program_id(0)
    if STEP != 2:
        class_tile = pid % n_class_tiles
        k = pid // n_class_tiles
        first = k * slice_d
        last = tl.minimum(first + slice_d, D)
        local = tl.arange(0, BLOCK_B)
        klass = class_tile.to(tl.int64) * BLOCK_C
        classes = klass + tl.arange(0, BLOCK_C)
        zero = tl.cast(0, tl.int64)
        z = logits_tile(
            X, W, BIAS, zero, klass,
            B, C, first, last, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
            False, EVEN_D, False, PRECISION, UPCAST, BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        here = PARTIAL + (k * B + local[:, None]).to(tl.int64) * C + classes[None, :]
        tl.store(here, z, mask=(local < B)[:, None] & (classes < C)[None, :])
        if class_tile == 0:
            share = norm_share(X, zero, B, first, last, BLOCK_D, stride_xb, stride_xd, BLOCK_B, BLOCK_D)
            tl.store(NORMS + local * n_slices + k, share, mask=local < B)
    if STEP == 0:
        barrier(COUNTER, n_class_tiles * n_slices)
    if STEP != 1:
        columns = tl.arange(0, ROW_C)[None, :]
        valid = columns < C
        slices = tl.arange(0, MAX_SLICES)[None, :]
        for row in range(pid, B, tl.num_programs(0)):
            rows = row + tl.arange(0, 1)
            logits = tl.zeros((1, ROW_C), tl.float32)
            for i in tl.range(n_slices, loop_unroll_factor=2):  # two reads at a time on their way, not one
                at = PARTIAL + (i * B + rows[:, None]).to(tl.int64) * C + columns
                logits += tl.load(at, mask=valid, other=0.0, cache_modifier=".cg")
            if HAS_BIAS:
                logits += tl.load(BIAS + columns.to(tl.int64) * stride_b, mask=valid, other=0.0).to(tl.float32)
            logits = tl.where(valid, logits, float("-inf"))
            m, s, deviation = deviation_of_rows(logits, valid, C, inv_temperature)
            shares = NORMS + rows[:, None] * n_slices + slices
            norm = tl.sum(tl.load(shares, mask=slices < n_slices, other=0.0, cache_modifier=".cg"), 1)
            store_scores(
                OUT, PREDICTION, rows, B, stride_o,
                norm, m, first_at(logits, m, columns) if HEAD else 0, s, deviation,
                inv_temperature, scale, bias_norm,
                HEAD,
            )  # fmt: skip


# Narrow tiles of classes; slices of the features until every multiprocessor has a program.
TABLE: Table = {
    "any": [
        Choice("half", 16, ANY, Config(16, 32, 128, 4, 4)),
        Choice("half", 32, ANY, Config(32, 32, 128, 4, 4)),
        Choice("half", 64, ANY, Config(64, 32, 128, 4, 4)),
        Choice("float32", 16, ANY, Config(16, 32, 64, 4, 4)),
        Choice("float32", 32, ANY, Config(32, 32, 64, 4, 4)),
        Choice("float32", 64, ANY, Config(64, 32, 64, 4, 4)),
    ],
    "sm_80": [Choice("float32", 64, ANY, Config(64, 32, 32, 4, 4))],
    "sm_100": [Choice("float32", 64, ANY, Config(64, 32, 32, 4, 4))],
}


def configuration(b: int, c: int, d: int, dtype: torch.dtype, arch: str, processors: int) -> Config:
    config, slices = choose(TABLE, b, c, dtype, arch), 1
    tiles = cdiv(c, config.block_c)
    while slices < MAX_SLICES and 2 * slices * tiles <= processors and 2 * slices * config.block_d <= d:
        slices *= 2
    return config._replace(slices=slices)


def score_few_rows(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    prediction: torch.Tensor | None,
    temperature: float,
    scale: float,
    bias_norm: float,
    config: Config | None = None,
    one_launch: bool = False,
) -> None:
    """Scores of features (B, D) under the head weight (C, D), bias (C,), into out (1, B), or (6, B) with prediction.

    ValueError for more than MAX_ROWS rows or MAX_CLASSES classes; with one_launch where the programs outnumber the
    device's multiprocessors.
    """
    (b, d), c = features.shape, weight.shape[0]
    if b > MAX_ROWS or c > MAX_CLASSES:
        raise ValueError(f"few_rows takes {MAX_ROWS} rows and {MAX_CLASSES} classes, got {b} and {c}")
    device = features.device
    arch = architecture(device)
    cfg = config or configuration(b, c, d, features.dtype, arch, multiprocessors(device))
    if b > cfg.block_b or cfg.slices > MAX_SLICES:
        raise ValueError(f"config: expected at least {b} rows and at most {MAX_SLICES} slices, got {cfg}")
    tiles = cdiv(c, cfg.block_c)
    programs = tiles * cfg.slices
    if one_launch and not INTERPRETED and programs > multiprocessors(device):
        raise ValueError(f"one launch holds {multiprocessors(device)} programs, got {tiles} x {cfg.slices}")
    partial = torch.empty(cfg.slices * b * c, dtype=torch.float32, device=device)
    norms = torch.empty(b * cfg.slices, dtype=torch.float32, device=device)
    row_c = max(128, power_of_2(c))
    if one_launch and not INTERPRETED:
        counter, steps = torch.zeros(1, dtype=torch.int32, device=device), ((BOTH, programs, row_c, cfg),)
    else:  # what a step does not use does not compile it anew
        counter = norms
        steps = ((1, programs, 1, cfg), (2, b, row_c, cfg._replace(block_b=1, block_c=1, block_d=1)))
    for step, grid, width, tile in steps:
        launch(few_rows_kernel, grid, tile, (
            features, weight, features if bias is None else bias, out, out if prediction is None else prediction,
            partial, norms, counter,
            b, c, d, tiles, cfg.slices, cdiv(cdiv(d, cfg.slices), cfg.block_d) * cfg.block_d,
            1.0 / temperature, scale, bias_norm,
            features.stride(0), features.stride(1), weight.stride(0), weight.stride(1),
            0 if bias is None else bias.stride(0), out.stride(0),
        ), dict(
            HAS_BIAS=bias is not None, HEAD=prediction is not None and step != 1, EVEN_D=d % cfg.block_d == 0,
            PRECISION=dot_precision(features.dtype, arch, cfg.float32), UPCAST=upcast(features.dtype),
            STEP=step, ROW_C=width, MAX_SLICES=MAX_SLICES,
            BLOCK_B=tile.block_b, BLOCK_C=tile.block_c, BLOCK_D=tile.block_d,
        ), cooperative=step == BOTH)  # fmt: skip
