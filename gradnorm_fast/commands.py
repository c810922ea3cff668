"""What the command line's subcommands do; cli.py says how they are called.

Everything that the user can put right is checked before anything long begins, and raised as ValueError, OSError or
ImportError, which become one line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__, heads, scoring
from .detector import GradNorm
from .evaluation import METHODS, Results, compare_methods, plot_roc, plot_scores, results_csv, results_table


def score(args: argparse.Namespace) -> None:
    """Scores of images, or of rows of features, into a file."""
    out = Path(args.out)
    scoring.check_suffix(out)
    _check_folder(out.parent)
    if (args.features is None) == (args.images is None):
        raise ValueError("score: expected --images with --model, or --features with --weight")
    threshold = _Threshold(args)
    if args.features is not None:
        table = _score_features(args, out)
    else:
        detector, transform = _detector(args)
        table = _score_images(args, detector, transform, args.images, out)
    if table is None:  # another process writes
        return
    is_ood = threshold.of(table.scores["gradnorm"])
    scoring.write_table(table, out, is_ood)
    print(f"{out}: {len(table.paths)} scored" + (f", {len(table.skipped)} unreadable" if table.skipped else ""))
    if is_ood is not None:
        print(f"{int(is_ood.sum())} of {len(is_ood)} below the threshold {threshold.value:.6g}")


def fit(args: argparse.Namespace) -> None:
    """A threshold from in-distribution images, saved as a detector."""
    out = Path(args.out)
    _check_folder(out.parent)
    detector, transform = _detector(args)
    table = _score_images(args, detector, transform, args.id, out)
    if table is None:
        return
    detector.fit_scores(table.scores["gradnorm"], args.tpr)
    detector.save(out)
    print(
        f"{out}: threshold {detector.threshold:.6g} from {len(table.paths)} images keeps {args.tpr:.0%} of such images"
    )


def evaluate(args: argparse.Namespace) -> None:
    """ID against OOD folders: table, plots, and a JSON with what is needed to repeat it."""
    out = Path(args.out)
    ood = {}
    for item in args.ood:
        name, separator, folder = item.partition("=")
        if not separator or not name or not folder:
            raise ValueError(f"--ood: expected NAME=DIR, got {item!r}")
        if name in ood or name == "average":
            raise ValueError(f"--ood: the name {name!r} is taken")
        ood[name] = folder
    files = {name: scoring.find_images([folder]) for name, folder in ood.items()}
    inside = scoring.find_images(args.id)
    if find_spec("sklearn") is None or find_spec("matplotlib") is None:
        raise ImportError('eval needs scikit-learn and matplotlib: pip install "gradnorm_fast[eval]"')
    out.mkdir(parents=True, exist_ok=True)
    detector, transform = _detector(args)
    tables = {}
    for name, paths in {"": inside, **files}.items():
        print(f"{name or 'in-distribution'}: {len(paths)} images", file=sys.stderr)
        keep = out / f"scores-{name or 'id'}.csv"
        table = tables[name] = _score_images(args, detector, transform, paths, keep)
        if table is not None:
            scoring.write_table(table, keep)
    if any(table is None for table in tables.values()):
        return
    scores = {name: table.head_scores() for name, table in tables.items() if table is not None}
    id_scores = scores.pop("")
    results = compare_methods(id_scores, scores, bootstrap=args.bootstrap)
    _write_evaluation(out, results, args, detector, {n: len(t.paths) for n, t in tables.items() if t is not None})
    _draw(out / "scores.png", id_scores, scores)
    print(results_table(results))
    print(
        f"\nFPR95 with ID positive, in %. Files in {out}: table.md, table.csv, results.json, scores.png, scores-*.csv"
    )
    if results["average"]["GradNorm"]["auroc"] < 0.5:
        print("GradNorm is worse than chance here: compare the feature norm and the baselines")


def environment(args: argparse.Namespace) -> None:
    """Versions, devices, and which kernel would run; with --check, every kernel against float64."""
    print(f"gradnorm_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    triton = find_spec("triton")
    print(f"Triton {_version('triton') if triton else 'not installed'}; {platform.platform()}")
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


def bench(args: argparse.Namespace) -> None:
    """The benchmark suite of the repository, which is not part of the package."""
    script = Path(__file__).resolve().parents[1] / "benchmarks/compare.py"
    if not script.exists():
        raise ValueError("bench: the benchmarks are in the repository, not in the package; clone it and run make bench")
    code = subprocess.run([sys.executable, str(script), *args.rest]).returncode
    if code:
        raise ValueError(f"bench: compare.py ended with exit code {code}")


class _Threshold:
    """From --detector or --threshold; none without either."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.value: float | None = args.threshold
        if args.detector is not None:
            if args.threshold is not None:
                raise ValueError("threshold: give --threshold or --detector, not both")
            if args.features is not None:
                raise ValueError("detector: it belongs to a model and images; with --features use --threshold")
            self.args = args

    def of(self, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        if self.value is None and hasattr(self, "args"):
            self.value = self.args.fitted.threshold
        return None if self.value is None else ~(scores >= self.value)


def _detector(args: argparse.Namespace) -> tuple[GradNorm, Any]:
    """The detector of --model on --device, and the preprocessing."""
    from .models import default_transform, load_model

    if args.model is None:
        raise ValueError("model: expected --model NAME (torchvision), timm:NAME or module:function")
    if find_spec("torchvision") is None:
        raise ImportError('images need torchvision: pip install "gradnorm_fast[eval]"')
    device = _device(args.device)
    model, transform = load_model(args.model, args.weights, args.checkpoint, args.classes)
    if args.weights is None and args.checkpoint is None and ":" not in args.model:
        print("note: no --weights and no --checkpoint: the model's weights are random", file=sys.stderr)
    if transform is None or args.resize is not None or args.mean is not None or args.std is not None:
        given = {"mean": args.mean, "std": args.std}
        size = None if args.resize == 0 else args.resize
        if args.resize is None and ":" not in args.model:
            size = 224
        transform = default_transform(size, **{k: v for k, v in given.items() if v is not None})
    model.to(device)
    saved = getattr(args, "detector", None)
    if saved is not None:
        detector = args.fitted = GradNorm.load(saved, model)
    else:
        options = {"temperature": args.temperature, "reduction": args.reduction, "include_bias": args.include_bias}
        detector = GradNorm(model, args.head, **options)
    return detector, transform


def _score_images(
    args: argparse.Namespace, detector: GradNorm, transform: Any, images: list[str], out: Path
) -> scoring.Table | None:
    paths = scoring.find_images(images)
    if args.compile:
        _compile(detector, transform, paths)
    return scoring.score_images(
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


def _compile(detector: GradNorm, transform: Any, paths: list[str]) -> None:
    """Compile everything but the head, once that is known."""
    if getattr(detector.model, "_gradnorm_compiled", False):
        return
    from PIL import Image

    for path in paths:
        try:
            with Image.open(path) as image:
                detector.score(transform(image.convert("RGB"))[None])
        except (OSError, ValueError):
            continue
        break
    if detector._head is not None:
        heads.compile_backbone(detector.model, detector._head, lambda module: module.compile())
        detector.model._gradnorm_compiled = True  # type: ignore[assignment]


def _score_features(args: argparse.Namespace, out: Path) -> scoring.Table | None:
    if args.weight is None:
        raise ValueError("weight: expected --weight W.npy with --features")
    features = _array("features", args.features, mapped=True)
    weight = torch.from_numpy(np.array(_array("weight", args.weight)))
    bias = None if args.bias is None else torch.from_numpy(np.array(_array("bias", args.bias)))
    if features.ndim != 2:
        raise ValueError(f"features: expected shape (N, D) in {args.features}, got {features.shape}")
    if bias is not None:
        bias = bias.to(weight.dtype)
    options = {"temperature": args.temperature, "reduction": args.reduction, "include_bias": args.include_bias}
    return scoring.score_features(
        features,
        weight,
        bias,
        out,
        batch_size=max(args.batch_size, 1024),
        resume=args.resume,
        progress=not args.quiet,
        device=_device(args.device),
        **options,
    )


def _array(name: str, path: str, mapped: bool = False) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{name}: no file {path}") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: cannot read {path} as a NumPy array: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(
            f"{name}: expected floating-point numbers in {path}, got {getattr(array, 'dtype', 'an archive')}"
        )
    return array


def _device(name: str | None) -> torch.device:
    if name is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return (
            torch.device("cuda", local % torch.cuda.device_count())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} is not there, torch sees {torch.cuda.device_count() or 'no'} CUDA GPU")
    return device


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"out: no folder {folder}")


