"""What a launch needs to know of the device: its architecture, and whether it is the interpreter."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Triton's interpreter runs kernels on CPU tensors; TRITON_INTERPRET=1 chooses it, for good, when triton is imported.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)

try:  # Triton 3.4
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

# Whether the compiler reduces across the CTAs of a cluster. Triton 3.6 cannot.
CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


ANY = 2**63 - 1


class Config(NamedTuple):
    """A tile and how a program works on it."""

    block_b: int  #: rows
    block_c: int  #: classes
    block_d: int  #: the step along the features
    num_warps: int
    num_stages: int
    tma: bool = False  #: operands by tensor descriptors, where `descriptors_fit`
    slices: int = 1  #: of the features, each on a program of its own
    num_ctas: int = 1  #: in a cluster that shares the tile
    workspace: int = 64  #: MiB of logits at a time
    float32: str = "ieee"  #: how to multiply float32 exactly: "ieee" on the CUDA cores, "tf32x3" on tensor cores


class Choice(NamedTuple):
    """A line of a kernel's table: the configuration up to so many rows and classes."""

    kind: str  #: of dtype: "half", "float32", "float64", or "any"
    rows: int
    classes: int
    config: Config


Table = dict[str, list[Choice]]  #: by architecture; "any" is for all, but for lines that an architecture has anew


def choose(table: Table, b: int, c: int, dtype: torch.dtype, arch: str) -> Config:
    """The first line that fits; ValueError if none does."""
    kind = {torch.float32: "float32", torch.float64: "float64"}.get(dtype, "half")
    lines = {line[:3]: line for line in table["any"]} | {line[:3]: line for line in table.get(arch, ())}
    fitting = (x.config for x in lines.values() if x.kind in (kind, "any") and b <= x.rows and c <= x.classes)
    config = next(fitting, None)
    if config is None:
        raise ValueError(f"this kernel takes no {b} rows of {c} classes in {dtype}")
    # AMD's pipelines have two stages, and its CUs 64 KiB to hold them.
    return config._replace(num_stages=min(2, config.num_stages)) if arch.startswith("gfx") else config


# Triton's own take 4 µs each, for they are made to be called from kernels too.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; the interpreter runs the kernels as on sm_80, the oldest architecture they support."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_100" if major == 10 else f"sm_{major}{minor}"  # sm_103 has its tensor memory, so its tables too


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs surely run at a time; in the interpreter a number that makes tests take several turns."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def dot_precision(dtype: torch.dtype, arch: str, exact: str = "ieee") -> str:
    """How `tl.dot` multiplies float32: exactly, unless torch's settings permit tf32 and the architecture has it."""
    if dtype != torch.float32 or not (arch.startswith("sm_") or arch == "gfx942"):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # the old query raises where the user has set the new one
    if matmul.fp32_precision == "tf32" if new else matmul.allow_tf32:
        return "tf32"
    return exact if arch.startswith("sm_") else "ieee"


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands must be float32 before `tl.dot`: the interpreter multiplies the bits of bfloat16 as integers."""
    return INTERPRETED and dtype == torch.bfloat16


def descriptors_fit(arch: str, *matrices: torch.Tensor) -> bool:
    """Whether TMA can read these matrices: rows contiguous, 16-byte aligned, on hardware that has it."""
    return (
        TensorDescriptor is not None
        and (INTERPRETED or arch in ("sm_90", "sm_100"))
        and all(
            m.stride(1) == 1
            and m.stride(0) * m.element_size() % 16 == 0
            and m.stride(0) >= m.shape[1]
            and m.data_ptr() % 16 == 0
            and max(m.shape) < 2**31
            for m in matrices
        )
    )


def descriptor(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    """Of blocks (rows, columns) of the matrix."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
