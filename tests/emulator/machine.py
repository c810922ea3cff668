"""Runs a translated kernel on a grid of blocks: warps, registers and the scheduler.

A batch executes together: one block (schedule "lockstep") or one warp ("random"). Its lanes are elements of numpy
arrays. Lanes that diverge at a branch continue under a mask until its post-dominator.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from . import arithmetic
from .asynchronous import Barrier, Copy, Product, Queue, Transfer
from .memory import EmulatorError, Region
from .ptx import END, Array, Block, Mask, Program
from .races import Races

if TYPE_CHECKING:
    from .driver import Launch

Moment = Literal["late", "early", "random"]
NAN = {"h": (2, 0xFFFF), "r": (4, 0x7FC0DEAD), "d": (8, 0x7FF8DEADDEADBEEF)}  # initial values of registers
BLOCKS = 16  # that run at a time, unless the launch requires a number
PATIENCE = 100  # a batch is deadlocked after this many turns of a loop that change nothing


@dataclass
class Options:
    schedule: Literal["lockstep", "random"] = "lockstep"
    seed: int = 0
    copies: Moment = "late"  # when cp.async and TMA take effect
    products: Moment = "late"  # the same for wgmma
    copies_unfenced: bool = False  # no fence.proxy.async between cp.async and wgmma: a note, not a race
    inexact: bool = False  # `arithmetic.inexact`

    def __str__(self) -> str:
        seed = f" {self.seed}" if self.schedule == "random" else ""
        return f"{self.schedule}{seed}, copies {self.copies}, products {self.products}"


SCHEDULES = (
    Options(),
    Options(copies="early"),  # finds buffers that are refilled too soon
    Options("random", 1, "random", "random"),
)


class Batch:
    """Warps of one block that execute together."""

    def __init__(self, machine: Machine, cta: int, warps: range) -> None:
        count = machine.program.count
        self.machine, self.cta, self.warps = machine, cta, warps
        self.size = 32 * len(warps)
        self.p = list(np.random.default_rng(machine.options.seed + 7).random((count["p"], self.size)) < 0.5)
        files = [(np.full((count[c], self.size), nan, f"u{n}"), n) for c, (n, nan) in NAN.items()]
        self.rows = [list(file.view(f"{v}{n}")) for file, n in files for v in "uif"]
        self.tid = np.arange(32 * warps.start, 32 * warps.stop)
        self.lane = self.tid % 32
        self.first_lane = np.arange(self.size) // 32 * 32
        self.warp = cta * machine.warps + self.tid // 32  # of the launch
        self.warp_ids = [cta * machine.warps + w for w in warps]
        self.base = (cta - machine.first) * machine.shared_stride  # of this block's shared memory
        self.pc = 0
        self.pcs: Array | None = None  # of each lane, while they disagree
        self.waiting: Array | None = None  # lanes at a barrier, while others are not
        self.parted: list[tuple[int, Array]] = []  # where to reconverge, and which lanes
        self.done = False
        self.copies: Queue[Copy] = Queue()
        self.products: Queue[Product] = Queue()
        self.cluster_phase = -1  # in which it arrived at the cluster's barrier
        self.turns, self.seen = 0, -1  # turns of a loop since the last change, event `seen`

    def fail(self, message: str, lanes: Array | None = None) -> NoReturn:
        ins = self.machine.program.instructions[self.machine.index]
        who = "" if lanes is None else f", thread {self.tid[lanes[0]]} (and {len(lanes) - 1} more)"
        raise EmulatorError(f"{message}: block {self.cta}{who}: `{ins.text[:110]}` from {ins.source}")

    def special(self, name: str) -> Array:
        """A special register."""
        m = self.machine
        values: dict[str, int | Array] = {
            "%tid.x": self.tid, "%ctaid.x": self.cta, "%nctaid.x": m.ctas, "%clusterid.x": self.cta // m.cluster,
            "%cluster_ctarank": self.cta % m.cluster,
        }  # fmt: skip
        return np.atleast_1d(values[name]).astype(np.uint32)

    def active(self) -> Array:
        """The lanes that have not reached their reconvergence point."""
        assert self.pcs is not None
        while self.parted:
            place, lanes = self.parted[-1]
            active = lanes & (self.pcs != place) & (self.pcs != END)
            if active.any():
                return active
            self.parted.pop()
        return self.pcs != END

    def rejoin(self) -> None:
        assert self.pcs is not None
        if self.waiting is not None and not self.waiting.any():
            self.waiting = None
        if self.waiting is None and (self.pcs == self.pcs[0]).all():
            self.pc, self.pcs, self.parted = int(self.pcs[0]), None, []
            self.done = self.pc == END

    def go_to(self, place: int | Array, m: Mask) -> None:
        if m is True and np.ndim(place) == 0:
            self.pc = int(place)
            self.done = self.pc == END
            return
        if self.pcs is None:
            self.pcs = np.full(self.size, self.pc)
        np.copyto(self.pcs, place, where=m)
        self.rejoin()

    def branch(self, block: Block, m: Mask, target: int) -> None:
        taken: Mask = True
        if block.predicate is not None:
            number, negated = block.predicate
            taken = ~self.p[number] if negated else self.p[number]
        if taken is True or np.all(taken, where=m):
            self.go_to(target, m)
        elif not np.any(taken, where=m):
            self.go_to(block.index + 1, m)
        else:
            if not self.parted or self.parted[-1][0] != block.join:
                self.parted.append((block.join, np.broadcast_to(m, self.size).copy()))
            self.go_to(np.where(taken, target, block.index + 1), m)
        if target <= block.index:
            self.turns = self.turns + 1 if self.seen == self.machine.events else 1
            self.seen = self.machine.events

    def idle_turns(self) -> int:
        return self.turns if self.seen == self.machine.events else 0

    def blocked(self) -> bool:
        if self.waiting is not None:
            return bool((self.waiting | ~self.active()).all())
        if self.pcs is None and self.machine.program.blocks[self.pc].kind == "cluster_wait":
            return self.machine.clusters[self.cta // self.machine.cluster].phase <= self.cluster_phase
        return False

    def complete_something(self, rng: np.random.Generator) -> None:
        """Complete one asynchronous operation early: any copy, or the first product."""
        options = self.machine.options
        copies = self.copies.unfinished() if options.copies == "random" else []
        products = self.products.unfinished() if options.products == "random" else []
        if copies and (not products or rng.random() < 0.5):
            copies[rng.integers(len(copies))].complete()
        elif products:
            products[0].complete()


class Machine:
    def __init__(self, program: Program, launch: Launch, regions: list[Region], options: Options) -> None:
        self.program, self.launch, self.options = program, launch, options
        self.warps, self.cluster = launch.metadata.num_warps, launch.metadata.num_ctas
        self.ctas = launch.programs * self.cluster
        self.shared_size = launch.metadata.shared
        self.shared_stride = -(-self.shared_size // 128) * 128 + 128
        self.regions = regions
        self.rng = np.random.default_rng(options.seed)
        self.index = 0  # of the instruction that runs
        self.events = 0  # changes of memory and barriers so far
        self.findings = Counter(program.warnings)
        if len(launch.params) != len(program.params):
            raise EmulatorError(f"{len(launch.params)} arguments for {len(program.params)} parameters")
        if program.threads not in (0, 32 * self.warps) or program.cluster != self.cluster:
            raise EmulatorError("launched with other threads or clusters than the kernel asks for")

    def region_of(self, address: int) -> Region | None:
        return next((r for r in self.regions if r.start <= address < r.start + r.size), None)

    def describe(self, address: int) -> str:
        last = max((r for r in self.regions if r.start <= address), key=lambda r: r.start, default=None)
        return f"{address - last.start - last.size} bytes after {last.name}" if last else "before all of them"

    def run(self) -> None:
        """Run the launch. Raises EmulatorError for a fatal error; other findings are in `findings`."""
        arithmetic.inexact = self.options.inexact
        together = self.ctas if self.launch.metadata.launch_cooperative_grid else BLOCKS
        step = max(self.cluster, together // self.cluster * self.cluster)
        with np.errstate(all="ignore"):
            for first in range(0, self.ctas, step):
                self._run_blocks(first, min(first + step, self.ctas))

    def _run_blocks(self, first: int, stop: int) -> None:
        self.first = first
        memory = np.full((stop - first) * self.shared_stride, 0xFF, np.uint8)  # NaN
        self.shared = {n: memory.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.arrived = dict.fromkeys(range(first, stop), 0)  # at bar.sync
        self.mbarriers: dict[tuple[int, int], Barrier] = {}
        self.transfers: list[Transfer] = []
        warps = 32 * self.warps * self.cluster
        self.clusters = {c: Barrier(warps) for c in range(first // self.cluster, -(-stop // self.cluster))}
        self.races = Races(self, first, stop)
        random = self.options.schedule == "random"
        each = [range(w, w + 1) for w in range(self.warps)] if random else [range(self.warps)]
        self.batches = live = [Batch(self, cta, warps) for cta in range(first, stop) for warps in each]
        turn = 0
        while live:
            ready = [b for b in live if not b.blocked()]
            if all(b.idle_turns() > PATIENCE for b in ready):
                if not self.transfers:
                    self._deadlock(live)
                self.transfers[0].complete()
                continue
            turn += 1
            batch = ready[self.rng.integers(len(ready)) if random else turn % len(ready)]
            if "random" in (self.options.copies, self.options.products):
                self._complete_at_random()
            for _ in range(int(self.rng.integers(1, 12)) if random else 2000):
                self._step(batch)
                if batch.done or batch.blocked() or batch.idle_turns() >= 2:  # it may be waiting for another
                    break
            if batch.done:
                live = [b for b in live if b is not batch]
                self.events += 1
        if self.transfers:
            self.findings["TMA still under way at the end of the kernel"] += 1

    def _complete_at_random(self) -> None:
        if self.transfers and self.options.copies == "random" and self.rng.random() < 0.3:
            self.transfers[self.rng.integers(len(self.transfers))].complete()
        if self.rng.random() < 0.5:
            self.batches[self.rng.integers(len(self.batches))].complete_something(self.rng)

    def _deadlock(self, live: list[Batch]) -> NoReturn:
        places = []
        for b in live[:4]:
            block = self.program.blocks[b.pc if b.pcs is None else int(b.pcs.min())]
            ins = block.end or block.body[-1]
            places.append(f"block {b.cta} warps {b.warps.start}-{b.warps.stop - 1} at `{ins.text[:70]}` ({ins.source})")
        raise EmulatorError(f"deadlock: all {len(live)} batches wait and nothing can change: " + "; ".join(places))

    def _step(self, b: Batch) -> None:
        """One basic block."""
        m: Mask
        pc, m = b.pc, True
        if b.pcs is not None:
            ready = b.active() if b.waiting is None else b.active() & ~b.waiting
            pc = int(b.pcs[ready].min())
            m = ready & (b.pcs == pc)
        block = self.program.blocks[pc]
        block.run(b, m)
        if block.kind == "fall":
            b.go_to(pc + 1, m)
        elif block.kind == "barrier":
            self._barrier(b, block, m)
        elif block.kind == "cluster_wait":
            self._cluster_wait(b, pc, m)
        else:
            b.branch(block, m, END if block.kind == "return" else block.target)

    def _barrier(self, b: Batch, block: Block, m: Mask) -> None:
        assert block.end is not None
        if block.end.predicate or block.end.args != ["0"]:
            raise EmulatorError(f"not emulated: {block.end.text}")
        if m is True and len(b.warps) == self.warps:
            self.races.barrier(b.cta)
            b.pc += 1
            return
        if b.pcs is None:
            b.pcs = np.full(b.size, b.pc)
        b.waiting = np.zeros(b.size, bool) if b.waiting is None else b.waiting
        b.waiting |= m
        self.arrived[b.cta] += int(np.broadcast_to(m, b.size).sum())
        if self.arrived[b.cta] == 32 * self.warps:
            self.arrived[b.cta] = 0
            places = set[int]()
            for other in self.batches:
                if other.cta == b.cta and other.waiting is not None and other.pcs is not None:
                    places.update(other.pcs[other.waiting].tolist())
                    other.pcs[other.waiting] += 1
                    other.waiting = None
                    other.rejoin()
            if len(places) > 1:
                self.findings["bar.sync 0: warps met at different barriers of the program"] += 1
            self.races.barrier(b.cta)

    def _cluster_wait(self, b: Batch, pc: int, m: Mask) -> None:
        if m is not True or b.cluster_phase < 0:
            raise EmulatorError("barrier.cluster.wait without arrive, or by a part of the warps (not emulated)")
        barrier = self.clusters[b.cta // self.cluster]
        if barrier.phase > b.cluster_phase:
            self.races.acquire(b, slice(None), barrier.done)
            b.cluster_phase = -1
            b.pc = pc + 1
            self.events += 1
