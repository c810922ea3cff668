"""Measure in rounds in which each implementation takes its turn, so that noise hits all of them alike.

On a CPU, wall time. On a GPU, four figures: device time by events with a cold L2 (inputs rotate, together larger than
the L2), wall time per call with a synchronisation (launch overhead shows where the batch is small), time inside a CUDA
graph, and peak extra memory. Raw times are kept; medians, quartiles, outliers and ratios are computed from them.
"""

from __future__ import annotations

import gc
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradnorm_fast.reference import autograd_gradnorm

import peers
from workloads import DTYPES, Workload

Call = Callable[[], object]
ROUNDS = 15
SECONDS = 4.0  # per implementation and workload; slow ones get fewer rounds, three at least
CHECKED_ROWS = 8


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions, to be kept with the figures."""
    import triton

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            return ""

    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cpu": _proc("cpuinfo", "model name"),
        "threads": torch.get_num_threads(),
        "device": "CPU",
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def _proc(file: str, key: str) -> str:
    """A value in /proc; empty where there is none."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def check_memory(name: str, workload: Workload, device: str) -> None:
    """MemoryError where the implementation may take more than is free."""
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = int(_proc("meminfo", "MemAvailable").partition(" ")[0] or 4 * 2**20) * 1024
    needed = peers.memory_needed(name, workload)
    if needed > 0.8 * free:
        raise MemoryError(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ceilings(device: str) -> dict[str, Any]:
    """The machine's limits: bytes per second of a copy (read and written), operations per second of a large matmul."""
    cuda = device.startswith("cuda")

    def best(call: Call) -> float:
        return min((device_times([call], 10, device) if cuda else wall_times(call, 10, device))[2:])

    def matmul_rate(dtype: torch.dtype, n: int = 8192 if cuda else 2048) -> float:
        a = torch.randn(n, n, device=device).to(dtype)
        return 2 * n**3 / best(lambda: a @ a)

    def copy_rate(n: int = 2**30 if cuda else 2**27) -> float:
        source, target = torch.empty(2, n // 4, device=device).fill_(1.0)
        return 2 * n / best(lambda: target.copy_(source))

    rates = {name: matmul_rate(DTYPES[name]) for name in (DTYPES if cuda else ["float32"])}
    return {"copy_bytes_per_s": copy_rate(), "matmul_flop_per_s": rates}


def wall_times(call: Call, repeats: int, device: str) -> list[float]:
    """Seconds per call, the device idle before and after."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def device_times(calls: Sequence[Call], repeats: int, device: str) -> list[float]:
    """Seconds on the GPU of each of `repeats` calls, taken in turn from `calls`; launched behind a pause that hides
    the launches."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize(device)
    torch.cuda._sleep(400_000 * repeats)  # cycles: about 0.2 ms of launching per call
    marks[0].record()
    for i in range(repeats):
        calls[i % len(calls)]()
        marks[i + 1].record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def graph_time(calls: Sequence[Call], device: str) -> float:
    """Seconds per call inside a CUDA graph of all the calls."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    (seconds,) = device_times([graph.replay], 1, device)
    del graph, kept
    return seconds / len(calls)


def copies_beyond_l2(w: Workload, device: str, most: int) -> int:
    """How many copies of the inputs are together more than twice the L2; 1 on a CPU."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0
    return min(most, 1 + -(-2 * l2 // w.bytes))


def peak_extra_memory(call: Callable[[], Tensor | tuple[Tensor, ...]], device: str = "cpu") -> int:
    """Bytes the call allocates at its worst moment, less what it returns."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = call()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0)
        peak = max(live)
    returned = [result] if isinstance(result, Tensor) else result
    return peak - sum(t.numel() * t.element_size() for t in returned)


def relative_error(score: peers.Score, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Largest relative difference from float64 autograd on the same inputs, over a few rows of the full batch."""
    got = score(x)[:CHECKED_ROWS].double()
    expected = autograd_gradnorm(x[: len(got)].double(), weight.double(), bias.double())
    return ((got - expected) / expected).abs().max().item()


def measure(workload: Workload, names: list[str], device: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """One record per implementation; what cannot run says why in `skipped`."""
    inputs = workload.inputs(device)
    records = {name: {"workload": str(workload), "implementation": name} for name in names}
    ready: dict[str, _Timed] = {}
    for name, record in records.items():
        try:
            check_memory(name, workload, device)
            timed = _Timed(name, workload, inputs, device)
            record |= timed.checked()
            ready[name] = timed
        except Exception as error:  # a peer that fails is a finding; it does not stop the others
            if name == peers.OURS:
                raise
            record["skipped"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    for i in range(rounds):
        for timed in ready.values():
            if i < timed.rounds:
                timed.round()
    found = [record | (ready[name].times if name in ready else {}) for name, record in records.items()]
    ready.clear()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return found


class _Timed:
    """One implementation on one workload, warm, with its inputs and its times."""

    def __init__(self, name: str, workload: Workload, inputs: tuple[Tensor, Tensor, Tensor], device: str) -> None:
        self.implementation, self.device = peers.ALL[name], device
        x, *head = inputs
        rows = min(len(x), self.implementation.max_rows or len(x))
        self.scale = len(x) / rows
        self.inputs = x[:rows], *head
        self.score = self.implementation.make(*head)
        self.call = lambda: self.score(self.inputs[0])
        self.call()  # compiles, allocates, warms up
        quick = min(wall_times(self.call, 2, device))
        self.rounds = ROUNDS if quick < SECONDS / ROUNDS else max(3, int(SECONDS / quick))
        self.inner = max(1, min(50, int(0.002 / quick)))  # short calls are timed together: the clock is coarse
        self.times: dict[str, list[float]] = {"wall": []}
        if device.startswith("cuda"):
            self.times |= {"device": [], "graph": []} if self.implementation.capturable else {"device": []}
            copies = copies_beyond_l2(workload, device, 64) if self.implementation.capturable else 1
            self.rotated: list[Call] = [self.call, *(self._on_a_copy(name) for _ in range(copies - 1))]

    def _on_a_copy(self, name: str) -> Call:
        x, weight, bias = (t.clone() for t in self.inputs)
        score = self.score if name == "torch.compile" else self.implementation.make(weight, bias)
        return lambda: score(x)

    def checked(self) -> dict[str, Any]:
        record: dict[str, Any] = {"extra_memory": peak_extra_memory(self.call, self.device)}
        if self.implementation.scores:
            record["relative_error"] = error = relative_error(self.score, *self.inputs)
            if not error <= self.implementation.tolerance:
                raise AssertionError(f"relative error {error:.2g} > {self.implementation.tolerance:g}")
        if self.scale > 1:
            record["scaled_from_rows"] = len(self.inputs[0])
        return record

    def round(self) -> None:
        def inner() -> None:
            for _ in range(self.inner):
                self.call()

        self.times["wall"] += [t * self.scale / self.inner for t in wall_times(inner, 1, self.device)]
        if "device" in self.times:
            repeats = max(len(self.rotated), 3) if self.scale == 1 else 1
            times = device_times(self.rotated, repeats, self.device)
            self.times["device"].append(statistics.median(times) * self.scale)
        if "graph" in self.times:
            try:
                self.times["graph"].append(graph_time(self.rotated, self.device))
            except RuntimeError:
                del self.times["graph"]
