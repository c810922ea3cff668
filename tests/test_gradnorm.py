"""The score against float64 autograd and against float64 expm1 on rows made to be hard, on every path."""

import numpy as np
import pytest
import torch
import triton

from gradnorm_fast import HeadScores, fast_gradnorm, gradnorm_from_logits, head_scores
from gradnorm_fast.kernels import dispatch, rows
from gradnorm_fast.kernels.config import Shape
from gradnorm_fast.kernels.device import INTERPRETED, architecture
from gradnorm_fast.kernels.problem import Problem, Scores
from gradnorm_fast.reference import autograd_gradnorm

from conftest import DEVICE
from families import by_temperature, deviation, families, hard_logits
from problems import end_to_end_tolerance, problem, relative

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROUNDED = 2.0**-23  # of what is right in float64, rounded to float32: half of it, and a product
# Around each block boundary: of rows 16 and 64, of classes 16, 128, 256 and the class tiles beyond, of features 32, 64.
SHAPES = [
    (1, 1, 1), (3, 5, 1), (2, 1, 7), (15, 31, 2), (16, 32, 15), (17, 33, 16), (9, 64, 17), (5, 65, 127),
    (4, 63, 128), (3, 20, 129), (2, 30, 255), (2, 30, 256), (3, 31, 257), (65, 40, 300), (5, 130, 1000), (2, 8, 1025),
    (1, 4, 4097), (2, 3, 8193),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype"),  # of long rows, one kind of halves
    [(s, d) for s in SHAPES for d in DTYPES if s[2] < 4000 or d != torch.float16],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_autograd(backend, shape, dtype):
    x, w, bias = problem(*shape, dtype)
    expected = autograd_gradnorm(x.double(), w.double(), bias.double(), temperature=3.0)
    actual = fast_gradnorm(x, w, bias, temperature=3.0, backend=backend)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if shape[2] == 1:
        assert not actual.any()
    else:
        assert relative(actual, expected) <= end_to_end_tolerance(x, w, bias, 3.0, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("include_bias", [False, True])
def test_conventions(backend, reduction, include_bias):
    x, w, bias = problem(6, 12, 9, torch.float32)
    options = dict(temperature=0.7, reduction=reduction, include_bias=include_bias)
    expected = autograd_gradnorm(x.double(), w.double(), bias.double(), **options)
    assert relative(fast_gradnorm(x, w, bias, backend=backend, **options), expected) < 3e-6
    logits = torch.nn.functional.linear(x, w, bias)
    assert relative(gradnorm_from_logits(x, logits, backend=backend, **options), expected) < 3e-6


@pytest.mark.parametrize(
    ("classes", "most"),
    [(2, None), (10, None), (150, 2000), (1000, 1000), (32000, 200), (128256, 60), (786432, 15)],
)
def test_hard_rows_of_given_logits(classes, most):
    """In float64 until the score is rounded to float32, on a GPU too."""
    x = torch.ones(1, 1, device=DEVICE)
    for name, logits, temperature in families(classes, most):
        score = gradnorm_from_logits(x, logits.to(DEVICE), temperature=temperature, backend="torch")
        assert relative(score, deviation(logits, temperature)) <= ROUNDED, name


@pytest.mark.parametrize(("classes", "most"), [(2, 2000), (10, 2000), (1000, 200), (32000, 20)])
def test_hard_rows_of_given_float64_logits(classes, most):
    x = torch.ones(1, 1, dtype=torch.float64, device=DEVICE)
    for name, logits, temperature in families(classes, most):
        score = gradnorm_from_logits(x, logits.double().to(DEVICE), temperature=temperature, backend="torch")
        assert relative(score, deviation(logits, temperature)) <= classes * 2.0**-51 + 1e-14, name  # 1e-14: the oracle


@pytest.mark.parametrize("classes", [2, 10, 1000, 2000, 3500, 21843, 128256])
def test_hard_rows_of_given_logits_by_kernels(classes):
    """A selection: test_kernels.py has more. In the interpreter a program costs its operations, however many rows it
    has: they go together there, each computed as if alone."""
    for temperature, names, logits in by_temperature(hard_logits(classes, rows=1)):
        if INTERPRETED and classes > 10000 and temperature != 1.0:
            continue  # a second each, for what shorter rows show as well
        assert_rows_kernel_is_right(temperature, names, logits, 1e-6 if DEVICE == "cpu" else 2e-6)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own errors")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("classes", "most"), [(10, 400), (1000, 200), (9000, 6)])
def test_hard_rows_by_kernels_where_exp_and_log_are_as_inexact_as_a_gpus(monkeypatch, classes, most, sign):
    """exp off by 2 ulp, and the logarithm by 2^-22 next to 1: there it is small, and that many digits are lost."""
    from triton.runtime.interpreter import InterpreterBuilder

    unary_op, random = InterpreterBuilder.unary_op, np.random.default_rng(classes)

    def inexact(self, arg, op):
        result = unary_op(self, arg, op)
        if op is np.exp:
            off = 2.0**-22 * random.integers(-1, 2, result.data.shape)
            result.data = (result.data * (1 + off)).astype(result.data.dtype)
        elif op is np.log:
            near = (arg.data > 0.5) & (arg.data < 2.0)
            result.data = np.where(near, result.data + sign * 2.0**-22, result.data).astype(result.data.dtype)
        return result

    monkeypatch.setattr(InterpreterBuilder, "unary_op", inexact)
    for temperature, names, logits in by_temperature(families(classes, most)):
        assert_rows_kernel_is_right(temperature, names, logits, 2e-6)


def assert_rows_kernel_is_right(temperature, names, logits, tolerance):
    x, out = torch.ones(len(names), 1, device=DEVICE), torch.empty(1, len(names), device=DEVICE)
    config = rows.configuration(Shape(1, logits.shape[1], 1, torch.float32, architecture(x.device), 0))
    if INTERPRETED:
        config = config._replace(block_b=triton.next_power_of_2(len(names)))
    given = Problem(x, None, None, logits=logits.to(DEVICE), temperature=temperature)
    dispatch.run(rows, given, Scores(out, None), config)
    for name, z, score in zip(names, logits, out[0], strict=True):
        assert relative(score[None], deviation(z[None], temperature)) <= tolerance, name


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_hard_rows_where_expm1_is_as_inexact_as_a_gpus(monkeypatch, classes, sign):
    """Off by up to 2 ulp of float64, all one way."""
    expm1_ = torch.Tensor.expm1_
    monkeypatch.setattr(torch.Tensor, "expm1_", lambda t: expm1_(t).mul_(1 + sign * 2.0**-51 * torch.rand_like(t)))
    x = torch.ones(1, 1, device=DEVICE)
    for name, logits, temperature in families(classes, 400 if classes <= 1000 else 60):
        score = gradnorm_from_logits(x, logits.to(DEVICE), temperature=temperature, backend="torch")
        assert relative(score, deviation(logits, temperature)) <= ROUNDED, name


def test_the_float64_oracle_of_hard_rows_against_fifty_digits():
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 50
    for name, logits, temperature in families(10, 400):
        z = [mpmath.mpf(v) / mpmath.mpf(temperature) for v in logits[0].tolist()]
        top = max(z)
        e = [mpmath.exp(v - top) for v in z]
        truth = mpmath.fsum(abs(v / mpmath.fsum(e) - mpmath.mpf(1) / 10) for v in e) / temperature
        got = deviation(logits, temperature)[0].item()
        assert abs(got - truth) <= 1e-9 * truth + mpmath.mpf(10) ** -40, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_head_scores_are_the_usual_baselines(backend, classes, temperature):
    x, w, bias = problem(7, 20, classes, torch.float32)
    scores = head_scores(x, w, bias, temperature=temperature, backend=backend)
    z = torch.nn.functional.linear(x.double(), w.double(), bias.double())
    assert torch.equal(scores.prediction, z.argmax(1)) and scores.prediction.dtype == torch.int64
    assert relative(scores.max_logit, z.amax(1)) < 3e-6
    assert relative(scores.msp, torch.softmax(z / temperature, 1).amax(1)) < 1e-5
    energy = temperature * torch.logsumexp(z / temperature, 1)  # may be near 0: then the logits' rounding is absolute
    torch.testing.assert_close(scores.energy.double(), energy, rtol=1e-5, atol=5e-6)
    assert relative(scores.feature_norm, x.double().abs().sum(1)) < 1e-6
    assert torch.equal(scores.gradnorm, scores.feature_norm * scores.output_norm)
    assert torch.equal(scores.gradnorm, fast_gradnorm(x, w, bias, temperature=temperature, backend=backend))


@pytest.mark.parametrize(("backend", "classes"), [("torch", 10), ("torch", 21843), ("triton", 10), ("triton", 300)])
def test_probability_and_energy_of_hard_rows(backend, classes):
    """Σ exp of many classes alike, added up in float32, would cost 2e-5 here and 1e-4 at C = 128256."""
    for t, names, logits in by_temperature(hard_logits(classes, rows=1)):
        x = torch.eye(len(names), device=DEVICE)  # row i of the logits is column i of the weight
        weight = logits.nan_to_num(neginf=0.0).T.to(DEVICE)
        scores = head_scores(x, weight, temperature=t, backend=backend)
        for i, (name, z) in enumerate(zip(names, logits.double(), strict=True)):
            got = HeadScores(*(field[i : i + 1].cpu() for field in scores))
            if z.isinf().any():  # no matmul makes −inf, a bias does
                got = head_scores(0 * x[:1], weight, z.float().to(DEVICE), temperature=t, backend=backend)
            m = z.amax()
            s = ((z - m) / t).exp().sum()
            assert relative(got.msp, 1 / s) <= 2e-6, name
            energy = m + t * s.log()
            assert ((got.energy.double().cpu() - energy).abs() <= 1e-6 * (m.abs() + energy.abs() + t)).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [10, 300, 9000])
def test_bad_rows_poison_themselves_alone(backend, classes):
    x, w, bias = problem(7, 6, classes, torch.float32)
    good = fast_gradnorm(x, w, bias, backend=backend)
    bad, others = torch.tensor([1, 3, 5]), torch.tensor([0, 2, 4, 6])
    x[bad, 3] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    scores = head_scores(x, w, bias, backend=backend)
    assert scores.gradnorm[bad].isnan().all() and torch.equal(scores.gradnorm[others], good[others])
    assert not scores.prediction[bad].any()
    finite_logits = torch.zeros(7, classes, device=DEVICE).index_fill_(1, torch.tensor([0], device=DEVICE), 1.0)
    scores = gradnorm_from_logits(x, finite_logits, backend=backend)
    assert scores[bad].isnan().all() and scores[others].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [10, 300])
