"""GradNorm scores of many classes in one launch (and one of 8 bytes that clears the counters): the logits of a row stay
in the registers of several CTAs.

    z = x·Wᵀ + b by class tiles, one per CTA, then two exchanges among the n CTAs of a group through global memory:
    1   m_j, S_j = Σ exp d_j, Q_j = Σ expm1 d_j (d_j = (z − m_j)/T), the share of ‖x‖₁   ->  m, S, mean of every row
    2   Σ|u|, Σ u, Σ sign u of the deviations u from that mean, tile by tile             ->  the score, by CTA 0

A group walks the row blocks g, g + G, ...; a cooperative launch has all CTAs resident (or fails), so that waiting for
one another cannot deadlock. Traffic: features and weight as in any matmul, 32·n bytes of statistics per row, no logits.
Not chosen by default: it has not run on a GPU. The interpreter runs one program after the other, so there each of the
three PHASEs between the exchanges is a launch of its own, which computes the logits again.
"""

import torch
import triton
import triton.language as tl

from .deviation import expm1, first_at, shift_of, store_scores, sum_deviations
from .targets import INTERPRETED, Config, architecture, dot_precision
from .tile import logits_tile, norm_share

KINDS = tl.constexpr(8)  # of statistics: m, S, Q, share of ‖x‖₁, top class; then Σ|u|, Σu, Σ sign u
TILES = tl.constexpr(2)  # class tiles whose statistics are read at a time; more of them spill
ALL = tl.constexpr(0)  # PHASE: all three, with barriers between


