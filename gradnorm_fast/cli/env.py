"""``gradnorm-fast env``: versions, devices, which kernel would run, and a check of all that runs here."""

from __future__ import annotations

import argparse
import platform
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING

from .. import __version__
from . import PROG
from .parsing import Parser, Subparsers, positive

if TYPE_CHECKING:
    import torch


_SHAPES = ((5, 10), (5, 300), (70, 300), (3, 8300))  # batch and classes of the checks


def add_parser(subparsers: Subparsers, common: Parser) -> None:
    parser = subparsers.add_parser(
        "env",
        parents=[common],
        help="versions, devices, and which kernel would run",
        description="Versions, devices, and which kernel would run for a shape and why. With --check the torch path "
        "and, on a GPU, every kernel are held against float64.",
        epilog=f"example: {PROG} env --check --shape 256 2048 1000 --dtype bfloat16",
    )
    parser.add_argument("--shape", type=positive, nargs=3, default=(256, 2048, 1000), metavar=("B", "D", "C"))
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    parser.add_argument("--check", action="store_true", help="run all that runs here; exit code 2 if one fails")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    import torch

    print(f"gradnorm_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    triton = find_spec("triton")
    print(f"Triton {version_of('triton') if triton else 'not installed'}; {platform.platform()}")
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    b, d, c = args.shape
    dtype = getattr(torch, args.dtype)
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"{device}: {name}; {b}x{d}x{c} {args.dtype}: {_chosen(device, b, d, c, dtype)}")
    if args.check:
        failed = [line for device in devices for line in _check(device) if "FAIL" in line]
        if failed:
            raise ValueError(f"{len(failed)} checks failed")


def version_of(package: str) -> str:
    """The version of an installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _chosen(device: torch.device, b: int, d: int, c: int, dtype: torch.dtype) -> str:
    """Which kernel fast_gradnorm runs for this shape on this device, and why."""
    from .._backends import batch_invariant, uses_triton, why_not_triton

    if not uses_triton("auto", device):
        return "plain torch: " + ("a CPU's own path" if device.type == "cpu" else why_not_triton(device))
    import torch

    from ..kernels import dispatch, library
    from ..kernels.device import architecture
    from ..kernels.problem import Problem

    why = {
        "one_tile": "all classes in one tile, one launch",
        "tiled": "tiles of logits, then one read of them",
        "library": "the library's matmul, then one read of the logits",
    }
    problem = Problem(*(torch.empty(shape, dtype=dtype, device=device) for shape in ((b, d), (c, d))), None)
    kernel, config = dispatch.choose(problem, batch_invariant())
    reason = library.why_not(problem, architecture(device)) if kernel == "tiled" else ""
    return f"{kernel}, {why[kernel]}{reason and f' (library {reason})'}: {config}"


def _check(device: torch.device) -> list[str]:
    """Compare every backend and kernel on this device with float64 autograd; one line each."""
    import torch

    from .. import fast_gradnorm, gradnorm_from_logits
    from .._backends import why_not_triton
    from ..kernels.problem import Problem, Scores
    from ..reference import autograd_gradnorm

    triton, lines = not why_not_triton(device), []
    if triton:
        from ..kernels import dispatch
        from ..kernels.device import architecture

        arch = architecture(device)
        kernels = dispatch.KERNELS if device.type == "cuda" else ()  # the interpreter takes long
    for (b, c), dtype in product(_SHAPES, (torch.float16, torch.bfloat16, torch.float32, torch.float64)):
        g = torch.Generator().manual_seed(c)
        x, w, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((b, 64), (c, 64), (c,)))
        w /= 8
        labels = torch.arange(b) % c
        logits = torch.nn.functional.linear(x.double(), w.double(), bias.double()).to(device)
        for kind, target in (("", "uniform"), (", labels", labels), (", predicted", "predicted")):
            expected = autograd_gradnorm(x.double(), w.double(), bias.double(), target=target)
            inputs = [t.to(device) for t in (x, w, bias)]
            target = target if isinstance(target, str) else target.to(device)
            wide = torch.promote_types(dtype, torch.float32)
            got = {"torch": fast_gradnorm(*inputs, target=target, backend="torch")}
            problem = Problem(*inputs, target=target)
            if triton and problem.uniform:
                got["rows, given logits"] = gradnorm_from_logits(x.to(device, wide), logits.to(wide), backend="triton")
            if triton and not dispatch.why_not(problem):
                got["triton, as chosen"] = fast_gradnorm(*inputs, target=target, backend="triton")
                for kernel in kernels:
                    if not dispatch.KERNELS[kernel].why_not(problem, arch):
                        out = torch.full((1, b), torch.nan, dtype=wide, device=device)
                        dispatch.run(dispatch.KERNELS[kernel], problem, Scores(out, None))
                        got[kernel] = out[0]
            for name, scores in got.items():
                error = ((scores.double().cpu() - expected) / expected).abs().max().item()
                shape = f"{b}x64x{c} {str(dtype).removeprefix('torch.')}"
                verdict = "pass" if error <= 1e-4 else "FAIL"
                lines.append(f"{verdict}  {device} {name + kind:30} {shape:18} relative error {error:.1e}")
                print(lines[-1], flush=True)
    return lines
