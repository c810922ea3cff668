"""The evaluation against hand-computed values and brute force over all pairs and thresholds."""

import csv
import io
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc

from gradnorm_fast import HeadScores
from gradnorm_fast.evaluation import (
    METHODS,
    compare_methods,
    evaluate,
    plot_roc,
    plot_scores,
    results_csv,
    results_table,
)

KEYS = {"auroc", "aupr_in", "aupr_out", "fpr95_id_positive", "fpr95_ood_positive", "n_id", "n_ood"}

# Few distinct values, so that ties within and between the two sets are common.
tied_scores = st.lists(st.integers(-4, 4).map(lambda k: k / 4), min_size=1, max_size=60)
any_scores = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


def pairwise_auroc(id_scores, ood_scores):
    return np.mean([(i > o) + (i == o) / 2 for i in id_scores for o in ood_scores])


def brute_fpr95(id_scores, ood_scores):
    """ID positive: try every threshold from the highest down; integers decide what 95 % is."""
    for threshold in sorted(set(id_scores), reverse=True):
        if 100 * sum(i >= threshold for i in id_scores) >= 95 * len(id_scores):
            return sum(o >= threshold for o in ood_scores) / len(ood_scores)
    raise AssertionError("the lowest ID score keeps all of ID")


def brute_average_precision(positive, negative):
    total, recall = 0.0, 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        hits, false = sum(p >= threshold for p in positive), sum(n >= threshold for n in negative)
        total += (hits / len(positive) - recall) * hits / (hits + false)
        recall = hits / len(positive)
    return total


def negated(scores):
    return [-score for score in scores]


def test_hand_computed():
    result = evaluate([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 5.0])
    assert set(result) == KEYS
    # ID wins 1, 2, 3, 3 of 4 outright and ties one OOD score for ID 1 and ID 2: (1.5 + 2.5 + 3 + 3) / 16.
    assert result["auroc"] == pytest.approx(10 / 16)
    # From above: 5(O) 4(I) 3(I) 2(I,O) 1(I,O) 0(O), a quarter of recall at precisions 1/2, 2/3, 3/5, 4/7.
    assert result["aupr_in"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 5 + 4 / 7) / 4)
    # From below: 0(O) 1(I,O) 2(I,O) 3(I) 4(I) 5(O): precisions 1, 2/3, 3/5, 4/8.
    assert result["aupr_out"] == pytest.approx((1 + 2 / 3 + 3 / 5 + 4 / 8) / 4)
    assert result["fpr95_id_positive"] == 3 / 4  # all four ID needed: threshold 1 lets 1, 2 and 5 in
    assert result["fpr95_ood_positive"] == 1.0  # OOD 5 lies above all of ID
    assert (result["n_id"], result["n_ood"]) == (4, 4)


def test_exactly_95_percent_is_enough():
    id_scores = list(range(1, 21))  # 19 of 20 are >= 2
    assert evaluate(id_scores, [1.5, 1.9])["fpr95_id_positive"] == 0.0
    assert evaluate(id_scores, [2.0, 1.9])["fpr95_id_positive"] == 0.5
    assert evaluate(id_scores[1:], [2.0, 1.9])["fpr95_id_positive"] == 0.5  # 18 of 19 are not: threshold 2


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "auroc", "fpr95"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0, 0.0),
        ([0.0, 1.0], [2.0, 3.0], 0.0, 1.0),
        ([1.0, 1.0], [1.0], 0.5, 1.0),
    ],
    ids=["perfect", "reversed", "all-tied"],
)
def test_extremes(id_scores, ood_scores, auroc, fpr95):
    result = evaluate(id_scores, ood_scores)
    assert result["auroc"] == auroc
    assert result["fpr95_id_positive"] == result["fpr95_ood_positive"] == fpr95


