"""2,000 real images through a real network, against scores that float64 autograd gave, network included."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from gradnorm_fast import fast_gradnorm, head_scores

from conftest import DEVICE
from resnet20 import ResNet20

PLACES = [folder / "shared/data/cifar10_resnet20" for folder in Path(__file__).resolve().parents[1:3]]
DATA = next((place for place in PLACES if place.is_dir()), None)
pytestmark = pytest.mark.skipif(DATA is None, reason=f"no images and weights at {' or '.join(map(str, PLACES))}")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
FIGURES = {"imagenet_resize": (65.50, 82.25), "textures": (81.91, 46.50), "uniform_noise": (70.22, 93.50)}


@pytest.fixture(scope="module")
def real():
    """(rows of the reference table, float32 features (2000, 64), head)."""
    from PIL import Image

    state = torch.load(DATA / "weights/resnet20-12fca82f.th", map_location="cpu", weights_only=True)["state_dict"]
    network = ResNet20()
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    network.eval().to(DEVICE)
    with open(DATA / "reference_scores_T1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pixels = [np.array(Image.open(DATA / row["path"]).convert("RGB")) for row in rows]
    for row, image in zip(rows, pixels, strict=True):
        assert abs(int(image.sum(dtype=np.int64)) - int(row["pixel_sum"])) <= 300, f"{row['path']} decodes differently"
    images = (torch.from_numpy(np.stack(pixels)).float() / 255 - MEAN) / STD
    with torch.inference_mode():
        parts = images.permute(0, 3, 1, 2).contiguous().to(DEVICE).split(250)
        features = torch.cat([network.features(part) for part in parts])
    return rows, features, network.linear


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_match_the_reference(real, backend):
    rows, features, head = real
    expected = torch.tensor([float(row["gradnorm_T1_fp64"]) for row in rows], dtype=torch.float64)
    assert len(rows) == 2000
    with torch.inference_mode():
        score = fast_gradnorm(features, head.weight, head.bias, reduction="sum", backend=backend)
    assert ((score.cpu().double() - expected) / expected).abs().max() <= 1e-5


def test_predictions_and_metrics_match_the_reference(real):
    from gradnorm_fast.evaluation import evaluate

    rows, features, head = real
    with torch.inference_mode():
        scores = head_scores(features, head.weight, head.bias)
    classes = sorted({row["folder"] for row in rows if row["is_id"] == "1"})
    assert [classes[i] for i in scores.prediction.tolist()] == [row["predicted_class"] for row in rows]
    of = {name: scores.gradnorm[[row["folder"] == name for row in rows]].cpu() for name in FIGURES}
    inside = scores.gradnorm[[row["is_id"] == "1" for row in rows]].cpu()
    for name, (auroc, fpr95) in FIGURES.items():
        metrics = evaluate(inside, of[name])
        assert round(100 * metrics["auroc"], 2) == auroc and round(100 * metrics["fpr95_id_positive"], 2) == fpr95
