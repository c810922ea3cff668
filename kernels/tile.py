"""A tile of logits: the matmul of every kernel but the library's, and which tile a program has."""

import triton
import triton.language as tl

from .device import INTERPRETED

WIDEN = tl.constexpr(INTERPRETED)  # multiply in float32: the interpreter takes bfloat16 for integers


@triton.jit
def tile_of(pid, n_row_tiles, n_class_tiles):
    """Row tile and class tile of a program. In a group of row tiles the row tile varies fastest."""
    GROUP: tl.constexpr = 8  # row tiles that share a weight tile while it is in L2
    group = pid // (GROUP * n_class_tiles)
    height = tl.minimum(n_row_tiles - group * GROUP, GROUP)
    return group * GROUP + pid % (GROUP * n_class_tiles) % height, pid % (GROUP * n_class_tiles) // height


@triton.jit
def logits_tile(
    X, W, BIAS, row, first_class,
    B, C, first, last, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
    EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    SUM_X: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z = x·Wᵀ + b over features first ... last - 1, for rows from `row` and classes from `first_class` (int64); and
    with SUM_X, which excludes TMA, Σ|x| of the rows.

    X: (B, D), W: (C, D), BIAS: (C,) or None; with TMA, X and W are tensor descriptors of blocks (BLOCK_B, BLOCK_D) and
    (BLOCK_C, BLOCK_D). The program with first = 0 adds the bias.
    # -> (BLOCK_B, BLOCK_C), (BLOCK_B,)
    """
    columns = tl.arange(0, BLOCK_D)
    rows = row + tl.arange(0, BLOCK_B)
    classes = first_class + tl.arange(0, BLOCK_C)
    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    magnitudes = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    if TMA:
        for d in range(first, last, BLOCK_D):
            x = X.load([row.to(tl.int32), d])  # 0 beyond the edges
            w = W.load([first_class.to(tl.int32), d])
            if WIDEN:
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
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision=PRECISION)
            if SUM_X:
                magnitudes += tl.abs(x.to(tl.float32))
    if BIAS is not None:
        mask = (classes < C) & (first == 0)
        z += tl.load(BIAS + classes * stride_b, mask=mask, other=0.0).to(tl.float32)[None, :]
    return z, tl.sum(magnitudes, 1)
