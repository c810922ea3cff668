"""Does the head still make the model's logits? One row of each batch is held against x·Wᵀ + b.

The closed form is the gradient of a linear layer whose output is the logits. A hook, an adapter or a scale added after
the head leaves the pass running and the scores wrong, so every batch is checked.

The tolerance. Let S_c = |x|·|W_c| + |b_c|, n = D + 1 the terms of a sum, ε the machine epsilon (twice the unit
roundoff) of the coarsest format in force: that of the features, the weight, the logits, of autocast or TF32.

- Rounding x, W and the logit to that format moves the logit by at most 3·ε/2·S_c; we allow 2ε·S_c.
- Sums are kept in float32 (float64 for float64), epsilon ε'. Taking the rounding errors of a sum, term by term, as
  independent and uniform within ε'/2 of partial sums that grow to S_c, their standard deviation is √n·ε'·S_c/6; that
  of two sums, the model's and ours, √(n/18)·ε'·S_c. We allow 4√n·ε'·S_c, 17 times that.

So |z_c − (x·W_c + b_c)| ≤ c·ε·S_c with c = 2 + 4√n·ε'/ε: c = 2 + 4√n in float32, about 2 in half precision and TF32.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._autocast import autocasting, without_autocast

_PIECE = 1 << 22  # elements of the weight taken at a time: 16 MiB of scratch


class Verification:
    """One row's logits beside x·Wᵀ + b. `failed` is a bool on the model's device: asking for it need not wait."""

    def __init__(
        self, name: str, head: nn.Module, row: int, logits: Tensor, product: Tensor, tolerance: Tensor, largest: float
    ) -> None:
        self.name, self.head, self.row = name, head, row
        self.logits, self.product, self.tolerance = logits, product, tolerance  # each (C,)
        known = product.abs() + tolerance <= largest  # not in rows of NaN, masked classes, nor where halves overflow
        self.excess = torch.where(known, (logits - product).abs() - tolerance, -torch.inf)
        self.failed = ~(self.excess <= 0).all()  # a NaN logit where the product is finite fails too

    def raise_if_failed(self) -> None:
        """Raise ValueError with both numbers if the row failed. Waits for the device."""
        if self.failed.item():
            raise ValueError(self._message())

    def _message(self) -> str:
        c = int(self.excess.nan_to_num(torch.inf, torch.inf, -torch.inf).argmax())
        logit, product, tolerance = (t[c].item() for t in (self.logits, self.product, self.tolerance))
        message = (
            f"head: {self.name!r}, a {type(self.head).__name__}, does not make the model's logits: in row {self.row} "
            f"of the batch the logit of class {c} is {logit:.9g}, x·Wᵀ + b is {product:.9g}; rounding explains a "
            f"difference of {tolerance:.2g} at most"
        )
        scale = constant_ratio(self.logits, self.product, self.tolerance)
        if scale is not None:
            return f"{message}. {scaled(scale)}"
        return (
            f"{message}. Something besides that product makes them: a hook, an adapter (merge LoRA weights first), "
            f"quantisation-aware training, or a layer that normalises. {BY_HAND}"
        )


BY_HAND = "Or take features and weight by hand: fast_gradnorm(features, weight, bias)"


def scaled(scale: float) -> str:
    """What to do about logits that are a multiple of the head's output."""
    return (
        f"All logits are {scale:.6g} times the head's output: take that scale off the model and give its reciprocal as "
        f"the temperature, GradNorm(model, temperature={1 / scale:.6g})"
    )


def constant_ratio(logits: Tensor, product: Tensor, tolerance: Tensor) -> float | None:
    """k > 0 if logits = k·product up to rounding; None if there is no such k."""
    if not (logits.isfinite() & product.isfinite()).all() or not product.any():
        return None
    k = ((logits.double() @ product.double()) / (product.double() @ product.double())).item()
    if k <= 0 or not ((logits - k * product).abs() <= max(1.0, k) * tolerance).all():
        return None
    return k


