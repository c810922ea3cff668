"""Find shared memory that is refilled while an asynchronous product may still read it, in a kernel's compiled TTGIR.

    python benchmarks/buffer_reuse.py kernel.ttgir ...

A pipelined loop holds several buffers for each operand of its matmul. `warp_group_dot` and `tc_gen5_mma` return before
they have read their operands, while copies for later iterations are issued. If a buffer is refilled before a wait has
covered the product that reads it, the product may multiply the wrong data. Triton 3.6 to 3.9 compile such code where
one loaded tile feeds both `tl.dot` and registers.

The check executes what decides this (integers, products, waits and copies) in program order, each loop until all of
its buffers have been filled twice. It takes integer arguments as large, so that loops run, and buffer indices that it
cannot compute as any index. An operation on shared memory that it does not know raises ValueError.

Not covered, because TTGIR does not say it: the CTA barrier between one warp's wait and another warp's copy, and which
buffers share memory once one of them is dead.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LARGE = 1 << 20  # the value of every integer argument
VIEWS = {"memdesc_index", "memdesc_subview", "memdesc_subslice", "memdesc_trans", "memdesc_reshape",
         "memdesc_reinterpret"}  # fmt: skip
WRITES = {"async_copy_global_to_local", "async_tma_copy_global_to_local", "async_tma_gather", "buffer_load_to_local",
          "local_store", "tmem_store"}  # fmt: skip
HARMLESS = {"local_load", "local_dealloc", "tmem_load", "init_barrier", "inval_barrier", "barrier_expect",
            "fence_async_shared", "yield"}  # fmt: skip
PRODUCTS = {"warp_group_dot", "tc_gen5_mma", "tc_gen5_mma_scaled"}
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "andi": operator.and_, "ori": operator.or_,
    "xori": operator.xor, "minsi": min, "maxsi": max, "divsi": lambda a, b: int(a / b) if b else 0,
    "remsi": lambda a, b: a - b * int(a / b) if b else 0, "divui": lambda a, b: a // b if b else 0,
    "remui": lambda a, b: a % b if b else 0,
}  # fmt: skip


class Operand(NamedTuple):
    """The buffers through which one operand passes to asynchronous products."""

    name: str  #: of their allocation in the TTGIR
    buffers: int
    pending: int  #: the most products in flight while one of the buffers is refilled
    race: bool  #: one of those products reads the very buffer that is refilled

    def __str__(self) -> str:
        verdict = "refilled while a product may still read it" if self.race else "sound"
        return f"{self.name} has {self.buffers} buffers with {self.pending} products pending: {verdict}"


class Allocation(NamedTuple):
    name: str
    line: int
    buffers: int
    holds_barriers: bool  # mbarriers rather than data


class Buffer(NamedTuple):
    allocation: Allocation
    slot: int | None = None  # None: any of them, or all

    def overlaps(self, other: Buffer) -> bool:
        known = self.slot is not None and other.slot is not None
        return self.allocation == other.allocation and not (known and self.slot != other.slot)


class Product(NamedTuple):
    reads: tuple[Buffer, ...]
    signals: tuple[Buffer, ...]  # the mbarriers that learn of its end; warp_group_dot has none


@dataclass
class Operation:
    """A line of TTGIR and the regions it opens."""

    text: str
    line: int
    name: str
    results: list[str]
    operands: list[str]
    regions: list[list[Operation]] = field(default_factory=list)


Value = int | Buffer | None  # None: unknown


def operands(ttgir: str) -> list[Operand]:
    """All of the kernel's, loop by loop."""
    execution = _Execution(ttgir)
    return [Operand(of.name, of.buffers, *execution.refills.get(of, (0, False))) for of in execution.operands]


def races(ttgir: str) -> list[Operand]:
    """Those that are refilled too early."""
    return [operand for operand in operands(ttgir) if operand.race]


