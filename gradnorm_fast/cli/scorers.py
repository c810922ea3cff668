"""Makes tables of scores: from images by a model, from features by a head, or from score files."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from .. import gate, heads
from .._autocast import autocast_in_force
from ..baselines import odin
from ..detector import GradNorm
from ..evaluation import fields_of
from ..layers import LayerNorms, layer_gradnorms
from ..layers.groups import layer_groups
from ..layers.norms import combined
from ..models import class_names, default_transform, device_of, load_model, normalisation_of
from .features import load_array, score_features
from .images import Preprocessing, Scores, first_readable, score_images, transformed
from .inputs import class_folders, evenly_spaced, find_inputs, labelled_if_in_folders, with_folder_labels
from .options import MODEL_OPTIONS, SCORE_OPTIONS, layers_of, score_options
from .parsing import refuse
from .run_log import rank_and_world
from .tables import FIELDS, FIRST_FIELDS, Table, check_format, read_table

Kind = Literal["images", "features", "scores"]


class Scorer(Protocol):
    """Scores sets of inputs."""

    @property
    def detector(self) -> GradNorm | None:
        """None where the scores were there already."""
        ...

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        ...

    @property
    def autocast(self) -> str | None:
        """As in `GradNorm.fit_scores`; None where the model is not run here."""
        ...

    makes_features: bool  #: whether `table` writes the features that the head is given

    def table(self, name: str, sources: list[str], out: Path, features: Path | None = None) -> Table | None:
        """The scores of a set, kept in the parts of `out` as they come; None in all processes but the first."""
        ...

    def description(self) -> dict[str, Any]:
        """The settings needed to repeat it, JSON-serialisable."""
        ...


def scorer(args: argparse.Namespace, sets: dict[str, list[str]]) -> Scorer:
    """The scorer for the kind all sets share. ValueError if they differ, or if options are missing or do not fit."""
    kinds = {name: kind_of(name, sources) for name, sources in sets.items()}
    (name, kind), *others = kinds.items()
    for other, its in others:
        if its != kind:
            raise ValueError(f"{other}: expected {kind}, as {name}, got {its}")
    if kind == "images":
        return ModelScorer(args, sets)
    return HeadScorer(args) if kind == "features" else FileScorer(args)


def kind_of(name: str, sources: list[str]) -> Kind:
    """The kind of a set: a .npy file of features, a file that `score` wrote, else images."""
    kinds = {_kind(Path(source)) for source in sources}
    if len(kinds) > 1 or (len(sources) > 1 and "images" not in kinds):
        raise ValueError(f"{name}: expected images, or one file of features or scores, got {' '.join(sources)}")
    return kinds.pop()


def _kind(source: Path) -> Kind:
    if source.suffix in (".csv", ".parquet"):
        return "scores"
    if source.suffix != ".npy":
        return "images"
    try:
        return "scores" if np.load(source, mmap_mode="r", allow_pickle=False).dtype.names else "features"
    except (OSError, ValueError, EOFError, OverflowError, AttributeError):  # the last of an archive
        return "features"  # where it is refused by name


class ModelScorer:
    """The detector of --model on --device, its head verified on the first image that can be read."""

    makes_features = True

    def __init__(self, args: argparse.Namespace, sets: dict[str, list[str]]) -> None:
        refuse(args, "images", "weight", "bias")
        self.args = args
        self.inputs = {name: find_inputs(sources, args.root) for name, sources in sets.items()}
        folders: list[str] | None = None
        if getattr(args, "folder_labels", False):
            if len(args.id) != 1 or not os.path.isdir(args.id[0]):
                raise ValueError("folder-labels: expected one folder in --id, with a folder for each class")
            self.inputs["id"] = with_folder_labels(self.inputs["id"], args.id[0])
            folders = class_folders(args.id[0])
        if "train" in sets and args.train is not None:
            self.inputs["train"] = labelled_if_in_folders(self.inputs["train"], args.train)
        limit = getattr(args, "limit", None)
        if limit is not None:
            self.inputs = {name: evenly_spaced(inputs, limit) for name, inputs in self.inputs.items()}
        model, transform = _load_model(args)
        self.classes = class_names(model, args.model, args.weights) or folders
        self.preprocessing = Preprocessing(transform, not args.no_exif, args.resize or 256)
        firsts = [first_readable(inputs, self.preprocessing) for inputs in self.inputs.values()]
        described = gate.describe_preprocessing(transform)
        if args.no_exif and described is not None:
            described += ", EXIF orientation ignored"
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=args.amp):
            self.autocast = autocast_in_force(device)
        saved = getattr(args, "detector", None)
        if saved is None:
            options = score_options(args)
            self.detector = GradNorm(model, args.head, layers=layers_of(args), preprocessing=described, **options)
        else:
            self.detector = _load_gate(saved, model, described, self.autocast, args.force)
        name, image = firsts[0]
        self.detector.score(transformed(image, transform, name)[None])
        if args.compile:
            if self.detector._head is None:
                raise ValueError("compile: gradients of layers are computed without it")
            heads.compile_backbone(self.detector.model, self.detector._head, lambda module: module.compile())

    @property
    def device(self) -> torch.device:
        return next(self.detector.model.parameters()).device

    def table(self, name: str, sources: list[str], out: Path, features: Path | None = None) -> Table | None:
        return self._score(name, out, features=features)

    def second_pass(self, name: str, out: Path, odin_epsilon: float, layers: bool) -> Table | None:
        """Scores of a set that take gradients: ODIN where ε > 0, and GradNorm by the gradients of each stage.

        The table's columns are "odin" and "gradnorm of NAME", kept in the parts of `out` as they come.
        """
        model, options = self.detector.model, {n: getattr(self.detector, n) for n in ("temperature", "reduction")}
        groups = layer_groups(model) if layers else {}

        def scores(images: torch.Tensor) -> dict[str, torch.Tensor]:
            images = self.detector._placed(images)[1]
            found = (
                {"odin": odin(model, images, epsilon=odin_epsilon)} if odin_epsilon > 0 else dict[str, torch.Tensor]()
            )
            if groups:
                with heads.evaluating(model):
                    norms = layer_gradnorms(model, images, per_layer=True, **options)
                assert isinstance(norms, LayerNorms)
                for group, names in groups.items():
                    found[f"gradnorm of {group}"] = combined([norms[n] for n in names], 1.0)
            return found

        fields = (*(["odin"] if odin_epsilon > 0 else []), *(f"gradnorm of {group}" for group in groups))
        return self._score(name, out, scores=Scores(fields, scores, {"odin epsilon": odin_epsilon}))

    def _score(self, name: str, out: Path, **options: Any) -> Table | None:
        module, own, _ = self.args.model.partition(":")
        return score_images(
            self.detector,
            self.inputs[name],
            self.preprocessing,
            out,
            batch_size=self.args.batch_size,
            workers=self.args.workers,
            amp=self.args.amp,
            strict=self.args.strict,
            resume=self.args.resume,
            content=self.args.content_hash,
            progress=not self.args.quiet,
            module=module if own and module != "timm" else None,
            **options,
        )

    def description(self) -> dict[str, Any]:
        return {
            "device": str(self.device),
            "preprocessing": str(self.preprocessing),
            **_detector_description(self.detector),
        }


def _load_model(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model of --model on --device, and its preprocessing."""
    if args.model is None:
        raise ValueError("model: expected --model NAME (torchvision), timm:NAME or module:function")
    if find_spec("torchvision") is None:
        raise ImportError('images need torchvision: pip install "gradnorm_fast[eval]"')
    if args.std is not None and min(args.std) <= 0:
        raise ValueError(f"std: expected three numbers above 0, got {' '.join(map(str, args.std))}")
    device = device_of(args.device)
    model, transform = load_model(args.model, args.weights, args.checkpoint, args.classes)
    known = ":" not in args.model or args.model.startswith("timm:")
    if known and args.weights is None and args.checkpoint is None and rank_and_world()[0] == 0:
        print("note: no --weights and no --checkpoint: the model's weights are random", file=sys.stderr)
    if transform is None or args.resize is not None or args.mean is not None or args.std is not None:
        given = {name: getattr(args, name) or own for name, own in normalisation_of(transform).items()}
        size = None if args.resize == 0 else args.resize
        if args.resize is None and known:
            size = 224
        transform = default_transform(size, **given)
    return model.to(device), transform


