"""Real features of a trained network against scores that float64 autograd gave.

200 committed rows run everywhere. Where shared/data holds the network and its 2,000 images, these run too, from the
pixels on.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from gradnorm_fast import fast_gradnorm, head_scores
from gradnorm_fast.evaluation import evaluate

import resnet20
from conftest import DEVICE

ROWS = Path(__file__).parent / "data/cifar10_resnet20/rows.npz"


class Real(NamedTuple):
    features: torch.Tensor  # (n, 64), float32
    weight: torch.Tensor  # (10, 64)
    bias: torch.Tensor  # (10,)
    scores: dict[float, torch.Tensor]  # temperature -> (n,), float64, summed over classes
    predictions: torch.Tensor  # (n,)
    sets: np.ndarray  # (n,), "id" or the name of an OOD set


def committed_rows():
    with np.load(ROWS) as arrays:
        of = {name: arrays[name] for name in arrays}
    features, weight, bias = (torch.from_numpy(of[name]).to(DEVICE) for name in ("features", "weight", "bias"))
    scores = dict(zip(of["temperatures"].tolist(), torch.from_numpy(of["scores"]), strict=True))
    return Real(features, weight, bias, scores, torch.from_numpy(of["predictions"]), of["sets"])


def all_images():
    folder = resnet20.DATA
    network = resnet20.load(folder / "weights/resnet20-12fca82f.th").to(DEVICE)
    with open(folder / "reference_scores_T1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with torch.inference_mode():
        parts = resnet20.read_images(folder, [row["path"] for row in rows]).to(DEVICE).split(250)
        features = torch.cat([network.features(part) for part in parts])
    scores = {1.0: torch.tensor([float(row["gradnorm_T1_fp64"]) for row in rows], dtype=torch.float64)}
    predictions = torch.tensor([resnet20.CLASSES.index(row["predicted_class"]) for row in rows])
    sets = np.array(["id" if row["is_id"] == "1" else row["folder"] for row in rows])
    head = network.linear.requires_grad_(False)
    return Real(features, head.weight, head.bias, scores, predictions, sets)


# A float32 logit is off by at most 2.6e-7·Σ|x·w| <= 1.1e-5 here (docs/numerics.md), and a score by as much, relatively.
TOLERANCE = 1e-5
SOURCES = [(committed_rows, 200)] + [(all_images, 2000)] * (resnet20.DATA is not None)


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source[0].__name__)
def real(request):
    read, rows = request.param
    data = read()
    assert data.features.shape == (rows, 64)
    return data


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_match_float64_autograd(real, backend):
    for temperature, expected in real.scores.items():
        score = fast_gradnorm(
            real.features, real.weight, real.bias, temperature=temperature, reduction="sum", backend=backend
        )
        error = ((score.cpu().double() - expected) / expected).abs().max().item()
        assert error <= TOLERANCE, f"T = {temperature:g}"


def test_predictions_and_metrics_match_the_reference(real):
    scores = head_scores(real.features, real.weight, real.bias)
    assert torch.equal(scores.prediction.cpu(), real.predictions)
    gradnorm, expected = scores.gradnorm.cpu(), real.scores[1.0]
    for name in resnet20.FIGURES:
        found = evaluate(gradnorm[real.sets == "id"], gradnorm[real.sets == name])
        assert found == pytest.approx(evaluate(expected[real.sets == "id"], expected[real.sets == name]), abs=1e-4)
        if len(real.sets) == 2000:
            assert (round(100 * found["auroc"], 2), round(100 * found["fpr95_id_positive"], 2)) == resnet20.FIGURES[
                name
            ]
