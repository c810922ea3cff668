"""How well a score tells in-distribution (ID) inputs from out-of-distribution (OOD) ones.

Every function takes one score per sample, larger meaning more in-distribution, as `fast_gradnorm` and every
field of `head_scores` but `prediction` give it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .functional import HeadScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ScoresLike: TypeAlias = torch.Tensor | npt.NDArray[Any] | Sequence[float]

_EXTRA = 'pip install "gradnorm_fast[eval]"'


METHODS = {
    "GradNorm": "gradnorm",
    "MSP": "msp",
    "MaxLogit": "max_logit",
    "Energy": "energy",
    "feature norm": "feature_norm",
}
_METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_id_positive", "fpr95_ood_positive")

Results = dict[str, dict[str, dict[str, float]]]  # OOD set -> method -> what evaluate returns


def evaluate(
    id_scores: ScoresLike, ood_scores: ScoresLike, *, bootstrap: int = 0, confidence: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Measure how well the scores separate ID from OOD samples.

    Args:
        id_scores: scores of the in-distribution samples, shape (n_id,), larger = more in-distribution.
        ood_scores: scores of the out-of-distribution samples, shape (n_ood,).
            Both may be tensors on any device, numpy arrays or lists; they are compared as float64, so that
            float32 and lower precisions are compared exactly as given.
        bootstrap: number of resamples, of ID and OOD samples each with replacement, for confidence intervals.
        confidence: of the intervals, between 0 and 1.
        seed: of the resamples.

    Returns:
        A dictionary of fractions in [0, 1] and two counts. Equal scores are never told apart.

        - ``auroc``: the chance that a random ID sample scores above a random OOD sample, a tie counting one half.
          1 is perfect, 0.5 is chance.
        - ``aupr_in``: average precision with ID as the positive class; chance is n_id / (n_id + n_ood).
        - ``aupr_out``: average precision with OOD as the positive class (scores negated).
        - ``fpr95_id_positive``: the fraction of OOD samples taken for ID (score >= threshold) at the highest
          threshold that keeps at least 95 % of the ID samples. 0 is perfect.
        - ``fpr95_ood_positive``: the mirror, the fraction of ID samples taken for OOD (score <= threshold) at the
          lowest threshold that catches at least 95 % of the OOD samples.
        - ``n_id``, ``n_ood``: the number of samples.
        - with bootstrap, ``auroc_low``, ``auroc_high`` and so on: the percentile interval of each metric.

        Papers differ in which class they call positive in FPR95; the two numbers are not interchangeable.

    Raises:
        ValueError: an argument is not a non-empty one-dimensional array of finite real numbers.
        ImportError: scikit-learn is not installed.
    """
    inside, outside = _as_scores("id_scores", id_scores), _as_scores("ood_scores", ood_scores)
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError as error:
        raise ImportError(f"evaluate needs scikit-learn: {_EXTRA}") from error

    if not isinstance(bootstrap, int) or bootstrap < 0 or not 0.0 < confidence < 1.0:
        raise ValueError(f"bootstrap: expected a count and a confidence in (0, 1), got {bootstrap} and {confidence}")
    is_id = np.concatenate([np.ones(inside.size, dtype=int), np.zeros(outside.size, dtype=int)])

    def metrics(inside: npt.NDArray[np.float64], outside: npt.NDArray[np.float64]) -> dict[str, float]:
        scores = np.concatenate([inside, outside])
        return {
            "auroc": float(roc_auc_score(is_id, scores)),
            "aupr_in": float(average_precision_score(is_id, scores)),
            "aupr_out": float(average_precision_score(1 - is_id, -scores)),
            "fpr95_id_positive": _fpr95(is_id, scores),
            "fpr95_ood_positive": _fpr95(1 - is_id, -scores),
        }

    result = metrics(inside, outside) | {"n_id": inside.size, "n_ood": outside.size}
    if bootstrap:
        random = np.random.default_rng(seed)
        samples = [metrics(*(random.choice(s, s.size) for s in (inside, outside))) for _ in range(bootstrap)]
        for name in _METRICS:
            low, high = np.quantile([s[name] for s in samples], [(1 - confidence) / 2, (1 + confidence) / 2])
            result |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def compare_methods(id_scores: HeadScores, ood_scores: Mapping[str, HeadScores], **options: Any) -> Results:
    """`evaluate`, with its options, of every OOD set for GradNorm and the baselines of the same pass (METHODS).

    The last entry, "average", is the mean over the OOD sets. ValueError for no OOD set.
    """
    if not ood_scores:
        raise ValueError("ood_scores: expected at least one named set of scores, got an empty mapping")
    results = {
        name: {m: evaluate(getattr(id_scores, f), getattr(scores, f), **options) for m, f in METHODS.items()}
        for name, scores in ood_scores.items()
    }
    average = {m: {k: float(np.mean([results[name][m][k] for name in results])) for k in _METRICS} for m in METHODS}
    return results | {"average": average}


def results_table(results: Results) -> str:
    """Markdown in the layout of the paper's Table 1: a row per method; FPR95 (ID positive) and AUROC per set, in %."""
    names = [name.replace("|", "\\|") for name in results]
    lines = [
        "| | " + " | ".join(f"{name} FPR95 ↓ | AUROC ↑" for name in names) + " |",
        "|---|" + "---:|---:|" * len(results),
    ]
    for method in METHODS:
        cells = []
        for of_set in results.values():
            metrics = of_set[method]
            cells += [f"{100 * metrics['fpr95_id_positive']:.2f}", f"{100 * metrics['auroc']:.2f}"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def results_csv(results: Results) -> str:
    """One line per OOD set and method with every metric, fractions in [0, 1]."""
    keys = list(dict.fromkeys(k for of_set in results.values() for m in of_set.values() for k in m))
    lines = [",".join(["ood", "method", *keys])]
    for name, of_set in results.items():
        quoted = '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\n') else name
        lines += [",".join([quoted, m, *(str(v.get(k, "")) for k in keys)]) for m, v in of_set.items()]
    return "\n".join(lines) + "\n"