@given(st.one_of(st.tuples(tied_scores, tied_scores), st.tuples(any_scores, any_scores)))
def test_against_brute_force(pair):
    id_scores, ood_scores = pair
    result = evaluate(id_scores, ood_scores)
    assert result["auroc"] == pytest.approx(pairwise_auroc(id_scores, ood_scores), abs=1e-12)
    assert result["aupr_in"] == pytest.approx(brute_average_precision(id_scores, ood_scores), abs=1e-12)
    assert result["aupr_out"] == pytest.approx(
        brute_average_precision(negated(ood_scores), negated(id_scores)), abs=1e-12
    )
    assert result["fpr95_id_positive"] == brute_fpr95(id_scores, ood_scores)
    assert result["fpr95_ood_positive"] == brute_fpr95(negated(ood_scores), negated(id_scores))
    assert all(0 <= result[key] <= 1 for key in KEYS - {"n_id", "n_ood"})


@given(tied_scores, tied_scores)
def test_mirror(id_scores, ood_scores):
    """Negating the scores and exchanging the roles exchanges the two directions of every metric."""
    result, mirrored = evaluate(id_scores, ood_scores), evaluate(negated(ood_scores), negated(id_scores))
    assert mirrored["auroc"] == pytest.approx(result["auroc"], abs=1e-12)
    for one, other in (("aupr_in", "aupr_out"), ("fpr95_id_positive", "fpr95_ood_positive"), ("n_id", "n_ood")):
        assert (mirrored[one], mirrored[other]) == (result[other], result[one])


@pytest.mark.parametrize(
    "convert",
    [
        list,
        np.array,
        torch.tensor,
        lambda scores: np.array(scores, dtype=np.float16),
        lambda scores: torch.tensor(scores, dtype=torch.bfloat16),
        lambda scores: torch.tensor(scores, requires_grad=True),
    ],
    ids=["list", "numpy", "tensor", "float16", "bfloat16", "requires-grad"],
)
def test_every_kind_of_array_gives_the_same(convert):
    id_scores, ood_scores = [0.5, 1.0, 2.0], [0.25, 1.0]
    assert evaluate(convert(id_scores), convert(ood_scores)) == evaluate(id_scores, ood_scores)


def test_neighbouring_floats_are_told_apart():
    low = np.float32(1e-30)
    assert evaluate(np.array([np.nextafter(low, np.float32(1))]), np.array([low]))["auroc"] == 1.0
    assert evaluate([np.nextafter(1e9, np.inf)], [1e9])["auroc"] == 1.0


@pytest.mark.parametrize("argument", ["id_scores", "ood_scores"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], r"got shape \(0,\)"),
        (torch.ones(2, 3), r"got shape \(2, 3\)"),
        (1.0, r"got shape \(\)"),
        ([1.0, float("nan"), float("inf")], "got 2 NaN or infinite of 3"),
        (torch.tensor([float("-inf")]), "got 1 NaN or infinite of 1"),
        (["a"], "got list of <U1"),
        (None, "got NoneType of object"),
        ([1j], "got list of complex128"),
        (torch.ones(2, dtype=torch.complex64), "torch.complex64"),
        ([[1.0], [1.0, 2.0]], "uneven lengths"),
    ],
    ids=repr,
)
def test_refusals_name_the_argument(argument, wrong, message):
    arguments = {"id_scores": [1.0, 2.0], "ood_scores": [0.0], argument: wrong}
    with pytest.raises(ValueError, match=f"^{argument}: expected a non-empty one-dimensional array.*{message}"):
        evaluate(**arguments)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r'scikit-learn: pip install "gradnorm_fast\[eval\]"'):
        evaluate([1.0], [0.0])
    with pytest.raises(ImportError, match=r"gradnorm_fast\[eval\]"):
        plot_roc([1.0], [0.0])


@pytest.fixture
def ax():
    from matplotlib.figure import Figure

    return Figure().subplots()


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_plot_scores_draws_one_histogram_of_area_one_for_each_set(ax):
    id_scores, near, far = torch.linspace(2, 3, 40), [1.0, 2.0, 2.5], np.zeros(5)
    assert plot_scores(id_scores, {"near": near, "far": far}, ax, bins=30, xlabel="GradNorm") is ax
    assert legend_of(ax) == ["in-distribution", "near", "far"]
    assert ax.get_xlabel() == "GradNorm"
    filled = ax.containers[0].patches
    assert len(filled) == 30
    assert sum(bar.get_width() * bar.get_height() for bar in filled) == pytest.approx(1)


