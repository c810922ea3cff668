"""The options that name a model and its input, and the detector that they make."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parsing import count, positive

if TYPE_CHECKING:
    import torch

    from ..detector import GradNorm
    from .tables import Table

SCORE_OPTIONS = ("temperature", "reduction", "include_bias")  #: None where not given


def add_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model and its input")
    model.add_argument("--model", metavar="NAME", help="torchvision name, timm:NAME, or module:function of your own")
    model.add_argument(
        "--weights", metavar="NAME", help="pretrained weights: DEFAULT, or torchvision's IMAGENET1K_V1, ..."
    )
    model.add_argument("--checkpoint", metavar="FILE", help="state dict to load")
    model.add_argument("--classes", type=positive, metavar="C", help="classes of a model that is not ImageNet's")
    model.add_argument("--head", metavar="MODULE", help="name of the last linear layer (default: found)")
    model.add_argument("--resize", type=count, metavar="N", help="shorter side, then the centre square; 0: as they are")
    model.add_argument("--mean", type=float, nargs=3, metavar="X", help="of RGB in [0, 1] (default: the weights' own)")
    model.add_argument("--std", type=float, nargs=3, metavar="X", help="likewise")
    model.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    model.add_argument("--batch-size", type=positive, default=64, metavar="B", help="(%(default)s)")
    model.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images (%(default)s)")
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


def score_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in SCORE_OPTIONS if (value := getattr(args, name)) is not None}


def detector_of(args: argparse.Namespace, paths: list[str]) -> tuple[GradNorm, Any]:
    """The detector of --model on --device, its head verified on the first image that can be read; the preprocessing."""
    from .. import heads
    from ..detector import GradNorm
    from ..models import default_transform, load_model
    from .images import first_readable, transformed
    from .run_log import rank_and_world

    if args.model is None:
        raise ValueError("model: expected --model NAME (torchvision), timm:NAME or module:function")
    if find_spec("torchvision") is None:
        raise ImportError('images need torchvision: pip install "gradnorm_fast[eval]"')
    device = device_of(args.device)
    model, transform = load_model(args.model, args.weights, args.checkpoint, args.classes)
    known = ":" not in args.model or args.model.startswith("timm:")
    if known and args.weights is None and args.checkpoint is None and rank_and_world()[0] == 0:
        print("note: no --weights and no --checkpoint: the model's weights are random", file=sys.stderr)
    if transform is None or args.resize is not None or args.mean is not None or args.std is not None:
        given = {"mean": args.mean, "std": args.std}
        size = None if args.resize == 0 else args.resize
        if args.resize is None and known:
            size = 224
        transform = default_transform(size, **{k: v for k, v in given.items() if v is not None})
    model.to(device)
    saved = getattr(args, "detector", None)
    detector = GradNorm(model, args.head, **score_options(args)) if saved is None else GradNorm.load(saved, model)
    path, image = first_readable(paths)
    detector.score(transformed(image, transform, path)[None])
    if args.compile and detector._head is not None:
        heads.compile_backbone(detector.model, detector._head, lambda module: module.compile())
    return detector, transform


def score_images(
    args: argparse.Namespace, detector: GradNorm, transform: Any, paths: list[str], out: Path
) -> Table | None:
    from .images import score_images

    return score_images(
        detector,
        paths,
        transform,
        out,
        batch_size=args.batch_size,
        workers=args.workers,
        amp=args.amp,
        strict=args.strict,
        resume=args.resume,
        progress=not args.quiet,
    )


def device_of(name: str | None) -> torch.device:
    """The device that is asked for; ValueError where it is not there."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device: expected one that is here, as cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device: {name!r} is not there, torch sees {count or 'no'} CUDA GPU")
        if device.index is None:  # each process of torchrun its own
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    return device


def check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"out: no folder {out.parent}")
    if out.is_dir():
        raise ValueError(f"out: expected a file, {out} is a folder")
