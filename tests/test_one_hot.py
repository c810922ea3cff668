"""The kernel for labels, the predicted class and token statistics, against float64."""

import math

import pytest
import torch

from gradnorm_fast import TokenStatistics, fast_gradnorm, token_statistics
from gradnorm_fast.kernels import dispatch, one_hot
from gradnorm_fast.kernels.config import Config, Shape
from gradnorm_fast.kernels.device import INTERPRETED
from gradnorm_fast.kernels.problem import Problem, Scores

from conftest import DEVICE
from families import hard_logits, residual_norm
from problems import exact_problem, relative

pytestmark = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (8, 0), reason="needs compute capability 8.0"
)
NORMS = (1.0, 2.0, math.inf, 0.5, 3.0, 4.0)
SMALL = Config(16, 32, 16, 4, 2)  # several tiles of few classes


def tolerance(x, w, bias, temperature, p):
    """1e-6, or 5e-5 for p < 1, and what the rounding of z − m does."""
    z = torch.nn.functional.linear(x.double(), w.double(), bias.double())
    z = z[z.isfinite()]
    return (5e-5 if p < 1 else 1e-6) + 6e-8 * (z.amax() - z.amin()).item() / temperature


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 16, 2), (7, 40, 33), (19, 24, 200)], ids=str)
def test_equals_float64(shape, dtype):
    x, w, bias, labels = exact_problem(*shape, dtype)
    for temperature in (1.0, 7.0):
        for p in NORMS if dtype == torch.float32 or shape[2] < 100 else (2.0, 3.0):  # the interpreter is slow
            for target in ("predicted", labels):
                options = dict(target=target, p=p, temperature=temperature, include_bias=p != 2.0)
                expected = fast_gradnorm(x.double(), w.double(), bias.double(), **options)
                got = fast_gradnorm(x, w, bias, backend="triton", **options)
                assert relative(got, expected) <= tolerance(x, w, bias, temperature, p), options
        expected = token_statistics(x.double(), w.double(), labels, bias.double(), temperature=temperature)
        got = token_statistics(x, w, labels, bias, temperature=temperature, backend="triton")
        for name in TokenStatistics._fields:
            limit = tolerance(x, w, bias, temperature, 2.0)
            assert relative(getattr(got, name), getattr(expected, name)) <= limit, name


@pytest.mark.parametrize("p", NORMS)
def test_hard_rows(p):
    """Row i has a single feature, of value 1: its logits are column i of the weight, to the bit."""
    classes = 150
    by_temperature = {}
    for _, logits, temperature in hard_logits(classes):
        if not logits.isinf().any():  # 0·inf: a bias masks classes
            by_temperature.setdefault(temperature, []).append(logits)
    for temperature, rows in by_temperature.items():
        z = torch.cat(rows)
        x, w = torch.eye(len(z), device=DEVICE), z.T.contiguous().to(DEVICE)
        labels = torch.arange(len(z)) * 7 % classes
        for target in (labels, "predicted"):
            y = z.argmax(1) if isinstance(target, str) else target
            out = torch.full((1, len(z)), torch.nan, device=DEVICE)
            given = target if isinstance(target, str) else target.to(DEVICE)
            dispatch.run(one_hot, Problem(x, w, None, None, temperature, target=given, p=p), Scores(out, None), SMALL)
            expected = residual_norm(z, y, temperature, p) / temperature
            limit = (5e-5 if p < 1 else 1e-6) + 6e-8 * (z.amax(1) - z.amin(1)).double() / temperature
            wrong = (out[0].cpu().double() - expected).abs() > limit * expected + 1e-38
            assert not wrong.any(), (temperature, wrong.nonzero()[:, 0].tolist())


def test_rows_without_a_score_and_labels_of_no_class():
    x, w, bias, labels = exact_problem(9, 24, 40, torch.float32)
    bias[::3] = -torch.inf
    x[2, 1], x[3, 0], x[4] = torch.nan, torch.inf, 0.0
    clean = [0, 4, 5, 7, 8]
    for p in (1.0, 2.0, math.inf, 3.0):
        for target in ("predicted", labels):
            got = fast_gradnorm(x, w, bias, target=target, p=p, backend="triton")
            alone = fast_gradnorm(x[clean], w, bias, target=target if target == "predicted" else labels[clean], p=p)
            assert got[[2, 3]].isnan().all() and relative(got[clean], alone) <= 2e-6
    labels[0], labels[5] = 40, -7  # unchecked on a GPU, where checking would wait
    out = torch.full((1, 9), -1.0, device=DEVICE)
    dispatch.run(one_hot, Problem(x, w, bias, target=labels), Scores(out, None), SMALL)
    assert out[0, [0, 5]].isnan().all() and not out[0, [1, 6]].any() and out[0, 8] > 0


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
def test_tiles_of_masked_classes(p):
    """A tile without a class that counts, and tiles with one, which is or is not y: classes 0, 70 and 96."""
    x, w, bias, labels = exact_problem(9, 24, 97, torch.float32)
    bias[1:70], bias[71:96] = -torch.inf, -torch.inf
    labels = torch.tensor([0, 70, 96] * 3, device=DEVICE)
    for target in (labels, "predicted"):
        out = torch.full((1, 9), torch.nan, device=DEVICE)
        dispatch.run(one_hot, Problem(x, w, bias, target=target, p=p), Scores(out, None), SMALL)
        expected = fast_gradnorm(x.double(), w.double(), bias.double(), target=target, p=p)
        assert relative(out[0], expected) <= tolerance(x, w, bias, 1.0, p)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
