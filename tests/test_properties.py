"""What must hold for any input (hypothesis), on every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnorm_fast import fast_gradnorm, gradnorm_from_logits, head_scores

from conftest import DEVICE
from families import deviation

# A row's own float32 error is at most 2e-6 (test_gradnorm.py): two computations of it differ by at most twice that.
TWICE = dict(rtol=4e-6, atol=0.0)
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


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_scores_of_given_logits_are_exact(data):
    """Groups of classes at heights of their own, each with a spread of its own, around any centre."""
    classes = data.draw(st.sampled_from([2, 3, 10, 129, 1000, 10000]))
    temperature = data.draw(st.sampled_from([0.01, 1.0, 3.0, 1e3, 1e6, 1e9]))
    z = torch.full((1, classes), data.draw(st.sampled_from([0.0, 5.0, -300.0])))
    normal = torch.randn(classes, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))))
    for _ in range(data.draw(st.integers(1, 3))):
        group = slice(data.draw(st.integers(0, classes - 1)), data.draw(st.integers(1, classes)))
        height = data.draw(st.floats(-12, 12)) * data.draw(st.sampled_from([1.0, temperature]))
        z[:, group] += height + normal[group] * data.draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0]))
    truth = deviation(z, temperature).item()
    got = gradnorm_from_logits(torch.ones(1, 1), z, temperature=temperature, backend="torch").item()
    assert abs(got - truth) <= 1e-6 * truth


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
    assert (scores.msp * classes >= 1 - 2e-6).all() and (scores.msp <= 1 + 2e-6).all()
    assert (scores.energy >= scores.max_logit).all()
