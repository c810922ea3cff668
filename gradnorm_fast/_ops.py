"""The score as an operator of torch: for autograd, torch.compile, torch.export, torch.func and tensor subclasses.

Two operators, `gradnorm_fast::scores` and `token_statistics`, and their backwards. Plain tensors without gradients take
a direct call past the dispatcher (docs/performance.md has what that saves).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from ._backends import run, run_backward, run_token_statistics, run_token_statistics_backward, score_dtype
from .kernels.problem import FIELDS

_HEAD = (
    "Tensor features, Tensor? logits, Tensor? weight, Tensor? bias, Tensor? labels, str target, float p, "
    "float temperature, str reduction, bool include_bias"
)
_TOKENS = "Tensor features, Tensor weight, Tensor? bias, Tensor labels, float temperature"
_library = torch.library.Library("gradnorm_fast", "DEF")
_library.define(f"scores({_HEAD}, str backend, bool head) -> (Tensor out, Tensor prediction)")
_library.define(f"scores_backward(Tensor grad, {_HEAD}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"token_statistics({_TOKENS}, str backend) -> (Tensor differentiable, Tensor rest)")
_library.define(f"token_statistics_backward(Tensor grad, {_TOKENS}, bool[] needed) -> (Tensor, Tensor, Tensor)")


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    """`run` as an operator, which must return two tensors: an empty one for no prediction."""
    out, prediction = run(*args)
    return out, out.new_empty(0, dtype=torch.int64) if prediction is None else prediction


for _name, _implementation in (
    ("scores", _run),
    ("scores_backward", run_backward),
    ("token_statistics", run_token_statistics),
    ("token_statistics_backward", run_token_statistics_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("gradnorm_fast::scores", lib=_library)
def _scores_fake(features, logits, *rest):  # type: ignore[no-untyped-def]
    batch, head = features.shape[0], rest[-1]
    out = features.new_empty((len(FIELDS) if head else 1, batch), dtype=score_dtype(features, logits))
    return out, features.new_empty(batch if head else 0, dtype=torch.int64)


@torch.library.register_fake("gradnorm_fast::scores_backward", lib=_library)
def _scores_backward_fake(grad, features, logits, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return _gradients_fake((features, logits, weight, bias), rest[-1])


@torch.library.register_fake("gradnorm_fast::token_statistics", lib=_library)
def _token_statistics_fake(features, weight, bias, labels, temperature, backend):  # type: ignore[no-untyped-def]
    out = features.new_empty((2, features.shape[0]), dtype=score_dtype(features, None))
    return out, torch.empty_like(out)


@torch.library.register_fake("gradnorm_fast::token_statistics_backward", lib=_library)
def _token_statistics_backward_fake(grad, features, weight, bias, labels, temperature, needed):  # type: ignore[no-untyped-def]
    return _gradients_fake((features, weight, bias), needed)


def _gradients_fake(inputs: tuple[Tensor | None, ...], needed: list[bool]) -> tuple[Tensor, ...]:
    """A gradient for each input that needs one, else something empty."""
    like = inputs[0]
    assert like is not None
    return tuple(
        t.new_empty(t.shape) if t is not None and need else like.new_empty(0)
        for t, need in zip(inputs, needed, strict=True)
    )


def _loop(
    call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """vmap as a loop: the results of call with each slice of the arguments that have a batch dimension, stacked."""

    def at(i: int) -> tuple[Any, ...]:
        return tuple(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))

    if size == 0:  # empty results have shapes too
        blank = (
            a.new_zeros(a.movedim(d, 0).shape[1:]) if isinstance(d, int) else a
            for a, d in zip(args, in_dims, strict=True)
        )
        stacked = tuple(o.new_empty((0, *o.shape)) for o in call(*blank))
    else:
        stacked = tuple(torch.stack(outputs) for outputs in zip(*(call(*at(i)) for i in range(size)), strict=True))
    return stacked, (0,) * len(stacked)


def _stacked(t: Tensor, dim: int | None, n: int) -> Tensor:
    """A vmapped argument, batched n times along dim or not batched, with the batch dimension first."""
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)


class _Scores(torch.autograd.Function):
    """`scores` for torch.func and forward mode, which do not see through an operator's registered autograd."""

    forward = staticmethod(_run)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.rest, ctx.fields = inputs[5:10], len(output[0])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:4])
        grads = scores_backward(grad, *ctx.saved_tensors, *ctx.rest, needed)
        return (*(g if need else None for g, need in zip(grads, needed, strict=True)), *(None,) * 8)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        """A row's scores depend on its own features and logits alone, so their gradients, each of one row, give the
        derivative along any tangent."""
        features, logits, weight, bias, labels = ctx.saved_tensors
        dx, dz, dw, db = tangents[:4]
        dtype = score_dtype(features, logits)
        x, z = features.to(dtype), logits
        if z is None:
            w = weight.to(dtype)
            z = torch.nn.functional.linear(x, w, None if bias is None else bias.to(dtype))
            parts = [dx.to(dtype) @ w.t()] if dx is not None else []
            parts += [x @ dw.to(dtype).t()] if dw is not None else []
            parts += [db.to(dtype).expand(z.shape)] if db is not None else []
            dz = sum(parts) if parts else None
        z, slopes = z.to(dtype), []
        for field in range(ctx.fields):
            grad = torch.zeros((ctx.fields, len(x)), dtype=dtype, device=x.device)
            grad[field] = 1.0
            of_x, of_z, _, _ = scores_backward(grad, x, z, None, None, labels, *ctx.rest, [True, True, False, False])
            terms = [(g * t.to(dtype)).sum(1) for g, t in ((of_x, dx), (of_z, dz)) if t is not None]
            slopes.append(sum(terms) if terms else torch.zeros_like(grad[0]))
        return torch.stack(slopes), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        n, (features, logits, weight, bias, labels, *rest) = info.batch_size, args

        def call(*args: Any) -> tuple[Tensor, Tensor]:
            return _route(args, _run, _Scores, "scores")

        if in_dims[2] is not None or in_dims[3] is not None:
            return _loop(call, n, in_dims, args)
        # only rows are batched: rows of one larger batch
        batch = _stacked(features, in_dims[0], n).shape[1]
        features, logits, labels = (
            None if t is None else _stacked(t, d, n).flatten(0, 1)
            for t, d in zip((features, logits, labels), (*in_dims[:2], in_dims[4]), strict=True)
        )
        out, prediction = call(features, logits, weight, bias, labels, *rest)
        return (out.reshape(len(out), n, batch), prediction.reshape(n, batch if len(out) > 1 else 0)), (1, 0)


