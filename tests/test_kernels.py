"""Every kernel by itself, the ones that no call chooses yet included, and who chooses them.

In the interpreter the steps between the barriers of a cooperative launch are launches of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradnorm import end_to_end_tolerance, problem, relative

from gradnorm_fast import HeadScores, fast_gradnorm, head_scores
from gradnorm_fast.kernels import cluster, few_rows, library, plan, split
from gradnorm_fast.kernels.targets import ANY, INTERPRETED, Choice, Config, architecture, choose, descriptors_fit

from conftest import DEVICE
from families import deviation, hard_logits

pytestmark = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (8, 0), reason="needs compute capability 8.0"
)

# In the interpreter a program costs its operations, many times what is in them: tiles are small there.
SMALL = {
    "few_rows": Config(64, 32, 16, 4, 2, slices=4),
    "few_rows, one launch": Config(64, 32, 16, 4, 2, slices=4),
    "library": library.CONFIGURATION,
    "split": Config(16, 64, 16, 4, 2),
    "split by TMA": Config(16, 64, 16, 4, 2, tma=True),
    "cooperative": Config(16, 64, 16, 4, 2),
    "cooperative by TMA": Config(16, 64, 16, 4, 2, tma=True),
    "cluster": Config(16, 512, 16, 4, 2, tma=True, num_ctas=2),
}


def scores_by(name, x, w, bias=None, temperature=1.0, config=None):
    out = torch.full((6, len(x)), torch.nan, device=DEVICE)
    prediction = torch.full((len(x),), -1, dtype=torch.int64, device=DEVICE)
    if config is None and DEVICE == "cpu":
        config = SMALL[name]
    elif config is None and "TMA" in name:
        config = Config(64, 128, 64, 8, 3, tma=True)
    try:
        plan.KERNELS[name.removesuffix(" by TMA")](x, w, bias, out, prediction, temperature, 1.0, 0.0, config)
    except ValueError as error:
        if name != "cluster" or cluster.fits(x, w):
            raise
        pytest.skip(str(error))
    return HeadScores(*out[:3], prediction, *out[3:])


def truth(x, w, bias, temperature):
    z = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    return x.double().abs().sum(1) * deviation(z, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 257), (17, 40, 300), (2, 9, 513)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_equals_float64_and_the_torch_path(name, shape, dtype):
    if name == "cluster" and (dtype == torch.float32 or shape[2] > 512):
        pytest.skip("takes halves, here of up to 512 classes")
    if name == "library" and not library.fits(torch.empty(0, dtype=dtype, device=DEVICE)):
        pytest.skip("a CPU's matmul of halves returns halves")
    if name == "few_rows, one launch" and INTERPRETED:
        pytest.skip("the same as in two launches, in the interpreter")
    x, w, bias = problem(*shape, dtype)
    got = scores_by(name, x, w, bias, 2.0)
    expected = head_scores(x, w, bias, temperature=2.0, backend="torch")
    tolerance = end_to_end_tolerance(x, w, bias, 2.0, dtype)
    assert relative(got.gradnorm, truth(x, w, bias, 2.0)) <= tolerance
    assert torch.equal(got.prediction, expected.prediction)
    for field in HeadScores._fields:
        torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["few_rows", "split", "cooperative", "cluster"])
def test_hard_rows(name):
    """One feature of value 1: the logits are the weight, to the bit; for the cluster kernel, rounded to float16."""
    classes, dtype = 150, torch.float16 if name == "cluster" else torch.float32
    x = torch.zeros(2, 8, dtype=dtype, device=DEVICE)
    x[:, 0] = 1.0
    config = Config(16, 256, 16, 4, 2, tma=True) if name == "cluster" and DEVICE == "cpu" else None
    for family, logits, temperature in hard_logits(classes, rows=1):
        logits = logits.to(dtype)
        weight = torch.zeros(classes, 8, dtype=dtype, device=DEVICE)
        if logits.isinf().any():  # a matmul cannot make −inf; a bias can
            scores = scores_by(name, x, weight, logits[0].to(DEVICE), temperature, config)
        else:
            weight[:, 0] = logits[0].to(DEVICE)
            scores = scores_by(name, x, weight, None, temperature, config)
        assert relative(scores.gradnorm, deviation(logits, temperature).expand(2)) <= 2e-6, family


@pytest.mark.parametrize("name", ["few_rows", "split", "cooperative", "cluster"])
def test_a_bad_row_poisons_itself_alone(name):
    x, w, _ = problem(20, 8, 300, torch.float16)
    good = scores_by(name, x, w)
    x[2, 3] = torch.nan
    bad = scores_by(name, x, w)
    others = torch.arange(20) != 2
    assert bad.gradnorm[2].isnan() and bad.prediction[2] == 0
    assert torch.equal(bad.gradnorm[others], good.gradnorm[others])


@pytest.mark.parametrize("spread", [1.0, 1e-4])
@pytest.mark.parametrize("given", ["tiles of 64", "tiles of 32"])
def test_long_rows_from_the_statistics_of_their_tiles(given, spread):
    """More classes than one program holds: the matmul leaves m, S and Q of each tile, near uniform rows or not."""
    x, w, bias = problem(3, 8, 9001, torch.float32)
    w, bias = w * spread, bias * spread
    w[:, 5:] = 0  # sums of few terms: exact enough for near-uniform rows
    config = Config(16, int(given.split()[-1]) * 16, 8, 4, 2) if DEVICE == "cpu" else None
    got = scores_by("split", x, w, bias, 2.0, config or split.configuration(3, 9001, 8, torch.float32, "sm_80"))
    z = torch.nn.functional.linear(x, w, bias)
    expected = head_scores(x, w, bias, temperature=2.0, backend="torch")
    assert relative(got.gradnorm, truth(x, w, bias, 2.0)) <= end_to_end_tolerance(x, w, bias, 2.0, torch.float32)
    assert torch.equal(got.prediction, z.argmax(1))
    torch.testing.assert_close(got.energy, expected.energy, rtol=1e-6, atol=1e-5)


def test_what_tma_cannot_read_goes_by_pointers():
    x, w, bias = problem(5, 20, 300, torch.float16)
    assert not descriptors_fit("sm_90", x)  # rows of 40 bytes
    assert not descriptors_fit("sm_90", w.T) and not descriptors_fit("sm_90", x[:, 1:17])
    assert descriptors_fit("sm_80", x[:, :16].contiguous()) == INTERPRETED
    got = scores_by("split by TMA", x, w, bias)
    assert relative(got.gradnorm, truth(x, w, bias, 1.0)) <= end_to_end_tolerance(x, w, bias, 1.0, x.dtype)


def test_limits_are_refused():
    x, w, _ = problem(65, 16, 300, torch.float16)
    with pytest.raises(ValueError, match="64 rows"):
        scores_by("few_rows", x, w)
    with pytest.raises(ValueError, match="4096 classes"):
        plan.KERNELS["cluster"](x, torch.zeros(4097, 16).half().to(DEVICE), None, x, None, 1.0, 1.0, 0.0)


# Who chooses


def test_a_table_is_read_from_the_top_with_an_architectures_own_lines():
    a, b, c = (Config(n, n, n, 4, 4) for n in (16, 32, 64))
    table = {"any": [Choice("half", 8, ANY, a), Choice("any", ANY, ANY, b)], "sm_90": [Choice("any", ANY, ANY, c)]}
    assert choose(table, 8, 5, torch.bfloat16, "sm_80") == a == choose(table, 8, 5, torch.float16, "sm_90")
    assert choose(table, 9, 5, torch.bfloat16, "sm_80") == b == choose(table, 8, 5, torch.float32, "sm_80")
    assert choose(table, 9, 5, torch.float32, "sm_90") == c
    assert choose(table, 9, 5, torch.float32, "gfx942") == b._replace(num_stages=2)


def test_every_data_centre_blackwell_has_the_lines_of_the_first(monkeypatch):
    """Without them 64 x 256 classes spill on sm_103 as they would on sm_100."""
    for capability, expected in {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120"}.items():
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=capability: is_)
        assert architecture.__wrapped__(torch.device("cuda", 0)) == expected


@given(st.integers(1, 200), st.integers(1, 10_000), st.integers(1, 5000), st.sampled_from([torch.half, torch.float32]))
def test_the_default_never_has_a_barrier_between_programs(b, c, d, dtype):
    kernel, config = plan.by_table(b, c, d, dtype, torch.device(DEVICE))
    assert kernel in ("one_tile", "few_rows", "split", "library") and config.num_ctas == 1
    assert (kernel == "one_tile") == (c <= 256)
    assert (kernel == "few_rows") == (b <= 64 and 256 < c <= 4096)


def test_float32_goes_to_the_library_unless_that_would_copy():
    x, w, _ = problem(70, 24, 300, torch.float32)
    assert plan.chosen(x, w, None).kernel == "library" == plan.chosen(x.T.contiguous().T, w[:, :20], None).kernel
    assert (
        plan.chosen(x[:, ::2], w[:, ::2], None).kernel == "split" == plan.chosen(x[:1].expand(70, 24), w, None).kernel
    )
    assert plan.chosen(x[:, ::2].double(), w[:, ::2].double(), None).kernel == "library"
    assert plan.chosen(x.half(), w.half(), None).kernel == "split"


def test_library_in_chunks_of_rows():
    x, w, bias = problem(1030, 4, 300, torch.float32)
    config = library.CONFIGURATION._replace(workspace=1)  # of 512 rows
    got = scores_by("library", x, w, bias, 2.0, config)
    assert relative(got.gradnorm, truth(x, w, bias, 2.0)) <= end_to_end_tolerance(x, w, bias, 2.0, torch.float32)


@settings(max_examples=200)
@given(st.integers(1, 64), st.integers(257, 4096), st.integers(1, 20_000), st.sampled_from([108, 132, 304]))
def test_slices_of_few_rows_fill_the_device_and_no_more(b, c, d, processors):
    config = few_rows.configuration(b, c, d, torch.bfloat16, "sm_90", processors)
    tiles = -(-c // config.block_c)
    assert config.slices == 1 or config.slices * tiles <= processors
    assert config.slices == 1 or config.slices * config.block_d <= d
    full = 2 * config.slices * tiles > processors or config.slices == 16
    assert full or 2 * config.slices * config.block_d > d


@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_batch_invariance_on_request(monkeypatch, classes, dtype):
    x, w, bias = problem(70, 40, classes, dtype)
    if INTERPRETED:  # NumPy's matmul depends on where a row lies: numbers whose sums are exact
        x, w, bias = ((8 * t).round() / 8 for t in (x, w, bias))
    monkeypatch.setenv("GRADNORM_FAST_BATCH_INVARIANT", "1")
    assert plan.chosen(x[:1], w, None) == plan.chosen(x, w, None)
    assert plan.chosen(x, w, None).kernel != "library"  # its matmul depends on the batch
    whole = fast_gradnorm(x, w, bias, backend="triton")
    for rows in (slice(0, 1), slice(3, 5), slice(69, 70), slice(17, 50)):
        assert torch.equal(fast_gradnorm(x[rows], w, bias, backend="triton"), whole[rows])


def test_autotuning_on_request_keeps_the_fastest_right_one(monkeypatch):
    x, w, _ = problem(5, 40, 300, torch.bfloat16)
    default = plan.by_table(5, 300, 40, torch.bfloat16, x.device)
    quick, quicker, wrong, failing = (plan.Plan("few_rows", SMALL["few_rows"]._replace(slices=n)) for n in (1, 2, 3, 4))
    ran = []

    def run(chosen):
        ran.append(chosen)
        if chosen == failing:
            raise RuntimeError("out of shared memory")
        return torch.full((5,), 2.0 if chosen == wrong else 1.0, device=DEVICE)

    seconds = {default: 4.0, quick: 3.0, quicker: 2.0, wrong: 1.0}
    monkeypatch.setattr(plan, "_seconds", lambda call, device: seconds[call.args[0]])
    monkeypatch.setattr(plan, "candidates", lambda x, w: iter([quick, wrong, failing, quicker]))
    monkeypatch.setattr(plan, "_tuned", {})
    assert plan.chosen(x, w, run) == default and not ran  # not asked for
    monkeypatch.setenv("GRADNORM_FAST_AUTOTUNE", "1")
    assert plan.chosen(x, w, run) == quicker
    ran.clear()
    assert plan.chosen(x[:4].repeat(2, 1), w, run) == quicker and not ran  # 8 rows are in the same bin as 5


def test_autotuning_believes_no_kernel_that_writes_nothing(monkeypatch):
    """The scores of the one before may still be where its own should be."""
    x, w, _ = problem(5, 40, 300, torch.bfloat16)
    default = plan.by_table(5, 300, 40, torch.bfloat16, x.device)
    idle = default._replace(config=default.config._replace(slices=1, block_c=16))
    out = torch.empty(5, device=DEVICE)
    monkeypatch.setattr(plan, "_seconds", lambda call, device: float(call.args[0] == default))
    monkeypatch.setattr(plan, "candidates", lambda x, w: iter([idle]))
    assert plan.fastest(default, x, w, lambda chosen: out.fill_(1.0) if chosen == default else out) == default


def test_a_tuned_choice_is_not_for_what_tma_cannot_read(monkeypatch):
    memory, w, _ = problem(70, 72, 300, torch.float16)
    x, sliced, w = memory[:, :64].contiguous(), memory[:, 1:65], w[:, :64].contiguous()
    monkeypatch.setattr(plan, "_tuned", {})
    monkeypatch.setattr(plan, "fastest", lambda best, x, w, run: best._replace(kernel=f"{x.data_ptr() % 16}"))
    monkeypatch.setenv("GRADNORM_FAST_AUTOTUNE", "1")
    assert plan.chosen(x, w, None) == plan.chosen(x.clone(), w, None) != plan.chosen(sliced, w, None)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one setting only")
def test_autotuning_by_torchs_new_setting_of_tf32(monkeypatch):
    """Where that is set, torch.get_float32_matmul_precision() raises."""
    x, w, _ = problem(5, 40, 300, torch.float32)
    monkeypatch.setattr(plan, "_tuned", {})
    monkeypatch.setattr(plan, "fastest", lambda best, x, w, run: best)
    monkeypatch.setenv("GRADNORM_FAST_AUTOTUNE", "1")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            plan.chosen(x, w, None)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(plan._tuned) == 2


@pytest.mark.parametrize("shape", [(70, 40, 10), (5, 64, 300), (70, 64, 300)], ids=str)
def test_every_candidate_of_the_tuner_is_a_kernel_that_takes_the_shape(shape):
    x, w, _ = problem(*shape, torch.bfloat16)
    found = list(plan.candidates(x, w))
    assert len(found) > 4 and {p.kernel for p in found} <= set(plan.KERNELS)
    assert len(set(found)) == len(found)


def test_autotuned_scores_are_the_scores(monkeypatch):
    x, w, bias = problem(20, 40, 10, torch.float32)
    expected = fast_gradnorm(x, w, bias, backend="triton")
    monkeypatch.setattr(plan, "_tuned", {})
    monkeypatch.setenv("GRADNORM_FAST_AUTOTUNE", "1")
    torch.testing.assert_close(fast_gradnorm(x, w, bias, backend="triton"), expected, rtol=1e-5, atol=0)
    assert len(plan._tuned) == 1


# Launching


def test_a_launch_past_the_binder_is_the_binders_launch():
    """The same binary with the same arguments, whatever Triton would have compiled anew."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("recorded_launches.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout)
    assert all(by_binder and by_binder == first == again for by_binder, first, again in calls)
    binaries = [by_binder[0][4] for by_binder, _, _ in calls[:4]]
    assert binaries == [0, 0, 1, 2]  # 64 rows and 1 run the same; not aligned and an odd D do not