def test_plot_roc_shows_the_auroc(ax):
    id_scores, near, far = [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 5.0], [-1.0]
    assert plot_roc(id_scores, {"near": near, "far": far}, ax) is ax
    assert legend_of(ax) == ["near (AUROC 0.625)", "far (AUROC 1.000)"]
    assert auc(*ax.lines[0].get_data()) == pytest.approx(evaluate(id_scores, near)["auroc"])


def test_plots_make_their_own_axes_and_take_unnamed_scores():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    for plot in (plot_scores, plot_roc):
        made = plot([1.0, 2.0], [0.0, 0.5])
        assert any("out-of-distribution" in text for text in legend_of(made))
        plt.close(made.figure)


@pytest.mark.parametrize("plot", [plot_scores, plot_roc])
def test_plot_refusals(plot, ax):
    with pytest.raises(ValueError, match="ood_scores: expected at least one named set"):
        plot([1.0], {}, ax)
    with pytest.raises(ValueError, match=r"^ood_scores\['noise'\]: expected .* got shape \(0,\)"):
        plot([1.0], {"noise": []}, ax)
    with pytest.raises(ValueError, match=r"^id_scores: expected"):
        plot([[1.0]], [0.0], ax)


def random_scores(n, shift, seed):
    g = torch.Generator().manual_seed(seed)
    gradnorm, other = torch.rand(n, generator=g) + shift, torch.rand(n, generator=g) - shift
    return HeadScores(gradnorm, gradnorm, other, torch.zeros(n, dtype=torch.int64), other, other, other)


def test_methods_side_by_side_and_their_average():
    inside = random_scores(50, 0.3, 0)
    outside = {"near, far": random_scores(40, 0.0, 1), "far": random_scores(30, -0.5, 2)}
    results = compare_methods(inside, outside)
    assert list(results) == ["near, far", "far", "average"]
    assert results["far"]["GradNorm"] == evaluate(inside.gradnorm, outside["far"].gradnorm)
    for method in results["average"]:
        for metric, mean in results["average"][method].items():
            assert mean == pytest.approx(np.mean([results[name][method][metric] for name in outside]))
    rows = results_table(results).splitlines()
    assert len(rows) == 2 + len(METHODS) and rows[0].count("AUROC") == 3
    assert f"{100 * results['far']['MSP']['auroc']:.2f}" in next(r for r in rows if r.startswith("| MSP"))
    lines = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert len(lines) == 3 * len(METHODS) and lines[0]["ood"] == "near, far"
    assert float(lines[0]["auroc"]) == results["near, far"][lines[0]["method"]]["auroc"]
    assert "| a\\|b FPR95" in results_table({"a|b": results["far"]})
    with pytest.raises(ValueError, match="at least one named set"):
        compare_methods(inside, {})


def test_bootstrap_intervals_hold_the_metric_and_narrow_with_the_sample():
    widths = []
    for n in (30, 3000):
        inside, outside = random_scores(n, 0.3, 3).gradnorm, random_scores(n, 0.0, 4).gradnorm
        result = evaluate(inside, outside, bootstrap=100, seed=5)
        assert result == evaluate(inside, outside, bootstrap=100, seed=5)
        assert result["auroc_low"] <= result["auroc"] <= result["auroc_high"]
        widths.append(result["auroc_high"] - result["auroc_low"])
    assert widths[1] < widths[0] / 4  # by the square root of 100, less what chance leaves
    narrow = evaluate(inside, outside, bootstrap=100, seed=5, confidence=0.5)
    assert narrow["auroc_high"] - narrow["auroc_low"] < widths[1]
    for wrong in (dict(bootstrap=-1), dict(bootstrap=2.5), dict(confidence=1.0)):
        with pytest.raises(ValueError, match="bootstrap: expected"):
            evaluate(inside, outside, **wrong)
