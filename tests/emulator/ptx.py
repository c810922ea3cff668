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
DESCRIPTORS = 0xDE5C0000  # "addresses" of parameters; only tensor maps use them
REGISTER_CLASS = {"pred": "p", "8": "h", "16": "h", "32": "r", "64": "d"}  # by width; "h" holds 8 and 16 bits
TOKEN = re.compile(
    r"\s*(?:(?P<brace>[{}])|\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|(?P<label>[$\w]+):(?!:)"
    r"|\.reg\s+\.(?P<kind>\w+)\s+(?P<names>[^;]*);|\.[^;\n]*;?|(?P<statement>[^;]*);)"
)
END = 1 << 30  # the "block" after the last
Kind = Literal["fall", "branch", "return", "barrier", "cluster_wait"]
ENDS: dict[str, Kind] = {
    "bra": "branch", "ret": "return", "exit": "return", "bar.sync": "barrier", "barrier.sync": "barrier",
    "barrier.cluster.wait": "cluster_wait",
}  # fmt: skip


class PTXError(Exception):
    """PTX that the emulator does not support."""


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
    kind: Kind = "fall"
    end: Instruction | None = None
    target: int = -1
    join: int = END  # where lanes that diverge at its end reconverge
    predicate: tuple[int, bool] | None = None  # of its end: register number, negated
    run: Callable[[Any, Mask], None] = lambda batch, mask: None


def split_arguments(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\[{])+", text)]


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
        self.blocks = [Block(0)]
        self.warnings: list[str] = []
        self.narrow_stores = bool(re.search(r"st\.shared\S*\.[bus](8|16)\b", text))  # of less than 4 bytes
        self._parse(re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S))
        self._find_joins()
        self._check_wgmma_fences()

    def _parse(self, text: str) -> None:
        head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*([^{]*)", text, re.S)
        if not head:
            raise PTXError("no kernel")
        self.name, parameters, directives = head.groups()
        self.params = {p.split()[-1].split("[")[0]: i for i, p in enumerate(split_arguments(parameters))}
        self.threads, self.cluster = (
            int(found.group(1)) if (found := re.search(rf"\.{name}\s+(\d+)", directives)) else default
            for name, default in (("reqntid", 0), ("reqnctapercluster", 1))
        )
        files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]*)"', text))
        local: dict[str, str] = {}  # names in inline assembly, which may repeat -> unique names
        labels: dict[str, int] = {}
        source, depth = "", 0
        for token in TOKEN.finditer(text, head.end()):
            if token["brace"]:
                depth += 1 if token["brace"] == "{" else -1
                if depth == 0:
                    break
            elif token["line"]:
                source = f"{files.get(token['file'], '?')}:{token['line']}" if token["line"] != "0" else source
            elif token["label"]:
                name = token["label"]
                if name[0] != "$":
                    local[name] = f"{name}__{token.start()}"
                if self.blocks[-1].body:
                    self._new_block()
                labels[local.get(name, name)] = self.blocks[-1].index
            elif token["kind"]:
                cls = REGISTER_CLASS[token["kind"].lstrip("busf")]
                for name in names_in(token["names"]):
                    stem, _, many = name.rstrip(">").partition("<")
                    if not many:
                        stem = local[name] = f"{name}__{token.start()}"
                    for n in range(int(many or 1)):
                        self.registers[f"{stem}{n}" if many else stem] = (cls, self.count[cls])
                        self.count[cls] += 1
            elif token["statement"]:
                statement = " ".join(token["statement"].split())
                for old, new in local.items():
                    statement = re.sub(rf"(?<![\w%$.]){old}(?!\w)", new, statement)
                self._add(statement, source)
        for block in self.blocks:
            if block.kind == "branch" and block.end:
                block.target = labels[block.end.args[-1]]

    def _new_block(self) -> None:
        self.blocks.append(Block(len(self.blocks)))

    def _add(self, statement: str, source: str) -> None:
        text, predicate = statement, None
        if statement[0] == "@":
            guard, statement = statement.split(None, 1)
            predicate = (guard.lstrip("@!"), "!" in guard)
        op, _, rest = statement.partition(" ")
        ins = Instruction(text, op, split_arguments(rest), predicate, source, len(self.instructions))
        self.instructions.append(ins)
        if op.startswith("barrier.cluster.wait") and self.blocks[-1].body:
            self._new_block()  # its own block, because it repeats until it succeeds
        block = self.blocks[-1]
        kind = next((kind for start, kind in ENDS.items() if op.startswith(start)), None)
        if kind is None:
            block.body.append(ins)
        else:
            block.end, block.kind = ins, kind
            block.predicate = (self.registers[predicate[0]][1], predicate[1]) if predicate else None
        if kind or (self.cut and len(block.body) >= self.cut):
            self._new_block()

    def _find_joins(self) -> None:
        """Lanes that diverge at a branch reconverge at its immediate post-dominator."""
        n = len(self.blocks)
        successors = []
        for block in self.blocks:
            jump = {"branch": [block.target], "return": [n]}.get(block.kind, [])
            successors.append([min(x, n) for x in (jump if jump and not block.predicate else [*jump, block.index + 1])])
        after = [(1 << (n + 1)) - 1] * n + [1 << n]  # bit sets of the blocks on every path from here
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
