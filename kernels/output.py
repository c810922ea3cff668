"""Writes scores from a row's statistics: the one place that knows the order of the rows of `Scores.out`."""

import triton
import triton.language as tl

from .norm import with_bias


@triton.jit
def store_scores(
    OUT, PREDICTION, rows, B, stride_o,
    norm, deviation, m, index, s, entropy, sum_squares, gini, kl,
    inv_temperature, scale, bias_norm, p,
    NORM: tl.constexpr,
):  # fmt: skip
    """Write the score ‖(x, bias_norm)‖_p·‖p − 1/C‖_p·scale/T of each row, and with PREDICTION the other statistics.

    OUT: (1, B), or with PREDICTION the rows `problem.FIELDS`; PREDICTION: (B,) for NORM 1, or None.
    norm, deviation: ‖x‖_p and ‖p − 1/C‖_p; m, index, s: max z, its class and Σ exp((z − m)/T); gini: 1 − Σp²; kl:
    KL(uniform ‖ p); each (BLOCK_B,).
    """
    live = rows < B
    output_norm = deviation * scale * inv_temperature  # in this order, or 0·inf gives NaN
    whole_norm = with_bias(norm, bias_norm, p, NORM)
    out = OUT + rows
    tl.store(out, whole_norm * output_norm, mask=live)
    if PREDICTION is not None:
        s = tl.maximum(s, 1.0)  # the term of the maximum is 1; rounding may leave a little less
        # If the score is NaN, so are all other fields; the index must still be valid.
        poison = (whole_norm - whole_norm) + (deviation - deviation)
        out += stride_o
        tl.store(out, norm + poison, mask=live)
        out += stride_o
        tl.store(out, output_norm + poison, mask=live)
        out += stride_o
        tl.store(out, m + poison, mask=live)
        out += stride_o
        tl.store(out, 1.0 / s + poison, mask=live)
        out += stride_o
        tl.store(out, m + tl.log(s) / inv_temperature + poison, mask=live)
        out += stride_o
        tl.store(out, entropy + poison, mask=live)
        out += stride_o
        tl.store(out, sum_squares + poison, mask=live)
        out += stride_o
        tl.store(out, whole_norm * (2.0 * gini * inv_temperature) + poison, mask=live)
        out += stride_o
        tl.store(out, kl + poison, mask=live)
        tl.store(PREDICTION + rows, tl.where(poison == 0.0, index, 0).to(tl.int64), mask=live)
