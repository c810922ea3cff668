"""The kernel calls that the emulator executes, and their expected results."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import mock

import torch

from gradnorm_fast.kernels import dispatch, library, one_tile
from gradnorm_fast.kernels.config import Config, Shape, for_vector
from gradnorm_fast.kernels.device import vector
from gradnorm_fast.kernels.experimental import cluster
from gradnorm_fast.kernels.problem import FIELDS, Problem, Scores

from . import own_kernels
from .driver import PROCESSORS, Edit, Emulator
from .machine import Options
from .memory import EmulatorError
from problems import expected_fields


@dataclass(frozen=True)
class Case:
    """A call, with the most common values as defaults."""

    kernel: str
    dtype: str
    b: int
    d: int
    c: int
    rows: str = "normal"  # or near (uniform), saturated, nan; exact, near exact, bulk: with logits that float32 holds
    bias: str = "normal"  # or none, masked (every third class −inf); of "bulk": its level, and one class above that
    above: float = 0.8  # of "bulk": by how much one class stands above the others
    level: float = 0.0  # of "bulk": the logit that those are around
    layout: str = "plain"  # or offset (by one element), strided, transposed
    fields: bool = True  # all of them and the prediction, or the score alone
    temperature: float = 1.0
    as_if: int = 0  # use the configuration for this many rows; 0: b
    tma: str = ""  # use tensor descriptors, with tiles of rows x classes
    processors: int = 0  # multiprocessors of the device; 0: the architecture's
    tf32: bool = False
    p: float = 1.0

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[5:] if getattr(self, f.name) != f.default]
        return " ".join([self.kernel, self.dtype, f"{self.b}x{self.d}x{self.c}", *options])


ROWS: tuple[dict[str, Any], ...] = (
    dict(rows="near", bias="none"),
    dict(rows="near", bias="none", temperature=1000.0),
    dict(rows="saturated", temperature=0.5),
    dict(rows="nan", bias="masked"),
    dict(rows="exact", temperature=20.0),
    dict(rows="near exact", bias="none"),
    dict(rows="bulk"),
    dict(rows="bulk", level=5.0, above=3.0, fields=False),
    dict(rows="bulk", level=-300.0, above=-8.0, temperature=1e6),
    dict(rows="bulk", above=800.0, temperature=1000.0),
)


def quick_cases(arch: int) -> list[Case]:
    """Every kernel once."""
    float32 = Case("one_tile", "float32", 18, 64, 12, rows="nan", bias="masked", fields=False, p=3.0)
    float64 = Case("library", "float64", 9, 40, 100, rows="bulk")
    wgmma = Case("one_tile", "float16", 65, 160, 200, fields=False, as_if=50000)
    vectors = Case("tiled", "float16", 6, 1000, 300, processors=30, fields=False, p=2.0)
    return [
        Case("tiled", "float16", 9, 256, 258, processors=20, **ROWS[-1]),
        Case("library", "float16", 2, 40, 1025, rows="bulk"),
        Case("rows", "float16", 2, 33, 8193, rows="near"),
        *((float32, float64) if arch == 80 else (wgmma, vectors)),
    ]


def cases(arch: int) -> list[Case]:
    """Every kernel and tile; every kind of row, bias and layout; shapes off by one from the tiles."""
    found = quick_cases(arch)

    def add(kernel: str, dtype: str, b: int, d: int, c: int, **more: Any) -> None:
        found.append(Case(kernel, dtype, b, d, c, **more))

    def add_rows(kernel: str, dtype: str, b: int, d: int, c: int, **more: Any) -> None:
        found.extend(Case(kernel, dtype, b, d, c, **kind, **more) for kind in ROWS)

    layouts = ("offset", "strided", "transposed")
    for dtype in ("float16", "bfloat16", "float32"):
        half = dtype != "float32"
        vectors = (342, 440, 1000) if half else ()  # of 2 and 8 elements
        for c, d in ((16, 64), (17, 96), (129, 64), (255, 96)):
            add("one_tile", dtype, 17, d, c)
        for c in (9, 127, 200):
            add("one_tile", dtype, 65, 160, c, as_if=5000)
            add("one_tile", dtype, 65, 160, c, as_if=50000, fields=False)  # all fields take half the rows
        add_rows("one_tile", dtype, 18, 64, 12)
        add_rows("one_tile", dtype, 66, 96, 190, as_if=50000)
        add("one_tile", dtype, 33, 67, 100, fields=False, bias="none")
        for d in vectors:
            add("one_tile", dtype, 65, d, 100, as_if=50000 if d == 440 else 0, fields=d != 440)
        for layout in layouts:
            add("one_tile", dtype, 18, 64, 20, layout=layout)
            add("one_tile", dtype, 65, 96, 130, layout=layout, as_if=50000, fields=False)
        # slices of the features for a few rows, the table's other tiles, rows too long for registers
        for b, d, c in ((1, 256, 257), (17, 300, 300), (33, 128, 289), (64, 256, 320)):
            add("tiled", dtype, b, d, c, processors=40)
        add_rows("tiled", dtype, 9, 256, 258, processors=20)
        for as_if in (200, 900, 2000, 50000):
            add("tiled", dtype, 65, 160, 300, as_if=as_if)
        for d in vectors:
            add("tiled", dtype, 6, d, 300, processors=30)
            add("tiled", dtype, 18, d, 300, as_if=50000)
        if dtype != "bfloat16":
            add_rows("tiled", dtype, 18, 64, 300, as_if=50000)
            (add_rows if half else add)("tiled", dtype, 2, 16, 8225, as_if=900)
        for layout in layouts:
            add("tiled", dtype, 6, 67, 300, layout=layout, processors=20, fields=False)
            add("tiled", dtype, 66, 64, 300, layout=layout, as_if=50000)
        if arch == 90 and half:
            for tma in ("128x256", "128x128", "64x256"):
                add("tiled", dtype, 130, 136, 300, tma=tma)
            add("tiled", dtype, 66, 64, 300, tma="128x256", rows="nan", bias="masked")
        if arch == 90 and half and cluster.CLUSTERS:
            for c in (257, 600, 1100, 2100):
                add("cluster", dtype, 65, 136, c, fields=False)
                add("cluster", dtype, 66, 64, c, rows="bulk", above=3.0, fields=False)
            add("cluster", dtype, 66, 1000, 300, fields=False)
            found.extend(Case("cluster", dtype, 66, 320, 300, **dict(kind, fields=False)) for kind in ROWS)
    for dtype in ("float16", "float32", "float64"):
        for b, c in ((9, 15), (9, 100), (9, 513), (2, 1025), (2, 2049), (2, 4097), (2, 8193)):
            add("library", dtype, b, 40, c, rows="bulk")
            add("rows", dtype, b, 33, c, rows="near")
            add("rows", dtype, b, 33, c, layout="offset" if b == 9 else "strided", temperature=2.0)
        add_rows("library", dtype, 9, 40, 300)
        add("rows", dtype, 2, 33, 15, temperature=1e36 if dtype == "float64" else 1e9, fields=False)
        (add if dtype == "float32" else add_rows)("library", dtype, 2, 40, 9000)  # float32 logits for halves too
    for kernel, c in (("one_tile", 20), ("tiled", 300), ("library", 300)):
        add(kernel, "float32", 18, 64, c, tf32=True)
    for dtype, p in itertools.product(("bfloat16", "float32"), (2.0, 3.0, math.inf)):  # in each kernel's way to ‖x‖_p
        for row in (dict(rows="bulk", above=3.0), dict(rows="nan", bias="masked")):
            one = dict(row, fields=False, p=p)
            add("one_tile", dtype, 66, 96, 12, as_if=50000, **one)
            add("tiled", dtype, 9, 256, 258, processors=20, **one)
            add("library", dtype, 2, 300, 1025, **one)
        add("rows", dtype, 2, 33, 8193, rows="near", fields=False, p=p)
        add("tiled", dtype, 2, 16, 8225, as_if=900, fields=False, p=p)
    for groups, tma in itertools.product((2, 3), ("", "64x64") if arch == 90 else ("",)):
        add("logsumexp", "float16", 230, 192, 130, processors=groups, tma=tma)
    return list(dict.fromkeys(found))


@dataclass
class Outcome:
    error: float = math.nan  # the worst relative error of a score
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of CPU time


def lay(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another layout, surrounded by NaN."""
    view = torch.empty(t.shape, dtype=t.dtype)
    if layout == "offset":
        view = torch.full((t.numel() + 9,), torch.nan, dtype=t.dtype)[1 : 1 + t.numel()].view(t.shape)
    elif layout == "strided":
        memory = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan, dtype=t.dtype)
        view = memory[..., 1 : 1 + 2 * t.shape[-1] : 2]
    elif layout == "transposed" and t.ndim == 2:
        view = torch.empty(t.shape[::-1], dtype=t.dtype).T
    return view.copy_(t)


