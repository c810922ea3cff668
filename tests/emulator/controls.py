"""Negative controls: good PTX, spoiled in one place, which the emulator must report.

    python tests/emulator/controls.py             every control, and that its case passes unspoiled
    python tests/emulator/controls.py --sweep     delete every barrier, wait and fence of these cases in turn

A spoiled kernel runs by one schedule after the other until one reports it. Exit code 1 if none did.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from emulator.run import SCHEDULES  # isort: skip  # finds the project
from emulator.cases import Case, execute


class Control(NamedTuple):
    """Replace one occurrence of a pattern, or all of them, in the PTX of a case's first kernel."""

    name: str
    arch: int
    case: Case
    pattern: str
    replacement: str = ""
    occurrence: int | None = None  # None: all

    def edit(self, kernel: str, ptx: str) -> str:
        if kernel == "rows_kernel":  # what reads the logits of the first
            return ptx
        found = list(re.finditer(self.pattern, ptx))
        if not found:
            raise LookupError(f"no {self.pattern} in {kernel}")
        for match in reversed(found if self.occurrence is None else [found[self.occurrence]]):
            ptx = ptx[: match.start()] + match.expand(self.replacement) + ptx[match.end() :]
        return ptx


ONE = Case("one_tile", "float16", 18, 160, 130, temperature=2.0)
BULK = Case("one_tile", "float16", 18, 64, 16, rows="bulk", above=0.4)
TILED = Case("tiled", "float16", 65, 160, 300, as_if=50000)
GRID = Case("logsumexp", "float16", 230, 192, 130, processors=2)
WGMMA = Case("tiled", "float16", 65, 320, 300, as_if=50000)
TMA = Case("tiled", "float16", 65, 320, 300, tma="128x128")
GRID_TMA = Case("logsumexp", "float16", 230, 192, 130, processors=2, tma="64x64")
CLUSTER = Case("cluster", "float16", 66, 320, 300)

LOC = r"(?:\t\.loc[^\n]*\n)*"
SYNC = r"\tbar\.sync \t0;"
NO_SYNC = r"(?:(?!bar\.sync)[^\n]*\n)"
CLUSTER_BARRIER = rf"\tbarrier\.cluster\.arrive\.aligned;\n{LOC}\tbarrier\.cluster\.wait\.aligned;\n"
SPIN = rf"(ld\.shared\.b32 \t(%r\d+), \[global_smem[^\]]*\];\n{LOC}\tsetp\.)lt(\.s32 \t%p\d+, )\2, (%r\d+);"
REFILL = rf"(wgmma\.wait_group\.sync\.aligned 1;{NO_SYNC}*?){SYNC}({NO_SYNC}*?){SYNC}({NO_SYNC}*?){SYNC}"

