"""Launch a kernel. Repeated launches skip Triton's binder, which costs as much as a small kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .config import Config
from .device import INTERPRETED, TRITON

# Triton versions whose compiled kernels take these arguments. Others always use the binder, and so does AMD, whose
# specialization also depends on the size of the memory behind a pointer.
KNOWN = (3, 6) <= TRITON < (3, 10) and torch.version.hip is None
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, config: Config, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """kernel[(programs,)](*arguments, **constants). The constants are the kernel's last parameters, in its order."""
    if INTERPRETED:
        kernel[(programs,)](*arguments, **constants)
        return
    direct = KNOWN and not _observed() and not kernel.pre_run_hooks
    if direct:
        active = triton.runtime.driver.active
        device = active.get_current_device()
        key = (id(kernel), device, config, *constants.values(), *map(_specialization, arguments))
        binary = _compiled.get(key)
        if binary is not None:
            binary.run(
                programs, 1, 1, active.get_current_stream(device), binary.function, binary.packed_metadata,
                None, None, None, *arguments, *constants.values(),
            )  # fmt: skip
            return
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.num_ctas > 1:
        options["num_ctas"] = config.num_ctas
    if config.registers:
        options["maxnreg"] = config.registers
    compiled = kernel[(programs,)](*arguments, **constants, **options, enable_fp_fusion=True)
    if direct:
        _compiled[key] = compiled


def _observed() -> bool:
    """Whether a profiler or debugger watches launches or changes how kernels are compiled."""
    runtime = triton.knobs.runtime
    return bool(
        # a chain of hooks; in Triton 3.4 a function or None
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(triton.knobs.compilation, "instrumentation_mode", "")
    )


def _specialization(argument: Any) -> object:
    """What Triton specializes on: a tensor's dtype and alignment; an int being 1, a multiple of 16 or over 32 bits."""
    if type(argument) is int:  # most are; a number is hashed faster than a tuple
        return (argument == 1) + 2 * (argument & 15 == 0) + 4 * (argument.bit_length() > 31)
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() & 15 == 0
    return type(argument)
