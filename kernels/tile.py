"""A tile of logits, a share of ‖x‖₁, and how CTAs that hold tiles of the same rows put together what they know.

A class tile's share of ‖x‖₁ is read again (from L2) in a loop of its own: taking it out of the main loop's operands
would make each matmul instruction wait for the one before.
"""

import triton
import triton.language as tl

from .deviation import expm1, shift_of


@triton.jit
def logits_tile(
    X, W, BIAS, row, klass,
    B, C, first, last, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z = x·Wᵀ + b over features first ... last - 1, of rows from row and classes from klass on (int64).

    With TMA, X and W are tensor descriptors with blocks (BLOCK_B, BLOCK_D) and (BLOCK_C, BLOCK_D).
    # -> (BLOCK_B, BLOCK_C)
    """
    columns = tl.arange(0, BLOCK_D)
    rows = row + tl.arange(0, BLOCK_B)
    classes = klass + tl.arange(0, BLOCK_C)
    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    if TMA:
        for d in range(first, last, BLOCK_D):
            x = X.load([row.to(tl.int32), d])  # 0 beyond the edges
            w = W.load([klass.to(tl.int32), d])
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION)
    else:
        x_rows = X + rows[:, None] * stride_xb
        w_rows = W + classes[None, :] * stride_wc
        for d in range(first, last, BLOCK_D):
            x_mask = (rows < B)[:, None]
            w_mask = (classes < C)[None, :]
            if not EVEN_D:
                x_mask = x_mask & (columns < last - d)[None, :]
                w_mask = w_mask & (columns < last - d)[:, None]
            step = (d + columns).to(tl.int64)
            x = tl.load(x_rows + step[None, :] * stride_xd, mask=x_mask, other=0.0)  # (BLOCK_B, BLOCK_D)
            w = tl.load(w_rows + step[:, None] * stride_wd, mask=w_mask, other=0.0)  # (BLOCK_D, BLOCK_C)
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += tl.load(BIAS + classes * stride_b, mask=classes < C, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def norm_share(
    X, row, B, first, last, step, stride_xb, stride_xd,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ|x| over the blocks of BLOCK_D features at first, first + step, ..., below last.  # -> (BLOCK_B,)"""
    rows = row + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_D)
    norm = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for d in range(first, last, step):
        x = tl.load(
            X + rows[:, None] * stride_xb + (d + columns).to(tl.int64)[None, :] * stride_xd,
            mask=(rows < B)[:, None] & (columns < last - d)[None, :],
            other=0.0,
        )
        norm += tl.abs(x.to(tl.float32))
    return tl.sum(norm, 1)


@triton.jit
def read_statistics(AT, first, n_class_tiles, other, TILES: tl.constexpr):
    """What class tiles first, first + 1, ... stored of each row, past the L1 cache.  # AT (B,) -> (B, TILES)"""
    tiles = first + tl.arange(0, TILES)
    at = AT[:, None] + tiles[None, :]
    return tl.load(at, mask=(tiles < n_class_tiles)[None, :], other=other, cache_modifier=".cg")


@triton.jit
def merged_statistics(AT, kind, C, n_class_tiles, inv_temperature, BLOCK_C: tl.constexpr, TILES: tl.constexpr):
    """m, near and mean of whole rows from m_j, S_j, Q_j at AT, AT + kind, AT + 2·kind; deviation.py has the merge."""
    m = tl.max(read_statistics(AT, 0, n_class_tiles, float("-inf"), TILES), 1)
    for j in range(TILES, n_class_tiles, TILES):
        m = tl.maximum(m, tl.max(read_statistics(AT, j, n_class_tiles, float("-inf"), TILES), 1))
    s = tl.zeros_like(m)
    q = tl.zeros_like(m)
    for j in range(0, n_class_tiles, TILES):
        d = (read_statistics(AT, j, n_class_tiles, float("-inf"), TILES) - shift_of(m)[:, None]) * inv_temperature
        delta = expm1(d, tl.exp(d))
        n = tl.minimum(tl.maximum(C - (j + tl.arange(0, TILES)) * BLOCK_C, 0), BLOCK_C).to(tl.float32)[None, :]
        s += tl.sum(read_statistics(AT + kind, j, n_class_tiles, 0.0, TILES) * (1.0 + delta), 1)
        q += tl.sum(read_statistics(AT + 2 * kind, j, n_class_tiles, 0.0, TILES) * (1.0 + delta) + n * delta, 1)
    near = s > 0.5 * C
    return m, near, tl.where(near, q, s) / C


@triton.jit
def barrier(COUNTER, target):
    """Wait until the counter has `target` arrivals, this program's among them; what others stored before can be read
    after. Only in a cooperative launch, whose programs are all resident."""
    tl.debug_barrier()
    tl.atomic_add(COUNTER, 1, sem="acq_rel")
    while tl.atomic_add(COUNTER, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()
