"""Parses the PTX of one kernel into basic blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = Literal[True] | Array  # which lanes of a batch: all, or one bool each

SHARED_BASE = 1024  # where dynamic shared memory begins in the shared window
REGISTER_CLASS = {"pred": "p", "8": "h", "16": "h", "32": "r", "64": "d"}  # by width; "h" holds 8 and 16 bits
END = 1 << 30  # the "block" after the last


class PTXError(Exception):
    """PTX that the emulator does not know."""


@dataclass
class Instruction:
    text: str
    op: str  # with modifiers: "add.rn.f32"
    args: list[str]
    predicate: tuple[str, bool] | None  # register, negated
    source: str  # file:line of the kernel in Python
    index: int

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Block:
    index: int
    body: list[Instruction] = field(default_factory=list)
    kind: Literal["fall", "branch", "return", "barrier", "cluster_wait"] = "fall"
    end: Instruction | None = None
    target: int = -1
    join: int = END  # where lanes that part at its end meet again
    predicate: tuple[int, bool] | None = None  # of its end: register number, negated
    run: Callable[[Any, Mask], None] = lambda batch, mask: None


def split_arguments(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def names_in(operand: str) -> list[str]:
    """The members of a vector operand {a, b}, or the one name."""
    return [name.strip() for name in operand.strip().strip("{}").split(",")]


class Program:
    """One kernel. With `cut`, blocks end after so many instructions, so that the scheduler may switch warps there."""

    def __init__(self, text: str, cut: int = 0) -> None:
        self.text, self.cut = text, cut
        self.instructions: list[Instruction] = []
        self.registers: dict[str, tuple[str, int]] = {}  # name -> class and number in it
        self.count = dict.fromkeys("phrd", 0)
        self.params: dict[str, int] = {}
        self.blocks = [Block(0)]
        self.warnings: list[str] = []
        self.narrow_stores = bool(re.search(r"st\.shared\S*\.[bus](8|16)\b", text))  # of less than 4 bytes
        self._items: list[str | Instruction] = []  # labels and instructions, in order
        self._parse()
        self._make_blocks()
        self._find_joins()
        self._check_wgmma_fences()

    def _parse(self) -> None:
        text = re.sub(r"/\*.*?\*/", "", self.text, flags=re.S)
        files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
        text = re.sub(r"//[^\n]*", "", text)
        head = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)\s*([^{]*)\{", text, re.S)
        if not head:
            raise PTXError("no kernel")
        self.name = head.group(1)
        for i, declaration in enumerate(split_arguments(head.group(2))):
            self.params[declaration.split()[-1].split("[")[0]] = i
        threads = re.search(r"\.reqntid\s+(\d+)", head.group(3))
        cluster = re.search(r"\.reqnctapercluster\s+(\d+)", head.group(3))
        self.threads = int(threads.group(1)) if threads else 0
        self.cluster = int(cluster.group(1)) if cluster else 1

        label = re.compile(r"([$\w]+):(?!:)")
        scopes: list[dict[str, str]] = [{}]  # names declared in braces -> unique ones
        serial, source, i = 0, "", head.end()
        while True:
            while text[i].isspace():
                i += 1
            if text[i] == "{":
                serial += 1
                inside = text[i : self._end_of_scope(text, i)]
                names = re.findall(r"\.reg\s+\.\w+\s+([A-Za-z_]\w*)\s*;", inside)
                names += re.findall(r"(?:^|[\s;{])([A-Za-z_]\w*):", inside)
                scopes.append(scopes[-1] | {name: f"{name}__{serial}" for name in names})
                i += 1
            elif text[i] == "}":
                scopes.pop()
                i += 1
                if not scopes:
                    return
            elif found := label.match(text, i):
                self._items.append(scopes[-1].get(found.group(1), found.group(1)))
                i = found.end()
            elif text.startswith((".loc", ".file"), i):
                stop = text.index("\n", i)
                location = re.match(r"\.loc\s+(\d+)\s+([1-9]\d*)", text[i:stop])
                if location:
                    source = f"{files.get(location.group(1), '?').rsplit('/', 1)[-1]}:{location.group(2)}"
                i = stop
            else:
                stop = text.index(";", i)
                statement = " ".join(text[i:stop].split())
                i = stop + 1
                if statement.startswith(".reg"):
                    self._declare(statement, scopes[-1])
                elif statement and not statement.startswith("."):
                    for old, new in scopes[-1].items():
                        statement = re.sub(rf"(?<![\w%$.]){old}(?!\w)", new, statement)
                    self._add(statement, source)

    @staticmethod
    def _end_of_scope(text: str, i: int) -> int:
        depth = 0
        for j in range(i, len(text)):
            depth += (text[j] == "{") - (text[j] == "}")
            if depth == 0:
                return j
        raise PTXError("open brace")

    def _declare(self, statement: str, scope: dict[str, str]) -> None:
        _, kind, names = statement.split(None, 2)
        cls = REGISTER_CLASS[kind.lstrip(".busf")] if kind != ".pred" else "p"
        for name in names_in(names):
            many = re.match(r"(%?\w+)<(\d+)>", name)
            stem, count = (many.group(1), int(many.group(2))) if many else (scope.get(name, name), 1)
            for n in range(count):
                self.registers[f"{stem}{n}" if many else stem] = (cls, self.count[cls])
                self.count[cls] += 1

    def _add(self, statement: str, source: str) -> None:
        text, predicate = statement, None
        if statement[0] == "@":
            guard, statement = statement.split(None, 1)
            predicate = (guard.lstrip("@!"), "!" in guard)
        op, _, rest = statement.partition(" ")
        ins = Instruction(text, op, split_arguments(rest), predicate, source, len(self.instructions))
        self.instructions.append(ins)
        self._items.append(ins)

    def _make_blocks(self) -> None:
        ends = {"bra": "branch", "ret": "return", "exit": "return", "bar": "barrier", "barrier": "barrier"}
        jumps = [x for x in self._items if isinstance(x, Instruction) and x.op.split(".")[0] == "bra"]
        targets = {ins.args[-1] for ins in jumps}
        labels: dict[str, int] = {}

        def new_block() -> None:
            self.blocks.append(Block(len(self.blocks)))

        for item in self._items:
            if isinstance(item, str):
                if item in targets:
                    if self.blocks[-1].body:
                        new_block()
                    labels[item] = self.blocks[-1].index
                continue
            kind = ends.get(item.op.split(".")[0])
            if item.op.startswith("barrier.cluster.wait"):
                kind = "cluster_wait"
                if self.blocks[-1].body:
                    new_block()  # a block of its own, for it is tried until it succeeds
            if kind is None or item.op.startswith(("barrier.cluster.arrive", "bar.warp")):
                self.blocks[-1].body.append(item)
                if self.cut and len(self.blocks[-1].body) >= self.cut:
                    new_block()
            else:
                self.blocks[-1].end, self.blocks[-1].kind = item, kind  # type: ignore[assignment]
                new_block()
        for block in self.blocks:
            if block.end is not None:
                if block.kind == "branch":
                    block.target = labels[block.end.args[-1]]
                if block.end.predicate:
                    name, negated = block.end.predicate
                    block.predicate = (self.registers[name][1], negated)

    def _find_joins(self) -> None:
        """Lanes that part at a branch meet again at its immediate post-dominator."""
        n = len(self.blocks)
        successors = []
        for block in self.blocks:
            jump = {"branch": [block.target], "return": [n]}.get(block.kind, [])
            successors.append([min(x, n) for x in (jump if jump and not block.predicate else [*jump, block.index + 1])])
        after = [(1 << (n + 1)) - 1] * n + [1 << n]  # the blocks that every path from here passes, as bits
        changed = True
        while changed:
            changed = False
            for i in reversed(range(n)):
                common = after[successors[i][0]]
                for x in successors[i][1:]:
                    common &= after[x]
                changed |= common | 1 << i != after[i]
                after[i] = common | 1 << i
        for block in self.blocks:
            passed = [x for x in range(n + 1) if after[block.index] >> x & 1 and x != block.index]
            nearest = max(passed, key=lambda x: after[x].bit_count(), default=n)
            block.join = nearest if nearest < n else END

    def _check_wgmma_fences(self) -> None:
        """wgmma.fence must stand between the last other write of an accumulator and the first wgmma on it."""
        for block in self.blocks:
            fenced, dirty = bool(self.cut), set[str]()
            for ins in block.body:
                if ins.op.startswith("wgmma.fence"):
                    fenced, dirty = True, set()
                elif ins.op.startswith("wgmma.mma_async"):
                    if not fenced:
                        self.warnings.append(f"no wgmma.fence before: {ins.text[:60]} ({ins.source})")
                    if dirty.intersection(names_in(ins.args[0])):
                        self.warnings.append(f"accumulators written after the wgmma.fence: {ins.text[:60]}")
                elif ins.args and not ins.op.startswith(("st.", "wgmma")):
                    dirty.update(names_in(ins.args[0]))
