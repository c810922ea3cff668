"""Compile every kernel configuration the dispatcher can choose, for every architecture, without a GPU.

    make kernels                                   the table: registers, spills, shared memory, tensor-core instructions
    python benchmarks/compile_matrix.py --arch sm_90 --json matrix.json

As launched on contiguous, aligned rows, D a multiple of 16; other input runs the same tiles with element-wise loads.
Exits with 1 if any configuration spills, needs more shared memory than a block may have, or misses the tensor cores
it should be on. Not in the interpreter: a process with TRITON_INTERPRET=1 cannot compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's kernels, whatever else is installed

import torch

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
HALF = (torch.float16, torch.bfloat16)
TYPE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
BATCHES = (1, 16, 64, 65, 1024, 1025, 4096, 50000)
DEPTHS = (1, 64, 2048)
CLASSES = (1, 16, 17, 128, 129, 256, 257, 1000, 1024, 1025, 4096, 4097, 8192, 8193, 16384, 16385, 128256)


@dataclass(frozen=True)
class Entry:
    """One compilation: a kernel with its constexprs, the dtype of its input, and how it is launched."""

    kernel: str
    arch: str
    dtype: str
    constexprs: tuple[tuple[str, object], ...]
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> str:
        c = dict(self.constexprs)
        return f"{c['BLOCK_B']}x{c['BLOCK_C']}x{c['BLOCK_D']}"

    def __str__(self) -> str:
        flags = [k.lower() for k, v in self.constexprs if v is True and k in ("HEAD", "RESIDENT")]
        precision = dict(self.constexprs).get("PRECISION", "")
        kind = f"{self.dtype} {precision}" if self.dtype == "fp32" and precision else self.dtype
        return f"{self.kernel:11} {self.arch:7} {kind:10} {self.tile:12} {' '.join(flags):14}"


@dataclass
class Outcome:
    """What came of it. Counts are static instructions; `serialized`: ptxas made each wgmma wait for the one before."""

    entry: Entry
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    serialized: bool = False
    problems: list[str] = field(default_factory=list)


def entries(arch: str) -> list[Entry]:
    """Every configuration the launchers can choose on this architecture, by asking them."""
    from gradnorm_fast.kernels import cooperative, one_tile, rows, split

    found: dict[Entry, None] = {}

    def add(kernel: str, dtype: torch.dtype, config: tuple[int, int, int, int, int], **constexprs: object) -> None:
        b, c, d, warps, stages = config
        blocks = {"BLOCK_B": b, "BLOCK_C": c, "BLOCK_D": d}
        found[Entry(kernel, arch, TYPE[dtype], tuple((constexprs | blocks).items()), warps, stages)] = None

    for dtype in (*HALF, torch.float32):
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            matmul = {"HAS_BIAS": True, "EVEN_D": True, "PRECISION": precision, "UPCAST": False}
            for b in BATCHES:
                for c in CLASSES:
                    for d in DEPTHS:
                        if c <= one_tile.MAX_CLASSES:
                            config = one_tile.configuration(b, c, d, dtype, arch)
                            add("one_tile", dtype, config, **matmul, HEAD=False)
                            add("one_tile", dtype, config, **matmul, HEAD=True)
                        else:
                            config = split.configuration(b, c, d, dtype, arch)
                            add("logits", dtype, config, **matmul, GROUP=split.GROUP)
                            for head in (False, True):  # not chosen until it has run on a GPU, but kept ready for one
                                config = cooperative.configuration(b, c, d, dtype, arch)
                                add("cooperative", dtype, config, **matmul, HEAD=head, PHASE=cooperative.ALL.value)
    for dtype in (*HALF, torch.float32, torch.float64):
        for b in BATCHES:
            for c in CLASSES:
                config = rows.configuration(b, c, dtype, arch)
                for head in (False, True):
                    add("rows", dtype, config, HEAD=head, RESIDENT=c <= config.block_c)
    return list(found)


def _source(entry: Entry):  # type: ignore[no-untyped-def]
    """The kernel with argument types as a launch would give them: aligned pointers, contiguous rows."""
    import triton

    from gradnorm_fast.kernels import cooperative, one_tile, rows, split

    fn = {
        "one_tile": one_tile.one_tile_kernel,
        "logits": split.logits_kernel,
        "rows": rows.rows_kernel,
        "cooperative": cooperative.cooperative_kernel,
    }[entry.kernel]
    score = "fp64" if entry.dtype == "fp64" else "fp32"
    pointers = {"X": entry.dtype, "W": entry.dtype, "BIAS": entry.dtype, "Z": entry.dtype, "OUT": score}
    pointers |= {"SHARES": "fp32", "STATISTICS": "fp32", "COUNTERS": "i32", "PREDICTION": "i64"} | (
        {"Z": "fp32"} if entry.kernel == "logits" else {}
    )
    constants = dict(entry.constexprs) | dict.fromkeys(("stride_xd", "stride_wd", "stride_zc", "stride_b"), 1)
    constants = {k: v for k, v in constants.items() if k in fn.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
        elif name == "inv_temperature" and entry.kernel == "rows":
            signature[name] = "fp64"
        else:
            signature[name] = "fp32" if name in ("inv_temperature", "scale", "bias_norm") else "i32"
        if name in pointers or name in ("D", "stride_xb", "stride_wc", "stride_zb"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def compile_entry(entry: Entry) -> Outcome:
    """Compile one entry and read registers, spills, shared memory and instructions from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    amd = entry.arch.startswith("gfx")
    target = GPUTarget("hip", entry.arch, 64) if amd else GPUTarget("cuda", int(entry.arch[3:]), 32)
    outcome = Outcome(entry)
    try:
        kernel = triton.compile(
            _source(entry),
            target=target,
            options=dict(num_warps=entry.num_warps, num_stages=entry.num_stages, enable_fp_fusion=True),
        )
    except Exception as error:  # whatever the compiler raises is the finding
        outcome.problems.append(f"does not compile: {type(error).__name__}: {str(error).strip()[-200:]}")
        return outcome
    outcome.shared = kernel.metadata.shared
    (_read_amd if amd else _read_nvidia)(kernel, outcome)
    if outcome.spills:
        outcome.problems.append(f"{outcome.spills} spills")
    if outcome.shared > SHARED_LIMIT[entry.arch]:
        outcome.problems.append(f"shared memory {outcome.shared} > {SHARED_LIMIT[entry.arch]}")
    if outcome.serialized:
        outcome.problems.append("wgmma serialized")
    expected = expected_instruction(entry)
    if expected and not outcome.instructions.get(expected):
        outcome.problems.append(f"no {expected}")
    return outcome


