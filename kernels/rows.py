"""GradNorm scores from logits that are in memory: each program reads its rows of logits and features once.

    score = (‖x‖₁ + bias_norm)·Σ_c |p_c − 1/C|·scale/T,   p = softmax(z/T)

Rows of up to MAX_RESIDENT classes stay in registers. A longer row is read twice by the program that owns it: first for
max, Σexp and Σexpm1, merged over blocks; then, from L2 where it fits, for the deviations. Traffic: one read of B·C
logits and B·D features. This is also the second launch of `split.py`, whose features are the shares of ‖x‖₁.
"""

import torch
import triton
import triton.language as tl

from .deviation import deviation_of_rows, expm1, first_at, shift_of, store_scores
from .targets import Config, architecture

MAX_RESIDENT = 8192


@triton.jit(do_not_specialize=["B", "stride_o"])
def rows_kernel(
    X, Z, OUT, PREDICTION,
    B, C, D,
    inv_temperature: tl.float64, scale, bias_norm,
    stride_xb, stride_xd, stride_zb, stride_zc, stride_o,
    HEAD: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = (rows < B)[:, None]
    dtype = OUT.dtype.element_ty  # float32, or float64 for float64 logits
    inv_temperature = tl.cast(inv_temperature, dtype)

    # 1. ‖x‖₁
    columns = tl.arange(0, BLOCK_D)
    norm = tl.zeros((BLOCK_B, BLOCK_D), dtype)
    for start in range(0, D, BLOCK_D):
        x = tl.load(
            X + rows[:, None] * stride_xb + (start + columns)[None, :].to(tl.int64) * stride_xd,
            mask=live & (columns < D - start)[None, :],
            other=0.0,
        )
        norm += tl.abs(x.to(dtype))

    # 2. Σ|p − 1/C|
    z_rows = Z + rows[:, None] * stride_zb
    classes = tl.arange(0, BLOCK_C)[None, :]
    if RESIDENT:
        valid = classes < C
        z = tl.load(z_rows + classes.to(tl.int64) * stride_zc, mask=live & valid, other=float("-inf"))
        z = z.to(dtype)  # (BLOCK_B, BLOCK_C)
        m, s, deviation = deviation_of_rows(z, valid, C, inv_temperature)
        index = first_at(z, m, classes) if HEAD else 0
    else:
        # First read: m, S = Σ exp d and Q = Σ expm1 d relative to the running maximum. When that rises by a factor
        # 1 + Δ (Δ = expm1 of the old maximum's d), S becomes S(1 + Δ) and Q of n classes Q(1 + Δ) + nΔ.
        m = tl.full((BLOCK_B,), float("-inf"), dtype)
        s = tl.zeros((BLOCK_B,), dtype)
        q = tl.zeros((BLOCK_B,), dtype)
        index = tl.zeros((BLOCK_B,), tl.int32)
        for c in range(0, C, BLOCK_C):
            valid = classes < C - c
            z = tl.load(z_rows + (c + classes).to(tl.int64) * stride_zc, mask=live & valid, other=float("-inf"))
            z = z.to(dtype)
            block_m = tl.max(z, 1)
            if HEAD:
                index = tl.where(block_m > m, c + first_at(z, block_m, classes), index)
            shift = shift_of(tl.maximum(m, block_m))
            d_old = (m - shift) * inv_temperature
            delta = expm1(d_old, tl.exp(d_old))
            d = (z - shift[:, None]) * inv_temperature
            e = tl.exp(d)
            s = s * (1.0 + delta) + tl.sum(e, 1)
            q = q * (1.0 + delta) + c * delta + tl.sum(tl.where(valid, expm1(d, e), 0.0), 1)
            m = tl.maximum(m, block_m)
        near = s > 0.5 * C
        mean = tl.where(near, q, s) / C
        shift = shift_of(m)
        # Second read.
        totals = tl.zeros((BLOCK_B, BLOCK_C), dtype)
        deltas = tl.zeros((BLOCK_B, BLOCK_C), dtype)
        sigmas = tl.zeros((BLOCK_B, BLOCK_C), dtype)
        for c in range(0, C, BLOCK_C):
            valid = classes < C - c
            z = tl.load(z_rows + (c + classes).to(tl.int64) * stride_zc, mask=live & valid, other=float("-inf"))
            z = z.to(dtype)
            d = (z - shift[:, None]) * inv_temperature
            e = tl.exp(d)
            t = tl.where(near[:, None], expm1(d, e), e)
            u = tl.where(valid, t - mean[:, None], 0.0)
            totals += tl.abs(u)
            deltas += u
            sigmas += tl.where(u > 0.0, 1.0, 0.0) - tl.where(u < 0.0, 1.0, 0.0)
        delta = tl.sum(deltas, 1)
        s = mean * C + delta + tl.where(near, C, 0)  # Σt once more, now without the first read's many merges
        deviation = (tl.sum(totals, 1) - delta * tl.sum(sigmas, 1) / C) / s
    store_scores(
        OUT, PREDICTION, rows, B, stride_o,
        tl.sum(norm, 1), m, index, s, deviation,
        inv_temperature, scale, bias_norm,
        HEAD,
    )  # fmt: skip


def configuration(b: int, c: int, dtype: torch.dtype, arch: str) -> Config:
    """About 16 logits to a thread: enough loads in flight to stream, few enough to stay in registers."""
    resident = 4096 if dtype == torch.float64 else MAX_RESIDENT
    if c > resident:
        return Config(1, 4096, 256, 8, 2)
    block_c = next(n for n in (16, 128, 1024, 4096, 8192) if c <= n)
    block_b = max(1, 2048 // block_c)
    return Config(block_b, block_c, max(16, 2048 // block_b), max(4, block_c // 512), 2)


def score_rows(
    features: torch.Tensor,
    logits: torch.Tensor,
    out: torch.Tensor,
    prediction: torch.Tensor | None,
    temperature: float,
    scale: float,
    bias_norm: float,
    config: Config | None = None,
) -> None:
    """Scores of features (B, D) with logits (B, C), into out (1, B), or (6, B) with prediction."""
    (b, d), c = features.shape, logits.shape[1]
    cfg = config or configuration(b, c, out.dtype, architecture(logits.device))
    rows_kernel[(triton.cdiv(b, cfg.block_b),)](
        features, logits, out, out if prediction is None else prediction,
        b, c, d,
        1.0 / temperature, scale, bias_norm,
        features.stride(0), features.stride(1), logits.stride(0), logits.stride(1), out.stride(0),
        HEAD=prediction is not None, RESIDENT=c <= cfg.block_c,
        BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
        num_warps=cfg.num_warps, num_stages=cfg.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
