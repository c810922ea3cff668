"""Translates each block of a program into Python source and compiles it.

In the source B is the batch, M the machine, m and q are masks (`ptx` has the convention), ur, ir, fr the 32-bit
registers as unsigned, signed and floating-point rows, uh ... those of 16 bits, ud ... of 64, p the predicates, k0, k1,
... constants. Anything more than an expression is a call of an engine function with the batch and the mask.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import arithmetic, asynchronous, memory
from .ptx import DESCRIPTORS, SHARED_BASE, Instruction, Program, PTXError, names_in

DTYPE = {f"{s}{n}": np.dtype(f"{t}{n // 8}") for s, t in (("u", "u"), ("s", "i"), ("f", "f")) for n in (16, 32, 64)}
DTYPE |= {f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)} | {"u8": np.dtype("u1"), "s8": np.dtype("i1")}
UFUNC = {
    "add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "min": "minimum", "max": "maximum",
    "neg": "negative", "abs": "abs",
}  # fmt: skip
LOGICAL = {"and": "&", "or": "|", "xor": "^"}
COMPARE = {"eq": "==", "ne": "!=", "neu": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPPOSITE = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # true for NaN: negations of comparisons that are false
IGNORED = ("wgmma.fence", "bar.warp.sync", "fence.mbarrier_init")


def unsigned(kind: str) -> str:
    return kind if kind == "pred" else "u" + ("32" if kind.endswith("x2") else kind.lstrip("busf"))


class Translator:
    """Operands of one program as Python expressions."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: dict[tuple[str, int], str] = {}
        self.namespace: dict[str, Any] = {
            "np": np, "arithmetic": arithmetic, "memory": memory, "asynchronous": asynchronous,
            "true": np.array([True]), "false": np.array([False]),
        }  # fmt: skip

    def constant(self, value: int, kind: str) -> str:
        """The name of an array of one number, given by its bits."""
        size = DTYPE[kind].itemsize
        value &= (1 << 8 * size) - 1
        name = self.constants.setdefault((kind, value), f"k{len(self.constants)}")
        self.namespace[name] = np.frombuffer(value.to_bytes(size, "little"), DTYPE[kind])
        return name

    def row(self, register: str, kind: str) -> str:
        """The array of a register, viewed as a type."""
        cls, number = self.program.registers[register]
        return f"p[{number}]" if cls == "p" else f"{DTYPE[kind].kind}{cls}[{number}]"

    def whole(self, register: str, kind: str) -> str:
        """All of a register as an integer of the type's signedness, for a load or store that may be narrower."""
        width = {"h": 16, "r": 32, "d": 64}[self.program.registers[register][0]]
        return self.row(register, f"{'s' if kind[0] == 's' else 'u'}{width}")

    def value(self, operand: str, kind: str) -> str:
        """An operand that is read as a type."""
        kind = unsigned(kind) if kind[0] == "b" or kind.endswith("x2") else kind
        if operand in self.program.registers:
            return self.row(operand, kind)
        if operand.startswith("%"):
            return f"B.special({operand!r})"
        if operand in self.program.params:
            return self.constant(DESCRIPTORS + self.program.params[operand], kind)
        if kind == "pred":
            return "true" if int(operand, 0) else "false"
        if operand == "global_smem":
            return self.constant(SHARED_BASE, kind)
        return self.constant(int(operand[2:], 16) if operand[:2] in ("0f", "0F", "0d", "0D") else int(operand, 0), kind)

    def address(self, operand: str, bits: int) -> str:
        """[register + offset] or [global_smem + offset]."""
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?\s*\]", operand)
        if not match:
            raise PTXError(f"address {operand}")
        base, kind = match.group(1), f"u{bits}"
        offset = int((match.group(2) or match.group(3) or "0").replace(" ", ""), 0)
        if base == "global_smem":
            return f"np.broadcast_to({self.constant(SHARED_BASE + offset, kind)}, B.size)"
        return f"({self.row(base, kind)} + {self.constant(offset, kind)})" if offset else self.row(base, kind)


