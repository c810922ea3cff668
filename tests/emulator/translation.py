"""Translates each block of a program into Python source and compiles that.

A handler takes an instruction and gives the lines for it. In those lines `B` is the batch, `q` or `m` the mask (`ptx`
has the convention), U, I, F the 32-bit registers as unsigned, signed and floating-point rows, UH ... those of 16 bits,
UD ... of 64, P the predicates, and k0, k1, ... constants.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import arithmetic, asynchronous, memory
from .ptx import SHARED_BASE, Instruction, Program, PTXError, names_in

DTYPE = {
    "u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "u32": np.uint32, "s32": np.int32, "f32": np.float32, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
VIEW = {
    "h": {"u": "UH", "s": "IH", "f": "FH"},
    "r": {"u": "U", "s": "I", "f": "F"},
    "d": {"u": "UD", "s": "ID", "f": "FD"},
}
WIDTH = {"h": 16, "r": 32, "d": 64}
UFUNC = {
    "add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "min": "minimum", "max": "maximum",
    "neg": "negative", "abs": "abs", "not": "invert", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "sqrt": "sqrt",
}  # fmt: skip
LOGICAL = {"and": "logical_and", "or": "logical_or", "xor": "logical_xor", "not": "logical_not"}
COMPARE = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
    "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal",
}  # fmt: skip
UNORDERED = {
    "ltu": "greater_equal",
    "leu": "greater",
    "gtu": "less_equal",
    "geu": "less",
}  # what they are the negation of
IGNORED = (
    "fence.mbarrier_init", "fence.acq_rel", "fence.sc", "membar", "fence.proxy.tensormap", "wgmma.fence",
    "prefetch", "nanosleep", "griddepcontrol", "bar.warp.sync", "createpolicy",
)  # fmt: skip


def unsigned(kind: str) -> str:
    return "u" + kind.lstrip("busf").removesuffix("x2")


class Translator:
    """Operands of one program as Python expressions."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: dict[tuple[str, int], str] = {}
        self.namespace = {
            "np": np, "arithmetic": arithmetic, "memory": memory, "asynchronous": asynchronous,
            "ktrue": np.array([True]), "kfalse": np.array([False]),
        }  # fmt: skip

    def constant(self, value: int, kind: str) -> str:
        """The name of an array of one number, given by its bits if it is not an integer."""
        size = np.dtype(DTYPE[kind]).itemsize
        value &= (1 << 8 * size) - 1
        name = self.constants.setdefault((kind, value), f"k{len(self.constants)}")
        self.namespace[name] = np.frombuffer(value.to_bytes(size, "little"), DTYPE[kind])
        return name

    def row(self, register: str, kind: str) -> str:
        """The array of a register, seen as a type."""
        cls, number = self.program.registers[register]
        return f"P[{number}]" if cls == "p" else f"{VIEW[cls][kind[0] if kind[0] in 'sf' else 'u']}[{number}]"

    def whole(self, register: str, kind: str) -> str:
        """All of a register as an integer, for a load or store that may be narrower; of the type's signedness."""
        cls = self.program.registers[register][0]
        return self.row(register, f"{'s' if kind[0] == 's' else 'u'}{WIDTH[cls]}")

    def value(self, operand: str, kind: str) -> str:
        """An operand that is read as a type."""
        kind = unsigned(kind) if kind[0] == "b" or kind.endswith("x2") else kind
        if operand in self.program.registers:
            return self.row(operand, kind)
        if operand.startswith("%"):
            return f"B.special({operand!r})"
        if operand in self.program.params:
            return f"B.machine.param_address({self.program.params[operand]})"
        if operand == "global_smem":
            return self.constant(SHARED_BASE, kind)
        if kind == "pred":
            return "ktrue" if int(operand, 0) else "kfalse"
        if operand[:2].lower() in ("0f", "0d"):
            return self.constant(int(operand[2:], 16), kind)
        return self.constant(int(operand, 0), kind)

    def address(self, operand: str, bits: int) -> str:
        """[register + offset] or [symbol + offset]."""
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?\s*\]", operand)
        if not match:
            raise PTXError(f"address {operand}")
        base, kind = match.group(1), f"u{bits}"
        offset = int((match.group(2) or match.group(3) or "0").replace(" ", ""), 0)
        if base == "global_smem":
            return f"B.everywhere({self.constant(SHARED_BASE + offset, kind)})"
        row = self.row(base, kind)
        return f"({row} + {self.constant(offset, kind)})" if offset else row