def _write_evaluation(
    out: Path, results: Results, args: argparse.Namespace, detector: GradNorm, counts: dict[str, int]
) -> None:
    (out / "table.md").write_text(results_table(results) + "\n")
    (out / "table.csv").write_text(results_csv(results))
    asked = {k: v for k, v in vars(args).items() if k not in ("command", "fitted") and not k.startswith("_")}
    repeat = {
        "gradnorm_fast": __version__,
        "torch": torch.__version__,
        "arguments": asked,
        "head": detector.head_name,
        "fingerprint": detector._fingerprint(),
        "images": {name or "id": n for name, n in counts.items()},
        "results": results,
    }
    (out / "results.json").write_text(json.dumps(repeat, indent=1, default=str))


def _draw(path: Path, id_scores: Any, ood_scores: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    field = METHODS["GradNorm"]
    outside = {name: getattr(scores, field) for name, scores in ood_scores.items()}
    plot_scores(getattr(id_scores, field), outside, left, xlabel="GradNorm (larger = more in-distribution)")
    plot_roc(getattr(id_scores, field), outside, right)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _chosen(device: torch.device, b: int, d: int, c: int, dtype: torch.dtype) -> str:
    """Which kernel fast_gradnorm runs for this shape on this device, and why."""
    from ._backends import uses_triton, why_not_triton

    if not uses_triton("auto", device):
        return "plain torch: " + ("a CPU's own path" if device.type == "cpu" else why_not_triton(device))
    from .kernels import one_tile, split
    from .kernels.targets import architecture

    arch = architecture(device)
    if c <= one_tile.MAX_CLASSES and dtype != torch.float64:
        return f"one_tile, all classes in one tile, one launch: {one_tile.configuration(b, c, d, dtype, arch)}"
    return f"split, more classes than one tile holds, two launches: {split.configuration(b, c, d, dtype, arch)}"


def _check(device: torch.device) -> list[str]:
    """Every kernel this device can run, against float64 autograd."""
    from . import fast_gradnorm, gradnorm_from_logits
    from ._backends import why_not_triton
    from .reference import autograd_gradnorm

    backends = ["torch"] + (["triton"] if not why_not_triton(device) else [])
    lines = []
    for backend in backends:
        for kernel, c in (("one tile", 10), ("one tile", 200), ("split", 1000), ("rows", 1000), ("long rows", 9000)):
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                g = torch.Generator().manual_seed(c)
                x, w, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((5, 64), (c, 64), (c,)))
                w /= 8
                expected = autograd_gradnorm(x.double(), w.double(), bias.double())
                x, w, bias = (t.to(device) for t in (x, w, bias))
                if "rows" in kernel:
                    logits = torch.nn.functional.linear(x.double(), w.double(), bias.double())
                    x, logits = x.double().to(score := torch.promote_types(dtype, torch.float32)), logits.to(score)
                    got = gradnorm_from_logits(x, logits, backend=backend)
                else:
                    got = fast_gradnorm(x, w, bias, backend=backend)
                error = ((got.double().cpu() - expected) / expected).abs().max().item()
                verdict = "pass" if error <= 1e-4 else "FAIL"
                name = str(dtype).removeprefix("torch.")
                lines.append(f"{verdict}  {device} {backend:6} {kernel:9} C={c:<5} {name:8} relative error {error:.1e}")
                print(lines[-1])
    return lines
