"""Throughput in pytest-benchmark: every workload of the grid x every implementation the machine can hold.

    pytest benchmarks/ --benchmark-only -k "1024x2048x1000 and (fast_gradnorm or matmul)"

Each implementation is checked against float64 autograd before it is timed. `make bench` adds rounds in turn, GPU time,
CUDA graphs, memory and plots.
"""

from typing import Any

import pytest
import torch

import measure
import peers
import workloads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", peers.for_device(DEVICE))
@pytest.mark.parametrize("workload", workloads.for_device(DEVICE).values(), ids=str)
@pytest.mark.benchmark(warmup=True, max_time=1.0)
def test_throughput(benchmark: Any, workload: workloads.Workload, name: str) -> None:
    try:
        measure.check_memory(name, workload, DEVICE)
    except MemoryError as error:
        pytest.skip(str(error))
    implementation = peers.ALL[name]
    features, *head = workload.inputs(DEVICE)
    features = features[: implementation.max_rows]
    score = implementation.make(*head)
    if implementation.scores:
        assert measure.relative_error(score, features, *head) <= implementation.tolerance
    benchmark.group = str(workload)
    benchmark.extra_info["rows"] = len(features)
    if len(features) < workload.batch:
        benchmark.name += f" ({len(features)} of {workload.batch} rows)"

    @benchmark
    def call() -> None:
        score(features)
        measure.synchronize(DEVICE)
