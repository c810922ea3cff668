"""Can GradNorm be trusted on this model and these data?

GradNorm is the product of feature_norm and output_norm. It fails without an error where one of the two is larger on OOD
images, as in vision transformers, or where all scores are nearly equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .evaluation import evaluate
from .functional import HeadScores
from .gate import SCORES

ANTI_CORRELATED = -0.3  # rank correlation of the factors below which they work against one another
COLLAPSED = 0.01  # interquartile range over median below which scores hardly differ


@dataclass(frozen=True)
class Diagnosis:
    """The result of `GradNorm.diagnose`; `str` of it is the report."""

    n_id: int
    correlation: float  #: Spearman's, of feature_norm with output_norm on the ID images; NaN where one is constant
    spread: float  #: interquartile range of the ID images' GradNorm over their median
    median: dict[str, float]  #: of each score on the ID images
    auroc: dict[str, float] = field(default_factory=dict)  #: of each score, ID against OOD; empty without OOD images
    best: str | None = None  #: the score to take, GradNorm(model, score=best): that of the largest AUROC
    warnings: tuple[str, ...] = ()

    @property
    def trustworthy(self) -> bool:
        """Whether no warning applies."""
        return not self.warnings

    def __str__(self) -> str:
        lines = [
            f"{self.n_id} ID images; median feature_norm {self.median['feature_norm']:.4g}, output_norm "
            f"{self.median['output_norm']:.4g}; rank correlation of the two {self.correlation:+.2f}; "
            f"spread of GradNorm {self.spread:.1%} of its median"
        ]
        if self.auroc:
            lines.append("AUROC: " + ", ".join(f"{name} {100 * value:.2f}" for name, value in self.auroc.items()))
        lines += [f"warning: {warning}" for warning in self.warnings] or ["nothing speaks against GradNorm here"]
        if self.best is not None:
            lines.append(f"score to take: {self.best}, GradNorm(model, score={self.best!r})")
        return "\n".join(lines)


def diagnose(id_scores: HeadScores, ood_scores: HeadScores | None = None) -> Diagnosis:
    """Look at the scores of ID images, fields of shape (N,), and of OOD images, (M,), if there are any.

    ValueError for scores that are empty or not finite.

    Examples:
        >>> diagnosis = diagnose(id_scores, ood_scores)
        >>> diagnosis.best in diagnosis.auroc
        True
    """
    inside = {name: _array(getattr(id_scores, name), name) for name in SCORES}
    gradnorm = inside["gradnorm"]
    low, median, high = np.quantile(gradnorm, [0.25, 0.5, 0.75])
    spread = float((high - low) / median) if median > 0 else 0.0
    correlation = _rank_correlation(inside["feature_norm"], inside["output_norm"])
    warnings = []
    if correlation < ANTI_CORRELATED:
        warnings.append(
            f"feature_norm and output_norm are anti-correlated (rank correlation {correlation:+.2f}): in their product "
            "one cancels the other"
        )
    if spread < COLLAPSED:
        warnings.append(
            f"the scores have collapsed: their spread is {spread:.2%} of the median, too little to tell images apart; "
            "try another temperature"
        )
    auroc: dict[str, float] = {}
    if ood_scores is not None:
        auroc = {n: evaluate(inside[n], _array(getattr(ood_scores, n), n))["auroc"] for n in SCORES}
    best = max(auroc, key=lambda name: auroc[name]) if auroc else None
    if auroc and auroc["gradnorm"] < 0.5:
        wrong = [name for name in ("feature_norm", "output_norm") if auroc[name] < 0.5]
        warnings.append(
            f"the direction is reversed: GradNorm is larger on the OOD images (AUROC {100 * auroc['gradnorm']:.2f})"
            + (f", and so {'is' if len(wrong) == 1 else 'are'} {' and '.join(wrong)}" if wrong else "")
        )
    if best is not None and best != "gradnorm" and auroc[best] > auroc["gradnorm"] + 0.01:
        warnings.append(
            f"{best} is the better score here (AUROC {100 * auroc[best]:.2f} against {100 * auroc['gradnorm']:.2f}), "
            "from the same pass"
        )
    if best is not None and auroc[best] < 0.5:
        warnings.append("no score of this pass tells these OOD images from ID images")
    medians = {name: float(np.median(values)) for name, values in inside.items()}
    return Diagnosis(len(gradnorm), correlation, spread, medians, auroc, best, tuple(warnings))


def _array(scores: object, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(scores.detach().cpu().double() if hasattr(scores, "detach") else scores, dtype=np.float64)
    bad = np.count_nonzero(~np.isfinite(array))
    if array.size == 0 or bad:
        raise ValueError(f"{name}: expected finite scores of at least one image, got {array.size}, {bad} not finite")
    return array


def _rank_correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Spearman's; ties share their mean rank."""

    def ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    x, y = ranks(a), ranks(b)
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
