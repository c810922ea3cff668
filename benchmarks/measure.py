"""How it is measured: rounds in which every implementation takes its turn, so that a noisy machine is noisy for all.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradnorm_fast.reference import autograd_gradnorm

import peers
from workloads import DTYPES, Workload

ROUNDS = 15
SECONDS = 4.0  # per implementation and workload; slow ones get fewer rounds, three at least
CHECKED_ROWS = 8


def environment(device: str) -> dict[str, Any]:
    """What a figure means nothing without."""
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
        "cpu": next((s.split(":")[1].strip() for s in _lines("/proc/cpuinfo") if s.startswith("model name")), ""),
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


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    available = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    return int(available[0]) * 1024 if available else 4 * 2**30


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ceilings(device: str) -> dict[str, Any]:
    """The two rates nothing exceeds: bytes per second of a copy (read and written), operations of a large matmul."""
    cuda = device.startswith("cuda")
    source = torch.randn(2**30 // 4 if cuda else 2**27 // 4, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    found: dict[str, Any] = {"copy_bytes_per_s": 2 * source.numel() * 4 / copy, "matmul_flop_per_s": {}}
    source = target = None
    n = 8192 if cuda else 2048
    for name in DTYPES if cuda else ["float32"]:
        a = torch.randn(n, n, device=device).to(DTYPES[name])
        found["matmul_flop_per_s"][name] = 2 * n**3 / _best(lambda a=a: a @ a, device)
    return found


def _best(call: Callable[[], object], device: str, repeats: int = 10) -> float:
    times = device_times([call], repeats, device) if device.startswith("cuda") else wall_times(call, repeats, device)
    return min(times[2:])


def wall_times(call: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds per call, the device idle before and after."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def device_times(calls: list[Callable[[], object]], repeats: int, device: str) -> list[float]:
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


def graph_times(calls: list[Callable[[], object]], repeats: int, device: str) -> list[float]:
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
    times = [t / len(calls) for t in device_times([graph.replay], repeats, device)]
    del graph, kept
    return times


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
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
    returned = [result] if isinstance(result, Tensor) else result
    return peak - sum(t.numel() * t.element_size() for t in returned)


def relative_error(score: peers.Score, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Largest relative difference from float64 autograd on the same inputs, over a few rows of the full batch."""
    got = score(x)[:CHECKED_ROWS].double()
    expected = autograd_gradnorm(x[: len(got)].double(), weight.double(), bias.double())
    return ((got - expected) / expected).abs().max().item()


def measure(workload: Workload, names: list[str], device: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """One record per implementation; what cannot run says why in `skipped`."""
    x, weight, bias = workload.inputs(device)
    records = {name: {"workload": str(workload), "implementation": name} for name in names}
    ready: dict[str, _Timed] = {}
    for name in names:
        needed, free = peers.memory_needed(name, workload), free_memory(device)
        if needed > 0.8 * free:
            records[name]["skipped"] = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            continue
        try:
            timed = _Timed(workload, name, x, weight, bias, device)
            records[name] |= timed.checked()
            ready[name] = timed
        except Exception as error:  # a peer that fails is a finding; it does not stop the others
            if name == peers.OURS:
                raise
            records[name]["skipped"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    for i in range(rounds):
        for timed in ready.values():
            if i < timed.rounds:
                timed.round()
    for name, timed in ready.items():
        records[name] |= timed.times
    ready.clear()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return list(records.values())


class _Timed:
    """One implementation on one workload, warm, with its inputs."""

    def __init__(self, workload: Workload, name: str, x: Tensor, weight: Tensor, bias: Tensor, device: str) -> None:
        self.name, self.device = name, device
        self.implementation = peers.ALL[name]
        rows = min(len(x), self.implementation.max_rows or len(x))
        self.scale = len(x) / rows
        self.x, self.weight, self.bias = x[:rows], weight, bias
        self.score = self.implementation.make(weight, bias)
        self.call = lambda: self.score(self.x)
        self.call()  # compiles, allocates, warms up
        quick = min(wall_times(self.call, 2, device))
        self.rounds = ROUNDS if quick < SECONDS / ROUNDS else max(3, int(SECONDS / quick))
        self.inner = max(1, min(50, int(0.002 / quick)))  # short calls are timed together: the clock is coarse
        self.times: dict[str, list[float]] = {"wall": []}
        if device.startswith("cuda"):
            self.times["device"] = []
            self.rotated = self._rotated(workload)
            if self.implementation.capturable:
                self.times["graph"] = []

    def _rotated(self, workload: Workload) -> list[Callable[[], Tensor]]:
        """The call on copies of its inputs, together more than twice the L2."""
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        copies = min(64, 1 + -(-2 * l2 // workload.bytes)) if self.implementation.capturable else 1
        calls = []
        for i in range(copies):
            x, weight, bias = (t if i == 0 else t.clone() for t in (self.x, self.weight, self.bias))
            score = self.implementation.make(weight, bias) if i and self.name != "torch.compile" else self.score
            calls.append(lambda x=x, score=score: score(x))
        return calls

    def checked(self) -> dict[str, Any]:
        record: dict[str, Any] = {"extra_memory": peak_extra_memory(self.call, self.device)}
        if self.implementation.scores:
            record["relative_error"] = error = relative_error(self.score, self.x, self.weight, self.bias)
            if not error <= self.implementation.tolerance:
                raise AssertionError(f"relative error {error:.2g} > {self.implementation.tolerance:g}")
        if self.scale > 1:
            record["scaled_from_rows"] = len(self.x)
        return record

    def round(self) -> None:
        def inner() -> None:
            for _ in range(self.inner):
                self.call()

        per_call = self.scale / self.inner
        self.times["wall"] += [t * per_call for t in wall_times(inner, 1, self.device)]
        if "device" in self.times:
            repeats = max(len(self.rotated), 3) if self.scale == 1 else 1
            times = device_times(self.rotated, repeats, self.device)
            self.times["device"].append(statistics.median(times) * self.scale)
        if "graph" in self.times:
            try:
                self.times["graph"] += graph_times(self.rotated, 1, self.device)
            except RuntimeError:
                del self.times["graph"]