Handler = Callable[[Translator, Instruction, str], list[str]]
HANDLERS: dict[str, Handler] = {}


def handles(*roots: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(roots, handler))
        return handler

    return register


def translate(program: Program) -> Program:
    """Give every block of the program its function."""
    t = Translator(program)
    source = []
    for block in program.blocks:
        lines = [f"def block{block.index}(B, m):"]
        lines += ["    P=B.P; UH=B.UH; IH=B.IH; FH=B.FH; U=B.U; I=B.I; F=B.F; UD=B.UD; ID=B.ID; FD=B.FD"]
        for ins in block.body:
            if ins.op.startswith(IGNORED):
                continue
            try:
                if ins.predicate:
                    name, negated = ins.predicate
                    own = f"{'~' if negated else ''}{t.row(name, 'pred')}"
                    lines.append(f"    q = {own} if m is True else {own} & m")
                code = HANDLERS[ins.parts[0]](t, ins, "q" if ins.predicate else "m")
            except (KeyError, ValueError, IndexError, StopIteration) as error:
                raise PTXError(f"{ins.text}: {type(error).__name__} {error}") from error
            lines += [f"    {line}" for line in code]
        source.append("\n".join(lines) + "\n")
    exec(compile("\n".join(source), f"<{program.name}>", "exec"), t.namespace)
    for block in program.blocks:
        block.run = t.namespace[f"block{block.index}"]  # type: ignore[assignment]
    return program


def known(condition: bool, ins: Instruction) -> None:
    """A variant of an instruction that is not emulated must not pass for one that is."""
    if not condition:
        raise PTXError(f"not emulated: {ins.text}")


def into(d: str, expression: str, q: str, casting: str = "same_kind") -> list[str]:
    return [f"np.copyto({d}, {expression}, casting={casting!r}, where={q})"]


# arithmetic


@handles("add", "sub", "and", "or", "xor", "not", "min", "max", "neg", "abs")
def _elementwise(t: Translator, ins: Instruction, q: str) -> list[str]:
    root, kind = ins.parts[0], ins.parts[-1]
    known(not {"cc", "sat", "rz", "rm", "rp"}.intersection(ins.parts), ins)
    if kind in ("f32", "f64"):
        name = f"f{root}" if root in ("min", "max") and "NaN" not in ins.parts else UFUNC[root]
        return _float(t, ins, f"np.{name}", q)
    known(kind[0] != "f" or root == "abs", ins)
    if root == "abs" and kind[0] in "fb":  # f16, bf16 and pairs of them
        kind = unsigned(kind) if not kind.endswith("x2") else "u32"
        mask = t.constant(0x7FFF7FFF if kind == "u32" else 0x7FFF, kind)
        return [f"np.bitwise_and({t.value(ins.args[1], kind)}, {mask}, out={t.row(ins.args[0], kind)}, where={q})"]
    name = LOGICAL[root] if kind == "pred" else UFUNC[root]
    kind = kind if kind == "pred" or root in ("min", "max", "neg", "abs") else unsigned(kind)
    values = ", ".join(t.value(x, kind) for x in ins.args[1:])
    return [f"np.{name}({values}, out={t.row(ins.args[0], kind)}, where={q})"]


