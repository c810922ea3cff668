"""The results of arithmetic and warp-wide instructions.

add, sub, mul and div round as IEEE says. fma.f32 goes through float64 and fma.f64 through 80-bit longdouble, so both
round twice and may be off in the last bit in rare ties. ex2, rcp and sqrt.approx, and div.full are the exact function,
rounded. mma and wgmma add a step's exact products and the accumulator in float64 and round to float32 once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .ptx import Array, Mask

if TYPE_CHECKING:
    from .machine import Batch


# As inexact as hardware may be: approximate functions have errors of up to 2 ulp, and tensor cores round towards zero.
# Triton takes logarithms by a polynomial, not by lg2.approx: `own_kernels.log_mean_exp`.
inexact = False
EXACT: dict[str, Callable[..., Array]] = {"ex2": np.exp2, "rcp": np.reciprocal, "sqrt": np.sqrt, "div": np.divide}


def flush(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    wide = np.multiply(a, b, dtype=np.float64 if a.dtype == np.float32 else np.longdouble)
    return (wide + c).astype(a.dtype)


def approximate(root: str, *values: Array) -> Array:
    """ex2.approx, rcp.approx, sqrt.approx and div.full in float32."""
    x = EXACT[root](*(v.astype(np.float64) for v in values)).astype(np.float32)
    if inexact:  # by a hash: pseudorandom, but the same for equal results
        units = (x.view(np.uint32) * np.uint32(2654435761) >> np.uint32(13)) % np.uint32(5)
        off = x + (units.astype(np.float32) - 2) * np.spacing(x)
        x = np.where(np.isfinite(x) & (x != 0) & (x != 1), off, x)  # ex2(0) is 1
    return x


def rcp_f64(a: Array) -> Array:
    """rcp.approx.ftz.f64 returns only the upper 32 bits of the result."""
    return ((1.0 / a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def to_integer(x: Array) -> Array:
    """cvt.rzi.s32.f32."""
    return np.clip(np.nan_to_num(np.trunc(x.astype(np.float64))), -(2**31), 2**31 - 1).astype(np.int32)


def from_halves(u: Array, kind: str) -> Array:
    """uint16 bits of f16 or bf16 numbers as float64."""
    if kind == "f16":
        return u.view(np.float16).astype(np.float64)
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def pairs(u: Array, kind: str) -> Array:
    """Registers that hold two halves each as float64 (..., 2)."""
    halves = np.stack([u & np.uint32(0xFFFF), u >> np.uint32(16)], -1).astype(np.uint16)
    return from_halves(halves, kind)


def permute_bytes(a: Array, b: Array, selector: int) -> Array:
    """prmt: each nibble of the selector names one of the eight bytes of b and a."""
    source = np.stack(np.broadcast_arrays(a, b), -1).view(np.uint8)
    return source[..., [selector >> i & 7 for i in (0, 4, 8, 12)]].copy().view(np.uint32)[..., 0]


def divide(batch: Batch, q: Mask, d: Array, a: Array, b: Array) -> None:
    """div.s32 and div.u32, towards zero."""
    if ((b == 0) & q).any():
        batch.fail("integer division by zero")
    a, b = np.broadcast_arrays(a.astype(np.int64), np.where(b == 0, b.dtype.type(1), b).astype(np.int64))
    np.copyto(d, np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b), casting="unsafe", where=q)


def whole_warps(batch: Batch, q: Mask) -> None:
    """Fails if the mask splits a warp, which is invalid for a .sync instruction of all lanes."""
    if q is not True:
        by_warp = q.reshape(-1, 32)
        if (by_warp.all(1) != by_warp.any(1)).any():
            batch.fail("a warp-wide instruction reached by part of a warp")


def shuffle(batch: Batch, q: Mask, d: Array, a: Array, lane: Array) -> None:
    """For each lane, the value of the lane of its warp that it names."""
    whole_warps(batch, q)
    np.copyto(d, np.broadcast_to(a, batch.size)[batch.first_lane + (lane & 31)], where=q)


def reduce_warp(batch: Batch, q: Mask, d: Array, a: Array, how: str) -> None:
    whole_warps(batch, q)
    by_warp = np.broadcast_to(a, d.shape).reshape(-1, 32)
    np.copyto(d, np.repeat(by_warp.min(1) if how == "min" else by_warp.max(1), 32), where=q)


def elect(batch: Batch, q: Mask, leader: Array, predicate: Array) -> None:
    whole_warps(batch, q)
    np.copyto(leader, 0, where=q)
    np.copyto(predicate, batch.lane == 0, where=q)


def rounded_sum(x: Array) -> Array:
    """A tensor core's sums in float64, rounded to its float32 result."""
    y = x.astype(np.float32)
    if inexact:
        y = np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)
    return y


LANE = np.arange(32)
G, T = LANE // 4, LANE % 4  # rows and columns of a fragment that a lane holds


def mma(
    batch: Batch, q: Mask, k: int, kind: str, d: list[Array], a: list[Array], b: list[Array], c: list[Array]
) -> None:
    """d = a·b + c by one warp, 16 x 8: registers (uint32) to matrices and back."""
    whole_warps(batch, q)
    warps = batch.size // 32
    left, right = np.empty((warps, 16, k)), np.empty((warps, k, 8))
    va, vb, vc = (np.stack(x, -1).reshape(warps, 32, len(x)) for x in (a, b, c))
    if kind == "tf32":
        va, vb = ((v & np.uint32(0xFFFFE000)).view(np.float32) for v in (va, vb))  # hardware ignores the low 13 bits
        for i in range(len(a)):
            left[:, G + 8 * (i % 2), T + 4 * (i // 2)] = va[:, :, i]
        for i in range(len(b)):
            right[:, T + 4 * i, G] = vb[:, :, i]
    else:
        va, vb = pairs(va, kind), pairs(vb, kind)
        for h in range(2):
            for i in range(len(a)):
                left[:, G + 8 * (i % 2), 2 * T + h + 8 * (i // 2)] = va[:, :, i, h]
            for i in range(len(b)):
                right[:, 2 * T + h + 8 * i, G] = vb[:, :, i, h]
    total = np.matmul(left, right)
    for i in range(4):
        total[:, G + 8 * (i // 2), 2 * T + i % 2] += vc[:, :, i].view(np.float32)
    out = rounded_sum(total)
    for i in range(4):
        np.copyto(d[i].view(np.float32), out[:, G + 8 * (i // 2), 2 * T + i % 2].reshape(-1), where=q)