def plot_scores(
    id_scores: ScoresLike,
    ood_scores: ScoresLike | Mapping[str, ScoresLike],
    ax: Axes | None = None,
    *,
    bins: int = 40,
    xlabel: str = "score (larger = more in-distribution)",
) -> Axes:
    """Draw the histogram of the ID scores (filled) and of one or several OOD sets (lines).

    Every histogram has area 1, so that sets of different sizes can be compared, and all share their bin edges.

    Args:
        id_scores: shape (n_id,).
        ood_scores: shape (n_ood,), or a mapping from the name of an OOD set to its scores.
        ax: where to draw; by default the axes of a new pyplot figure.
        bins: number of bins over the range of all the scores together.
        xlabel: label of the score axis.

    Returns:
        The axes drawn on; ``ax.figure.savefig(...)`` writes the picture.

    Raises:
        ValueError: as in `evaluate`, or ``ood_scores`` is an empty mapping.
        ImportError: matplotlib is not installed.
    """
    inside, outside = _as_scores("id_scores", id_scores), _as_named_scores(ood_scores)
    ax = _axes("plot_scores", ax)
    edges = np.histogram_bin_edges(np.concatenate([inside, *outside.values()]), bins).tolist()
    ax.hist(inside, edges, density=True, color="0.75", label="in-distribution")
    for index, (name, scores) in enumerate(outside.items()):
        ax.hist(scores, edges, density=True, histtype="step", linewidth=1.6, color=f"C{index}", label=name)
    ax.set(xlabel=xlabel, ylabel="density")
    ax.legend(framealpha=0.85, edgecolor="none")
    return ax


def plot_roc(id_scores: ScoresLike, ood_scores: ScoresLike | Mapping[str, ScoresLike], ax: Axes | None = None) -> Axes:
    """Draw the ROC curve (ID as the positive class) of one or several OOD sets, with the AUROC in the legend.

    A dotted line marks the true positive rate of 95 % at which ``fpr95_id_positive`` is read off.

    Args:
        id_scores: shape (n_id,).
        ood_scores: shape (n_ood,), or a mapping from the name of an OOD set to its scores.
        ax: where to draw; by default the axes of a new pyplot figure.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: as in `evaluate`, or ``ood_scores`` is an empty mapping.
        ImportError: scikit-learn or matplotlib is not installed.
    """
    inside, outside = _as_scores("id_scores", id_scores), _as_named_scores(ood_scores)
    try:
        from sklearn.metrics import auc, roc_curve
    except ImportError as error:
        raise ImportError(f"plot_roc needs scikit-learn: {_EXTRA}") from error
    ax = _axes("plot_roc", ax)
    for index, (name, scores) in enumerate(outside.items()):
        is_id = np.concatenate([np.ones(inside.size, dtype=int), np.zeros(scores.size, dtype=int)])
        fpr, tpr, _ = roc_curve(is_id, np.concatenate([inside, scores]))
        ax.plot(fpr, tpr, color=f"C{index}", linewidth=1.6, label=f"{name} (AUROC {auc(fpr, tpr):.3f})")
    ax.plot([0, 1], [0, 1], color="0.75", linestyle="--", linewidth=1)
    ax.axhline(0.95, color="0.5", linestyle=":", linewidth=1)
    ax.set(
        xlabel="fraction of OOD taken for ID (FPR)", ylabel="fraction of ID kept (TPR)", xlim=(-0.01, 1), ylim=(0, 1.01)
    )
    ax.legend(framealpha=0.85, edgecolor="none")
    return ax


def _fpr95(is_positive: npt.NDArray[np.int_], scores: npt.NDArray[np.float64]) -> float:
    from sklearn.metrics import roc_curve

    # One point per distinct score, from the highest threshold down: dropping points could skip the one sought.
    fpr, tpr, _ = roc_curve(is_positive, scores, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


def _as_scores(name: str, scores: ScoresLike) -> npt.NDArray[np.float64]:
    """Return the scores as a float64 array, or refuse them under the name of their argument."""
    expected = f"{name}: expected a non-empty one-dimensional array of finite real numbers"
    if isinstance(scores, torch.Tensor):
        if scores.is_complex():
            raise ValueError(f"{expected}, got a tensor of {scores.dtype}")
        array = scores.detach().to(device="cpu", dtype=torch.float64).numpy()  # numpy knows no bfloat16
    else:
        try:
            array = np.asarray(scores)
        except ValueError:
            raise ValueError(f"{expected}, got a {type(scores).__name__} of uneven lengths") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{expected}, got {type(scores).__name__} of {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{expected}, got shape {array.shape}")
    array = array.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(array))
    if bad:
        raise ValueError(f"{expected}, got {bad} NaN or infinite of {array.size}")
    return array


def _as_named_scores(ood_scores: ScoresLike | Mapping[str, ScoresLike]) -> dict[str, npt.NDArray[np.float64]]:
    if not isinstance(ood_scores, Mapping):
        return {"out-of-distribution": _as_scores("ood_scores", ood_scores)}
    if not ood_scores:
        raise ValueError("ood_scores: expected at least one named set of scores, got an empty mapping")
    return {name: _as_scores(f"ood_scores[{name!r}]", scores) for name, scores in ood_scores.items()}


def _axes(caller: str, ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(f"{caller} needs matplotlib: {_EXTRA}") from error
    return plt.subplots()[1]