def _float(t: Translator, ins: Instruction, function: str, q: str) -> list[str]:
    known(not {"rz", "rm", "rp", "sat"}.intersection(ins.parts), ins)
    kind = ins.parts[-1]
    values = [t.value(x, kind) for x in ins.args[1:]]
    if "ftz" not in ins.parts or kind == "f64":
        if function.startswith("np."):
            return [f"{function}({', '.join(values)}, out={t.row(ins.args[0], kind)}, where={q})"]
        return into(t.row(ins.args[0], kind), f"{function}({', '.join(values)})", q)
    flushed = ", ".join(f"arithmetic.flush({v})" for v in values)
    return into(t.row(ins.args[0], kind), f"arithmetic.flush({function}({flushed}))", q)


@handles("fma", "ex2", "lg2", "rcp", "rsqrt", "sqrt")
def _function(t: Translator, ins: Instruction, q: str) -> list[str]:
    root, kind = ins.parts[0], ins.parts[-1]
    known(kind in ("f32", "f64"), ins)
    if root == "fma":
        return _float(t, ins, f"arithmetic.fma{kind[1:]}", q)
    if "approx" in ins.parts and root != "sqrt":
        return _float(t, ins, f"arithmetic.{root}_{kind}", q)
    known(root in ("rcp", "sqrt") and "approx" not in ins.parts, ins)
    return _float(t, ins, "np.sqrt" if root == "sqrt" else "np.reciprocal", q)


@handles("mul", "mad")
def _multiply(t: Translator, ins: Instruction, q: str) -> list[str]:
    kind = ins.parts[-1]
    if kind in ("f32", "f64"):
        return _float(t, ins, "np.multiply", q)
    how = ins.parts[1]
    if how == "wide":
        result = kind[0] + str(2 * int(kind[1:]))
    elif how == "hi":
        known(kind[1:] == "32" and ins.parts[0] == "mul", ins)
        result = kind
    else:
        kind = result = unsigned(kind)
    a, b = (t.value(x, kind) for x in ins.args[1:3])
    dtype = "" if how == "lo" else f", dtype=np.{'u' if kind[0] == 'u' else ''}int{2 * int(kind[1:])}"
    product = f"np.multiply({a}, {b}{dtype}){' >> 32' if how == 'hi' else ''}"
    if ins.parts[0] == "mad":
        product += f" + {t.value(ins.args[3], result)}"
    return into(t.row(ins.args[0], result), product, q)


@handles("div", "rem")
def _divide(t: Translator, ins: Instruction, q: str) -> list[str]:
    kind = ins.parts[-1]
    if kind in ("f32", "f64"):
        return _float(t, ins, "arithmetic.div_f32" if "full" in ins.parts else "np.divide", q)
    a, b = (t.value(x, kind) for x in ins.args[1:])
    return [f"arithmetic.divide(B, {t.row(ins.args[0], kind)}, {a}, {b}, {q}, {ins.parts[0] == 'rem'}, {ins.index})"]


@handles("shl", "shr")
def _shift(t: Translator, ins: Instruction, q: str) -> list[str]:
    left, kind = ins.parts[0] == "shl", ins.parts[-1]
    width = int(kind[1:])
    kind = unsigned(kind) if left else kind
    if ins.args[2].isdigit() and int(ins.args[2]) < width:
        a, n, f = t.value(ins.args[1], kind), t.constant(int(ins.args[2]), kind), "left" if left else "right"
        return [f"np.{f}_shift({a}, {n}, out={t.row(ins.args[0], kind)}, where={q})"]
    a, n = t.value(ins.args[1], kind), t.value(ins.args[2], "u32")
    return into(t.row(ins.args[0], kind), f"arithmetic.shifted({a}, {n}, {width}, {left})", q)


