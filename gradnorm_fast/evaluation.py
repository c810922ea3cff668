"""How well a score tells in-distribution (ID) inputs from out-of-distribution (OOD) ones.

Every function takes one score per sample, larger meaning more in-distribution, as `fast_gradnorm` and the fields of
`head_scores` give it, but for `prediction`, and for `entropy` and `exgrad`, which have to be negated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .functional import HeadScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array: TypeAlias = npt.NDArray[np.floating[Any]]
ScoresLike: TypeAlias = torch.Tensor | npt.NDArray[Any] | Sequence[float]

_EXTRA = 'pip install "gradnorm_fast[eval]"'


METHODS = {  # and their fields of HeadScores
    "GradNorm": "gradnorm",
    "MSP": "msp",
    "MaxLogit": "max_logit",
    "Energy": "energy",
    "feature norm": "feature_norm",
}
# Where they are asked for. SumSquares is DOCTOR (Granese et al., NeurIPS 2021), 1 minus the Gini impurity.
MORE_METHODS = {"Entropy": "entropy", "SumSquares": "sum_squares", "ExGrad": "exgrad", "KL": "kl_uniform"}
UNCERTAINTIES = ("entropy", "exgrad")  # fields of HeadScores that are smaller for ID samples: negated
# Whose numbers `evaluate` can return: the official GradNorm code (commit 18d5d33), OpenOOD v1.5 (commit 3c35632),
# pytorch-ood 0.4.0, and pytorch-ood 0.3, which computed its metrics with torchmetrics.
CONVENTIONS = ("official", "openood", "pytorch_ood", "pytorch_ood_0.3")

Results = dict[str, dict[str, dict[str, float]]]  # OOD set -> method -> what evaluate returns


def evaluate(
    id_scores: ScoresLike,
    ood_scores: ScoresLike,
    *,
    convention: str | None = None,
    bootstrap: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Measure how well the scores separate ID from OOD samples.

    Args:
        id_scores: scores of the in-distribution samples, shape (n_id,), larger = more in-distribution. Negate
            pytorch-ood's outlier scores.
        ood_scores: scores of the out-of-distribution samples, shape (n_ood,).
            Both may be tensors on any device, numpy arrays or lists; they are compared as float64, so that
            float32 and lower precisions are compared exactly as given.
        convention: whose numbers to return, one of CONVENTIONS. None: ours, with both kinds of FPR95.
        bootstrap: number of resamples, of ID and OOD samples each with replacement, for confidence intervals.
        confidence: of the intervals, between 0 and 1.
        seed: of the resamples, as for `numpy.random.default_rng`.

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

        With a convention, one ``fpr95`` takes the place of the two, and every metric is that code's own:

        - ``"official"``: ID is positive, and FPR95 is read where the recall is *nearest* to 95 %, at the larger FPR
          of two equally near.
        - ``"openood"``: OOD is positive in FPR95; the areas under the precision-recall curves are by trapezoids, and
          FPR95 is read off scikit-learn's thinned ROC curve, which may skip the threshold sought.
        - ``"pytorch_ood"`` (0.4): the same, off the whole curve.
        - ``"pytorch_ood_0.3"``: before that, by torchmetrics, which puts scores through a sigmoid, in their own
          precision, if any lies outside [0, 1]. Float32 scores above 100, as GradNorm's often are, all tie: AUROC 0.5.

    Raises:
        ValueError: scores that are not a non-empty one-dimensional array of finite real numbers; a wrong option.

    Examples:
        >>> metrics = evaluate(id_scores=[3.0, 2.5, 2.0], ood_scores=[1.0, 2.2])
        >>> round(metrics["auroc"], 3)
        0.833
    """
    if convention is not None and (not isinstance(convention, str) or convention not in CONVENTIONS):
        raise ValueError(f"convention: expected None or one of {', '.join(CONVENTIONS)}, got {convention!r}")
    keep_dtype = convention == "pytorch_ood_0.3"  # the one whose numbers depend on it
    inside = _as_scores("id_scores", id_scores, keep_dtype)
    outside = _as_scores("ood_scores", ood_scores, keep_dtype)
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, Integral) or bootstrap < 0:
        raise ValueError(f"bootstrap: expected the number of resamples, 0 or more, got {bootstrap!r}")
    if isinstance(confidence, bool) or not isinstance(confidence, Real) or not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a fraction between 0 and 1, as 0.95, got {confidence!r}")
    try:
        random = np.random.default_rng(seed)
    except (TypeError, ValueError):
        raise ValueError(f"seed: expected a whole number, 0 or more, got {seed!r}") from None
    metrics = _metrics(inside, outside, convention)
    result = metrics | {"n_id": inside.size, "n_ood": outside.size}
    if bootstrap:
        samples = [
            _metrics(random.choice(inside, inside.size), random.choice(outside, outside.size), convention)
            for _ in range(int(bootstrap))
        ]
        for name in metrics:
            low, high = np.quantile([s[name] for s in samples], [(1 - confidence) / 2, (1 + confidence) / 2])
            result |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def compare_methods(
    id_scores: HeadScores,
    ood_scores: Mapping[str, HeadScores],
    *,
    methods: Sequence[str] | None = None,
    **options: Any,
) -> Results:
    """`compare` for GradNorm and the baselines of the same pass.

    Args:
        id_scores: of the in-distribution samples, fields of shape (n_id,).
        ood_scores: by the name of the OOD set, fields of shape (n_ood,).
        methods: names from METHODS and MORE_METHODS, in the order of the results; None: all of METHODS.
        options: of `evaluate`.

    Raises:
        TypeError: what are not `HeadScores`.
        ValueError: an unknown method, or none; as `evaluate`, such as for the KL divergence of a head with masked
            classes, which is infinite.

    Examples:
        >>> inside, outside = detector.head_scores_loader(id_loader), detector.head_scores_loader(ood_loader)
        >>> results = compare_methods(inside, {"places": outside})
        >>> auroc = results["places"]["GradNorm"]["auroc"]
        >>> list(compare_methods(inside, {"places": outside}, methods=["Entropy", "KL"])["places"])
        ['Entropy', 'KL']
    """
    fields = fields_of(methods).values()
    if not isinstance(ood_scores, Mapping):
        raise TypeError(f"ood_scores: expected HeadScores by name, got {type(ood_scores).__name__}")
    for name, scores in {"id_scores": id_scores, **{f"ood_scores[{n!r}]": s for n, s in ood_scores.items()}}.items():
        if any(not hasattr(scores, field) for field in fields):
            raise TypeError(f"{name}: expected HeadScores, as head_scores returns them, got {type(scores).__name__}")
    outside = {name: by_method(scores, methods) for name, scores in ood_scores.items()}
    return compare(by_method(id_scores, methods), outside, **options)


