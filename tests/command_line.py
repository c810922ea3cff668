"""The command line as tests call it, and a folder to call it in."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from gradnorm_fast import GradNorm, cli

MODEL = """
import torch
def small():
    torch.manual_seed(0)
    pooled = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), *pooled, torch.nn.Linear(8, 5))
def no_model():
    return 3
def other():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
def broken():
    raise KeyError("broken")
def no_tensor():
    return small(), lambda image: image
"""
RUN = ("--device", "cpu", "--quiet", "--workers", "0")
MODEL_RUN = ("--model", "own:small", *RUN)
SCORE = ("score", *MODEL_RUN)
FEATURES_RUN = ("--device", "cpu", "--quiet", "--weight", "W.npy", "--bias", "b.npy")


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two folders of images, a model of one's own, and features with their head."""
    random = np.random.default_rng(0)
    for name, n in (("id", 20), ("ood", 12)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(n):
            pixels = random.integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / ("deep" if i % 3 else ".") / f"{i:02}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.py").write_text(MODEL)
    for name, shape in (("F", (3000, 6)), ("G", (200, 6)), ("W", (4, 6)), ("b", (4,))):
        np.save(tmp_path / f"{name}.npy", random.standard_normal(shape, dtype=np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command line adds to it
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): the nth batch from now on ends in Ctrl-C; returns the list of batch sizes as they come."""
    real = GradNorm.head_scores

    def after(n):
        sizes = []

        def interrupted(self, images):
            sizes.append(len(images))
            if len(sizes) == n:
                raise KeyboardInterrupt
            return real(self, images)

        monkeypatch.setattr(GradNorm, "head_scores", interrupted)
        return sizes

    return after
