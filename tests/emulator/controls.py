"""Negative controls: correct PTX with one defect, which the emulator must report under one schedule or another."""

from __future__ import annotations

import re
from typing import NamedTuple

from .cases import Case, execute, quick_cases
from .driver import TRITON
from .machine import SCHEDULES

ALL, NOTHING = -1, r"\Z"  # NOTHING: the kernel is spoiled in its source


class Control(NamedTuple):
    """Replace one occurrence of a pattern, or all of them, in the PTX of a case's first kernel."""

    name: str
    arch: int
    case: Case
    pattern: str = NOTHING
    replacement: str = ""
    occurrence: int = ALL
    quick: bool = False  # part of `make test`

    def edit(self, kernel: str, ptx: str) -> str:
        if kernel == "rows_kernel":  # it reads the logits of the first kernel
            return ptx
        found = list(re.finditer(self.pattern, ptx))
        if len(found) <= max(self.occurrence, 0):
            raise LookupError(f"{self.name}: {kernel} has {len(found)} of {self.pattern}")
        for match in reversed(found if self.occurrence == ALL else [found[self.occurrence]]):
            ptx = ptx[: match.start()] + match.expand(self.replacement) + ptx[match.end() :]
        return ptx


ONE = Case("one_tile", "float16", 18, 160, 130, temperature=2.0)
EXACT = Case("one_tile", "float16", 18, 64, 127, rows="exact")
BULK = Case("one_tile", "float16", 18, 64, 16, rows="bulk", above=0.4)
ODD = Case("one_tile", "float16", 17, 67, 15)
BAD = Case("one_tile", "float16", 18, 64, 12, rows="nan")
READ_ONCE = Case("one_tile, x read once", "float16", 66, 160, 130, fields=False, as_if=50000)
TILED = Case("tiled", "float16", 65, 320, 300, as_if=50000)
TMA = Case("tiled", "float16", 65, 320, 300, tma="128x128")
GRID = Case("logsumexp", "float16", 230, 192, 130, processors=2)
ONE_SLOT = Case("logsumexp, one slot", "float16", 230, 192, 130, processors=2)
GRID_TMA = Case("logsumexp", "float16", 230, 192, 130, processors=2, tma="64x64")
CLUSTER = Case("cluster", "float16", 66, 320, 300, rows="bulk", fields=False)

LOC = r"(?:\t\.loc[^\n]*\n)*"
SYNC = r"\tbar\.sync \t0;"
ARRIVAL = rf"{SYNC}\n(?:{LOC}{SYNC}\n)?"  # Triton 3.9 doubles it
LINE, REST = r"(?:[^\n]*\n)", r"[^\n]*\n"
OTHER = r"(?:(?!bar\.sync)[^\n]*\n)"  # a line of anything else
COPIES = r"cp\.async\.wait_group \t"
PRODUCTS = r"wgmma\.wait_group\.sync\.aligned "
PROXY = r"fence\.proxy\.async\S*;"
EXPECT = r"(mbarrier\.arrive\.expect_tx[^\n]*), \d+;"
SPIN = rf"(ld\.shared\.b32 \t(%r\d+), \[global_smem[^\]]*\];\n{LOC}\tsetp\.)lt(\.s32 \t%p\d+, )\2, (%r\d+);"
ARRIVE, WAIT = r"\tbarrier\.cluster\.arrive\.aligned;\n", r"\tbarrier\.cluster\.wait\.aligned;\n"
REFILL = rf"({PRODUCTS}1;{OTHER}*?){SYNC}({OTHER}*?){SYNC}({OTHER}*?){SYNC}"
MMA = r"(mma\.sync[^{]*\{[^}]*\}, "

