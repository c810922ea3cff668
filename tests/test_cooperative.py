"""The cooperative kernel, which no call chooses yet. In the interpreter its phases are launches of their own."""

import pytest
import torch
from test_gradnorm import end_to_end_tolerance, problem, relative

from gradnorm_fast import HeadScores, head_scores
from gradnorm_fast.kernels.cooperative import score_cooperative
from gradnorm_fast.kernels.targets import INTERPRETED, Config

from conftest import DEVICE
from families import deviation, hard_logits

pytestmark = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (8, 0), reason="needs compute capability 8.0"
)


SMALL = Config(16, 64, 16, 4, 2)  # in the interpreter a program costs its operations, many times what is in them


def cooperative(x, w, bias=None, temperature=1.0, config=None):
    out = torch.full((6, len(x)), torch.nan, device=DEVICE)
    prediction = torch.full((len(x),), -1, dtype=torch.int64, device=DEVICE)
    score_cooperative(x, w, bias, out, prediction, temperature, 1.0, 0.0, config)
    return HeadScores(*out[:3], prediction, *out[3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 31, 257), (65, 40, 300), (33, 20, 400), (2, 8, 513)], ids=str)
def test_equals_the_default_kernels_and_float64(shape, dtype):
    x, w, bias = problem(*shape, dtype)
    config = None if shape == (65, 40, 300) or DEVICE == "cuda" else SMALL
    got = cooperative(x, w, bias, 2.0, config)
    expected = head_scores(x, w, bias, temperature=2.0, backend="triton")
    z = torch.nn.functional.linear(x.double(), w.double(), bias.double())
    truth = x.double().abs().sum(1) * deviation(z, 2.0)
    assert relative(got.gradnorm, truth) <= end_to_end_tolerance(x, w, bias, 2.0, dtype)
    assert torch.equal(got.prediction, expected.prediction)
    for field in HeadScores._fields:
        torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=1e-5, atol=1e-5)


def test_hard_rows():
    """One feature of value 1: the logits are the weight, to the bit."""
    classes = 150
    x = torch.ones(2, 1, device=DEVICE)
    for name, logits, temperature in hard_logits(classes, rows=1):
        if logits.isinf().any():  # a matmul cannot make −inf; a bias can
            scores = cooperative(x, torch.zeros(classes, 1, device=DEVICE), logits[0].to(DEVICE), temperature, SMALL)
        else:
            scores = cooperative(x, logits.T.contiguous().to(DEVICE), None, temperature, SMALL)
        assert relative(scores.gradnorm, deviation(logits, temperature).expand(2)) <= 2e-6, name


def test_a_bad_row_poisons_itself_alone():
    x, w, _ = problem(70, 6, 300, torch.float32)
    good = cooperative(x, w, config=SMALL)
    x[2, 3] = torch.nan
    bad = cooperative(x, w, config=SMALL)
    others = torch.arange(70) != 2
    assert bad.gradnorm[2].isnan() and bad.prediction[2] == 0
    assert torch.equal(bad.gradnorm[others], good.gradnorm[others])


@pytest.mark.skipif(DEVICE != "cuda", reason="a barrier between CTAs needs a GPU")
@pytest.mark.parametrize("shape", [(4096, 512, 1000), (9999, 8, 1000), (33, 128, 1000), (777, 100, 5000)], ids=str)
def test_stress(shape):
    """Many launches, on several streams at once and from a graph: always the same bits, and no deadlock."""
    x, w, bias = problem(*shape, torch.bfloat16)
    expected = cooperative(x, w, bias).gradnorm
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for i in range(10_000):
        with torch.cuda.stream(streams[i % 4] if i % 10 == 0 else torch.cuda.current_stream()):
            got = cooperative(x, w, bias).gradnorm
            if i % 10 == 0:
                torch.cuda.current_stream().synchronize()
            wrong += (got != expected).any()
    torch.cuda.synchronize()
    assert not wrong
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cooperative(x, w, bias).gradnorm
    for _ in range(100):
        graph.replay()
    assert torch.equal(captured, expected)
