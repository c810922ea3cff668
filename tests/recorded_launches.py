"""Compile kernels for an H100 and record their launches instead of running them. Does not work in the interpreter.

Prints JSON: for each call the launches that Triton's binder makes, and those of a first and a second call by `launch`.
With --time: microseconds per call by the binder and by `launch`, without recording.
"""

import json
import sys
import time

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gradnorm_fast.kernels import dispatch, launch, one_tile, tiled
from gradnorm_fast.kernels.config import Config
from gradnorm_fast.kernels.experimental import cluster
from gradnorm_fast.kernels.problem import FIELDS, Problem, Scores

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
    def __init__(self, source, metadata): ...

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        launches.append([x, y, z, stream, function, str(packed), *map(self.shown, arguments), (enter, leave)])

    def shown(self, argument):
        """Tensors by dtype and by offset in MEMORY; workspaces lie elsewhere and are new in each call."""
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
FACTS = {"architecture": lambda device: "sm_90", "multiprocessors": lambda device: 132}
for name, module in list(sys.modules.items()):
    if name.startswith("gradnorm_fast.kernels."):
        vars(module).update({fact: value for fact, value in FACTS.items() if hasattr(module, fact)})


def problem(rows, depth, classes, offset=0):
    x = MEMORY[offset : offset + rows * depth].view(rows, depth)
    return Problem(x, MEMORY[2**19 : 2**19 + classes * depth].view(classes, depth), MEMORY[:classes])


def calls():
    small, wide = Config(64, 64, 64, 4, 3), Config(64, 128, 64, 4, 3, tma=True)
    for all_fields in (False, True):
        for rows, depth, classes, offset, kernel, config in (
            (64, 64, 10, 0, one_tile, None), (1, 64, 10, 0, one_tile, None),
            (64, 64, 10, 1, one_tile, None), (64, 63, 10, 0, one_tile, None),
            (64, 8, 10, 0, one_tile, None),
            (3, 256, 300, 0, tiled, None), (70, 64, 300, 0, tiled, small),
            (70, 64, 300, 0, tiled, wide), (70, 64, 300, 0, cluster, None),
        ):  # fmt: skip
            if kernel is not cluster or cluster.CLUSTERS:
                fields = all_fields and kernel is not cluster
                prediction = torch.zeros(rows, dtype=torch.int64) if fields else None
                scores = Scores(torch.zeros(len(FIELDS), rows), prediction)
                arguments = kernel, problem(rows, depth, classes, offset), scores, config
                yield lambda a=arguments: dispatch.run(*a)


def recorded(call):
    launches.clear()
    call()
    return list(launches)


def microseconds(call):
    """The shortest of 20 rounds of 100 calls."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - start) * 1e4)
    return min(times)


if "--time" in sys.argv:
    Launcher.__call__ = lambda self, *arguments: None
    for kernel, rows, classes in (
        (one_tile, 64, 10), (tiled, 1, 300), (tiled, 64, 300),
    ):  # fmt: skip
        arguments = kernel, problem(rows, 256, classes), Scores(torch.zeros(1, rows), None)
        for launch.KNOWN in (False, True):
            dispatch.run(*arguments)
            how = "launch" if launch.KNOWN else "binder"
            times = microseconds(lambda a=arguments: dispatch.run(*a))
            print(f"{kernel.__name__.rpartition('.')[2]:9} {rows:2} rows by {how}: {times:.1f} µs")
    sys.exit()

result = []
for call in calls():
    launch.KNOWN = False
    by_binder = recorded(call)
    launch.KNOWN = True
    result.append([by_binder, recorded(call), recorded(call)])

# A profiler's hooks, set in every way that Triton allows: each must see all three launches.
runtime, one = knobs.runtime, next(calls())
before, hooked = (runtime.launch_enter_hook, runtime.launch_exit_hook), {}
for way in ("chain", "exit only", "function", "none"):
    seen: list[object] = []
    runtime.launch_enter_hook, runtime.launch_exit_hook = before
    if way == "chain":
        runtime.launch_enter_hook.add(seen.append)
    elif way == "exit only":
        runtime.launch_exit_hook.add(seen.append)
    elif way == "function":
        runtime.launch_enter_hook = seen.append
    else:
        runtime.launch_enter_hook = runtime.launch_exit_hook = None
    for _ in range(3):
        launches.clear()
        one()
        for hook in launches[0][-1]:
            if hook is not None:
                hook(None)
    for chain in before:
        chain.calls.clear()
    hooked[way] = len(seen)
seen = []
one_tile.one_tile_kernel.add_pre_run_hook(lambda *arguments, **options: seen.append(arguments))
for _ in range(3):
    one()
hooked["pre-run"] = len(seen)
for recording in (r for of_call in result for r in of_call):
    for record in recording:
        record.pop()
print(json.dumps({"calls": result, "hooked": hooked}))