@handles("bfe")
def _bit_field(t: Translator, ins: Instruction, q: str) -> list[str]:
    kind = ins.parts[-1]
    width, position, length = int(kind[1:]), int(ins.args[2], 0), int(ins.args[3], 0)
    length = min(length, width - position)
    up, down = t.constant(width - position - length, kind), t.constant(width - length, kind)
    return into(t.row(ins.args[0], kind), f"({t.value(ins.args[1], kind)} << {up}) >> {down}", q)


@handles("prmt", "lop3")
def _bytes(t: Translator, ins: Instruction, q: str) -> list[str]:
    known(ins.parts == [ins.parts[0], "b32"], ins)
    values = ", ".join(t.value(x, "u32") for x in ins.args[1:4])
    call = f"permute_bytes({values})" if ins.parts[0] == "prmt" else f"lop3({values}, {int(ins.args[4], 0)})"
    return into(t.row(ins.args[0], "u32"), f"arithmetic.{call}", q)


@handles("selp")
def _select(t: Translator, ins: Instruction, q: str) -> list[str]:
    kind = unsigned(ins.parts[-1])
    a, b = (t.value(x, kind) for x in ins.args[1:3])
    return into(t.row(ins.args[0], kind), f"np.where({t.value(ins.args[3], 'pred')}, {a}, {b})", q)


@handles("setp")
def _compare(t: Translator, ins: Instruction, q: str) -> list[str]:
    known("ftz" not in ins.parts, ins)
    how, kind = ins.parts[1], ins.parts[-1]
    kind = unsigned(kind) if kind[0] == "b" else kind
    a, b = (t.value(x, kind) for x in ins.args[1:3])
    if kind[0] == "f" and how in ("ne", "equ"):  # numpy's != is true of NaN
        result = f"{'~' if how == 'equ' else ''}(({a} < {b}) | ({a} > {b}))"
    elif how in ("num", "nan"):
        result = f"{'~' if how == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
    elif how == "neu":
        result = f"({a} != {b})"
    elif how in UNORDERED:
        result = f"~np.{UNORDERED[how]}({a}, {b})"
    else:
        result = f"np.{COMPARE[how]}({a}, {b})"
    combine = next((x for x in ins.parts[2:-1] if x in LOGICAL), None)
    other = ""
    if combine:
        third = f"{'~' if ins.args[3][0] == '!' else ''}{t.value(ins.args[3].lstrip('!'), 'pred')}"
        other = f" {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[combine]} {third}"
    lines = [f"first, second = {result}{other}, ~({result}){other}"]
    for register, name in zip(ins.args[0].split("|"), ("first", "second"), strict=False):
        if register.strip() != "_":
            lines += into(t.row(register.strip(), "pred"), name, q)
    return lines


@handles("mov", "cvta")
def _move(t: Translator, ins: Instruction, q: str) -> list[str]:
    d, s = ins.args
    kind = ins.parts[-1]
    if kind == "pred":
        return into(t.row(d, kind), t.value(s, kind), q)
    kind = unsigned(kind)
    if d.startswith("{"):
        names = names_in(d)
        each = int(kind[1:]) // len(names)
        known(s not in names, ins)
        parts = [f"{t.value(s, kind)} >> {t.constant(each * i, kind)}" for i in range(len(names))]
        return [
            line for n, x in zip(names, parts, strict=True) if n != "_" for line in into(t.row(n, f"u{each}"), x, q)
        ]
    if s.startswith("{"):
        names = names_in(s)
        each = int(kind[1:]) // len(names)
        parts = [f"({t.value(n, f'u{each}')}.astype(np.uint{kind[1:]}) << {t.constant(each * i, kind)})" for i, n in enumerate(names)]  # fmt: skip # noqa: E501
        return into(t.row(d, kind), " | ".join(parts), q)
    return into(t.row(d, kind), t.value(s, kind), q)


