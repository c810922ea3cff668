"""Writes scores from a row's statistics: the one place that knows the order of the rows of `Scores.out`."""

import triton
import triton.language as tl


@triton.jit
def store_scores(
    OUT, PREDICTION, rows, B, stride_o,
    norm, m, index, s, deviation,
    inv_temperature, scale, bias_norm,
    ALL_FIELDS: tl.constexpr,
):  # fmt: skip
    """Write the score (‖x‖₁ + bias_norm)·Σ|p − 1/C|·scale/T of each row, and with ALL_FIELDS the other statistics.

    OUT: (1, B), or with ALL_FIELDS (6, B), the rows `problem.FIELDS`; PREDICTION: (B,), with ALL_FIELDS.
    norm, m, index, s, deviation: ‖x‖₁, max z, its class, Σ exp((z − m)/T) and Σ|p − 1/C|, each (BLOCK_B,).
    """
    live = rows < B
    norm += norm - norm  # inf becomes NaN: such a row has no score
    output_norm = deviation * scale * inv_temperature  # in this order, or 0·inf gives NaN
    out = OUT + rows
    tl.store(out, (norm + bias_norm) * output_norm, mask=live)
    if ALL_FIELDS:
        # If the score is NaN, so are all other fields; the index must still be valid.
        poison = (norm - norm) + (deviation - deviation)
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
        tl.store(PREDICTION + rows, tl.where(poison == 0.0, index, 0).to(tl.int64), mask=live)
