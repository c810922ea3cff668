"""GradNorm scores from the library's matmul: z = x·Wᵀ in float32 (or float64) to a bounded workspace, then rows.py.

Traffic: the matmul's own; 4·B·C bytes of logits written and read; the features once more, for ‖x‖₁. Rows come in chunks
that keep the workspace at 64 MiB (`Config.workspace`), or at MIN_ROWS rows where those are more.

For float64, and for float32 by exact products: the vendor's kernels for those are far ahead of `tl.dot`. For halves it
needs a matmul that returns float32 (torch 2.8, CUDA).
"""

import torch

from .problem import copies as copies
from .rows import score_rows
from .targets import Config, cdiv

MIN_ROWS = 512
CONFIGURATION = Config(0, 0, 0, 0, 0)  # there is only a workspace to choose
HALF_TO_FLOAT32 = "dtype_out" in torch.ops.aten.mm.overloads()


def fits(features: torch.Tensor) -> bool:
    """Whether the library multiplies these into float32 or float64."""
    return features.dtype.itemsize > 2 or (HALF_TO_FLOAT32 and features.device.type == "cuda")


def score_library(
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
    if not fits(features):
        raise ValueError(f"library takes float32 and float64 and, on CUDA with torch 2.8, halves; got {features.dtype}")
    b, c = len(features), len(weight)
    cfg, width = config or CONFIGURATION, cdiv(c, 16) * 16
    chunk = min(b, max(MIN_ROWS, cfg.workspace * 2**20 // (out.itemsize * width) // MIN_ROWS * MIN_ROWS))
    logits = torch.empty((chunk, width), dtype=out.dtype, device=features.device)
    options = {"out_dtype": torch.float32} if features.dtype.itemsize == 2 else {}
    for start in range(0, b, chunk):
        stop = min(start + chunk, b)
        x, z = features[start:stop], logits[: stop - start, :c]
        torch.mm(x, weight.t(), out=z, **options)
        score_rows(
            x, z, out[:, start:stop], None if prediction is None else prediction[start:stop],
            temperature, scale, bias_norm, bias, padded=True,
        )  # fmt: skip
