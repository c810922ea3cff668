"""The evaluation against hand-computed values and brute force over all pairs and thresholds."""

import csv
import io
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from gradnorm_fast import HeadScores, head_scores
from gradnorm_fast.evaluation import (
    CONVENTIONS,
    METHODS,
    compare,
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


# Conventions. Each library's numbers come from the library itself where it can be installed, else from what its code
# calls or, for the official FPR95, from the definition tried on every threshold.


def random_tied_sets(count):
    """Pairs of float32 arrays with ties: within [0, 1], outside it, and where a float32 sigmoid reaches 1."""
    rng = np.random.default_rng(0)
    for k in range(count):
        n_id, n_ood = rng.integers(2, 250, 2)
        spread, shift, decimals = [(1, 0.3, 2), (3, 1.0, 0), (0.1, 0.02, 2), (100, 60, 0), (12, 9, 1)][k % 5]
        inside, outside = rng.random(n_id) * spread + shift, rng.random(n_ood) * spread
        if k % 5 == 2:
            inside, outside = inside.clip(0, 1), outside.clip(0, 1)
        yield inside.round(decimals).astype(np.float32), outside.round(decimals).astype(np.float32)


def official(inside, outside):
    is_id, scores = np.repeat([1, 0], [len(inside), len(outside)]), np.concatenate([inside, outside])
    best = None
    for threshold in np.unique(scores[scores >= inside.min()]):  # upwards: of equally near recalls the larger FPR
        distance = abs(np.count_nonzero(inside >= threshold) / len(inside) - 0.95)
        if best is None or distance < best[0]:
            best = distance, np.count_nonzero(outside >= threshold) / len(outside)
    return {
        "auroc": roc_auc_score(is_id, scores),
        "aupr_in": average_precision_score(is_id, scores),
        "aupr_out": average_precision_score(1 - is_id, -scores),
        "fpr95": best[1],
    }


def openood(inside, outside):
    is_ood, conf = np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside])
    fpr, tpr, _ = roc_curve(is_ood, -conf)
    return {
        "auroc": auc(fpr, tpr),
        "aupr_in": auc(*precision_recall_curve(1 - is_ood, conf)[1::-1]),
        "aupr_out": auc(*precision_recall_curve(is_ood, -conf)[1::-1]),
        "fpr95": fpr[np.argmax(tpr >= 0.95)],
    }


def openood_itself(inside, outside):
    metrics = pytest.importorskip("openood.evaluators.metrics", exc_type=ImportError)
    label = np.repeat([0, -1], [len(inside), len(outside)])
    return dict(
        zip(
            ("auroc", "aupr_in", "aupr_out", "fpr95"),
            metrics.auc_and_fpr_recall(np.concatenate([inside, outside]), label, 0.95),
            strict=True,
        )
    )


def pytorch_ood(inside, outside):
    metrics = pytest.importorskip("pytorch_ood.metrics").OODMetrics()
    outlier, label = -np.concatenate([inside, outside]), np.repeat([0, -1], [len(inside), len(outside)])
    computed = metrics.update(torch.from_numpy(outlier), torch.from_numpy(label)).compute()
    names = {"auroc": "AUROC", "aupr_in": "AUPR-IN", "aupr_out": "AUPR-OUT", "fpr95": "FPR95TPR"}
    return {name: computed[theirs] for name, theirs in names.items()}


def pytorch_ood_03(inside, outside):
    """What pytorch-ood 0.3 asks of torchmetrics; it sorts the scores first."""
    functional = pytest.importorskip("torchmetrics.functional.classification")
    scores, order = torch.from_numpy(-np.concatenate([inside, outside])).sort(stable=True)
    label = torch.from_numpy(np.repeat([0, 1], [len(inside), len(outside)]))[order]
    fpr, tpr, _ = functional.binary_roc(scores, label)
    aupr = [functional.binary_precision_recall_curve(s, y)[:2] for s, y in ((-scores, 1 - label), (scores, label))]
    return {
        "auroc": functional.binary_auroc(scores, label).item(),
        "aupr_in": -torch.trapezoid(*aupr[0]).item(),
        "aupr_out": -torch.trapezoid(*aupr[1]).item(),
        "fpr95": fpr[(tpr >= 0.95).nonzero()[0, 0]].item(),
    }


