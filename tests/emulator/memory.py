"""Loads, stores and atomics: checks what may be accessed, and reports accesses to the race detector."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic
from .ptx import SHARED_BASE, Array, Mask

if TYPE_CHECKING:
    from .machine import Batch

Lanes = slice | Array  # lanes of a batch, as an index


class EmulatorError(Exception):
    """The kernel did something invalid, or something that is not emulated."""


class Region:
    """Memory that the kernel may access: a tensor's storage. `elements` marks the readable bytes; None: all."""

    def __init__(self, start: int, size: int, name: str, readonly: bool, elements: Array | None = None) -> None:
        self.start, self.size, self.name, self.readonly, self.elements = start, size, name, readonly, elements
        assert start % 16 == 0, "torch aligns its storages"
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        self.views = {n: raw[: size // n * n].view(f"u{n}") for n in (1, 2, 4, 8)}


def active(q: Mask) -> Lanes:
    return slice(None) if q is True else np.flatnonzero(q)


def close(a: Array, b: Array) -> Array:
    """Whether float32 numbers, given by their bits, differ only in the last few digits."""
    x, y = (np.ascontiguousarray(bits).view(np.float32) for bits in (a, b))
    return np.abs(x - y) <= (4 + 16 * arithmetic.inexact) * np.spacing(np.maximum(np.abs(x), np.abs(y)))


def elements(batch: Batch, values: list[Array], lanes: Lanes, dtype: np.dtype) -> Array:
    """The values that lanes store: one row per lane, of one or more elements."""
    return np.stack([np.broadcast_to(v, batch.size)[lanes].astype(dtype) for v in values], 1)


# shared memory


def locate(batch: Batch, q: Mask, address: Array, total: int, remote: bool = False) -> tuple[Lanes, Array]:
    """The active lanes, and where in the machine's shared memory each one's access of `total` bytes begins."""
    machine, lanes = batch.machine, active(q)
    a = address[lanes]
    if not a.size:
        return lanes, a
    base: int | Array = batch.base
    if remote:
        own = batch.cta % machine.cluster
        rank = (a >> np.uint32(24)).astype(np.int64)  # + 1, where `mapa` made the address
        if rank.max() > machine.cluster:
            batch.fail("no such block in the cluster")
        base = batch.base + (np.where(rank > 0, rank - 1, own) - own) * machine.shared_stride
        a = a & np.uint32(0xFFFFFF)
    offset = (a - np.uint32(SHARED_BASE)).astype(np.int64)
    if offset.max() > machine.shared_size - total:
        bad = np.flatnonzero(offset > machine.shared_size - total)
        what = f"shared memory: {offset[bad[0]]} + {total} of {machine.shared_size} bytes"
        batch.fail(what, np.arange(batch.size)[lanes][bad])
    if total > 1 and int(np.bitwise_or.reduce(a)) & (total - 1):
        batch.fail(f"shared memory: not aligned to {total}")
    return lanes, offset + base


def load_shared(
    batch: Batch, q: Mask, rows: list[Array], address: Array, size: int, signed: bool, remote: bool
) -> None:
    machine, total = batch.machine, size * len(rows)
    lanes, at = locate(batch, q, address, total, remote)
    if at.size:
        machine.races.access(batch, lanes, at, total, "read")
        view = machine.shared[size].view(f"{'i' if signed else 'u'}{size}")
        for j, row in enumerate(rows):
            row[lanes] = view[at // size + j]


def store_shared(batch: Batch, q: Mask, values: list[Array], address: Array, size: int) -> None:
    lanes, at = locate(batch, q, address, size * len(values))
    if at.size:
        view, where = batch.machine.shared[size], (at // size)[:, None] + np.arange(len(values))
        floats = size == 4 and len(values) == 1
        _write_shared(batch, lanes, at, view, where, elements(batch, values, lanes, view.dtype), floats)


def _write_shared(batch: Batch, lanes: Lanes, at: Array, view: Array, where: Array, new: Array, floats: bool) -> None:
    """view[where] = new, a row of elements for each lane; floats: they may be float32 numbers."""
    machine, old = batch.machine, view[where]
    same = (old == new).all(1)
    near = same | close(old, new).all(1) if floats else same
    machine.races.access(batch, lanes, at, new.itemsize * new.shape[1], "write", same, near)
    if not same.all():
        machine.events += 1
        view[where] = new
        machine.races.check_equal(view[where], new, floats)


def ldmatrix(batch: Batch, q: Mask, rows: list[Array], address: Array, trans: bool) -> None:
    shared = batch.machine.shared
    lanes, at = locate(batch, (batch.lane < 8 * len(rows)) & q, address, 16)
    if not at.size:
        return
    batch.machine.races.access(batch, lanes, at, 16, "read")
    start = np.zeros(batch.size, np.int64)
    start[lanes] = at
    g, t = batch.lane // 4, batch.lane % 4
    for i, row in enumerate(rows):
        first = batch.first_lane + 8 * i
        if trans:
            low, high = (shared[2][start[first + 2 * t + h] // 2 + g].astype(np.uint32) for h in (0, 1))
            np.copyto(row, low | high << np.uint32(16), where=q)
        else:
            np.copyto(row, shared[4][start[first + g] // 4 + t], where=q)


def stmatrix(batch: Batch, q: Mask, rows: list[Array], address: Array) -> None:
    lanes, at = locate(batch, (batch.lane < 8 * len(rows)) & q, address, 16)
    if at.size:
        matrix, c = batch.lane[lanes] // 8, np.arange(8)[None, :]
        source = (batch.first_lane[lanes] + 4 * (batch.lane[lanes] % 8))[:, None] + c // 2
        new = (np.stack(rows)[matrix[:, None], source] >> (16 * (c % 2)).astype(np.uint32)).astype(np.uint16)
        _write_shared(batch, lanes, at, batch.machine.shared[2], at[:, None] // 2 + c, new, floats=True)


# global memory


def pieces(batch: Batch, q: Mask, address: Array, total: int, what: str) -> Iterator[tuple[Region, Array, Array]]:
    """For each region accessed: the region, the lanes that access it, and their byte offsets."""
    lanes = np.arange(batch.size)[active(q)]
    a = np.broadcast_to(address, batch.size)[lanes]
    if total > 1 and int(np.bitwise_or.reduce(a, initial=0)) & (total - 1):
        batch.fail(f"global memory: not aligned to {total}")
    while a.size:
        region = batch.machine.region_of(int(a[0]))
        if region is None:
            near = batch.machine.describe(int(a[0]))
            batch.fail(f"global memory {what}: {int(a[0]):#x} is in no tensor ({near})", lanes)
        offset = (a - np.uint64(region.start)).astype(np.int64)
        here = (offset >= 0) & (offset < region.size)
        over = np.flatnonzero(here & (offset > region.size - total))
        if over.size:
            text = f"global memory {what}: {offset[over[0]]} + {total} of {region.size} bytes of {region.name}"
            batch.fail(text, lanes[over])
        if region.readonly and what in ("store", "atomic"):
            batch.fail(f"{what} to the input {region.name}")
        at = offset[here]
        if region.elements is not None:
            gaps = np.flatnonzero(~(region.elements[at] & region.elements[at + total - 1]))
            if gaps.size:
                text = f"global memory {what}: between the elements of {region.name}, byte {at[gaps[0]]}"
                batch.fail(text, lanes[here][gaps])
        yield region, lanes[here], at
        lanes, a = lanes[~here], a[~here]


def load_global(batch: Batch, q: Mask, rows: list[Array], address: Array, size: int, signed: bool, order: str) -> None:
    races, total = batch.machine.races, size * len(rows)
    for region, lanes, at in pieces(batch, q, address, total, "load"):
        if order:
            races.synchronize(batch, lanes, region.start + at, order)
        elif not region.readonly:
            races.access(batch, lanes, at, total, "read", region=region)
        view = region.views[size].view(f"{'i' if signed else 'u'}{size}")
        for j, row in enumerate(rows):
            row[lanes] = view[at // size + j]


def store_global(batch: Batch, q: Mask, values: list[Array], address: Array, size: int) -> None:
    machine, total = batch.machine, size * len(values)
    for region, lanes, at in pieces(batch, q, address, total, "store"):
        view, where = region.views[size], (at // size)[:, None] + np.arange(len(values))
        new = elements(batch, values, lanes, view.dtype)
        same = (view[where] == new).all(1)
        machine.races.access(batch, lanes, at, total, "write", same, same, region)
        view[where] = new
        machine.races.check_equal(view[where], new, size == 4)
        machine.events += 1


def atomic_add(batch: Batch, q: Mask, d: Array, address: Array, value: Array, order: str) -> None:
    value = np.broadcast_to(value, batch.size)
    for region, lanes, at in pieces(batch, q, address, 4, "atomic"):
        batch.machine.races.synchronize(batch, lanes, region.start + at, order)
        for lane, i in zip(lanes.tolist(), (at // 4).tolist(), strict=True):
            d[lane] = region.views[4][i]
            region.views[4][i] += value[lane]
            batch.machine.events += int(value[lane] != 0)