CONTROLS = [
    # barriers and waits
    Control("a bar.sync of the main loop is gone", 80, ONE, rf"(cp\.async\.wait_group \t\d+;\n{LOC}){SYNC}", r"\1", 2),
    Control("no bar.sync before a buffer is filled again", 80, TILED, rf"{SYNC}\n({NO_SYNC}*?[^\n]*cp\.async\.cg)", r"\1"),
    Control("a bar.sync of a reduction is gone", 80, ONE, rf"(st\.shared::cta[^\n]*\n(?:[^\n]*\n){{0,4}}?){SYNC}", r"\1", 0),
    Control("the cp.async.wait_group of the loop is gone", 80, ONE, r"cp\.async\.wait_group \t[1-9];"),
    Control("cp.async.wait_group waits for one group less", 80, ONE, r"cp\.async\.wait_group \t2;", "cp.async.wait_group \t4;"),
    # numbers
    Control("another coefficient of expm1", 80, BULK, r"(fma\.rn\.f32 [^\n]*), 0f3F000000;", r"\1, 0f3F000200;"),
    Control("log2(e) is off by 3e-6", 80, Case("one_tile", "float16", 18, 64, 127, rows="exact"), r"(mul\.f32 \t%r\d+, %r\d+), 0f3FB8AA3B;", r"\1, 0f3FB8AA5B;"),
    Control("two operands of an mma swapped", 80, ONE, r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+),", r"\1\3, \2,", 0),
    Control("the halves of an mma's second operand swapped", 80, ONE, r"(mma\.sync[^{]*\{[^}]*\}, \{[^}]*\}, \{ )(%r\d+), (%r\d+) \}", r"\1\3, \2 }", 2),
    Control("ldmatrix reads the wrong row", 80, ONE, r"(ldmatrix[^\n]*\[%r\d+)\+(\d+)\]", r"\1+16]", 0),
    Control("a NaN goes to other rows", 80, Case("one_tile", "float16", 18, 64, 12, rows="nan"), r"(shfl\.sync\.bfly\.b32 [^\n]*), 1, 31, -1;", r"\1, 4, 31, -1;", 0),
    # bounds
    Control("a store goes one row further", 80, ONE, r"(st\.global\.b32 \[ %rd\d+ \+ )0", r"\g<1>4", 0),
    Control("all stores go 64 bytes further", 80, ONE, r"(st\.global\.b32 \[ %rd\d+ \+ )0", r"\g<1>64"),
    Control("the mask of a load is gone", 80, Case("one_tile", "float16", 17, 67, 15), r"@%p\d+ (ld\.global\.b16)", r"\1"),
    Control("a row too many is stored", 80, ONE, r"setp\.lt\.s64( \t%p\d+, %rd\d+, %rd\d+);", r"setp.le.s64\1;"),
    # between blocks
    Control("nobody waits at the barrier", 80, GRID, SPIN, r"\1lt\3\4, \4;", 0),
    Control("nobody waits at the second barrier", 80, GRID, SPIN, r"\1lt\3\4, \4;", 1),
    Control("the barrier waits for one arrival too many", 80, GRID, SPIN, r"\1le\3\2, \4;", 0),
    Control("arrival without release", 80, GRID, r"atom\.global\.gpu\.acq_rel", "atom.global.gpu.relaxed", 0),
    Control("waiting without acquire", 80, GRID, r"ld\.global\.gpu\.acquire", "ld.global.gpu.relaxed", 0),
    Control("arrival before the block's stores", 80, GRID, rf"{SYNC}\n({NO_SYNC}{{1,8}}?[^\n]*atom\.global)", r"\1", 1),
    Control("one slot in place of two", 80, replace(GRID, kernel="logsumexp, one slot"), r"$"),
    # asynchronous products
    Control("wgmma.wait_group waits for one less", 90, WGMMA, r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
    Control("the last wgmma.wait_group is gone", 90, WGMMA, r"wgmma\.wait_group\.sync\.aligned 0;"),
    Control("fence.proxy.async is gone", 90, WGMMA, r"fence\.proxy\.async\.shared::cta;"),
    Control("wgmma.fence is gone", 90, WGMMA, r"wgmma\.fence\.sync\.aligned;"),
    Control("a descriptor advances by the wrong step", 90, WGMMA, r"4611686293305294852", "4611686293305294854", 0),
    Control("a descriptor with another swizzle", 90, WGMMA, r"or\.b64( \t%rd\d+, %rd\d+), 4611686293305294848", r"or.b64\1, -9223371761976868864", 0),
    Control("cp.async.wait_group waits for too few", 90, WGMMA, r"cp\.async\.wait_group \t2;", "cp.async.wait_group \t4;"),
    Control("x is refilled while a product reads it", 90, Case("one_tile, x read once", "float16", 66, 160, 130, as_if=50000), r"$"),
    # TMA and clusters
    Control("nobody waits at the mbarrier", 90, TMA, r"@!complete bra\.uni waitLoop;"),
    Control("the mbarrier expects too many bytes", 90, TMA, r"(mbarrier\.arrive\.expect_tx[^\n]*), (\d+);", r"\1, 65536;"),
    Control("the mbarrier expects too few bytes", 90, TMA, r"(mbarrier\.arrive\.expect_tx[^\n]*), (\d+);", r"\1, 16384;"),
    Control("the parity of the wait never flips", 90, TMA, r"(mbarrier\.try_wait[^\n]*), %r(\d+);", r"\1, 0;"),
    Control("a coordinate of a TMA load is off", 90, TMA, r"(cp\.async\.bulk\.tensor[^{]*\{)(%r\d+), (%r\d+)\}", r"\1\3, \3}", 1),
    Control("no bar.sync before TMA fills a buffer again", 90, TMA, REFILL, r"\1\2\3"),
    Control("TMA: wgmma.wait_group waits for one less", 90, TMA, r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
    Control("scratch memory becomes TMA's without a fence.proxy.async", 90, GRID_TMA, r"fence\.proxy\.async\.shared::cta;"),
    Control("TMA: nobody waits at the barrier", 90, GRID_TMA, SPIN, r"\1lt\3\4, \4;", 0),
    Control("no cluster barrier before others' memory is read", 90, CLUSTER, CLUSTER_BARRIER, "", 0),
    Control("no cluster barrier before it is written again", 90, CLUSTER, CLUSTER_BARRIER, "", 1),
    Control("one block never arrives at a cluster barrier", 90, CLUSTER, r"barrier\.cluster\.arrive\.aligned;", "", 2),
    Control("all read the same block's memory", 90, CLUSTER, r"(mapa\.shared::cluster\.u32 \t%r\d+, %r\d+), %r\d+;", r"\1, 0;"),
]  # fmt: skip


def reported(control: Control) -> tuple[str, bool]:
    """By which schedule, and what, or that nothing was."""
    for options in SCHEDULES:
        outcome = execute(control.case, control.arch, options, control.edit)
        if any("LookupError" in problem for problem in outcome.problems):
            return f"MISSED  sm_{control.arch} {control.name}: its pattern is not in the PTX", False
        if outcome.problems:
            return f"caught  sm_{control.arch} {control.name:58} {options!s:42} {outcome.problems[0][:150]}", True
    return f"MISSED  sm_{control.arch} {control.name}", False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    controls = [c for c in CONTROLS if args.only in c.name]
    failed = 0
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for text, good in pool.map(reported, controls):
            print(text, flush=True)
            failed += not good
    print(f"{len(controls) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
