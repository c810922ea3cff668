"""Every target and norm, and token statistics, against float64 autograd and on rows made to be hard."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from gradnorm_fast import _torch_targets, fast_gradnorm, gradnorm_from_logits, token_statistics
from gradnorm_fast._torch_forward import MEMORY, Budget
from gradnorm_fast.reference import autograd_gradnorm

from conftest import DEVICE
from families import deviation_norm, hard_logits, residual_norm
from measure import peak_extra_memory
from problems import relative
from spread import spread

TARGETS = ["uniform", "predicted", "labels"]
NORMS = [1.0, 2.0, math.inf, 0.5, 3.0, 4.0]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def problem(b, d, c, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((b, d), (c, d), (c,)))
    labels = torch.randint(0, c, (b,), generator=g)
    return x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), labels.to(DEVICE)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_autograd(target, p, dtype):
    for shape, temperature, include_bias in itertools.product([(5, 7, 2), (3, 20, 300)], [1.0, 2.5], [False, True]):
        x, w, bias, labels = problem(*shape, dtype)
        options = dict(p=p, temperature=temperature, include_bias=include_bias)
        options["target"] = labels if target == "labels" else target
        expected = autograd_gradnorm(x.double(), w.double(), bias.double(), **options)
        got = fast_gradnorm(x, w, bias, **options)
        # 8 float32 roundings of logits up to 30, which move log p, and for p = 1/2 the norm twice as much
        assert relative(got, expected) < (1e-11 if dtype == torch.float64 else 2e-5)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        logits = torch.nn.functional.linear(x, w, bias)
        expected = gradnorm_from_logits(x.double(), logits.double(), **options)
        assert relative(gradnorm_from_logits(x, logits, **options), expected) < 2e-5


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("classes", [2, 10, 1000, 32000])
def test_hard_rows_of_given_logits(classes, p):
    """1e-6 for the sums, 5e-5 below p = 1, where the powers of small deviations dominate; and for a label the rounding
    of (z − m)/T, which moves its probability."""
    tolerance = 1e-6 if p >= 1.0 else 5e-5
    x = torch.ones(2, 1, device=DEVICE)
    for name, logits, t in hard_logits(classes):
        options = dict(p=p, temperature=t)
        z = logits.to(DEVICE)
        assert relative(gradnorm_from_logits(x, z, **options) * t, deviation_norm(logits, t, p)) <= tolerance, name
        for label in (0, classes // 3, classes - 1):
            labels = torch.full((2,), label)
            truth = residual_norm(logits, labels, t, p)
            got = gradnorm_from_logits(x, z, target=labels.to(DEVICE), **options).cpu() * t
            assert ((got - truth).abs() <= tolerance * truth + 1e-37).all(), (name, label)
        truth = residual_norm(logits, logits.argmax(1), t, p)
        got = gradnorm_from_logits(x, z, target="predicted", **options).cpu() * t
        assert ((got - truth).abs() <= tolerance * truth + 1e-37).all(), name


@pytest.mark.parametrize("p", NORMS)
def test_where_the_label_has_all_the_probability(p):
    """1 − p_y from 1e-2 to 1e-30, where 1 − 2p_y + Σp² is 0; logits around ±3e4, where z/T would lose five digits."""
    for level, gap in itertools.product([0.0, 3e4, -3e4], [5.0, 20.0, 75.5]):
        temperature = 3.0 if level else 1.0
        z = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)) * temperature + level
        z[:, 7] = level + gap * temperature
        labels = torch.full((4,), 7)
        truth = residual_norm(z, labels, temperature, p)
        assert (truth.max() < 1e-29) == (gap > 70) or p < 1.0
        assert truth.max() > 0
        options = dict(p=p, temperature=temperature)
        ones = torch.ones(4, 1, device=DEVICE)
        for target in (labels.to(DEVICE), "predicted"):
            got = gradnorm_from_logits(ones, z.to(DEVICE), target=target, **options) * options["temperature"]
            assert relative(got, truth) <= (1e-6 if p >= 1.0 else 5e-5)


def test_the_statistics_of_a_saturated_row():
    """1 − p_y = 1e-30: to 1e-6 and the rounding of z_y − m, where the usual formula gives 0."""
    z = torch.full((1, 32000), 0.0)
    z[0, 3] = 79.5
    log_rest = math.log(31999) - 79.5  # of 1 − p_y, since p_y is 1 to 30 digits
    x, w = torch.ones(1, 1, device=DEVICE), z.T.contiguous().to(DEVICE)
    found = token_statistics(x, w, torch.tensor([3], device=DEVICE))
    tolerance = 1e-6 + 6e-8 * 79.5
    assert math.exp(log_rest) < 1.1e-30
    assert math.isclose(-found.log_prob.item(), math.exp(log_rest), rel_tol=tolerance)
    assert math.isclose(found.residual_norm.item(), math.exp(log_rest) * (1 + 1 / 31999) ** 0.5, rel_tol=tolerance)
    entropy = math.exp(log_rest) * (1 - log_rest + math.log(31999))
    assert math.isclose(found.entropy.item(), entropy, rel_tol=tolerance)
    assert found.sum_squares.item() == 1.0
    assert (1 - 2 * found.log_prob.exp() + found.sum_squares).item() == 0.0


@pytest.mark.parametrize("tiles", ["torch", "torch in many tiles", "triton"])
def test_the_entropy_where_another_class_has_nearly_all_the_probability(monkeypatch, tiles):
    """From 1 − 1e-12 to 1 − 1e-30 of it: 2e-6 for float32 sums. Every (z_c − m)/T is exact, a multiple of 1/4."""
    g = torch.Generator().manual_seed(0)
    gaps, top = torch.tensor([35.0, 45.0, 60.0, 75.0]), torch.tensor([0, 299, 150, 7])
    z = (torch.randint(-8, 9, (4, 300), generator=g) / 4 - gaps[:, None]).scatter_(1, top[:, None], 0.0)
    truth = spread(z, 1.0)
    assert (truth.gini / 2 > 1e-30).all() and (truth.gini / 2 < 1e-12).all()  # 1 − Σp² is 2(1 − p) near p = 1
    if tiles == "torch in many tiles":
        monkeypatch.setattr(_torch_targets, "budget_of", lambda device: Budget(4 * 4 * 14, 64, 4 * 3 * 4))
    x, second = torch.eye(4, device=DEVICE), z.scatter(1, top[:, None], -torch.inf).argmax(1)
    for labels, temperature in itertools.product((second, (top + 1) % 300, top), (1.0, 4.0)):
        w, chosen = (z * temperature).T.contiguous().to(DEVICE), labels.to(DEVICE)
        found = token_statistics(x, w, chosen, temperature=temperature, backend=tiles.split()[0])
        assert relative(found.entropy, truth.entropy) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_token_statistics(dtype, temperature):
    x, w, bias, labels = problem(9, 12, 400, dtype)
    log_p = torch.log_softmax(torch.nn.functional.linear(*(t.double() for t in (x, w, bias))) / temperature, 1)
    p, expected = log_p.exp(), log_p.gather(1, labels[:, None])[:, 0]
    found = token_statistics(x.view(3, 3, 12), w, labels.view(3, 3), bias, temperature=temperature)
    assert found.log_prob.shape == (3, 3)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert relative(found.log_prob.flatten(), expected) < tolerance
    assert relative(found.entropy.flatten(), -(p * log_p).sum(1)) < tolerance
    assert relative(found.sum_squares.flatten(), p.square().sum(1)) < tolerance
    one_hot = torch.nn.functional.one_hot(labels, 400)
    assert relative(found.residual_norm.flatten(), (p - one_hot).norm(dim=1)) < tolerance


@pytest.mark.parametrize("target", TARGETS)
def test_classes_in_many_tiles_and_rows_in_many_blocks(monkeypatch, target):
    x, w, bias, labels = problem(13, 3, 21, torch.float16)
    bias[::3] = -torch.inf
    z = torch.nn.functional.linear(*(t.double() for t in (x, w, bias)))
    labels = labels - labels % 3 + 1
    monkeypatch.setattr(_torch_targets, "budget_of", lambda device: Budget(4 * 4 * 14, 64, 4 * 3 * 4))
    for p in (1.0, 2.0, math.inf, 0.5):
        norm = torch.linalg.vector_norm(x.double(), p, 1)
        chosen = labels if target == "labels" else target
        if target != "uniform":
            truth = residual_norm(z.cpu(), (labels if target == "labels" else z.argmax(1)).cpu(), 1.0, p)
            got = fast_gradnorm(x, w, bias, target=chosen, p=p)
            assert relative(got.cpu(), norm.cpu() * truth) < 2e-5
            logits = z.float()
            assert torch.allclose(gradnorm_from_logits(x.float(), logits, target=chosen, p=p), got, rtol=2e-5)
    found = token_statistics(x, w, labels, bias)
    log_p = torch.log_softmax(z, 1)
    assert relative(found.entropy, -(log_p.exp() * log_p).nansum(1)) < 2e-5
    x, w, bias = (t.double().requires_grad_() for t in (x[:3], w, torch.zeros_like(bias)))
    for p in (1.0, 2.0):
        chosen = labels[:3] if target == "labels" else target
        assert torch.autograd.gradcheck(lambda *a: fast_gradnorm(*a, target=chosen, p=p), (x, w, bias))  # noqa: B023
    assert torch.autograd.gradcheck(lambda x, w, b: token_statistics(x, w, labels[:3], b)[:2], (x, w, bias))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("include_bias", [False, True])
def test_gradcheck(target, p, include_bias):
    x, w, bias, labels = problem(4, 5, 6)
    options = dict(p=p, temperature=1.3, include_bias=include_bias, target=labels if target == "labels" else target)
    inputs = tuple(t.requires_grad_() for t in (x, w, bias))
    assert torch.autograd.gradcheck(lambda *a: fast_gradnorm(*a, **options), inputs)
    logits = torch.nn.functional.linear(x, w, bias).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: gradnorm_from_logits(*a, **options), (x, logits))


def test_gradients_of_token_statistics():
    """Backward, forward mode and torch.func, with an ignored row and a masked class."""
    x, w, bias, labels = problem(4, 5, 6)
    labels[1], bias[labels[0] - 1] = -100, -torch.inf
    call = lambda x, w, b=None: token_statistics(x, w, labels, b, temperature=1.3)[:2]  # noqa: E731
    for few in ((x, w), (x, w, bias.clamp(-9))):
        inputs = tuple(t.clone().requires_grad_() for t in few)
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
        for i in range(len(inputs)):
            alone = tuple(t.detach().requires_grad_(i == j) for j, t in enumerate(inputs))
            assert torch.autograd.gradcheck(call, alone, check_forward_ad=True)
    every = (0, 1, 2)
    forward, backward = (jac(call, argnums=every)(x, w, bias) for jac in (torch.func.jacfwd, torch.func.jacrev))
    torch.testing.assert_close(forward, backward)
    along = lambda x, dx: torch.func.jvp(lambda x: call(x, w, bias), (x,), (dx,))[1]  # noqa: E731
    dx = torch.randn(3, *x.shape, dtype=x.dtype, device=DEVICE)
    several = torch.func.vmap(along)(torch.stack([x, 2 * x, -x]), dx)
    for i, scale in enumerate((1, 2, -1)):
        torch.testing.assert_close(tuple(t[i] for t in several), along(scale * x, dx[i]))


def test_squares_and_residual_norms_are_not_differentiable():
    x, w, bias, labels = problem(4, 5, 6)
    found = token_statistics(x.clone().requires_grad_(), w, labels, bias)
    assert [t.requires_grad for t in found] == [True, True, False, False]
    with forward_ad.dual_level():
        found = token_statistics(forward_ad.make_dual(x, torch.ones_like(x)), w, labels, bias)
        assert [forward_ad.unpack_dual(t).tangent is not None for t in found] == [True, True, False, False]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_gradients_of_saturated_and_of_uniform_rows(target, p):
    """In float32 on given logits, against autograd in float64 where that is accurate, at 1 − p_y = 1e-6."""
    z = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    z[0] *= 1e-3
    z[1, 5] += 14.0
    z[2] *= 4.0
    labels = torch.tensor([3, 5, 0], device=DEVICE)
    z, x = z.to(DEVICE), torch.ones(3, 1, device=DEVICE)
    double = z.double().requires_grad_()
    q = torch.full_like(double, 1 / 40).detach()
    if target != "uniform":
        q = torch.nn.functional.one_hot(labels if target == "labels" else z.argmax(1), 40).double()
    norm = torch.linalg.vector_norm(torch.softmax(double, 1) - q, p, 1)
    (expected,) = torch.autograd.grad(norm.sum(), double)
    z.requires_grad_()
    chosen = labels if target == "labels" else target
    (got,) = torch.autograd.grad(gradnorm_from_logits(x, z, target=chosen, p=p).sum(), z)
    assert ((got - expected).abs().amax(1) <= 2e-6 * expected.abs().amax(1)).all()


def test_other_norms_refuse_gradients_in_the_forward():
    x, w, bias, labels = problem(4, 5, 6)
    for target, p in itertools.product(["uniform", "predicted", labels], [math.inf, 3.0, 0.5]):
        assert fast_gradnorm(x, w, bias, target=target, p=p).isfinite().all()
        with pytest.raises(NotImplementedError, match="p: gradients are implemented for p = 1 and p = 2"):
            fast_gradnorm(x, w.clone().requires_grad_(), bias, target=target, p=p)
        with pytest.raises(NotImplementedError, match="p: gradients"):
            torch.func.grad(lambda x: fast_gradnorm(x, w, target=target, p=p).sum())(x)  # noqa: B023


@pytest.mark.parametrize("target", ["uniform", "predicted", "labels"])
@pytest.mark.parametrize("p", NORMS)
def test_features_of_every_size(target, p):
    """‖x‖_p, whose powers would overflow or vanish; zeros; one feature."""
    for scale, depth in itertools.product([1e-30, 1.0, 1e30], [1, 9]):
        x, w, _, labels = problem(3, depth, 5, torch.float32)
        x, w = x * scale, w / scale
        x[1] = 0.0
        chosen = labels if target == "labels" else target
        for include_bias in (False, True):
            bias = torch.zeros(5, device=DEVICE)
            options = dict(target=chosen, p=p, include_bias=include_bias)
            expected = fast_gradnorm(x.double(), w.double(), bias.double(), **options)
            assert relative(fast_gradnorm(x, w, bias, **options), expected) < 5e-5


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 0.5])
def test_ignored_rows_rows_that_are_not_finite_and_single_classes(p):
    x, w, bias, labels = problem(5, 4, 6, torch.float32)
    labels[2] = -100
    options = dict(target=labels, p=p)
    good = fast_gradnorm(x, w, bias, **options)
    assert good[2] == 0 and (good[[0, 1, 3, 4]] > 0).all()
    bad = x.clone()
    bad[1, 0], bad[2, 0], bad[3, 0] = torch.nan, torch.nan, torch.inf
    got = fast_gradnorm(bad, w, bias, **options)
    assert got[[1, 3]].isnan().all() and torch.equal(got[[0, 2, 4]], good[[0, 2, 4]])
    assert fast_gradnorm(bad, w, bias, target="predicted", p=p).isnan().tolist() == [False, True, True, True, False]
    logits = torch.zeros(5, 6, device=DEVICE)
    for position in (0, 5):
        logits[1, position] = torch.inf
        logits[3, position] = torch.nan
        for target in (torch.zeros_like(labels), "predicted"):
            isnan = gradnorm_from_logits(x, logits, target=target, p=p).isnan()
            assert isnan.tolist() == [False, True, False, True, False]
    assert not fast_gradnorm(x, w[:1], bias[:1], target="predicted", p=p).any()
    assert not fast_gradnorm(x, w[:1], bias[:1], target=torch.zeros_like(labels), p=p).any()
    assert fast_gradnorm(x[:0], w, bias, target=labels[:0], p=p).shape == (0,)
    alone = torch.full((6,), -torch.inf, device=DEVICE).index_fill_(0, torch.tensor([2], device=DEVICE), 0.0)
    assert not fast_gradnorm(x, w, alone, target="predicted", p=p).any()  # one class is not masked


def test_ties_take_the_lowest_class():
    z = torch.zeros(1, 300, device=DEVICE)
    z[0, [7, 250]] = 3.0
    x = torch.ones(1, 1, device=DEVICE)
    expected = gradnorm_from_logits(x, z, target=torch.tensor([7], device=DEVICE), p=2.0)
    assert torch.equal(gradnorm_from_logits(x, z, target="predicted", p=2.0), expected)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(gradnorm_from_logits(x, z, target="predicted").sum(), z)
    assert grad[0, 7] < 0 < grad[0, 250]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(0, 4),
    st.floats(0.01, 1e4),
)
def test_invariants(rows, label, temperature):
    z = torch.tensor(rows, device=DEVICE)
    labels = torch.full((len(z),), label, device=DEVICE)
    found = token_statistics(z, torch.eye(5, device=DEVICE), labels, temperature=temperature)
    assert (found.log_prob <= 0).all()
    assert (found.entropy >= 0).all() and (found.entropy <= math.log(5) * (1 + 2e-6)).all()
    assert (found.sum_squares >= 0.2 * (1 - 2e-6)).all() and (found.sum_squares <= 1 + 2e-6).all()
    assert torch.allclose(
        found.residual_norm * z.double().norm(dim=1) / temperature,  # float32 would square small features to 0
        fast_gradnorm(z, torch.eye(5, device=DEVICE), target=labels, p=2.0, temperature=temperature).double(),
        rtol=1e-5,
        atol=1e-37,
    )
    order = torch.tensor([4, 3, 2, 1, 0], device=DEVICE)
    one, two, most = (
        gradnorm_from_logits(torch.ones_like(z[:, :1]), z, target=labels, p=p, temperature=temperature) * temperature
        for p in (1.0, 2.0, math.inf)
    )
    turned = gradnorm_from_logits(torch.ones_like(z[:, :1]), z[:, order], target=4 - labels, temperature=temperature)
    assert torch.allclose(turned * temperature, one, rtol=2e-6, atol=1e-37)
    assert (one <= 2 + 4e-6).all() and (most <= two * (1 + 2e-6)).all() and (two <= one * (1 + 2e-6)).all()


X, W, LABELS = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3])
REFUSALS = [
    (dict(target="label"), ValueError, 'target: expected "uniform", "predicted" or int64 labels, got \'label\''),
    (dict(target=3), TypeError, "target: expected .* got int"),
    (dict(target=LABELS.int()), TypeError, "target: expected labels of dtype int64, got torch.int32"),
    (dict(target=LABELS[:1]), ValueError, r"target: expected labels of shape \(2,\), got \(1,\)"),
    (dict(target=LABELS + 1), ValueError, "target: expected labels 0 … 3, or -100"),
    (dict(target=-LABELS), ValueError, "target: expected labels 0 … 3, or -100"),
    (dict(target=LABELS.to("meta")), ValueError, "target: expected the device of features, cpu, got meta"),
    (dict(target="predicted", reduction="sum"), ValueError, "reduction: .* uniform target only"),
    (dict(target=LABELS, reduction="sum"), ValueError, "reduction: .* uniform target only"),
    (dict(p=0.05), ValueError, "p: expected 0.1 … 64, or inf, got 0.05"),
    (dict(p=65), ValueError, "p: expected"),
    (dict(p=math.nan), ValueError, "p: expected"),
    (dict(p="2"), TypeError, "p: expected a number, got str"),
    (dict(p=True), TypeError, "p: expected a number, got bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS, ids=lambda v: str(v)[:40])
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        fast_gradnorm(X, W, **change)
    with pytest.raises(error, match=message):
        gradnorm_from_logits(X, torch.ones(2, 4), **change)
    with pytest.raises(error, match=message):
        autograd_gradnorm(X, W, **change)


def test_refusals_of_token_statistics():
    for change, error, message in (
        (dict(labels="predicted"), TypeError, "labels: expected int64 labels, got str"),
        (dict(labels=LABELS.float()), TypeError, "labels: expected labels of dtype int64"),
        (dict(labels=LABELS[None]), ValueError, r"labels: expected labels of shape \(2,\)"),
        (dict(labels=LABELS + 2), ValueError, "labels: expected labels 0 … 3"),
        (dict(temperature=0), ValueError, "temperature"),
        (dict(backend="cuda"), ValueError, "backend"),
        (dict(weight=W[:, :2]), ValueError, "features: expected shape"),
    ):
        with pytest.raises(error, match=message):
            token_statistics(**dict(features=X, weight=W, labels=LABELS) | change)


def test_the_triton_backend_says_what_it_does_not_take():
    x, w, labels = X.to(DEVICE), W.to(DEVICE), LABELS.to(DEVICE)
    double = "backend: the kernel for labels and the predicted target takes float16, bfloat16 and float32, not float64"
    with pytest.raises(ValueError, match=double):
        fast_gradnorm(x.double(), w.double(), backend="triton", target="predicted")
    with pytest.raises(ValueError, match=double):
        token_statistics(x.double(), w.double(), labels, backend="triton")
    with pytest.raises(ValueError, match="backend: the kernel for labels and the predicted target takes a weight"):
        gradnorm_from_logits(x, x @ w.T, target=labels, backend="triton")


def test_opcheck():
    x, w, bias, labels = problem(4, 5, 6, torch.float32)
    inputs = tuple(t.requires_grad_() for t in (x, w, bias))
    for target, given_labels, p in (("uniform", None, 2.0), ("predicted", None, 1.0), ("labels", labels, 2.0)):
        rest = (given_labels, target, p, 1.5, "mean", False, "auto", False)
        torch.library.opcheck(torch.ops.gradnorm_fast.scores.default, (x, None, w, bias, *rest))
    torch.library.opcheck(torch.ops.gradnorm_fast.token_statistics.default, (*inputs, labels, 1.5, "torch"))
    grad = torch.ones(2, 4, device=DEVICE)
    arguments = (grad, *(t.detach() for t in inputs), labels, 1.5, [True, True, False])
    torch.library.opcheck(torch.ops.gradnorm_fast.token_statistics_backward.default, arguments)


def test_compile_and_export(tmp_path):
    x, w, bias, labels = problem(4, 5, 6, torch.float32)
    torch._dynamo.reset()

    class Head(torch.nn.Linear):
        def forward(self, x, labels):
            w, b = self.weight, self.bias
            norms = [fast_gradnorm(x, w, b, target=t, p=2.0) for t in ("uniform", "predicted", labels)]
            return norms, token_statistics(x, w, labels, b)

    module = Head(5, 6, device=DEVICE).requires_grad_(False)
    module.load_state_dict({"weight": w, "bias": bias})
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    rows = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(module, (x, labels), dynamic_shapes=(rows, rows))
    torch.export.save(program, tmp_path / "head.pt2")
    loaded = torch.export.load(tmp_path / "head.pt2").module()
    x, labels = torch.cat([x, x]), torch.cat([labels, labels])
    norms, found = module(x, labels)
    for got in (compiled(x, labels), loaded(x, labels)):
        assert all(torch.equal(a, b) for a, b in zip([*got[0], *got[1]], [*norms, *found], strict=True))


def test_torch_func():
    x, w, bias, labels = problem(4, 5, 6)
    for target in ("predicted", labels):
        per_row = torch.func.vmap(
            lambda x, y, t=target: fast_gradnorm(x, w, bias, target=t if isinstance(t, str) else y, p=2.0)
        )
        torch.testing.assert_close(per_row(x, labels), fast_gradnorm(x, w, bias, target=target, p=2.0))
    total = lambda x, y: token_statistics(x, w, y, bias).log_prob.sum()  # noqa: E731
    expected = torch.func.grad(total)(x, labels)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x, labels), expected)
    log_p = torch.func.grad(
        lambda x: torch.log_softmax(torch.nn.functional.linear(x, w, bias), 1).gather(1, labels[:, None]).sum()
    )
    torch.testing.assert_close(log_p(x), expected)


@pytest.mark.parametrize("classes", [1, 2, 40])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_token_statistics_are_nan_where_features_are_not_finite_and_only_there(backend, classes):
    """Where ‖x‖ alone overflows they are finite: they do not depend on it."""
    x, w, bias, labels = problem(8, 6, classes, torch.float32)
    x[0, 1], x[1, 1], x[2, 1], x[3] = math.nan, math.inf, -math.inf, math.inf
    x[4], x[4, 1] = math.inf, -math.inf
    x[5, :2], w[:, :2] = 3e38, 0.0
    found = torch.stack(token_statistics(x, w, labels, bias, backend=backend))
    assert found[:, :5].isnan().all() and found[:, 5:].isfinite().all()


def test_what_others_compute():
    """By the formulas of DeepCore (GraNd, EL2N), verl (Σπ², the weight of its optimal token baseline) and ExGrad."""
    x, w, bias, labels = problem(6, 8, 5)
    z = torch.nn.functional.linear(x, w, bias).requires_grad_()
    (delta,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, labels, reduction="sum"), z)
    gradients = torch.cat([delta, (x[:, None] * delta[:, :, None]).flatten(1)], 1)
    got = fast_gradnorm(x, w, bias, target=labels, p=2.0, include_bias=True)
    assert relative(got, gradients.norm(dim=1)) < 1e-12
    found = token_statistics(x, w, labels, bias)
    assert relative(found.residual_norm, delta.norm(dim=1)) < 1e-12
    squares = (torch.logsumexp(2.0 * z, 1) - 2.0 * torch.logsumexp(z, 1)).exp().detach()
    p = torch.softmax(z, 1).detach()
    assert relative(found.sum_squares, squares) < 1e-12
    assert relative(found.residual_norm**2, 1 - 2 * p.gather(1, labels[:, None])[:, 0] + squares) < 1e-12
    every = [autograd_gradnorm(x, w, bias, target=torch.full_like(labels, y)) for y in range(5)]
    exgrad = (p * torch.stack(every, 1)).sum(1)  # E ‖∂ log p_y/∂W‖₁, y drawn from p
    found = token_statistics(x, w, p.argmax(1), bias)
    gini = -2 * found.log_prob.expm1() - found.residual_norm**2  # 1 − Σp², of the largest p too
    assert relative(2 * x.abs().sum(1) * gini, exgrad) < 1e-12


def test_grad_uncertainty_of_pytorch_ood():
    detector = pytest.importorskip("pytorch_ood.detector")
    x, w, bias, _ = problem(6, 8, 5, torch.float32)
    head = torch.nn.Linear(8, 5).to(DEVICE)
    head.load_state_dict({"weight": w, "bias": bias})
    got = -(fast_gradnorm(x, w, bias, p=2.0, reduction="sum", include_bias=True) ** 2)
    assert relative(got, detector.GradUncertainty(head).predict(x)) < 1e-5


def test_autocast_casts_as_linear_does():
    x, w, _, labels = problem(300, 64, 50, torch.float32)
    halves = x.bfloat16(), w.bfloat16()
    for options in (dict(p=2.0), dict(target=labels), dict(target="predicted", p=2.0)):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = fast_gradnorm(x, w, **options)
        assert torch.equal(got, fast_gradnorm(*halves, **options))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = token_statistics(x, w, labels)
    assert all(torch.equal(a, b) for a, b in zip(found, token_statistics(*halves, labels), strict=True))


def test_batch_invariance_on_request(batch_invariant):
    x, w, bias, labels = problem(40, 100, 300, torch.float32)
    some = slice(17, 20)
    for target in TARGETS:
        whole = fast_gradnorm(x, w, bias, target=labels if target == "labels" else target, p=2.0)
        few = fast_gradnorm(x[some], w, bias, target=labels[some] if target == "labels" else target, p=2.0)
        assert torch.equal(few, whole[some])
    whole, few = token_statistics(x, w, labels, bias), token_statistics(x[some], w, labels[some], bias)
    assert all(torch.equal(a, b[some]) for a, b in zip(few, whole, strict=True))


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory_is_bounded(dtype):
    x, w, labels = random(1024, 256, dtype=dtype), random(20000, 256, dtype=dtype), torch.arange(1024)
    for p in (1.0, 2.0, 0.5):
        for target in ("uniform", "predicted", labels):
            assert peak_extra_memory(lambda: fast_gradnorm(x, w, target=target, p=p)) <= MEMORY  # noqa: B023
    assert peak_extra_memory(lambda: token_statistics(x, w, labels)) <= MEMORY
    many, few = random(300000, 4, dtype=dtype), random(3, 4, dtype=dtype)
    assert peak_extra_memory(lambda: fast_gradnorm(many, few, target="predicted", p=2.0)) <= MEMORY


def test_extra_memory_of_the_backward_is_bounded():
    """512 x 64 x 50,000: 100 MiB of logits."""
    x, w, labels = random(512, 64).requires_grad_(), random(50000, 64).requires_grad_(), torch.arange(512)
    for target, p in (("uniform", 2.0), ("predicted", 1.0), (labels, 2.0)):
        scores = fast_gradnorm(x, w, target=target, p=p).sum()
        assert peak_extra_memory(lambda: torch.autograd.grad(scores, (x, w))) <= MEMORY  # noqa: B023


def test_extra_memory_of_token_statistics_and_their_gradients_is_bounded():
    """512 x 1024 x 50,000: 100 MiB of logits, and 200 MiB of weight, whose gradient is the result."""
    x, w, labels = random(512, 1024).requires_grad_(), random(50000, 1024).requires_grad_(), torch.arange(512)
    found = []
    assert peak_extra_memory(lambda: found.extend(token_statistics(x, w, labels)) or found) <= MEMORY
    loss = found[0].sum() + found[1].sum()
    assert peak_extra_memory(lambda: torch.autograd.grad(loss, (x, w))) <= MEMORY
    few, narrow = x[:, :64].detach(), w[:, :64].detach()  # forward mode takes three times the matmuls
    tangent = torch.ones_like(few)
    along = lambda: torch.func.jvp(lambda x: token_statistics(x, narrow, labels)[:2], (few,), (tangent,))[1]  # noqa: E731
    assert peak_extra_memory(along) <= MEMORY
