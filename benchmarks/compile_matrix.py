"""Compile what real heads launch, for every architecture, without a GPU, and check what the compiler made of it.

    make kernels                                          a selection with every configuration and constant: --quick
    python benchmarks/compile_matrix.py                   every specialisation, in about two hours
    python benchmarks/compile_matrix.py --arch sm_90 --kernel one_tile --keep out/      and keep the TTGIR, PTX, ...

The launchers run on meta tensors, under a driver that compiles nothing but writes down what Triton would compile. So
the signatures, the attributes of arguments (a multiple of 16, equal to 1, ...) and the options are those of real calls.

Exits with 1 if a kernel spills registers in a loop or with more than 16 instructions outside, takes more shared memory
than a block may have, misses the tensor cores it should use, has its asynchronous products serialised, loads halves one
by one beside a product, stores a tile element by element, refills a buffer under a product (`buffer_reuse.py`) or
splits the features over a cluster.

A process with TRITON_INTERPRET=1 cannot compile.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's kernels, whatever else is installed

import torch

import buffer_reuse

KIB = 1024
#: the shared memory that a block may have, and the multiprocessors of a common card
ARCHITECTURES = {
    "sm_80": (163 * KIB, 108), "sm_89": (99 * KIB, 128), "sm_90": (227 * KIB, 132), "sm_100": (227 * KIB, 148),
    "sm_103": (227 * KIB, 148), "sm_120": (99 * KIB, 170), "gfx942": (64 * KIB, 304),
}  # fmt: skip
SPILLS = 16  # spill instructions allowed outside loops, where they cost next to nothing
BATCHES = (1, 17, 33, 256, 1024, 2048, 10_000)
DEPTHS = (1000, 342, 2048, 440, 768, 888, 1280, 1512, 2056)
CLASSES = (10, 100, 257, 1000, 21_843)
MORE_CLASSES = (200, 1203, 3000, 8142)  # for the other lines of the kernels' tables, at the first depths alone
HEADS = (*product(CLASSES, DEPTHS), *product(MORE_CLASSES, DEPTHS[:3]))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ABSENT = ("BIAS", "PREDICTION", "LABELS", "STATISTICS")  #: tensors that may be None
TILE = ("BLOCK_B", "BLOCK_C", "BLOCK_D")
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass
class Specialisation:
    """What Triton compiles for some launches, and the first problem that launches it."""

    kernel: str
    arch: str
    dtype: str  #: of the features
    shape: tuple[int, int, int]  #: B, D, C
    constants: dict[str, object]  #: by parameter
    options: dict[str, Any]
    source: Any
    target: Any

    def __str__(self) -> str:
        of = self.constants
        tile = "x".join(str(of[f"BLOCK_{x}"]) for x in "BCD" if f"BLOCK_{x}" in of)
        flags = [k.lower() for k, v in of.items() if v is True]
        flags += [
            f"no {k.lower()}" if v is None else f"{k.lower()} {v}"
            for k, v in of.items()
            if type(v) is not bool and k.isupper() and "BLOCK" not in k
        ]
        flags += [f"{self.options['num_ctas']} CTAs"] if self.options["num_ctas"] > 1 else []
        shape = "x".join(map(str, self.shape))
        return (
            f"{self.kernel:9} {self.arch:7} {self.dtype:5} {shape:16} {tile:12} {self.options['num_warps']:5} "
            f"{self.options['num_stages']:6}  {' '.join(flags)}"
        )


@dataclass
class Outcome:
    """What the compiler made of it. Counts are static instructions."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    operands: list[str] = field(default_factory=list)  #: the buffers of asynchronous products
    problems: list[str] = field(default_factory=list)


class _Driver:
    """Stands in for a GPU that this machine lacks."""

    devices = count()  # a new one each time: Triton keeps compiled kernels by device

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.device = next(self.devices)
        amd = arch.startswith("gfx")
        self.target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class _NotCompiled:
    function = packed_metadata = None

    def run(self, *arguments: object) -> None: ...

    def launch_metadata(self, *arguments: object) -> None: ...


def pretend(arch: str, found: Callable[[Any, Any, dict[str, Any]], None]) -> None:
    """Launch on `arch` from now on, and call `found(source, target, options)` where Triton would compile.

    The kernels' modules keep this for the life of the process.
    """
    import triton

    def compile_(source: Any, target: Any, options: dict[str, Any], **_: object) -> _NotCompiled:
        found(source, target, dict(options))
        return _NotCompiled()

    triton.compiler.compile = compile_  # each kernel takes it from there at its first launch
    triton.runtime.driver.set_active(_Driver(arch))
    facts = {"architecture": lambda device: arch, "multiprocessors": lambda device: ARCHITECTURES[arch][1]}
    for name, module in sys.modules.items():
        if name.startswith("gradnorm_fast.kernels."):
            vars(module).update({fact: value for fact, value in facts.items() if hasattr(module, fact)})