def expected_instruction(entry: Entry) -> str | None:
    """The tensor-core instruction this entry's matmul should be made of; None for exact float32 and for no matmul."""
    if entry.kernel == "rows" or (entry.dtype == "fp32" and dict(entry.constexprs)["PRECISION"] == "ieee"):
        return None
    rows = int(dict(entry.constexprs)["BLOCK_B"])  # type: ignore[call-overload]
    large = rows >= 64  # the warpgroup instructions work on 64 rows at least
    return {"sm_80": "mma.sync", "sm_90": "wgmma" if large else "mma.sync",
            "sm_100": "tcgen05.mma" if large else "mma.sync", "gfx942": "mfma"}[entry.arch]  # fmt: skip


def _read_nvidia(kernel, outcome: Outcome) -> None:  # type: ignore[no-untyped-def]
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = run(tools / "nvdisasm", "-c", file.name)
    outcome.registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    outcome.spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    ptx = kernel.asm["ptx"]
    patterns = {"mma.sync": r"mma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05.mma": r"tcgen05\.mma"}
    outcome.instructions = {name: n for name, p in patterns.items() if (n := len(re.findall(p, ptx)))}
    gmma = len(re.findall(r"HGMMA", sass))
    outcome.serialized = 0 < gmma <= len(re.findall(r"WARPGROUP\.ARRIVE", sass))


def _read_amd(kernel, outcome: Outcome) -> None:  # type: ignore[no-untyped-def]
    asm = kernel.asm["amdgcn"]
    value = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", asm).group(1))  # type: ignore[union-attr]  # noqa: E731
    outcome.registers, outcome.spills = value("vgpr_count"), value("vgpr_spill_count")
    outcome.instructions = {"mfma": n} if (n := len(re.findall(r"v_mfma", asm))) else {}


def compile_all(archs: list[str], jobs: int) -> list[Outcome]:
    todo = [entry for arch in archs for entry in entries(arch)]
    with ProcessPoolExecutor(jobs) as pool:
        outcomes = []
        for i, outcome in enumerate(pool.map(compile_entry, todo), 1):
            outcomes.append(outcome)
            if sys.stderr.isatty():
                print(f"\r{i}/{len(todo)} compiled", end="\n" if i == len(todo) else "", file=sys.stderr)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: an interpreting process cannot compile; unset it")
    import triton

    outcomes = compile_all(args.arch, args.jobs)
    print(f"Triton {triton.__version__}, torch {torch.__version__}; compiled offline, not run")
    print(f"{'kernel':11} {'arch':7} {'dtype':10} {'tile':12} {'':14} warps stages  regs spills shared  instructions")
    for o in outcomes:
        row = f"{o.entry} {o.entry.num_warps:5} {o.entry.num_stages:6} {o.registers:5} {o.spills:6} {o.shared:6}"
        counts = " ".join(f"{n} {c}" for n, c in o.instructions.items())
        print(f"{row}  {counts}" + (f"  !! {'; '.join(o.problems)}" if o.problems else ""))
    bad = sum(bool(o.problems) for o in outcomes)
    print(f"{len(outcomes)} configurations, {bad} with problems")
    if args.json:
        args.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