def parse(ttgir: str) -> list[Operation]:
    """The module's operations; names of values repeat between regions that do not contain one another."""
    top = Operation("", 0, "", [], [], [[]])
    stack = [top]
    for number, text in enumerate(ttgir.splitlines(), 1):
        text = re.sub(r"\s+loc\((?:#\w+|unknown|\"[^\"]*\"\(#\w+\)|callsite\(.*?\))\)$", "", text.strip())
        found = re.match(r'(?:(%.+?) = )?"?([a-z]\w*(?:\.\w+)+|module)\b"?(.*)', text)
        if text.startswith("}"):
            if not text.endswith("{"):
                stack.pop()
            else:  # } else {
                stack[-1].regions.append([])
        elif found:
            results, name, rest = found.groups()
            used = re.findall(r"%[\w.$-]+(?:#\d+)?", re.split(r" : | -> ", rest)[0])
            operation = Operation(text, number, name, _results(results or ""), used)
            stack[-1].regions[-1].append(operation)
            if text.endswith("{"):
                operation.regions.append([])
                stack.append(operation)
    return top.regions[0]


def _results(left: str) -> list[str]:
    """ "%a:2, %b" is %a#0, %a#1 and %b."""
    pairs = [name.partition(":") for name in left.split(", ") if name]
    return [f"{name}#{i}" if n else name for name, _, n in pairs for i in range(int(n or 1))]


