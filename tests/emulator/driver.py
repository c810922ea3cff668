"""A stand-in for Triton's CUDA driver: kernels are compiled for a GPU that is not there, launches go to a function.

`ptxas` does not run: PTX is what is emulated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

SHARED = {80: 163 * 1024, 90: 227 * 1024}
PROCESSORS = {80: 108, 90: 132}


@dataclass
class TensorMap:
    """What cuTensorMapEncodeTiled would be given, dimensions innermost last."""

    base: int
    shape: list[int]
    strides: list[int]  # in elements
    box: list[int]
    itemsize: int
    swizzle: int  # 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes


@dataclass
class Launch:
    name: str
    ptx: str
    programs: int
    num_warps: int
    num_ctas: int
    shared: int
    cooperative: bool
    params: list[tuple[str, Any]]  # of the kernel: ("i32", 5), ("*fp16", address), ("nvTmaDesc", TensorMap)
    tensors: list[torch.Tensor]  # what it may touch


class _Launcher:
    """What Triton makes of a compiled kernel to launch it."""

    ptx: str

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = dict(source.signature)
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        metadata, arguments = self.metadata, rest[4:]  # after packed metadata, launch metadata and two hooks
        assert (y, z) == (1, 1)
        assert not getattr(metadata, "global_scratch_size", 0) and not getattr(metadata, "profile_scratch_size", 0)
        params: list[tuple[str, Any]] = []
        tensors: list[torch.Tensor] = []
        descriptors = iter(getattr(metadata, "tensordesc_meta", None) or ())
        for argument, kind in zip(arguments, self.signature.values(), strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                meta = next(descriptors)
                assert argument.strides[-1] == 1 and argument.padding == "zero"
                shape, strides = list(argument.shape), list(argument.strides)
                box = list(meta["block_size"])
                at = TensorMap(argument.base.data_ptr(), shape, strides, box, meta["elem_size"], meta["swizzle"])
                params += [("nvTmaDesc", at), *(("i32", n) for n in shape), *(("i64", n) for n in strides)]
                tensors.append(argument.base)
            elif isinstance(argument, torch.Tensor):
                params.append((kind, argument.data_ptr()))
                tensors.append(argument)
            else:
                params.append((kind, argument))
        params += [("*i8", 0), ("*i8", 0)]  # global and profile scratch
        m = metadata
        launch = Launch(
            m.name, self.ptx, x, m.num_warps, m.num_ctas, m.shared, m.launch_cooperative_grid, params, tensors
        )
        _driver.launch(launch)


class _Driver:
    launcher_cls = _Launcher
    arch = 80
    launch: Callable[[Launch], None]

    @property
    def utils(self) -> SimpleNamespace:
        properties = {
            "max_shared_mem": SHARED[self.arch],
            "multiprocessor_count": PROCESSORS[self.arch],
            "warpSize": 32,
        }
        return SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: properties,
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # what is cached by the device is so by the architecture

    def get_current_stream(self, device: int) -> int:
        return 0


_driver = _Driver()
_init_handles = CompiledKernel._init_handles
_hash = CUDABackend.hash


def _init_handles_with_ptx(self: Any) -> None:
    _init_handles(self)
    self._run.ptx = self.asm["ptx"]


def install(arch: int, launch: Callable[[Launch], None], processors: int = 0) -> None:
    """From here on kernels are compiled for sm_<arch>, and `launch` receives what they are launched with.

    The project's own questions about the device are answered accordingly, with `processors` multiprocessors.
    """
    _driver.arch, _driver.launch = arch, launch
    CompiledKernel._init_handles = _init_handles_with_ptx
    CUDABackend.make_cubin = lambda *arguments: b""
    CUDABackend.hash = lambda self: f"{_hash(self)}-without-ptxas"  # in the cache, apart from what a GPU may load
    driver.set_active(_driver)
    answers = {"architecture": f"sm_{arch}", "multiprocessors": processors or PROCESSORS[arch]}
    for name, module in list(sys.modules.items()):
        if name.startswith("gradnorm_fast.kernels."):
            for question, answer in answers.items():
                if hasattr(module, question):
                    setattr(module, question, lambda device, answer=answer: answer)
