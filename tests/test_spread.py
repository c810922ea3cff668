"""entropy, sum_squares, exgrad and kl_uniform of `head_scores`: exact on hard rows, bounded, differentiable."""

import math

import mpmath
import numpy as np
import pytest
import torch

from gradnorm_fast import head_scores, token_statistics

from conftest import DEVICE
from families import by_temperature, families
from problems import relative
from spread import exact_spread, spread

NAMES = ("entropy", "sum_squares", "exgrad", "kl_uniform")
BACKENDS = ["torch", "triton"]
ROUNDED = 2.0**-23  # of what is right in float64, rounded to float32: half of it, and a product
LEAST = 2.0**-149  # of float32: half of it is the rounding of what is smaller than 2⁻¹²⁶


def of_logits(logits, temperature=1.0, backend="torch"):
    """The four fields (4, n) of rows of logits, whose columns are the weight, and ‖x‖₁ = 1.

    The product of a one-hot row with the weight is exact. Where a class is masked it would be NaN: there each row of
    logits is a bias, and with x = 0 it is the bias's gradient that makes ‖(x, 1)‖₁ = 1.
    """
    logits = logits.to(DEVICE)
    options = dict(temperature=temperature, backend=backend)
    if logits.isfinite().all():
        rows = [head_scores(torch.eye(len(logits), dtype=logits.dtype, device=DEVICE), logits.T, **options)]
    else:
        zero = torch.zeros_like(logits[:1, :1])
        rows = [head_scores(zero, zero.expand(len(z), 1), z, include_bias=True, **options) for z in logits]
    return torch.cat([torch.stack([getattr(row, name) for name in NAMES]) for row in rows], 1).double().cpu()


def truth(logits, temperature=1.0):
    found = spread(logits, temperature)
    return torch.stack([found.entropy, found.sum_squares, 2 * found.gini / temperature, found.kl_uniform])


def assert_exact(got, expected, tolerances, absolute=0.0, names=("row",)):
    for name, values, truths, tolerance in zip(NAMES, got, expected, tolerances, strict=True):
        within = (values == truths) | ((values - truths).abs() <= tolerance * truths + absolute)  # inf too
        assert within.all(), (name, names[int(within.int().argmin())])


def groups(classes, most):
    """Rows of one temperature, 64 together where they are short: the products with one-hot rows are n² long."""
    cases = list(families(classes, most))
    for temperature, names, logits in by_temperature(cases) if classes <= 1000 else ((t, [n], z) for n, z, t in cases):
        masked = logits.isinf().any(1)
        for some in (masked, ~masked):
            chosen = some.nonzero()[:, 0].split(64)
            yield from ((temperature, [names[i] for i in rows], logits[rows]) for rows in chosen if len(rows))


@pytest.mark.parametrize(
    ("classes", "most"), [(1, None), (2, None), (10, None), (150, 2000), (1000, 1000), (32000, 60), (128256, 8)]
)
def test_hard_rows(classes, most):
    """What is right in float64, rounded to float32."""
    for temperature, names, logits in groups(classes, most):
        got = of_logits(logits, temperature)
        assert_exact(got, truth(logits, temperature), [ROUNDED] * 4, LEAST, names)


@pytest.mark.parametrize(("classes", "most"), [(2, 2000), (10, 2000), (1000, 200), (32000, 20)])
def test_hard_rows_in_float64(classes, most):
    """(z − m)/T has an error of 2⁻⁵²·|(z − m)/T|, and where that is beyond 745 its exp is 0: 2e-13 in a probability,
    twice that in its square. Sums of C terms add C·2⁻⁵³ each. In the KL divergence the mean, of up to 64, adds
    64·C·2⁻⁵³, and the change from the series to expm1 6e-11 (_torch_spread.py)."""
    sums = 4e-13 + classes * 2.0**-51
    for temperature, names, logits in groups(classes, most):
        got, expected = of_logits(logits.double(), temperature), truth(logits, temperature)
        assert_exact(got, expected, [sums, sums, sums, 6e-11 + classes * 2.0**-47], 1e-300, names)


@pytest.mark.parametrize(("classes", "most"), [(2, 200), (10, 400), (150, 30)])
def test_the_float64_truths_against_sixty_digits(classes, most):
    with mpmath.workdps(60):
        for name, logits, temperature in families(classes, most):
            exact = exact_spread(logits[0].tolist(), temperature)
            for got, expected in zip(spread(logits, temperature), exact, strict=True):
                assert got.item() == expected or abs(got.item() - expected) <= 2e-13 * expected + 1e-40, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("classes", [3, 300])
def test_the_bounds_are_reached(backend, classes, temperature):
    """By equal logits and by one class with all the probability; also where all but one class are masked."""
    one = torch.full((1, classes), -torch.inf)
    one[0, 1] = 2.0
    rows = torch.cat([torch.full((1, classes), 7.0), one.nan_to_num(neginf=-1e6), one])
    got = torch.cat([of_logits(z[None], temperature, backend) for z in rows], 1)
    expected = torch.tensor(
        [[math.log(classes), 0, 0], [1 / classes, 1, 1], [2 * (1 - 1 / classes) / temperature, 0, 0]]
    )
    assert relative(got[:3], expected) <= 2e-6
    assert got[3, 0] == 0 and got[3, 2] == torch.inf
    assert relative(got[3, 1:2], truth(rows[1:2], temperature)[3]) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class(backend):
    got = head_scores(torch.ones(2, 3, device=DEVICE), torch.ones(1, 3, device=DEVICE), backend=backend)
    assert [getattr(got, name).tolist() for name in NAMES] == [[0, 0], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [10, 300])