@handles("cvt")
def _convert(t: Translator, ins: Instruction, q: str) -> list[str]:
    known("sat" not in ins.parts and ("ftz" not in ins.parts or ins.parts[-2:] == ["f32", "f16"]), ins)
    to, of = ins.parts[-2:]
    d, s = ins.args[0], ins.args[1]
    if to in ("f16x2", "bf16x2"):
        high, low = (f"arithmetic.to_{to[:-2]}({t.value(x, 'f32')}).astype(np.uint32)" for x in ins.args[1:3])
        return into(t.row(d, "u32"), f"({high} << 16) | {low}", q)
    if to[0] in "us" and of[0] in "us":
        return into(t.whole(d, to), f"{t.value(s, of)}.astype(arithmetic.INTEGER[{to!r}])", q, "unsafe")
    if (to, of) == ("f32", "bf16"):
        return into(t.row(d, "u32"), f"{t.value(s, 'u16')}.astype(np.uint32) << 16", q)
    if to == "bf16" and of == "f32" and "rn" in ins.parts:
        return into(t.row(d, "u16"), f"arithmetic.to_bf16({t.value(s, 'f32')})", q)
    if to == "tf32" and of == "f32" and "rna" in ins.parts:
        return into(t.row(d, "u32"), f"arithmetic.to_tf32({t.value(s, 'u32')})", q)
    if to[0] == "f" and of[0] in "fus":
        known("rn" in ins.parts or (of[0] == "f" and int(to[1:]) > int(of[1:])), ins)
        return into(t.row(d, to), t.value(s, of), q, "unsafe")
    known(to[0] in "us" and of[0] == "f", ins)
    f = next(f for r, f in (("rzi", "trunc"), ("rni", "rint"), ("rmi", "floor"), ("rpi", "ceil")) if r in ins.parts)
    return into(t.row(d, to), f"arithmetic.to_integer(np.{f}({t.value(s, of)}), {to!r})", q)


# between the lanes of a warp


@handles("shfl")
def _shuffle(t: Translator, ins: Instruction, q: str) -> list[str]:
    d, _, valid = ins.args[0].partition("|")
    a, b, c = (t.value(x, "u32") for x in ins.args[1:4])
    if ins.parts[2] == "bfly" and ins.args[2].isdigit() and ins.args[3] == "31" and not valid:
        return [f"arithmetic.butterfly(B, {t.row(d, 'u32')}, {a}, {ins.args[2]}, {q}, {ins.index})"]
    p = t.row(valid, "pred") if valid and valid != "_" else None
    return [f"arithmetic.shuffle(B, {t.row(d, 'u32')}, {p}, {ins.parts[2]!r}, {a}, {b}, {c}, {q}, {ins.index})"]


@handles("redux")
def _reduce(t: Translator, ins: Instruction, q: str) -> list[str]:
    kind = ins.parts[-1] if ins.parts[-1][0] != "b" else "u32"
    d, a = t.row(ins.args[0], kind), t.value(ins.args[1], kind)
    return [f"arithmetic.reduce_warp(B, {d}, {a}, {ins.parts[2]!r}, {q}, {ins.index})"]


@handles("elect")
def _elect(t: Translator, ins: Instruction, q: str) -> list[str]:
    leader, _, p = ins.args[0].partition("|")
    return [f"arithmetic.elect(B, {t.row(leader, 'u32')}, {t.row(p, 'pred')}, {q}, {ins.index})"]


@handles("mma")
def _mma(t: Translator, ins: Instruction, q: str) -> list[str]:
    known(re.match(r"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.(\w+)\.\1\.f32$", ins.op) is not None, ins)
    operands = ", ".join("[" + ", ".join(t.row(x, "u32") for x in names_in(v)) + "]" for v in ins.args)
    return [f"arithmetic.mma(B, {ins.parts[3]!r}, {ins.parts[-2]!r}, {operands}, {q}, {ins.index})"]


# memory


