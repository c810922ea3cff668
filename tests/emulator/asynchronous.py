"""Work that is issued now and takes effect later: cp.async, wgmma, TMA; the mbarriers and cluster barriers beside it.

Copies and products of a batch complete at the wait that covers them ("late"), at once ("early") or at a random moment
between, products in their order; a transfer by TMA completes when somebody tests its mbarrier in vain, at the latest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from .arithmetic import from_halves, pairs, rounded_sum
from .memory import Lanes, Misaligned, OutOfBounds, active, locate, pieces
from .ptx import SHARED_BASE, Array, Mask

if TYPE_CHECKING:
    from .driver import TensorMap
    from .machine import Batch

SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}  # of wgmma's descriptors: log2 of how many 16-byte pieces change places
Work = TypeVar("Work", bound="Pending")


@dataclass(eq=False)
class Pending:
    batch: Batch
    index: int  # of the instruction
    done: bool

    def complete(self) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class Copy(Pending):
    """cp.async of `size` bytes by each lane, of which `count` are read and the others 0."""

    lanes: Lanes
    to: Array
    source: Array
    size: int
    count: Array

    def complete(self) -> None:
        if self.done:
            return
        self.done = True
        batch, machine = self.batch, self.batch.machine
        lanes = np.arange(batch.size)[self.lanes]
        data = np.zeros((len(lanes), self.size), np.uint8)
        for count in set(self.count.tolist()) - {0}:
            mask = np.zeros(batch.size, bool)
            mask[lanes[self.count == count]] = True
            for region, some, at in pieces(batch, self.source, count, mask, self.index, "cp.async"):
                data[np.searchsorted(lanes, some), :count] = region.views[1][at[:, None] + np.arange(count)]
        if machine.races:
            machine.races.complete_copy(batch, self.lanes, self.to, self.size)
        machine.shared[1][self.to[:, None] + np.arange(self.size)] = data
        machine.events += 1


@dataclass(eq=False)
class Product(Pending):
    """wgmma: d (64 x n, in registers) = a·bᵀ + d for each warpgroup. Operands are byte positions in shared memory of
    each warp's part, (16, 16) of a and (n, 16) of b; a may be in registers."""

    n: int
    kind: str
    d: list[Array]
    a: list[Array]
    a_registers: list[Array] | None
    b: list[Array]
    accumulate: Array

    def complete(self) -> None:
        if self.done:
            return
        self.done = True
        batch, machine = self.batch, self.batch.machine
        warps, n, halves = batch.size // 32, self.n, machine.shared[2]
        i, lane = np.arange(n // 2)[:, None], np.arange(32)[None, :]
        row, column = lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + i % 2
        total = np.empty((warps, 16, n))
        total[:, row, column] = np.stack(self.d).reshape(n // 2, warps, 32).transpose(1, 0, 2)
        total[~self.accumulate] = 0.0
        known: dict[int, Array] = {}
        for w in range(warps):
            if machine.races:
                for operand in (*self.a[w : w + 1], self.b[w]):
                    machine.races.complete_product(batch.warp_ids[w], operand.reshape(-1))
            key = int(self.b[w][0, 0])
            if key not in known:
                known[key] = from_halves(halves[self.b[w] // 2], self.kind)
            if self.a_registers is None:
                left = from_halves(halves[self.a[w] // 2], self.kind)
            else:
                left = np.empty((16, 16))
                for j, u in enumerate(self.a_registers):
                    two = pairs(u[32 * w : 32 * w + 32], self.kind)
                    for h in range(2):
                        left[lane[0] // 4 + 8 * (j % 2), 2 * (lane[0] % 4) + h + 8 * (j // 2)] = two[:, h]
            total[w] += left @ known[key].T
        out = rounded_sum(total)[:, row, column].transpose(1, 0, 2).reshape(n // 2, batch.size)
        for register, values in zip(self.d, out, strict=True):
            register[...] = values
        machine.events += 1


class Queue(Generic[Work]):
    """A batch's copies or products, in the groups that it commits and waits for."""

    def __init__(self) -> None:
        self.open: list[Work] = []
        self.groups: list[list[Work]] = []

    def unfinished(self) -> list[Work]:
        return [work for group in (*self.groups, self.open) for work in group if not work.done]


def _all_warps(batch: Batch, q: Mask, index: int) -> None:
    if q is not True and not q.all():
        batch.fail("not emulated: by part of the warps that are emulated together", index)


def commit(batch: Batch, queue: Queue[Work], q: Mask, index: int) -> None:
    _all_warps(batch, q, index)
    queue.groups.append(queue.open)
    queue.open = []


def wait(batch: Batch, queue: Queue[Work], pending: int, q: Mask, index: int) -> None:
    """Until at most so many groups are pending."""
    _all_warps(batch, q, index)
    while len(queue.groups) > pending:
        for work in queue.groups.pop(0):
            work.complete()


def copy(batch: Batch, to: Array, source: Array, size: int, count: Array, q: Mask, index: int) -> None:
    """cp.async of size bytes, the first `count` of them from `source`."""
    machine = batch.machine
    lanes, at = locate(batch, to, size, q, index)
    if not at.size:
        return
    n = np.broadcast_to(count, batch.size)[lanes].astype(np.int64)
    if n.max() > size:
        batch.fail("cp.async: source larger than the copy", index)
    source = np.broadcast_to(source, batch.size).copy()
    if int(np.bitwise_or.reduce(source[lanes][n > 0], initial=0)) & (size - 1):
        batch.fail(f"cp.async: source not aligned to {size}", index, kind=Misaligned)
    work = Copy(batch, index, False, lanes, at, source, size, n)
    batch.copies.open.append(work)
    if machine.races:
        machine.races.issue_copy(batch, lanes, at, size, index)
    if machine.options.copies == "early":
        work.complete()


def multiply(
    batch: Batch, n: int, kind: str, d: list[Array], a: Array | list[Array], b: Array, scale: Array,
    transposed: list[int], q: Mask, index: int,
) -> None:  # fmt: skip
    """wgmma; a and b are descriptors, or a is registers."""
    _all_warps(batch, q, index)
    machine = batch.machine
    registers = a if isinstance(a, list) else None
    warpgroup = 128 if batch.size % 128 == 0 else 32
    for descriptor in (a, b):
        if not isinstance(descriptor, list) and np.ptp(descriptor.reshape(-1, warpgroup), axis=1).any():
            batch.fail("wgmma descriptor differs between the threads of a warpgroup", index)
    left, right = [], []
    for w, warp in enumerate(batch.warps):
        if not isinstance(a, list):
            rows = 16 * (warp % 4) + np.arange(16)
            left.append(_operand(batch, int(a[32 * w]), rows, transposed[0], index))
        right.append(_operand(batch, int(b[32 * w]), np.arange(n), transposed[1], index))
    held = None if registers is None else [r.copy() for r in registers]
    accumulate = np.broadcast_to(scale, batch.size)[::32].copy()
    work = Product(batch, index, False, n, kind, d, left, held, right, accumulate)
    batch.products.open.append(work)
    if machine.races:
        for w in range(len(batch.warps)):
            for operand in (*left[w : w + 1], right[w]):
                machine.races.issue_product(batch.warp_ids[w], operand.reshape(-1), index)
    if machine.options.products == "early":
        work.complete()


def _operand(batch: Batch, descriptor: int, rows: np.ndarray, transposed: int, index: int) -> Array:
    """The bytes in shared memory of rows x 16 steps of k of a matrix of halves."""
    start, leading, stride = (16 * (descriptor >> s & 0x3FFF) for s in (0, 16, 32))
    if descriptor >> 49 & 7:
        batch.fail("wgmma descriptor with a base offset", index)
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
        batch.fail("wgmma operand outside shared memory", index, kind=OutOfBounds)
    return at + batch.base


def swizzled(address: Array, swizzle: int) -> Array:
    """Shared addresses as TMA and wgmma permute them: 16-byte pieces by the number of the 128-byte line."""
    return address ^ (((address >> 7) & ((1 << swizzle) - 1)) << 4) if swizzle else address


def fence_proxy(batch: Batch, q: Mask, index: int) -> None:
    if batch.machine.races:
        batch.machine.races.fence_proxy(batch, q)


# mbarriers and TMA


@dataclass
class Mbarrier:
    count: int
    pending: int  # arrivals
    bytes: int = 0
    phase: int = 0
    clock: Array | None = None  # of what has arrived in this phase, and in the one before
    done: Array | None = None

    def check(self, batch: Batch) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase, self.done = self.count, self.phase + 1, self.clock
            batch.machine.events += 1


@dataclass(eq=False)
class Transfer(Pending):
    """TMA: a box of the tensor, rows from y and columns from x on, zeros beyond its edges."""

    mbarrier: Mbarrier
    map: TensorMap
    x: int
    y: int
    at: Array  # bytes in shared memory
    clock: Array | None

    def complete(self) -> None:
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
            batch.fail("TMA reads beyond the tensor", self.index, kind=OutOfBounds)
        data[inside] = region.views[1][start[:, None] + np.arange(size)]
        if machine.races and self.clock is not None:
            self.mbarrier.clock = machine.races.complete_transfer(batch, self.at, self.clock, self.mbarrier.clock)
        machine.shared[1][self.at] = data.reshape(-1)
        self.mbarrier.bytes -= data.size
        self.mbarrier.check(batch)
        machine.events += 1


def _by_address(batch: Batch, address: Array, q: Mask) -> list[tuple[int, Array]]:
    """The addresses that are used, and the lanes that use each."""
    lanes = np.arange(batch.size)[active(q)]
    a = np.broadcast_to(address, batch.size)[lanes]
    return [(int(v), lanes[a == v]) for v in np.unique(a)]


def _mbarrier(batch: Batch, address: int, lanes: Array, index: int) -> Mbarrier:
    _touch_mbarrier(batch, address, lanes, index, "read")
    found = batch.machine.mbarriers.get((batch.cta, address))
    if found is None:
        batch.fail("no mbarrier is initialised there", index)
    return found


def _touch_mbarrier(batch: Batch, address: int, lanes: Array, index: int, what: str) -> None:
    _, at = locate(batch, np.array([address], np.uint32), 8, True, index)
    if batch.machine.races:
        batch.machine.races.access_shared(batch, lanes[:1], at, 8, index, what)


def set_mbarrier(batch: Batch, address: Array, count: Array | None, q: Mask, index: int) -> None:
    """mbarrier.init, or mbarrier.inval without a count."""
    machine = batch.machine
    for a, lanes in _by_address(batch, address, q):
        _touch_mbarrier(batch, a, lanes, index, "write")
        old = machine.mbarriers.pop((batch.cta, a), None)
        if count is not None:
            n = int(np.broadcast_to(count, batch.size)[lanes[0]])
            machine.mbarriers[batch.cta, a] = Mbarrier(n, n)
        elif old is None:
            batch.fail("mbarrier.inval of none", index)
        elif any(t.mbarrier is old for t in machine.transfers):
            batch.fail("mbarrier.inval while TMA is under way to it", index)
        machine.events += 1


def arrive(batch: Batch, address: Array, expected: Array, q: Mask, index: int) -> None:
    machine = batch.machine
    for a, lanes in _by_address(batch, address, q):
        bar = _mbarrier(batch, a, lanes, index)
        bar.bytes += int(np.broadcast_to(expected, batch.size)[lanes].sum())
        bar.pending -= len(lanes)
        if bar.pending < 0:
            batch.fail("more arrivals than the mbarrier expects", index)
        if machine.races:
            bar.clock = machine.races.release(batch, lanes, bar.clock)
        bar.check(batch)
        machine.events += 1


def test_mbarrier(batch: Batch, predicate: Array, address: Array, parity: Array, q: Mask, index: int) -> None:
    machine = batch.machine
    for a, lanes in _by_address(batch, address, q):
        bar = _mbarrier(batch, a, lanes, index)
        complete = np.not_equal(bar.phase & 1, np.broadcast_to(parity, batch.size)[lanes] & 1)
        predicate[lanes] = complete
        if machine.races and complete.any():
            machine.races.acquire(batch, lanes[complete], bar.done)
        if not complete.all():  # late: only now that somebody waits
            for t in [t for t in machine.transfers if t.mbarrier is bar]:
                t.complete()


def transfer(
    batch: Batch, shared: Array, tensor: Array, x: Array, y: Array, mbarrier: Array, q: Mask, index: int
) -> None:
    machine = batch.machine
    for lane in np.arange(batch.size)[active(q)]:
        to, number, column, row, bar = (
            int(np.broadcast_to(v, batch.size)[lane]) for v in (shared, tensor, x, y, mbarrier)
        )
        t = machine.tensor_map(number)
        if t is None:
            batch.fail("not a tensor map", index, lane[None])
        size = int(np.prod(t.box)) * t.itemsize
        if to % 128:
            batch.fail("TMA destination not aligned to 128", index, lane[None], Misaligned)
        if not 0 <= to - SHARED_BASE <= machine.shared_size - size:
            batch.fail("TMA destination outside shared memory", index, lane[None], OutOfBounds)
        at = swizzled(to + np.arange(size), t.swizzle) - SHARED_BASE + batch.base
        work = Transfer(batch, index, False, _mbarrier(batch, bar, lane[None], index), t, column, row, at, None)
        if machine.races:
            work.clock = machine.races.issue_transfer(batch, lane, at, index)
        machine.transfers.append(work)
        if machine.options.copies == "early":
            work.complete()


# clusters


@dataclass
class ClusterBarrier:
    arrived: int = 0
    phase: int = 0
    clock: Array | None = None
    done: Array | None = None


def arrive_at_cluster(batch: Batch, relaxed: bool, q: Mask, index: int) -> None:
    _all_warps(batch, q, index)
    machine = batch.machine
    state = machine.clusters[batch.cta // machine.cluster]
    if batch.cluster_phase >= 0:
        batch.fail("barrier.cluster.arrive twice without a wait", index)
    batch.cluster_phase = state.phase
    state.arrived += batch.size
    if machine.races and not relaxed:
        state.clock = machine.races.release(batch, slice(None), state.clock)
    if state.arrived == 32 * machine.warps * machine.cluster:
        state.arrived, state.phase, state.done, state.clock = 0, state.phase + 1, state.clock, None
    machine.events += 1
