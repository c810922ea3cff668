"""Gradient norms for a one-hot target, a label or the predicted class, and token statistics, without the logits.

    m = max z_c, d_c = (z_c − m)/T,  S = Σe^d_c − 1,  R = Σe^(p·d_c),  Q = Σd_c·e^d_c       over the classes but y
    a = (m − z_y)/T    S, Q without the 1 and the 0 of a class with logit m: nothing is ever subtracted from 1
    likeliest: y       W = (1 + S)·e^a          ε = 1 − p_y = W/(1 + W)         log p_y = −log(1 + W)
    or another class   W = S + e^−a             ε = (1 + S)/(1 + W)             log p_y = −a − log(1 + W)
    score = ‖(x, bias_norm)‖_p·‖p − e_y‖_p/T    ‖p − e_y‖_p = ε·(1 + ρ)^(1/p)   ρ = R/(1 + S)^p
    Σp² = p_y² + ε²·ρ    entropy = log(1 + W) − (Σ (z_c − max z)/T·e^((z_c − max z)/T) over all classes)/(1 + W)

    launch 1    a tile of logits, (BLOCK_B rows x BLOCK_C classes), leaves m, S, R, Q of its classes but y, and z_y if y
                is one of them; for the predicted class its maximum, and m, S, R, Q of its other classes
    launch 2    merges the tiles in their order; ‖x‖_p

Traffic: C·D weights per chunk of rows; B·D features twice, or three times for p other than 1 and ∞; 8 to 16 bytes per
row and class tile, written and read. Chunks keep those at 64 MiB (`Config.workspace`).
"""

import torch
import triton
import triton.language as tl

from .config import Config, cdiv, choose, for_vector
from .deviation import finite_max, first_at
from .device import architecture, dot_precision, upcast, vector
from .exponential import log1p
from .launch import launch
from .norm import compiled, norm_in_memory, square, with_bias
from .problem import IGNORE, Problem, Scores
from .rows import MAX_RESIDENT, rows_per_chunk
from .tile import logits_tile
from .tiled import ROW_TILES_PER_GROUP, TABLE


@triton.jit
def _power_of(d, p, NORM: tl.constexpr):
    """exp(p·d), for NORM 2 or GENERAL."""
    return tl.exp(2.0 * d) if NORM == 2 else tl.exp(p * d)


