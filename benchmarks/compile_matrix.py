"""Compile every kernel configuration the dispatcher can choose, for every architecture, without a GPU.

    make kernels                                   the table: registers, spills, shared memory, tensor-core instructions
    python benchmarks/compile_matrix.py --arch sm_90 --json matrix.json

As launched on contiguous, aligned rows, D a multiple of 16; other input runs the same tiles with element-wise loads.
Exits with 1 if any configuration spills, needs more shared memory than a block may have, or misses the tensor cores
it should be on. Not in the interpreter: a process with TRITON_INTERPRET=1 cannot compile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's kernels, whatever else is installed

import torch

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
HALF = (torch.float16, torch.bfloat16)
TYPE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
BATCHES = (1, 16, 17, 32, 33, 64, 65, 1024, 1025, 50000)
DEPTHS = (1, 256, 512, 1024, 2048, 8192)
CLASSES = (
    1,
    16,
    17,
    128,
    129,
    256,
    257,
    512,
    513,
    1024,
    1025,
    2048,
    2049,
    4096,
    4097,
    8192,
    8193,
    16384,
    16385,
    128256,
)


@dataclass(frozen=True)
class Entry:
    """One compilation: a kernel with its constexprs, the dtype of its input, and how it is launched."""

    kernel: str
    arch: str
    dtype: str
    constexprs: tuple[tuple[str, object], ...]
    num_warps: int
    num_stages: int
    num_ctas: int = 1

    @property
    def tile(self) -> str:
        c = dict(self.constexprs)
        return f"{c['BLOCK_B']}x{c['BLOCK_C']}x{c['BLOCK_D']}"

    def __str__(self) -> str:
        flags = [k.lower() for k, v in self.constexprs if v is True and k in ("HEAD", "RESIDENT", "TMA", "LONG")]
        flags += [f"{k.lower()} {v}" for k, v in self.constexprs if k in ("STEP", "ROW_C", "TILE_C") and v]
        flags += [f"{self.num_ctas} CTAs"] if self.num_ctas > 1 else []
        precision = dict(self.constexprs).get("PRECISION", "")
        kind = f"{self.dtype} {precision}" if self.dtype == "fp32" and precision else self.dtype
        return f"{self.kernel:11} {self.arch:7} {kind:10} {self.tile:12} {' '.join(flags):21}"


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


def kernels() -> dict[str, Any]:
    """The device functions, by the name in the table."""
    from gradnorm_fast.kernels import cluster, cooperative, few_rows, one_tile, rows, split

    return {
        "one_tile": one_tile.one_tile_kernel,
        "few_rows": few_rows.few_rows_kernel,
        "logits": split.logits_kernel,
        "rows": rows.rows_kernel,
        "cooperative": cooperative.cooperative_kernel,
        "cluster": cluster.cluster_kernel,
    }


def entries(arch: str) -> list[Entry]:
    """Every configuration the launchers can choose on this architecture, by asking them."""
    import triton

    from gradnorm_fast.kernels import cluster, cooperative, few_rows, one_tile, rows, split
    from gradnorm_fast.kernels.targets import CLUSTERS, Config, TensorDescriptor

    found: dict[Entry, None] = {}
    functions = kernels()
    nvidia_tma = TensorDescriptor is not None and arch in ("sm_90", "sm_100")

    def add(kernel: str, dtype: torch.dtype, config: Config, **constexprs: object) -> None:
        blocks = {"BLOCK_B": config.block_b, "BLOCK_C": config.block_c, "BLOCK_D": config.block_d, "TMA": config.tma}
        flags = {"HAS_BIAS": True, "EVEN_D": True, "UPCAST": False, "PRECISION": "ieee"}
        flags |= {"MAX_SLICES": few_rows.MAX_SLICES, "KINDS": cooperative.KINDS}
        flags |= {"TILES": rows.TILES if kernel == "rows" else cooperative.TILES}
        every = flags | constexprs | blocks
        used = tuple((k, v) for k, v in every.items() if k in functions[kernel].arg_names)
        found[Entry(kernel, arch, TYPE[dtype], used, config.num_warps, config.num_stages, config.num_ctas)] = None

    def add_matmul(dtype: torch.dtype, precision: str, b: int, c: int, d: int, head: bool) -> None:
        options: dict[str, object] = {"PRECISION": precision, "HEAD": head}
        if c <= one_tile.MAX_CLASSES:
            add("one_tile", dtype, one_tile.configuration(b, c, d, dtype, arch), **options)
            return
        if b <= few_rows.MAX_ROWS and c <= few_rows.MAX_CLASSES:
            config = few_rows.configuration(b, c, d, dtype, arch, PROCESSORS[arch])
            row_c = max(128, triton.next_power_of_2(c))
            add("few_rows", dtype, config, PRECISION=precision, HEAD=False, STEP=1, ROW_C=1)
            finish = config._replace(block_b=1, block_c=1, block_d=1)
            add("few_rows", dtype, finish, HEAD=head, STEP=2, ROW_C=row_c)
            if (b, c, head) == (few_rows.MAX_ROWS, 1024, True):  # kept ready, as below
                add("few_rows", dtype, config, **options, STEP=few_rows.BOTH, ROW_C=row_c)
        config = split.configuration(b, c, d, dtype, arch)
        long = c > rows.MAX_RESIDENT and config.block_b * config.block_c <= split.STATISTICS_TILE
        add("logits", dtype, config, **options, LONG=long, GROUP=split.GROUP)
        if long:
            of_rows = rows.configuration(b, c, torch.float32, arch)
            add("rows", torch.float32, of_rows, HAS_BIAS=False, HEAD=head, RESIDENT=False, TILE_C=config.block_c)
        # Not chosen until they have run on a GPU, but kept ready for one:
        config = cooperative.configuration(b, c, d, dtype, arch)
        add("cooperative", dtype, config, **options, PHASE=cooperative.ALL)
        if nvidia_tma and dtype in HALF:
            tile = (128, 256) if arch == "sm_90" else (128, 128)
            add("logits", dtype, Config(*tile, 64, 8, 4, tma=True), LONG=False, GROUP=split.GROUP)
            if CLUSTERS and c <= cluster.MAX_CLASSES.get(arch, 4096):
                add("cluster", dtype, cluster.configuration(b, c, d, dtype, arch), **options)

    for dtype in (*HALF, torch.float32):
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            for b, c, d, head in itertools.product(BATCHES, CLASSES, DEPTHS, (False, True)):
                add_matmul(dtype, precision, b, c, d, head)
    for dtype in (*HALF, torch.float32, torch.float64):
        for b, c, head in itertools.product(BATCHES, CLASSES, (False, True)):
            config = rows.configuration(b, c, torch.promote_types(dtype, torch.float32), arch)
            of_library = dtype in (torch.float32, torch.float64)  # whose logits come without the bias
            for bias in (False, True) if of_library else (False,):
                add("rows", dtype, config, HAS_BIAS=bias, HEAD=head, RESIDENT=c <= config.block_c, TILE_C=0)
    return list(found)


def _source(entry: Entry):  # type: ignore[no-untyped-def]
    """The kernel with argument types as a launch would give them: aligned pointers, contiguous rows."""
    import triton

    fn, of = kernels()[entry.kernel], dict(entry.constexprs)
    score = "fp64" if entry.dtype == "fp64" else "fp32"
    pointers = dict.fromkeys(("X", "W", "XT", "WT", "BIAS", "Z"), entry.dtype)
    pointers |= dict.fromkeys(("OUT", "SHARES", "STATISTICS", "PARTIAL", "NORMS"), score)
    pointers |= {"COUNTERS": "i32", "COUNTER": "i32", "PREDICTION": "i64"}
    if entry.kernel == "logits":
        pointers["Z"] = "fp32"
    elif entry.kernel == "rows" and of["TILE_C"]:
        pointers["X"] = "fp32"  # the shares
    constants = of | dict.fromkeys(("stride_xd", "stride_wd", "stride_zc", "stride_b"), 1)
    constants = {k: v for k, v in constants.items() if k in fn.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("XT", "WT") and (of.get("TMA", True)):
            rows = of["BLOCK_B"] if name == "XT" else of["BLOCK_C"]
            signature[name] = f"tensordesc<{entry.dtype}[{rows},{of['BLOCK_D']}]>"
            continue
        elif name in pointers:
            signature[name] = "*" + pointers[name]
        else:
            signature[name] = (
                "fp32" if name in ("inv_temperature", "inv_temperature_low", "scale", "bias_norm") else "i32"
            )
        if name in pointers or name in ("D", "stride_xb", "stride_wc", "stride_zb", "slice_d", "width"):
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
            options=dict(num_warps=entry.num_warps, num_stages=entry.num_stages, enable_fp_fusion=True)
            | ({"num_ctas": entry.num_ctas} if entry.num_ctas > 1 else {}),
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
    if entry.num_ctas > 1 and not features_replicated(kernel.asm["ttgir"]):
        outcome.problems.append("features split over the CTAs")
    expected = expected_instruction(entry)
    if expected and not outcome.instructions.get(expected):
        outcome.problems.append(f"no {expected}")
    return outcome


def features_replicated(ttgir: str) -> bool:
    """Whether each CTA of a cluster multiplies whole features, rather than its share of the rows with all classes'.

    The layout of the matmul's first operand says over which of its dimensions the CTAs are spread: none of them.
    """
    operands = re.findall(r"(?:warp_group_dot|tc_gen5_mma) .*? : !ttg\.memdesc<[^,]+, (#\w+)", ttgir)
    layouts = dict(re.findall(r"^(#\w+) = .*?CGALayout = (\[\[.*?\]\])", ttgir, re.MULTILINE))
    spread = [basis for operand in operands for basis in json.loads(layouts.get(operand, "[[1]]"))]
    return bool(operands) and not any(map(any, spread))


def expected_instruction(entry: Entry) -> str | None:
    """The tensor-core instruction this entry's matmul should be made of; None for exact float32 and for no matmul."""
    of: dict[str, Any] = dict(entry.constexprs)
    if entry.kernel == "rows" or of.get("STEP") == 2 or (entry.dtype == "fp32" and of["PRECISION"] == "ieee"):
        return None
    rows = of["BLOCK_B"]
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
    if outcome.entry.kernel == "logits" and "st.global.v4" not in ptx:
        outcome.problems.append("logits stored one by one")
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
    print(f"{'kernel':11} {'arch':7} {'dtype':10} {'tile':12} {'':21} warps stages  regs spills shared  instructions")
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