@handles("ld")
def _load(t: Translator, ins: Instruction, q: str) -> list[str]:
    kind, space = ins.parts[-1], ins.parts[1]
    size = int(kind[1:]) // 8
    rows = f"[{', '.join(t.whole(x, kind) for x in names_in(ins.args[0]))}]"
    if space == "param":
        return into(rows[1:-1], f"B.machine.param({t.program.params[ins.args[1].strip('[] ')]}, {kind!r})", q, "unsafe")
    if space == "global":
        order = next((x for x in ins.parts if x in ("acquire", "relaxed", "volatile")), "")
        known("cta" not in ins.parts, ins)
        return [f"memory.load_global(B, {rows}, {t.address(ins.args[1], 64)}, {size}, {kind[0] == 's'}, {q}, {ins.index}, {order!r})"]  # fmt: skip # noqa: E501
    known(space.startswith("shared"), ins)
    remote = space == "shared::cluster"
    return [f"memory.load_shared(B, {rows}, {t.address(ins.args[1], 32)}, {size}, {kind[0] == 's'}, {q}, {ins.index}, {remote})"]  # fmt: skip # noqa: E501


@handles("st")
def _store(t: Translator, ins: Instruction, q: str) -> list[str]:
    kind, space = unsigned(ins.parts[-1]), ins.parts[1]
    names = names_in(ins.args[1])
    rows = ", ".join(t.whole(x, kind) if x in t.program.registers else t.value(x, kind) for x in names)
    known(space in ("global", "shared", "shared::cta") and not {"release", "relaxed"}.intersection(ins.parts), ins)
    call, bits = ("store_global", 64) if space == "global" else ("store_shared", 32)
    return [f"memory.{call}(B, [{rows}], {t.address(ins.args[0], bits)}, {int(kind[1:]) // 8}, {q}, {ins.index})"]


@handles("atom", "red")
def _atomic(t: Translator, ins: Instruction, q: str) -> list[str]:
    kind = ins.parts[-1] if ins.parts[-1][0] != "b" else unsigned(ins.parts[-1])
    known(ins.parts[1] == "global" and not {"cta", "cas", "v2"}.intersection(ins.parts), ins)
    order = next((x for x in ins.parts if x in ("acq_rel", "acquire", "release")), "relaxed")
    how = next(x for x in ins.parts if x in ("add", "min", "max", "exch", "and", "or", "xor"))
    result = t.row(ins.args[0], kind) if ins.parts[0] == "atom" else None
    at, value = ins.args[-2:]
    return [f"memory.atomic(B, {result}, {t.address(at, 64)}, {t.value(value, kind)}, {how!r}, {order!r}, {q}, {ins.index})"]  # fmt: skip # noqa: E501


@handles("ldmatrix", "stmatrix")
def _matrix(t: Translator, ins: Instruction, q: str) -> list[str]:
    known("m8n8" in ins.parts and ins.parts[-1] == "b16", ins)
    registers, at = ins.args if ins.parts[0] == "ldmatrix" else reversed(ins.args)
    rows = ", ".join(t.row(x, "u32") for x in names_in(registers))
    return [f"memory.{ins.parts[0]}(B, [{rows}], {t.address(at, 32)}, {'trans' in ins.parts}, {q}, {ins.index})"]


@handles("mapa")
def _map_address(t: Translator, ins: Instruction, q: str) -> list[str]:
    known(ins.op == "mapa.shared::cluster.u32", ins)
    a, rank = (t.value(x, "u32") for x in ins.args[1:3])
    return into(t.row(ins.args[0], "u32"), f"memory.map_address({a}, {rank})", q)


# asynchronous