@triton.jit
def _barrier(COUNTER, target):
    """Wait until all CTAs of the group have come here; what they stored before can be read after."""
    tl.debug_barrier()
    tl.atomic_add(COUNTER, 1, sem="acq_rel")
    while tl.atomic_add(COUNTER, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _read(SLOT, kind, local, first, n_class_tiles, other, BLOCK_B: tl.constexpr):
    """One kind of statistics of class tiles first, first + 1, ..., past the L1 cache.  # -> (BLOCK_B, TILES)"""
    tiles = first + tl.arange(0, TILES)
    at = SLOT + kind * BLOCK_B * n_class_tiles + local[:, None] * n_class_tiles + tiles[None, :]
    return tl.load(at, mask=(tiles < n_class_tiles)[None, :], other=other, cache_modifier=".cg")


@triton.jit(do_not_specialize=["B", "n_groups", "stride_o"])
def cooperative_kernel(
    X, W, BIAS, OUT, PREDICTION, STATISTICS, COUNTERS,
    B, C, D, n_class_tiles, n_groups,
    inv_temperature, scale, bias_norm,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_o,
    HAS_BIAS: tl.constexpr, HEAD: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PHASE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // n_class_tiles
    class_tile = tl.program_id(0) % n_class_tiles
    classes = class_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (classes < C)[None, :]
    local = tl.arange(0, BLOCK_B)
    kind = BLOCK_B * n_class_tiles
    arrivals = 0
    for block in range(group, tl.cdiv(B, BLOCK_B), n_groups):
        rows = tl.cast(block, tl.int64) * BLOCK_B + local
        arrivals += n_class_tiles
        # Two slots in turn: CTA 0 may still read the last block's while the others write this one's. They cannot be two
        # blocks ahead, for that takes CTA 0's arrival at the barrier between.
        parity = arrivals // n_class_tiles % 2
        SLOT = STATISTICS + (2 * group + parity).to(tl.int64) * KINDS * kind
        mine = SLOT + local * n_class_tiles + class_tile
        if PHASE < 3:
            z = logits_tile(
                X, W, BIAS, rows, classes,
                B, C, D, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
                HAS_BIAS, EVEN_D, PRECISION, UPCAST, BLOCK_B, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            z = tl.where(valid, z, float("-inf"))  # (BLOCK_B, BLOCK_C)

        # 1. statistics of this tile alone
        if PHASE == ALL or PHASE == 1:
            m = tl.max(z, 1)
            d = (z - shift_of(m)[:, None]) * inv_temperature
            e = tl.exp(d)
            tl.store(mine, m)
            tl.store(mine + kind, tl.sum(e, 1))
            tl.store(mine + 2 * kind, tl.sum(tl.where(valid, expm1(d, e), 0.0), 1))
            share = norm_share(X, rows, B, D, stride_xb, stride_xd, class_tile, n_class_tiles, BLOCK_B, BLOCK_D)
            tl.store(mine + 3 * kind, share)
            if HEAD:
                tl.store(mine + 4 * kind, first_at(z, m, classes[None, :].to(tl.int32)).to(tl.float32))
        if PHASE == ALL:
            _barrier(COUNTERS + 2 * group, arrivals)

        # 2. of the whole row (deviation.py and rows.py have the merge), and this tile's part of the deviations
        m = tl.full((BLOCK_B,), float("-inf"), tl.float32)
        for j in range(0, n_class_tiles, TILES):
            m = tl.maximum(m, tl.max(_read(SLOT, 0, local, j, n_class_tiles, float("-inf"), BLOCK_B), 1))
        s = tl.zeros((BLOCK_B,), tl.float32)
        q = tl.zeros((BLOCK_B,), tl.float32)
        for j in range(0, n_class_tiles, TILES):
            d_old = _read(SLOT, 0, local, j, n_class_tiles, float("-inf"), BLOCK_B) - shift_of(m)[:, None]
            delta = expm1(d_old * inv_temperature, tl.exp(d_old * inv_temperature))
            n = tl.minimum(tl.maximum(C - (j + tl.arange(0, TILES)) * BLOCK_C, 0), BLOCK_C).to(tl.float32)[None, :]
            s += tl.sum(_read(SLOT, 1, local, j, n_class_tiles, 0.0, BLOCK_B) * (1.0 + delta), 1)
            q += tl.sum(_read(SLOT, 2, local, j, n_class_tiles, 0.0, BLOCK_B) * (1.0 + delta) + n * delta, 1)
        near = s > 0.5 * C
        mean = tl.where(near, q, s) / C
        if PHASE == ALL or PHASE == 2:
            d = (z - shift_of(m)[:, None]) * inv_temperature
            e = tl.exp(d)
            t = tl.where(near[:, None], expm1(d, e), e)
            total, delta, sigma = sum_deviations(tl.where(valid, t - mean[:, None], 0.0))
            tl.store(mine + 5 * kind, total)
            tl.store(mine + 6 * kind, delta)
            tl.store(mine + 7 * kind, sigma)
        if PHASE == ALL:
            _barrier(COUNTERS + 2 * group + 1, arrivals)

        # 3. the scores
        if (PHASE == ALL or PHASE == 3) and class_tile == 0:
            norm = tl.zeros((BLOCK_B,), tl.float32)
            total = tl.zeros((BLOCK_B,), tl.float32)
            delta = tl.zeros((BLOCK_B,), tl.float32)
            sigma = tl.zeros((BLOCK_B,), tl.float32)
            index = tl.full((BLOCK_B,), 2147483647, tl.int32)
            for j in range(0, n_class_tiles, TILES):
                norm += tl.sum(_read(SLOT, 3, local, j, n_class_tiles, 0.0, BLOCK_B), 1)
                total += tl.sum(_read(SLOT, 5, local, j, n_class_tiles, 0.0, BLOCK_B), 1)
                delta += tl.sum(_read(SLOT, 6, local, j, n_class_tiles, 0.0, BLOCK_B), 1)
                sigma += tl.sum(_read(SLOT, 7, local, j, n_class_tiles, 0.0, BLOCK_B), 1)
                if HEAD:
                    tops = _read(SLOT, 0, local, j, n_class_tiles, float("-inf"), BLOCK_B)
                    of_top = _read(SLOT, 4, local, j, n_class_tiles, 0.0, BLOCK_B).to(tl.int32)
                    index = tl.minimum(index, first_at(tops, m, of_top))
            s = mean * C + delta + tl.where(near, C, 0)
            store_scores(
                OUT, PREDICTION, rows, B, stride_o,
                norm, m, index, s, (total - delta * sigma / C) / s,
                inv_temperature, scale, bias_norm,
                HEAD,
            )  # fmt: skip


def configuration(b: int, c: int, d: int, dtype: torch.dtype, arch: str) -> Config:
    """Tiles whose logits and second pass fit the registers; narrow ones for few rows, to have W read by many CTAs."""
    stages = 2 if arch.startswith("gfx") else 3
    if dtype == torch.float32:
        return Config(16 if b <= 64 else 32, 64, 32, 4, stages)
    if b <= 64 and c <= 2048:
        return Config(16, 32, 128, 4, stages)
    return Config(64, 64 if arch.startswith("sm_1") else 128, 64, 8, stages)


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
    tiles, blocks = triton.cdiv(c, cfg.block_c), triton.cdiv(b, cfg.block_b)
    if INTERPRETED:
        groups = blocks
    else:
        processors = torch.cuda.get_device_properties(features.device).multi_processor_count
        if tiles > processors:
            raise ValueError(f"{c} classes are {tiles} tiles of {cfg.block_c}, more than {processors} multiprocessors")
        groups = min(blocks, processors // tiles)
    slots = 2 * groups * KINDS.value
    statistics = torch.empty(slots * cfg.block_b * tiles, dtype=torch.float32, device=features.device)
    counters = torch.zeros(2 * groups, dtype=torch.int32, device=features.device)
    for phase in (1, 2, 3) if INTERPRETED else (ALL.value,):
        cooperative_kernel[(groups * tiles,)](
            features, weight, features if bias is None else bias, out, out if prediction is None else prediction,
            statistics, counters,
            b, c, d, tiles, groups,
            1.0 / temperature, scale, bias_norm,
            features.stride(0), features.stride(1), weight.stride(0), weight.stride(1),
            0 if bias is None else bias.stride(0), out.stride(0),
            HAS_BIAS=bias is not None, HEAD=prediction is not None, EVEN_D=d % cfg.block_d == 0,
            PRECISION=dot_precision(features.dtype, arch), UPCAST=INTERPRETED and features.dtype == torch.bfloat16,
            PHASE=phase, BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
            num_warps=cfg.num_warps, num_stages=cfg.num_stages, enable_fp_fusion=True,
            **({} if INTERPRETED else {"launch_cooperative_grid": True}),
        )  # fmt: skip
