"""Every kernel by itself, and who chooses them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnorm_fast import HeadScores, _backends, fast_gradnorm, gradnorm_from_logits, head_scores, warmup
from gradnorm_fast.kernels import dispatch, library, one_hot, one_tile, rows, tiled
from gradnorm_fast.kernels.config import ANY, Config, Line, Shape, choose
from gradnorm_fast.kernels.device import INTERPRETED, architecture, has_tma, tma_reads, tuned_as, vector
from gradnorm_fast.kernels.experimental import cluster
from gradnorm_fast.kernels.launch import KNOWN
from gradnorm_fast.kernels.problem import FIELDS, Problem, Scores

from conftest import DEVICE
from families import by_temperature, deviation, deviation_norm, families
from problems import end_to_end_tolerance, exact_problem, problem, relative
from spread import spread

pytestmark = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (8, 0), reason="needs compute capability 8.0"
)
ARCH = architecture(torch.device(DEVICE))

# In the interpreter a program costs its operations, many times what is in them: tiles are small there.
SMALL = {
    "sliced": Config(64, 32, 16, 4, 2, slices=4),
    "tiled": Config(16, 64, 16, 4, 2),
    "tiled by TMA": Config(16, 64, 16, 4, 2, tma=True),
    "library": library.CONFIGURATION,
    "cluster": Config(16, 512, 16, 4, 2, tma=True, num_ctas=2),
}
LARGE = {"sliced": Config(64, 32, 64, 4, 3, slices=4), "tiled by TMA": Config(64, 128, 64, 8, 3, tma=True)}


def scores_by(name, x, w, bias=None, temperature=1.0, config=None):
    """All fields of HeadScores; for the cluster kernel, the others than the score are NaN."""
    out = torch.full((len(FIELDS), len(x)), torch.nan, device=DEVICE)
    prediction = torch.full((len(x),), -1, dtype=torch.int64, device=DEVICE)
    config = config or (SMALL if DEVICE == "cpu" else LARGE).get(name)
    given = Problem(x, w, bias, temperature=temperature)
    kernel = {"library": library, "cluster": cluster}.get(name, tiled)
    if reason := kernel.why_not(given, ARCH):
        pytest.skip(f"{name} {reason}")
    dispatch.run(kernel, given, Scores(out[:1], None) if name == "cluster" else Scores(out, prediction), config)
    return HeadScores(*out[:3], prediction, *out[3:])


def truth(x, w, bias, temperature):
    z = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    return x.double().abs().sum(1) * deviation(z, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 257), (17, 40, 300), (2, 9, 513), (3, 200, 260)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_equals_float64_and_the_torch_path(name, shape, dtype):
    if name == "cluster" and shape[2] > 512:
        pytest.skip("here of up to 512 classes")
    x, w, bias = problem(*shape, dtype)
    got = scores_by(name, x, w, bias, 2.0)
    expected = head_scores(x, w, bias, temperature=2.0, backend="torch")
    tolerance = end_to_end_tolerance(x, w, bias, 2.0, dtype)
    assert relative(got.gradnorm, truth(x, w, bias, 2.0)) <= tolerance
    for field in HeadScores._fields if name != "cluster" else ["gradnorm"]:
        torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sliced", "tiled", "cluster"])
def test_hard_rows(name):
    """Row i has a single feature, of value 1, so that its logits are column i of the weight, to the bit (for the
    cluster kernel, rounded to float16); −inf comes by the bias, for a matmul cannot make it."""
    classes, dtype = 150, torch.float16 if name == "cluster" else torch.float32
    config = {  # few programs, for the interpreter
        "sliced": Config(64, 64, 32, 4, 2, slices=2),
        "tiled": Config(64, 64, 32, 4, 2),
        "cluster": Config(64, 256, 32, 4, 2, tma=True),
    }[name] if DEVICE == "cpu" else None  # fmt: skip
    rows_ = [
        (label, z.to(dtype), t)
        for label, z, t in families(classes, most=150)
        if not (z.to(dtype).isinf() & z.isfinite()).any()
    ]
    for temperature in {t for _, _, t in rows_}:
        finite = [(label, z) for label, z, t in rows_ if t == temperature and not z.isinf().any()][:64]
        x = torch.eye(64, dtype=dtype, device=DEVICE)[: len(finite)]
        weight = torch.zeros(classes, 64, dtype=dtype, device=DEVICE)
        weight[:, : len(finite)] = torch.cat([z for _, z in finite]).T
        got = scores_by(name, x, weight, None, temperature, config).gradnorm
        for i, (label, z) in enumerate(finite):
            assert relative(got[i : i + 1], deviation(z, temperature)) <= (1e-6 if INTERPRETED else 2e-6), label
    for label, z, temperature in rows_:
        if z.isinf().any():
            weight = torch.zeros(classes, 64, dtype=dtype, device=DEVICE)
            got = scores_by(name, x[:1], weight, z[0].to(DEVICE), temperature, config).gradnorm
            assert relative(got, deviation(z, temperature)) <= (1e-6 if INTERPRETED else 2e-6), label


@pytest.mark.parametrize("p", [2.0, math.inf, 0.3, 3.0, 4.0, 64.0])
@pytest.mark.parametrize("block", [256, 64])
def test_hard_rows_by_every_norm(block, p):
    """In registers, and longer than a block."""
    for temperature, names, z in by_temperature(families(150, most=200)):
        z = z.to(DEVICE)
        out = torch.full((1, len(z)), torch.nan, device=DEVICE)
        given_ = Problem(torch.ones(len(z), 1, device=DEVICE), None, None, z, temperature, p=p)
        dispatch.run(rows, given_, Scores(out, None), Config(16 if DEVICE == "cuda" else 64, block, 32, 4, 2))
        expected = deviation_norm(z, temperature, p) / temperature
        error = ((out[0] - expected) / expected).abs()
        error[out[0] == expected] = 0.0  # 0 both
        limit = 5e-5 if p < 1 else 1e-6 if INTERPRETED else 2e-6
        assert (error <= (limit if p < 64 else 5e-6)).all(), [n for n, e in zip(names, error, strict=True) if e > limit]


@pytest.mark.parametrize("block", [256, 64])
def test_how_spread_out_hard_rows_are(block):
    """Entropy, Σp², ExGrad and KL(uniform ‖ p), in registers and longer than a block."""
    for temperature, names, z in by_temperature(families(150, most=400)):
        out = torch.full((len(FIELDS), len(z)), torch.nan, device=DEVICE)
        scores = Scores(out, torch.full((len(z),), -1, device=DEVICE))
        given_ = Problem(torch.ones(len(z), 1, device=DEVICE), None, None, z.to(DEVICE), temperature)
        dispatch.run(rows, given_, scores, Config(16 if DEVICE == "cuda" else 64, block, 32, 4, 2))
        truth_ = spread(z, temperature)
        expected = [truth_.entropy, truth_.sum_squares, 2 * truth_.gini / temperature, truth_.kl_uniform]
        for field, got, value in zip(FIELDS[6:], out[6:].cpu().double(), expected, strict=True):
            right = (got == value) | ((got - value).abs() <= (2e-6 if INTERPRETED else 4e-6) * value + 2.0**-126)
            assert right.all(), (field, names[int(right.int().argmin())])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [2.0, math.inf, 0.5, 3.0])
@pytest.mark.parametrize("shape", [(5, 12, 10), (3, 1, 1), (9, 40, 300), (70, 24, 260)], ids=str)
def test_every_norm_by_the_default_kernel(shape, p, dtype):
    x, w, bias, _ = exact_problem(*shape, dtype)
    x[0], x[2, 0] = 0.0, torch.nan
    for include_bias, temperature in ((False, 1.0), (True, 7.0)):
        options = dict(p=p, include_bias=include_bias, temperature=temperature)
        got = fast_gradnorm(x, w, bias, backend="triton", **options)
        expected = fast_gradnorm(x.double(), w.double(), bias.double(), backend="torch", **options)
        assert got[2].isnan() and expected[2].isnan()
        kept = [i for i in range(len(x)) if i != 2]
        limit = max(1, 1 / p) * len(w) * 2.0**-51 + 1e-14 if dtype == torch.float64 else 5e-5 if p < 1 else 2e-6
        assert relative(got[kept], expected[kept]) <= limit


@pytest.mark.parametrize("classes", [8192, 9000])
def test_powers_that_overflow_on_the_way_to_a_finite_norm(classes):
    """Σ|p − 1/C|^0.1 to the tenth power is up to C^10/C."""
    x, w = torch.full((1, 1), 1e-3, device=DEVICE), torch.zeros(classes, 1, device=DEVICE)
    bias = torch.zeros(classes, device=DEVICE)
    bias[::2] = -torch.inf
    options = dict(p=0.1, target="uniform")
    got = fast_gradnorm(x, w, bias, backend="triton", **options)
    assert relative(got, fast_gradnorm(x.double(), w.double(), bias.double(), backend="torch", **options)) <= 5e-5
    bias.zero_()[0] = 70.0
    options["target"] = "predicted"
    got = fast_gradnorm(x, w, bias, backend="triton", **options)
    assert relative(got, fast_gradnorm(x.double(), w.double(), bias.double(), backend="torch", **options)) <= 5e-5
    huge = torch.full((1, 1), 3e38, device=DEVICE)
    scores = head_scores(huge, w, bias, temperature=10.0, backend="triton")
    assert relative(scores.exgrad, head_scores(huge, w, bias, temperature=10.0, backend="torch").exgrad) <= 2e-6


@pytest.mark.parametrize("name", ["sliced", "tiled", "cluster"])
def test_a_bad_row_poisons_itself_alone(name):
    x, w, _ = problem(20, 64, 300, torch.float16)
    good = scores_by(name, x, w)
    x[2, 3] = torch.nan
    bad = scores_by(name, x, w)
    others = torch.arange(20) != 2
    assert bad.gradnorm[2].isnan() and (bad.prediction[2] == 0 or name == "cluster")
    assert torch.equal(bad.gradnorm[others], good.gradnorm[others])


@pytest.mark.parametrize("spread", [1.0, 1e-4])
@pytest.mark.parametrize("tile", [64, 32])
def test_long_rows_from_the_statistics_of_their_tiles(tile, spread):
    """More classes than one program holds: the matmul leaves m and S of each tile, for near-uniform rows too."""
    x, w, bias = problem(3, 8, 9001, torch.float32)
    w, bias = w * spread, bias * spread
    w[:, 5:] = 0  # sums of few terms: exact enough for near-uniform rows
    config = Config(16, tile * 16, 16, 4, 2) if DEVICE == "cpu" else Config(16, tile, 32, 4, 2)
    got = scores_by("tiled", x, w, bias, 2.0, config)
    z = torch.nn.functional.linear(x, w, bias)
    expected = head_scores(x, w, bias, temperature=2.0, backend="torch")
    assert relative(got.gradnorm, truth(x, w, bias, 2.0)) <= end_to_end_tolerance(x, w, bias, 2.0, torch.float32)
    assert torch.equal(got.prediction, z.argmax(1))
    torch.testing.assert_close(got.energy, expected.energy, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["tiled", "library"])
def test_chunks_of_rows_that_bound_the_workspace(monkeypatch, name):
    x, w, bias = problem(40, 16, 300, torch.float32)
    monkeypatch.setattr(rows, "MIN_ROWS", 16)
    config = Config(16, 64, 16, 4, 2, workspace=0) if name == "tiled" else library.CONFIGURATION._replace(workspace=0)
    got = scores_by(name, x, w, bias, 2.0, config)  # 16, 16 and 8 rows
    assert relative(got.gradnorm, truth(x, w, bias, 2.0)) <= end_to_end_tolerance(x, w, bias, 2.0, torch.float32)


def test_what_tma_cannot_read_goes_by_pointers():
    x, w, bias = problem(5, 20, 300, torch.float16)
    assert not tma_reads("sm_90", x)  # rows of 40 bytes
    assert not tma_reads("sm_90", w.T) and not tma_reads("sm_90", x[:, 1:17])
    assert tma_reads("sm_80", x[:, :16].contiguous()) == has_tma("sm_80")
    got = scores_by("tiled by TMA", x, w, bias)
    assert relative(got.gradnorm, truth(x, w, bias, 1.0)) <= end_to_end_tolerance(x, w, bias, 1.0, x.dtype)


@given(st.integers(1, 4000), st.integers(0, 5000), st.integers(0, 5000))
def test_vectors_divide_all_they_are_for(depth, stride, other):
    vec = vector(depth, stride, other)
    assert vec in (1, 2, 4, 8) and not (depth % vec or stride % vec or other % vec)
    assert vec == 8 or depth % (2 * vec) or stride % (2 * vec) or other % (2 * vec)


# A line of a table each, with the smallest shape that takes it.
SHIPPED = [
    (name, line)
    for name, module in (("one_tile", one_tile), ("tiled", tiled), ("rows", rows))
    for line in module.TABLE
    if line.arch in ("any", tuned_as(ARCH))
]


@pytest.mark.parametrize(
    ("name", "line"), SHIPPED, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v[:3]))
)
def test_every_shipped_configuration_gives_the_same_bits_each_time(name, line):
    dtype = {"half": torch.bfloat16, "float64": torch.float64}.get(line.dtype, torch.float32)
    c = 9000 if name == "rows" and line.max_classes == ANY else min(line.max_classes, 260 if name == "tiled" else ANY)
    b = min(line.max_rows, line.config.block_b + 3 if DEVICE == "cuda" else 3)
    x, w, bias = problem(b, 2 * line.config.block_d + 8 if name != "rows" else 40, c, dtype)
    out = torch.empty(len(FIELDS), b, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    prediction = torch.empty(b, dtype=torch.int64, device=DEVICE)
    given, kernel = Problem(x, w, bias), dispatch.KERNELS[name]
    if name == "rows":
        given = Problem(x, None, None, torch.nn.functional.linear(x, w, bias))
    seen = []
    for _ in range(3 if INTERPRETED else 100):
        out.fill_(torch.nan)
        prediction.fill_(-1)
        dispatch.run(kernel, given, Scores(out, prediction), line.config)
        seen.append((out.clone(), prediction.clone()))
    assert relative(seen[0][0][0], truth(x, w, bias, 1.0)) <= end_to_end_tolerance(x, w, bias, 1.0, dtype)
    assert all(torch.equal(o, seen[0][0]) and torch.equal(p, seen[0][1]) for o, p in seen)


@pytest.mark.parametrize("call", ["library", "labels", "predicted", "token_statistics"])
def test_what_has_no_table_gives_the_same_bits_each_time(call):
    x, w, bias = problem(5, 40, 300, torch.float32)
    labels, out = torch.arange(5, device=DEVICE), torch.empty(4 if call == "token_statistics" else 1, 5, device=DEVICE)
    target = {"library": "uniform", "predicted": "predicted"}.get(call, labels)
    given, seen = Problem(x, w, bias, target=target, p=2.0), []
    for _ in range(3 if INTERPRETED else 100):
        out.fill_(torch.nan)
        if call == "library":
            dispatch.run(library, given, Scores(out, None))
        elif call == "token_statistics":
            dispatch.run(one_hot, given, Scores(out, None))
        else:
            dispatch.run(one_hot, given, Scores(out, None))
        seen.append(out.clone())
    assert seen[0].isfinite().all() and all(torch.equal(out, seen[0]) for out in seen)


@pytest.mark.parametrize("shape", [(5, 12, 10), (17, 200, 200), (3, 1, 1), (2, 70, 129)], ids=str)
def test_one_tile_that_reads_the_features_twice(monkeypatch, shape):
    """As on sm_90, where large tiles' products are asynchronous."""
    monkeypatch.setattr(one_tile, "asynchronous_products", lambda arch, rows: True)
    x, w, bias = problem(*shape, torch.bfloat16)
    out = torch.full((1, len(x)), torch.nan, device=DEVICE)
    dispatch.run(one_tile, Problem(x, w, bias), Scores(out, None))
    if shape[2] == 1:
        assert not out.any()
    else:
        assert relative(out[0], truth(x, w, bias, 1.0)) <= end_to_end_tolerance(x, w, bias, 1.0, x.dtype)