@triton.jit(do_not_specialize=["B", "n_class_tiles"])
def one_hot_kernel(
    X,  # (B, D), row stride stride_xb * VEC
    W,  # (C, D), row stride stride_wc * VEC
    BIAS,  # (C,)
    LABELS,  # (B,) int64, unless PREDICTED
    STATISTICS,  # (4, B, n_class_tiles): m, S, R and Q of a tile's classes but y; m = −inf if it has none
    TOPS,  # (B,) z_y, or with PREDICTED (B, n_class_tiles), the maximum of each tile
    B, C, D, n_class_tiles,
    inv_temperature, p,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_y,
    VEC: tl.constexpr, HAS_BIAS: tl.constexpr, PREDICTED: tl.constexpr, NORM: tl.constexpr, ENTROPY: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """D, stride_xb and stride_wc come divided by VEC."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    stride_wc = tl.cast(stride_wc, tl.int64) * VEC
    # groups of GROUP row tiles, inside a group row tiles first
    pid = tl.program_id(0)
    group = pid // (GROUP * n_class_tiles)
    height = tl.minimum(tl.cdiv(B, BLOCK_B) - group * GROUP, GROUP)
    row = (group * GROUP + pid % (GROUP * n_class_tiles) % height).to(tl.int64) * BLOCK_B
    class_tile = pid % (GROUP * n_class_tiles) // height
    first_class = class_tile.to(tl.int64) * BLOCK_C
    rows = row + tl.arange(0, BLOCK_B)
    live = rows < B

    z = logits_tile(
        X, W, BIAS, row, first_class,
        B, C, 0, D, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
        HAS_BIAS, EVEN_D, False, PRECISION, UPCAST, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    classes = tl.arange(0, BLOCK_C)[None, :]
    z = tl.where(classes < C - first_class, z, float("-inf"))
    if PREDICTED:
        top = tl.max(z, 1)
        y = first_at(z, top, classes)
        tl.store(TOPS + rows * n_class_tiles + class_tile, top, mask=live)
    else:
        y = tl.load(LABELS + rows * stride_y, mask=live, other=-1) - first_class
        here = (y >= 0) & (y < BLOCK_C) & (y < C - first_class)
        z_y = tl.sum(tl.where(classes == y[:, None], z, 0.0), 1)
        tl.store(TOPS + rows, z_y, mask=live & here)
    z = tl.where(classes == y[:, None], float("-inf"), z)
    m = tl.max(z, 1)
    d = (z - finite_max(m)[:, None]) * inv_temperature
    t = tl.exp(d)
    others = tl.where(classes == first_at(z, m, classes)[:, None], 0.0, t)
    at = STATISTICS + rows * n_class_tiles + class_tile
    plane = tl.cast(B, tl.int64) * n_class_tiles
    tl.store(at, m, mask=live)
    tl.store(at + plane, tl.sum(others, 1), mask=live)
    if NORM > 1:
        tl.store(at + 2 * plane, tl.sum(square(t) if NORM == 2 else _power_of(d, p, NORM), 1), mask=live)
    if ENTROPY:
        tl.store(at + 3 * plane, tl.sum(tl.where(t > 0.0, d * t, t), 1), mask=live)


@triton.jit
def _add(s, r, q, d, one, tile_s, tile_r, tile_q, p, NORM: tl.constexpr, ENTROPY: tl.constexpr):
    """Sums and those of tiles, d·T being a tile's maximum less the merged one, `one` what S leaves out of the tile and
    the merged S does not.  # each (BLOCK_B, TILES)"""
    e = tl.exp(d)
    s += (one + tile_s) * e
    if NORM > 1:
        r += tile_r * _power_of(d, p, NORM)
    if ENTROPY:
        q += tl.where(e > 0.0, (tile_q + (1.0 + tile_s) * d) * e, e)
    return s, r, q


@triton.jit(do_not_specialize=["B", "n_class_tiles", "stride_o"])
def merge_kernel(
    X,  # (B, D), row stride stride_xb * VEC
    LABELS,  # (B,) int64, unless PREDICTED
    STATISTICS,  # (4, B, n_class_tiles), as one_hot_kernel leaves them
    TOPS,  # (B,), or (B, n_class_tiles) with PREDICTED
    OUT,  # (1, B): scores; or with ENTROPY (4, B): log p_y, entropy, Σp² and ‖p − e_y‖₂
    B, C, D, n_class_tiles,
    inv_temperature, p, bias_norm,
    stride_xb, stride_xd, stride_y, stride_o,
    VEC: tl.constexpr, PREDICTED: tl.constexpr, NORM: tl.constexpr, ENTROPY: tl.constexpr, IGNORED: tl.constexpr,
    TILES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """D and stride_xb come divided by VEC. With ENTROPY, NORM is 2."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = rows < B

    # 1. ‖(x, bias_norm)‖_p
    norm = norm_in_memory(
        X, rows, B, 0, D, BLOCK_D, stride_xb, stride_xd, p, NORM, BLOCK_B, BLOCK_D, STAGES, tl.float32
    )
    norm = with_bias(norm, bias_norm, p, NORM)

    # 2. sums over the classes but y, of tile j, j + TILES, ... in column j
    inside = tl.where(live, rows, 0)
    at = STATISTICS + inside[:, None] * n_class_tiles
    plane = tl.cast(B, tl.int64) * n_class_tiles
    tile = tl.arange(0, TILES)[None, :]
    maxima = tl.full((BLOCK_B, TILES), float("-inf"), tl.float32)
    nowhere = tl.full((BLOCK_B, TILES), 2147483647, tl.int32)
    if PREDICTED:
        tops = TOPS + inside[:, None] * n_class_tiles
        for j in range(0, n_class_tiles, TILES):
            maxima = tl.maximum(maxima, tl.load(tops + j + tile, mask=tile < n_class_tiles - j, other=float("-inf")))
        z_y = tl.max(maxima, 1)
        found = nowhere  # the tile of the predicted class
        for j in range(0, n_class_tiles, TILES):
            top = tl.load(tops + j + tile, mask=tile < n_class_tiles - j, other=float("-inf"))
            found = tl.minimum(found, tl.where(top == z_y[:, None], j + tile, 2147483647))
        first = tl.min(found, 1)[:, None]
        maxima = tl.full((BLOCK_B, TILES), float("-inf"), tl.float32)
        for j in range(0, n_class_tiles, TILES):
            some = (tile < n_class_tiles - j) & (j + tile != first)
            maxima = tl.maximum(maxima, tl.load(tops + j + tile, mask=some, other=float("-inf")))
        y_exists = live
        ignored = rows < 0
    else:
        y = tl.load(LABELS + rows * stride_y, mask=live, other=0)
        y_exists = live & (y >= 0) & (y < C)
        ignored = y == IGNORED
        z_y = tl.load(TOPS + rows, mask=y_exists, other=float("-inf"))
    for j in range(0, n_class_tiles, TILES):
        maxima = tl.maximum(maxima, tl.load(at + j + tile, mask=tile < n_class_tiles - j, other=float("-inf")))
    m = tl.max(maxima, 1)
    # S leaves out one class with logit m: that of the first tile which has one, or else of the first of the tops
    found = nowhere
    for j in range(0, n_class_tiles, TILES):
        some = tile < n_class_tiles - j
        tile_m = tl.load(at + j + tile, mask=some, other=float("-inf"))
        found = tl.minimum(found, tl.where(some & (tile_m == m[:, None]), j + tile, 2147483647))
        if PREDICTED:
            some = some & (j + tile != first)
            top = tl.load(tops + j + tile, mask=some, other=float("-inf"))
            found = tl.minimum(found, tl.where(some & (top == m[:, None]), n_class_tiles + j + tile, 2147483647))
    leader = tl.min(found, 1)[:, None]
    shift = finite_max(m)[:, None]
    sums_s = tl.zeros((BLOCK_B, TILES), tl.float32)
    sums_r = tl.zeros((BLOCK_B, TILES), tl.float32)
    sums_q = tl.zeros((BLOCK_B, TILES), tl.float32)
    for j in range(0, n_class_tiles, TILES):
        mask = tile < n_class_tiles - j
        at_j = at + j + tile
        d = (tl.load(at_j, mask=mask, other=float("-inf")) - shift) * inv_temperature
        tile_s = tl.load(at_j + plane, mask=mask, other=0.0)
        tile_r = tl.load(at_j + 2 * plane, mask=mask, other=0.0) if NORM > 1 else tile_s
        tile_q = tl.load(at_j + 3 * plane, mask=mask, other=0.0) if ENTROPY else tile_s
        one = tl.where(j + tile == leader, 0.0, 1.0)
        sums_s, sums_r, sums_q = _add(sums_s, sums_r, sums_q, d, one, tile_s, tile_r, tile_q, p, NORM, ENTROPY)
        if PREDICTED:  # the maxima of the other tiles are among the others
            some = mask & (j + tile != first)
            d = (tl.load(tops + j + tile, mask=some, other=float("-inf")) - shift) * inv_temperature
            one = tl.where(n_class_tiles + j + tile == leader, 0.0, 1.0)
            zero = one * 0.0
            sums_s, sums_r, sums_q = _add(sums_s, sums_r, sums_q, d, one, zero, zero + 1.0, zero, p, NORM, ENTROPY)
    s, r, q = tl.sum(sums_s, 1), tl.sum(sums_r, 1), tl.sum(sums_q, 1)

    # 3. what they say
    a = (m - tl.where(z_y == float("inf"), float("nan"), z_y)) * inv_temperature
    e = tl.exp(-tl.abs(a))
    below = a > 0.0  # y is not the likeliest class
    w = tl.where(below, s + e, e + s * e)
    whole = 1.0 + w
    rest = tl.where(below, 1.0 + s, w) / whole  # ε
    if NORM == 1:
        residual = 2.0 * rest
    elif NORM == 0:
        residual = rest
    elif NORM == 2:
        rho = r / ((1.0 + s) * (1.0 + s))
        residual = rest * tl.sqrt(1.0 + rho)
    else:
        half = tl.exp(log1p(tl.exp(tl.log(r) - p * log1p(s))) * 0.5 / p)  # the root alone may overflow
        residual = rest * half * half
    if ENTROPY:
        p_y = tl.where(below, e, 1.0) / whole
        log_p_y = tl.where(below, -a, 0.0) - log1p(w)
        products = tl.where(below, q, e * q) - tl.where(e > 0.0, tl.abs(a) * e * tl.where(below, 1.0, 1.0 + s), 0.0)
        entropy = log1p(w) - products / whole
        wrong = tl.where(y_exists, norm * 0.0, float("nan"))
        out = OUT + rows
        tl.store(out, tl.where(ignored, 0.0, log_p_y + wrong), mask=live)
        tl.store(out + stride_o, tl.where(ignored, 0.0, entropy + wrong), mask=live)
        tl.store(out + 2 * stride_o, tl.where(ignored, 0.0, p_y * p_y + rest * rest * rho + wrong), mask=live)
        tl.store(out + 3 * stride_o, tl.where(ignored, 0.0, residual + wrong), mask=live)
    else:
        value = tl.where(y_exists, norm * (residual * inv_temperature), float("nan"))
        tl.store(OUT + rows, tl.where(ignored, 0.0, value), mask=live)


MERGE = Config(4, 256, 256, 4, 2)  # rows, class tiles and features at a time


def configuration(b: int, c: int, dtype: torch.dtype, arch: str) -> Config:
    """The tile of `tiled` for rows of which each tile leaves statistics."""
    return choose(TABLE, b, max(c, MAX_RESIDENT + 1), dtype, arch)


def why_not(problem: Problem, arch: str) -> str:
    """Why this kernel does not take the problem; empty where it does."""
    if problem.uniform:
        return "takes labels and the predicted target, not the uniform one"
    if problem.weight is None:
        return "takes a weight, not logits"
    if problem.features.dtype == torch.float64:
        return "takes float16, bfloat16 and float32, not float64"
    return ""


def score_one_hot(problem: Problem, scores: Scores, config: Config | None = None) -> None:
    """Scores (1, B) of features (B, D) under the head: weight (C, D), bias (C,). ValueError where `why_not` says so."""
    _run(problem, scores.out, False, config)


def token_statistics(problem: Problem, out: torch.Tensor, config: Config | None = None) -> None:
    """log p_y, entropy, Σp² and ‖p − e_y‖₂ of each row into out (4, B), for labels and p = 2."""
    _run(problem, out, True, config)


def _run(problem: Problem, out: torch.Tensor, entropy: bool, config: Config | None) -> None:
    x, w, bias, device = problem.features, problem.weight, problem.bias, problem.features.device
    arch = architecture(device)
    if reason := why_not(problem, arch):
        raise ValueError(f"one_hot {reason}")
    assert w is not None
    (batch, d), c, labels = x.shape, len(w), None if isinstance(problem.target, str) else problem.target
    vec = vector(d, x.stride(0), w.stride(0))
    cfg = for_vector(vec, config or configuration(batch, c, x.dtype, arch))
    tiles = cdiv(c, cfg.block_c)
    chunk = rows_per_chunk(batch, 4 * (5 if labels is None else 4) * tiles + 4, cfg)
    statistics = torch.empty(4 * chunk * tiles, dtype=torch.float32, device=device)
    tops = torch.empty(chunk * tiles if labels is None else chunk, dtype=torch.float32, device=device)
    (norm, p), inv_temperature = compiled(problem.p), 1.0 / problem.temperature
    constants = dict(VEC=vec, PREDICTED=labels is None, NORM=norm, ENTROPY=entropy)
    for start in range(0, batch, chunk):
        part = problem.rows(start, start + chunk)
        x, b = part.features, len(part.features)
        y = part.target if isinstance(part.target, torch.Tensor) else statistics
        stride_y = 0 if labels is None else y.stride(0)
        launch(one_hot_kernel, cdiv(b, cfg.block_b) * tiles, cfg, (
            x, w, x if bias is None else bias, y, statistics, tops,
            b, c, d // vec, tiles,
            inv_temperature, p,
            x.stride(0) // vec, x.stride(1), w.stride(0) // vec, w.stride(1), 0 if bias is None else bias.stride(0),
            stride_y,
        ), dict(
            VEC=vec, HAS_BIAS=bias is not None, PREDICTED=labels is None, NORM=norm, ENTROPY=entropy,
            EVEN_D=d % cfg.block_d == 0, PRECISION=dot_precision(x.dtype, arch, cfg.float32), UPCAST=upcast(x.dtype),
            GROUP=ROW_TILES_PER_GROUP, BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
        ))  # fmt: skip
        launch(merge_kernel, cdiv(b, MERGE.block_b), MERGE, (
            x, y, statistics, tops, out[:, start : start + b],
            b, c, d // vec, tiles,
            inv_temperature, p, problem.bias_norm,
            x.stride(0) // vec, x.stride(1), stride_y, out.stride(0),
        ), constants | dict(
            IGNORED=IGNORE, TILES=MERGE.block_c, BLOCK_B=MERGE.block_b, BLOCK_D=MERGE.block_d, STAGES=MERGE.num_stages,
        ))  # fmt: skip
