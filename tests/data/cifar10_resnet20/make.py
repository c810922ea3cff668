"""Write rows.npz from the network's checkpoint and its images.

    python tests/data/cifar10_resnet20/make.py FOLDER    with weights/, images/ and reference_scores_T1.csv

The scores come from torch.autograd in float64, one row at a time. Nothing of gradnorm_fast takes part.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from resnet20 import CLASSES, load, read_images  # noqa: E402

TEMPERATURES = (1.0, 2.0, 1000.0)
PER_CLASS = 10
PER_SET = {"imagenet_resize": 40, "textures": 40, "uniform_noise": 20}


def scores(features: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> list[float]:
    """The L1 norm of the weight's gradient of Σ_c −log p_c, for each row by itself."""
    found = []
    for row in features.double():
        w = weight.double().requires_grad_()
        logits = torch.nn.functional.linear(row, w, bias.double())
        loss = -torch.log_softmax(logits / temperature, 0).sum()
        found.append(torch.autograd.grad(loss, w)[0].abs().sum().item())
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    with open(folder / "reference_scores_T1.csv", newline="") as file:
        table = list(csv.DictReader(file))
    chosen = []
    for name, count in dict.fromkeys(CLASSES, PER_CLASS).items() | PER_SET.items():
        of_folder = [row for row in table if row["folder"] == name]
        chosen += of_folder[:: len(of_folder) // count][:count]
    chosen.sort(key=lambda row: row["path"])
    network = load(folder / "weights/resnet20-12fca82f.th")
    with torch.no_grad():
        features = network.features(read_images(folder, [row["path"] for row in chosen]))
    weight, bias = network.linear.weight.detach(), network.linear.bias.detach()
    np.savez_compressed(
        HERE / "rows.npz",
        features=features.numpy(),
        weight=weight.numpy(),
        bias=bias.numpy(),
        temperatures=np.array(TEMPERATURES),
        scores=np.array([scores(features, weight, bias, t) for t in TEMPERATURES]),
        predictions=(features.double() @ weight.double().T + bias.double()).argmax(1).numpy(),
        sets=np.array(["id" if row["is_id"] == "1" else row["folder"] for row in chosen]),
    )


if __name__ == "__main__":
    main()