def test_bad_rows_are_nan_alone_and_an_empty_batch_is_empty(backend, classes):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((5, 6), (classes, 6), (classes,)))
    good = head_scores(x, w, b, backend=backend)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    got = head_scores(x, w, b, backend=backend)
    for name in NAMES:
        field, expected = getattr(got, name), getattr(good, name)
        assert field[[1, 3]].isnan().all() and torch.equal(field[[0, 2, 4]], expected[[0, 2, 4]])
        assert getattr(head_scores(x[:0], w, b, backend=backend), name).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("include_bias", [False, True])
def test_exgrad_is_the_mean_of_the_gradients_it_is_named_for(backend, include_bias):
    g = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 5), (7, 5), (7,)))
    log_p = lambda w, b, x: torch.log_softmax((w @ x + b) / 1.7, 0)  # noqa: E731
    expected = []
    for row in x:
        of_w, of_b = torch.func.jacrev(log_p, argnums=(0, 1))(w, b, row)
        norms = of_w.abs().sum((1, 2)) + (of_b.abs().sum(1) if include_bias else 0.0)
        expected.append((log_p(w, b, row).exp() * norms).sum())
    inputs = (t.float().to(DEVICE) for t in (x, w, b))
    got = head_scores(*inputs, temperature=1.7, include_bias=include_bias, backend=backend)
    torch.testing.assert_close(got.exgrad.double().cpu(), torch.stack(expected), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_those_of_token_statistics(reduction):
    """Neither reduction nor include_bias changes what is of p alone."""
    g = torch.Generator().manual_seed(2)
    x, w, b = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((9, 5), (40, 5), (40,)))
    got = head_scores(x, w, b, temperature=0.7, reduction=reduction, include_bias=True)
    tokens = token_statistics(x, w, torch.zeros(9, dtype=torch.int64, device=DEVICE), b, temperature=0.7)
    torch.testing.assert_close(got.entropy, tokens.entropy, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(got.sum_squares, tokens.sum_squares, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_long_row_is_read_in_parts(dtype):
    """As a head makes it; the maximum stands in the second part."""
    g = torch.Generator().manual_seed(3)
    w, b = torch.randn(400_000, 2, generator=g, dtype=dtype), torch.zeros(400_000, dtype=dtype)
    b[250_000] = 9.0
    z = torch.nn.functional.linear(torch.ones(1, 2, dtype=dtype), w, b)
    got = head_scores(torch.ones(1, 2, dtype=dtype, device=DEVICE), w.to(DEVICE), b.to(DEVICE), backend="torch")
    expected = truth(z) * torch.tensor([1.0, 1.0, 2.0, 1.0], dtype=torch.float64)[:, None]  # ‖x‖₁ = 2
    assert got.prediction.item() == 250_000
    for name, value in zip(NAMES, expected, strict=True):  # three roundings of logits up to 20 by whoever multiplies
        assert relative(getattr(got, name), value) <= 2e-6 + 2 * 3 * 20 * 2.0**-24


def test_gradcheck_of_exgrad_with_the_biass_gradient():
    """Without it: test_operator.py, with the other fields."""
    g = torch.Generator().manual_seed(4)
    shapes = (4, 5), (6, 5), (6,)
    inputs = [torch.randn(*s, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_() for s in shapes]
    call = lambda *a: head_scores(*a, temperature=1.3, include_bias=True).exgrad  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)


@pytest.mark.parametrize("gap", [1e-3, 5.0, 20.0, 80.0])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("field", NAMES)
def test_gradients_of_saturated_and_near_uniform_rows(field, classes, gap):
    """To 1e-5 in every element, down to where float32 ends."""
    z = 1e-4 * torch.randn(classes, generator=torch.Generator().manual_seed(classes))
    z[1] = z.max() + gap
    bias = z.to(DEVICE).requires_grad_()
    zero = torch.zeros(1, 1, device=DEVICE)
    scores = head_scores(zero, zero.expand(classes, 1), bias, include_bias=True)
    (gradient,) = torch.autograd.grad(getattr(scores, field).sum(), bias)
    with mpmath.workdps(60):
        terms = [mpmath.exp(value) for value in z.tolist()]
        p = [term / sum(terms) for term in terms]
        entropy, squares = -sum(v * mpmath.log(v) for v in p), sum(v * v for v in p)
        expected = {
            "entropy": [-v * (mpmath.log(v) + entropy) for v in p],
            "sum_squares": [2 * v * (v - squares) for v in p],
            "exgrad": [-4 * v * (v - squares) for v in p],
            "kl_uniform": [v - mpmath.mpf(1) / classes for v in p],
        }[field]
    np.testing.assert_allclose(gradient.cpu(), [float(v) for v in expected], rtol=1e-5, atol=1e-37)


def test_gradients_with_masked_classes_are_finite():
    x, w, b = torch.randn(2, 3), torch.randn(5, 3), torch.zeros(5)
    b[[0, 3]] = -torch.inf
    inputs = [t.to(DEVICE).requires_grad_() for t in (x, w, b)]
    scores = head_scores(*inputs)
    assert scores.kl_uniform.isinf().all()
    total = scores.entropy + scores.sum_squares + scores.exgrad
    for gradient in torch.autograd.grad(total.sum(), inputs):
        assert gradient.isfinite().all()
