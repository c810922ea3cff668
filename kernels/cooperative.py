"""GradNorm scores of many classes in one launch (and one of 8 bytes that clears the counters): the logits of a row stay
in the registers of several CTAs.

    z = x·Wᵀ + b by class tiles, one per CTA, then two exchanges among the n CTAs of a group through global memory:
    1   m_j, S_j, Q_j of the tile, the share of ‖x‖₁          ->  m, S, mean of every row (deviation.py has the merge)
    2   Σ|u|, Σ u, Σ sign u of the deviations from that mean  ->  the score, by CTA 0

A group walks the row blocks g, g + G, ...; a cooperative launch has all CTAs resident (or fails), so that waiting for
one another cannot deadlock. Traffic: features and weight as in any matmul, 32·n bytes of statistics per row, no logits.
Not chosen by default: it has not run on a GPU. The interpreter runs one program after the other, so there each of the
three PHASEs between the exchanges is a launch of its own, which computes the logits again.
"""

import torch
import triton
import triton.language as tl

from .deviation import deviations_of_tile, first_at, statistics_of_tile, store_scores
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
    descriptor,
    descriptors_fit,
    dot_precision,
    multiprocessors,
    upcast,
)
from .tile import barrier, logits_tile, merged_statistics, norm_share, read_statistics

KINDS = 8  # of statistics: m, S, Q, share of ‖x‖₁, top class; then Σ|u|, Σu, Σ sign u
TILES = 2  # class tiles whose statistics are read at a time; more of them spill
ALL = 0  # PHASE: all three, with barriers between


