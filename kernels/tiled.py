"""GradNorm scores if the classes do not fit one tile: write logits to a bounded workspace, then run rows.py.

    launch 1    z_k = x_k·W_kᵀ (+ b in slice 0) by tiles (BLOCK_B rows x BLOCK_C classes) and slices k of the features;
                each program's share of ‖x‖_p; for rows too long for launch 2's registers, each tile's m and S
    launch 2    rows.py: z = Σ_k z_k in the order of the slices, and ‖x‖_p = ‖(share_1, share_2, ...)‖_p

For few rows, reading W dominates: tiles have few classes, and the features are split until every multiprocessor has
work. Traffic: B·D features and C·D weights per chunk of rows; 8·B·C bytes of logits per slice, written and read. A
chunk has as many rows as fit a workspace of 64 MiB (`Config.workspace`), but at least 512.
"""

import torch
import triton
import triton.language as tl

from . import rows
from .config import ANY, Config, Line, Shape, cdiv, choose, for_vector
from .deviation import statistics_of_tile
from .device import TensorDescriptor, architecture, dot_precision, tma_reads, vector
from .launch import launch
from .norm import compiled, norm_in_memory
from .problem import Problem, Scores, why_not_product
from .rows import MAX_RESIDENT, rows_per_chunk
from .tile import logits_tile, tile_of

SLICED_MAX_ROWS = 64  # larger batches do not slice the features
SLICED_MAX_CLASSES = 4096  # with more classes, few rows go to the library too
MAX_SLICES = 16


