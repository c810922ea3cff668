"""GradNorm scores where all classes fit one tile (C <= 256): one launch.

    z = x·Wᵀ + b,   score = ‖(x, bias_norm)‖_p·‖softmax(z/T) − 1/C‖_p·scale/T

A program owns BLOCK_B rows and keeps their logits in registers. Traffic: B·D features + C·D weights (from L2 after the
first program) + 4·B bytes of scores. For few classes, reading the features dominates. With synchronous matmul
instructions, one read of x feeds both the product and ‖x‖₁. With asynchronous ones, ‖x‖ reads x again, from L2
(`READ_TWICE`): if x also goes to registers, Triton gives it one buffer fewer than w, and refills a buffer that the last
product may still be reading. p other than 1 reads x again too, and p other than 1 and ∞ twice.
"""

import triton
import triton.language as tl

from .config import ANY, Config, Line, Shape, cdiv, choose, for_vector
from .deviation import deviation_of_rows
from .device import TRITON, architecture, asynchronous_products, dot_precision, tuned_as, vector
from .launch import launch
from .norm import compiled, norm_in_memory
from .output import store_scores
from .problem import Problem, Scores, why_not_product
from .spread import spread_of_rows
from .tile import logits_tile

MAX_CLASSES = 256


@triton.jit(do_not_specialize=["B", "stride_o"])
def one_tile_kernel(
    X,  # (B, D), row stride stride_xb * VEC
    W,  # (C, D), row stride stride_wc * VEC
    BIAS,  # (C,) or None
    OUT,  # (1, B), or (10, B) with PREDICTION
    PREDICTION,  # (B,) int64, or None
    B, C, D,
    inv_temperature, scale, bias_norm, p,
    stride_xb, stride_xd, stride_wc, stride_wd, stride_b, stride_o,
    VEC: tl.constexpr, EVEN_D: tl.constexpr,
    NORM: tl.constexpr, READ_TWICE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """D, stride_xb and stride_wc are passed divided by VEC."""
    D = D * VEC
    stride_xb = tl.cast(stride_xb, tl.int64) * VEC
    stride_wc = tl.cast(stride_wc, tl.int64) * VEC
    row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = row + tl.arange(0, BLOCK_B)

    # 1. ‖x‖_p and logits
    if READ_TWICE:
        norm = norm_in_memory(
            X, rows, B, 0, D, BLOCK_D, stride_xb, stride_xd, p,
            NORM, BLOCK_D, STAGES, tl.float32,
        )  # fmt: skip
    z, sums = logits_tile(
        X, W, BIAS, row, tl.cast(0, tl.int64),
        B, C, 0, D, stride_xb, stride_xd, stride_wc, stride_wd, stride_b,
        EVEN_D, False, PRECISION, not READ_TWICE, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    if not READ_TWICE:
        norm = sums

    # 2. ‖p − 1/C‖_p of the logits in registers
    valid = (tl.arange(0, BLOCK_C) < C)[None, :]
    z = tl.where((rows < B)[:, None] & valid, z, float("-inf"))  # rows beyond B must not trigger the careful form
    m, s, deviation = deviation_of_rows(z, valid, C, p, inv_temperature, NORM)
    index, entropy, sum_squares, gini, kl = spread_of_rows(z, valid, m, s, C, inv_temperature, PREDICTION is not None)
    store_scores(
        OUT, PREDICTION, rows, B, stride_o,
        norm, deviation, m, index, s, entropy, sum_squares, gini, kl,
        inv_temperature, scale, bias_norm, p,
        NORM,
    )  # fmt: skip


# Small batches take small row tiles, so that more multiprocessors read the features. Up to 16 classes, tiles of 32 rows
# stream features at memory speed. More classes need larger row tiles, because each tile reads the whole weight from L2.
# float32 does not use tensor cores, so its tiles are small enough for the operands to fit in registers.
TABLE = [
    Line("half", 1024, 16, Config(16, 16, 64, 4, 3)),
    Line("half", ANY, 16, Config(32, 16, 128, 4, 3)),
    Line("half", 1024, 128, Config(16, 128, 64, 8, 3)),
    Line("half", 8192, 128, Config(32, 128, 64, 4, 3)),
    Line("half", ANY, 128, Config(128, 128, 64, 8, 3), "sm_90"),
    Line("half", ANY, 128, Config(64, 128, 64, 8, 3, registers=255)),
    Line("half", 1024, 256, Config(16, 256, 64, 8, 2)),
    Line("half", 8192, 256, Config(32, 256, 64, 8, 3), "sm_90"),
    Line("half", ANY, 256, Config(64, 256, 64, 8, 3), "sm_90"),
    Line("half", ANY, 256, Config(32, 256, 32, 8, 3)),
    Line("float32", 1024, 16, Config(16, 16, 32, 4, 2)),
    Line("float32", ANY, 16, Config(32, 16, 64, 4, 2)),
    Line("float32", 1024, 128, Config(16, 128, 32, 8, 2)),
    Line("float32", ANY, 128, Config(32, 128, 32, 4, 2), "gfx942"),  # 8 waves would hold each logit twice and spill
    Line("float32", ANY, 128, Config(32, 128, 32, 8, 2)),
    Line("float32", ANY, 256, Config(16, 256, 32, 4, 2), "gfx942"),
    Line("float32", ANY, 256, Config(16, 256, 32, 8, 2)),
]


def configuration(shape: Shape) -> Config:
    # Before 3.8, Triton fails to compile this kernel for Blackwell's tensor memory, which tiles of 64 rows would use.
    if TRITON < (3, 8) and tuned_as(shape.arch) == "sm_100":
        shape = shape._replace(b=min(shape.b, 8192))
    return choose(TABLE, shape)


def why_not(problem: Problem, arch: str) -> str:
    c = problem.classes
    return why_not_product(problem) or (f"takes at most {MAX_CLASSES} classes, got {c}" if c > MAX_CLASSES else "")


def score(problem: Problem, scores: Scores, config: Config) -> None:
    """Scores of features (B, D) under the head's weight (C, D) and bias (C,)."""
    x, w, bias = problem.features, problem.weight, problem.bias
    arch = architecture(x.device)
    assert w is not None
    (b, d), c, (norm, p) = x.shape, w.shape[0], compiled(problem.p)
    vec = vector(d, x.stride(0), w.stride(0))
    cfg = for_vector(vec, config)
    if (norm != 1 or scores.prediction is not None) and cfg.block_b * cfg.block_c > 32 * 32 * cfg.num_warps:
        cfg = cfg._replace(block_b=cfg.block_b // 2)  # these need more registers per logit
    launch(one_tile_kernel, cdiv(b, cfg.block_b), cfg, (
        x, w, bias, scores.out, scores.prediction,
        b, c, d // vec,
        1.0 / problem.temperature, problem.scale, problem.bias_norm, p,
        x.stride(0) // vec, x.stride(1), w.stride(0) // vec, w.stride(1),
        0 if bias is None else bias.stride(0), scores.out.stride(0),
    ), dict(
        VEC=vec, EVEN_D=d % cfg.block_d == 0,
        NORM=norm, READ_TWICE=norm != 1 or asynchronous_products(arch, cfg.block_b),
        PRECISION=dot_precision(x.dtype, arch, cfg.float32),
        BLOCK_B=cfg.block_b, BLOCK_C=cfg.block_c, BLOCK_D=cfg.block_d, STAGES=cfg.num_stages,
    ))  # fmt: skip