@handles("cp")
def _copy(t: Translator, ins: Instruction, q: str) -> list[str]:
    if ins.op == "cp.async.commit_group":
        return [f"asynchronous.commit_copies(B, {q})"]
    if ins.op == "cp.async.wait_group":
        return [f"asynchronous.wait_copies(B, {int(ins.args[0])}, {q})"]
    if ins.op == "cp.async.wait_all":
        return [f"asynchronous.commit_copies(B, {q})", f"asynchronous.wait_copies(B, 0, {q})"]
    if ins.op.startswith(("cp.async.ca.shared", "cp.async.cg.shared")):
        size = int(ins.args[2], 0)
        count = t.value(ins.args[3], "u32") if len(ins.args) > 3 else t.constant(size, "u32")
        return [f"asynchronous.copy(B, {t.address(ins.args[0], 32)}, {t.address(ins.args[1], 64)}, {size}, {count}, {q}, {ins.index})"]  # fmt: skip # noqa: E501
    known(ins.op.startswith("cp.async.bulk.tensor.2d.shared::c") and ".global." in ins.op, ins)
    known("multicast" not in ins.op, ins)
    tensor, place = ins.args[1].strip("[] ").split(",", 1)
    x, y = (t.value(v, "s32") for v in names_in(place))
    return [f"asynchronous.transfer(B, {t.address(ins.args[0], 32)}, {t.value(tensor.strip(), 'u64')}, {x}, {y}, {t.address(ins.args[2], 32)}, {q}, {ins.index})"]  # fmt: skip # noqa: E501


@handles("fence")
def _fence(t: Translator, ins: Instruction, q: str) -> list[str]:
    known(ins.op.startswith("fence.proxy.async"), ins)
    return [f"asynchronous.fence_proxy(B, {q})"]


@handles("mbarrier")
def _mbarrier(t: Translator, ins: Instruction, q: str) -> list[str]:
    what = ins.op.split(".shared")[0].removesuffix(".b64")
    if what in ("mbarrier.init", "mbarrier.inval"):
        count = t.value(ins.args[1], "u32") if what.endswith("init") else None
        return [f"asynchronous.set_mbarrier(B, {t.address(ins.args[0], 32)}, {count}, {q}, {ins.index})"]
    at = t.address(ins.args[1], 32)
    if what.startswith("mbarrier.arrive"):
        expected = t.value(ins.args[2], "u32") if "expect_tx" in what else t.constant(0, "u32")
        return [f"asynchronous.arrive(B, {at}, {expected}, {q}, {ins.index})"]
    known(what in ("mbarrier.try_wait.parity", "mbarrier.test_wait.parity"), ins)
    d, parity = t.row(ins.args[0], "pred"), t.value(ins.args[2], "u32")
    return [f"asynchronous.test_mbarrier(B, {d}, {at}, {parity}, {q}, {ins.index})"]


@handles("wgmma")
def _wgmma(t: Translator, ins: Instruction, q: str) -> list[str]:
    if ins.parts[1] == "commit_group":
        return [f"asynchronous.commit_products(B, {q})"]
    if ins.parts[1] == "wait_group":
        return [f"asynchronous.wait_products(B, {int(ins.args[0])}, {q})"]
    match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(\w+)\.\2", ins.op)
    known(match is not None and ins.args[4:6] == ["1", "1"], ins)  # of halves, no operand negated
    assert match
    d = "[" + ", ".join(t.row(x, "f32") for x in names_in(ins.args[0])) + "]"
    registers = ins.args[1].startswith("{")
    a = (
        "[" + ", ".join(t.row(x, "u32") for x in names_in(ins.args[1])) + "]"
        if registers
        else t.row(ins.args[1], "u64")
    )
    scale = t.value(ins.args[3], "pred")
    transposed = [0] * registers + [int(x) for x in ins.args[6:]]
    return [f"asynchronous.multiply(B, {match.group(1)}, {match.group(2)!r}, {d}, {a}, {t.row(ins.args[2], 'u64')}, {scale}, {transposed}, {q}, {ins.index})"]  # fmt: skip # noqa: E501


@handles("barrier")
def _cluster_barrier(t: Translator, ins: Instruction, q: str) -> list[str]:
    known(ins.op.startswith("barrier.cluster.arrive"), ins)
    return [f"asynchronous.arrive_at_cluster(B, {'relaxed' in ins.op}, {q})"]
