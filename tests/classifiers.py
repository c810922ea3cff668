"""A small classifier and its images, for the tests of the detector."""

import torch
from torch import nn

from gradnorm_fast.reference import autograd_gradnorm

from conftest import DEVICE


class Small(nn.Module):
    def __init__(self, bias=True, output=lambda z: z):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(8, 8, bias=bias)
        self.output = output

    def forward(self, x):
        return self.output(self.fc(self.body(x)))


def small(**options):
    torch.manual_seed(0)
    return Small(**options).to(DEVICE).eval()


def images(n=6, seed=1, size=12):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def truth(model, x, **options):
    features = model.body(x).double()
    bias = None if model.fc.bias is None else model.fc.bias.double()
    return autograd_gradnorm(features, model.fc.weight.double(), bias, **options)


def loader(n, seed, batch=8):
    return [(part, torch.zeros(len(part))) for part in images(n, seed).split(batch)]


class Calls(Small):
    """Calls its head in another way."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(self.fc, self.body(x))