def test_exact_zeros_and_masked_classes(backend, classes):
    x, w, bias = problem(3, 6, classes, torch.float32)
    assert not fast_gradnorm(torch.zeros_like(x), w, bias, backend=backend).any()
    assert not fast_gradnorm(x, torch.zeros_like(w), backend=backend).any()
    bias[::2] = -torch.inf
    expected = x.double().abs().sum(1) * deviation(torch.nn.functional.linear(x.double(), w.double(), bias.double()))
    assert relative(fast_gradnorm(x, w, bias, backend=backend), expected) < 1e-5
    assert fast_gradnorm(x[:0], w, bias, backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [10, 300])
def test_strides(backend, classes):
    x, w, bias = problem(6, 8, classes, torch.float32)
    expected = fast_gradnorm(x, w, bias, backend=backend)
    wide = torch.zeros(12, 24, device=DEVICE)
    wide[::2, 1::3] = x
    assert torch.allclose(fast_gradnorm(wide[::2, 1::3], w, bias, backend=backend), expected, rtol=1e-5)
    transposed = fast_gradnorm(x.T.contiguous().T, w.T.contiguous().T, bias, backend=backend)
    assert torch.allclose(transposed, expected, rtol=1e-5)
    expanded = fast_gradnorm(x[:1].expand(4, 8), w, bias[:1].expand(classes), backend=backend)
    assert torch.allclose(expanded, fast_gradnorm(x[:1], w, bias[:1].repeat(classes), backend=backend), rtol=1e-5)
    assert fast_gradnorm(x.reshape(2, 3, 8), w[:, :, None, None], bias, backend=backend).shape == (2, 3)
    assert fast_gradnorm(x[0], w, bias, backend=backend).shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [10, 1000])
