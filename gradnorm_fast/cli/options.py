"""The options that say what is scored, how, and on which device; all subcommands that score have them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parsing import count, finite, positive

if TYPE_CHECKING:
    from .tables import Table

IMAGES = "folders, image files, lists of paths (.txt, or - for the standard input), .tar shards"
SETS = "images as for score, features (.npy, with --weight), or a file that score wrote"
SCORE_OPTIONS = ("temperature", "reduction", "include_bias")  #: None where not given
MODEL_OPTIONS = ("model", "weights", "checkpoint", "classes", "layers", "resize", "mean", "std", "workers")  #: likewise


def add_options(parser: argparse.ArgumentParser, gates: bool = False) -> None:
    """Add them; where a threshold is set, also which score it is for."""
    model = parser.add_argument_group("the model and its input")
    model.add_argument("--model", metavar="NAME", help="torchvision name, timm:NAME, or module:function of your own")
    model.add_argument(
        "--weights", metavar="NAME", help="pretrained weights: DEFAULT, or torchvision's IMAGENET1K_V1, ..."
    )
    model.add_argument("--checkpoint", metavar="FILE", help="state dict to load")
    model.add_argument("--classes", type=positive, metavar="C", help="classes of a model that is not ImageNet's")
    model.add_argument("--weight", metavar="NPY", help="of the head, (C, D): for features in place of images")
    model.add_argument("--bias", metavar="NPY", help="of the head, (C,)")
    model.add_argument("--head", metavar="MODULE", help="name of the last linear layer (default: found)")
    model.add_argument(
        "--layers",
        nargs="+",
        metavar="MODULE",
        help="score by the gradients of these modules, or all, in place of the head; takes a backward pass",
    )
    model.add_argument("--resize", type=count, metavar="N", help="shorter side, then the centre square; 0: as they are")
    model.add_argument("--mean", type=finite, nargs=3, metavar="X", help="of RGB in [0, 1] (default: the weights' own)")
    model.add_argument("--std", type=finite, nargs=3, metavar="X", help="likewise")
    model.add_argument("--no-exif", action="store_true", help="do not turn images as their EXIF orientation says")
    model.add_argument("--root", default="", metavar="DIR", help="what relative paths in lists are relative to")
    model.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    model.add_argument("--batch-size", type=positive, default=64, metavar="B", help="(%(default)s)")
    model.add_argument("--workers", type=count, metavar="N", help="processes that read images (default: by the cores)")
    model.add_argument("--amp", action="store_true", help="half precision in the backbone, by torch.autocast")
    model.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run of the same inputs and options stopped"
    )
    run.add_argument("--restart", action="store_true", help="drop what an interrupted run has kept")
    run.add_argument(
        "--content-hash", action="store_true", help="--resume compares what is in the files, not size and time"
    )
    run.add_argument(
        "--strict", action="store_true", help="an unreadable image ends the run, NaN scores make the exit code 1"
    )
    run.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.add_argument_group("the score")
    if gates:
        options.add_argument(
            "--score",
            metavar="NAME",
            help="which the threshold is for: gradnorm (default), feature_norm, output_norm, msp, max_logit or energy",
        )
    options.add_argument("--temperature", type=finite, metavar="T", help="(1.0)")
    options.add_argument("--reduction", choices=("mean", "sum"), help="over classes (mean)")
    options.add_argument("--include-bias", action="store_true", default=None, help="count the bias's gradient")


def score_options(args: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in (*SCORE_OPTIONS, "score") if getattr(args, name, None) not in (None, "auto")]
    return {name: getattr(args, name) for name in names}


def layers_of(args: argparse.Namespace) -> str | list[str] | None:
    """--layers as `GradNorm` takes it: "all" and "head" are no names of modules."""
    layers: list[str] | None = args.layers
    return layers[0] if layers in (["all"], ["head"]) else layers


def files_read(args: argparse.Namespace) -> list[str]:
    """The files beside the inputs that a run reads."""
    names = ("weight", "bias", "checkpoint", "detector")
    return [path for name in names if (path := getattr(args, name, None)) is not None]


def report_nan(table: Table, strict: bool, score: str = "gradnorm") -> int:
    """Say how many scores are NaN; the exit code: 1 if there are any and strict, else 0."""
    message = table.nan_message(score)
    if message:
        print(f"warning: {message}", file=sys.stderr)
    return 1 if message and strict else 0


def check_out(out: Path, *suffixes: str, option: str = "out", new_folder: Path | None = None) -> None:
    """Refuse a file that cannot be written: its folder is not there, it is a folder, or has another suffix.

    The run makes `new_folder` itself.
    """
    if out.parent != new_folder and not out.parent.is_dir():
        raise ValueError(f"{option}: no folder {out.parent}")
    if out.is_dir():
        raise ValueError(f"{option}: expected a file, {out} is a folder")
    if suffixes and out.suffix not in suffixes:
        raise ValueError(f"{option}: expected a name ending in {' or '.join(suffixes)}, got {out.name!r}")