# Who chooses


def test_a_table_is_read_from_the_top_by_architecture():
    a, b, c = (Config(n, n, n, 4, 4) for n in (16, 32, 64))
    table = [
        Line("half", ANY, 7, c, "sm_90"),
        Line("half", 8, 9, a),
        Line("half", ANY, 9, b),
        Line("float32", ANY, ANY, c),
    ]

    def chosen(rows, classes, dtype, arch):
        return choose(table, Shape(rows, classes, 64, dtype, arch, 100))

    assert chosen(8, 5, torch.bfloat16, "sm_80") == a and chosen(9, 5, torch.float16, "sm_80") == b
    assert chosen(8, 5, torch.bfloat16, "sm_90") == c == chosen(8, 5, torch.float32, "sm_90")
    assert chosen(8, 8, torch.bfloat16, "sm_90") == a
    assert chosen(9, 5, torch.half, "gfx942") == b._replace(num_stages=2)
    with pytest.raises(ValueError, match="10 classes"):
        chosen(8, 10, torch.float16, "sm_90")


def test_every_data_centre_blackwell_has_the_tables_of_the_first(monkeypatch):
    """Without them 64 x 256 classes spill on sm_103 as they would on sm_100."""
    for capability, expected in {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120"}.items():
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=capability: is_)
        assert tuned_as(architecture.__wrapped__(torch.device("cuda", 0))) == expected


