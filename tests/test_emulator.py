"""The kernels as Triton compiles them for two GPUs, executed on the CPU (tests/emulator/README.md)."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the emulator's stand-in for the driver needs Triton 3.6")

from emulator.cases import execute
from emulator.controls import CONTROLS, quick, reported
from emulator.machine import Options
from one_hot_cases import OneHot

ADVERSARY = Options(copies="early", products="late")  # finds buffers that are refilled too soon
QUICK = [pytest.param(case, arch, id=f"sm_{arch} {case}") for arch in (80, 90) for case in quick(arch)]


@pytest.fixture(scope="module")
def process():
    """A process that can compile, as this one cannot while it interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(int).result()  # start it while the variable is unset
            yield pool


@pytest.mark.parametrize("case, arch", QUICK)
def test_kernel(process, case, arch):
    outcome = process.submit(execute, case, arch, ADVERSARY).result()
    assert not outcome.problems


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("target", ["label", "predicted"])
def test_one_hot_kernel(process, arch, target):
    case = OneHot("float16", 18, 64, 300, target, 2.0, 18)
    assert not process.submit(case.execute, arch, ADVERSARY).result().problems


@pytest.mark.parametrize("control", [c for c in CONTROLS if c.quick], ids=lambda control: control.name)
def test_spoiled_kernel_is_reported(process, control):
    text, found = process.submit(reported, control).result()
    assert found, text
