"""The Triton kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

# Workers of pytest-xdist share the cores. With all of torch's threads in each of them, they would mostly wait for one
# another: training the demo's network takes six times the processor time.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


@pytest.fixture
def batch_invariant(monkeypatch):
    """As in a process started with GRADNORM_FAST_BATCH_INVARIANT=1."""
    from gradnorm_fast import _backends

    monkeypatch.setenv("GRADNORM_FAST_BATCH_INVARIANT", "1")
    _backends.batch_invariant.cache_clear()
    yield
    _backends.batch_invariant.cache_clear()


pytest_plugins = ["command_line"]  # the fixtures of the command line's tests
