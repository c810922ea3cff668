"""The shapes, dtypes and inputs of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """features (batch, depth) under a head of `classes` classes."""

    batch: int
    depth: int
    classes: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.batch}x{self.depth}x{self.classes} {self.dtype}"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.depth * self.classes

    @property
    def bytes(self) -> int:
        """The least possible traffic: features, weight, bias and scores once each."""
        inputs = self.batch * self.depth + self.classes * self.depth + self.classes
        return inputs * self.itemsize + 4 * self.batch

    def inputs(self, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Features as after ReLU and pooling, a weight that makes logits of unit size, a bias."""
        g = torch.Generator().manual_seed(seed)
        shapes = (self.batch, self.depth), (self.classes, self.depth), (self.classes,)
        x, weight, bias = (torch.randn(*s, generator=g).to(device, DTYPES[self.dtype]) for s in shapes)
        return x.relu_(), weight / self.depth**0.5, bias


SHAPES = [
    (10000, 512, 10), (10000, 512, 100),  # CIFAR: all classes in one tile
    (1, 2048, 1000), (32, 2048, 1000), (256, 2048, 1000), (4096, 2048, 1000), (50000, 2048, 1000),  # ImageNet-1k
    (4096, 768, 1000), (4096, 2048, 21843), (4096, 4096, 128256),  # a ViT, ImageNet-21k, a vocabulary
]  # fmt: skip
# The most important dtype first, in case time runs out.
GPU = [Workload(*shape, dtype) for dtype in ("bfloat16", "float32", "float16") for shape in SHAPES]
CPU = [
    Workload(10000, 512, 10), Workload(10000, 512, 100),
    Workload(1, 2048, 1000), Workload(32, 2048, 1000), Workload(256, 2048, 1000), Workload(1024, 2048, 1000),
    Workload(256, 768, 1000), Workload(64, 2048, 21843), Workload(256, 2048, 1000, "bfloat16"),
]  # fmt: skip


def for_device(device: str) -> dict[str, Workload]:
    return {str(w): w for w in (GPU if device.startswith("cuda") else CPU)}
