"""The inputs of a scoring call, and the tensors that receive its results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  #: the label of a row without a target, as in torch.nn.functional.cross_entropy
FIELDS = (  #: the rows of `Scores.out`
    "gradnorm", "feature_norm", "output_norm", "max_logit", "msp", "energy",
    "entropy", "sum_squares", "exgrad", "kl_uniform",
)  # fmt: skip


class Problem(NamedTuple):
    """Rows of features and either the head that makes their logits, or the logits; and which gradient's norm is asked
    for."""

    features: Tensor  #: (B, D)
    weight: Tensor | None  #: (C, D); None if the logits are given
    bias: Tensor | None  #: (C,)
    logits: Tensor | None = None  #: (B, C), bias included
    temperature: float = 1.0
    scale: float = 1.0  #: of output_norm: C for reduction="sum"
    bias_norm: float = 0.0  #: the entry for the bias in ‖(x, bias_norm)‖_p: 1 with include_bias
    target: str | Tensor = "uniform"  #: or "predicted", or labels (B,), int64
    p: float = 1.0  #: order of the norm

    @property
    def classes(self) -> int:
        return self.logits.shape[1] if self.weight is None else self.weight.shape[0]  # type: ignore[union-attr]

    @property
    def uniform(self) -> bool:
        return isinstance(self.target, str) and self.target == "uniform"

    def rows(self, start: int, stop: int) -> Problem:
        """The same problem for rows start ... stop − 1."""
        if start == 0 and stop >= self.features.shape[0]:
            return self  # a view costs as much as a sum over a row
        logits = None if self.logits is None else self.logits[start:stop]
        target = self.target if isinstance(self.target, str) else self.target[start:stop]
        return self._replace(features=self.features[start:stop], logits=logits, target=target)


UNIFORM_ALONE = "takes the uniform target, not labels or the predicted one"


def why_not_product(problem: Problem, uniform: bool = True) -> str:
    """Why a kernel with its own matmul, for the uniform target or for the other targets, does not take the problem;
    empty if it does."""
    if problem.uniform != uniform:
        return UNIFORM_ALONE if uniform else "takes labels and the predicted target, not the uniform one"
    if problem.weight is None:
        return "takes a weight, not logits"
    if problem.features.dtype == torch.float64:
        return "takes float16, bfloat16 and float32, not float64"
    return ""


class Scores(NamedTuple):
    """The tensors that receive the results."""

    out: Tensor  #: (1, B): gradnorm only; or (len(FIELDS), B); (4, B) for token statistics (one_hot.py).
    #: float32, or float64 for float64 input
    prediction: Tensor | None  #: (B,) int64, with all FIELDS only

    @classmethod
    def empty(cls, features: Tensor, dtype: torch.dtype, all_fields: bool) -> Scores:
        """For rows of features (B, D), not yet written."""
        batch, device = features.shape[0], features.device
        out = torch.empty((len(FIELDS) if all_fields else 1, batch), dtype=dtype, device=device)
        return cls(out, torch.empty(batch, dtype=torch.int64, device=device) if all_fields else None)

    def rows(self, start: int, stop: int) -> Scores:
        if start == 0 and stop >= self.out.shape[1]:
            return self
        prediction = None if self.prediction is None else self.prediction[start:stop]
        return Scores(self.out[:, start:stop], prediction)


def copies(matrix: Tensor) -> bool:
    """Whether BLAS would copy this matrix because neither its rows nor its columns are contiguous."""
    if matrix.is_contiguous():
        return False
    (m, n), (a, b) = matrix.shape, matrix.stride()
    return not ((b == 1 and a >= max(1, n)) or (a == 1 and b >= max(1, m)))