def test_more_tiles_than_are_merged_at_once(monkeypatch, p):
    """Four parts at a time; logits that differ in few bits, so that maxima are tied across tiles."""
    monkeypatch.setattr(one_hot, "MERGE", Config(4, 4, 32, 4, 2))
    x, w, bias, labels = exact_problem(9, 24, 300, torch.float32)
    x, w, bias = x.sign(), w.sign(), bias.round()
    x[1], bias[1], bias[::3] = 0.0, 2.0, -torch.inf
    for target in (labels, "predicted"):
        out = torch.full((1, 9), torch.nan, device=DEVICE)
        dispatch.run(one_hot, Problem(x, w, bias, target=target, p=p), Scores(out, None), SMALL)
        expected = fast_gradnorm(x.double(), w.double(), bias.double(), target=target, p=p)
        assert relative(out[0], expected) <= tolerance(x, w, bias, 1.0, p)


def test_huge_and_tiny_features():
    _, w, bias, labels = exact_problem(5, 3, 40, torch.float32)
    x = torch.tensor([[1e25, 3e25, -2e25], [1e-30, 2e-30, 0.0], [0.0, 0.0, 0.0], [3e38, 3e38, 1.0], [1.0, 0.0, 0.0]])
    x, w, labels = x.to(DEVICE), torch.zeros_like(w), labels.clamp_min(0)
    for p in (1.0, 2.0, 3.0, math.inf):
        got = fast_gradnorm(x, w, bias, target=labels, p=p, backend="triton")
        expected = fast_gradnorm(x.double(), w.double(), bias.double(), target=labels, p=p)
        fits = expected < 3e38
        assert relative(got[fits], expected[fits]) <= 2e-6 and got[~fits].isnan().all()


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_layouts(layout):
    x, w, bias, labels = exact_problem(9, 33, 70, torch.float16)
    expected = fast_gradnorm(x, w, bias, target=labels, p=2.0, backend="triton")

    def lay(t):
        if layout == "strided":
            return torch.stack([t, t], -1).flatten(-2)[..., ::2]
        if layout == "transposed":
            return t.T.contiguous().T
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    got = fast_gradnorm(lay(x), lay(w), bias, target=labels, p=2.0, backend="triton")
    assert relative(got, expected) <= 2e-6


def test_bytes_of_the_statistics(monkeypatch):
    """At most 24 for a row and class tile and 16 for a row, in chunks of at most 64 MiB; never the logits."""
    taken, empty = [], torch.empty
    monkeypatch.setattr(one_hot, "launch", lambda *arguments: None)
    monkeypatch.setattr(torch, "empty", lambda n, **options: taken.append(4 * n) or empty(n, **options))
    x, w = (empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (4096, 128256))
    config = one_hot.configuration(Shape(4096, 128256, 4096, torch.bfloat16, "sm_90", 132))
    for target in (torch.zeros(4096, dtype=torch.int64, device="meta"), "predicted"):
        taken.clear()
        problem = Problem(x, w, None, target=target, p=2.0)
        dispatch.run(one_hot, problem, Scores(empty(1, 4096, device="meta"), None), config)
        tiles = -(-128256 // config.block_c)
        assert 0 < sum(taken) <= 64 * 2**20
        assert sum(taken) <= 4096 * (24 * tiles + 16)


def test_one_row_alone_has_the_bits_it_has_among_others(batch_invariant):
    x, w, bias, labels = exact_problem(19, 24, 100, torch.float32)
    whole = fast_gradnorm(x * 0.37, w, bias, target=labels, p=2.0, backend="triton")
    few = fast_gradnorm(x[7:9] * 0.37, w, bias, target=labels[7:9], p=2.0, backend="triton")
    assert torch.equal(whole[7:9], few)