def meta(b, d, c, dtype):
    return Problem(torch.empty(b, d, dtype=dtype, device="meta"), torch.empty(c, d, dtype=dtype, device="meta"), None)


DTYPES = st.sampled_from([torch.half, torch.bfloat16, torch.float32, torch.float64])


@given(st.integers(1, 200), st.integers(1, 10_000), st.integers(1, 5000), DTYPES, st.sampled_from(["sm_80", "sm_90"]))
def test_the_preferred_kernel_takes_the_problem(b, c, d, dtype, arch):
    given_ = meta(b, d, c, dtype)
    for invariant in (False, True):
        name = dispatch.preferred(given_, arch, invariant)
        assert not dispatch.KERNELS[name].why_not(given_, arch)
        assert not (invariant and name == "library") or dtype == torch.float64
    expected = "tiled" if b <= 64 and 256 < c <= 4096 and dtype != torch.float64 else "library"
    if dtype.itemsize == 2 and not library.HALF_TO_FLOAT32:  # older torch
        expected = "tiled"
    if c <= 256 and dtype != torch.float64:
        expected = "one_tile"
    if dtype.itemsize == 2 and d % 2 and library.HALF_TO_FLOAT32:
        expected = "library"
    assert dispatch.preferred(given_, arch) == expected


def test_the_library_is_not_given_what_it_would_copy():
    x, w, _ = problem(70, 24, 300, torch.float32)

    def kernel(x, w):
        return dispatch.choose(Problem(x, w, None)).kernel

    assert kernel(x, w) == "library" == kernel(x.T.contiguous().T, w[:, :20].contiguous())
    assert kernel(x[:, ::2], w[:, ::2]) == "tiled" == kernel(x[:1].expand(70, 24), w)
    assert kernel(x[:, ::2].double(), w[:, ::2].double()) == "library"
    if DEVICE == "cpu":
        assert kernel(x.half(), w.half()) == "tiled"  # a CPU's matmul of halves returns halves