@pytest.mark.parametrize(
    ("convention", "theirs", "tolerance"),
    [
        ("official", official, 1e-12),
        ("openood", openood, 1e-12),
        ("openood", openood_itself, 1e-12),
        ("pytorch_ood", pytorch_ood, 1e-6),
        ("pytorch_ood_0.3", pytorch_ood_03, 1e-6),
    ],
)
def test_convention_gives_the_numbers_of_that_library(convention, theirs, tolerance):
    for inside, outside in random_tied_sets(300):
        expected = theirs(inside, outside)
        ours = evaluate(inside, outside, convention=convention)
        assert (ours.pop("n_id"), ours.pop("n_ood")) == (len(inside), len(outside))
        assert ours == pytest.approx(expected, abs=tolerance)


def test_conventions_differ_where_they_are_known_to():
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(502, 1, 250).astype(np.float32), rng.normal(500, 1, 200).astype(np.float32)
    results = {convention: evaluate(inside, outside, convention=convention) for convention in CONVENTIONS}
    assert results["pytorch_ood_0.3"]["auroc"] == 0.5  # its sigmoid maps all scores to the same number
    ours = evaluate(inside, outside)
    assert all(r["auroc"] == pytest.approx(ours["auroc"]) for n, r in results.items() if n != "pytorch_ood_0.3")
    assert results["official"]["aupr_in"] == pytest.approx(ours["aupr_in"])
    assert results["openood"]["aupr_in"] != pytest.approx(ours["aupr_in"], abs=1e-6)
    assert results["pytorch_ood"]["fpr95"] == ours["fpr95_ood_positive"] != results["official"]["fpr95"]
    # 94 of 99 are 94.95 %, nearer than the 95.96 % of 95: the official threshold is 5, not 4.
    inside, outside = np.arange(99.0), [4.0] * 3 + [-1.0]
    assert evaluate(inside, outside, convention="official")["fpr95"] == 0.0
    assert evaluate(inside, outside)["fpr95_id_positive"] == 0.75
    # 5.5 and 6 keep the same 95 of 100: the official code reads the FPR off the lower threshold.
    inside, outside = np.arange(100.0) + (np.arange(100) >= 5), [5.5] * 3 + [-1.0]
    assert evaluate(inside, outside, convention="official")["fpr95"] == 0.75
    assert evaluate(inside, outside)["fpr95_id_positive"] == 0.0


def test_unknown_convention():
    with pytest.raises(ValueError, match=r"^convention: expected None or one of official, openood, .* got 'paper'"):
        evaluate([1.0], [0.0], convention="paper")
    with pytest.raises(ValueError, match=r"^convention: expected None or one of official"):
        evaluate([1.0], [0.0], convention=np.array(["official", "openood"]))
    assert set(evaluate([1.0], [0.0], convention=None)) == KEYS


def test_convention_in_tables_and_intervals():
    inside = random_scores(50, 0.3, 0)
    outside = {"near": random_scores(40, 0.0, 1), "far": random_scores(30, -0.5, 2)}
    results = compare_methods(inside, outside, convention="openood", bootstrap=10)
    one = evaluate(inside.gradnorm, outside["far"].gradnorm, convention="openood")
    assert one.items() <= results["far"]["GradNorm"].items()
    assert set(results["average"]["GradNorm"]) == {"auroc", "aupr_in", "aupr_out", "fpr95"}
    assert {"fpr95_low", "fpr95_high"} <= set(results["far"]["GradNorm"])
    row = next(line for line in results_table(results).splitlines() if line.startswith("| GradNorm"))
    assert f"{100 * one['fpr95']:.2f}" in row
    assert "fpr95_high" in results_csv(results).splitlines()[0]


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
        (torch.ones(2, device="meta"), "on meta"),
        (torch.ones(2).to_sparse(), "torch.sparse_coo"),
        ([[1.0], [1.0, 2.0]], "uneven lengths"),
    ],
    ids=repr,
)
def test_refusals_name_the_argument(argument, wrong, message):
    arguments = {"id_scores": [1.0, 2.0], "ood_scores": [0.0], argument: wrong}
    with pytest.raises(ValueError, match=f"^{argument}: expected a non-empty one-dimensional array.*{message}"):
        evaluate(**arguments)


@pytest.mark.parametrize(
    "option, wrong, expected",
    [
        ("bootstrap", [None, "a", -1, 1.5, [1], True], "expected the number of resamples"),
        ("confidence", [None, "a", 1j, [1], 0, 1, float("nan"), True], "expected a fraction between 0 and 1"),
        ("seed", ["a", 1.5, -1, 1j, float("nan")], "expected a whole number"),
    ],
)
def test_options_that_do_not_fit(option, wrong, expected):
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{option}: {expected}.*got {re.escape(repr(value))}$"):
            evaluate([1.0, 2.0], [0.0], **{"bootstrap": 2, option: value})
    assert evaluate([1.0, 2.0], [0.0], bootstrap=np.int64(2), confidence=np.float32(0.9), seed=np.int64(1))["n_id"] == 2


