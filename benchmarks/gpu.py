"""Everything that needs a GPU, in one command and under nine minutes: tests, sanitizer, benchmarks, tuning.

    make gpu                                       results in benchmarks/results/DEVICE
    python benchmarks/gpu.py --dry-run             the same steps without a GPU: interpreter, tiny shapes

It needs this checkout and the Python, torch and Triton found there, and no network. The most valuable steps come first.
Each has a time limit and writes its results as it goes. The same command continues with the steps that are not done.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Step = Callable[[Path, float, bool], tuple[bool, str]]  #: (folder, seconds, dry run) -> complete, and a summary
SECONDS = {"compile": 60, "tests": 150, "sanitizer": 150, "bench": 110, "tune": 60}
SLOW_FIRST = ["test_gradnorm.py", "test_compile_matrix.py", "test_kernels.py", "test_operator.py"]
SMALL_CASES = """
import torch
from gradnorm_fast import fast_gradnorm, gradnorm_from_logits, head_scores, token_statistics
from gradnorm_fast.kernels.device import architecture
from gradnorm_fast.kernels import dispatch
from gradnorm_fast.kernels.problem import Problem, Scores
for dtype in (torch.bfloat16, torch.float32):
    for b, d, c in ((1, 1, 1), (17, 33, 10), (70, 65, 200), (70, 65, 300), (70, 64, 300), (3, 64, 300), (3, 16, 9000)):
        x, w, bias = (torch.randn(*s, device="cuda").to(dtype) for s in ((b, d), (c, d), (c,)))
        head_scores(x, w, bias)
        gradnorm_from_logits(x, x @ w.T)
        labels = torch.arange(b, device="cuda") % c
        token_statistics(x, w, labels, bias)
        for target, p in ((labels, 2.0), ("predicted", 1.0), ("uniform", 2.0), ("uniform", 3.0)):
            fast_gradnorm(x, w, bias, target=target, p=p)
        problem, scores = Problem(x, w, bias), Scores(torch.empty(1, b, device="cuda"), None)
        for kernel in dispatch.KERNELS.values():
            if not kernel.why_not(problem, architecture(x.device)):
                dispatch.run(kernel, problem, scores)
torch.cuda.synchronize()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: the interpreter, tiny shapes")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/DEVICE)")
    parser.add_argument("--seconds", type=float, default=float(sum(SECONDS.values())), help="in all (%(default)s)")
    parser.add_argument("--steps", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--again", action="store_true", help="also steps that are done")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("gpu.py: error: torch sees no GPU here; --dry-run goes through the motions without", file=sys.stderr)
        return 2
    device = "dry_run" if args.dry_run else re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
    out = (args.out or ROOT / "benchmarks/results" / device).resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = out / "gpu.json"
    done = json.loads(record.read_text()) if record.exists() and not args.again else {}
    deadline = time.monotonic() + args.seconds
    for step in args.steps:
        if done.get(step, {}).get("complete"):
            print(f"{step}: done before")
            continue
        start = time.monotonic()
        limit = min(SECONDS[step] * args.seconds / sum(SECONDS.values()), deadline - start)
        complete, summary = STEPS[step](out, limit, args.dry_run) if limit > 1 else (False, "no time left")
        done[step] = {"complete": complete, "seconds": round(time.monotonic() - start), "summary": summary}
        record.write_text(json.dumps(done, indent=1))
        print(f"{step}: {summary} ({done[step]['seconds']} s{'' if complete else ', not complete'})", flush=True)
    return 0 if all(done.get(s, {}).get("complete") for s in args.steps) else 1


def run(command: list[str], limit: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and the output so far."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            process.kill()
            return None, process.communicate()[0]
        return process.returncode, output


def script(name: str, *options: str, dry: tuple[str, ...], seconds: bool = True) -> Step:
    """One of the scripts beside this one, which write their results themselves; told how many seconds it has."""

    def step(out: Path, limit: float, dry_run: bool) -> tuple[bool, str]:
        command = [sys.executable, f"benchmarks/{name}", "--out", str(out), *options, *(dry if dry_run else ())]
        code, output = run([*command, "--seconds", str(limit * 0.9)] if seconds else command, limit)
        return code == 0, "out of time" if code is None else (output.strip().splitlines() or ["done"])[-1]

    return step


def compile_(out: Path, limit: float, dry_run: bool) -> tuple[bool, str]:
    """What the later steps launch, into Triton's cache on disk: compiling takes most of a first call."""
    deadline = time.monotonic() + limit
    code, output = (0, "") if dry_run else run([sys.executable, "-c", SMALL_CASES], limit / 2)
    complete, summary = script("tune.py", "--compile", dry=("--dry-run",))(out, deadline - time.monotonic(), dry_run)
    (out / "compile.txt").write_text(output)
    return complete and code == 0, summary + ("" if code == 0 else f"; small cases: exit code {code}")


def tests(out: Path, limit: float, dry_run: bool) -> tuple[bool, str]:
    """Every test file in a process of its own, the slow ones first, as many at a time as there are cores to compile."""
    files = [p.name for p in sorted((ROOT / "tests").glob("test_*.py"))]
    files.sort(key=lambda name: SLOW_FIRST.index(name) if name in SLOW_FIRST else len(SLOW_FIRST))
    deadline = time.monotonic() + limit

    def test(name: str) -> tuple[int | None, str]:
        left = deadline - time.monotonic()
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"tests/{name}"]
        return run(command, left) if left > 1 else (None, "not started: no time left")

    files = ["test_validation.py"] if dry_run else files
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        outcomes = dict(zip(files, pool.map(test, files), strict=True))
    text = "\n".join(f"==== {name}: exit code {code}\n{output}" for name, (code, output) in outcomes.items())
    (out / "tests.txt").write_text(text)
    passed, failed = len(re.findall(r" PASSED ", text)), len(re.findall(r" (?:FAILED|ERROR) +\[", text))
    bad = [f"{name} ({'out of time' if code is None else code})" for name, (code, _) in outcomes.items() if code != 0]
    return not bad, f"{passed} passed, {failed} failed" + (f"; {', '.join(bad)}" if bad else "")


def sanitizer(out: Path, limit: float, dry_run: bool) -> tuple[bool, str]:
    """compute-sanitizer's memcheck and racecheck over a small case of each kernel."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if dry_run or not Path(tool).exists():
        return True, "no compute-sanitizer here"
    text, results = "", {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SMALL_CASES]
        code, output = run(command, limit / 2)
        results[check] = "out of time" if code is None else "clean" if code == 0 else f"exit code {code}"
        text += f"==== {check}: {results[check]}\n{output[-20000:]}\n"
        (out / "sanitizer.txt").write_text(text)
    return set(results.values()) == {"clean"}, ", ".join(f"{k} {v}" for k, v in results.items())


STEPS: dict[str, Step] = {
    "compile": compile_,
    "tests": tests,
    "sanitizer": sanitizer,
    "bench": script("compare.py", dry=("--workload", "256x768x1000", "--rounds", "2"), seconds=False),
    "tune": script("tune.py", dry=("--dry-run",)),
}

if __name__ == "__main__":
    sys.exit(main())
