"""Tile configurations, and the lookup of a shape's configuration in a kernel's table."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .device import architecture, multiprocessors, tuned_as
from .problem import Problem

ANY = 2**63 - 1


class Config(NamedTuple):
    """A tile size and how a program computes it."""

    block_b: int  #: rows
    block_c: int  #: classes
    block_d: int  #: the step along the features
    num_warps: int
    num_stages: int
    tma: bool = False  #: load operands by tensor descriptors if `tma_reads` allows it
    slices: int = 1  #: of the features, one program each
    num_ctas: int = 1  #: in a cluster that shares the tile
    workspace: int = 64  #: MiB of logits held at a time
    registers: int = 0  #: per thread at most, on NVIDIA; 0: ptxas trades spills for occupancy as it likes
    float32: str = "ieee"  #: how to multiply float32 exactly: "ieee" on the CUDA cores, "tf32x3" on tensor cores


class Shape(NamedTuple):
    """What the choice of a configuration depends on."""

    b: int  #: rows, or ANY
    c: int  #: classes
    d: int  #: features
    dtype: torch.dtype  #: of the features; of the scores if the logits are given
    arch: str
    processors: int

    @classmethod
    def of(cls, problem: Problem, b: int = 0) -> Shape:
        """The problem's, on the device of its tensors; for b rows if given."""
        x, logits = problem.features, problem.logits
        dtype = x.dtype if logits is None else torch.promote_types(x.dtype, logits.dtype)
        rows, d = x.shape
        return cls(b or rows, problem.classes, d, dtype, architecture(x.device), multiprocessors(x.device))


class Line(NamedTuple):
    """A line of a kernel's table: the configuration for up to max_rows rows and max_classes classes."""

    dtype: str  #: "half", "float32", "float64", or "any"
    max_rows: int
    max_classes: int
    config: Config
    arch: str = "any"


def choose(table: list[Line], shape: Shape) -> Config:
    """The first line that fits; ValueError if none does."""
    dtype = {torch.float32: "float32", torch.float64: "float64"}.get(shape.dtype, "half")
    for line in table:
        fits = shape.b <= line.max_rows and shape.c <= line.max_classes
        if fits and line.dtype in (dtype, "any") and line.arch in (tuned_as(shape.arch), "any"):
            amd = shape.arch.startswith("gfx")  # two pipeline stages, and a CU has 64 KiB of shared memory for them
            return line.config._replace(num_stages=min(2, line.config.num_stages), registers=0) if amd else line.config
    raise ValueError(f"this kernel takes no {shape.b} rows of {shape.c} classes in {shape.dtype}")


def for_vector(vec: int, config: Config) -> Config:
    """The configuration for rows that are loaded `vec` elements at a time: shorter loads take more registers.

    Tiles of 16 rows keep their step: they have registers to spare, and a step of 32 features would be too short to give
    every thread a 4-byte load.
    """
    return config if vec == 8 or config.block_b < 32 else config._replace(block_d=min(config.block_d, 32))


# Triton's own costs 4 µs per call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)
