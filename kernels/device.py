"""Device capabilities: architecture, precision of products, and whether TMA can read a matrix."""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl

# Triton's interpreter runs kernels on CPU tensors. TRITON_INTERPRET=1 must be set when triton is first imported.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

try:  # Triton 3.4
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; the interpreter runs the kernels as on sm_80, the oldest architecture they support."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; in the interpreter, enough that the tests get several slices of the features."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def tuned_as(arch: str) -> str:
    """The architecture whose tables and tensor cores this one shares."""
    return {"sm_103": "sm_100"}.get(arch, arch)


def dot_precision(dtype: torch.dtype, arch: str, exact: str = "ieee") -> str:
    """How `tl.dot` multiplies float32: exactly, unless torch's settings allow tf32 and the architecture has it."""
    if dtype != torch.float32 or not (arch.startswith("sm_") or arch == "gfx942"):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # the old query raises where the user has set the new one
    if matmul.fp32_precision == "tf32" if new else matmul.allow_tf32:
        return "tf32"
    return exact if arch.startswith("sm_") else "ieee"


def asynchronous_products(arch: str, rows: int) -> bool:
    """Whether a tile of this many rows may use warpgroup instructions, which read shared memory asynchronously while
    the program continues (sm_90: 64 rows or more)."""
    return arch == "sm_90" and rows >= 64


def vector(depth: int, *strides: int) -> int:
    """The largest of 8, 4, 2, 1 that divides the depth and the row strides.

    Triton tells the compiler only whether an integer is a multiple of 16. Depth and strides are therefore passed
    divided by this factor and multiplied back in the kernel, which gives 16-byte loads for every multiple of 8.
    """
    return gcd(depth, *strides, 8)


def has_tma(arch: str) -> bool:
    """Whether kernels can use tensor descriptors on this architecture."""
    return TensorDescriptor is not None and (INTERPRETED or tuned_as(arch) in ("sm_90", "sm_100"))


def tma_reads(arch: str, *matrices: torch.Tensor) -> bool:
    """Whether TMA can read these matrices: rows contiguous and 16-byte aligned."""
    return has_tma(arch) and all(
        m.stride(1) == 1
        and m.stride(0) * m.element_size() % 16 == 0
        and m.stride(0) >= m.shape[1]
        and m.data_ptr() % 16 == 0
        and max(m.shape) < 2**31
        for m in matrices
    )
