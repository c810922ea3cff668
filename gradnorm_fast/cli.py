"""The command ``gradnorm-fast``.

Each subcommand is one function, listed in `_SUBCOMMANDS`, that adds its parser and says what to run. What it runs
raises ValueError, OSError or ImportError for what the user can put right; `main` turns those, and all else, into one
line.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction["_Parser"]

_PROG = "gradnorm-fast"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 user error, 130 interrupted."""
    debug = False
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that has no arrows is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        args = _build_parser().parse_args(argv)
        debug = "debug" in args
        args.command(args)
    except KeyboardInterrupt:
        print(f"{_PROG}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # also what the user's own model raises
        if debug:
            raise
        foreseen = isinstance(error, ValueError | TypeError | OSError | ImportError)
        reason = str(error) if foreseen else f"{type(error).__name__}: {error} (--debug shows where)"
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}"
        print(f"{_PROG}: error: {' '.join(reason.split())}", file=sys.stderr)
        return 2 if foreseen else 1
    return 0


class _Parser(argparse.ArgumentParser):
    """Keeps the lines of the epilog, so that the examples can be copied."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.description = self.description and textwrap.fill(self.description, 80)

    def error(self, message: str) -> NoReturn:
        """Leave the reporting to `main`: one line, where argparse would print the usage as well."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def _add_demo(subparsers: Subparsers, common: _Parser) -> None:
    def command(args: argparse.Namespace) -> None:
        from . import demo, demo_imagenet

        if args.images and not args.imagenet:
            raise ValueError("images: they go with --imagenet")
        if args.imagenet:
            demo_imagenet.run(args.output or "gradnorm_imagenet.png", args.images, args.device)
        else:
            demo.run(args.output or "gradnorm_demo.png", args.device, args.seed)

    parser = subparsers.add_parser(
        "demo",
        parents=[common],
        help="GradNorm beside other scores, on handwritten digits or on photographs",
        description="Train a small network on the handwritten digits 0-6, score four OOD sets (digits 7-9, inverted "
        "digits, photograph patches, noise) with GradNorm and four other scores, and draw the result. Takes seconds. "
        "With --imagenet a network trained on ImageNet scores photographs, yours too.",
        epilog=f"examples:\n  {_PROG} demo --output gradnorm_demo.png\n  {_PROG} demo --imagenet --images photos/",
    )
    parser.add_argument("--imagenet", action="store_true", help="photographs (pip install 'gradnorm_fast[imagenet]')")
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="with --imagenet: your images, folders")
    parser.add_argument("--output", metavar="PNG", help="picture to write (gradnorm_demo.png, gradnorm_imagenet.png)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    parser.set_defaults(command=command)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model and its input")
    model.add_argument("--model", metavar="NAME", help="torchvision name, timm:NAME, or module:function of your own")
    model.add_argument(
        "--weights", metavar="NAME", help="pretrained weights: DEFAULT, or torchvision's IMAGENET1K_V1, ..."
    )
    model.add_argument("--checkpoint", metavar="FILE", help="state dict to load")
    model.add_argument("--classes", type=_positive, metavar="C", help="classes of a model that is not ImageNet's")
    model.add_argument("--head", metavar="MODULE", help="name of the last linear layer (default: found)")
    model.add_argument("--resize", type=_size, metavar="N", help="shorter side, then the centre square; 0: as they are")
    model.add_argument("--mean", type=float, nargs=3, metavar="X", help="of RGB in [0, 1] (default: the weights' own)")
    model.add_argument("--std", type=float, nargs=3, metavar="X", help="likewise")
    model.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    model.add_argument("--batch-size", type=_positive, default=64, metavar="B", help="(%(default)s)")
    model.add_argument("--workers", type=_size, default=0, metavar="N", help="processes that read images (%(default)s)")
    model.add_argument("--amp", action="store_true", help="half precision in the backbone")
    model.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run of the same inputs and options stopped"
    )
    run.add_argument("--strict", action="store_true", help="an unreadable image ends the run; else it is skipped")
    run.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.add_argument_group("the score")
    options.add_argument("--temperature", type=float, metavar="T", help="(1.0)")
    options.add_argument("--reduction", choices=("mean", "sum"), help="over classes (mean)")
    options.add_argument("--include-bias", action="store_true", default=None, help="count the bias's gradient")


def _positive(text: str) -> int:
    value = _size(text)
    if value == 0:
        raise argparse.ArgumentTypeError("expected a whole number above 0, got 0")
    return value