def translate(program: Program) -> Program:
    """Compile every block of the program into a function."""
    t = Translator(program)
    source = []
    for block in program.blocks:
        source += [f"def block{block.index}(B, m):"]
        source += [f"    M, p, ({', '.join(f'{v}{cls}' for cls in 'hrd' for v in 'uif')}) = B.machine, B.p, B.rows"]
        for ins in block.body:
            if ins.op.startswith(IGNORED):
                continue
            if ins.predicate:
                own = f"{'~' if ins.predicate[1] else ''}{t.row(ins.predicate[0], 'pred')}"
                source.append(f"    q = {own} if m is True else {own} & m")
            try:
                lines = translated(t, ins, "q" if ins.predicate else "m")
            except (KeyError, ValueError, IndexError) as error:
                raise PTXError(f"{ins.text}: {type(error).__name__} {error}") from error
            if not lines:
                raise PTXError(f"not emulated: {ins.text}")
            source += [f"    {line}" for line in lines]
    exec(compile("\n".join(source), f"<{program.name}>", "exec"), t.namespace)
    for block in program.blocks:
        block.run = t.namespace[f"block{block.index}"]
    return program


def translated(t: Translator, ins: Instruction, q: str) -> list[str]:
    """The source lines for an instruction; none for an unknown instruction or variant."""
    parts, args, kind = ins.parts, ins.args, ins.parts[-1]
    flags = set(parts[1:-1])
    if flags & {"sat", "rz", "rm", "rp", "cc", "multicast::cluster", "cta"} or (flags & {"ftz"} and parts[0] == "setp"):
        return []

    def value(i: int, as_kind: str = kind) -> str:
        return t.value(args[i], as_kind)

    def into(row: str, expression: str) -> list[str]:
        return [f"np.copyto({row}, {expression}, where={q})"]

    def put(as_kind: str, expression: str) -> list[str]:
        return into(t.row(args[0], as_kind), expression)

    def ufunc(name: str, as_kind: str) -> list[str]:
        values = ", ".join(value(i, as_kind) for i in range(1, len(args)))
        return [f"np.{name}({values}, out={t.row(args[0], as_kind)}, where={q})"]

    def floating(function: str) -> list[str]:
        if not flags <= {"rn", "ftz", "approx", "full", "NaN"}:
            return []
        values = [value(i) for i in range(1, len(args))]
        flush = "arithmetic.flush" if "ftz" in flags and kind == "f32" else ""
        called = function if function.endswith(",") else f"{function}("
        return put(kind, f"{flush}({called}{', '.join(f'{flush}({v})' for v in values)}))")

    def call(function: str, *arguments: object) -> list[str]:
        return [f"M.index = {ins.index}; {function}({', '.join(map(str, ('B', q, *arguments)))})"]

    def rows(operand: str, as_kind: str) -> str:
        return f"[{', '.join(t.row(x, as_kind) for x in names_in(operand))}]"

    match parts:
        # floating point
        case ["add" | "sub" | "mul" | "div" | "neg" | "abs" as root, *_, "f32" | "f64"]:
            return floating("arithmetic.approximate('div'," if "full" in flags else f"np.{UFUNC[root]}")
        case ["min" | "max" as root, *_, "f32" | "f64"]:
            return floating(f"np.{root}imum" if "NaN" in flags else f"np.f{root}")
        case ["fma", *_, "f32" | "f64"]:
            return floating("arithmetic.fma")
        case ["ex2" | "rcp" | "sqrt" as root, "approx", *_, "f32"]:
            return floating(f"arithmetic.approximate('{root}',")
        case ["rcp", "approx", "ftz", "f64"]:
            return floating("arithmetic.rcp_f64")
        case ["abs", "f16" | "bf16" | "f16x2" | "bf16x2"]:
            mask = t.constant(0x7FFF7FFF if kind.endswith("x2") else 0x7FFF, unsigned(kind))
            return put(unsigned(kind), f"{value(1, unsigned(kind))} & {mask}")
        # integers and bits
        case ["add" | "sub" as root, _]:
            return ufunc(UFUNC[root], unsigned(kind))
        case ["min" | "max" | "neg" | "abs" as root, _] if kind[0] in "us":
            return ufunc(UFUNC[root], kind)
        case ["and" | "or" | "xor" as root, _]:
            return put(unsigned(kind), f"{value(1)} {LOGICAL[root]} {value(2)}")
        case ["not", _]:
            return put(unsigned(kind), f"~{value(1)}")
        case ["mul" | "mad" as root, "lo" | "wide" as how, _]:
            result = unsigned(kind) if how == "lo" else kind[0] + str(2 * int(kind[1:]))
            a, b = (value(i, unsigned(kind) if how == "lo" else kind) for i in (1, 2))
            add = f" + {value(3, result)}" if root == "mad" else ""
            return put(result, f"np.multiply({a}, {b}, dtype=np.dtype('{DTYPE[result].str}')){add}")
        case ["div", "s32" | "u32"]:
            return call("arithmetic.divide", t.row(args[0], kind), value(1), value(2))
        case ["shl" | "shr" as root, _] if args[2].isdigit() and int(args[2]) < int(kind[1:]):
            as_kind = unsigned(kind) if root == "shl" else kind
            return put(as_kind, f"{value(1, as_kind)} {'<<' if root == 'shl' else '>>'} {value(2, as_kind)}")
        case ["bfe", _]:
            width, position, length = int(kind[1:]), int(args[2], 0), int(args[3], 0)
            up = t.constant(width - position - length, kind)
            return put(kind, f"({value(1)} << {up}) >> {t.constant(width - length, kind)}")
        case ["prmt", "b32"] if not int(args[3].rstrip("U"), 0) & 0x8888:
            return put("u32", f"arithmetic.permute_bytes({value(1)}, {value(2)}, {args[3].rstrip('U')})")
        case ["selp", _]:
            a, b = value(1, unsigned(kind)), value(2, unsigned(kind))
            return put(unsigned(kind), f"np.where({value(3, 'pred')}, {a}, {b})")
        case ["setp", "num", "f32" | "f64"]:
            return put("pred", f"~np.isnan({value(1)} + {value(2)})")
        case ["setp", how, _]:
            a, b = value(1), value(2)
            if how in OPPOSITE:
                compared = f"~({a} {COMPARE[OPPOSITE[how]]} {b})"
            elif (how, kind[0]) == ("ne", "f"):  # numpy's != is true for NaN, as is neu
                compared = f"(({a} < {b}) | ({a} > {b}))"
            else:
                compared = f"({a} {COMPARE[how]} {b})"
            return put("pred", compared)
        # moves and conversions
        case ["mov", _] if args[0].startswith("{"):
            names, as_kind = names_in(args[0]), unsigned(kind)
            each = int(kind[1:]) // len(names)
            pieces = [(name, f"{value(1, as_kind)} >> {t.constant(each * i, as_kind)}") for i, name in enumerate(names)]
            return [line for n, piece in pieces if n != "_" for line in into(t.row(n, f"u{each}"), piece)]
        case ["mov", _] if args[1].startswith("{"):
            names, as_kind = names_in(args[1]), unsigned(kind)
            each, dtype = int(kind[1:]) // len(names), DTYPE[as_kind].str
            wide = [f"{t.value(name, f'u{each}')}.astype('{dtype}')" for name in names]
            return put(as_kind, " | ".join(f"({x} << {t.constant(each * i, as_kind)})" for i, x in enumerate(wide)))
        case ["mov", _] | ["cvta", *_]:
            return put(unsigned(kind), value(1, unsigned(kind)))
        case ["cvt", *_, "f32", "bf16"]:
            return put("u32", f"{value(1, 'u16')}.astype('u4') << 16")
        case ["cvt", to, of] if to[0] in "us" and of[0] in "us":
            return into(t.whole(args[0], to), f"{value(1)}.astype('{DTYPE[to].str}')")
        case ["cvt", *how, to, of] if to[0] == "f" and (how == ["rn"] or (of, to) in (("f16", "f32"), ("f32", "f64"))):
            return put(to, f"{value(1)}.astype('{DTYPE[to].str}')")
        case ["cvt", "rzi", "s32", "f32"]:
            return put("s32", f"arithmetic.to_integer({value(1)})")
        # between the lanes of a warp
        case ["shfl", "sync", "bfly" | "idx" as how, "b32"] if args[3:] == ["31", "-1"] and "|" not in args[0]:
            lane = f"{'B.lane ^ ' if how == 'bfly' else ''}{value(2, 'u32')}"
            return call("arithmetic.shuffle", t.row(args[0], "u32"), value(1), lane)
        case ["redux", "sync", "min" | "max" as how, "s32" | "u32"]:
            return call("arithmetic.reduce_warp", t.row(args[0], kind), value(1), repr(how))
        case ["elect", "sync"]:
            leader, _, p = args[0].partition("|")
            return call("arithmetic.elect", t.row(leader, "u32"), t.row(p, "pred"))
        case ["mma", "sync", "aligned", shape, "row", "col", "f32", of, _, "f32"] if shape.startswith("m16n8k"):
            return call("arithmetic.mma", int(shape[6:]), repr(of), *(rows(x, "u32") for x in args))
        # memory
        case ["ld", "param", _]:
            number = t.program.params[args[1].strip("[] ")]
            return into(t.whole(args[0], kind), f"M.launch.params[{number}].view('{DTYPE[kind].str}')[:1]")
        case ["ld", "global" | "shared" | "shared::cta" | "shared::cluster" as space, *how, _]:
            registers = f"[{', '.join(t.whole(x, kind) for x in names_in(args[0]))}]"
            shared, size = space != "global", int(kind[1:]) // 8
            order = next((x for x in how if x in ("acquire", "relaxed", "volatile")), "")
            where = space == "shared::cluster" if shared else repr(order)
            function = "memory.load_shared" if shared else "memory.load_global"
            return call(function, registers, t.address(args[1], 32 if shared else 64), size, kind[0] == "s", where)
        case ["st", "global" | "shared" | "shared::cta" as space, *how, _] if not {"release", "relaxed"} & set(how):
            stored = [t.whole(x, "u") if x in t.program.registers else t.value(x, kind) for x in names_in(args[1])]
            function, bits = ("memory.store_global", 64) if space == "global" else ("memory.store_shared", 32)
            return call(function, f"[{', '.join(stored)}]", t.address(args[0], bits), int(kind[1:]) // 8)
        case ["atom", "global", *how, "add", "u32"]:
            order = next((x for x in how if x in ("acq_rel", "acquire", "release")), "relaxed")
            return call("memory.atomic_add", t.row(args[0], kind), t.address(args[1], 64), value(2), repr(order))
        case ["ldmatrix", "sync", "aligned", "m8n8", *_, "b16"]:
            return call("memory.ldmatrix", rows(args[0], "u32"), t.address(args[1], 32), "trans" in flags)
        case ["stmatrix", "sync", "aligned", "m8n8", _, "shared", "b16"]:
            return call("memory.stmatrix", rows(args[1], "u32"), t.address(args[0], 32))
        case ["mapa", "shared::cluster", "u32"]:
            return put("u32", f"{value(1)} & np.uint32(0xFFFFFF) | ({value(2)} + np.uint32(1)) << np.uint32(24)")
        # asynchronous
        case ["cp", "async", "ca" | "cg", "shared", "global", *_]:
            size = int(args[2], 0)
            count = value(3, "u32") if len(args) > 3 else t.constant(size, "u32")
            return call("asynchronous.copy", t.address(args[0], 32), t.address(args[1], 64), size, count)
        case ["cp", "async", "commit_group"] | ["wgmma", "commit_group", *_]:
            return call("asynchronous.commit", "B.copies" if parts[0] == "cp" else "B.products")
        case ["cp", "async", "wait_group"] | ["wgmma", "wait_group", *_]:
            return call("asynchronous.wait", "B.copies" if parts[0] == "cp" else "B.products", int(args[0]))
        case ["cp", "async", "bulk", "tensor", "2d", *_] if "global" in flags:
            tensor, place = args[1].strip("[] ").split(",", 1)
            to, bar, x_y = t.address(args[0], 32), t.address(args[2], 32), (t.value(v, "s32") for v in names_in(place))
            return call("asynchronous.transfer", to, t.value(tensor.strip(), "u64"), *x_y, bar)
        case ["fence", "proxy", *_] if parts[2].startswith("async"):
            return call("M.races.fence_proxy")
        case ["mbarrier", "init" | "inval" as what, *_]:
            expected = value(1, "u32") if what == "init" else None
            return call("asynchronous.set_mbarrier", t.address(args[0], 32), expected)
        case ["mbarrier", "arrive", "expect_tx", *_]:
            return call("asynchronous.arrive", t.address(args[1], 32), value(2, "u32"))
        case ["mbarrier", "try_wait", "parity", *_]:
            return call("asynchronous.test_mbarrier", t.row(args[0], "pred"), t.address(args[1], 32), value(2, "u32"))
        case ["wgmma", "mma_async", "sync", "aligned", shape, "f32", of, _] if args[4:6] == ["1", "1"]:
            n = int(shape.removeprefix("m64n").removesuffix("k16"))
            d, a, b, scale = rows(args[0], "f32"), t.row(args[1], "u64"), t.row(args[2], "u64"), value(3, "pred")
            return call("asynchronous.multiply", n, repr(of), d, a, b, scale, [int(x) for x in args[6:]])
        case ["barrier", "cluster", "arrive", "aligned"]:
            return call("asynchronous.arrive_at_cluster")
    return []
