"""What the command line's subcommands do; cli.py says how they are called.

Everything that the user can put right is checked before anything long begins, and raised as ValueError, OSError or
ImportError, which become one line.
"""

from __future__ import annotations

import argparse
import json
import math
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
from .detector import GradNorm, check_tpr
from .evaluation import METHODS, Results, compare_methods, plot_roc, plot_scores, results_csv, results_table


def score(args: argparse.Namespace) -> None:
    """Scores of images, or of rows of features, into a file."""
    out = Path(args.out)
    scoring.check_suffix(out)
    _check_out(out)
    if (args.features is None) == (args.images is None):
        raise ValueError("score: expected --images with --model, or --features with --weight")
    threshold = args.threshold
    if args.features is not None:
        _refuse(
            args, "--features", "model", "weights", "checkpoint", "classes", "head", "resize", "mean", "std", "detector"
        )
        table = _score_features(args, out)
    else:
        _refuse(args, "--images", "weight", "bias")
        if args.detector is not None:
            _refuse(args, "--detector", "threshold", "head", *_OPTIONS)
        paths = scoring.find_images(args.images)
        detector, transform = _detector(args, paths)
        if args.detector is not None:
            threshold = detector.threshold
        table = _score_images(args, detector, transform, paths, out)
    if table is None:  # another process writes
        return
    scores = table.scores["gradnorm"]
    is_ood = None if threshold is None else ~(scores >= threshold)
    scoring.write_table(table, out, is_ood)
    scoring.discard_parts(out)
    print(f"{out}: {len(table.paths)} scored" + (f", {len(table.skipped)} unreadable" if table.skipped else ""))
    if is_ood is not None:
        print(f"{int(is_ood.sum())} of {len(is_ood)} below the threshold {threshold:.6g}")


def fit(args: argparse.Namespace) -> None:
    """A threshold from in-distribution images, saved as a detector."""
    out = Path(args.out)
    _check_out(out)
    check_tpr(args.tpr)
    paths = scoring.find_images(args.id)
    detector, transform = _detector(args, paths)
    table = _score_images(args, detector, transform, paths, out)
    if table is None:
        return
    detector.fit_scores(table.scores["gradnorm"], args.tpr)
    detector.save(out)
    scoring.discard_parts(out)
    n = len(table.paths)
    print(f"{out}: threshold {detector.threshold:.6g} from {n} images keeps {100 * args.tpr:g}% of such images")
    if math.isinf(detector.threshold):
        print(f"{n} images are too few to reject any: about {math.ceil(1 / (1 - args.tpr)) - 1} are needed")


def evaluate(args: argparse.Namespace) -> None:
    """ID against OOD folders: table, plots, and a JSON with what is needed to repeat it."""
    out = Path(args.out)
    ood = {}
    for item in args.ood:
        name, separator, folder = item.partition("=")
        if not separator or not name or not folder:
            raise ValueError(f"--ood: expected NAME=DIR, got {item!r}")
        if os.path.basename(name) != name or not name.isprintable():
            raise ValueError(f"--ood: expected a name that can be part of a file's, got {name!r}")
        if name in ood or name in ("id", "average"):
            raise ValueError(f"--ood: the name {name!r} is taken")
        ood[name] = folder
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, {out} is a file")
    sets = {"id": scoring.find_images(args.id)}
    sets |= {name: scoring.find_images([folder]) for name, folder in ood.items()}
    if find_spec("sklearn") is None or find_spec("matplotlib") is None:
        raise ImportError('eval needs scikit-learn and matplotlib: pip install "gradnorm_fast[eval]"')
    for paths in sets.values():
        scoring.first_readable(paths)
    detector, transform = _detector(args, sets["id"])
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"scores-{name}.csv" for name in sets}
    tables = {}
    for name, paths in sets.items():
        if not args.quiet and scoring.rank_and_world()[0] == 0:
            print(f"{name}: {len(paths)} images", file=sys.stderr)
        table = _score_images(args, detector, transform, paths, files[name])
        if table is not None:
            tables[name] = table
            scoring.write_table(table, files[name])
    if not tables:
        return
    scores = {name: table.head_scores() for name, table in tables.items()}
    id_scores = scores.pop("id")
    results = compare_methods(id_scores, scores, bootstrap=args.bootstrap)
    _write_evaluation(out, results, args, detector, transform, tables)
    _draw(out / "scores.png", id_scores, scores)
    for file in files.values():  # only now: an interrupted run goes on with the sets that are complete
        scoring.discard_parts(file)
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


_OPTIONS = ("temperature", "reduction", "include_bias")  #: None where not given


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}


def _refuse(args: argparse.Namespace, given: str, *names: str) -> None:
    """What would be silently without effect beside another argument."""
    for name in names:
        if getattr(args, name) is not None:
            hint = " (pretrained weights are --weights)" if name == "weight" else ""
            raise ValueError(f"{name}: it does not go with {given}{hint}")


