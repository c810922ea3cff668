"""Run kernels as on an H100 that is not there: compiled for it, launched into a record. Not in the interpreter.

Prints, as JSON, per call what was launched by Triton's binder, and what the first and second time by `launch`.
With --time: instead, microseconds per call by the binder and by `launch`, the record left out.
"""

import json
import sys
import time

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gradnorm_fast.kernels import cluster, cooperative, few_rows, launch, one_tile, rows, split
from gradnorm_fast.kernels.targets import Config

MEMORY = torch.zeros(2**20, dtype=torch.bfloat16)
launches: list[list[object]] = []
binaries: list[bytes] = []


class Utils:
    def load_binary(self, name, binary, shared, device):
        if binary not in binaries:
            binaries.append(binary)
        return 1, binaries.index(binary), 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, source, metadata):
        self.cooperative = metadata.launch_cooperative_grid

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        shown = [self.shown(a) for a in arguments]
        launches.append([x, y, z, stream, function, self.cooperative, str(packed), *shown])

    def shown(self, argument):
        """Tensors by dtype and by where they are in MEMORY; workspaces are elsewhere, anew in each call."""
        if hasattr(argument, "base"):  # a tensor descriptor
            return [*argument.shape, *argument.strides, *argument.block_shape, self.shown(argument.base)]
        if not hasattr(argument, "data_ptr"):
            return argument
        at = argument.data_ptr() - MEMORY.data_ptr()
        return [str(argument.dtype), at if 0 <= at < MEMORY.nbytes else "workspace"]


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7


driver.set_active(Driver())

for module in (cluster, cooperative, few_rows, one_tile, rows, split):
    module.architecture = lambda device: "sm_90"
    if hasattr(module, "multiprocessors"):
        module.multiprocessors = lambda device: 132


def calls():
    small, wide = Config(64, 64, 64, 4, 3), Config(64, 128, 64, 4, 3, tma=True)
    for head in (False, True):
        for b, d, c, offset, score, config in (
            (64, 64, 10, 0, one_tile.score_one_tile, None), (1, 64, 10, 0, one_tile.score_one_tile, None),
            (64, 64, 10, 1, one_tile.score_one_tile, None), (64, 63, 10, 0, one_tile.score_one_tile, None),
            (3, 256, 300, 0, few_rows.score_few_rows, None), (70, 64, 300, 0, split.score_split, small),
            (70, 64, 300, 0, split.score_split, wide), (70, 64, 300, 0, cooperative.score_cooperative, small),
            (70, 64, 300, 0, cluster.score_cluster, None),
        ):  # fmt: skip
            if score is cluster.score_cluster and not cluster.CLUSTERS:
                continue
            x = MEMORY[offset : offset + b * d].view(b, d)
            weight, bias = MEMORY[2**19 : 2**19 + c * d].view(c, d), MEMORY[:c]
            out, prediction = torch.zeros(6, b), torch.zeros(b, dtype=torch.int64) if head else None
            yield lambda a=(x, weight, bias, out, prediction, 1.0, 1.0, 0.0, config), f=score: f(*a)


def recorded(call):
    launches.clear()
    call()
    return list(launches)


def microseconds(call):
    """The least of 20 times, 100 calls each."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - start) * 1e4)
    return min(times)


if "--time" in sys.argv:
    Launcher.__call__ = lambda self, *arguments: None
    x, bias = MEMORY[: 64 * 256].view(64, 256), MEMORY[:300]
    for score, rows_, classes in (
        (one_tile.score_one_tile, 64, 10), (few_rows.score_few_rows, 1, 300), (split.score_split, 64, 300),
    ):  # fmt: skip
        weight, out = MEMORY[2**19 : 2**19 + classes * 256].view(classes, 256), torch.zeros(1, rows_)
        arguments = (x[:rows_], weight, bias[:classes], out, None, 1.0, 1.0, 0.0)
        for launch.KNOWN in (False, True):
            score(*arguments)
            how = "launch" if launch.KNOWN else "binder"
            print(f"{score.__name__:15} by {how}: {microseconds(lambda f=score, a=arguments: f(*a)):.1f} µs")
    sys.exit()

result = []
for call in calls():
    launch.KNOWN = False
    by_binder = recorded(call)
    launch.KNOWN = True
    result.append([by_binder, recorded(call), recorded(call)])
print(json.dumps(result))