class _TokenStatistics(torch.autograd.Function):
    """`token_statistics`, likewise."""

    forward = staticmethod(run_token_statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.temperature = inputs[4]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no dW where there is none

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        needed = list(ctx.needs_input_grad[:3])
        grads = token_statistics_backward(grad, *ctx.saved_tensors, ctx.temperature, needed)
        return (*(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        """Features (x, 0, 0) with weight (W, dW, db) have the same logits as x with W, and their gradient, each row's
        own, is ∂/∂z·(W, dW, db): times (dx, x, 1) it is the derivative. Takes the memory of a backward and, where dW
        or db is given, a copy of W and of it."""
        features, weight, bias, labels = ctx.saved_tensors
        dtype = score_dtype(features, None)
        x, w, b = features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        dx, dw, db = (None if t is None else t.to(dtype) for t in tangents[:3])
        along, heads = [torch.zeros_like(x) if dx is None else dx], [w]
        if dw is not None:
            along.append(x)
            heads.append(dw)
        if db is not None:
            along.append(torch.ones_like(x[:, :1]))
            heads.append(db[:, None])
        if len(heads) > 1:
            w = torch.cat(heads, 1)
            x = torch.cat([x, x.new_zeros(len(x), w.shape[1] - x.shape[1])], 1)
        slopes = []
        for field in range(2):
            grad = torch.zeros((2, len(x)), dtype=dtype, device=x.device)
            grad[field] = 1.0
            of_x, _, _ = token_statistics_backward(grad, x, w, b, labels, ctx.temperature, [True, False, False])
            slopes.append((of_x * torch.cat(along, 1)).sum(1))
        return torch.stack(slopes), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _loop(token_statistics, info.batch_size, in_dims, args)


def _once(forward: Callable[..., Any], call: Callable[..., Any]) -> type[torch.autograd.Function]:
    """A backward as a function that cannot be differentiated again."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            """Nothing to save: see backward."""

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
            raise RuntimeError(
                "gradnorm_fast: scores can be differentiated once, not twice; "
                "use gradnorm_fast.reference.autograd_gradnorm"
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
            return _loop(call, info.batch_size, in_dims, args)

    Backward.forward = staticmethod(forward)  # type: ignore[method-assign]
    return Backward


_ScoresBackward = _once(run_backward, lambda *args: scores_backward(*args))
_TokenStatisticsBackward = _once(run_token_statistics_backward, lambda *args: token_statistics_backward(*args))

for _name, _function in (
    ("scores", _Scores),
    ("scores_backward", _ScoresBackward),
    ("token_statistics", _TokenStatistics),
    ("token_statistics_backward", _TokenStatisticsBackward),
):
    torch.library.register_autograd(
        f"gradnorm_fast::{_name}", _function.backward, setup_context=_function.setup_context, lib=_library
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_plain(t: Tensor) -> bool:
    """Whether a kernel may read the memory of this tensor as it is."""
    return (
        type(t) in _PLAIN
        and not t.is_meta
        and not t.is_neg()
        and not t._is_zerotensor()
        and not is_legacy_batchedtensor(t)
    )


def _route(
    args: tuple[Any, ...], direct: Callable[..., Any], function: type[torch.autograd.Function], name: str
) -> Any:
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return function.apply(*args)
        if not torch._C._len_torch_dispatch_stack():
            records = torch.is_grad_enabled()
            for a in args[:6]:  # the tensors come first
                if isinstance(a, Tensor) and (not _is_plain(a) or (records and a.requires_grad)):
                    break
            else:
                return direct(*args)
    return getattr(torch.ops.gradnorm_fast, name).default(*args)


def scores(*args: Any) -> tuple[Tensor, Any]:
    """_backends.run, by the shortest way that keeps gradients, tracing and transforms right. Without `head`, the
    prediction is None or empty."""
    return _route(args, run, _Scores, "scores")


def scores_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_backends.run_backward, likewise."""
    return _route(args, run_backward, _ScoresBackward, "scores_backward")


def token_statistics(*args: Any) -> tuple[Tensor, Tensor]:
    """_backends.run_token_statistics, likewise."""
    return _route(args, run_token_statistics, _TokenStatistics, "token_statistics")


def token_statistics_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """_backends.run_token_statistics_backward, likewise."""
    return _route(args, run_token_statistics_backward, _TokenStatisticsBackward, "token_statistics_backward")
