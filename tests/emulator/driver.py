"""Replaces Triton's CUDA driver: compiles kernels for a GPU that this machine lacks, and executes their launches.

It emulates PTX, so `ptxas` does not run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from .machine import Machine, Options
from .memory import Region
from .ptx import Array, Program
from .translation import translate

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
Edit = Callable[[str, str], str]  # (kernel, PTX) -> PTX
SHARED = {80: 163 * 1024, 90: 227 * 1024}
PROCESSORS = {80: 108, 90: 132}


class TensorMap(NamedTuple):
    """The arguments of cuTensorMapEncodeTiled, innermost dimension last."""

    base: int
    shape: Sequence[int]
    strides: Sequence[int]  # in elements
    box: Sequence[int]
    itemsize: int
    swizzle: int  # 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes


@dataclass
class Launch:
    metadata: Any  # Triton's, of the compiled kernel
    ptx: str
    programs: int
    params: list[Array] = field(default_factory=list)  # the bytes of each
    maps: dict[int, TensorMap] = field(default_factory=dict)  # the parameters that are tensor maps
    tensors: list[torch.Tensor] = field(default_factory=list)  # that the kernel may access

    def add(self, kind: str, value: float) -> None:
        bits = np.uint64(int(value) & 0xFFFFFFFFFFFFFFFF)
        self.params.append(np.array([value, 0], np.float32) if kind == "fp32" else np.array([bits]))


class _Launcher:
    """Triton's launcher of a compiled kernel."""

    ptx: str

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = dict(source.signature), metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        assert (y, z) == (1, 1) and not getattr(self.metadata, "global_scratch_size", 0)
        launch = Launch(self.metadata, self.ptx, x)
        boxes = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        # packed metadata, launch metadata and two hooks precede the arguments
        for argument, kind in zip(rest[4:], self.signature.values(), strict=True):
            if kind.startswith("tensordesc"):
                assert argument.strides[-1] == 1 and argument.padding == "zero"
                base, shape, strides, box = argument.base, argument.shape, argument.strides, next(boxes)
                of = TensorMap(base.data_ptr(), shape, strides, box["block_size"], box["elem_size"], box["swizzle"])
                launch.maps[len(launch.params)] = of
                for value in (0, *shape, *strides):
                    launch.add("i64", value)
                launch.tensors.append(base)
            elif isinstance(argument, torch.Tensor):
                launch.add("i64", argument.data_ptr())
                launch.tensors.append(argument)
            elif kind != "constexpr":
                launch.add(kind, argument)
        launch.add("i64", 0)  # global scratch
        launch.add("i64", 0)  # profile scratch
        _driver.launch(launch)


class _Driver:
    launcher_cls = _Launcher
    arch = 80
    launch: Callable[[Launch], None]

    @property
    def utils(self) -> SimpleNamespace:
        properties = {"max_shared_mem": SHARED[self.arch], "multiprocessor_count": 1, "warpSize": 32}
        return SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: properties,
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # so that caches by device are caches by architecture

    def get_current_stream(self, device: int) -> int:
        return 0


_driver = _Driver()
_init_handles = CompiledKernel._init_handles
_hash = CUDABackend.hash


def _init_handles_with_ptx(self: Any) -> None:
    _init_handles(self)
    self._run.ptx = self.asm["ptx"]


program = lru_cache(64)(lambda ptx, cut: translate(Program(ptx, cut)))


class Emulator:
    """Compiles and executes kernels for sm_<arch> while it is the last one made.

    Kernels may read the elements of `inputs` but not write them; other tensors may be read and written. `edit` spoils a
    kernel on purpose.
    """

    def __init__(
        self, arch: int, options: Options, inputs: dict[str, torch.Tensor], processors: int, edit: Edit | None
    ) -> None:
        self.options, self.edit = options, edit
        options.copies_unfenced = TRITON < (3, 8)  # these versions leave out the fence
        self.inputs = {t.untyped_storage().data_ptr(): (name, t) for name, t in inputs.items()}
        self.findings: Counter[str] = Counter()
        torch.use_deterministic_algorithms(True)  # fills the result of torch.empty with NaN
        _driver.arch, _driver.launch = arch, self.execute
        driver.set_active(_driver)
        CompiledKernel._init_handles = _init_handles_with_ptx
        CUDABackend.make_cubin = lambda *arguments: b""
        CUDABackend.hash = lambda self: (
            f"{_hash(self)}-without-ptxas"
        )  # a cache entry of its own: a GPU must not load it
        answers = {"architecture": f"sm_{arch}", "multiprocessors": processors or PROCESSORS[arch]}
        for name, module in list(sys.modules.items()):  # the project's own device queries
            for question in answers.keys() & vars(module).keys() if name.startswith("gradnorm_fast.kernels.") else ():
                setattr(module, question, lambda device, answer=answers[question]: answer)

    def execute(self, launch: Launch) -> None:
        ptx = self.edit(launch.metadata.name, launch.ptx) if self.edit else launch.ptx
        cut = 60 if self.options.schedule == "random" else 0
        machine = Machine(program(ptx, cut), launch, self._regions(launch.tensors), self.options)
        try:
            machine.run()
        finally:
            self.findings.update(machine.findings)

    def _regions(self, tensors: list[torch.Tensor]) -> list[Region]:
        found = {}
        for i, t in enumerate(tensors):
            start, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            name, declared = self.inputs.get(start, (f"argument {i} {t.dtype} {list(t.shape)}", None))
            if size:
                found[start] = Region(start, size, name, declared is not None, _elements(declared))
        return list(found.values())


def _elements(t: torch.Tensor | None) -> Array | None:
    """Which bytes of its storage are elements of a tensor; None if all are."""
    if t is None:
        return None
    used = torch.zeros(t.untyped_storage().nbytes() // t.element_size(), dtype=torch.bool)
    used.as_strided(t.shape, t.stride(), t.storage_offset())[...] = True
    return None if used.all() else np.repeat(used.numpy(), t.element_size())
