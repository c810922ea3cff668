"""GradNorm scores where the classes do not fit one tile: logits to a bounded workspace, then one read of them.

    launch 1    z = x·Wᵀ + b by tiles (BLOCK_B rows x BLOCK_C classes), each class tile's share of ‖x‖₁ and, of rows too
                long for launch 2 to hold, each tile's m, S and Q if it has the registers for them (deviation.py)
    launch 2    rows.py on these logits; its "features" are the shares, for ‖x‖₁ = ‖(share_1, share_2, ...)‖₁

Traffic: B·D features and C·D weights per pass of the matmul, 4·B·C bytes of logits written and read, in chunks of
rows that keep the workspace at 64 MiB (`Config.workspace`), or at MIN_ROWS rows where those are more; W is read once
per chunk.
"""

import torch
import triton
import triton.language as tl

from .deviation import statistics_of_tile
from .launch import launch
from .rows import MAX_RESIDENT, score_rows
from .targets import (
    ANY,
    Choice,
    Config,
    Table,
    architecture,
    cdiv,
    choose,
    descriptor,
    descriptors_fit,
    dot_precision,
    upcast,
)
from .tile import logits_tile, norm_share

MIN_ROWS = 512
STATISTICS_TILE = 128 * 128  # a larger tile leaves no registers for its m, S and Q
GROUP = 8  # row tiles that share a weight tile while it is in L2


@triton.jit(do_not_specialize=["B"])
def logits_kernel(
    XT, WT, X, BIAS, Z, SHARES, STATISTICS,
    B, C, D, n_class_tiles,
    inv_temperature,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_zb,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    LONG: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """XT and WT: features and weight as `logits_tile` takes them, pointers or descriptors; X: the pointer."""
    # 1. this program's tile: groups of GROUP row tiles, inside a group row tiles first
    pid = tl.program_id(0)
    n_row_tiles = tl.cdiv(B, BLOCK_B)
    group = pid // (GROUP * n_class_tiles)
    height = tl.minimum(n_row_tiles - group * GROUP, GROUP)
    row = (group * GROUP + pid % (GROUP * n_class_tiles) % height).to(tl.int64) * BLOCK_B
    class_tile = pid % (GROUP * n_class_tiles) // height
    klass = class_tile.to(tl.int64) * BLOCK_C
    rows = row + tl.arange(0, BLOCK_B)
    classes = klass + tl.arange(0, BLOCK_C)

    # 2. logits
    z = logits_tile(
        XT, WT, BIAS, row, klass,
        B, C, 0, D, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
        HAS_BIAS, EVEN_D, TMA, PRECISION, UPCAST, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    valid = (classes < C)[None, :]
    if LONG:
        z = tl.where(valid, z, float("-inf"))
    live = rows < B
    # Into the padding of the rows too: stride_zb is known to be a multiple of 16, C is not, and so this is one store of
    # four logits in place of four stores.
    tl.store(Z + rows[:, None] * stride_zb + classes[None, :], z, mask=live[:, None] & (classes < stride_zb)[None, :])
    at = rows * n_class_tiles + class_tile
    if LONG:
        n = tl.minimum(C - class_tile * BLOCK_C, BLOCK_C)
        m, s, q = statistics_of_tile(z, valid, n, inv_temperature)
        kind = tl.cast(B, tl.int64) * n_class_tiles
        tl.store(STATISTICS + at, m, mask=live)
        tl.store(STATISTICS + kind + at, s, mask=live)
        tl.store(STATISTICS + 2 * kind + at, q, mask=live)

    # 3. this class tile's share of ‖x‖₁
    share = norm_share(
        X, row, B, class_tile * BLOCK_D, D, n_class_tiles * BLOCK_D, stride_xb, stride_xd, BLOCK_B, BLOCK_D
    )
    tl.store(SHARES + at, share, mask=live)


# The larger the tile, the less its operands take from L2 (128 x 256: 85 operations a byte); the fewer rows, the more
# tiles it takes to give every multiprocessor one.
TABLE: Table = {
    "any": [
        Choice("half", 16, ANY, Config(16, 32, 128, 4, 3)),
        Choice("half", 256, 4096, Config(64, 64, 64, 4, 3)),
        Choice("half", 1024, 4096, Config(64, 128, 64, 4, 3)),
        Choice("half", 2048, 4096, Config(128, 128, 64, 8, 3)),
        Choice("half", ANY, ANY, Config(128, 128, 64, 8, 3)),
        Choice("float32", 64, ANY, Config(16, 64, 32, 4, 3)),
        Choice("float32", ANY, ANY, Config(64, 128, 32, 8, 3)),
    ],
    "sm_90": [Choice("half", ANY, ANY, Config(128, 256, 64, 8, 3))],
}


def configuration(b: int, c: int, d: int, dtype: torch.dtype, arch: str) -> Config:
    return choose(TABLE, b, c, dtype, arch)


def score_split(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    prediction: torch.Tensor | None,
    temperature: float,
    scale: float,
    bias_norm: float,
    config: Config | None = None,
    chunk: int | None = None,
) -> None:
    """Scores of features (B, D) under the head weight (C, D), bias (C,), into out (1, B), or (6, B) with prediction."""
    (b, d), c = features.shape, weight.shape[0]
    arch = architecture(features.device)
    cfg = config or configuration(b, c, d, features.dtype, arch)
    long = c > MAX_RESIDENT and cfg.block_b * cfg.block_c <= STATISTICS_TILE
    tiles = cdiv(c, cfg.block_c)
    width = cdiv(c, 16) * 16
    row_bytes = 4 * (width + (4 if long else 1) * tiles)
    chunk = min(b, chunk or max(MIN_ROWS, cfg.workspace * 2**20 // row_bytes // MIN_ROWS * MIN_ROWS))
    logits = torch.empty((chunk, width), dtype=torch.float32, device=features.device)
    shares = torch.empty(chunk * tiles, dtype=torch.float32, device=features.device)
    statistics = torch.empty(3 * chunk * tiles, dtype=torch.float32, device=features.device) if long else None
    for start in range(0, b, chunk):
        stop = min(start + chunk, b)
        x, z = features[start:stop], logits[: stop - start, :c]
        norms = shares[: (stop - start) * tiles].view(stop - start, tiles)
        tma = cfg.tma and descriptors_fit(arch, x, weight)
        launch(logits_kernel, cdiv(stop - start, cfg.block_b) * tiles, cfg, (
            descriptor(x, cfg.block_b, cfg.block_d) if tma else x,
            descriptor(weight, cfg.block_c, cfg.block_d) if tma else weight,
            x, x if bias is None else bias, z, norms, norms if statistics is None else statistics,
            stop - start, c, d, tiles,
            1.0 / temperature,
            x.stride(0), x.stride(1), weight.stride(0), weight.stride(1),
            0 if bias is None else bias.stride(0), width,
        ), dict(
            HAS_BIAS=bias is not None, EVEN_D=d % cfg.block_d == 0, TMA=tma,
            PRECISION=dot_precision(x.dtype, arch, cfg.float32), UPCAST=upcast(x.dtype),
            LONG=long, GROUP=GROUP, BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
        ))  # fmt: skip
        score_rows(
            norms, z, out[:, start:stop], None if prediction is None else prediction[start:stop],
            temperature, scale, bias_norm, statistics=statistics, tile_c=cfg.block_c, padded=True,
        )  # fmt: skip
