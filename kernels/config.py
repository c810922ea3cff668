"""How a program works on its tile, and the tables that say which configuration a shape takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .device import tuned_as

ANY = 2**63 - 1


class Config(NamedTuple):
    """A tile and how a program works on it."""

    block_b: int  #: rows
    block_c: int  #: classes
    block_d: int  #: the step along the features
    num_warps: int
    num_stages: int
    tma: bool = False  #: operands by tensor descriptors, where `tma_reads`
    slices: int = 1  #: of the features, each on a program of its own
    num_ctas: int = 1  #: in a cluster that shares the tile
    workspace: int = 64  #: MiB of logits at a time
    float32: str = "ieee"  #: how to multiply float32 exactly: "ieee" on the CUDA cores, "tf32x3" on tensor cores


class Line(NamedTuple):
    """A line of a kernel's table: the configuration up to so many rows and classes."""

    dtype: str  #: "half", "float32", "float64", or "any"
    max_rows: int
    max_classes: int
    config: Config


Table = dict[str, list[Line]]  #: by architecture; one that has lines of a dtype takes none of "any" for it


def choose(table: Table, b: int, c: int, dtype: torch.dtype, arch: str) -> Config:
    """The first line that fits; ValueError if none does."""
    name = {torch.float32: "float32", torch.float64: "float64"}.get(dtype, "half")
    own = [line for line in table.get(tuned_as(arch), ()) if line.dtype in (name, "any")]
    lines = own or [line for line in table["any"] if line.dtype in (name, "any")]
    config = next((line.config for line in lines if b <= line.max_rows and c <= line.max_classes), None)
    if config is None:
        raise ValueError(f"this kernel takes no {b} rows of {c} classes in {dtype}")
    # AMD's pipelines have two stages, and its CUs 64 KiB to hold them.
    return config._replace(num_stages=min(2, config.num_stages)) if arch.startswith("gfx") else config


def for_vector(vec: int, config: Config) -> Config:
    """The configuration for rows that are read `vec` elements at a time: shorter loads take more registers.

    16 rows have registers to spare, and too few features in a step of 32 to give every thread a load of 4 bytes.
    """
    return config if vec == 8 or config.block_b < 32 else config._replace(block_d=min(config.block_d, 32))


# Triton's versions cost 4 µs a call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
