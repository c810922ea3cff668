"""The CIFAR-10 network whose features are in tests/data/cifar10_resnet20.

Where shared/data holds its weights and 2,000 images, these too.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

PLACES = [folder / "shared/data/cifar10_resnet20" for folder in Path(__file__).resolve().parents[1:3]]
DATA = next((place for place in PLACES if place.is_dir()), None)
# GradNorm's AUROC and FPR95 (ID positive) on the 2,000 images, in %, as published with them.
FIGURES = {"imagenet_resize": (65.50, 82.25), "textures": (81.91, 46.50), "uniform_noise": (70.22, 93.50)}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.stride, self.widen = (2, (outputs - inputs) // 2) if outputs > inputs else (1, 0)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.widen, self.widen))
        return relu(y + shortcut)


class ResNet20(nn.Module):
    """The CIFAR-10 network of He et al. (2016), with parameter-free shortcuts."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def features(self, images):
        return self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(images)))))).mean((2, 3))

    def forward(self, images):
        return self.linear(self.features(images))


def load(checkpoint: Path) -> ResNet20:
    """The network of github.com/akamaster/pytorch_resnet_cifar10, in evaluation mode."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    network = ResNet20()
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return network.eval()


def read_images(folder: Path, paths: list[str]) -> Tensor:
    """Images of 32x32 pixels as the network expects them: (n, 3, 32, 32), float32."""
    from PIL import Image

    pixels = np.stack([np.array(Image.open(folder / path).convert("RGB")) for path in paths])
    return ((torch.from_numpy(pixels).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()
