"""What must hold for any input (hypothesis), on every path."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnorm_fast import fast_gradnorm, gradnorm_from_logits, head_scores, token_statistics

from conftest import DEVICE
from families import deviation, deviation_norm, residual_norm
from spread import spread

# A row's own float32 error is at most 2e-6 (test_gradnorm.py): two computations of it differ by at most twice that.
TWICE = dict(rtol=4e-6, atol=0.0)
NORMS = [1.0, 2.0, 3.0, 4.0, math.inf, 0.5]
both = pytest.mark.parametrize("backend", ["torch", "triton"])
quick = settings(max_examples=25, deadline=None)


@st.composite
def problems(draw):
    """Features (B, D) and logits (B, C) in multiples of 1/64 up to 16: sums of them with whole numbers are exact."""
    rows, depth = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    classes = draw(st.sampled_from([1, 2, 3, 16, 17, 100, 129, 300]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    features = torch.randint(-1024, 1025, (rows, depth), generator=g) / 64
    logits = torch.randint(-1024, 1025, (rows, classes), generator=g) / 64
    return features.to(DEVICE), (logits * draw(st.sampled_from([0.0, 2.0**-6, 1.0]))).to(DEVICE)


temperatures = st.floats(0.01, 1e4)


@st.composite
def hard_rows(draw):
    """A row of logits (1, C) and a temperature: groups of classes at heights of their own, each with a spread of its
    own, around any centre."""
    classes = draw(st.sampled_from([2, 3, 10, 129, 1000, 10000]))
    temperature = draw(st.sampled_from([0.01, 1.0, 3.0, 1e3, 1e6, 1e9]))
    z = torch.full((1, classes), draw(st.sampled_from([0.0, 5.0, -300.0, 3e4, -3e4])))
    normal = torch.randn(classes, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    for _ in range(draw(st.integers(1, 3))):
        group = slice(draw(st.integers(0, classes - 1)), draw(st.integers(1, classes)))
        height = draw(st.floats(-12, 12)) * draw(st.sampled_from([1.0, temperature]))
        z[:, group] += height + normal[group] * draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0]))
    return z, temperature


@settings(max_examples=300, deadline=None)
@given(hard_rows())
def test_scores_of_given_logits_are_exact(row):
    z, temperature = row
    truth = deviation(z, temperature).item()
    got = gradnorm_from_logits(torch.ones(1, 1), z, temperature=temperature, backend="torch").item()
    assert abs(got - truth) <= 1e-6 * truth + 2.0**-150  # half of the smallest float32: a deviation may round to 0


def rounding(z, label, temperature):
    """What the rounding of z_y − m, m the largest of the other logits, moves the odds of class y by."""
    others = z.double().index_fill(1, torch.tensor([label]), -torch.inf)
    return 6e-8 * abs(z[0, label].item() - others.max().item()) / temperature


@settings(max_examples=600, deadline=None)
@given(hard_rows(), st.sampled_from(["uniform", "predicted", "label"]), st.sampled_from(NORMS), st.data())
def test_norms_of_given_logits_are_exact(row, target, p, data):
    z, temperature = row
    label = z.argmax().item() if target == "predicted" else data.draw(st.integers(0, z.shape[1] - 1))
    chosen, tolerance = torch.tensor([label]), 1e-6 if p >= 1.0 else 5e-5
    if target == "uniform":
        truth = deviation_norm(z, temperature, p)
    else:
        truth = residual_norm(z, chosen, temperature, p)
        tolerance += rounding(z, label, temperature)
    options = dict(target=chosen.to(DEVICE) if target == "label" else target, p=p, temperature=temperature)
    ones = torch.ones(1, 1, device=DEVICE)
    got = gradnorm_from_logits(ones, z.to(DEVICE), **options).double().cpu() * temperature
    assert abs(got - truth) <= tolerance * truth + 1e-37


@settings(max_examples=300, deadline=None)
@given(hard_rows(), st.data())
def test_token_statistics_are_exact_and_keep_their_bounds(row, data):
    """With one feature, of 1, the weight is the logits."""
    z, temperature = row
    classes = z.shape[1]
    label = data.draw(st.integers(0, classes - 1))
    labels = torch.tensor([label])
    weight = z.T.contiguous().to(DEVICE)
    found = token_statistics(torch.ones(1, 1, device=DEVICE), weight, labels.to(DEVICE), temperature=temperature)
    log_prob, entropy, sum_squares, norm = (t.double().item() for t in found)
    d, top = z.double() / temperature, z.argmax(1)
    others = d.index_fill(1, top, -torch.inf).logsumexp(1)
    log_top = torch.nn.functional.logsigmoid(d[:, top] - others)  # log softmax rounds it to 0
    log_p = torch.log_softmax(d, 1).index_copy(1, top, log_top)
    truths = log_p[0, label], -(log_p.exp() * log_p).nansum(), log_p.exp().square().sum()
    truths = [t.item() for t in truths] + [residual_norm(z, labels, temperature, 2.0).item()]
    tolerance = 1e-6 + rounding(z, label, temperature)
    # the sums round the other classes' z_c − m, and its product with 1/T: both count where m is the largest of all
    of_sums = 0.0 if label == top.item() else 2 * rounding(z, top.item(), temperature)
    # a square has twice the error of S
    tolerances = tolerance, tolerance + of_sums, 2 * tolerance, tolerance
    for got, truth, relative in zip((log_prob, entropy, sum_squares, norm), truths, tolerances, strict=True):
        assert abs(got - truth) <= relative * abs(truth) + 1e-37
    assert abs(entropy - truths[1]) <= tolerance * abs(truths[1]) + 3e-7
    assert log_prob <= 0 and 0 <= entropy <= math.log(classes) * (1 + 2e-6)
    assert 1 / classes * (1 - 2e-6) <= sum_squares <= 1 + 2e-6


@settings(max_examples=300, deadline=None)
@given(hard_rows())
def test_entropy_and_the_like_are_exact_and_keep_their_bounds(row):
    """To the rounding of float32. With one feature, of 1, the weight is the logits."""
    z, temperature = row
    classes, rounded = z.shape[1], 2.0**-23
    weight = z.T.contiguous().to(DEVICE)
    scores = head_scores(torch.ones(1, 1, device=DEVICE), weight, temperature=temperature, backend="torch")
    entropy, sum_squares, exgrad, kl_uniform = (field.double().item() for field in scores[-4:])
    truth = spread(z, temperature)
    pairs = zip(truth, (entropy, sum_squares, exgrad * temperature / 2, kl_uniform), strict=True)
    assert all(abs(got - expected.item()) <= rounded * expected.item() + 1e-37 for expected, got in pairs)
    assert 0 <= entropy <= math.log(classes) * (1 + rounded)
    assert 1 / classes <= sum_squares * (1 + rounded) and sum_squares <= 1 + rounded
    assert 0 <= exgrad * temperature <= 2 * (1 - 1 / classes) * (1 + rounded) and kl_uniform >= 0


@both
@quick
@given(problems(), st.integers(-1000, 1000), temperatures)
def test_a_shift_of_all_logits_changes_nothing(backend, problem, shift, temperature):
    features, logits = problem
    options = dict(temperature=temperature, backend=backend)
    shifted = gradnorm_from_logits(features, logits + shift, **options)
    torch.testing.assert_close(shifted, gradnorm_from_logits(features, logits, **options), **TWICE)


@both
@quick
@given(problems(), st.randoms(use_true_random=False), temperatures)
def test_the_order_of_classes_does_not_matter(backend, problem, random, temperature):
    features, logits = problem
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    options = dict(temperature=temperature, backend=backend)
    permuted = gradnorm_from_logits(features, logits[:, order], **options)
    torch.testing.assert_close(permuted, gradnorm_from_logits(features, logits, **options), **TWICE)


@both
@quick
@given(problems(), st.integers(-20, 20), temperatures)
def test_scaling_features_bias_and_temperature_together_changes_nothing(backend, problem, exponent, temperature):
    """With (ax, ab, aT) the logits grow by a, p stays, ‖x‖₁ grows by a, and the 1/T before it takes that back."""
    features, logits = problem
    weight, bias = torch.randn(logits.shape[1], features.shape[1], device=DEVICE), logits[0]
    a = 2.0**exponent
    scaled = fast_gradnorm(a * features, weight, a * bias, temperature=a * temperature, backend=backend)
    plain = fast_gradnorm(features, weight, bias, temperature=temperature, backend=backend)
    assert torch.equal(scaled, plain)  # powers of two round nothing


@both
@quick
@given(problems(), st.data(), temperatures)
def test_a_row_does_not_depend_on_the_rows_around_it(backend, problem, data, temperature):
    features, logits = problem
    row = data.draw(st.integers(0, len(features) - 1))
    options = dict(temperature=temperature, backend=backend)
    alone = gradnorm_from_logits(features[row], logits[row], **options)
    assert torch.equal(alone, gradnorm_from_logits(features, logits, **options)[row])


@both
@quick
@given(problems(), temperatures)
def test_bounds(backend, problem, temperature):
    """0 <= Σ|p − 1/C| <= 2(1 − 1/C), the latter when one class has all the probability; 1/C <= msp <= 1."""
    features, logits = problem
    classes = logits.shape[1]
    weight = torch.randn(classes, features.shape[1], device=DEVICE)
    scores = head_scores(features, weight, logits[0], temperature=temperature, backend=backend)
    deviation = scores.output_norm.double() * temperature
    assert (deviation >= 0).all() and (deviation <= 2 * (1 - 1 / classes) * (1 + 2e-6)).all()
    assert (scores.msp * classes >= 1 - 2e-6).all() and (scores.msp <= 1).all()
    assert (scores.energy >= scores.max_logit).all()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 5000])
def test_saturated_rows_have_a_probability_of_at_most_1(backend, dtype, classes):
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    weight = 300 * torch.randn(classes, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    scores = head_scores(features, weight, backend=backend)
    assert (scores.msp <= 1).all() and (scores.energy >= scores.max_logit).all()
    assert (scores.msp > 0.9).any()
