"""Per-sample gradients of one parameter at one use, from the operation's input and its output's gradient.

A rule is a function with the arguments of a torch operation, preceded by the layout of the output and the number of
samples; it returns a function from the output's gradient to (parameter, SampleGradients) pairs, or raises Unsupported.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import Layout
from .norms import norm_dtype, p_norm

GROUPED_CHANNELS = 16  #: with fewer input channels, a convolution per sample is faster than samples as groups


class Unsupported(Exception):
    """No rule for this use of a parameter: its gradients need one pass per sample."""


class SampleGradients(ABC):
    """The gradients of all samples, computed a few samples at a time."""

    sample_bytes: int  #: memory that one sample takes

    @abstractmethod
    def of(self, samples: slice) -> Tensor:
        """(n, *shape of the parameter) of samples start … start + n − 1."""

    def norm(self, p: float) -> Tensor | None:
        """The norms (B,) if they can be computed without the gradients, else None."""
        return None


Gradients: TypeAlias = Iterator[tuple[Tensor, SampleGradients]]
Rule: TypeAlias = Callable[..., Callable[[Tensor], Gradients]]


class Given(SampleGradients):
    """Gradients small enough to compute all at once: (B, *shape)."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.sample_bytes = _bytes(gradient[:1])

    def of(self, samples: slice) -> Tensor:
        return self.gradient[samples]


class PerSample(SampleGradients):
    """A parameter with separate rows for each sample: the gradient of all other rows is 0."""

    def __init__(self, g: Tensor, layout: Layout, samples: int) -> None:
        self.g, self.layout, self.samples = g, layout, samples
        self.sample_bytes = _bytes(g)

    def of(self, samples: slice) -> Tensor:
        n = samples.stop - samples.start
        gradient = self.g.new_zeros(n, *self.g.shape)
        rows = self.layout.unfolded(self.g, self.samples)
        for i in range(n):
            self.layout.unfolded(gradient[i], self.samples)[samples.start + i] = rows[samples.start + i]
        return gradient


class Products(SampleGradients):
    """Σ_t g_t ⊗ x_t over the positions of a sample.  # g (B, T, O), x (B, T, I)"""

    def __init__(self, g: Tensor, x: Tensor, shape: torch.Size) -> None:
        self.g, self.x, self.shape = g, x.to(g.dtype), shape
        self.sample_bytes = shape.numel() * g.itemsize

    def of(self, samples: slice) -> Tensor:
        return (self.g[samples].mT @ self.x[samples]).view(-1, *self.shape)

    def norm(self, p: float) -> Tensor | None:
        if self.g.shape[1] != 1:
            return None
        return p_norm(self.g[:, 0], p) * p_norm(self.x[:, 0], p)


