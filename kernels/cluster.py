"""GradNorm scores of 256 < C <= 4096 in one launch by thread block clusters: several CTAs hold a row's logits together.

    z = x·Wᵀ + b,   score = (‖x‖₁ + bias_norm)·Σ_c |p_c − 1/C|·scale/T,   p = softmax(z/T)

The program of one_tile.py with a tile of up to 16 x 256 classes: the compiler gives each CTA of the cluster a slice of
the classes, and the sums over classes cross them through distributed shared memory. Traffic: features and weight once
per row block, no logits. Needs half precision, sm_90, TMA, and a compiler that reduces across CTAs (Triton 3.8).

The operands come by tensor descriptors, x for ‖x‖₁ by pointers once more: if one value fed both, the compiler would
split x over the CTAs by rows while it splits the classes, and the product would be wrong without a word
(`benchmarks/compile_matrix.py` reads the compiled layout). Not chosen by default: it has not run on a GPU.
"""

import torch
import triton
import triton.language as tl

from .deviation import deviation_of_rows, first_at, store_scores
from .launch import launch
from .targets import (
    ANY,
    CLUSTERS,
    INTERPRETED,
    Choice,
    Config,
    Table,
    architecture,
    cdiv,
    choose,
    descriptor,
    descriptors_fit,
    upcast,
)
from .tile import logits_tile, norm_share

MAX_CLASSES = {"sm_100": 2048}  # 4096 on other architectures


@triton.jit(do_not_specialize=["B", "stride_o"])
def cluster_kernel(
    XT, WT, X, BIAS, OUT, PREDICTION,
    B, C, D,
    inv_temperature, scale, bias_norm,
    stride_xb, stride_xd, stride_b, stride_o,
    HAS_BIAS: tl.constexpr, HEAD: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """XT and WT: descriptors of features and weight; X: the features' pointer."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B
    classes = tl.arange(0, BLOCK_C)[None, :]
    z = logits_tile(
        XT, WT, BIAS, row, tl.cast(0, tl.int64),
        B, C, 0, D, 0, 0, 0, 0, stride_b,
        HAS_BIAS, True, True, "ieee", UPCAST, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    norm = norm_share(X, row, B, 0, D, BLOCK_D, stride_xb, stride_xd, BLOCK_B, BLOCK_D)
    valid = classes < C
    z = tl.where(valid, z, float("-inf"))
    m, s, deviation = deviation_of_rows(z, valid, C, inv_temperature)
    index = first_at(z, m, classes) if HEAD else 0
    store_scores(
        OUT, PREDICTION, row + tl.arange(0, BLOCK_B), B, stride_o,
        norm, m, index, s, deviation,
        inv_temperature, scale, bias_norm,
        HEAD,
    )  # fmt: skip


# 128 x 128 logits a CTA: 128 x 256 spills, and so does 64 x 256 beside Blackwell's tensor memory.
TABLE: Table = {
    "any": [
        Choice("half", ANY, 512, Config(128, 512, 64, 8, 4, tma=True, num_ctas=4)),
        Choice("half", ANY, 1024, Config(128, 1024, 64, 8, 4, tma=True, num_ctas=8)),
        Choice("half", ANY, 2048, Config(128, 2048, 64, 8, 4, tma=True, num_ctas=16)),
        Choice("half", ANY, 4096, Config(64, 4096, 64, 8, 3, tma=True, num_ctas=16)),
    ],
    "sm_100": [
        Choice("half", ANY, 512, Config(64, 512, 64, 8, 3, tma=True, num_ctas=4)),
        Choice("half", ANY, 1024, Config(64, 1024, 64, 8, 3, tma=True, num_ctas=8)),
        Choice("half", ANY, 2048, Config(64, 2048, 64, 8, 3, tma=True, num_ctas=16)),
    ],
}


def configuration(b: int, c: int, d: int, dtype: torch.dtype, arch: str) -> Config:
    return choose(TABLE, b, c, dtype, arch)


def fits(features: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel can take these."""
    arch = architecture(features.device)
    return (
        (CLUSTERS or INTERPRETED)
        and features.dtype.itemsize == 2
        and weight.shape[0] <= MAX_CLASSES.get(arch, 4096)
        and descriptors_fit(arch, features, weight)
    )


def score_cluster(
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

    ValueError where `fits` says no.
    """
    (b, d), c = features.shape, weight.shape[0]
    arch = architecture(features.device)
    if not fits(features, weight):
        raise ValueError(
            f"cluster takes halves, at most {MAX_CLASSES.get(arch, 4096)} classes, rows that TMA can read, sm_90 and "
            f"Triton 3.8; got {features.dtype}, {c}, strides {features.stride()} and {weight.stride()}, {arch} and "
            f"{triton.__version__}"
        )
    cfg = config or configuration(b, c, d, features.dtype, arch)
    launch(cluster_kernel, cdiv(b, cfg.block_b), cfg, (
        descriptor(features, cfg.block_b, cfg.block_d), descriptor(weight, cfg.block_c, cfg.block_d),
        features, features if bias is None else bias, out, out if prediction is None else prediction,
        b, c, d,
        1.0 / temperature, scale, bias_norm,
        features.stride(0), features.stride(1), 0 if bias is None else bias.stride(0), out.stride(0),
    ), dict(
        HAS_BIAS=bias is not None, HEAD=prediction is not None, UPCAST=upcast(features.dtype),
        BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d,
    ))  # fmt: skip