class HeadScorer:
    """The head of --weight and --bias."""

    autocast, makes_features = None, False

    def __init__(self, args: argparse.Namespace) -> None:
        refuse(args, "features", *MODEL_OPTIONS)
        if getattr(args, "limit", None) is not None:
            raise ValueError("limit: it goes with images")
        self.args, self.device = args, device_of(args.device)
        self.weight, self.bias = _load_head(args)
        if getattr(args, "detector", None) is None:
            self.detector = _detector_of(args, self.weight, self.bias)
        else:
            self.detector = _gate_of_head(args.detector, self.weight, self.bias)

    def table(self, name: str, sources: list[str], out: Path, features: Path | None = None) -> Table | None:
        return score_features(
            sources[0],
            self.weight,
            self.bias,
            out,
            batch_size=max(self.args.batch_size, 1024),
            resume=self.args.resume,
            content=self.args.content_hash,
            progress=not self.args.quiet,
            device=self.device,
            **{name: getattr(self.detector, name) for name in SCORE_OPTIONS},
        )

    def description(self) -> dict[str, Any]:
        return {"device": str(self.device), **_detector_description(self.detector)}


class FileScorer:
    """Files that `score` wrote; the model or head that they are from, where `fit` is to save a detector."""

    autocast, device, makes_features = None, torch.device("cpu"), False

    def __init__(self, args: argparse.Namespace) -> None:
        self.fields = tuple(dict.fromkeys((*FIRST_FIELDS, *fields_of(getattr(args, "methods", None)).values())))
        self.optional: tuple[str, ...] = FIELDS
        if getattr(args, "limit", None) is not None:
            raise ValueError("limit: it goes with images")
        if hasattr(args, "tpr") and args.score != "auto":  # fit needs no other
            self.fields, self.optional = (args.score or "gradnorm",), ()
        self.detector: GradNorm | None = None
        if args.model is not None:
            if args.head is None and args.layers is None:
                raise ValueError(
                    "head: expected --head MODULE with --model and a file of scores: there is no image to find it by"
                )
            self.detector = GradNorm(_load_model(args)[0], args.head, layers=layers_of(args), **score_options(args))
        elif args.weight is not None:
            self.detector = _detector_of(args, *_load_head(args))
        else:
            refuse(args, "files of scores", *SCORE_OPTIONS, *MODEL_OPTIONS)

    def table(self, name: str, sources: list[str], out: Path, features: Path | None = None) -> Table | None:
        check_format(Path(sources[0]))
        return read_table(Path(sources[0]), self.fields, self.optional) if rank_and_world()[0] == 0 else None

    def description(self) -> dict[str, Any]:
        return {}


