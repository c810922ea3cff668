"""Measure fast_gradnorm side by side with every other way to get the score, and draw the table and the picture.

    make bench                                         everything this machine can hold
    python benchmarks/compare.py --workload x1000 --implementation fast_gradnorm matmul
    python benchmarks/compare.py --render benchmarks/results/cpu/bench.json --readme

Results are written after every workload. A second run into the same folder continues where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, whatever else is installed

import torch

from gradnorm_fast._files import replacing

import measure
import peers
import report
import workloads

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--workload", metavar="TEXT", help="only workloads whose name contains this, as x1000 does")
    parser.add_argument("--implementation", nargs="+", metavar="NAME", help=f"of: {', '.join(peers.ALL)}")
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS, help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/DEVICE)")
    parser.add_argument("--again", action="store_true", help="also what the folder already holds")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing, render this file")
    parser.add_argument("--readme", action="store_true", help="put the table into the README")
    args = parser.parse_args()
    try:
        path = args.render or run(args)
        results = json.loads(path.read_text())
        print(report.render(results, path.parent))
        if args.readme:
            report.update_readme(ROOT / "README.md", results, path.resolve().relative_to(ROOT))
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> Path:
    """Measure what is missing in the folder's bench.json; its path."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {args.device} asked for, but torch sees no GPU here; use --device cpu")
    if args.rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {args.rounds}")
    names, todo = list(peers.for_device(args.device)), workloads.for_device(args.device)
    if unknown := [n for n in args.implementation or [] if n not in names]:
        raise ValueError(f"implementation: no {', '.join(unknown)}; there are: {', '.join(names)}")
    wanted = {*(args.implementation or names), peers.OURS, peers.BASELINE}  # the first column of the table
    names = [n for n in names if n in wanted]
    chosen = {name: w for name, w in todo.items() if (args.workload or "") in name}
    if not chosen:
        raise ValueError(f"workload: nothing matches {args.workload!r}; there are: {', '.join(todo)}")
    results: dict[str, Any] = {"environment": measure.environment(args.device), "records": []}
    device = re.sub(r"\W+", "_", results["environment"]["device"].lower())
    path = (args.out or ROOT / "benchmarks/results" / device) / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not args.again:
        before = json.loads(path.read_text())
        if any(before["environment"][k] != results["environment"][k] for k in ("device", "torch", "triton")):
            raise ValueError(f"out: {path} holds results of another device, torch or triton: --again or another --out")
        results = before | {"environment": results["environment"]}
    if "ceilings" not in results:
        results["ceilings"] = measure.ceilings(args.device)
    for i, (name, workload) in enumerate(chosen.items(), 1):
        others = [r for r in results["records"] if r["workload"] != name or r["implementation"] not in names]
        if len(results["records"]) - len(others) == len(names):
            continue
        print(f"[{i}/{len(chosen)}] {name}", file=sys.stderr, flush=True)
        results["records"] = others + measure.measure(workload, names, args.device, args.rounds)
        with replacing(path) as file:
            json.dump(results, file, indent=1)
    return path


if __name__ == "__main__":
    sys.exit(main())