def _size(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _run(name: str) -> Callable[[argparse.Namespace], None]:
    """A function of commands.py, imported when it is called."""

    def command(args: argparse.Namespace) -> None:
        from . import commands

        getattr(commands, name)(args)

    return command


def _add_score(subparsers: Subparsers, common: _Parser) -> None:
    parser = subparsers.add_parser(
        "score",
        parents=[common],
        help="score images by a model, or features by a head",
        description="Score images by a model, or features by a head, into a CSV, NPY or Parquet file with one row per "
        "input. Rows are kept as they come: an interrupted run goes on with --resume. Under torchrun each process "
        "takes its share.",
        epilog="examples:\n"
        f"  {_PROG} score --model resnet50 --weights DEFAULT --images photos/ --out scores.csv\n"
        f"  {_PROG} score --features F.npy --weight W.npy --bias b.npy --out scores.npy\n"
        f"  torchrun --nproc-per-node=4 -m gradnorm_fast score --model resnet50 --weights DEFAULT --images photos/ \\\n"
        "    --detector gate.json --out scores.csv --resume",
    )
    parser.add_argument("--images", nargs="+", metavar="DIR", help="folders, searched through, or image files")
    parser.add_argument("--features", metavar="NPY", help="(N, D), in place of a model and images; may exceed memory")
    parser.add_argument("--weight", metavar="NPY", help="(C, D)")
    parser.add_argument("--bias", metavar="NPY", help="(C,)")
    parser.add_argument("--out", required=True, metavar="FILE", help=".csv, .npy or .parquet")
    parser.add_argument("--detector", metavar="JSON", help="from `fit`: adds is_ood")
    parser.add_argument("--threshold", type=_finite, metavar="S", help="adds is_ood: a score below S")
    _add_model_options(parser)
    parser.set_defaults(command=_run("score"))


def _add_fit(subparsers: Subparsers, common: _Parser) -> None:
    parser = subparsers.add_parser(
        "fit",
        parents=[common],
        help="find the threshold from in-distribution images",
        description="Find the threshold that keeps a fraction of in-distribution images (not those of the training) "
        "and save it with the head's fingerprint.",
        epilog=f"example: {_PROG} fit --model resnet50 --weights DEFAULT --id val/ --tpr 0.95 --out gate.json",
    )
    parser.add_argument("--id", nargs="+", required=True, metavar="DIR", help="in-distribution images")
    parser.add_argument("--tpr", type=float, default=0.95, metavar="P", help="fraction to keep (%(default)s)")
    parser.add_argument("--out", required=True, metavar="JSON", help="the detector, for score --detector")
    _add_model_options(parser)
    parser.set_defaults(command=_run("fit"))


def _add_eval(subparsers: Subparsers, common: _Parser) -> None:
    parser = subparsers.add_parser(
        "eval",
        parents=[common],
        help="table and plots of one ID and several OOD folders",
        description="Tell ID from OOD folders by GradNorm and, from the same pass, MSP, MaxLogit, Energy and the "
        "feature norm: table (Markdown, CSV), plot, scores, and a JSON with what is needed to repeat it.",
        epilog=f"example: {_PROG} eval --model resnet50 --weights DEFAULT --id imagenet/val \\\n"
        "    --ood places=places/ --ood textures=dtd/ --out results/",
    )
    parser.add_argument("--id", nargs="+", required=True, metavar="DIR", help="in-distribution images")
    parser.add_argument("--ood", action="append", required=True, metavar="NAME=DIR", help="may be given several times")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--bootstrap", type=_size, default=0, metavar="N", help="resamples for confidence intervals")
    _add_model_options(parser)
    parser.set_defaults(command=_run("evaluate"))


def _add_env(subparsers: Subparsers, common: _Parser) -> None:
    parser = subparsers.add_parser(
        "env",
        parents=[common],
        help="versions, devices, and which kernel would run",
        description="Versions, devices, and which kernel would run for a shape and why. With --check the torch path "
        "and, on a GPU, every kernel are held against float64.",
        epilog=f"example: {_PROG} env --check --shape 256 2048 1000 --dtype bfloat16",
    )
    parser.add_argument("--shape", type=_positive, nargs=3, default=(256, 2048, 1000), metavar=("B", "D", "C"))
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    parser.add_argument("--check", action="store_true", help="run all that runs here; exit code 2 if one fails")
    parser.set_defaults(command=_run("environment"))


def _add_bench(subparsers: Subparsers, common: _Parser) -> None:
    parser = subparsers.add_parser(
        "bench",
        parents=[common],
        help="the benchmark suite (in a clone of the repository)",
        description="Hands what follows over to benchmarks/compare.py.",
        epilog=f"example: {_PROG} bench -- --workload x1000",
    )
    parser.add_argument("rest", nargs="*", metavar="OPTION", help="of benchmarks/compare.py, after --")
    parser.set_defaults(command=_run("bench"))


_SUBCOMMANDS = (_add_score, _add_eval, _add_fit, _add_demo, _add_env, _add_bench)


def _build_parser() -> _Parser:
    # --debug may stand before or after the subcommand; SUPPRESS keeps the subcommand's default from overwriting it.
    common = _Parser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = _Parser(
        prog=_PROG,
        description="GradNorm out-of-distribution scores from features and a linear head, without backpropagation.",
        epilog=f"example: {_PROG} demo --output gradnorm_demo.png",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(subparsers, common)
    return parser
