"""A tile of logits: the matmul of every kernel but the library's."""

import triton
import triton.language as tl


@triton.jit
def logits_tile(
    X, W, BIAS, row, first_class,
    B, C, first, last, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z = x·Wᵀ + b over features first ... last - 1, for rows from `row` and classes from `first_class` (int64).

    X: (B, D), W: (C, D), BIAS: (C,); with TMA, X and W are tensor descriptors of blocks (BLOCK_B, BLOCK_D) and
    (BLOCK_C, BLOCK_D). The program with first = 0 adds the bias.
    # -> (BLOCK_B, BLOCK_C)
    """
    columns = tl.arange(0, BLOCK_D)
    rows = row + tl.arange(0, BLOCK_B)
    classes = first_class + tl.arange(0, BLOCK_C)
    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    if TMA:
        for d in range(first, last, BLOCK_D):
            x = X.load([row.to(tl.int32), d])  # 0 beyond the edges
            w = W.load([first_class.to(tl.int32), d])
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
        mask = (classes < C) & (first == 0)
        z += tl.load(BIAS + classes * stride_b, mask=mask, other=0.0).to(tl.float32)[None, :]
    return z
