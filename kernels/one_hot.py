"""Gradient norms for a one-hot target, a label or the predicted class, and token statistics, without the logits.

    m = max z_c, d_c = (z_c − m)/T,  S = Σe^d_c − 1,  R = Σe^(p·d_c),  Q = Σd_c·e^d_c       over the classes but y
    a = (m − z_y)/T    S, Q without the 1 and the 0 of a class with logit m: nothing is ever subtracted from 1
    likeliest: y       W = (1 + S)·e^a          ε = 1 − p_y = W/(1 + W)         log p_y = −log(1 + W)
    or another class   W = S + e^−a             ε = (1 + S)/(1 + W)             log p_y = −a − log(1 + W)
    score = ‖(x, bias_norm)‖_p·‖p − e_y‖_p/T    ‖p − e_y‖_p = ε·(1 + ρ)^(1/p)   ρ = R/(1 + S)^p
    Σp² = p_y² + ε²·ρ    entropy = log(1 + W) − (Σ (z_c − max z)/T·e^((z_c − max z)/T) over all classes)/(1 + W)

    launch 1    a tile of logits, (BLOCK_B rows x BLOCK_C classes), leaves m, S, R, Q of its classes but y, and z_y if y
                is one of them. For the predicted class it leaves two parts: its likeliest class, and all its others
    launch 2    merges the parts in their order, without the part that is the predicted class; ‖x‖_p

Traffic: C·D weights per chunk of rows; B·D features for the logits, and again for ‖x‖_p (twice for p other than 1 and
∞), which token statistics do without; 8 to 24 bytes per row and class tile, written and read. Chunks keep those at
64 MiB (`Config.workspace`).
"""

import torch
import triton
import triton.language as tl

from .config import Config, Shape, cdiv, choose, for_vector
from .deviation import finite_max, first_at
from .device import architecture, dot_precision, vector
from .exponential import log1p
from .launch import launch
from .norm import compiled, norm_in_memory, square, with_bias
from .problem import IGNORE, Problem, Scores, why_not_product
from .rows import MAX_RESIDENT, rows_per_chunk
from .tile import logits_tile, tile_of
from .tiled import TABLE


@triton.jit
def _largest(M, n, excluded, BLOCK_PARTS: tl.constexpr):
    """The largest of n values without number `excluded`, and the first number that has it.

    # M: pointers (B, 1), excluded (B, 1) -> 2 x (B,)
    """
    maxima = tl.full((M.shape[0], BLOCK_PARTS), float("-inf"), tl.float32)
    found = tl.full((M.shape[0], BLOCK_PARTS), 2147483647, tl.int32)
    for j in range(0, n, BLOCK_PARTS):
        part = j + tl.arange(0, BLOCK_PARTS)[None, :]
        m = tl.load(M + part, mask=(part < n) & (part != excluded), other=float("-inf"))
        found = tl.where(m > maxima, part, found)
        maxima = tl.maximum(maxima, m)
    m = tl.max(maxima, 1)
    return m, tl.min(tl.where(maxima == m[:, None], found, 2147483647), 1)