# On a GPU


@pytest.mark.skipif(DEVICE != "cuda", reason="a barrier between CTAs needs a GPU")
@pytest.mark.parametrize("name", ["cooperative", "cluster", "few_rows, one launch"])
@pytest.mark.parametrize("shape", [(4096, 512, 1000), (9999, 8, 1000), (33, 128, 1000), (777, 128, 5000)], ids=str)
def test_stress(shape, name):
    """Many launches, on several streams at once and from a graph: always the same bits, and no deadlock."""
    x, w, bias = problem(*shape, torch.bfloat16)
    if (name == "cluster" and not cluster.fits(x, w)) or (name.startswith("few") and shape[0] > 64):
        pytest.skip(f"{name} does not take this")
    expected = scores_by(name, x, w, bias).gradnorm
    assert relative(expected, truth(x, w, bias, 1.0)) <= 1e-4
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    wrong = []  # not one sum: the streams would race for it
    for i in range(10_000):
        with torch.cuda.stream(streams[i % 4] if i % 10 == 0 else torch.cuda.current_stream()):
            got = scores_by(name, x, w, bias).gradnorm
            if i % 10 == 0:
                torch.cuda.current_stream().synchronize()
            wrong.append((got != expected).any())
    torch.cuda.synchronize()
    assert not torch.stack(wrong).any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scores_by(name, x, w, bias).gradnorm
    for _ in range(100):
        graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("name", ["cooperative", "few_rows, one launch"])
def test_a_barrier_holds_beside_a_kernel_that_fills_the_device(name):
    x, w, bias = problem(64, 512, 1000, torch.bfloat16)
    expected = scores_by(name, x, w, bias).gradnorm
    a = torch.randn(4096, 4096, device=DEVICE)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(200):
        with torch.cuda.stream(other):
            a = (a @ a).clamp_(-1, 1)
        got = scores_by(name, x, w, bias).gradnorm
    torch.cuda.synchronize()
    assert torch.equal(got, expected)