def score(arch: str, dtype: torch.dtype, b: int, d: int, c: int, head: bool) -> None:
    """Launch the default and every other kernel that takes this problem, on tensors without data."""
    from gradnorm_fast.kernels import dispatch
    from gradnorm_fast.kernels.experimental import cluster
    from gradnorm_fast.kernels.problem import FIELDS, Problem, Scores

    x, weight, bias, logits = (torch.empty(s, dtype=dtype, device="meta") for s in ((b, d), (c, d), (c,), (b, c)))
    out = torch.empty(len(FIELDS) if head else 1, b, dtype=torch.promote_types(dtype, torch.float32), device="meta")
    scores = Scores(out, torch.empty(b, dtype=torch.int64, device="meta") if head else None)
    other = not head and d == DEPTHS[0] and b in (17, 10_000) and dtype != torch.bfloat16  # norms than p = 1
    problems = [Problem(x, weight, bias), Problem(x, None, None, logits)]
    problems += [problem._replace(p=p) for problem in problems for p in (2.0, 3.0, math.inf) if other]
    if not head and d in DEPTHS[:3] and dtype != torch.float64:
        labels = torch.empty(b, dtype=torch.int64, device="meta")
        targets = [(labels, 2.0), ("predicted", 1.0), *([("predicted", 3.0), (labels, math.inf)] if other else [])]
        problems += [Problem(x, weight, bias, target=target, p=p) for target, p in targets]
        tokens = Problem(x, weight, bias, target=labels, p=2.0)
        dispatch.score(tokens, Scores(torch.empty(4, b, device="meta"), None))
    for problem in problems:
        default, config = dispatch.choose(problem)
        for name, kernel in [*dispatch.KERNELS.items(), ("cluster", cluster)]:
            if not ((head and name == "cluster") or kernel.why_not(problem, arch)):
                dispatch.run(kernel, problem, scores, config if name == default else None)