def test_a_library_that_multiplies_halves_wrongly_is_not_used(monkeypatch):
    device = torch.device(DEVICE)

    def mm(a, b, out, out_dtype):
        out.copy_(a.float() @ b.float())

    monkeypatch.setattr(torch, "mm", mm)
    assert library._try_halves(device, torch.float16) == ""
    for dtype in (torch.float16, torch.bfloat16):  # it rounds its result on the way
        monkeypatch.setattr(torch, "mm", lambda a, b, out, out_dtype: out.copy_((a.float() @ b.float()).to(a.dtype)))
        assert "wrongly" in library._try_halves(device, dtype)

    def refuses(*args, **options):
        raise RuntimeError("expected out to be contiguous")

    monkeypatch.setattr(torch, "mm", refuses)
    assert "expected out to be contiguous" in library._try_halves(device, torch.bfloat16)


def test_every_kernel_says_what_it_does_not_take():
    x, w, _ = problem(3, 16, 300, torch.float64)
    out = Scores(torch.empty(1, 3, device=DEVICE), None)
    for kernel, given_, words in (
        (one_tile, Problem(x.half(), w.half(), None), "one_tile takes at most 256 classes, got 300"),
        (tiled, Problem(x, w, None), "tiled takes float16, bfloat16 and float32, not float64"),
        (rows, Problem(x, w, None), "rows takes logits, not a weight"),
        (one_tile, Problem(x, None, None, x), "one_tile takes a weight, not logits"),
        (cluster, Problem(x.float(), w.float(), None), "cluster takes halves"),
        *(
            (kernel, Problem(x, w, None, target="predicted"), "takes the uniform target, not labels")
            for kernel in (one_tile, tiled, library, rows, cluster)
        ),
        (one_hot, Problem(x, w, None), "one_hot takes labels and the predicted target, not the uniform one"),
    ):
        with pytest.raises(ValueError, match=words):
            dispatch.run(kernel, given_, out)


