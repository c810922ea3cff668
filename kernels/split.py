"""GradNorm scores where the classes do not fit one tile: logits to a bounded workspace, then one read of them.

    launch 1    z = x·Wᵀ + b by tiles (BLOCK_B rows x BLOCK_C classes), and each class tile's share of ‖x‖₁
    launch 2    rows.py on these logits; its "features" are the shares, for ‖x‖₁ = ‖(share_1, share_2, ...)‖₁

Traffic: B·D features and C·D weights per pass of the matmul, 4·B·C bytes of logits written and read, in chunks of
rows that keep the workspace at WORKSPACE_BYTES, or at MIN_ROWS rows where those are more; W is read once per chunk.
"""

import torch
import triton
import triton.language as tl

from .rows import score_rows
from .targets import INTERPRETED, Config, architecture, dot_precision
from .tile import logits_tile, norm_share

WORKSPACE_BYTES = 64 * 2**20
MIN_ROWS = 512
GROUP = 8  # row tiles that share a weight tile while it is in L2


@triton.jit(do_not_specialize=["B"])
def logits_kernel(
    X, W, BIAS, Z, SHARES,
    B, C, D, n_class_tiles,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_zb,
    HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # 1. this program's tile: groups of GROUP row tiles, inside a group row tiles first
    pid = tl.program_id(0)
    n_row_tiles = tl.cdiv(B, BLOCK_B)
    group = pid // (GROUP * n_class_tiles)
    height = tl.minimum(n_row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + pid % (GROUP * n_class_tiles) % height
    class_tile = pid % (GROUP * n_class_tiles) // height
    rows = row_tile.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = class_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)

    # 2. logits
    z = logits_tile(
        X, W, BIAS, rows, classes,
        B, C, D, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
        HAS_BIAS, EVEN_D, PRECISION, UPCAST, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    tl.store(Z + rows[:, None] * stride_zb + classes[None, :], z, mask=(rows < B)[:, None] & (classes < C)[None, :])

    # 3. this class tile's share of ‖x‖₁
    share = norm_share(X, rows, B, D, stride_xb, stride_xd, class_tile, n_class_tiles, BLOCK_B, BLOCK_D)
    tl.store(SHARES + rows * n_class_tiles + class_tile, share, mask=rows < B)


def configuration(b: int, c: int, d: int, dtype: torch.dtype, arch: str) -> Config:
    """A narrow tile for few rows, where reading W is all the work; else the largest that fits the registers."""
    stages = 2 if arch.startswith("gfx") else 3
    if dtype == torch.float32:
        return Config(16, 64, 32, 4, stages) if b <= 64 else Config(64, 128, 32, 8, stages)
    if b <= 64:
        return Config(16, 32, 128, 4, stages)
    return Config(128, 128, 64, 8, stages)


def score_split(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    prediction: torch.Tensor | None,
    temperature: float,
    scale: float,
    bias_norm: float,
    config: Config | None = None,
    chunk: int | None = None,
) -> None:
    """Scores of features (B, D) under the head weight (C, D), bias (C,), into out (1, B), or (6, B) with prediction."""
    (b, d), c = features.shape, weight.shape[0]
    arch = architecture(features.device)
    cfg = config or configuration(b, c, d, features.dtype, arch)
    fused = features.dtype != torch.float64  # float64 has no tensor cores to win: the matmul is the library's
    n_class_tiles = triton.cdiv(c, cfg.block_c)
    width = triton.cdiv(c, 4) * 4  # rows of logits start 16-byte aligned
    row_bytes = 4 * (width + n_class_tiles) if fused else 8 * width
    chunk = min(b, chunk or max(MIN_ROWS, WORKSPACE_BYTES // row_bytes // MIN_ROWS * MIN_ROWS))
    logits = torch.empty((chunk, width), dtype=out.dtype, device=features.device)
    shares = torch.empty((chunk, n_class_tiles), dtype=out.dtype, device=features.device) if fused else None
    for start in range(0, b, chunk):
        stop = min(start + chunk, b)
        x, z = features[start:stop], logits[: stop - start, :c]
        if shares is None:
            torch.mm(x, weight.t(), out=z)
            norms = x
            if bias is not None:
                z += bias
        else:
            norms = shares[: stop - start]
            logits_kernel[(triton.cdiv(stop - start, cfg.block_b) * n_class_tiles,)](
                x, weight, x if bias is None else bias, z, norms,
                stop - start, c, d, n_class_tiles,
                x.stride(0), x.stride(1), weight.stride(0), weight.stride(1),
                0 if bias is None else bias.stride(0), width,
                HAS_BIAS=bias is not None, EVEN_D=d % cfg.block_d == 0, PRECISION=dot_precision(x.dtype, arch),
                UPCAST=INTERPRETED and x.dtype == torch.bfloat16, GROUP=GROUP,
                BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
                num_warps=cfg.num_warps, num_stages=cfg.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
        score_rows(
            norms, z, out[:, start:stop], None if prediction is None else prediction[start:stop],
            temperature, scale, bias_norm,
        )  # fmt: skip