def specialisations(archs: Iterable[str]) -> list[Specialisation]:
    """Everything that the kernels launch for the problems above."""
    from gradnorm_fast.kernels import dispatch  # noqa: F401, whose modules `pretend` must find
    from gradnorm_fast.kernels.experimental import cluster  # noqa: F401

    found: list[Specialisation] = []

    def note(source: Any, target: Any, options: dict[str, Any]) -> None:
        names = source.fn.arg_names  # before Triton 3.3 constants go by name
        constants = {at if isinstance(at, str) else names[at[0]]: value for at, value in source.constants.items()}
        name = source.fn.__name__.removesuffix("_kernel")
        found.append(Specialisation(name, arch, NAMES[dtype], (b, d, c), constants, options, source, target))

    for arch in archs:
        pretend(arch, note)
        for tf32, dtype in (*((False, dtype) for dtype in DTYPES), (True, torch.float32)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for b, (c, d), head in product(BATCHES, HEADS, (True, False)):
                score(arch, dtype, b, d, c, head)
        torch.backends.cuda.matmul.allow_tf32 = False
    return found


def a_few(found: list[Specialisation]) -> list[Specialisation]:
    """A small selection that has every fact in `found`: a greedy cover, most new facts first."""
    facts = list(map(_facts, found))
    missing = set().union(*facts)
    kept = []
    while missing:
        most = max(range(len(found)), key=lambda i: len(facts[i] & missing))
        kept.append(most)
        missing -= facts[most]
    return [found[i] for i in sorted(kept)]


def _facts(each: Specialisation) -> set[tuple[object, ...]]:
    """By kernel and architecture: each configuration with its arithmetic, each dtype, each value of each constant."""
    half = each.dtype in ("fp16", "bf16")
    arithmetic = "half" if half else each.constants.get("PRECISION", each.dtype)
    if "PRECISION" not in each.constants:  # no product: the sums are float32 or float64
        arithmetic = "fp64" if each.dtype == "fp64" else "fp32"
    tile = (
        *(each.constants.get(x) for x in TILE),
        *(each.options[x] for x in ("num_warps", "num_stages", "num_ctas")),
    )
    facts: list[tuple[object, ...]] = [("dtype", each.dtype), (arithmetic, tile), *each.constants.items()]
    facts += [(name, "given") for name in ABSENT if name not in each.constants]  # absent, it is the constant None
    return {(each.kernel, each.arch, *fact) for fact in facts}


def compile_one(each: Specialisation, keep: Path | None = None) -> Outcome:
    """Compile it and read what the compiler made."""
    import triton

    outcome = Outcome()
    try:
        kernel = triton.compile(each.source, target=each.target, options=each.options)
    except Exception as error:  # whatever the compiler raises is the finding
        outcome.problems.append(f"does not compile: {type(error).__name__}: {str(error).strip()[-200:]}")
        return outcome
    outcome.shared = kernel.metadata.shared
    nvidia = each.target.backend == "cuda"
    assembly, ttgir = kernel.asm["ptx" if nvidia else "amdgcn"], kernel.asm["ttgir"]
    if keep:
        for kind in ("ttir", "ttgir", "ptx", "amdgcn"):
            if kind in kernel.asm:
                (keep / f"{' '.join(str(each).split())}.{kind}").write_text(kernel.asm[kind])
    (_read_nvidia if nvidia else _read_amd)(kernel.asm, outcome)
    limit = ARCHITECTURES[each.arch][0]
    problems = {
        f"{outcome.spills} spills": outcome.spills > SPILLS,
        f"shared memory {outcome.shared} > {limit}": outcome.shared > limit,
        "tile stored element by element": nvidia and stores_a_tile(ttgir) and "st.global.v4" not in assembly,
    }
    if each.dtype in ("fp16", "bf16") and (narrow := in_loops(assembly, NARROW, beside=MATMUL)):
        outcome.problems.append(f"{narrow} loads of 2 bytes beside a product")
    if each.options["num_ctas"] > 1:
        problems["features split over the CTAs"] = not features_replicated(ttgir)
    expected = tensor_core_instruction(each.arch, each.options["num_warps"], kernel.asm["ttir"])
    problems[f"no {expected}"] = expected and not outcome.instructions.get(expected)
    operands = buffer_reuse.operands(ttgir)
    outcome.operands = list(map(str, operands))
    problems |= {str(operand): operand.race for operand in operands}
    outcome.problems += [text for text, true in problems.items() if true]
    return outcome


SPILL = r"\b(?:STL|LDL)\b"
MATMUL = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma"
NARROW = r"ld\.global(?!\S*\.v\d)\S*\.[bu]16\b|(?:global|buffer)_load_(?:ushort|short_d16|u16)"


def in_loops(assembly: str, pattern: str, beside: str = "") -> int:
    """How many lines match a pattern inside loops that also match `beside`; of PTX, SASS or AMD assembly."""
    lines = assembly.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"([$.]L\w+):", line))}
    matches: set[int] = set()
    for stop, line in enumerate(lines):
        jump = re.search(r"\b(?:bra|BRA|s_c?branch)\S*\s.*?([$.]L\w+)", line)
        loop = range(labels.get(jump[1], stop) if jump else stop, stop)
        if any(re.search(beside, lines[i]) for i in loop):
            matches.update(i for i in loop if re.search(pattern, lines[i]))
    return len(matches)


def stores_a_tile(ttgir: str) -> bool:
    """Whether float32 tiles of four columns or more are stored."""
    return any(int(n) >= 4 for n in re.findall(r"tt\.store .*tensor<\d+x(\d+)x!tt\.ptr<f32>", ttgir))


def features_replicated(ttgir: str) -> bool:
    """Whether each CTA of a cluster multiplies whole features, rather than its share of the rows with all classes'.

    The layout of the matmul's first operand says over which of its dimensions the CTAs are spread: none of them.
    """
    operands = re.findall(r"(?:warp_group_dot|tc_gen5_mma) .*? : !ttg\.memdesc<[^,]+, (#\w+)", ttgir)
    layouts = dict(re.findall(r"^(#\w+) = .*?CGALayout = (\[\[.*?\]\])", ttgir, re.MULTILINE))
    spread = [basis for operand in operands for basis in json.loads(layouts.get(operand, "[[1]]"))]
    return bool(operands) and not any(map(any, spread))


