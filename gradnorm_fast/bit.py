"""BiT-S R101x1, the network of the GradNorm paper, and its published weights.

Big Transfer (Kolesnikov et al., ECCV 2020): a ResNet-v2 with group normalisation and standardised weights. Parameters
have the names of the authors' torch code, so that checkpoints trained with it load as they are.
"""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 480  #: pixels of a side, as the paper evaluates it
_GROUPS = 32


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters are brought to mean 0 and variance 1 before each use (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Unit(nn.Module):
    """A bottleneck, normalised before each convolution; a shortcut to another shape starts from the first of those."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        middle = outputs // 4
        self.gn1, self.conv1 = nn.GroupNorm(_GROUPS, inputs), _conv(inputs, middle, 1)
        self.gn2, self.conv2 = nn.GroupNorm(_GROUPS, middle), _conv(middle, middle, 3, stride)
        self.gn3, self.conv3 = nn.GroupNorm(_GROUPS, middle), _conv(middle, outputs, 1)
        self.downsample = _conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.gn2(y)))
        return shortcut + self.conv3(F.relu(self.gn3(y)))


class ResNetV2(nn.Module):
    """Images (B, 3, H, W) to logits (B, classes).

    Args:
        units: in each block; the first unit of every block but the first halves the image.
        channels: of the first convolution, a multiple of 32; blocks have 4, 8, 16, 32 times as many.
        classes: of the head.
    """

    def __init__(self, units: tuple[int, ...] = (3, 4, 23, 3), channels: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.root = nn.Sequential(
            OrderedDict(
                conv=_conv(3, channels, 7, 2),
                pad=nn.ZeroPad2d(1),  # zeros take part in the maximum, where padding of the pool itself would not
                pool=nn.MaxPool2d(3, 2),
            )
        )
        blocks, inputs = OrderedDict[str, nn.Module](), channels
        for b, count in enumerate(units):
            outputs = 4 * channels * 2**b
            block = OrderedDict[str, nn.Module]()
            for u in range(count):
                block[f"unit{u + 1:02}"] = Unit(inputs, outputs, 2 if b and not u else 1)
                inputs = outputs
            blocks[f"block{b + 1}"] = nn.Sequential(block)
        self.body = nn.Sequential(blocks)
        norm = nn.GroupNorm(_GROUPS, inputs)
        self.before_head = nn.Sequential(OrderedDict(gn=norm, relu=nn.ReLU(), avg=nn.AdaptiveAvgPool2d(1)))
        self.head = nn.Sequential(OrderedDict(conv=nn.Conv2d(inputs, classes, 1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.before_head(self.body(self.root(images)))).flatten(1)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> StandardizedConv2d:
    return StandardizedConv2d(inputs, outputs, size, stride, size // 2, bias=False)


def load_npz(model: ResNetV2, path: str | os.PathLike[str]) -> None:
    """Load weights as the BiT authors publish them, reading the file without executing anything.

    ValueError where the file is no such thing or of another network, naming the file and the array.
    """
    name = os.fspath(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key.startswith("resnet/")}
            some = ", ".join(file.files[:3]) or "none"
    except FileNotFoundError:
        raise ValueError(f"checkpoint: no file {name}") from None
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint: cannot read {name} as weights in .npz: {error}") from None
    if not arrays:
        raise ValueError(f"checkpoint: expected arrays named resnet/... in {name}, as in BiT-S-R101x1.npz, got {some}")
    state = {}
    for parameter, value in model.state_dict().items():
        key = array_name(parameter)
        if key not in arrays:
            raise ValueError(f"checkpoint: expected the array {key} in {name}; is it of another network?")
        array = arrays.pop(key)
        if array.ndim == 4:  # height, width, inputs, outputs
            array = array.transpose(3, 2, 0, 1)
        if array.dtype.kind != "f" or array.shape != tuple(value.shape):
            raise ValueError(
                f"checkpoint: expected {tuple(value.shape)} floats in {key} of {name}, got {array.shape} {array.dtype}"
                + ("; --classes C says how many classes there are" if key.startswith("resnet/head/") else "")
            )
        state[parameter] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if arrays:
        raise ValueError(f"checkpoint: {name} is of another network: it has {next(iter(arrays))} too")
    model.load_state_dict(state)


def array_name(parameter: str) -> str:
    """The name in a published .npz file of a parameter of `ResNetV2`.

    >>> array_name("body.block1.unit01.gn2.bias")
    'resnet/block1/unit01/b/group_norm/beta'
    """
    part, *place, layer, field = parameter.split(".")
    if part == "head":
        return f"resnet/head/conv2d/{'kernel' if field == 'weight' else 'bias'}"
    if part == "root":
        place = ["root_block"]
    elif part == "body":
        place.append("a/proj" if layer == "downsample" else "abc"[int(layer[-1]) - 1])
    names = {"weight": "gamma", "bias": "beta"}
    ending = f"group_norm/{names[field]}" if layer.startswith("gn") else "standardized_conv2d/kernel"
    return "/".join(["resnet", *place, ending])