def test_bitwise_the_same_from_run_to_run(backend, classes):
    x, w, bias = problem(70, 40, classes, torch.float32)
    first = fast_gradnorm(x, w, bias, backend=backend)
    repeats = 1 if INTERPRETED and backend == "triton" else 3  # the interpreter has no threads
    assert all(torch.equal(first, fast_gradnorm(x, w, bias, backend=backend)) for _ in range(repeats))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend):
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided((2, 8), (2**31, 1))
    x.copy_(torch.arange(16.0).reshape(2, 8))
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    expected = fast_gradnorm(x.clone(), w, backend=backend)
    assert torch.equal(fast_gradnorm(x, w, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_offsets_beyond_32_bits(backend):
    storage = torch.empty(2**31 + 2**28, dtype=torch.float16, device=DEVICE)
    bias = storage.as_strided((9,), (2**28,))
    bias.copy_(torch.arange(9.0))
    x, w, _ = problem(2, 4, 9, torch.float16)
    assert torch.equal(fast_gradnorm(x, w, bias, backend=backend), fast_gradnorm(x, w, bias.clone(), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [10, 300])
def test_extreme_temperatures_and_overflow(backend, classes):
    x, w, _ = problem(3, 4, classes, torch.float32)
    equal = fast_gradnorm(x, torch.zeros_like(w), temperature=1e-37, reduction="sum", backend=backend)
    assert not equal.any()  # 0, though C/T overflows
    scores = head_scores(1e38 * torch.ones_like(x) / 4, 1e-38 * w, temperature=0.01, backend=backend)
    assert scores.gradnorm.isinf().all() and scores.feature_norm.isfinite().all() and scores.msp.isfinite().all()
    scores = head_scores(x, w, temperature=3e-39, backend=backend)
    assert scores.output_norm.isinf().all() and scores.msp.isfinite().all() and scores.entropy.isfinite().all()
    assert torch.equal(scores.prediction, (x @ w.T).argmax(1))
    if backend == "torch":
        tiny = x.clone().requires_grad_()
        fast_gradnorm(tiny, torch.eye(4, device=DEVICE), temperature=1e-20, backend=backend).sum().backward()
        assert tiny.grad.isfinite().all()


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one setting only")
def test_both_of_torchs_precision_settings():
    from gradnorm_fast.kernels.device import dot_precision

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert dot_precision(torch.float32, "sm_90") == "tf32" and dot_precision(torch.float32, "gfx90a") == "ieee"
        assert dot_precision(torch.bfloat16, "sm_90") == "ieee"
        matmul.fp32_precision = "ieee"
        assert dot_precision(torch.float32, "sm_90") == "ieee"
    finally:
        matmul.fp32_precision = before


def test_the_reference_in_any_mode():
    x, w, bias = problem(3, 4, 5, torch.float32)
    expected = autograd_gradnorm(x, w, bias)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        inside = autograd_gradnorm(x * 1, w * 1, bias * 1)
        kept = x * 1
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = autograd_gradnorm(x, w, bias)
    for got in (inside, cast, autograd_gradnorm(kept, w, bias)):
        assert torch.equal(got, expected)
    assert torch.equal(state, torch.random.get_rng_state())
    for wrong in (
        dict(features=x[:, :3]),
        dict(temperature=0),
        dict(reduction="avg"),
        dict(bias=None, include_bias=True),
    ):
        with pytest.raises(ValueError, match="expected"):
            autograd_gradnorm(**(dict(features=x, weight=w, bias=bias) | wrong))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 300])
def test_batch_invariance_of_the_torch_path_on_request(batch_invariant, classes, dtype):
    """However many rows are beside it. The kernels have a test of their own, in test_kernels.py."""
    x, w, bias = problem(70, 100, classes, dtype)
    whole = head_scores(x, w, bias, backend="torch")
    assert relative(whole.gradnorm, autograd_gradnorm(x.double(), w.double(), bias.double())) < 1e-5
    for some in (slice(0, 1), slice(3, 5), slice(69, 70), slice(17, 50)):
        for got, expected in zip(head_scores(x[some], w, bias, backend="torch"), whole, strict=True):
            assert torch.equal(got, expected[some])
    logits = torch.nn.functional.linear(x, w, bias)
    whole = gradnorm_from_logits(x, logits, backend="torch")
    assert torch.equal(gradnorm_from_logits(x[3:5], logits[3:5], backend="torch"), whole[3:5])


@pytest.mark.parametrize("classes", [3, 10, 15, 16, 127, 128, 129, 1000])
def test_scores_about_where_the_quick_form_is_given_up(classes):
    """Rows with Σ|p − 1/C| from 0.1 to 0.7."""
    g = torch.Generator().manual_seed(classes)
    z = torch.randn(4000, classes, generator=g) * torch.linspace(0.02, 1.5, 4000)[:, None]
    truth = deviation(z)
    band = (truth > 0.1) & (truth < 0.7)
    assert band.sum() > 200
    got = gradnorm_from_logits(torch.ones(len(z), 1, device=DEVICE), z.to(DEVICE), backend="torch")
    assert relative(got[band], truth[band]) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [10, 1000])