@triton.jit(do_not_specialize=["B"])
def logits_kernel(
    XT,  # features as `logits_tile` takes them: the pointer X, or a descriptor
    WT,  # weight (C, D), likewise
    X,  # (B, D), row stride stride_xb * VEC
    BIAS,  # (C,) or None
    Z,  # (slices, B, stride_zb): logits of each slice, in the first C columns
    SHARES,  # (B, slices, n_class_tiles) of ‖x‖_p
    STATISTICS,  # (2, B, n_class_tiles): m and S of each tile, for long rows; else None
    B, C, D, slice_d,
    inv_temperature, p,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_zb,
    VEC: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, NORM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """D, stride_xb and stride_wc are passed divided by VEC. A slice has a multiple of BLOCK_D features."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    stride_wc = tl.cast(stride_wc, tl.int64) * VEC

    # 1. this program's slice and tile
    n_row_tiles = tl.cdiv(B, BLOCK_B)
    n_class_tiles = tl.cdiv(C, BLOCK_C)
    n_slices = tl.num_programs(0) // (n_row_tiles * n_class_tiles)
    k = tl.program_id(0) // (n_row_tiles * n_class_tiles)
    row_tile, class_tile = tile_of(tl.program_id(0) % (n_row_tiles * n_class_tiles), n_row_tiles, n_class_tiles)
    row = row_tile.to(tl.int64) * BLOCK_B
    first_class = class_tile.to(tl.int64) * BLOCK_C
    rows = row + tl.arange(0, BLOCK_B)
    classes = first_class + tl.arange(0, BLOCK_C)
    first = k * slice_d
    last = tl.minimum(first + slice_d, D)

    # 2. logits
    z, _ = logits_tile(
        XT, WT, BIAS, row, first_class,
        B, C, first, last, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
        EVEN_D, TMA, PRECISION, False, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    live = rows < B
    # Write the padding too: the compiler knows that stride_zb, unlike C, is a multiple of 16, and so stores four logits
    # at once.
    z_rows = Z + (tl.cast(k, tl.int64) * B + rows)[:, None] * stride_zb
    tl.store(z_rows + classes[None, :], z, mask=live[:, None] & (classes < stride_zb)[None, :])
    if STATISTICS is not None:
        m, s = statistics_of_tile(tl.where((classes < C)[None, :], z, float("-inf")), inv_temperature)
        at = STATISTICS + rows * n_class_tiles + class_tile
        tl.store(at, m, mask=live)
        tl.store(at + tl.cast(B, tl.int64) * n_class_tiles, s, mask=live)

    # 3. this program's share of ‖x‖_p: every n_class_tiles-th block of the slice
    share = norm_in_memory(
        X, rows, B, first + class_tile * BLOCK_D, last, n_class_tiles * BLOCK_D, stride_xb, stride_xd, p,
        NORM, BLOCK_D, STAGES, tl.float32,
    )  # fmt: skip
    tl.store(SHARES + (rows * n_slices + k) * n_class_tiles + class_tile, share, mask=live)


# Larger tiles read less from L2 (128 x 256: 85 operations per byte). With fewer rows, tiles must be smaller to give
# every multiprocessor one.
TABLE = [
    Line("half", 16, ANY, Config(16, 32, 128, 4, 4)),
    Line("half", 32, ANY, Config(32, 32, 128, 4, 4)),
    Line("half", 64, ANY, Config(64, 32, 128, 4, 4)),
    Line("half", 256, 4096, Config(64, 64, 64, 4, 3)),
    Line("half", 1024, 4096, Config(64, 128, 64, 4, 3)),
    Line("half", 2048, 4096, Config(128, 128, 64, 8, 3), "sm_90"),
    Line("half", ANY, MAX_RESIDENT, Config(128, 256, 64, 8, 3), "sm_90"),
    Line("half", ANY, MAX_RESIDENT, Config(128, 128, 64, 8, 3)),
    Line("half", ANY, ANY, Config(128, 128, 64, 8, 3), "sm_90"),  # the statistics of long rows spill at 128 x 256
    Line("half", ANY, ANY, Config(128, 128, 32, 8, 4)),  # and elsewhere at 128 x 128 x 64
    Line("float32", 16, ANY, Config(16, 32, 64, 4, 4)),
    Line("float32", 32, ANY, Config(32, 32, 64, 4, 4)),
    Line("float32", 64, ANY, Config(64, 32, 32, 4, 3)),
    Line("float32", ANY, ANY, Config(64, 128, 32, 8, 3)),
]


def configuration(shape: Shape) -> Config:
    """The table's, for few rows with as many slices of the features as keep the multiprocessors busy."""
    config, slices = choose(TABLE, shape), 1
    tiles = cdiv(shape.c, config.block_c)
    if shape.b <= SLICED_MAX_ROWS and shape.c <= MAX_RESIDENT:
        # Two programs per multiprocessor hide each other's latency.
        while slices < MAX_SLICES and slices * tiles <= shape.processors and 2 * slices * config.block_d <= shape.d:
            slices *= 2
        steps = max(1, cdiv(shape.d, config.block_d))
        slices = cdiv(steps, cdiv(steps, slices))  # drop the slices that rounding up to whole steps leaves empty
    return config._replace(slices=slices)


def why_not(problem: Problem, arch: str) -> str:
    return why_not_product(problem)


def score(problem: Problem, scores: Scores, config: Config) -> None:
    """Scores of features (B, D) under the head's weight (C, D) and bias (C,). ValueError if the config has slices for
    long rows or TMA."""
    features, w, bias = problem.features, problem.weight, problem.bias
    device = features.device
    arch = architecture(device)
    assert w is not None
    (batch, d), c, (norm, p) = features.shape, w.shape[0], compiled(problem.p)
    vec = vector(d, features.stride(0), w.stride(0))
    cfg = for_vector(vec, config)
    long = c > MAX_RESIDENT
    if cfg.slices > 1 and (long or cfg.tma):
        raise ValueError(f"config: slices of the features need at most {MAX_RESIDENT} classes and no TMA, got {cfg}")
    tiles = cdiv(c, cfg.block_c)
    width = cdiv(c, 16) * 16
    row_bytes = 4 * (cfg.slices * (width + tiles) + (2 * tiles if long else 0))
    chunk = rows_per_chunk(batch, row_bytes, cfg)
    logits = torch.empty(cfg.slices * chunk * width, dtype=torch.float32, device=device)
    shares = torch.empty(chunk * cfg.slices * tiles, dtype=torch.float32, device=device)
    statistics = torch.empty(2 * chunk * tiles, dtype=torch.float32, device=device) if long else None
    tma = cfg.tma and tma_reads(arch, features, w)
    for start in range(0, batch, chunk):
        x = features[start : start + chunk]
        b = x.shape[0]
        launch(logits_kernel, cdiv(b, cfg.block_b) * tiles * cfg.slices, cfg, (
            TensorDescriptor.from_tensor(x, [cfg.block_b, cfg.block_d]) if tma else x,
            TensorDescriptor.from_tensor(w, [cfg.block_c, cfg.block_d]) if tma else w,
            x, bias, logits, shares, statistics,
            b, c, d // vec, cdiv(cdiv(d, cfg.slices), cfg.block_d) * cfg.block_d,
            1.0 / problem.temperature, p,
            x.stride(0) // vec, x.stride(1), w.stride(0) // vec, w.stride(1),
            0 if bias is None else bias.stride(0), width,
        ), dict(
            VEC=vec, EVEN_D=d % cfg.block_d == 0, TMA=tma,
            PRECISION=dot_precision(x.dtype, arch, cfg.float32), NORM=norm,
            BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
            STAGES=cfg.num_stages,
        ))  # fmt: skip
        n = cfg.slices * tiles
        rows.score(
            problem._replace(features=shares[: b * n].view(b, n), bias=None),
            scores.rows(start, start + b),
            logits=logits[: cfg.slices * b * width].view(cfg.slices, b, width),
            statistics=statistics,
        )  # fmt: skip