@pytest.mark.parametrize(("c", "config"), [(300, Config(16, 64, 16, 4, 2, tma=True)), (8200, Config(16, 64, 16, 4, 2))])
def test_tiled_slices_neither_long_rows_nor_tma(c, config):
    x, w, _ = problem(3, 64, c, torch.float32)
    words = "config: slices of the features need at most 8192 classes and no TMA, got .*slices=2"
    with pytest.raises(ValueError, match=words):
        dispatch.run(
            tiled, Problem(x, w, None), Scores(torch.empty(1, 3, device=DEVICE), None), config._replace(slices=2)
        )


@settings(max_examples=200)
@given(st.integers(1, 64), st.integers(257, 4096), st.integers(1, 20_000), st.sampled_from([108, 132, 304]))
def test_slices_of_a_few_rows_fill_the_device_twice_at_most(b, c, d, processors):
    config = tiled.configuration(Shape(b, c, d, torch.bfloat16, "sm_90", processors))
    tiles = -(-c // config.block_c)
    assert config.slices == 1 or config.slices * tiles <= 2 * processors
    assert config.slices == 1 or config.slices * config.block_d <= d
    slice_d = -(-d // (config.slices * config.block_d)) * config.block_d
    assert (config.slices - 1) * slice_d < d  # the last slice has features


@pytest.mark.parametrize(("depth", "classes"), [(40, 10), (12, 10), (40, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_batch_invariance_on_request(batch_invariant, depth, classes, dtype):
    x, w, bias = problem(70, depth, classes, dtype)
    if INTERPRETED:  # NumPy's matmul depends on where a row lies: numbers whose sums are exact
        x, w, bias = ((8 * t).round() / 8 for t in (x, w, bias))
    one, all_ = (dispatch.choose(Problem(x[:n], w, bias), batch_invariant=True) for n in (1, 70))
    assert one == all_ and one.kernel != "library"  # its matmul depends on the batch
    whole = fast_gradnorm(x, w, bias, backend="triton")
    for some in (slice(0, 1), slice(3, 5), slice(69, 70), slice(17, 50)):
        assert torch.equal(fast_gradnorm(x[some], w, bias, backend="triton"), whole[some])
    padded = torch.nn.functional.pad(x, (0, 1))[:, :depth]  # a row alone counts as contiguous, whatever its stride
    assert torch.equal(fast_gradnorm(padded, w, bias, backend="triton"), whole)
    assert torch.equal(fast_gradnorm(padded[3:4], w, bias, backend="triton"), whole[3:4])
    logits = torch.nn.functional.linear(x, w, bias)
    given_ = gradnorm_from_logits(x, logits, backend="triton")
    assert torch.equal(gradnorm_from_logits(x[3:5], logits[3:5], backend="triton"), given_[3:5])


# Launching


@pytest.mark.skipif(not KNOWN, reason="this version of Triton is launched by its binder alone")
def test_a_launch_past_the_binder_is_the_binders_launch():
    """A launch that skips Triton's binder runs the same binary with the same arguments as one through it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("recorded_launches.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    calls = found["calls"]
    assert all(by_binder and by_binder == first == again for by_binder, first, again in calls)
    binaries = [by_binder[0][4] for by_binder, _, _ in calls[:4]]
    assert binaries == [0, 0, 1, 2]  # 64 rows and 1 run the same; not aligned and an odd D do not
    # Whoever watches launches sees them all, however the watcher is set.
    assert found["hooked"] == {"chain": 3, "exit only": 3, "function": 3, "none": 0, "pre-run": 3}


def test_without_a_driver_auto_falls_back_and_says_so_once(monkeypatch, recwarn):
    class Broken:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    reason = "is there a C compiler"
    monkeypatch.setattr("triton.runtime.driver", Broken())
    assert reason in _backends._why_no_driver() and "Failed to find C compiler" in _backends._why_no_driver()
    monkeypatch.setattr(_backends, "why_not_triton", lambda device: "no driver: " + reason)
    _backends._warn_of_fallback.cache_clear()
    cuda = torch.device("cuda", 0)
    assert not _backends.uses_triton("auto", cuda) and not _backends.uses_triton("auto", cuda)
    assert [str(w.message) for w in recwarn] == [f"gradnorm_fast runs in plain torch: no driver: {reason}"]
    assert _backends.uses_triton("triton", cuda)  # whose caller refuses with the reason


def test_warmup_checks_what_it_is_given():
    head = torch.nn.Linear(8, 3, device=DEVICE)
    warmup(head.weight, head.bias, batch_sizes=(1, 5), dtype=torch.float16)
    with pytest.raises(ValueError, match="batch_sizes: expected positive integers, got 0"):
        warmup(head.weight, head.bias, batch_sizes=(1, 0))
    with pytest.raises(ValueError, match="bias: expected shape"):
        warmup(head.weight, head.weight[0])
    for arguments, options, message in (
        ((head.weight.detach().cpu().numpy(),), {}, "weight: expected a torch.Tensor, got ndarray"),
        ((head.weight, [0.0] * 3), {}, "bias: expected a torch.Tensor, got list"),
        ((head.weight,), {"batch_sizes": 8}, "batch_sizes: expected several integers, got 8"),
        ((head.weight,), {"dtype": "half"}, "dtype: expected float16, bfloat16, float32 or float64, got 'half'"),
    ):
        with pytest.raises(TypeError, match=message):
            warmup(*arguments, **options)


# On a GPU


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("name", ["sliced", "tiled", "library", "cluster"])
@pytest.mark.parametrize("shape", [(4096, 512, 1000), (9999, 8, 1000), (33, 128, 1000), (777, 128, 5000)], ids=str)
def test_stress(shape, name):
    """Many launches, on several streams at once and from a graph: always the same bits."""
    x, w, bias = problem(*shape, torch.bfloat16)
    if name == "sliced" and shape[0] > 64:
        pytest.skip("slices are for a few rows")
    expected = scores_by(name, x, w, bias).gradnorm
    assert relative(expected, truth(x, w, bias, 1.0)) <= 1e-4
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    wrong = []  # not one sum: the streams would race for it
    for i in range(2_000):
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
