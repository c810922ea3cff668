"""Work that is issued now and takes effect later: cp.async, wgmma, TMA; and mbarriers and cluster barriers.

Copies and products of a batch complete at the wait that covers them ("late"), at once ("early"), or at a random moment
between; products complete in order. A TMA transfer completes, at the latest, when a test of its mbarrier fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from .arithmetic import from_halves, rounded_sum
from .memory import Lanes, active, locate, pieces
from .ptx import DESCRIPTORS, SHARED_BASE, Array, Mask

if TYPE_CHECKING:
    from .driver import TensorMap
    from .machine import Batch
    from .races import Clock

SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}  # of wgmma's descriptors: log2 of how many 16-byte pieces change places


@dataclass(eq=False)
class Work:
    batch: Batch
    index: int  # of the issuing instruction

    def __post_init__(self) -> None:
        self.done = False

    def complete(self) -> None:
        if not self.done:
            self.done = True
            self.batch.machine.index = self.index  # to blame in error messages
            self.take_effect()
            self.batch.machine.events += 1

    def take_effect(self) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class Copy(Work):
    """cp.async of `size` bytes per lane: `count` bytes are read, the rest are 0."""

    lanes: Lanes
    to: Array
    source: Array
    size: int
    count: Array

    def take_effect(self) -> None:
        batch, machine = self.batch, self.batch.machine
        lanes = np.arange(batch.size)[self.lanes]
        data = np.zeros((len(lanes), self.size), np.uint8)
        for count in set(self.count.tolist()) - {0}:
            mask = np.zeros(batch.size, bool)
            mask[lanes[self.count == count]] = True
            for region, some, at in pieces(batch, mask, self.source, count, "cp.async"):
                data[np.searchsorted(lanes, some), :count] = region.views[1][at[:, None] + np.arange(count)]
        machine.races.complete_copy(batch, self.lanes, self.to, self.size)
        machine.shared[1][self.to[:, None] + np.arange(self.size)] = data


@dataclass(eq=False)
class Product(Work):
    """wgmma: d (64 x n, in registers) = a·bᵀ + d for each warpgroup. Operands are byte positions in shared memory of
    each warp's part, (16, 16) of a and (n, 16) of b."""

    n: int
    kind: str
    d: list[Array]
    a: list[Array]
    b: list[Array]
    accumulate: Array

    def take_effect(self) -> None:
        batch, machine = self.batch, self.batch.machine
        warps, n, halves = batch.size // 32, self.n, machine.shared[2]
        i, lane = np.arange(n // 2)[:, None], np.arange(32)[None, :]
        row, column = lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + i % 2
        total = np.empty((warps, 16, n))
        total[:, row, column] = np.stack(self.d).reshape(n // 2, warps, 32).transpose(1, 0, 2)
        total[~self.accumulate] = 0.0
        known: dict[int, Array] = {}
        for w in range(warps):
            for operand in (self.a[w], self.b[w]):
                machine.races.complete_product(batch.warp_ids[w], operand.reshape(-1))
            key = int(self.b[w][0, 0])
            if key not in known:
                known[key] = from_halves(halves[self.b[w] // 2], self.kind)
            total[w] += from_halves(halves[self.a[w] // 2], self.kind) @ known[key].T
        out = rounded_sum(total)[:, row, column].transpose(1, 0, 2).reshape(n // 2, batch.size)
        for register, values in zip(self.d, out, strict=True):
            register[...] = values


Kind = TypeVar("Kind", bound=Work)


class Queue(Generic[Kind]):
    """A batch's copies or products, in commit groups."""

    def __init__(self) -> None:
        self.open: list[Kind] = []
        self.groups: list[list[Kind]] = []

    def unfinished(self) -> list[Kind]:
        return [work for group in (*self.groups, self.open) for work in group if not work.done]


def _all_warps(batch: Batch, q: Mask) -> None:
    if q is not True and not q.all():
        batch.fail("not emulated: by part of the warps that are emulated together")


def commit(batch: Batch, q: Mask, queue: Queue[Kind]) -> None:
    _all_warps(batch, q)
    queue.groups.append(queue.open)
    queue.open = []


def wait(batch: Batch, q: Mask, queue: Queue[Kind], pending: int) -> None:
    """Complete groups until at most this many are pending."""
    _all_warps(batch, q)
    while len(queue.groups) > pending:
        for work in queue.groups.pop(0):
            work.complete()


def copy(batch: Batch, q: Mask, to: Array, source: Array, size: int, count: Array) -> None:
    """cp.async of size bytes, the first `count` of them from `source`."""
    machine = batch.machine
    lanes, at = locate(batch, q, to, size)
    if not at.size:
        return
    n = np.broadcast_to(count, batch.size)[lanes].astype(np.int64)
    if n.max() > size:
        batch.fail("cp.async: source larger than the copy")
    source = np.broadcast_to(source, batch.size).copy()
    if int(np.bitwise_or.reduce(source[lanes][n > 0], initial=0)) & (size - 1):
        batch.fail(f"cp.async: source not aligned to {size}")
    machine.races.issue_copy(batch, lanes, at, size)
    work = Copy(batch, machine.index, lanes, at, source, size, n)
    batch.copies.open.append(work)
    if machine.options.copies == "early":
        work.complete()


def multiply(
    batch: Batch, q: Mask, n: int, kind: str, d: list[Array], a: Array, b: Array, scale: Array, transposed: list[int]
) -> None:
    """wgmma; a and b are descriptors."""
    _all_warps(batch, q)
    machine = batch.machine
    if any(np.ptp(x.reshape(-1, min(128, batch.size)), axis=1).any() for x in (a, b)):
        batch.fail("wgmma descriptor differs between the threads of a warpgroup")
    left, right = [], []
    for w, warp in enumerate(batch.warps):
        left.append(_operand(batch, int(a[32 * w]), 16 * (warp % 4) + np.arange(16), transposed[0]))
        right.append(_operand(batch, int(b[32 * w]), np.arange(n), transposed[1]))
        for operand in (left[w], right[w]):
            machine.races.issue_product(batch.warp_ids[w], operand.reshape(-1))
    work = Product(batch, machine.index, n, kind, d, left, right, np.broadcast_to(scale, batch.size)[::32].copy())
    batch.products.open.append(work)
    if machine.options.products == "early":
        work.complete()


def _operand(batch: Batch, descriptor: int, rows: Array, transposed: int) -> Array:
    """The positions in shared memory of rows x 16 columns of a matrix of halves."""
    start, leading, stride = (16 * (descriptor >> s & 0x3FFF) for s in (0, 16, 32))
    if descriptor >> 49 & 7:
        batch.fail("not emulated: wgmma descriptor with a base offset")
    swizzle = SWIZZLE[descriptor >> 62]
    r, k = rows[:, None], np.arange(16)[None, :]
    span = 8 << swizzle  # halves across the swizzle
    if not swizzle:
        r_in, k_in = (2, 16) if transposed else (16, 2)
        linear = start + r // 8 * stride + k // 8 * leading + r % 8 * r_in + k % 8 * k_in
    elif transposed:
        linear = start + r // span * leading + k // 8 * stride + k % 8 * (2 * span) + 2 * (r % span)
    else:
        linear = start + r // 8 * stride + r % 8 * (2 * span) + 2 * k
    at = swizzled(linear, swizzle) - SHARED_BASE
    if at.min() < 0 or at.max() + 2 > batch.machine.shared_size:
        batch.fail("wgmma operand outside shared memory")
    return at + batch.base


def swizzled(address: Array, swizzle: int) -> Array:
    """Shared addresses as TMA and wgmma permute them: 16-byte pieces by the number of the 128-byte line."""
    return address ^ (((address >> 7) & ((1 << swizzle) - 1)) << 4) if swizzle else address


# barriers with phases, and TMA


@dataclass
class Barrier:
    """An mbarrier, or a cluster's barrier: a phase ends after `count` arrivals and all expected bytes."""

    count: int

    def __post_init__(self) -> None:
        self.pending, self.bytes, self.phase = self.count, 0, 0
        self.clock: Clock = 0  # of what has arrived
        self.done: Clock = 0  # the same at the end of the last phase

    def arrive(self, batch: Batch, lanes: Lanes, arrivals: int, bytes_: int = 0) -> None:
        self.pending -= arrivals
        self.bytes += bytes_
        if self.pending < 0:
            batch.fail("more arrivals than the barrier expects")
        self.clock = batch.machine.races.release(batch, lanes, self.clock)
        self.check(batch)

    def check(self, batch: Batch) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase, self.done = self.count, self.phase + 1, self.clock
        batch.machine.events += 1


@dataclass(eq=False)
class Transfer(Work):
    """TMA: a box of the tensor, rows from y and columns from x on, zeros beyond its edges."""

    mbarrier: Barrier
    map: TensorMap
    x: int
    y: int
    at: Array  # bytes in shared memory
    clock: Array

    def take_effect(self) -> None:
        batch, machine, t = self.batch, self.batch.machine, self.map
        machine.transfers.remove(self)
        (rows, columns), size = t.box, t.itemsize
        data = np.zeros((rows, columns, size), np.uint8)
        r, c = np.arange(self.y, self.y + rows), np.arange(self.x, self.x + columns)
        inside = ((r >= 0) & (r < t.shape[0]))[:, None] & ((c >= 0) & (c < t.shape[1]))[None, :]
        region = machine.region_of(t.base)
        assert region is not None
        start = t.base - region.start + (r[:, None] * t.strides[0] + c[None, :])[inside] * size
        if start.max(initial=0) + size > region.size:
            batch.fail("TMA reads beyond the tensor")
        data[inside] = region.views[1][start[:, None] + np.arange(size)]
        machine.shared[1][self.at] = data.reshape(-1)
        self.mbarrier.clock = machine.races.complete_transfer(batch, self.at, self.clock, self.mbarrier.clock)
        self.mbarrier.bytes -= data.size
        self.mbarrier.check(batch)


def _mbarrier(batch: Batch, address: int, lanes: Array) -> Barrier:
    _touch(batch, address, lanes, "read")
    if (batch.cta, address) not in batch.machine.mbarriers:
        batch.fail("no mbarrier is initialised there")
    return batch.machine.mbarriers[batch.cta, address]


def _touch(batch: Batch, address: int, lanes: Array, what: str) -> None:
    _, at = locate(batch, True, np.array([address], np.uint32), 8)
    batch.machine.races.access(batch, lanes[:1], at, 8, what)


def _by_address(batch: Batch, q: Mask, address: Array) -> list[tuple[int, Array]]:
    """The addresses in use, and the lanes that use each."""
    lanes = np.arange(batch.size)[active(q)]
    a = np.broadcast_to(address, batch.size)[lanes]
    return [(int(v), lanes[a == v]) for v in np.unique(a)]


def set_mbarrier(batch: Batch, q: Mask, address: Array, count: Array | None) -> None:
    """mbarrier.init, or mbarrier.inval without a count."""
    machine = batch.machine
    for a, lanes in _by_address(batch, q, address):
        _touch(batch, a, lanes, "write")
        old = machine.mbarriers.pop((batch.cta, a), None)
        if count is not None:
            machine.mbarriers[batch.cta, a] = Barrier(int(np.broadcast_to(count, batch.size)[lanes[0]]))
        elif old is None:
            batch.fail("mbarrier.inval of none")
        elif any(t.mbarrier is old for t in machine.transfers):
            batch.fail("mbarrier.inval while TMA is under way to it")
        machine.events += 1


def arrive(batch: Batch, q: Mask, address: Array, expected: Array) -> None:
    for a, lanes in _by_address(batch, q, address):
        promised = int(np.broadcast_to(expected, batch.size)[lanes].sum())
        _mbarrier(batch, a, lanes).arrive(batch, lanes, len(lanes), promised)


def test_mbarrier(batch: Batch, q: Mask, predicate: Array, address: Array, parity: Array) -> None:
    for a, lanes in _by_address(batch, q, address):
        bar = _mbarrier(batch, a, lanes)
        complete = np.not_equal(bar.phase & 1, np.broadcast_to(parity, batch.size)[lanes] & 1)
        predicate[lanes] = complete
        batch.machine.races.acquire(batch, lanes[complete], bar.done)
        if not complete.all():  # late: only now, at a wait
            for t in [t for t in batch.machine.transfers if t.mbarrier is bar]:
                t.complete()


def transfer(batch: Batch, q: Mask, shared: Array, tensor: Array, x: Array, y: Array, mbarrier: Array) -> None:
    machine = batch.machine
    for lane in np.arange(batch.size)[active(q)]:
        operands = (shared, tensor, x, y, mbarrier)
        to, number, column, row, bar = (int(np.broadcast_to(v, batch.size)[lane]) for v in operands)
        t = machine.launch.maps.get(number - DESCRIPTORS)
        if t is None:
            batch.fail("not a tensor map", lane[None])
        size = int(np.prod(t.box)) * t.itemsize
        if to % 128 or not 0 <= to - SHARED_BASE <= machine.shared_size - size:
            batch.fail("TMA destination not aligned to 128, or outside shared memory", lane[None])
        at = swizzled(to + np.arange(size), t.swizzle) - SHARED_BASE + batch.base
        found, clock = _mbarrier(batch, bar, lane[None]), machine.races.issue_transfer(batch, lane, at)
        work = Transfer(batch, machine.index, found, t, column, row, at, clock)
        machine.transfers.append(work)
        if machine.options.copies == "early":
            work.complete()


def arrive_at_cluster(batch: Batch, q: Mask) -> None:
    _all_warps(batch, q)
    barrier = batch.machine.clusters[batch.cta // batch.machine.cluster]
    if batch.cluster_phase >= 0:
        batch.fail("barrier.cluster.arrive twice without a wait")
    batch.cluster_phase = barrier.phase
    barrier.arrive(batch, slice(None), batch.size)