def check_row(
    name: str, head: nn.Module, features: Tensor, logits: Tensor, row: int, eps: float | None = None
) -> Verification | None:
    """Hold one row of features (B, D) and logits (B, C) against the head; None where there are no values (meta).

    `eps` is what `epsilon` said when the head was called; None: what it says now. ValueError, at once, where the shapes
    cannot be those of the head.
    """
    weight = head.weight.detach()  # type: ignore[operator]
    bias = None if head.bias is None else head.bias.detach()  # type: ignore[operator]
    weight = weight.flatten(1)
    if features.shape[1] != weight.shape[1] or logits[0].numel() != len(weight):
        raise ValueError(
            f"head: {name!r} has a weight of shape {tuple(weight.shape)}; expected features (B, {weight.shape[1]}) and "
            f"logits (B, {len(weight)}), got {tuple(features.shape)} and {tuple(logits.shape)}"
        )
    if features.is_meta:
        return None
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    eps = max(eps or 0.0, epsilon(head, features, logits))
    formats = [t.dtype for t in (features, weight, logits)]
    with without_autocast(features.device):
        x, z = features[row].to(dtype), logits[row].reshape(-1).to(dtype)
        sums, sizes = [], []
        for part in weight.split(max(1, _PIECE // weight.shape[1])):
            terms = part * x
            sums.append(terms.sum(1))
            sizes.append(terms.abs_().sum(1))
        product, size = torch.cat(sums), torch.cat(sizes)
        if bias is not None:
            product, size = product + bias, size + bias.abs()
        c_eps = 2 * eps + 4 * math.sqrt(weight.shape[1] + 1) * torch.finfo(dtype).eps
        smallest = max(torch.finfo(f).smallest_normal * torch.finfo(f).eps for f in formats)  # below it all is rounded
        largest = min(torch.finfo(f).max for f in formats)
        return Verification(name, head, row, z, product, size * c_eps + smallest, largest)


def epsilon(head: nn.Module, *tensors: Tensor) -> float:
    """The machine epsilon of the coarsest format in force for a head and what it takes and returns, here and now.

    Asked during the call of the head, it knows of an autocast region inside the model whose logits come out as float32.
    """
    weight: Any = head.weight
    device, formats = tensors[0].device, [weight.dtype, *(t.dtype for t in tensors)]
    eps = max((torch.finfo(dtype).eps for dtype in formats if dtype.is_floating_point), default=0.0)
    if autocasting(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    if torch.float64 not in formats:
        eps = max(eps, _FLOAT32_PRODUCTS[_float32_products(device, isinstance(head, nn.Conv2d))])
    return eps


_FLOAT32_PRODUCTS = {"ieee": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7}  #: machine epsilon


def _float32_products(device: torch.device, convolution: bool) -> str:
    """The format that torch may round float32 factors to before it multiplies them, by its global switches."""
    if device.type not in ("cuda", "cpu"):
        return "ieee"
    cuda = device.type == "cuda"
    backend = (torch.backends.cudnn if convolution else torch.backends.cuda) if cuda else torch.backends.mkldnn
    operation = getattr(backend, "conv" if convolution else "matmul", None)
    for switch in (operation, backend, torch.backends):  # "none" leaves it to the next
        chosen = getattr(switch, "fp32_precision", "none")
        if chosen in _FLOAT32_PRODUCTS:
            return chosen
    if not hasattr(operation, "fp32_precision"):  # torch before 2.9
        if cuda:
            allowed = torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
            return "tf32" if allowed else "ieee"
        return "bf16" if torch.get_float32_matmul_precision() == "medium" else "ieee"
    return "ieee"


class Verdicts:
    """Verifications whose outcome is on its way: read with later results, never by a wait of their own."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Verification, Callable[[], bool | None]]] = deque()

    def add(self, verification: Verification | None, bias: Tensor | None, like: Tensor) -> Tensor | None:
        """Take note of a verification; returns the head's bias, NaN if the verification fails on a GPU.

        On a CPU the outcome is there: raises ValueError at once.
        """
        if verification is None:
            return bias
        outcome = _outcome(verification.failed)
        if outcome is None:
            verification.raise_if_failed()
            return bias
        self._waiting.append((verification, outcome))
        poison = torch.where(verification.failed, torch.nan, 0.0).to(like.dtype)
        return poison.repeat(len(like)) if bias is None else bias + poison

    def raise_refusals(self) -> None:
        """Raise the ValueError of the first verification that is known to have failed; forget those that passed."""
        while self._waiting:
            try:
                verification, outcome = self._waiting.popleft()
            except IndexError:  # another thread took the last
                return
            failed = outcome()
            if failed is None:  # later ones have not arrived either
                self._waiting.appendleft((verification, outcome))
                return
            if failed:
                verification.raise_if_failed()


def _outcome(failed: Tensor) -> Callable[[], bool | None] | None:
    """A function that says whether it failed, or None while the GPU has not come to it; None where it can be read."""
    if failed.device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():  # nothing can be read back: the scores are NaN
        return lambda: False
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(failed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(failed.device))
    return lambda: bool(host) if arrived.query() else None
