"""GradNorm scores where all classes fit one tile (C <= 256): one launch, one read of features and weight.

    z = x·Wᵀ + b,   score = (‖x‖₁ + bias_norm)·Σ_c |p_c − 1/C|·scale/T,   p = softmax(z/T)

A program owns BLOCK_B rows. Features pass through it once and feed both the matmul and ‖x‖₁; logits never leave its
registers. Traffic: B·D features + C·D weights (from L2 after the first program) + 4·B bytes of scores, so for
C <= 256 the kernel is bound by the read of the features.
"""

import torch
import triton
import triton.language as tl

from .deviation import deviation_of_rows, first_at, store_scores
from .launch import launch
from .targets import ANY, Choice, Config, Table, architecture, cdiv, choose, dot_precision, upcast

MAX_CLASSES = 256


@triton.jit(do_not_specialize=["B", "stride_o"])
def one_tile_kernel(
    X, W, BIAS, OUT, PREDICTION,
    B, C, D,
    inv_temperature, scale, bias_norm,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_o,
    HAS_BIAS: tl.constexpr, HEAD: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = tl.arange(0, BLOCK_C)
    columns = tl.arange(0, BLOCK_D)
    x_rows = X + rows[:, None] * stride_xb
    w_rows = W + classes[None, :].to(tl.int64) * stride_wc

    # 1. logits and ‖x‖₁ from one read of the features
    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    norm = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
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
        norm += tl.abs(x.to(tl.float32))
    if HAS_BIAS:
        z += tl.load(BIAS + classes.to(tl.int64) * stride_b, mask=classes < C, other=0.0).to(tl.float32)[None, :]

    # 2. Σ|p − 1/C| on the logits in registers
    valid = (classes < C)[None, :]
    z = tl.where(valid, z, float("-inf"))
    m, s, deviation = deviation_of_rows(z, valid, C, inv_temperature)
    index = first_at(z, m, classes[None, :]) if HEAD else 0
    store_scores(
        OUT, PREDICTION, rows, B, stride_o,
        tl.sum(norm, 1), m, index, s, deviation,
        inv_temperature, scale, bias_norm,
        HEAD,
    )  # fmt: skip


# Small row tiles while the batch is small, so that its features are read by more multiprocessors. float32 has no tensor
# cores: a tile whose accumulators and operands fit the registers.
TABLE: Table = {
    "any": [
        Choice("half", 1024, 16, Config(16, 16, 64, 4, 3)),
        Choice("half", ANY, 16, Config(64, 16, 64, 4, 3)),
        Choice("half", 1024, 128, Config(16, 128, 64, 8, 3)),
        Choice("half", ANY, 128, Config(64, 128, 64, 8, 3)),
        Choice("half", 1024, 256, Config(16, 256, 32, 8, 3)),
        Choice("half", ANY, 256, Config(64, 256, 32, 8, 3)),
        Choice("float32", 1024, 16, Config(16, 16, 32, 4, 2)),
        Choice("float32", ANY, 16, Config(64, 16, 32, 4, 2)),
        Choice("float32", 1024, 128, Config(16, 128, 32, 8, 2)),
        Choice("float32", ANY, 128, Config(32, 128, 32, 4, 2)),
        Choice("float32", ANY, 256, Config(16, 256, 32, 4, 2)),
    ],
    # 64 x 256 spills without warpgroup instructions, and with Blackwell's tensor memory
    "sm_80": [Choice("half", ANY, 256, Config(16, 256, 32, 8, 3))],
    "sm_100": [Choice("half", ANY, 256, Config(16, 256, 32, 8, 3))],
}


def configuration(b: int, c: int, d: int, dtype: torch.dtype, arch: str) -> Config:
    return choose(TABLE, b, c, dtype, arch)


def score_one_tile(
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
    """Scores of features (B, D) under the head weight (C, D), bias (C,), into out (1, B), or (6, B) with prediction."""
    (b, d), c = features.shape, weight.shape[0]
    arch = architecture(features.device)
    cfg = config or configuration(b, c, d, features.dtype, arch)
    launch(one_tile_kernel, cdiv(b, cfg.block_b), cfg, (
        features, weight, features if bias is None else bias, out, out if prediction is None else prediction,
        b, c, d,
        1.0 / temperature, scale, bias_norm,
        features.stride(0), features.stride(1), weight.stride(0), weight.stride(1),
        0 if bias is None else bias.stride(0), out.stride(0),
    ), dict(
        HAS_BIAS=bias is not None, HEAD=prediction is not None, EVEN_D=d % cfg.block_d == 0,
        PRECISION=dot_precision(features.dtype, arch, cfg.float32), UPCAST=upcast(features.dtype),
        BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
    ))  # fmt: skip