def test_methods_need_head_scores():
    inside = random_scores(5, 0.0, 0)
    for arguments, message in (
        ((None, {"near": inside}), "id_scores: expected HeadScores, .* got NoneType"),
        ((inside.gradnorm, {"near": inside}), "id_scores: expected HeadScores, .* got Tensor"),
        ((inside, {"near": {}}), r"ood_scores\['near'\]: expected HeadScores, .* got dict"),
        ((inside, inside), "ood_scores: expected HeadScores by name, got HeadScores"),
        ((inside, None), "ood_scores: expected HeadScores by name, got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            compare_methods(*arguments)


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


@pytest.mark.parametrize("n", [1, 2, 30])
def test_the_roc_curve_is_that_of_scikit_learn(ax, n):
    random = np.random.default_rng(n)
    for _ in range(20):
        inside, outside = (random.integers(0, 9, n) / 4 + shift for shift in (0.5, 0.0))  # with ties
        plot_roc(inside, outside, ax)
        drawn = np.stack(ax.lines[-3].get_data())
        fpr, tpr, _ = roc_curve(np.r_[np.ones(n), np.zeros(n)], np.r_[inside, outside])
        np.testing.assert_array_equal(drawn, np.stack([fpr, tpr]))


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


@pytest.mark.parametrize("plot", [plot_scores, plot_roc])
def test_plots_say_what_to_install(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=f"{plot.__name__} needs matplotlib: "):
        plot([1.0], [0.0])


def test_a_comparison_needs_a_method():
    with pytest.raises(ValueError, match="id_scores: expected at least one method"):
        compare({}, {"noise": {}})


def random_scores(n, shift, seed):
    g = torch.Generator().manual_seed(seed)
    gradnorm, other = torch.rand(n, generator=g) + shift, torch.rand(n, generator=g) - shift
    others = dict.fromkeys(HeadScores._fields, other)
    prediction = torch.zeros(n, dtype=torch.int64)
    return HeadScores(**others | dict(gradnorm=gradnorm, feature_norm=gradnorm, prediction=prediction))


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


def test_methods_that_are_asked_for():
    """Entropy and ExGrad are smaller for ID samples, SumSquares and KL larger."""
    sharp, flat = (torch.randn(60, 8, generator=torch.Generator().manual_seed(s)) * s for s in (9, 1))
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    inside, outside = head_scores(sharp, weight), head_scores(flat, weight)
    methods = ["ExGrad", "SumSquares", "GradNorm", "Entropy", "KL"]
    results = compare_methods(inside, {"flat": outside}, methods=methods, convention="official")
    assert list(results["flat"]) == methods == list(results["average"])
    for method, sign, field in (("Entropy", -1, "entropy"), ("ExGrad", -1, "exgrad"), ("KL", 1, "kl_uniform")):
        given = (sign * getattr(scores, field) for scores in (inside, outside))
        assert results["flat"][method] == evaluate(*given, convention="official")
    assert min(results["flat"][m]["auroc"] for m in ("Entropy", "SumSquares", "KL")) > 0.9
    earlier = SimpleNamespace(**{f: getattr(inside, f) for f in ("gradnorm", "msp")})
    assert list(compare_methods(earlier, {"a": earlier}, methods=["MSP", "GradNorm"])["a"]) == ["MSP", "GradNorm"]
    with pytest.raises(TypeError, match="id_scores: expected HeadScores"):
        compare_methods(earlier, {"a": earlier}, methods=["Entropy"])
    for wrong, got in ((["MSP", "Margin"], "'Margin'"), ("MSP", "'MSP'"), ([], r"\[\]")):
        with pytest.raises(ValueError, match=f"methods: expected a list of GradNorm, .*, KL, got {got}"):
            compare_methods(inside, {"flat": outside}, methods=wrong)
    masked = head_scores(flat, weight, torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf]))
    assert list(compare_methods(masked, {"a": masked})["a"]) == list(METHODS)
    with pytest.raises(ValueError, match=r"id_scores: expected .* got 60 NaN or infinite of 60"):
        compare_methods(masked, {"a": masked}, methods=["KL"])


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
