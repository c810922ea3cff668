"""Calls of the kernel for labels, the predicted class and token statistics, for the emulator to execute."""

from __future__ import annotations

import itertools
import math
import time
from typing import NamedTuple

import torch
from emulator.cases import Outcome
from emulator.driver import Emulator
from emulator.machine import Options
from emulator.memory import EmulatorError

from gradnorm_fast import fast_gradnorm, token_statistics
from gradnorm_fast.kernels import dispatch, one_hot
from gradnorm_fast.kernels.config import Shape
from gradnorm_fast.kernels.problem import Problem, Scores


class OneHot(NamedTuple):
    """A call; labels with p = 2 are token statistics."""

    dtype: str
    b: int
    d: int
    c: int
    target: str  # label or predicted
    p: float
    as_if: int  # takes the configuration of so many rows
    masked: bool = False  # every third class by a bias of −inf

    @property
    def statistics(self) -> bool:
        return self.target == "label" and self.p == 2.0

    def __str__(self) -> str:
        masked = " masked" if self.masked else ""
        return f"one_hot {self.dtype} {self.b}x{self.d}x{self.c} {self.target} p={self.p:g} as_if={self.as_if}{masked}"

    def problem(self) -> Problem:
        """Its logits are multiples of 1/16 that float32 holds exactly, up to about 60."""
        g = torch.Generator().manual_seed(self.b * 7919 + self.d * 31 + self.c)
        dtype = getattr(torch, self.dtype)
        shapes = (self.b, self.d), (self.c, self.d), (self.c,)
        x, w, bias = (torch.randint(-8, 9, shape, generator=g).to(dtype) / 4 for shape in shapes)
        x[:, 12:] = 0
        if self.masked:
            bias[::3] = -torch.inf
        labels = torch.arange(self.b) * 7 % self.c
        return Problem(x, w, bias, None, 5.0, target=labels if self.target == "label" else "predicted", p=self.p)

    def execute(self, arch: int, options: Options) -> Outcome:
        """Run it on the emulator. Allowed is 1e-6 (2e-6 with inexact functions), and 6e-8·|z − m|/T < 1e-6."""
        began, outcome, problem = time.process_time(), Outcome(), self.problem()
        x, w, bias = (t.double() for t in problem[:3] if t is not None)
        inputs = {name: t for name, t in problem._asdict().items() if isinstance(t, torch.Tensor)}
        out = torch.full((4 if self.statistics else 1, self.b), torch.nan)
        config = one_hot.configuration(Shape.of(problem, self.as_if)._replace(arch=f"sm_{arch}"))
        emulator = Emulator(arch, options, inputs, 0, None)
        try:
            if self.statistics and isinstance(problem.target, torch.Tensor):
                dispatch.run(one_hot, problem, Scores(out, None), config)
                expected = torch.stack(token_statistics(x, w, problem.target, bias, temperature=problem.temperature))
            else:
                dispatch.run(one_hot, problem, Scores(out, None), config)
                gradient = dict(target=problem.target, p=self.p, temperature=problem.temperature)
                expected = fast_gradnorm(x, w, bias, **gradient)[None]
            outcome.error = ((out - expected) / expected).abs().nan_to_num(torch.inf).max().item()
            if outcome.error > (3e-6 if options.inexact else 2e-6):
                outcome.problems.append(f"off by {outcome.error:.2e}")
        except EmulatorError as failure:
            outcome.problems.append(str(failure))
        for what, times in emulator.findings.items():
            (outcome.notes if what.startswith("note") else outcome.problems).append(f"{what} ({times}x)")
        outcome.seconds = time.process_time() - began
        return outcome


def one_hot_cases() -> list[OneHot]:
    found = []
    for dtype, target, p in itertools.product(
        ("float16", "bfloat16", "float32"), ("label", "predicted"), (1.0, 2.0, math.inf, 3.0)
    ):
        found.append(OneHot(dtype, 18, 64, 300, target, p, 18))
        found.append(OneHot(dtype, 66, 64, 290, target, p, 50000, masked=p != 2.0))
    return found + [OneHot("float16", 5, d, 70, "label", 2.0, 5) for d in (67, 342, 440)]
