"""GradNorm scores of 256 < C <= 4096 in one launch by thread block clusters: several CTAs hold a row's logits together.

    z = x·Wᵀ + b,   score = (‖x‖₁ + bias_norm)·Σ_c |p_c − 1/C|·scale/T,   p = softmax(z/T)

The program of one_tile.py with a tile of up to 16 x 256 classes: the compiler gives each CTA of the cluster a slice of
the classes, and the sums over classes cross them through distributed shared memory. Traffic: features and weight once
per row block, no logits. Needs half precision, sm_90 or sm_100, TMA, and a compiler that reduces across CTAs (Triton
3.8). It writes the score alone, for p = 1: the other fields would spill. Only tests and benchmarks reach it: it has not
run on a GPU.

The operands come by tensor descriptors, x for ‖x‖₁ by pointers once more: if one value fed both, the compiler would
split x over the CTAs by rows while it splits the classes, and the product would be silently wrong
(`benchmarks/compile_matrix.py` checks the compiled layout).
"""

import triton
import triton.language as tl

from ..config import ANY, Config, Line, Shape, cdiv, choose
from ..deviation import deviation_of_rows
from ..device import INTERPRETED, TRITON, TensorDescriptor, tma_reads, tuned_as, vector
from ..launch import launch
from ..norm import norm_in_memory
from ..output import store_scores
from ..problem import UNIFORM_ALONE, Problem, Scores
from ..tile import logits_tile

# Whether the compiler reduces across the CTAs of a cluster. Triton 3.6 cannot.
CLUSTERS = TRITON >= (3, 8)
MAX_CLASSES = {"sm_100": 2048}  # 4096 on other architectures


@triton.jit(do_not_specialize=["B", "stride_o"])
def cluster_kernel(
    XT,  # features (B, D): a descriptor of blocks (BLOCK_B, BLOCK_D)
    WT,  # weight (C, D): a descriptor of blocks (BLOCK_C, BLOCK_D)
    X,  # (B, D), row stride stride_xb * VEC
    BIAS,  # (C,) or None
    OUT,  # (1, B)
    B, C, D,
    inv_temperature, scale, bias_norm,
    stride_xb, stride_xd, stride_b, stride_o,
    VEC: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """D and stride_xb come divided by VEC."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    row = tl.program_id(0).to(tl.int64) * BLOCK_B
    classes = tl.arange(0, BLOCK_C)[None, :]
    z, _ = logits_tile(
        XT, WT, BIAS, row, tl.cast(0, tl.int64),
        B, C, 0, D, 0, 0, 0, 0, stride_b,
        True, True, "ieee", False, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_B)
    norm = norm_in_memory(
        X, rows, B, 0, D, BLOCK_D, stride_xb, stride_xd, 1.0,
        1, BLOCK_D, STAGES, tl.float32,
    )  # fmt: skip
    valid = classes < C
    z = tl.where((rows < B)[:, None] & valid, z, float("-inf"))  # rows beyond B must not ask for the careful form
    m, s, deviation = deviation_of_rows(z, valid, C, 1.0, inv_temperature, 1)
    store_scores(
        OUT, None, rows, B, stride_o,
        norm, deviation, m, m, s, m, m, m, m,
        inv_temperature, scale, bias_norm, 1.0,
        1,
    )  # fmt: skip


# 128 x 128 logits a CTA: 128 x 256 spills, and so does 64 x 256 beside Blackwell's tensor memory, which therefore takes
# 2048 classes at most.
TABLE = [
    Line("half", ANY, 512, Config(64, 512, 64, 8, 3, tma=True, num_ctas=4), "sm_100"),
    Line("half", ANY, 1024, Config(64, 1024, 64, 8, 3, tma=True, num_ctas=8), "sm_100"),
    Line("half", ANY, 2048, Config(64, 2048, 64, 8, 3, tma=True, num_ctas=16), "sm_100"),
    Line("half", ANY, 512, Config(128, 512, 64, 8, 4, tma=True, num_ctas=4)),
    Line("half", ANY, 1024, Config(128, 1024, 64, 8, 4, tma=True, num_ctas=8)),
    Line("half", ANY, 2048, Config(128, 2048, 64, 8, 4, tma=True, num_ctas=16)),
    Line("half", ANY, 4096, Config(64, 4096, 64, 8, 3, tma=True, num_ctas=16)),
]


def configuration(shape: Shape) -> Config:
    return choose(TABLE, shape)


def why_not(problem: Problem, arch: str) -> str:
    """Why this kernel does not take the problem; empty where it does."""
    x, w, most = problem.features, problem.weight, MAX_CLASSES.get(tuned_as(arch), 4096)
    if not problem.uniform:
        return UNIFORM_ALONE
    if w is None:
        return "takes a weight, not logits"
    if x.dtype.itemsize != 2:
        return f"takes halves, not {x.dtype}"
    if problem.p != 1.0:
        return f"takes p = 1, not p = {problem.p:g}"
    if len(w) > most:
        return f"takes at most {most} classes on {arch}, got {len(w)}"
    if not (CLUSTERS or INTERPRETED):
        return f"needs Triton 3.8, this is {triton.__version__}"
    if not tma_reads(arch, x, w):
        return f"needs matrices that TMA can read on sm_90 or sm_100; got strides {x.stride()}, {w.stride()} on {arch}"
    return ""


def score(problem: Problem, scores: Scores, config: Config) -> None:
    """Scores (1, B) of features (B, D) under the head's weight (C, D) and bias (C,). ValueError if more than the score
    is asked for."""
    x, w, bias = problem.features, problem.weight, problem.bias
    if scores.prediction is not None:
        raise ValueError("cluster writes the score alone, not the other fields")
    assert w is not None
    (b, d), c = x.shape, len(w)
    vec = vector(d, x.stride(0))
    launch(cluster_kernel, cdiv(b, config.block_b), config, (
        TensorDescriptor.from_tensor(x, [config.block_b, config.block_d]),
        TensorDescriptor.from_tensor(w, [config.block_c, config.block_d]),
        x, bias, scores.out,
        b, c, d // vec,
        1.0 / problem.temperature, problem.scale, problem.bias_norm,
        x.stride(0) // vec, x.stride(1), 0 if bias is None else bias.stride(0), scores.out.stride(0),
    ), dict(
        VEC=vec,
        BLOCK_B=config.block_b, BLOCK_C=config.block_c, BLOCK_D=config.block_d, STAGES=config.num_stages,
    ))  # fmt: skip