_ALL = [
    # barriers and waits
    Control("no bar.sync in the main loop", 80, TILED, rf"({COPIES}\d+;\n{LOC}){SYNC}", r"\1", quick=True),
    Control("no bar.sync in a reduction", 80, ONE, rf"(st\.shared{REST}{LINE}{{0,4}}?){SYNC}", r"\1", 0, quick=True),
    Control("no bar.sync before a refill", 80, TILED, rf"{SYNC}\n({OTHER}*?[^\n]*cp\.async\.cg)", r"\1", quick=True),
    Control("cp.async.wait_group of the loop is gone", 80, TILED, rf"{COPIES}[1-9];", "", quick=True),
    Control("cp.async.wait_group waits for one group less", 80, TILED, rf"{COPIES}2;", "cp.async.wait_group 4;"),
    # numbers
    Control("another factor in expm1", 80, BULK, r"(fma\.rn\.f32[^\n]*), 0f3F000000;", r"\1, 0f3F000200;", quick=True),
    Control("log2(e) is off by 3e-6", 80, EXACT, r"(mul\.f32 [^\n]*), 0f3FB8AA3B;", r"\1, 0f3FB8AA5B;"),
    Control("two operands of an mma swapped", 80, ONE, MMA + r"\{ )(%r\d+), (%r\d+),", r"\1\3, \2,", 0, quick=True),
    Control("halves of an mma operand swapped", 80, ONE, MMA + r"\{[^}]*\}, \{ )(%r\d+), (%r\d+) \}", r"\1\3, \2 }", 2),
    Control("ldmatrix reads the wrong row", 80, TILED, r"(ldmatrix[^\n]*\[%r\d+)\+(\d+)\]", r"\1+16]", 0),
    Control("a NaN goes to other rows", 80, BAD, r"(shfl\.sync\.bfly\.b32 [^\n]*), 1, 31, -1;", r"\1, 4, 31, -1;", 0),
    # bounds
    Control("a store goes one row further", 80, ONE, r"(st\.global\.b32 \[ %rd\d+ \+ )0", r"\g<1>4", 0),
    Control("all stores go 64 bytes further", 80, ONE, r"(st\.global\.b32 \[ %rd\d+ \+ )0", r"\g<1>64", quick=True),
    Control("the mask of a load is gone", 80, ODD, r"@%p\d+ (ld\.global\.b16)", r"\1"),
    Control("a row too many is stored", 80, ONE, r"setp\.lt\.s64( \t%p\d+, %rd\d+, %rd\d+);", r"setp.le.s64\1;"),
    # between the blocks of a launch
    Control("nobody waits at the barrier", 80, GRID, SPIN, r"\1lt\3\4, \4;", 0, quick=True),
    Control("nobody waits at the second barrier", 80, GRID, SPIN, r"\1lt\3\4, \4;", 1),
    Control("the barrier waits for one arrival too many", 80, GRID, SPIN, r"\1le\3\2, \4;", 0, quick=True),
    Control("arrival without release", 80, GRID, r"(atom\.global\.gpu)\.acq_rel", r"\1.relaxed", 0, quick=True),
    Control("waiting without acquire", 80, GRID, r"ld\.global\.gpu\.acquire", "ld.global.gpu.relaxed", 0),
    Control("arrival before the block's stores", 80, GRID, rf"{ARRIVAL}({OTHER}{{1,8}}?[^\n]*atom\.global)", r"\1", 1),
    Control("one slot in place of two", 80, ONE_SLOT, quick=True),
    # asynchronous products
    Control("wgmma.wait_group waits for one less", 90, TILED, rf"{PRODUCTS}1;", "wgmma.wait_group 2;", quick=True),
    Control("the last wgmma.wait_group is gone", 90, TILED, rf"{PRODUCTS}0;"),
    Control("fence.proxy.async is gone", 90, TILED, PROXY, quick=True),
    Control("wgmma.fence is gone", 90, TILED, r"wgmma\.fence\.sync\.aligned;", quick=True),
    Control("a descriptor is a step further", 90, TILED, r"4611686293305294848", "4611686293305294850", 1),
    Control("a descriptor with another swizzle", 90, TILED, r"4611686293305294848", "-9223371761976868864", 0),
    Control("cp.async.wait_group waits for too few", 90, TILED, rf"{COPIES}2;", "cp.async.wait_group 4;"),
    Control("x is refilled while a product reads it", 90, READ_ONCE, quick=True),
    # TMA
    Control("nobody waits at the mbarrier", 90, TMA, r"@!complete bra\.uni waitLoop;", quick=True),
    Control("the mbarrier expects too many bytes", 90, TMA, EXPECT, r"\1, 65536;"),
    Control("the mbarrier expects too few bytes", 90, TMA, EXPECT, r"\1, 16384;", quick=True),
    Control("the parity of the wait never flips", 90, TMA, r"(mbarrier\.try_wait[^\n]*), %r(\d+);", r"\1, 0;"),
    Control("a coordinate of TMA is off", 90, TMA, r"(cp\.async\.bulk[^{]*\{)(%r\d+), (%r\d+)\}", r"\1\3, \3}", 1),
    Control("no bar.sync before a refill by TMA", 90, TMA, REFILL, r"\1\2\3", quick=True),
    Control("TMA: wgmma.wait_group waits for one less", 90, TMA, rf"{PRODUCTS}1;", "wgmma.wait_group 2;"),
    Control("scratch memory becomes TMA's without a fence.proxy.async", 90, GRID_TMA, PROXY, quick=True),
    Control("TMA: nobody waits at the barrier", 90, GRID_TMA, SPIN, r"\1lt\3\4, \4;", 0),
    # clusters
    Control("no cluster barrier before others' memory is read", 90, CLUSTER, ARRIVE + LOC + WAIT, "", 0, quick=True),
    Control("no cluster barrier before it is written again", 90, CLUSTER, ARRIVE + LOC + WAIT, "", 1),
    Control("one block never arrives at a cluster barrier", 90, CLUSTER, ARRIVE, "", 2, quick=True),
    Control("all read the same block's memory", 90, CLUSTER, r"(mapa\.shared[^\n]*), %r\d+;", r"\1, 0;"),
]  # fmt: skip


# Triton 3.8 is the first that reduces across a cluster, and that emits the fence between cp.async and wgmma.
CONTROLS = [c for c in _ALL if TRITON >= (3, 8) or (c.case != CLUSTER and c.name != "fence.proxy.async is gone")]


def quick(arch: int) -> list[Case]:
    """What `make test` runs on an architecture: the quick cases, and those of its spoiled kernels, unspoiled."""
    spoiled = (c.case for c in CONTROLS if c.quick and c.arch == arch and c.pattern != NOTHING)
    return list(dict.fromkeys([*quick_cases(arch), *spoiled]))


def reported(control: Control) -> tuple[str, bool]:
    """The emulator's report on a spoiled kernel, and whether it found the defect."""
    for options in SCHEDULES:
        outcome = execute(control.case, control.arch, options, control.edit)
        if outcome.problems:
            return f"caught sm_{control.arch} {control.name:58} [{options}] {outcome.problems[0][:150]}", True
    return f"MISSED sm_{control.arch} {control.name}", False
