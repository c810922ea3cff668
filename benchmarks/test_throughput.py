"""Throughput in pytest-benchmark: every workload of the grid x every implementation the machine can hold.

    pytest benchmarks/ --benchmark-only
    pytest benchmarks/ --benchmark-only -k "1024x2048x1000 and (fast_gradnorm or matmul)"

One group per workload; the bare matmul is the baseline. Each implementation is checked against float64 autograd before
it is timed. `make bench` has what this has not: rounds in turn, GPU time, CUDA graphs, memory, plots.
"""

import pytest
import torch

import measure
import peers
import workloads

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", peers.for_device(DEVICE))
@pytest.mark.parametrize("workload", workloads.for_device(DEVICE), ids=str)
def test_throughput(benchmark, workload, name):
    needed, free = peers.memory_needed(name, workload), measure.free_memory(DEVICE)
    if needed > 0.8 * free:
        pytest.skip(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    implementation = peers.ALL[name]
    features, weight, bias = workload.inputs(DEVICE)
    rows = min(len(features), implementation.max_rows or len(features))
    features = features[:rows]
    score = implementation.make(weight, bias)
    if implementation.scores:
        assert measure.relative_error(score, features, weight, bias) <= implementation.tolerance
    benchmark.group = str(workload)
    benchmark.extra_info |= {"baseline": name == peers.BASELINE, "rows": rows, "rows_of_workload": workload.batch}
    if rows < workload.batch:
        benchmark.name += f" ({rows} of {workload.batch} rows, scaled)"

    def call():
        score(features)
        measure.synchronize(DEVICE)

    once = min(measure.wall_times(call, 2, DEVICE))
    benchmark.pedantic(call, rounds=max(3, min(20, int(1 / once))), iterations=1, warmup_rounds=1)
    if benchmark.stats is not None:  # None under --benchmark-disable
        times = benchmark.stats.stats
        times.data = [t * workload.batch / rows for t in times.data]