class Convolution(SampleGradients):
    """A convolution's weight gradient by the library's call, for several samples as groups of one image, or for each.

    Each sample has `images` images of the batch. A 1x1 convolution is a matrix product.
    """

    def __init__(
        self,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
        images: int,
    ) -> None:
        self.g, self.x, self.weight = g, x.to(g.dtype), weight.detach()
        self.geometry = (stride, padding, dilation, transposed, output_padding)
        self.groups, self.images = groups, images
        self.sample_bytes = _bytes(self.weight)
        self.pointwise = self.weight[0, 0].numel() == 1 and not any(padding) and not transposed
        if self.pointwise and any(step > 1 for step in stride):
            for dim, step in enumerate(stride, 2):
                self.x = self.x[(slice(None),) * dim + (slice(None, None, step),)]

    def of(self, samples: slice) -> Tensor:
        n = samples.stop - samples.start
        images = slice(samples.start * self.images, samples.stop * self.images)
        g, x = self.g[images], self.x[images]
        if self.pointwise:
            g, x = (self._positions(t, n) for t in (g, x))
            return (g @ x.mT).reshape(n, *self.weight.shape)
        if n > 1 and self.images == 1 and (self.groups > 1 or x.shape[1] >= GROUPED_CHANNELS):
            weight = self.weight.new_empty(n * len(self.weight), *self.weight.shape[1:])  # only its shape matters
            g, x = (t.reshape(1, n * t.shape[1], *t.shape[2:]) for t in (g, x))
            return self._library(g, x, weight, n * self.groups).view(n, *self.weight.shape)
        each = zip(g.split(self.images), x.split(self.images), strict=True)
        gradients = [self._library(g, x, self.weight, self.groups) for g, x in each]
        return gradients[0][None] if n == 1 else torch.stack(gradients)

    def norm(self, p: float) -> Tensor | None:
        if not self.pointwise or self.groups > 1 or self.images > 1 or self.g[0, 0].numel() != 1:
            return None
        return p_norm(self.g.flatten(1), p) * p_norm(self.x.flatten(1), p)

    def _positions(self, t: Tensor, n: int) -> Tensor:
        """(n, groups, channels of a group, positions of all images of the sample)"""
        t = t.unflatten(0, (n, self.images)).transpose(1, 2).flatten(2)
        return t.unflatten(1, (self.groups, -1))

    def _library(self, g: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(g, x, weight, None, *self.geometry, groups, mask)[1]


class Scales(SampleGradients):
    """Σ g·x̂ over the dimensions that a normalisation's scale does not have, with x̂ the normalised input.

    Args:
        g, x: (B, ...).
        normalize: maps x of some samples to x̂.
        dims: the dimensions to sum over, except dimension 0.
    """

    def __init__(self, g: Tensor, x: Tensor, normalize: Callable[[Tensor], Tensor], dims: tuple[int, ...]) -> None:
        self.g, self.x, self.normalize, self.dims = g, x, normalize, dims
        self.sample_bytes = 2 * _bytes(x[:1])

    def of(self, samples: slice) -> Tensor:
        product = self.normalize(self.x[samples]).mul_(self.g[samples])
        return product.sum(self.dims, dtype=norm_dtype(product.dtype)) if self.dims else product


class Rows(SampleGradients):
    """Gradients of the table rows that a sample looks up; 0 for all other rows.  # ids (B, T), g (B, T, D)"""

    def __init__(self, g: Tensor, ids: Tensor, shape: torch.Size, padding: int) -> None:
        self.g, self.ids, self.shape = g.masked_fill((ids == padding)[..., None], 0.0), ids, shape
        self.sample_bytes = shape.numel() * g.itemsize

    def of(self, samples: slice) -> Tensor:
        g, ids = self.g[samples], self.ids[samples]
        table = g.new_zeros(len(g), *self.shape)
        return table.scatter_add_(1, ids[..., None].expand_as(g), g)

    def norm(self, p: float) -> Tensor:
        norms = []
        for g, ids in zip(self.g, self.ids, strict=True):
            looked_up, places = ids.unique(return_inverse=True)
            rows = g.new_zeros(len(looked_up), g.shape[1], dtype=norm_dtype(g.dtype))
            norms.append(p_norm(rows.index_add_(0, places, g.to(rows.dtype)).flatten(), p, dim=0))
        return torch.stack(norms)


# Rules


def linear(layout: Layout, samples: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() != 2 or layout.dim > len(layout.sizes) - 2:
        raise Unsupported
    x = _unchanged(input)

    def gradients(g: Tensor) -> Gradients:
        g = layout.unfolded(g, samples).flatten(1, -2)
        yield weight, Products(g, layout.unfolded(x(), samples).flatten(1, -2), weight.shape)
        if bias is not None:
            yield bias, _sums(g, (1,))

    return gradients


def convolution(
    layout: Layout,
    samples: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    output_padding: Any = 0,
    transposed: bool = False,
) -> Any:
    spatial = weight.dim() - 2
    if not layout.leading or input.dim() != weight.dim():
        raise Unsupported
    stride, dilation, output_padding = (_each(n, spatial) for n in (stride, dilation, output_padding))
    before: list[int] = []  # the padding for "same" where it is uneven
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [n // 2 for n in total]
        if any(n % 2 for n in total):
            before = [side for n in reversed(total) for side in (n // 2, n - n // 2)]
            padding = [0] * spatial
    padding = [0] * spatial if padding == "valid" else _each(padding, spatial)
    x = _unchanged(input)

    def gradients(g: Tensor) -> Gradients:
        given = pad(x(), before) if before else x()
        yield (
            weight,
            Convolution(g, given, weight, stride, padding, dilation, transposed, output_padding, groups, layout.inner),
        )
        if bias is not None:
            yield bias, _sums(g.unflatten(0, (samples, layout.inner)), (1, *range(3, g.dim() + 1)))

    return gradients


def transposed_convolution(
    layout: Layout,
    samples: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    return convolution(
        layout, samples, input, weight, bias, stride, padding, dilation, groups, output_padding, transposed=True
    )


def batch_norm(
    layout: Layout,
    samples: int,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    if not layout.leading or running_mean is None or running_var is None:
        raise Unsupported
    value = _unchanged(input)

    def gradients(g: Tensor) -> Gradients:
        """By the library's call, with all samples' channels as the channels of one image."""
        dtype, channels = norm_dtype(g.dtype), samples * g.shape[1]
        g, x = (
            t.to(dtype).unflatten(0, (samples, layout.inner)).transpose(1, 2).reshape(1, channels, -1)
            for t in (g, value())
        )
        statistics = (t.to(dtype).repeat(samples) for t in (running_mean, running_var))
        wanted = [False, weight is not None, bias is not None]
        found = torch.ops.aten.native_batch_norm_backward(g, x, None, *statistics, None, None, False, eps, wanted)
        for parameter, gradient in zip((weight, bias), found[1:], strict=True):
            if parameter is not None:
                yield parameter, Given(gradient.view(samples, -1))

    return gradients


def group_norm(
    layout: Layout,
    samples: int,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    def normalize(x: Tensor) -> Tensor:
        return torch.group_norm(x, num_groups, None, None, eps, cudnn_enabled)

    return _channels(layout, samples, input, weight, bias, normalize)


def instance_norm(
    layout: Layout,
    samples: int,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    stats = (None, None) if use_input_stats else (running_mean, running_var)

    def normalize(x: Tensor) -> Tensor:
        return torch.instance_norm(x, None, None, *stats, use_input_stats, 0.0, eps, cudnn_enabled)

    return _channels(layout, samples, input, weight, bias, normalize)


def layer_norm(
    layout: Layout,
    samples: int,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    shape = list(normalized_shape)

    def normalize(x: Tensor) -> Tensor:
        return torch.layer_norm(x, shape, None, None, eps, cudnn_enable)

    return _trailing(layout, samples, input, len(shape), weight, bias, normalize)


def rms_norm(
    layout: Layout,
    samples: int,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    shape = list(normalized_shape)

    def normalize(x: Tensor) -> Tensor:
        return torch.rms_norm(x, shape, None, eps)

    return _trailing(layout, samples, input, len(shape), weight, None, normalize)


def embedding(
    layout: Layout,
    samples: int,
    weight: Tensor,
    input: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if scale_grad_by_freq or layout.dim > len(layout.sizes) - 2:
        raise Unsupported
    ids = _unchanged(input)

    def gradients(g: Tensor) -> Gradients:
        g = layout.unfolded(g, samples).flatten(1, -2)
        yield weight, Rows(g, layout.unfolded(ids(), samples).flatten(1), weight.shape, padding_idx)

    return gradients


def _channels(
    layout: Layout,
    samples: int,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
) -> Any:
    """A normalisation with a scale and a bias for each channel, dimension 1."""
    if not layout.leading:
        raise Unsupported
    value = _unchanged(input)

    def gradients(g: Tensor) -> Gradients:
        x, images = value(), layout.inner
        dims = (1, *range(3, g.dim() + 1))  # all but samples and channels, after images are unfolded
        g, x = (t.unflatten(0, (samples, images)) for t in (g, x))

        def each(x: Tensor) -> Tensor:
            return normalize(x.flatten(0, 1)).unflatten(0, (-1, images))

        if weight is not None:
            yield weight, Scales(g, x, each, dims)
        if bias is not None:
            yield bias, _sums(g, dims)

    return gradients


def _trailing(
    layout: Layout,
    samples: int,
    input: Tensor,
    depth: int,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
) -> Any:
    """A normalisation over the last `depth` dimensions; scale and bias have the shape of these."""
    if layout.dim >= len(layout.sizes) - depth:
        raise Unsupported
    value = _unchanged(input)

    def gradients(g: Tensor) -> Gradients:
        g, x = layout.unfolded(g, samples), layout.unfolded(value(), samples)
        dims = tuple(range(1, g.dim() - depth))
        if weight is not None:
            yield weight, Scales(g, x, normalize, dims)
        if bias is not None:
            yield bias, _sums(g, dims)

    return gradients


RULES: dict[str, Rule] = {
    "linear": linear,
    **{f"conv{n}d": convolution for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": transposed_convolution for n in (1, 2, 3)},
    "batch_norm": batch_norm,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "embedding": embedding,
}


def _sums(g: Tensor, dims: tuple[int, ...]) -> Given:
    """Σ g over some dimensions: the gradient of a bias."""
    return Given(g.sum(dims, dtype=norm_dtype(g.dtype)) if dims else g)


def _unchanged(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that returns the tensor in the backward pass; it raises Unsupported if the tensor was overwritten."""
    kept, version = tensor.detach(), tensor._version

    def value() -> Tensor:
        if kept._version != version:
            raise Unsupported
        return kept

    return value


def _each(n: Any, count: int) -> list[int]:
    values = [n] if isinstance(n, int) else list(n)
    return values * count if len(values) == 1 else values


def _bytes(t: Tensor) -> int:
    return math.prod(t.shape) * t.itemsize
