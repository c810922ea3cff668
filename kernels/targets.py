"""What a launch needs to know of the device: its architecture, and whether it is the interpreter."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Triton's interpreter runs kernels on CPU tensors; TRITON_INTERPRET=1 chooses it, for good, when triton is imported.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)


class Config(NamedTuple):
    """A tile and how a program works on it. `block_d` is the step along the features."""

    block_b: int
    block_c: int
    block_d: int
    num_warps: int
    num_stages: int


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; the interpreter runs the kernels as on sm_80, the oldest architecture they support."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """How `tl.dot` multiplies float32: exactly, unless torch's settings permit tf32 and the architecture has it."""
    if dtype != torch.float32 or not (arch.startswith("sm_") or arch == "gfx942"):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # the old query raises where the user has set the new one
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"