def by_method(scores: HeadScores, methods: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """The score of each method, larger = more in-distribution; methods and errors as in `compare_methods`.

    Examples:
        >>> list(by_method(id_scores))
        ['GradNorm', 'MSP', 'MaxLogit', 'Energy', 'feature norm']
        >>> torch.equal(by_method(id_scores, ["Entropy"])["Entropy"], -id_scores.entropy)
        True
    """
    return {
        method: -getattr(scores, field) if field in UNCERTAINTIES else getattr(scores, field)
        for method, field in fields_of(methods).items()
    }


def fields_of(methods: Sequence[str] | None) -> dict[str, str]:
    """The field of `HeadScores` of each method; methods and errors as in `compare_methods`.

    Examples:
        >>> fields_of(["GradNorm", "KL"])
        {'GradNorm': 'gradnorm', 'KL': 'kl_uniform'}
    """
    known = METHODS | MORE_METHODS
    if methods is None:
        return METHODS
    wrong = [methods] if isinstance(methods, str) or not methods else [m for m in methods if m not in known]
    if wrong:
        raise ValueError(f"methods: expected a list of {', '.join(known)}, got {wrong[0]!r}")
    return {method: known[method] for method in methods}


def compare(
    id_scores: Mapping[str, ScoresLike], ood_scores: Mapping[str, Mapping[str, ScoresLike]], **options: Any
) -> Results:
    """`evaluate`, with its options, of every OOD set by every method that has a score for the ID set.

    The last entry, "average", is the mean over the OOD sets. ValueError for no OOD set, or no method.

    Examples:
        >>> results = compare({"MSP": [0.9, 0.8]}, {"places": {"MSP": [0.7, 0.85]}})
        >>> results["places"]["MSP"]["auroc"]
        0.75
    """
    if not ood_scores:
        raise ValueError("ood_scores: expected at least one named set of scores, got an empty mapping")
    if not id_scores:
        raise ValueError("id_scores: expected at least one method, got an empty mapping")
    results = {
        name: {method: evaluate(inside, scores[method], **options) for method, inside in id_scores.items()}
        for name, scores in ood_scores.items()
    }
    metrics = _metric_names(next(iter(next(iter(results.values())).values())))
    average = {m: {k: float(np.mean([results[name][m][k] for name in results])) for k in metrics} for m in id_scores}
    return results | {"average": average}


def results_table(results: Results, methods: Sequence[str] | None = None) -> str:
    """Markdown in the layout of the paper's Table 1: a row per method; FPR95 and AUROC of each OOD set, in %.

    The rows are `methods`, by default all in their order.

    FPR95 is that of the convention the results were made with; without one, ID is the positive class.

    Examples:
        >>> table = results_table(compare_methods(id_scores, {"places": ood_scores}))
        >>> table.splitlines()[0]
        '| | places FPR95 ↓ | AUROC ↑ | average FPR95 ↓ | AUROC ↑ |'
    """
    names = [name.replace("|", "\\|") for name in results]
    lines = [
        "| | " + " | ".join(f"{name} FPR95 ↓ | AUROC ↑" for name in names) + " |",
        "|---|" + "---:|---:|" * len(results),
    ]
    for method in methods or next(iter(results.values())):
        cells = []
        for of_set in results.values():
            metrics = of_set[method]
            values = fpr95(metrics), metrics["auroc"]
            cells += ["-" if math.isnan(value) else f"{100 * value:.2f}" for value in values]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fpr95(metrics: Mapping[str, float]) -> float:
    """That of the convention the metrics were made with; without one, with ID as the positive class.

    Examples:
        >>> fpr95(evaluate([2.0, 3.0], [1.0, 2.5]))
        0.5
    """
    return metrics["fpr95"] if "fpr95" in metrics else metrics["fpr95_id_positive"]


def results_csv(results: Results) -> str:
    """One line per OOD set and method with every metric, fractions in [0, 1].

    Examples:
        >>> results_csv(compare_methods(id_scores, {"places": ood_scores})).splitlines()[0]
        'ood,method,auroc,aupr_in,aupr_out,fpr95_id_positive,fpr95_ood_positive,n_id,n_ood'
    """
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

    Examples:
        >>> ax = plot_scores(id_scores.gradnorm, {"places": ood_scores.gradnorm})
        >>> ax.figure.savefig("scores.png")
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
        ImportError: matplotlib is not installed.

    Examples:
        >>> ax = plot_roc(id_scores.gradnorm, {"places": ood_scores.gradnorm})
        >>> ax.figure.savefig("roc.png")
    """
    inside, outside = _as_scores("id_scores", id_scores), _as_named_scores(ood_scores)
    ax = _axes("plot_roc", ax)
    for index, (name, scores) in enumerate(outside.items()):
        curve = _Curve.of(inside, scores)
        fpr, tpr = (np.r_[0.0, values] for values in (curve.thinned().fpr, curve.thinned().tpr))
        ax.plot(fpr, tpr, color=f"C{index}", linewidth=1.6, label=f"{name} (AUROC {curve.auroc():.3f})")
    ax.plot([0, 1], [0, 1], color="0.75", linestyle="--", linewidth=1)
    ax.axhline(0.95, color="0.5", linestyle=":", linewidth=1)
    ax.set(
        xlabel="fraction of OOD taken for ID (FPR)", ylabel="fraction of ID kept (TPR)", xlim=(-0.01, 1), ylim=(0, 1.01)
    )
    ax.legend(framealpha=0.85, edgecolor="none")
    return ax


class _Curve(NamedTuple):
    """How many of each class score at least as high as every distinct score, from the highest down."""

    positives: npt.NDArray[np.intp]
    negatives: npt.NDArray[np.intp]

    @classmethod
    def of(cls, positive: Array, negative: Array) -> _Curve:
        scores = np.unique(np.concatenate([positive, negative]))[::-1]
        counts = (len(s) - np.searchsorted(np.sort(s), scores) for s in (positive, negative))
        return cls(*counts)

    @property
    def tpr(self) -> Array:  # recall
        return self.positives / self.positives[-1]

    @property
    def fpr(self) -> Array:
        return self.negatives / self.negatives[-1]

    @property
    def precision(self) -> Array:
        return self.positives / (self.positives + self.negatives)

    def auroc(self) -> float:
        return _area(np.r_[0.0, self.fpr], np.r_[0.0, self.tpr])

    def average_precision(self) -> float:
        return float(np.sum(np.diff(self.tpr, prepend=0.0) * self.precision))

    def trapezoid_aupr(self) -> float:
        return _area(np.r_[0.0, self.tpr], np.r_[1.0, self.precision])

    def fpr95(self) -> float:
        return float(self.fpr[np.argmax(self.tpr >= 0.95)])

    def fpr_at_nearest_recall(self) -> float:
        end = np.argmax(self.tpr == 1.0) + 1  # lower thresholds only add false positives
        # From the lowest threshold up: the first of equally near recalls has the larger FPR.
        return float(self.fpr[:end][::-1][np.argmin(np.abs(self.tpr[:end][::-1] - 0.95))])

    def thinned(self) -> _Curve:
        """Without the points that scikit-learn's roc_curve drops: between two equal steps."""
        if len(self.positives) < 3:
            return self
        kept = np.r_[True, (np.diff(self.positives, 2) != 0) | (np.diff(self.negatives, 2) != 0), True]
        return _Curve(self.positives[kept], self.negatives[kept])


def _area(x: Array, y: Array) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def _metrics(inside: Array, outside: Array, convention: str | None) -> dict[str, float]:
    """AUROC, AUPR and FPR95 as the convention computes them."""
    if convention == "pytorch_ood_0.3":
        id_positive, ood_positive = _squashed_curves(inside, outside)
    else:
        id_positive, ood_positive = _Curve.of(inside, outside), _Curve.of(-outside, -inside)
    metrics = {"auroc": ood_positive.auroc()}
    if convention is None or convention == "official":
        metrics["aupr_in"] = id_positive.average_precision()
        metrics["aupr_out"] = ood_positive.average_precision()
    else:
        metrics["aupr_in"] = id_positive.trapezoid_aupr()
        metrics["aupr_out"] = ood_positive.trapezoid_aupr()
    if convention is None:
        metrics["fpr95_id_positive"] = id_positive.fpr95()
        metrics["fpr95_ood_positive"] = ood_positive.fpr95()
    elif convention == "official":
        metrics["fpr95"] = id_positive.fpr_at_nearest_recall()
    else:
        metrics["fpr95"] = (ood_positive.thinned() if convention == "openood" else ood_positive).fpr95()
    return metrics


def _metric_names(result: Mapping[str, float]) -> list[str]:
    """The metrics of `evaluate`'s result, without counts and intervals."""
    return [k for k in result if k not in ("n_id", "n_ood") and not k.endswith(("_low", "_high"))]


def _squashed_curves(inside: Array, outside: Array) -> tuple[_Curve, _Curve]:
    """With ID and with OOD as the positive class, of what torchmetrics makes of scores (its issue 1989).

    Scores outside [0, 1] go through a sigmoid, in their own precision and in the order in which pytorch-ood sorts them.
    """
    outlier = -np.concatenate([inside, outside])
    order = np.argsort(outlier, kind="stable")
    is_id = order < len(inside)

    def squashed(scores: Array) -> Array:
        inside_range = np.all((scores >= 0) & (scores <= 1))
        result: Array = scores if inside_range else torch.from_numpy(scores).sigmoid().numpy()
        return result

    s, o = squashed(-outlier[order]), squashed(outlier[order])
    return _Curve.of(s[is_id], s[~is_id]), _Curve.of(o[~is_id], o[is_id])


def _as_scores(name: str, scores: ScoresLike, keep_dtype: bool = False) -> Array:
    """The scores as a float64 array, or one of their own floating-point type; ValueError naming the argument."""
    expected = f"{name}: expected a non-empty one-dimensional array of finite real numbers"
    if isinstance(scores, torch.Tensor):
        if scores.is_complex() or scores.is_quantized or scores.is_meta or scores.layout != torch.strided:
            where = f", {scores.layout}, on {scores.device}"
            raise ValueError(f"{expected}, got a tensor of {scores.dtype}{where}")
        scores = scores.detach().cpu()
        array = (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy()  # numpy knows no bfloat16
    else:
        try:
            array = np.asarray(scores)
        except ValueError:
            raise ValueError(f"{expected}, got a {type(scores).__name__} of uneven lengths") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{expected}, got {type(scores).__name__} of {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{expected}, got shape {array.shape}")
    if not keep_dtype or array.dtype.kind != "f" or array.itemsize > 8:
        array = array.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(array))
    if bad:
        raise ValueError(f"{expected}, got {bad} NaN or infinite of {array.size}")
    return array


def _as_named_scores(ood_scores: ScoresLike | Mapping[str, ScoresLike]) -> dict[str, Array]:
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