def test_half_precision_input_scores_as_float64_of_the_same_input(backend, dtype, classes):
    """Products of halves are exact in float32. A CPU accumulates them as it should; tensor cores more coarsely."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 64, generator=g).relu().to(DEVICE, dtype)  # as after pooling
    w = (torch.randn(classes, 64, generator=g) / 8).to(DEVICE, dtype)
    expected = autograd_gradnorm(x.double(), w.double())
    assert relative(fast_gradnorm(x, w, backend=backend), expected) <= (2e-6 if DEVICE == "cpu" else 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 10, 300])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, -1.0, 1e12, 1e30])
def test_huge_tiny_and_negative_features(backend, classes, scale):
    """The logits stay the same: the weight is divided by what multiplies the features, a power of two or nearly."""
    x, w, bias = problem(4, 12, classes, torch.float32)
    x, w = x.abs() * scale, w / scale
    expected = autograd_gradnorm(x.double(), w.double(), bias.double())
    tolerance = end_to_end_tolerance(x, w, bias, 1.0, torch.float32)
    assert relative(fast_gradnorm(x, w, bias, backend=backend), expected) <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_is_nan_not_a_number_that_looks_fine(backend):
    x = torch.full((2, 8), 1e38, device=DEVICE)
    x[1] = 1.0
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 1e-38
    scores = fast_gradnorm(x, w, backend=backend)
    assert scores[0].isnan() and scores[1].isfinite()


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu():
    from gradnorm_fast._backends import uses_triton

    assert uses_triton("auto", torch.device(DEVICE)) == (DEVICE == "cuda")
    x, w, bias = problem(5, 20, 300, torch.float32)
    chosen = "triton" if DEVICE == "cuda" else "torch"
    assert torch.equal(fast_gradnorm(x, w, bias), fast_gradnorm(x, w, bias, backend=chosen))


@pytest.mark.parametrize("given", ["head", "logits"])
def test_long_rows(given):
    """Longer than a piece of the torch path; most classes are masked."""
    classes = 2_000_003
    g = torch.Generator().manual_seed(0)
    x, w = torch.rand(3, 2, generator=g), torch.randn(classes, 2, generator=g)
    x[1] = 0.0
    bias = torch.zeros(classes)
    bias[:800_000] = -torch.inf
    bias[1_500_000] = 3.0
    z = torch.nn.functional.linear(x, w, bias)
    expected = x.double().abs().sum(1) * deviation(z, 2.0)
    if given == "logits":
        assert relative(gradnorm_from_logits(x, z, temperature=2.0), expected) <= 2e-6
        return
    scores = head_scores(x, w, bias, temperature=2.0, backend="torch")
    assert relative(scores.gradnorm, expected) <= 2e-6 + 3 * 8 * 2.0**-24  # three roundings of logits up to 8
    assert torch.equal(scores.prediction, z.argmax(1)) and scores.prediction[1] == 1_500_000
    assert relative(scores.energy, 2 * torch.logsumexp(z.double() / 2, 1)) < 2e-6