def _detector(args: argparse.Namespace, paths: list[str]) -> tuple[GradNorm, Any]:
    """The detector of --model on --device, its head verified on the first image that can be read; the preprocessing."""
    from .models import default_transform, load_model

    if args.model is None:
        raise ValueError("model: expected --model NAME (torchvision), timm:NAME or module:function")
    if find_spec("torchvision") is None:
        raise ImportError('images need torchvision: pip install "gradnorm_fast[eval]"')
    device = device_of(args.device)
    model, transform = load_model(args.model, args.weights, args.checkpoint, args.classes)
    known = ":" not in args.model or args.model.startswith("timm:")
    if known and args.weights is None and args.checkpoint is None and scoring.rank_and_world()[0] == 0:
        print("note: no --weights and no --checkpoint: the model's weights are random", file=sys.stderr)
    if transform is None or args.resize is not None or args.mean is not None or args.std is not None:
        given = {"mean": args.mean, "std": args.std}
        size = None if args.resize == 0 else args.resize
        if args.resize is None and known:
            size = 224
        transform = default_transform(size, **{k: v for k, v in given.items() if v is not None})
    model.to(device)
    saved = getattr(args, "detector", None)
    detector = GradNorm(model, args.head, **_options(args)) if saved is None else GradNorm.load(saved, model)
    path, image = scoring.first_readable(paths)
    detector.score(scoring.transformed(image, transform, path)[None])
    if args.compile and detector._head is not None:
        heads.compile_backbone(detector.model, detector._head, lambda module: module.compile())
    return detector, transform


def _score_images(
    args: argparse.Namespace, detector: GradNorm, transform: Any, paths: list[str], out: Path
) -> scoring.Table | None:
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
    return scoring.score_features(
        features,
        weight,
        bias,
        out,
        batch_size=max(args.batch_size, 1024),
        resume=args.resume,
        progress=not args.quiet,
        device=device_of(args.device),
        **_options(args),
    )


def _array(name: str, path: str, mapped: bool = False) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{name}: no file {path}") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: cannot read {path} as a NumPy array: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"{name}: expected float16, float32 or float64 in {path}, got {getattr(array, 'dtype', 'an archive')}"
        )
    return array


def device_of(name: str | None) -> torch.device:
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


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"out: no folder {out.parent}")
    if out.is_dir():
        raise ValueError(f"out: expected a file, {out} is a folder")


def _write_evaluation(
    out: Path,
    results: Results,
    args: argparse.Namespace,
    detector: GradNorm,
    transform: Any,
    tables: dict[str, scoring.Table],
) -> None:
    note = "In %; FPR95: the share of OOD images accepted when 95 % of the ID images are."
    (out / "table.md").write_text(f"{results_table(results)}\n\n{note}\n", encoding="utf-8")
    (out / "table.csv").write_text(results_csv(results), encoding="utf-8")
    repeat = {
        "versions": {"gradnorm_fast": __version__} | {p: _version(p) for p in ("torch", "torchvision", "scikit-learn")},
        "folder": os.getcwd(),
        "arguments": {name: value for name, value in vars(args).items() if name != "command"},
        "device": str(next(detector.model.parameters()).device),
        "preprocessing": str(transform),
        "temperature": detector.temperature,
        "reduction": detector.reduction,
        "include_bias": detector.include_bias,
        "head": detector.head_name,
        "fingerprint": detector._fingerprint(),
        "images": {name: len(table.paths) for name, table in tables.items()},
        "unreadable": {name: table.skipped for name, table in tables.items()},
        "results": results,
    }
    (out / "results.json").write_text(json.dumps(repeat, indent=1, default=str), encoding="utf-8")


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
    from .kernels import plan

    why = {
        "one_tile": "all classes in one tile, one launch",
        "few_rows": "reading the weight is all the work: slices of the features on all processors, two launches",
        "library": "the library's matmul is the fastest in this dtype, then one read of the logits",
        "split": "more classes than one tile holds, two launches",
    }
    kernel, config = plan.by_table(b, c, d, dtype, device)
    return f"{kernel}, {why[kernel]}: {config}"


def _check(device: torch.device) -> list[str]:
    """What runs on this device, kernels that no call chooses included, against float64 autograd; a line each."""
    from . import fast_gradnorm, gradnorm_from_logits
    from ._backends import why_not_triton
    from .reference import autograd_gradnorm

    triton, kernels = not why_not_triton(device), {}
    if triton and device.type == "cuda":
        from .kernels import plan

        kernels = plan.KERNELS
    lines = []
    for b, c in ((5, 10), (5, 300), (70, 300), (3, 8300)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            g = torch.Generator().manual_seed(c)
            x, w, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((b, 64), (c, 64), (c,)))
            w /= 8
            expected = autograd_gradnorm(x.double(), w.double(), bias.double())
            logits = torch.nn.functional.linear(x.double(), w.double(), bias.double()).to(device)
            x, w, bias = (t.to(device) for t in (x, w, bias))
            wide = torch.promote_types(dtype, torch.float32)
            got = {"torch": fast_gradnorm(x, w, bias, backend="torch")}
            if triton:
                got["triton, as chosen"] = fast_gradnorm(x, w, bias, backend="triton")
                got["rows, given logits"] = gradnorm_from_logits(x.to(wide), logits.to(wide), backend="triton")
            for kernel, score in kernels.items():
                out = torch.full((1, b), torch.nan, dtype=wide, device=device)
                try:
                    score(x, w, bias, out, None, 1.0, 1.0, 0.0)
                except ValueError:  # not for this shape or dtype
                    continue
                got[kernel] = out[0]
            for name, scores in got.items():
                error = ((scores.double().cpu() - expected) / expected).abs().max().item()
                shape = f"{b}x64x{c} {str(dtype).removeprefix('torch.')}"
                verdict = "pass" if error <= 1e-4 else "FAIL"
                lines.append(f"{verdict}  {device} {name:20} {shape:18} relative error {error:.1e}")
                print(lines[-1], flush=True)
    return lines
