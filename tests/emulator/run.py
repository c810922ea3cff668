"""Run the cases: Triton compiles the kernels for a GPU, the CPU executes them, float64 is the reference.

    python tests/emulator/run.py                                         both architectures, three schedules
    python tests/emulator/run.py --arch 90 --only "one_tile float16" --schedule random:3 --copies early
    python tests/emulator/run.py --only bulk --inexact                   as inexact as hardware may be
    python tests/emulator/run.py --controls                              spoiled kernels: each must be reported

Prints one line per case, then "N passed, N failed". The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the project
sys.path.insert(0, str(Path(__file__).parents[1]))

from one_hot_cases import OneHot, one_hot_cases

from emulator import own_kernels
from emulator.cases import Case, cases, execute
from emulator.controls import CONTROLS, quick, reported
from emulator.machine import SCHEDULES, Options


def run(job: tuple[Case, int, Sequence[Options]]) -> tuple[str, bool]:
    case, arch, schedules = job
    try:
        outcomes = [(case.execute if isinstance(case, OneHot) else partial(execute, case))(arch, o) for o in schedules]
    except Exception as failure:  # the kernel refuses the case, or the emulator lacks an instruction
        return f"FAIL sm_{arch} {case!s:70} {type(failure).__name__}: {failure}", False
    good = not any(outcome.problems for outcome in outcomes)
    worst, seconds = max(outcome.error for outcome in outcomes), sum(outcome.seconds for outcome in outcomes)
    lines = [f"{'ok  ' if good else 'FAIL'} sm_{arch} {case!s:70} {worst:.1e} {seconds:6.1f} s"]
    for options, outcome in zip(schedules, outcomes, strict=True):
        lines += [f"     [{options}] {problem[:300]}" for problem in outcome.problems]
    notes = {note.split(" (")[0] for outcome in outcomes for note in outcome.notes}
    return "\n".join([*lines, *(f"     {note}" for note in sorted(notes))]), good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=(80, 90))
    parser.add_argument("--only", default="", help="cases whose line contains this")
    parser.add_argument("--quick", action="store_true", help="the cases of `make test`")
    parser.add_argument("--controls", action="store_true", help="spoiled kernels instead")
    parser.add_argument("--schedule", help="lockstep or random:SEED, in place of the three")
    when = ("late", "early", "random")
    parser.add_argument("--copies", choices=when, default="late", help="when cp.async and TMA take effect")
    parser.add_argument("--products", choices=when, default="late", help="and when wgmma does")
    parser.add_argument("--inexact", action="store_true", help="approximate functions, logarithms and sums may be off")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    name, _, seed = (args.schedule or "").partition(":")
    given = (Options(name, int(seed or 0), args.copies, args.products),) if name else SCHEDULES
    schedules = tuple(replace(options, inexact=args.inexact) for options in given)
    chosen = [
        (case, arch, schedules)
        for arch in args.arch
        for case in (quick(arch) if args.quick else [*cases(arch), *one_hot_cases()])
    ]
    jobs: list[Any] = [job for job in chosen if args.only in str(job[0])]
    if args.controls:
        jobs = [control for control in CONTROLS if args.only in control.name and control.arch in args.arch]
    failed = 0
    begin = own_kernels.use_inexact_logarithm if args.inexact else None
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), initializer=begin) as pool:
        for text, good in pool.map(reported if args.controls else run, jobs):
            print(text, flush=True)
            failed += not good
    print(f"{len(jobs) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
