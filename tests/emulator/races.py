"""Which accesses are ordered: vector clocks of warps, and of each block's copy engine (TMA).

An access by warp w is stamped with w's own clock. Another access of the same place conflicts if one of them writes and
the other's warp does not know that stamp yet. Warps learn each other's stamps at bar.sync, barrier.cluster, mbarriers
and release-acquire atomics. A place is 4 bytes (1 if a kernel stores less to shared memory). A store of the value that
is already there is no conflict. Asynchronous work occupies its places from issue to completion: any conflicting access
in between is reported. wgmma and TMA belong to the async proxy: a fence.proxy.async must separate them from loads,
stores or cp.async in the same place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import Lanes, Region, active, close
from .ptx import Array, Instruction, Mask

if TYPE_CHECKING:
    from .machine import Batch, Machine

Clock = Array | int  # 0 knows of nothing


class History:
    """The writers and readers of each place in a memory that `readers` consecutive warps share."""

    def __init__(self, places: int, readers: int) -> None:
        self.readers = readers
        self.writer = np.full(places, -1, np.int32)
        self.written = np.zeros(places, np.int32)
        self.copied = np.zeros(places, bool)  # by cp.async
        self.read = np.zeros((readers, places), np.int32)


class Races:
    """The order of accesses among blocks first ... stop − 1, which run at the same time."""

    def __init__(self, machine: Machine, first: int, stop: int) -> None:
        self.machine = machine
        self.offset = first * machine.warps
        self.warps = (stop - first) * machine.warps
        self.first = first
        total = self.warps + stop - first  # the copy engines come last
        self.clock = np.eye(total, dtype=np.int32)  # [w, v]: the last stamp of v that w knows
        self.fenced = np.zeros((total, total), np.int32)  # the same, as of w's last fence.proxy.async
        self.grain = 1 if machine.program.narrow_stores else 4
        places, local = len(machine.shared[1]) // self.grain, machine.warps * machine.cluster
        self.shared = History(places, local)
        # of loads only, for TMA: reads by the async proxy need no fence
        self.loaded = np.zeros((local, places), np.int32) if "cp.async.bulk" in machine.program.text else None
        self.writing = np.zeros(places, np.int16)  # asynchronous writes and reads under way
        self.reading = np.zeros(places, np.int16)
        self.tensors: dict[int, History] = {}  # by where they start
        self.released: dict[int, Array] = {}  # by the address of an atomic

    def _instruction(self) -> Instruction:
        return self.machine.program.instructions[self.machine.index]

    def report(self, what: str) -> None:
        ins = self._instruction()
        self.machine.findings[f"{what}: `{ins.text[:90]}` from {ins.source}"] += 1

    def last_digits(self) -> None:
        self.report("note: threads store to one place what differs in the last digits")

    def check_equal(self, stayed: Array, stored: Array, floats: bool) -> None:
        """Threads that store different values to one place in one instruction: a race, unless only the last digits
        differ. Replicated sums may: the compiler fuses a product into one side of a butterfly, fma(a, b, shfl(a·b))."""
        bad = (stayed != stored).any(1)
        if bad.any():
            if floats and close(stayed, stored)[bad].all():
                self.last_digits()
            else:
                self.report("race: two threads store different values to one place in one instruction")

    # conflicts

    def _of(self, batch: Batch, lanes: Lanes) -> Array:
        return batch.warp[lanes] - self.offset

    @staticmethod
    def _places(at: Array, total: int, w: Array, grain: int) -> tuple[Array, Array]:
        """Each place that accesses of `total` bytes touch, and the warp that does."""
        n = max(1, total // grain)
        return ((at // grain)[:, None] + np.arange(n)).reshape(-1), np.repeat(w, n)

    def _after_write(self, h: History, place: Array, w: Array) -> Array:
        by = h.writer[place]
        return (by >= 0) & (self.clock[w, np.maximum(by, 0)] < h.written[place])

    def _after_read(self, h: History, place: Array, w: Array) -> Array:
        readers = (w - w % h.readers)[None, :] + np.arange(h.readers)[:, None]
        return (h.read[:, place] > self.clock[w[None, :], readers]).any(0)

    def _check(self, h: History, place: Array, w: Array, what: str, same: Array | None, near: Array | None) -> None:
        bad = self._after_write(h, place, w)
        if same is not None and near is not None:
            if (bad & near & ~same).any():
                self.last_digits()
            bad &= ~near
        if bad.any():
            self.report(f"race: {what} of what another warp has written, no barrier between")
        if what == "write":
            bad = self._after_read(h, place, w)
            if (bad if same is None else bad & ~same).any():
                self.report("race: write of what another warp has read, no barrier between")

    def _wrote(self, h: History, place: Array, w: Array, copied: bool) -> None:
        h.writer[place], h.written[place], h.copied[place] = w, self.clock[w, w], copied

    def access(
        self, batch: Batch, lanes: Lanes, at: Array, total: int, what: str,
        same: Array | None = None, near: Array | None = None, region: Region | None = None,
    ) -> None:  # fmt: skip
        """A load or store of `total` bytes per lane, in shared memory or a tensor. `same` and `near`: which stores do
        not change the value, or change only its last digits."""
        history, grain = self.shared, self.grain
        if region is not None:
            if region.start not in self.tensors:
                self.tensors[region.start] = History(-(-region.size // 4), self.warps)
            history, grain = self.tensors[region.start], 4
        place, w = self._places(at, total, self._of(batch, lanes), grain)
        if region is None and self.writing.any() and (self.writing[place] > 0).any():
            self.report(f"race: {what} of shared memory that an asynchronous copy is writing")
        if region is None and what == "write" and (self.reading[place] > 0).any():
            self.report("race: write of shared memory that a wgmma is reading")
        n = len(place) // len(at)
        same, near = (None if x is None else np.repeat(x, n) for x in (same, near))
        self._check(history, place, w, what, same, near)
        if what == "write":
            self._wrote(history, place, w, copied=False)
        else:
            history.read[w % history.readers, place] = self.clock[w, w]
            if region is None and self.loaded is not None and self._instruction().op.startswith("ld"):
                self.loaded[w % history.readers, place] = self.clock[w, w]

    # asynchronous work in shared memory, from issue to completion

    def _issue_write(self, place: Array, w: Array) -> None:
        if (self.writing[place] > 0).any():
            self.report("race: two asynchronous copies write the same place")
        if (self.reading[place] > 0).any():
            self.report("race: copy to shared memory that a wgmma is reading")
        self._check(self.shared, place, w, "write", None, None)
        np.add.at(self.writing, place, 1)

    def issue_copy(self, batch: Batch, lanes: Lanes, at: Array, size: int) -> None:
        self._issue_write(*self._places(at, size, self._of(batch, lanes), self.grain))

    def complete_copy(self, batch: Batch, lanes: Lanes, at: Array, size: int) -> None:
        place, w = self._places(at, size, self._of(batch, lanes), self.grain)
        np.subtract.at(self.writing, place, 1)
        self._wrote(self.shared, place, w, copied=True)

    def _unfenced(self, place: Array, w: int) -> Array:
        """Which places another proxy has written since the last fence."""
        by = self.shared.writer[place]
        generic = (by >= 0) & (by < self.warps)
        return generic & (self.fenced[w, np.maximum(by, 0)] < self.shared.written[place])

    def issue_transfer(self, batch: Batch, lane: int, at: Array) -> Array:
        """The clock that the transfer carries to its mbarrier."""
        w = int(batch.warp[lane]) - self.offset
        place = np.unique(at // self.grain)
        self._issue_write(place, np.full(len(place), w))
        if self._unfenced(place, w).any():
            self.report("race: TMA writes what generic instructions wrote, no fence.proxy.async between")
        assert self.loaded is not None
        first = w - w % self.shared.readers
        if (self.loaded[:, place] > self.fenced[w, first : first + self.shared.readers][:, None]).any():
            self.report("race: TMA writes what generic instructions read, no fence.proxy.async between")
        clock = self.clock[w].copy()
        self.clock[w, w] += 1
        return clock

    def complete_transfer(self, batch: Batch, at: Array, clock: Array, at_mbarrier: Clock) -> Clock:
        """The clock of the mbarrier afterwards."""
        place = np.unique(at // self.grain)
        engine = self.warps + batch.cta - self.first
        self.writing[place] -= 1
        self.clock[engine] = np.maximum(self.clock[engine], clock)
        self.clock[engine, engine] += 1
        self._wrote(self.shared, place, np.full(len(place), engine), copied=False)
        return np.maximum(at_mbarrier, self.clock[engine])

    def issue_product(self, warp: int, at: Array) -> None:
        """wgmma by a warp of the launch reads an operand at these bytes."""
        w = warp - self.offset
        place = np.unique(at // self.grain)
        if (self.writing[place] > 0).any():
            self.report("race: wgmma on shared memory that an asynchronous copy is writing")
        if self._after_write(self.shared, place, np.full(len(place), w)).any():
            self.report("race: read of what another warp has written, no barrier between")
        unfenced = self._unfenced(place, w)
        if unfenced.any():
            note = self.machine.options.copies_unfenced and self.shared.copied[place][unfenced].all()
            what = "note: wgmma on what cp.async" if note else "race: wgmma on what generic instructions"
            self.report(f"{what} wrote, no fence.proxy.async between")
        self.reading[place] += 1

    def complete_product(self, warp: int, at: Array) -> None:
        w = warp - self.offset
        place = np.unique(at // self.grain)
        self.reading[place] -= 1
        self.shared.read[w % self.shared.readers, place] = self.clock[w, w]

    # what orders accesses

    def synchronize(self, batch: Batch, lanes: Lanes, addresses: Array, order: str) -> None:
        """Atomics and acquiring loads at these addresses."""
        for w, address in zip(self._of(batch, lanes).tolist(), addresses.tolist(), strict=True):
            old, mine = self.released.get(address, 0), self.clock[w].copy()
            if order in ("acquire", "acq_rel"):
                self.clock[w] = np.maximum(self.clock[w], old)
            if order in ("release", "acq_rel"):
                self.released[address] = np.maximum(old, mine)
                self.clock[w, w] += 1

    def barrier(self, cta: int) -> None:
        first = (cta - self.first) * self.machine.warps
        ws = np.arange(first, first + self.machine.warps)
        self.clock[ws] = self.clock[ws].max(0)
        self.fenced[ws] = self.fenced[ws].max(0)
        self.clock[ws, ws] += 1

    def release(self, batch: Batch, lanes: Lanes, clock: Clock) -> Clock:
        """A barrier's clock after these lanes have arrived, from its clock before."""
        ws = np.unique(self._of(batch, lanes))
        known = self.clock[ws].max(0)
        self.clock[ws, ws] += 1
        return np.maximum(clock, known)

    def acquire(self, batch: Batch, lanes: Lanes, clock: Clock) -> None:
        ws = np.unique(self._of(batch, lanes))
        self.clock[ws] = np.maximum(self.clock[ws], clock)

    def fence_proxy(self, batch: Batch, q: Mask) -> None:
        ws = np.unique(self._of(batch, active(q)))
        self.fenced[ws] = self.clock[ws]
        self.clock[ws, ws] += 1