@triton.jit(do_not_specialize=["B", "n_groups", "stride_o"])
def cooperative_kernel(
    XT, WT, X, BIAS, OUT, PREDICTION, STATISTICS, COUNTERS,
    B, C, D, n_class_tiles, n_groups,
    inv_temperature, scale, bias_norm,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_o,
    HAS_BIAS: tl.constexpr, HEAD: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PHASE: tl.constexpr, KINDS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """XT and WT: features and weight as `logits_tile` takes them, pointers or descriptors; X: the pointer."""
    group = tl.program_id(0) // n_class_tiles
    class_tile = tl.program_id(0) % n_class_tiles
    klass = class_tile.to(tl.int64) * BLOCK_C
    classes = klass + tl.arange(0, BLOCK_C)
    valid = (classes < C)[None, :]
    local = tl.arange(0, BLOCK_B)
    kind = BLOCK_B * n_class_tiles
    arrivals = 0
    for block in range(group, tl.cdiv(B, BLOCK_B), n_groups):
        row = tl.cast(block, tl.int64) * BLOCK_B
        arrivals += n_class_tiles
        # Two slots in turn: CTA 0 may still read the last block's while the others write this one's. They cannot be two
        # blocks ahead, for that takes CTA 0's arrival at the barrier between.
        parity = arrivals // n_class_tiles % 2
        slot = STATISTICS + (2 * group + parity).to(tl.int64) * KINDS * kind + local * n_class_tiles
        mine = slot + class_tile
        if PHASE < 3:
            z = logits_tile(
                XT, WT, BIAS, row, klass,
                B, C, 0, D, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
                HAS_BIAS, EVEN_D, TMA, PRECISION, UPCAST, BLOCK_B, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            z = tl.where(valid, z, float("-inf"))  # (BLOCK_B, BLOCK_C)

        # 1. statistics of this tile alone
        if PHASE == 0 or PHASE == 1:
            n = tl.minimum(C - class_tile * BLOCK_C, BLOCK_C)
            m, s, q = statistics_of_tile(z, valid, n, inv_temperature)
            tl.store(mine, m)
            tl.store(mine + kind, s)
            tl.store(mine + 2 * kind, q)
            share = norm_share(
                X, row, B, class_tile * BLOCK_D, D, n_class_tiles * BLOCK_D, stride_xb, stride_xd, BLOCK_B, BLOCK_D
            )
            tl.store(mine + 3 * kind, share)
            if HEAD:
                tl.store(mine + 4 * kind, first_at(z, m, classes[None, :].to(tl.int32)).to(tl.float32))
        if PHASE == 0:
            barrier(COUNTERS + 2 * group, arrivals)

        # 2. of the whole row, and this tile's part of the deviations
        m, near, mean = merged_statistics(slot, kind, C, n_class_tiles, inv_temperature, BLOCK_C, TILES)
        if PHASE == 0 or PHASE == 2:
            total, delta, sigma = deviations_of_tile(z, valid, m, near, mean, inv_temperature)
            tl.store(mine + 5 * kind, total)
            tl.store(mine + 6 * kind, delta)
            tl.store(mine + 7 * kind, sigma)
        if PHASE == 0:
            barrier(COUNTERS + 2 * group + 1, arrivals)

        # 3. the scores
        if (PHASE == 0 or PHASE == 3) and class_tile == 0:
            norm = tl.zeros((BLOCK_B,), tl.float32)
            total = tl.zeros((BLOCK_B,), tl.float32)
            delta = tl.zeros((BLOCK_B,), tl.float32)
            sigma = tl.zeros((BLOCK_B,), tl.float32)
            index = tl.full((BLOCK_B,), 2147483647, tl.int32)
            for j in range(0, n_class_tiles, TILES):
                norm += tl.sum(read_statistics(slot + 3 * kind, j, n_class_tiles, 0.0, TILES), 1)
                total += tl.sum(read_statistics(slot + 5 * kind, j, n_class_tiles, 0.0, TILES), 1)
                delta += tl.sum(read_statistics(slot + 6 * kind, j, n_class_tiles, 0.0, TILES), 1)
                sigma += tl.sum(read_statistics(slot + 7 * kind, j, n_class_tiles, 0.0, TILES), 1)
                if HEAD:
                    tops = read_statistics(slot, j, n_class_tiles, float("-inf"), TILES)
                    of_top = read_statistics(slot + 4 * kind, j, n_class_tiles, 0.0, TILES).to(tl.int32)
                    index = tl.minimum(index, first_at(tops, m, of_top))
            s = mean * C + delta + tl.where(near, C, 0)
            store_scores(
                OUT, PREDICTION, row + local, B, stride_o,
                norm, m, index, s, (total - delta * sigma / C) / s,
                inv_temperature, scale, bias_norm,
                HEAD,
            )  # fmt: skip


# Tiles whose logits outlive two exchanges in the registers.
TABLE: Table = {
    "any": [
        Choice("half", 64, 2048, Config(16, 32, 128, 4, 3)),
        Choice("half", ANY, ANY, Config(64, 128, 64, 8, 3)),
        Choice("float32", 64, ANY, Config(16, 64, 32, 4, 3)),
        Choice("float32", ANY, ANY, Config(16, 64, 32, 4, 3)),
    ],
    "sm_90": [Choice("half", ANY, ANY, Config(64, 256, 64, 8, 4, tma=True))],
    "sm_100": [Choice("half", ANY, ANY, Config(64, 256, 64, 8, 4, tma=True))],
}


def configuration(b: int, c: int, d: int, dtype: torch.dtype, arch: str) -> Config:
    return choose(TABLE, b, c, dtype, arch)


def score_cooperative(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    prediction: torch.Tensor | None,
    temperature: float,
    scale: float,
    bias_norm: float,
    config: Config | None = None,
) -> None:
    """Scores of features (B, D) under the head weight (C, D), bias (C,), into out (1, B), or (6, B) with prediction.

    ValueError where the class tiles outnumber the device's multiprocessors.
    """
    (b, d), c = features.shape, weight.shape[0]
    arch = architecture(features.device)
    cfg = config or configuration(b, c, d, features.dtype, arch)
    tiles, blocks = cdiv(c, cfg.block_c), cdiv(b, cfg.block_b)
    if INTERPRETED:
        groups = blocks
    else:
        processors = multiprocessors(features.device)
        if tiles > processors:
            raise ValueError(f"{c} classes are {tiles} tiles of {cfg.block_c}, more than {processors} multiprocessors")
        groups = min(blocks, processors // tiles)
    slots = 2 * groups * KINDS
    statistics = torch.empty(slots * cfg.block_b * tiles, dtype=torch.float32, device=features.device)
    counters = torch.zeros(2 * groups, dtype=torch.int32, device=features.device)
    tma = cfg.tma and descriptors_fit(arch, features, weight)
    for phase in (1, 2, 3) if INTERPRETED else (ALL,):
        launch(cooperative_kernel, groups * tiles, cfg, (
            descriptor(features, cfg.block_b, cfg.block_d) if tma else features,
            descriptor(weight, cfg.block_c, cfg.block_d) if tma else weight,
            features, features if bias is None else bias, out, out if prediction is None else prediction,
            statistics, counters,
            b, c, d, tiles, groups,
            1.0 / temperature, scale, bias_norm,
            features.stride(0), features.stride(1), weight.stride(0), weight.stride(1),
            0 if bias is None else bias.stride(0), out.stride(0),
        ), dict(
            HAS_BIAS=bias is not None, HEAD=prediction is not None, EVEN_D=d % cfg.block_d == 0, TMA=tma,
            PRECISION=dot_precision(features.dtype, arch, cfg.float32), UPCAST=upcast(features.dtype),
            PHASE=phase, KINDS=KINDS, TILES=TILES, BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
        ), cooperative=True)  # fmt: skip
