"""A tile of logits, and a class tile's share of ‖x‖₁: what the kernels with several class tiles have in common.

The share of class tile j of n is the blocks j, j + n, j + 2n, ... of the features, read again (from L2) in a loop of
their own: taking them out of the main loop's operands would make each matmul instruction wait for the one before.
"""

import triton
import triton.language as tl


@triton.jit
def logits_tile(
    X, W, BIAS, rows, classes,
    B, C, D, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z = x·Wᵀ + b of these rows and classes (int64).  # -> (BLOCK_B, BLOCK_C)"""
    columns = tl.arange(0, BLOCK_D)
    x_rows = X + rows[:, None] * stride_xb
    w_rows = W + classes[None, :] * stride_wc
    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        x_mask = (rows < B)[:, None]
        w_mask = (classes < C)[None, :]
        if not EVEN_D:
            x_mask = x_mask & (columns < D - d)[None, :]
            w_mask = w_mask & (columns < D - d)[:, None]
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
    X, rows, B, D, stride_xb, stride_xd, share, n_shares,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ|x| over this share of the features.  # -> (BLOCK_B,)"""
    columns = tl.arange(0, BLOCK_D)
    norm = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for d in range(share * BLOCK_D, D, n_shares * BLOCK_D):
        step = (d + columns).to(tl.int64)
        x = tl.load(
            X + rows[:, None] * stride_xb + step[None, :] * stride_xd,
            mask=(rows < B)[:, None] & (columns < D - d)[None, :],
            other=0.0,
        )
        norm += tl.abs(x.to(tl.float32))
    return tl.sum(norm, 1)