def tensor_core_instruction(arch: str, num_warps: int, ttir: str) -> str | None:
    """What the kernel's products should be made of; None for exact float32 and where there is no product."""
    found = re.search(r"tt\.dot ([^:]*) : tensor<(\d+)x\d+x(\w+)>", ttir)
    if not found or (found[3] == "f32" and "inputPrecision" not in found[1]):
        return None
    large = int(found[2]) >= 64 and num_warps >= 4  # warpgroups multiply 64 rows at least
    special = {"sm_90": "wgmma", "sm_100": "tcgen05.mma", "sm_103": "tcgen05.mma"} if large else {}
    return "mfma" if arch.startswith("gfx") else special.get(arch, "mma.sync")


def _read_nvidia(asm: dict[str, Any], outcome: Outcome) -> None:
    import triton

    counts = {"mma.sync": r"mma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05.mma": r"tcgen05\.mma"}
    outcome.instructions = {name: n for name, p in counts.items() if (n := len(re.findall(p, asm["ptx"])))}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        registers, stack = (int(n) for n in re.findall(r"(?:REG|STACK):(\d+)", usage))
        outcome.registers = registers
        if not stack and "wgmma" not in outcome.instructions:
            return
        try:
            sass = run(tools / "nvdisasm", "-c", file.name)
        except subprocess.CalledProcessError:  # Triton 3.6's does not know sm_103
            outcome.spills = stack // 4  # a spilled register takes 4 bytes
            return
    outcome.spills = len(re.findall(SPILL, sass))
    if inside := in_loops(sass, SPILL):
        outcome.problems.append(f"{inside} spills in a loop")
    products = len(re.findall("HGMMA", sass))
    if 0 < products <= len(re.findall(r"WARPGROUP\.ARRIVE", sass)):
        outcome.problems.append("each wgmma waits for the one before")


def _read_amd(asm: dict[str, Any], outcome: Outcome) -> None:
    numbers = {name: int(n) for name, n in re.findall(r"\.(vgpr_\w+):\s*(\d+)", asm["amdgcn"])}
    outcome.registers, outcome.spills = numbers["vgpr_count"], numbers["vgpr_spill_count"]
    outcome.instructions = {"mfma": n} if (n := len(re.findall(r"v_mfma", asm["amdgcn"]))) else {}


_todo: list[Specialisation] = []
_keep: Path | None = None


def _compile(i: int) -> Outcome:
    return compile_one(_todo[i], _keep)


def compile_all(todo: list[Specialisation], jobs: int, keep: Path | None = None) -> Iterator[Outcome]:
    """In order, by processes that inherit the list: Triton's functions cannot be sent to them."""
    global _todo, _keep
    _todo, _keep = todo, keep
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for done, outcome in enumerate(pool.imap(_compile, range(len(todo))), 1):
            if sys.stderr.isatty():
                print(f"\r{done}/{len(todo)} compiled", end="\n" if done == len(todo) else "", file=sys.stderr)
            yield outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernel", nargs="+", help="these alone")
    parser.add_argument("--quick", action="store_true", help="a few that have every configuration, dtype and constant")
    parser.add_argument("--list", action="store_true", help="compile nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the compiled TTIR, TTGIR and assembly")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: an interpreting process cannot compile; unset it")
    import triton

    found = [each for each in specialisations(args.arch) if not args.kernel or each.kernel in args.kernel]
    todo = a_few(found) if args.quick else found
    print(f"Triton {triton.__version__}, torch {torch.__version__}; compiled offline, not run")
    print(f"{'kernel':9} {'arch':7} {'dtype':5} {'B x D x C':16} {'tile':12} warps stages")
    if args.list:
        print("\n".join(map(str, todo)))
        print(f"{len(todo)} specialisations of {len(found)}")
        return 0
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for each, o in zip(todo, compile_all(todo, args.jobs, args.keep), strict=True):
        outcomes.append(o)
        counts = " ".join(f"{n} {c}" for n, c in o.instructions.items())
        print(f"{each}: {o.registers} registers, {o.spills} spills, {o.shared} shared, {counts or 'no matmul'}")
        print("".join(f"    !! {problem}\n" for problem in o.problems), end="", flush=True)
    bad = sum(bool(o.problems) for o in outcomes)
    print(f"{len(outcomes)} specialisations of {len(found)}, {bad} with problems")
    if args.json:
        table = [
            {"kernel": e.kernel, "arch": e.arch, "dtype": e.dtype, "shape": e.shape, "constants": e.constants,
             "num_warps": e.options["num_warps"], "num_stages": e.options["num_stages"],
             "num_ctas": e.options["num_ctas"], **asdict(o)}
            for e, o in zip(todo, outcomes, strict=True)
        ]  # fmt: skip
        args.json.write_text(json.dumps(table, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