def problem_of(case: Case) -> Problem:
    g = torch.Generator().manual_seed(case.b * 7919 + case.d * 31 + case.c)
    dtype = getattr(torch, case.dtype)
    x, w = torch.randn(case.b, case.d, generator=g), torch.randn(case.c, case.d, generator=g) / math.sqrt(case.d)
    bias = (8 * torch.randn(case.c, generator=g)).round() / 8
    if case.rows == "near":
        x = x * 1e-4
        x[0] = 0.0  # exactly uniform but for the norm
        x[0, 0] = 1e-4
    elif case.rows == "saturated":
        x[1] *= 200
    elif case.rows == "nan":
        x[min(2, case.b - 1), case.d // 2] = torch.nan
    elif case.rows != "normal":  # few products of few bits each, so that float32 holds their sums
        x, w = ((8 * t).round().clamp(-24, 24) / 8 for t in (x, math.sqrt(case.d) * w))
        x[:, 12:] = 0
        x = x * 2.0 ** (-3 if case.rows == "exact" else -14 if abs(case.level) + abs(case.above) < 8 else -8)
    if case.rows == "bulk":
        bias = torch.full((case.c,), case.level)
        bias[case.c // 3] += case.above
    elif case.bias == "masked":
        bias[::3] = -torch.inf
    x, w, bias = (lay(t.to(dtype), case.layout) for t in (x, w, bias))
    if case.kernel == "rows":
        logits = torch.randn(case.b, case.c, generator=g) * (1e-4 if case.rows == "near" else 1.0)
        return Problem(x, None, None, lay(logits.to(dtype), case.layout), case.temperature, p=case.p)
    has_bias = case.bias != "none" or case.rows == "bulk"
    return Problem(x, w, bias if has_bias else None, temperature=case.temperature, p=case.p)


def judge(case: Case, problem: Problem, scores: Scores, base: float) -> tuple[float, list[str]]:
    """The worst relative error, and what is wrong. Tolerance: `base` plus a float32 matmul's effect on the logits."""
    x, t = problem.features.double(), case.temperature
    rounding = torch.zeros(case.b, dtype=torch.float64)  # of a logit, absolute
    if problem.logits is not None:
        z = problem.logits.double()
    else:
        assert problem.weight is not None
        w = problem.weight.double()
        bias = torch.zeros(case.c, dtype=torch.float64) if problem.bias is None else problem.bias.double()
        z = x @ w.T + bias
        if case.tf32 or not ("exact" in case.rows or case.rows == "bulk"):
            size = (x.abs() @ w.abs().T + bias.nan_to_num(neginf=0.0).abs()).amax(1)
            unit = 2.0**-11 if case.tf32 else 2.0**-53 if case.dtype == "float64" else 2.0**-24
            rounding = min(case.d + 1, 4 * (case.d + 1) ** 0.5) * unit * size
    expected = expected_fields(x, z, t, case.p, rounding, base)
    bad, problems, worst = ~expected["gradnorm"][0].isfinite(), [], 0.0
    for name, got in zip(FIELDS, scores.out.double(), strict=False):
        value, rel, absolute = expected[name]
        off = (got - value).abs().masked_fill(got == value, 0.0)  # inf too
        excess = (off - rel * value.abs() - absolute)[~bad].nan_to_num(torch.inf)
        error = ((got - value).abs() / value.abs())[~bad].nan_to_num(torch.inf)
        if name == "gradnorm":
            worst = error.max().item() if error.numel() else 0.0
        if (excess > 0).any():
            problems.append(f"{name} off by {error.max():.2e}, row {int(excess.argmax())} most")
        if not got[bad].isnan().all():
            problems.append(f"{name} of a row with a NaN is a number")
    if scores.prediction is not None:
        p = scores.prediction.clamp(0, case.c - 1)
        top = z.gather(1, p[:, None])[:, 0] >= z.amax(1) - 2 * rounding
        if not ((scores.prediction == p) & (top | bad)).all() or (scores.prediction[bad] != 0).any():
            problems.append("wrong prediction")
    return worst, problems


def configuration(case: Case, arch: int, problem: Problem) -> Config | None:
    """The case's configuration; None for the kernel's own choice."""
    if case.tma:
        rows, classes = map(int, case.tma.split("x"))
        return Config(rows, classes, 64, 8, 4 if rows * classes > 128 * 128 else 3, tma=True)
    x, w = problem.features, problem.weight
    if not case.as_if or w is None:
        return None
    shape = Shape(case.as_if, case.c, case.d, x.dtype, f"sm_{arch}", PROCESSORS[arch])
    config = dispatch.KERNELS[case.kernel.split(",")[0]].configuration(shape)
    return for_vector(vector(case.d, x.stride(0), w.stride(0)), config)


def mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, out_dtype: torch.dtype | None = None) -> None:
    """torch.mm as on CUDA, where it multiplies halves into float32."""
    out.copy_(a.to(out_dtype or a.dtype) @ b.to(out_dtype or b.dtype))


def score(case: Case, arch: int, problem: Problem, scores: Scores) -> None:
    name, _, variant = case.kernel.partition(", ")
    kernel = cluster if name == "cluster" else dispatch.KERNELS[name]
    twice = (lambda arch, rows: False) if variant == "x read once" else one_tile.asynchronous_products
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    with (
        mock.patch.object(torch, "mm", mm),
        mock.patch.object(library, "why_not_halves", lambda device, dtype: ""),
        mock.patch.object(one_tile, "asynchronous_products", twice),
    ):
        dispatch.run(kernel, problem, scores, configuration(case, arch, problem))


def run_logsumexp(case: Case, x: torch.Tensor, w: torch.Tensor) -> tuple[float, list[str]]:
    out = own_kernels.logsumexp(x, w, case.processors, bool(case.tma), "one slot" not in case.kernel).double()
    expected = torch.logsumexp(x.double() @ w.double().T, 1)
    error = ((out - expected) / expected).abs().nan_to_num(torch.inf).max().item()
    return error, [f"off by {error:.2e}"] if error > 1e-6 else []


def execute(case: Case, arch: int, options: Options, edit: Edit | None = None) -> Outcome:
    """Run a case on the emulator."""
    began, outcome = time.process_time(), Outcome()
    problem = problem_of(case)
    dtype = torch.promote_types(problem.features.dtype, torch.float32)
    out = torch.full((len(FIELDS) if case.fields else 1, case.b), torch.nan, dtype=dtype)
    scores = Scores(out, torch.full((case.b,), -1) if case.fields else None)
    inputs = {name: t for name, t in problem._asdict().items() if isinstance(t, torch.Tensor)}
    emulator = Emulator(arch, options, inputs, case.processors, edit)
    try:
        if case.kernel.startswith("logsumexp") and problem.weight is not None:
            outcome.error, outcome.problems = run_logsumexp(case, problem.features, problem.weight)
        else:
            score(case, arch, problem, scores)
            base = 1e-12 if case.dtype == "float64" else 2e-6 if options.inexact else 1e-6
            outcome.error, outcome.problems = judge(case, problem, scores, base)
    except EmulatorError as failure:
        outcome.problems.append(str(failure))
    for what, times in emulator.findings.items():
        (outcome.notes if what.startswith("note") else outcome.problems).append(f"{what} ({times}x)")
    outcome.seconds = time.process_time() - began
    return outcome
