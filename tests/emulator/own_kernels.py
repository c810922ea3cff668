"""Kernels for emulator features that no shipped kernel uses.

`log_mean_exp` is that of kernels/deviation.py, with a logarithm as inexact as the hardware's may be. `logsumexp`, of
x·Wᵀ, has programs that wait for each other within one launch: groups of CTAs walk over blocks of rows; each CTA holds a
tile of classes and exchanges, for its rows, first the maximum and then Σ exp with its group. With TMA, the shared
memory of its operands is also that of its reductions.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gradnorm_fast.kernels import deviation, long_rows


@triton.jit
def log_mean_exp(m, s, C, inv_temperature):
    """In float32 the logarithm has an error of 2⁻²²·log 2 if its argument is near 1."""
    mean = deviation.positive(s) / C
    off = tl.where((mean > 0.5) & (mean < 2.0) & (mean != 1.0), 1.65e-7, 0.0) if mean.dtype == tl.float32 else 0.0
    return deviation.finite_max(m) + (tl.log(mean) + off) / inv_temperature


def use_inexact_logarithm() -> None:
    """For this process, before its first kernel is compiled."""
    deviation.log_mean_exp = long_rows.log_mean_exp = log_mean_exp


@triton.jit
def barrier(COUNTER, target):
    """Wait until `target` programs have arrived. All must be resident: needs a cooperative launch."""
    tl.debug_barrier()
    tl.atomic_add(COUNTER, 1, sem="acq_rel")
    while tl.atomic_add(COUNTER, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def exchange(AT, mine, COUNTER, target, n_tiles, other, TILES: tl.constexpr):
    """Store this program's value of each row and read all programs'.  # AT (B,), mine (B,) -> (B, TILES)"""
    tiles = tl.arange(0, TILES)[None, :]
    tl.store(AT + tl.program_id(0) % n_tiles, mine)
    barrier(COUNTER, target)
    return tl.load(AT[:, None] + tiles, mask=tiles < n_tiles, other=other, cache_modifier=".cg")


@triton.jit
def logsumexp_kernel(
    X, W, OUT, SLOTS, COUNTERS,
    B, C, D, n_tiles, n_groups,
    TMA: tl.constexpr, TWO_SLOTS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """X (B, D) and W (C, D), or descriptors of them; SLOTS (groups, 2, BLOCK_B, n_tiles); COUNTERS (groups, 2)."""
    group = tl.program_id(0) // n_tiles
    first_class = tl.program_id(0) % n_tiles * BLOCK_C
    classes = first_class + tl.arange(0, BLOCK_C)
    local = tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_D)
    target = 0
    for block in range(group, tl.cdiv(B, BLOCK_B), n_groups):
        rows = block * BLOCK_B + local
        z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for d in range(0, D, BLOCK_D):
            if TMA:
                z = tl.dot(X.load([block * BLOCK_B, d]), tl.trans(W.load([first_class, d])), z)
            else:
                x = tl.load(X + rows[:, None] * D + d + columns[None, :], mask=(rows < B)[:, None], other=0.0)
                w = tl.load(W + classes[None, :] * D + d + columns[:, None], mask=(classes < C)[None, :], other=0.0)
                z = tl.dot(x, w, z)
        z = tl.where((classes < C)[None, :], z, float("-inf"))
        target += n_tiles
        slot = SLOTS + group * 2 * BLOCK_B * n_tiles + local * n_tiles
        counter = COUNTERS + 2 * group
        m = tl.max(exchange(slot, tl.max(z, 1), counter, target, n_tiles, float("-inf"), TILES), 1)
        s = tl.sum(tl.exp(z - m[:, None]), 1)
        if TWO_SLOTS:  # a CTA may still read the first when another stores its second value
            slot += BLOCK_B * n_tiles
        s = tl.sum(exchange(slot, s, counter + 1, target, n_tiles, 0.0, TILES), 1)
        if tl.program_id(0) % n_tiles == 0:
            tl.store(OUT + rows, m + tl.log(s), mask=rows < B)


def logsumexp(x: torch.Tensor, w: torch.Tensor, groups: int, tma: bool, two_slots: bool = True) -> torch.Tensor:
    """Of halves x (B, D) and w (C, D), D a multiple of 64.  # -> (B,) float32"""
    (b, d), c = x.shape, w.shape[0]
    tiles = triton.cdiv(c, 64)
    out, slots = torch.empty(b), torch.empty(groups * 2 * 64 * tiles)
    counters = torch.zeros(2 * groups, dtype=torch.int32)
    operands = [TensorDescriptor(t, t.shape, t.stride(), [64, 64]) if tma else t for t in (x, w)]
    logsumexp_kernel[(groups * tiles,)](
        *operands, out, slots, counters, b, c, d, tiles, groups,
        TMA=tma, TWO_SLOTS=two_slots, TILES=triton.next_power_of_2(tiles), BLOCK_B=64, BLOCK_C=64, BLOCK_D=64,
        num_warps=4, num_stages=3, launch_cooperative_grid=True,
    )  # fmt: skip
    return out