def _load_head(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor | None]:
    if args.weight is None:
        raise ValueError("weight: expected --weight W.npy with features")
    weight = torch.from_numpy(np.array(load_array("weight", args.weight)))
    bias = None if args.bias is None else torch.from_numpy(np.array(load_array("bias", args.bias)))
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (C, D) in {args.weight}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({len(weight)},) in {args.bias}, got {tuple(bias.shape)}")
    if bias is None:
        return weight, None
    dtype = torch.promote_types(weight.dtype, bias.dtype)  # a float32 bias may overflow as float16
    return weight.to(dtype), bias.to(dtype)


def _detector_description(detector: GradNorm) -> dict[str, Any]:
    options = {name: getattr(detector, name) for name in SCORE_OPTIONS}
    if detector.layers is not None:
        return options | {"layers": detector.layers}
    return options | {"head": detector.head_name, "fingerprint": detector._fingerprint()}


def _load_gate(path: str, model: nn.Module, preprocessing: str | None, autocast: str, force: bool) -> GradNorm:
    """A saved detector for the model; what it warns of in a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            detector = GradNorm.load(path, model, preprocessing=preprocessing, autocast=autocast, force=force)
        except ValueError as error:
            raise ValueError(str(error).replace("load with force=True", "give --force")) from None
    if rank_and_world()[0] == 0:
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        if preprocessing is None:
            print(
                f"warning: {path}: the model's own preprocessing has no text to compare, as a lambda", file=sys.stderr
            )
    return detector


def _detector_of(args: argparse.Namespace, weight: torch.Tensor, bias: torch.Tensor | None) -> GradNorm:
    name = args.head or "head"
    return GradNorm(_model_of(name, weight, bias), name, **score_options(args))


def _gate_of_head(path: str, weight: torch.Tensor, bias: torch.Tensor | None) -> GradNorm:
    """A saved detector for features: of the model that it was fitted to, the head alone is compared."""
    saved = gate.read(path)
    if saved.head is None:
        raise ValueError(f"{path}: fitted to gradients of layers, which take images and the model; give --images")
    model = _model_of(saved.head, weight, bias)
    if saved.tensors is None:
        same = gate.head_digest(weight, bias) == saved.head_digest
    else:
        of_head = {name: entry for name, entry in saved.tensors.items() if name.startswith(f"{saved.head}.")}
        same = not gate.differences(of_head, model)[0]
    if not same:
        raise ValueError(f"{path}: fitted to another head than that of --weight and --bias; fit it again")
    detector = GradNorm(model, saved.head, **saved.options)
    return detector if saved.calibration is None else detector.fit_scores(saved.calibration, saved.tpr)


def save_gate(detector: GradNorm, path: Path) -> None:
    """`GradNorm.save`; a head without its model is saved as a head alone."""
    if not isinstance(detector.model, _HeadAlone):
        detector.save(path)
        return
    assert detector.head_name is not None and detector._calibration is not None
    options = {name: getattr(detector, name) for name in SCORE_OPTIONS} | {"score": detector.score_name}
    calibration, digest = detector._calibration.tolist(), detector._fingerprint()
    gate.write(gate.Gate(detector.head_name, options, detector.tpr, calibration, None, None, digest), path)


class _HeadAlone(nn.Module):
    """A model of which only the head is known."""


def _model_of(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A model of the head alone, under its name in the whole model, so that its gate loads with the whole model too."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    model: nn.Module = head
    for part in reversed(name.split(".")):
        outer = _HeadAlone()
        outer.add_module(part, model)
        model = outer
    return model