@triton.jit(do_not_specialize=["B", "n_class_tiles"])
def one_hot_kernel(
    X,  # (B, D), row stride stride_xb * VEC
    W,  # (C, D), row stride stride_wc * VEC
    BIAS,  # (C,) or None
    LABELS,  # (B,) int64, or None for the predicted class
    STATISTICS,  # (2 to 4, B, n_class_tiles * PARTS): m, S, R, Q of a tile's classes but y; m = −inf if it has none
    Z_Y,  # (B,), with LABELS
    B, C, D, n_class_tiles,
    inv_temperature, p,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_y,
    VEC: tl.constexpr, NORM: tl.constexpr, ENTROPY: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """D, stride_xb and stride_wc come divided by VEC. PARTS: 1 with LABELS, else 2. STATISTICS has R for NORM 2
    and GENERAL, and Q with ENTROPY."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    stride_wc = tl.cast(stride_wc, tl.int64) * VEC
    row_tile, class_tile = tile_of(tl.program_id(0), tl.cdiv(B, BLOCK_B), n_class_tiles)
    row = row_tile.to(tl.int64) * BLOCK_B
    first_class = class_tile.to(tl.int64) * BLOCK_C
    rows = row + tl.arange(0, BLOCK_B)
    live = rows < B

    z, _ = logits_tile(
        X, W, BIAS, row, first_class,
        B, C, 0, D, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
        EVEN_D, False, PRECISION, False, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    classes = tl.arange(0, BLOCK_C)[None, :]
    z = tl.where(classes < C - first_class, z, float("-inf"))
    PARTS: tl.constexpr = 2 if LABELS is None else 1
    at = STATISTICS + rows * (n_class_tiles * PARTS) + class_tile * PARTS
    plane = tl.cast(B, tl.int64) * (n_class_tiles * PARTS)
    if LABELS is None:
        top = tl.max(z, 1)
        y = first_at(z, top, classes)
        tl.store(at + 1, top, mask=live)
        zero = tl.zeros((BLOCK_B,), tl.float32)
        tl.store(at + 1 + plane, zero, mask=live)
        if NORM > 1:
            tl.store(at + 1 + 2 * plane, zero + 1.0, mask=live)
    else:
        y = tl.load(LABELS + rows * stride_y, mask=live, other=-1) - first_class
        here = (y >= 0) & (y < BLOCK_C) & (y < C - first_class)
        z_y = tl.sum(tl.where(classes == y[:, None], z, 0.0), 1)
        tl.store(Z_Y + rows, z_y, mask=live & here)
    z = tl.where(classes == y[:, None], float("-inf"), z)
    m = tl.max(z, 1)
    d = (z - finite_max(m)[:, None]) * inv_temperature
    t = tl.exp(d)
    others = tl.where(classes == first_at(z, m, classes)[:, None], 0.0, t)
    tl.store(at, m, mask=live)
    tl.store(at + plane, tl.sum(others, 1), mask=live)
    if NORM > 1:
        tl.store(at + 2 * plane, tl.sum(square(t) if NORM == 2 else tl.exp(p * d), 1), mask=live)
    if ENTROPY:
        tl.store(at + 3 * plane, tl.sum(tl.where(t > 0.0, d * t, t), 1), mask=live)


@triton.jit(do_not_specialize=["B", "n", "stride_o"])
def merge_kernel(
    X,  # (B, D), row stride stride_xb * VEC
    LABELS,  # (B,) int64, or None for the predicted class
    STATISTICS,  # (2 to 4, B, n): of n parts, as one_hot_kernel leaves them; without LABELS odd ones are single classes
    Z_Y,  # (B,), with LABELS
    OUT,  # (1, B): scores; or with ENTROPY (4, B): log p_y, entropy, Σp² and ‖p − e_y‖₂
    B, C, D, n,
    inv_temperature, p, bias_norm,
    stride_xb, stride_xd, stride_y, stride_o,
    VEC: tl.constexpr, NORM: tl.constexpr, ENTROPY: tl.constexpr, IGNORED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """D and stride_xb come divided by VEC. With ENTROPY, NORM is 2."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = rows < B

    # 1. ‖(x, bias_norm)‖_p, for the score alone
    if not ENTROPY:
        norm = norm_in_memory(X, rows, B, 0, D, BLOCK_D, stride_xb, stride_xd, p, NORM, BLOCK_D, STAGES, tl.float32)
        norm = with_bias(norm, bias_norm, p, NORM)

    # 2. sums over the classes but y, of part j, j + BLOCK_PARTS, ... in column j
    inside = tl.where(live, rows, 0)
    at = STATISTICS + inside[:, None] * n
    plane = tl.cast(B, tl.int64) * n
    predicted = rows[:, None] * 0 - 1  # the part that is the predicted class
    y_exists = live
    ignored = rows < 0
    if LABELS is None:
        z_y, first = _largest(at, n, predicted, BLOCK_PARTS)
        predicted = first[:, None] | 1  # the likeliest class of the part's tile; none if all logits are −inf
    else:
        y = tl.load(LABELS + rows * stride_y, mask=live, other=0)
        y_exists = live & (y >= 0) & (y < C)
        ignored = y == IGNORED
        z_y = tl.load(Z_Y + rows, mask=y_exists, other=float("-inf"))
    m, leader = _largest(at, n, predicted, BLOCK_PARTS)  # S leaves out the likeliest class of the leader alone
    shift = finite_max(m)[:, None]
    sums_s = tl.zeros((BLOCK_B, BLOCK_PARTS), tl.float32)
    sums_r = tl.zeros((BLOCK_B, BLOCK_PARTS), tl.float32)
    sums_q = tl.zeros((BLOCK_B, BLOCK_PARTS), tl.float32)
    for j in range(0, n, BLOCK_PARTS):
        part = j + tl.arange(0, BLOCK_PARTS)[None, :]
        mask = (part < n) & (part != predicted)
        d = (tl.load(at + part, mask=mask, other=float("-inf")) - shift) * inv_temperature
        e = tl.exp(d)
        part_s = tl.load(at + plane + part, mask=mask, other=0.0)
        sums_s += (tl.where(part == leader[:, None], 0.0, 1.0) + part_s) * e
        if NORM > 1:
            part_r = tl.load(at + 2 * plane + part, mask=mask, other=0.0)
            sums_r += part_r * tl.exp(p * d)
        if ENTROPY:
            part_q = tl.load(at + 3 * plane + part, mask=mask, other=0.0)
            sums_q += tl.where(e > 0.0, (part_q + (1.0 + part_s) * d) * e, e)
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
        wrong = tl.where(y_exists, 0.0, float("nan"))
        out = OUT + rows
        tl.store(out, tl.where(ignored, 0.0, log_p_y + wrong), mask=live)
        out += stride_o
        tl.store(out, tl.where(ignored, 0.0, entropy + wrong), mask=live)
        out += stride_o
        tl.store(out, tl.where(ignored, 0.0, p_y * p_y + rest * rest * rho + wrong), mask=live)
        out += stride_o
        tl.store(out, tl.where(ignored, 0.0, residual + wrong), mask=live)
    else:
        value = tl.where(y_exists, norm * (residual * inv_temperature), float("nan"))
        tl.store(OUT + rows, tl.where(ignored, 0.0, value), mask=live)


MERGE = Config(4, 256, 256, 4, 2)  # rows, parts and features at a time


def configuration(shape: Shape) -> Config:
    """The tile of `tiled` for rows of which each tile leaves statistics."""
    return choose(TABLE, shape._replace(c=max(shape.c, MAX_RESIDENT + 1)))


def why_not(problem: Problem, arch: str) -> str:
    return why_not_product(problem, uniform=False)


def score(problem: Problem, scores: Scores, config: Config) -> None:
    """Scores (1, B) of features (B, D) under the head: weight (C, D), bias (C,). Into (4, B), for labels and p = 2:
    token statistics, log p_y, entropy, Σp² and ‖p − e_y‖₂."""
    x, w, bias, device = problem.features, problem.weight, problem.bias, problem.features.device
    arch, out, entropy = architecture(device), scores.out, len(scores.out) > 1
    assert w is not None
    (batch, d), c, labels = x.shape, w.shape[0], not isinstance(problem.target, str)
    vec = vector(d, x.stride(0), w.stride(0))
    cfg = for_vector(vec, config)
    tiles = cdiv(c, cfg.block_c)
    (norm, p), inv_temperature = compiled(problem.p), 1.0 / problem.temperature
    parts, planes = tiles if labels else 2 * tiles, 4 if entropy else 3 if norm > 1 else 2
    chunk = rows_per_chunk(batch, 4 * (planes * parts + 1), cfg)
    statistics = torch.empty(planes * chunk * parts, dtype=torch.float32, device=device)
    z_y = torch.empty(chunk, dtype=torch.float32, device=device) if labels else None
    for start in range(0, batch, chunk):
        rows = problem.rows(start, start + chunk)
        x, b = rows.features, len(rows.features)
        y = None if isinstance(rows.target, str) else rows.target
        stride_y = 0 if y is None else y.stride(0)
        launch(one_hot_kernel, cdiv(b, cfg.block_b) * tiles, cfg, (
            x, w, bias, y, statistics, z_y,
            b, c, d // vec, tiles,
            inv_temperature, p,
            x.stride(0) // vec, x.stride(1), w.stride(0) // vec, w.stride(1), 0 if bias is None else bias.stride(0),
            stride_y,
        ), dict(
            VEC=vec, NORM=norm, ENTROPY=entropy,
            EVEN_D=d % cfg.block_d == 0, PRECISION=dot_precision(x.dtype, arch, cfg.float32),
            BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
        ))  # fmt: skip
        launch(merge_kernel, cdiv(b, MERGE.block_b), MERGE, (
            x, y, statistics, z_y, out[:, start : start + b],
            b, c, d // vec, parts,
            inv_temperature, p, problem.bias_norm,
            x.stride(0) // vec, x.stride(1), stride_y, out.stride(0),
        ), dict(
            VEC=vec, NORM=norm, ENTROPY=entropy, IGNORED=IGNORE,
            BLOCK_B=MERGE.block_b, BLOCK_PARTS=MERGE.block_c, BLOCK_D=MERGE.block_d, STAGES=MERGE.num_stages,
        ))  # fmt: skip