class _Execution:
    """What one thread issues, in order."""

    def __init__(self, ttgir: str) -> None:
        self.values: dict[str, Value] = {}
        self.in_flight: list[Product] = []  # in the order in which they end
        self.operands: dict[Allocation, None] = {}  # in the order of their first product
        self.refills: dict[Allocation, tuple[int, bool]] = {}  # products pending, and whether one races
        self.turns = 2 * max(map(int, re.findall(r"memdesc<(\d)x", ttgir)), default=1) + 2
        self.run(parse(ttgir))

    def run(self, region: list[Operation]) -> list[Value]:
        """What the region's last operation yields."""
        for op in region:
            dialect, _, kind = op.name.rpartition(".")
            if op.name in ("module", "tt.func"):
                arguments = re.findall(r"(%\w+): i\d+", op.text)
                self.values.update(dict.fromkeys(arguments, LARGE))
                self.run(op.regions[0])
            elif op.name == "scf.for":
                self.run_for(op)
            elif op.name == "scf.if":
                self.run_if(op)
            elif dialect == "arith":
                self.values.update(dict.fromkeys(op.results, self.integer(op, kind)))
            elif kind in ("local_alloc", "tmem_alloc"):
                self.allocate(op)
            elif kind in VIEWS:
                self.values[op.results[0]] = self.view(op, kind)
            else:
                self.issue(op, kind)
        return [self.values.get(name) for name in region[-1].operands] if region else []

    def run_for(self, op: Operation) -> None:
        head = re.search(r"(%\S+) = (%\S+) to (%\S+) step (%\S+)(?: iter_args\((.*?)\))?", op.text)
        assert head, op.text
        pairs = [pair.split(" = ") for pair in (head[5] or "").split(", ") if pair]
        values = [self.values.get(initial) for _, initial in pairs]
        first, last, step = (self.values.get(head[i]) for i in (2, 3, 4))
        for turn in range(self.turns):
            at = first + turn * step if isinstance(first, int) and isinstance(step, int) else None
            if isinstance(at, int) and isinstance(last, int) and at >= last:
                break
            self.values |= {head[1]: at, **{name: value for (name, _), value in zip(pairs, values, strict=True)}}
            values = self.run(op.regions[0])[: len(pairs)]
        self.values.update(zip(op.results, values, strict=True))

    def run_if(self, op: Operation) -> None:
        """Both branches from the same state; then on from the one that is taken, or from either if that is unknown."""
        condition, before, ends = self.values.get(op.operands[0]), self.in_flight, []
        for region in (*op.regions, [])[:2]:
            self.in_flight = list(before)
            ends.append((self.run(region), self.in_flight))
        if condition is None:
            (yes, flying), (no, also) = ends
            values = [a if a == b else None for a, b in zip(yes, no, strict=False)]
            self.in_flight = flying + [product for product in also if product not in flying]
        else:
            values, self.in_flight = ends[0 if condition else 1]
        self.values.update(zip(op.results, values, strict=False))

    def integer(self, op: Operation, kind: str) -> Value:
        values = [self.values.get(name) for name in op.operands]
        if kind == "constant":
            found = re.search(r"constant (true|false|-?\d+(?= :))", op.text)
            return None if not found else int(found[1] == "true") if found[1].isalpha() else int(found[1])
        if kind == "select" and values[0] is not None:
            return values[1] if values[0] else values[2]
        if kind in ("extsi", "extui", "trunci"):
            return values[0]
        compared = re.search(r"cmpi [su]?(eq|ne|lt|le|gt|ge),", op.text)
        function = getattr(operator, compared[1]) if compared else ARITHMETIC.get(kind)
        known = [value for value in values if isinstance(value, int)]
        return int(function(*known)) if function and len(known) == len(values) == 2 else None

    def allocate(self, op: Operation) -> None:
        """An allocation in a loop is the same memory in each turn, so its initial value is one more refill."""
        sizes = re.search(r"memdesc<([\dx]*)x(\w+),", op.text.rpartition(" -> ")[2])
        assert sizes, op.text
        shape, barriers = sizes[1].split("x"), sizes[2] == "i64"
        several = not op.operands and len(shape) > (1 if barriers else 2)
        buffer = Buffer(Allocation(op.results[0], op.line, int(shape[0]) if several else 1, barriers))
        self.values |= {**dict.fromkeys(op.results), op.results[0]: buffer}
        if op.operands:
            self.refill(buffer)

    def view(self, op: Operation, kind: str) -> Value:
        buffer, *indices = (self.values.get(name) for name in op.operands)
        assert isinstance(buffer, Buffer), op.text
        if kind in ("memdesc_index", "memdesc_subview") and buffer.allocation.buffers > 1 and buffer.slot is None:
            return buffer._replace(slot=indices[0] if isinstance(indices[0], int) else None)
        return buffer

    def issue(self, op: Operation, kind: str) -> None:
        touched = [value for name in op.operands if isinstance(value := self.values.get(name), Buffer)]
        data = tuple(buffer for buffer in touched if not buffer.allocation.holds_barriers)
        barriers = tuple(buffer for buffer in touched if buffer.allocation.holds_barriers)
        self.values.update(dict.fromkeys(op.results))
        if kind in PRODUCTS:
            factors = data[:2]  # a third one is the accumulator
            self.operands.update(dict.fromkeys(buffer.allocation for buffer in factors))
            self.in_flight.append(Product(factors, barriers))
            if kind == "warp_group_dot" and "isAsync = true" not in op.text:
                self.in_flight.clear()
        elif kind == "tc_gen5_commit":  # its barriers learn of the end of all products before
            self.in_flight.append(Product((), barriers))
        elif kind == "warp_group_dot_wait":
            self.in_flight = self.in_flight[
                -int(op.text.partition("pendings = ")[2].split()[0]) or len(self.in_flight) :
            ]
            self.values.update(zip(op.results, map(self.values.get, op.operands), strict=True))
        elif kind == "wait_barrier":
            ended = (i for i, product in enumerate(self.in_flight, 1) if set(product.signals) & set(barriers))
            del self.in_flight[: next(ended, 0)]
        elif kind in WRITES:
            for buffer in data:
                self.refill(buffer)
        elif kind == "while" or (touched and kind not in HARMLESS):
            inner = {name for region in op.regions for each in region for name in each.operands}
            if touched or any(isinstance(self.values.get(name), Buffer) for name in inner):
                raise ValueError(f"an operation on shared memory that this check does not know: {op.text[:300]}")

    def refill(self, buffer: Buffer) -> None:
        pending, race = self.refills.get(buffer.allocation, (0, False))
        race |= any(buffer.overlaps(read) for product in self.in_flight for read in product.reads)
        self.refills[buffer.allocation] = max(pending, len(self.in_flight)), race


def main() -> int:
    found = [operand for path in sys.argv[1:] for operand in operands(Path(path).read_text())]
    print("\n".join(map(str, found)) or "no asynchronous products")
    return int(any(operand.race for operand in found))


if __name__ == "__main__":
    sys.exit(main())
