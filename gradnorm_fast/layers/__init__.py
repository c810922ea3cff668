"""Per-sample gradient norms of any layers of a model, from one forward and one backward pass of the batch."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import heads
from .._targets import check_classes, check_p, check_target
from ..functional import _check_options
from .layout import Layout, find_layout
from .logit_gradient import loss_gradient, target_gradient
from .norms import combined, norm_dtype, p_norm
from .selection import Layers, selected_parameters
from .trace import Names, Stale, Trace, Use, forget_derived

GRADIENT_BYTES = 8 * 2**20  #: of gradients computed at a time; at least one sample's

#: Layouts of a model's operations, by selected parameters, shape and dtype of the input, and modes of the modules.
_layouts: weakref.WeakKeyDictionary[nn.Module, dict[Any, list[Layout | None]]] = weakref.WeakKeyDictionary()
#: One per model: a pass replaces the model's parameters, so no other thread may run one at the same time.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class LayerNorms(dict[str, Tensor]):
    """The norms (B,) of each parameter, by name.

    Attributes:
        logits: (B, C), the model's output in the same pass, detached; (0, 0) for an empty batch.
        one_by_one: names of the parameters that have no rule; for these the model ran once per sample.
    """

    def __init__(self, norms: dict[str, Tensor], logits: Tensor, one_by_one: tuple[str, ...] = ()) -> None:
        super().__init__(norms)
        self.logits, self.one_by_one = logits, one_by_one


def layer_gradnorms(
    model: nn.Module,
    images: Tensor,
    *,
    layers: Layers = "all",
    target: str | Tensor = "uniform",
    p: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    per_layer: bool = False,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | LayerNorms:
    """p-norm of each sample's gradient with respect to any of the model's parameters, biases included.

    layers="all" gives GradNorm (Huang, Geng & Li, NeurIPS 2021) of all layers, as in the paper's ablation. For the last
    layer alone use `fast_gradnorm`, which needs no backward pass. The call does not change the model's mode, gradients,
    flags or hooks. Threads may share a model; their calls run one after another. The first call with a selection of
    parameters, a shape of images and a mode also runs the model on one image and on two, to learn where its operations
    keep the samples.

    Args:
        model: a classifier; its output is logits (B, C), or an object with `.logits`. It runs in its current mode.
        images: (B, ...), the model's input; moved to its device and, if floating point, to its dtype.
        layers: "all"; "head", the layer whose output is the logits, directly or after pooling; names of modules, which
            select all parameters in them; or a predicate on (parameter name, parameter).
        target: of the cross entropy: "uniform", "predicted" (the lowest class with the maximum), or int64 labels (B,),
            where -100 gives 0. Other labels outside 0 … C − 1 raise a ValueError on a CPU and give NaN on a GPU.
        p: 0.1 … 64, or inf. The norm over several parameters is that of their concatenated gradients.
        temperature: T > 0; divides the logits and, by the chain rule, the gradient.
        reduction: "mean" over classes, as in the paper, or "sum", C times larger; for the uniform target only.
        per_layer: return the norm of each parameter separately.
        loss: maps logits (B, C) to one loss per sample (B,); replaces target, temperature and reduction.

    Returns:
        (B,), float32 or, for a float64 model, float64; with per_layer a dict of these by parameter name, in the order
        of model.named_parameters(). Parameters that the logits do not depend on have norm 0. If no rule is known for a
        use of a parameter, the model runs once per sample for it; a warning and the dict's `one_by_one` name it.

    Raises:
        TypeError, ValueError: an argument that does not fit; a model in training mode that takes the statistics of the
            batch or draws random numbers, by dropout, say.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5))
        >>> images = torch.rand(3, 8)
        >>> layer_gradnorms(model, images).shape  # of all parameters together
        torch.Size([3])
        >>> layer_gradnorms(model, images, layers=["2"], p=2.0).shape  # of the last layer, biases included
        torch.Size([3])
        >>> weights = layer_gradnorms(model, images, layers=lambda name, p: p.dim() > 1, per_layer=True)
        >>> list(weights)
        ['0.weight', '2.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = heads.unwrap(model)
    images = _placed(model, images)
    p = check_p(p)
    if loss is None:
        temperature = _check_options(torch.empty(0), temperature, reduction, "auto")
        check_target(target, (len(images),), reduction)
    elif isinstance(temperature, Tensor) or (str(target), temperature, reduction) != ("uniform", 1.0, "mean"):
        raise ValueError("loss: expected it alone, got target, temperature or reduction beside it")
    elif not callable(loss):
        raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
    _check_modes(model)

    def logit_gradient(logits: Tensor, rows: slice) -> Tensor:
        if logits.dim() != 2 or len(logits) != len(range(*rows.indices(len(images)))):
            raise ValueError(f"model: expected logits (B, C) for {len(images)} images, got {tuple(logits.shape)}")
        if loss is not None:
            return loss_gradient(logits, loss)
        if isinstance(target, Tensor):
            check_classes(target, logits.shape[1])
            return target_gradient(logits, target[rows], temperature, 1.0)
        return target_gradient(logits, target, temperature, logits.shape[1] if reduction == "sum" else 1.0)

    with (
        _locks.setdefault(model, threading.RLock()),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        if images.is_inference():
            images = images.clone()
        names = selected_parameters(model, images, layers)
        if not len(images):
            zeros = images.new_zeros(0, dtype=norm_dtype(images.dtype))
            norms = LayerNorms(dict.fromkeys(names, zeros), images.new_zeros(0, 0))
        else:
            batch = _Pass(model, images, names, p)
            try:
                norms = batch.norms(logit_gradient)
            finally:
                forget_derived(model, batch.parameters)
    if norms.one_by_one:
        warnings.warn(
            f"layer_gradnorms: no rule for the use of {', '.join(norms.one_by_one)}; ran the model sample by sample",
            stacklevel=2,
        )
    return norms if per_layer else combined(list(norms.values()), p)


class _Pass:
    """The forward and backward pass of one batch, and the norms computed from them."""

    def __init__(self, model: nn.Module, images: Tensor, names: list[str], p: float) -> None:
        self.model, self.images, self.p = model, images, p
        everything = {name: t.detach() for name, t in model.named_parameters()}
        self.parameters = {name: everything[name].requires_grad_() for name in names}
        self.rest = {name: t for name, t in everything.items() if name not in self.parameters}
        self.uses: dict[str, list[Use]] = {name: [] for name in names}
        self.found: dict[str, Tensor] = {}
        self.logits: list[Tensor] = []  #: one tensor for the batch, or one per image
        self.one_by_one: set[str] = set()

    def norms(self, logit_gradient: Callable[[Tensor, slice], Tensor]) -> LayerNorms:
        modes = tuple(module.training for module in self.model.modules())
        key = (tuple(self.parameters), self.images.shape[1:], self.images.dtype, modes)
        known = _layouts.setdefault(self.model, {})
        if key in known:
            try:
                scale = self._run(known[key], logit_gradient)
            except Stale:
                del known[key]
                forget_derived(self.model, self.parameters)
                return type(self)(self.model, self.images, list(self.parameters), self.p).norms(logit_gradient)
        else:
            layouts = self._learn_layouts()
            try:
                scale = self._run(layouts, logit_gradient)
                if None not in layouts:  # a layer that is still zero gives all samples the same values
                    known[key] = layouts
            except Stale:  # the operations depend on the values of the images
                self.one_by_one |= self.parameters.keys()
                scale = self.images.new_ones(len(self.images))
        norms = {name: self._norm(name) * scale for name in self.parameters if name not in self.one_by_one}
        if self.one_by_one:
            norms |= self._each(logit_gradient)
        one_by_one = tuple(name for name in self.parameters if name in self.one_by_one)
        return LayerNorms({name: norms[name] for name in self.parameters}, torch.cat(self.logits), one_by_one)

    def _call(self, images: Tensor) -> Tensor:
        """The logits. Images are copied because a model may normalise them in place."""
        return heads.logits_of(functional_call(self.model, {**self.parameters, **self.rest}, (images.clone(),)))

    def _trace(self, samples: int, **options: Any) -> Trace:
        return Trace(self.parameters, [*self.rest.values(), *self.model.buffers()], samples, **options)

    def _learn_layouts(self) -> list[Layout | None]:
        """The layout of each operation that combines parameters and samples, learned from two samples and from one."""
        one = self.images[-1:]
        other = torch.randn(one.shape, generator=torch.Generator().manual_seed(0)) if one.is_floating_point() else None
        other = one.flip(-1) if other is None else other.to(one)
        seen, random = [], _random_state(one.device)
        for batch in (torch.cat([one, other]), other):
            with self._trace(len(batch)) as trace:
                self._call(batch)
            seen.append(trace.seen)
        in_training = any(module.training for module in self.model.modules())
        if in_training and not torch.equal(random, _random_state(one.device)):
            raise ValueError(
                "model: it draws random numbers in training mode (dropout, stochastic depth, ...), and so would its "
                "gradients; call model.eval()"
            )
        two, one_alone = seen
        if [s.operation for s in two] != [s.operation for s in one_alone]:
            return []
        return [
            None if a.output is None or b.output is None else find_layout(a.output, b.output)
            for a, b in zip(two, one_alone, strict=True)
        ]

    def _run(self, layouts: list[Layout | None], logit_gradient: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Forward and backward pass. Returns the factor that the norms must still be multiplied by."""
        with self._trace(len(self.images), layouts=layouts, use=self._use) as trace:
            logits = self._call(self.images)
        if len(trace.seen) != len(layouts):
            raise Stale
        self.expected = trace.expected
        gradient = logit_gradient(logits, slice(None))
        self.logits = [logits.detach()]
        # The gradients of a confident row may underflow when squared or in half precision. They are linear in this one:
        # scale it.
        scale = gradient.abs().amax(1)
        unit = torch.where(scale > 0, scale, 1.0)
        if logits.requires_grad:
            gradient = (gradient / unit[:, None]).to(logits.dtype)
            inputs = [*self.parameters.values(), *trace.sources]
            reached = torch.autograd.grad(logits, inputs, gradient, allow_unused=True)
            unseen = zip(self.parameters, reached, strict=False)  # used where the trace cannot see it
            self.one_by_one |= {name for name, g in unseen if g is not None}
        return unit

    def _use(self, names: Names, use: Use | None) -> None:
        """Store one use. After the last use of a parameter, compute its norms and free its uses."""
        for name in names:
            if use is None:
                self.one_by_one.add(name)
            if name in self.one_by_one:
                self.uses[name].clear()
                continue
            assert use is not None
            self.uses[name].append(use)
            if len(self.uses[name]) == self.expected[name]:
                self.found[name] = self._norm_of(name)
                self.uses[name].clear()

    def _norm(self, name: str) -> Tensor:
        return self.found[name] if name in self.found else self._norm_of(name)  # some use did not reach the logits

    def _norm_of(self, name: str) -> Tensor:
        uses, parameter, samples = self.uses[name], self.parameters[name], len(self.images)
        if not uses:
            return parameter.new_zeros(samples, dtype=norm_dtype(parameter.dtype))
        if len(uses) == 1 and uses[0].tensor is parameter and (norms := uses[0].gradients.norm(self.p)) is not None:
            return norms
        step = max(1, GRADIENT_BYTES // max(1, max(u.gradients.sample_bytes for u in uses)))
        parts = []
        for start in range(0, samples, step):
            here = slice(start, min(start + step, samples))
            total = None
            for use in uses:
                gradient = _pulled_back(use, parameter, here)
                total = gradient if total is None else total + gradient
            assert total is not None
            parts.append(p_norm(total.reshape(len(total), -1), self.p))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _each(self, logit_gradient: Callable[[Tensor, slice], Tensor]) -> dict[str, Tensor]:
        """The norms of parameters without a rule, from one model run per sample."""
        names = [name for name in self.parameters if name in self.one_by_one]
        for name in self.parameters.keys() - names:
            self.parameters[name].requires_grad_(False)
        rows: list[list[Tensor]] = []
        each: list[Tensor] = []
        for i in range(len(self.images)):
            here = slice(i, i + 1)
            logits = self._call(self.images[here])
            gradient = logit_gradient(logits, here)
            each.append(logits.detach())
            scale = gradient.abs().amax()
            unit = torch.where(scale > 0, scale, 1.0)
            leaves = [self.parameters[name] for name in names]
            gradients = torch.autograd.grad(
                logits, leaves, (gradient / unit).to(logits.dtype), allow_unused=True, materialize_grads=True
            )
            rows.append([p_norm(g.reshape(1, -1), self.p)[0] * unit for g in gradients])
        self.logits = self.logits or each
        return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(names)}


def _pulled_back(use: Use, parameter: Tensor, samples: slice) -> Tensor:
    """The gradients of a parameter, from those of a tensor derived from it.  # (n, *shape of the parameter)"""
    gradients = use.gradients.of(samples)
    if use.tensor is parameter:
        return gradients
    return torch.stack(
        [torch.autograd.grad(use.tensor, parameter, g.to(use.tensor.dtype), retain_graph=True)[0] for g in gradients]
    )


def _random_state(device: torch.device) -> Tensor:
    """Changes when a random number is drawn on the CPU or the device."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states)


def _placed(model: nn.Module, images: Tensor) -> Tensor:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a torch.Tensor of shape (B, ...), got {type(images).__name__}")
    if images.dim() < 2:
        raise ValueError(f"images: expected a batch of shape (B, ...), got shape {tuple(images.shape)}")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise ValueError("model: expected floating-point parameters, it has none")
    return images.detach().to(parameter.device, parameter.dtype if images.is_floating_point() else None)


def _check_modes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"model: {name!r} normalises by the statistics of the batch, so that a sample has no gradient of its "
                "own; call model.eval()" + ("" if module.training else ", and keep running statistics in it")
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"model: {name!r} is dropout in training mode, whose gradients are random; call model.eval()"
            )
