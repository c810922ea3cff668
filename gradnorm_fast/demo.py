"""The demonstration: GradNorm beside four other scores, on real images that come with scikit-learn.

A small convolutional network learns the handwritten digits 0-6. It is then shown what it has never seen: the digits
7-9, digits with inverted contrast, patches of photographs, and noise. Nothing is downloaded.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import HeadScores, fast_gradnorm, head_scores
from ._progress import with_bar
from .evaluation import METHODS, Results, compare_methods, plot_roc, plot_scores
from .models import device_of
from .reference import autograd_gradnorm

ID_DIGITS = 7  # the classes 0-6 are trained on, 7-9 are held out
CONTRAST = 0.5  # between the darkest and the brightest pixel of a photograph's patch: most patches are sky or wall
REPEATS = 50  # timings of fast_gradnorm, of which the median is taken


class Data(NamedTuple):
    """Images of shape (n, 1, 8, 8) with values in [0, 1] and labels of shape (n,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    ood_images: dict[str, Tensor]


class Network(nn.Module):
    """Five 3x3 convolutions, global average pooling and a linear head, the shape of the paper's networks in small."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in (32, 32, 64, 64, 128):
            if width > channels > 1:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def run(
    output: str | Path = "gradnorm_demo.png", device: str | torch.device | None = None, seed: int = 0
) -> dict[str, Any]:
    """Train the network, score the test images and every OOD set, print the comparison and draw it.

    Args:
        output: the PNG file to write; its folder must exist.
        device: by default a CUDA GPU where there is one.
        seed: seed of the split, the training, the patches and the noise.

    Returns:
        A dictionary: ``accuracy`` on the test images; ``results`` of `gradnorm_fast.evaluation.compare_methods`;
        ``largest_relative_difference`` of `fast_gradnorm` from float64 autograd; ``batch_size``, ``fast_seconds``,
        ``autograd_seconds`` and ``speedup`` of the timing; ``device``; ``output``, the absolute path of the picture.

    Raises:
        ValueError: the output cannot be written or the seed is out of range. Both are found before the training.
        ImportError: scikit-learn or matplotlib is not installed.
    """
    require("demo", "matplotlib", "sklearn")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 to 2**32 - 1, got {seed}")
    path = check_output(Path(output))
    chosen = device_of(device)

    data = load_data(seed)
    print(f"ID: digits 0-{ID_DIGITS - 1}, {len(data.train_images)} for training, {len(data.test_images)} for testing")
    network = train(data.train_images, data.train_labels, chosen, seed)

    with torch.no_grad():  # not inference_mode: the autograd loop reads these features too
        features = network.body(data.test_images.to(chosen))
        ood_features = {name: network.body(images.to(chosen)) for name, images in data.ood_images.items()}
        weight, bias = network.head.weight.detach(), network.head.bias.detach()
        id_scores = head_scores(features, weight, bias)
        ood_scores = {name: head_scores(x, weight, bias) for name, x in ood_features.items()}

    accuracy = (id_scores.prediction.cpu() == data.test_labels).double().mean().item()
    results = compare_methods(id_scores, ood_scores)
    print(f"test accuracy: {accuracy:.1%}\n")
    print(_table(results) + "\n")
    print(_verdict(results["average"]) + "\n")
    speed = compare_with_autograd(features, weight, bias)
    print(describe(speed, features, weight) + "\n")
    draw(path, data, id_scores, ood_scores)
    print(f"picture: {path}")
    return {"accuracy": accuracy, "results": results, **speed, "device": str(chosen), "output": str(path)}


def load_data(seed: int) -> Data:
    """Split the ID digits into training (60 %) and test images, and gather the OOD sets."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = digits.images / 16, digits.target
    is_id = labels < ID_DIGITS
    train_x, test_x, train_y, test_y = train_test_split(
        images[is_id], labels[is_id], test_size=0.4, stratify=labels[is_id], random_state=seed
    )
    random = np.random.default_rng(seed)
    ood = {
        f"digits {ID_DIGITS}-9": images[~is_id],
        "inverted digits": 1 - test_x,
        "photo patches": _patches(len(test_x), random),
        "noise": random.uniform(size=test_x.shape),
    }
    return Data(
        _to_tensor(train_x),
        torch.as_tensor(train_y),
        _to_tensor(test_x),
        torch.as_tensor(test_y),
        {name: _to_tensor(x) for name, x in ood.items()},
    )


def _patches(count: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Patches of 8x8 pixels with contrast, from scikit-learn's photographs in turn: (count, 8, 8)."""
    from sklearn.datasets import load_sample_images

    photographs = [photograph.mean(axis=2) / 255 for photograph in load_sample_images().images]
    patches: list[np.ndarray[Any, Any]] = []
    while len(patches) < count:
        photograph = photographs[len(patches) % len(photographs)]
        top, left = (random.integers(0, side - 8, endpoint=True) for side in photograph.shape)
        patch = photograph[top : top + 8, left : left + 8]
        if np.ptp(patch) >= CONTRAST:
            patches.append(patch)
    return np.stack(patches)


def train(images: Tensor, labels: Tensor, device: torch.device, seed: int, epochs: int = 15) -> Network:
    """Train the network with Adam and cross-entropy; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = Network(int(labels.max()) + 1).to(device)
        images, labels = images.to(device), labels.to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in with_bar(range(epochs), "training", "epoch"):
            for batch in torch.randperm(len(images)).to(device).split(64):
                loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


def compare_with_autograd(features: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float]:
    """How far `fast_gradnorm` is from float64 autograd, and how much faster it is than a loop over the samples."""
    exact = autograd_gradnorm(features.double(), weight.double(), bias.double())
    fast = fast_gradnorm(features, weight, bias).double()
    difference = ((fast - exact).abs() / exact.abs()).max().item()
    return {"largest_relative_difference": difference, **time_both(features, weight, bias)}


def time_both(features: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float]:
    """Time `fast_gradnorm` (median of `REPEATS`) and the per-sample autograd loop (once) on the same features.

    On one thread: on a busy machine several wait for one another longer than so small a batch takes.
    """

    def seconds(score: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        score(x, weight, bias)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            seconds(fast_gradnorm, features)
        seconds(autograd_gradnorm, features[:20])  # warm-up as well
        fast = statistics.median(seconds(fast_gradnorm, features) for _ in range(REPEATS))
        loop = seconds(autograd_gradnorm, features)
    finally:
        torch.set_num_threads(threads)
    return {"batch_size": len(features), "fast_seconds": fast, "autograd_seconds": loop, "speedup": loop / fast}


def draw(path: Path, data: Data, id_scores: HeadScores, ood_scores: Mapping[str, HeadScores]) -> None:
    """Write the picture: examples of every set, the GradNorm histograms and the ROC curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface: pyplot would touch the caller's figures and choose a window system.
    figure = Figure(figsize=(12, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 3.6]).ravel()

    examples = {f"ID: digits 0-{ID_DIGITS - 1}": data.test_images, **data.ood_images}
    for index, (ax, (name, images)) in enumerate(zip(top.subplots(1, len(examples)), examples.items(), strict=True)):
        tiles = nn.functional.pad(images[:8, 0], (1, 1, 1, 1), value=1.0)  # white frames, two rows of four
        ax.imshow(tiles.reshape(2, 4, 10, 10).transpose(1, 2).reshape(20, 40).numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_title(name, fontsize=10, color=f"C{index - 1}" if index else "0.35")
        ax.axis("off")

    left, right = bottom.subplots(1, 2)
    gradnorm = {name: scores.gradnorm for name, scores in ood_scores.items()}
    plot_scores(id_scores.gradnorm, gradnorm, left, xlabel="GradNorm score (larger = more in-distribution)")
    plot_roc(id_scores.gradnorm, gradnorm, right)
    left.set_title("GradNorm scores")
    right.set_title("ROC of the GradNorm score")
    for ax, columns in ((left, 3), (right, 2)):
        ax.spines[["top", "right"]].set_visible(False)
        # Below the axes, where it hides no curve.
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns)
    figure.savefig(path, format="png")


def _table(results: Results) -> str:
    lines = [
        "AUROC (higher is better) and FPR95, ID positive (lower is better), in %:",
        " " * 13 + "".join(f"{name:>17}" for name in results),
        " " * 13 + f"{'AUROC':>10}{'FPR95':>7}" * len(results),
    ]
    for method in METHODS:
        cells = ((of_set[method]["auroc"], of_set[method]["fpr95_id_positive"]) for of_set in results.values())
        lines.append(f"{method:<13}" + "".join(f"{100 * auroc:>10.2f}{100 * fpr:>7.2f}" for auroc, fpr in cells))
    return "\n".join(lines)


def _verdict(average: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for name, key, sign in (("AUROC", "auroc", -1), ("FPR95", "fpr95_id_positive", 1)):
        ranking = sorted(METHODS, key=lambda method: sign * average[method][key])
        rank = ranking.index("GradNorm") + 1
        standing = "the best" if rank == 1 else f"number {rank} of {len(ranking)}; {ranking[0]} is the best"
        lines.append(f"By average {name}, GradNorm is {standing}.")
    return "\n".join([*lines, "One small network and one seed: an illustration, not a benchmark."])


def describe(speed: Mapping[str, float], features: Tensor, weight: Tensor) -> str:
    """The result of `compare_with_autograd` as text."""
    batch, width = features.shape
    return "\n".join(
        [
            f"fast_gradnorm against autograd on the same features ({batch} x {width}, {len(weight)} classes, "
            f"{features.device}):",
            f"  largest relative difference: {speed['largest_relative_difference']:.1e} "
            f"(fast_gradnorm in {str(features.dtype).removeprefix('torch.')}, autograd in float64)",
            f"  fast_gradnorm: {1e3 * speed['fast_seconds']:.3f} ms for the batch "
            f"(median of {REPEATS} after warm-up; one CPU thread)",
            f"  autograd, sample by sample: {1e3 * speed['autograd_seconds']:.1f} ms (timed once)",
            f"  speed-up: {speed['speedup']:.0f} x, for the head alone",
        ]
    )


def _to_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    return torch.as_tensor(images, dtype=torch.float32).unsqueeze(1)


def require(extra: str, *modules: str) -> None:
    """ImportError with what to install where a module is not there."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ImportError(f'the demo needs {module}: pip install "gradnorm_fast[{extra}]"') from error


def check_output(path: Path) -> Path:
    """Return the absolute path, or say why no PNG can be written there."""
    path = path.absolute()
    if path.suffix.lower() != ".png":
        raise ValueError(f"output: expected a name ending in .png, got {path.name!r}")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"output: cannot write {path}: not a regular file")
    try:
        existed = os.path.lexists(path)
        path.open("ab").close()  # trying is the only sure test, and appending nothing changes nothing
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"output: cannot write {path}: {error.strerror}") from error
    return path
