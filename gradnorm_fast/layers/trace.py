"""A forward pass that records every operation that combines parameters with samples.

An operation on parameters and constants alone gives a tensor derived from parameters, such as a standardised weight or
an expanded class token. An operation on such a tensor and on tensors that depend on the samples is a meeting. At a
meeting we get each sample's gradient of the parameter: by a rule for the operation or, for elementwise operations, by
passing one copy of the parameter per sample. Modules are not modified: the trace intercepts torch's functions.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .gradients import RULES, Given, PerSample, SampleGradients, Unsupported
from .layout import Layout

Names: TypeAlias = frozenset[str]

#: Operations that broadcast, and so accept one copy of a parameter per sample in place of the parameter.
BROADCASTING = frozenset({
    "add", "iadd", "radd", "sub", "subtract", "isub", "rsub", "mul", "multiply", "imul", "rmul", "div", "divide",
    "true_divide", "truediv", "itruediv", "rtruediv", "pow", "ipow", "rpow", "addcmul", "addcdiv", "lerp", "where",
    "maximum", "minimum", "cat", "concat", "concatenate",
})  # fmt: skip
MATRIX_PRODUCTS = frozenset({"matmul", "rmatmul", "bmm", "baddbmm", "scaled_dot_product_attention"})
#: These return Python numbers. Values of samples that leave this way may return in any new tensor.
ESCAPES = frozenset({"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__"})
#: Operations that use only the shape, dtype or device of a tensor.
NO_GRADIENT = frozenset(
    {"type_as", "expand_as", "view_as", "reshape_as", "to", "zeros_like", "ones_like", "empty_like", "get"}
)


class Stale(Exception):
    """The layouts belong to a different sequence of operations."""


class Use(NamedTuple):
    """One parameter's part in one meeting."""

    tensor: Tensor  #: the parameter, or what was derived from it
    gradients: SampleGradients


class Seen(NamedTuple):
    """One meeting, as recorded by the passes that learn the layouts."""

    operation: str
    output: Tensor | None


class Trace(TorchFunctionMode):
    """The state of one forward pass.

    Args:
        parameters: leaves that replace the model's parameters, by name; the model must run with these.
        constants: the model's other parameters and its buffers.
        samples: how many samples the batch has.
        layouts: of the outputs of all meetings, in order. None: only record the meetings.
        use: called in the backward pass with a parameter's names and its use. For an unsupported use the second
            argument is None, and the call may come in the forward pass already.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        constants: list[Tensor],
        samples: int,
        layouts: list[Layout | None] | None = None,
        use: Callable[[Names, Use | None], None] | None = None,
    ) -> None:
        super().__init__()
        self._known: dict[int, Names] = {id(t): frozenset() for t in constants}
        self._known |= {id(t): frozenset([name]) for name, t in parameters.items()}
        self._parameters, self._constants = parameters, constants  # an id is valid as long as its tensor lives
        self._written: set[int] = set()  # storages of constants into which samples were written
        self._escaped = False
        self._samples, self._layouts, self._use = samples, layouts, use
        self.seen: list[Seen] = []
        self.expected: dict[str, int] = {}  #: uses of each parameter whose gradients the backward pass will give
        self.sources: list[Any] = []  #: inputs for a backward pass that reaches every use

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        if func.__name__ == "batch_norm" and result.requires_grad and len(result) == 1:
            # On a CPU torch 2.14 computes wrong gradients if that of a single image is transposed.
            result.register_hook(lambda g: g.contiguous())
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        names, samples = self._parameters_of(args, kwargs)
        if samples and func.__name__ == "batch_norm" and (args[5] if len(args) > 5 else kwargs.get("training")):
            owners = sorted({name.rpartition(".")[0] or name for name in names})
            raise ValueError(
                f"model: a batch_norm ({', '.join(owners) or 'without selected parameters'}) normalises by the "
                "statistics of the batch, so that a sample has no gradient of its own; call model.eval()"
            )
        if not names and samples:
            self._note_writing(func, args, kwargs)
            self._escaped |= func.__name__ in ESCAPES
            return func(*args, **kwargs)
        if body := _python_body(func):
            with self:
                return body(*args, **kwargs)
        if not samples:
            result = func(*args, **kwargs)
            if not self._escaped or any(True for _ in _tensors((args, kwargs))):
                self._derive(result, names)
            return result
        operation = func.__name__.strip("_")
        if operation in NO_GRADIENT:
            return func(*args, **kwargs)
        if rewritten := _rewritten(operation, args, kwargs, self._names):
            with self:
                return rewritten()
        self._note_writing(func, args, kwargs)
        return self._meet(operation, func, args, kwargs)

    # Which tensors depend on parameters, which on the samples

    def _names(self, t: Tensor) -> Names | None:
        """The parameters that a tensor depends on; None for a tensor that depends on the samples."""
        known = self._known.get(id(t))
        if known is None:
            mark, known = getattr(t, "_derived_from", (None, None))
            if mark is not self._parameters:
                return None
        if self._written and t.untyped_storage()._cdata in self._written:
            return None
        return known

    def _parameters_of(self, args: Any, kwargs: Any) -> tuple[Names, bool]:
        """The parameters among the arguments, and whether any argument depends on the samples."""
        names: Names = frozenset()
        samples = False
        for t in _tensors((args, kwargs)):
            found = self._names(t)
            if found is None:
                samples = True
            else:
                names |= found
        return names, samples

    def _derive(self, result: Any, names: Names) -> None:
        for t in _tensors(result):
            if id(t) not in self._known:
                t._derived_from = (self._parameters, names if t.requires_grad else frozenset())  # type: ignore[attr-defined]

    def _note_writing(self, func: Any, args: Any, kwargs: Any) -> None:
        """After samples are written into a constant, it and all its views depend on them."""
        name, target = func.__name__, kwargs.get("out")
        if args and (name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and name[-2:] != "__")):
            target = args[0]
        for t in _tensors(target):
            if self._names(t) is not None:
                self._written.add(t.untyped_storage()._cdata)

    # Meetings

    def _meet(self, operation: str, func: Any, args: Any, kwargs: Any) -> Any:
        if self._layouts is None or self._use is None:
            result = func(*args, **kwargs)
            self.seen.append(Seen(operation, result if isinstance(result, Tensor) else None))
            return result
        place = len(self.seen)
        layout = self._layouts[place] if place < len(self._layouts) else None
        self.seen.append(Seen(operation, None))
        parameters = {id(t): t for t in _tensors((args, kwargs)) if self._names(t)}
        try:
            if layout is None:
                raise Unsupported
            if operation in RULES:
                return self._ruled(operation, func, args, kwargs, parameters, layout)
            if operation in BROADCASTING or (operation in MATRIX_PRODUCTS and layout.dim < len(layout.sizes) - 2):
                return self._broadcast(func, args, kwargs, parameters, layout)
            raise Unsupported
        except Unsupported:
            self._drop(parameters.values())
            return func(*args, **kwargs)

    def _ruled(
        self, operation: str, func: Any, args: Any, kwargs: Any, parameters: dict[int, Tensor], layout: Layout
    ) -> Tensor:
        """Run the operation on copies of the parameters; apply its rule once the output has its gradient."""
        gradients = RULES[operation](layout, self._samples, *args, **kwargs)
        before = any(t.requires_grad for t in _tensors((args, kwargs)) if id(t) not in parameters)
        copies = {i: t.detach().requires_grad_() for i, t in parameters.items()}
        output: Tensor = func(*_replaced(args, copies), **_replaced(kwargs, copies))
        if not output.requires_grad:  # under torch.no_grad
            return output
        if output.shape != layout.shape(self._samples):
            raise Stale
        output, fresh = _fresh(output)
        if not before:
            self.sources.append(torch.autograd.graph.get_gradient_edge(fresh))
        for t in parameters.values():
            self._expect(t)

        shape = output.shape

        def after(g: Tensor) -> None:
            try:
                for tensor, found in gradients(g.reshape(shape)):
                    if id(tensor) in parameters:
                        self._found(tensor, found)
            except Unsupported:
                self._drop(parameters.values())

        fresh.register_hook(after)
        return output

    def _broadcast(self, func: Any, args: Any, kwargs: Any, parameters: dict[int, Tensor], layout: Layout) -> Tensor:
        """Run the operation on one copy of each parameter per sample."""
        copies, hooked = {}, []
        for i, t in parameters.items():
            source = t.detach().requires_grad_()
            each, copies[i], found = _per_sample(source, layout, self._samples)
            hooked.append((t, each, found))
            self.sources.append(source)
        output = func(*_replaced(args, copies), **_replaced(kwargs, copies))
        if not isinstance(output, Tensor) or output.shape != layout.shape(self._samples):
            raise Stale
        if output.requires_grad:
            for t, each, found in hooked:
                self._expect(t)
                each.register_hook(lambda g, t=t, found=found: self._found(t, found(g)))
        return output

    def _expect(self, tensor: Tensor) -> None:
        for name in self._names(tensor) or ():
            self.expected[name] = self.expected.get(name, 0) + 1

    def _found(self, tensor: Tensor, gradients: SampleGradients) -> None:
        assert self._use is not None
        self._use(self._names(tensor) or frozenset(), Use(tensor, gradients))

    def _drop(self, tensors: Any) -> None:
        assert self._use is not None
        for t in tensors:
            self._use(self._names(t) or frozenset(), None)


def _fresh(output: Tensor) -> tuple[Tensor, Tensor]:
    """An operation's output, and the same values as a tensor that is not a view.

    Writing into a view, as nn.ReLU(inplace=True) does after nn.Conv1d, replaces its history and drops its hooks. The
    hooks of its base tensor remain.
    """
    base = output._base
    if base is None:
        return output, output
    if base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        return output, base
    output = output.clone()
    return output, output


def forget_derived(model: torch.nn.Module, parameters: dict[str, Tensor]) -> None:
    """Remove tensors derived from these parameters from caches that modules keep in dictionaries, as LeViT does.

    Otherwise they would keep this pass's graph alive and be reused in the model's next pass.
    """
    for module in model.modules():
        for cache in vars(module).values():
            if isinstance(cache, dict):
                for key in [k for k, t in cache.items() if getattr(t, "_derived_from", (None,))[0] is parameters]:
                    del cache[key]


def _per_sample(
    source: Tensor, layout: Layout, samples: int
) -> tuple[Tensor, Tensor, Callable[[Tensor], SampleGradients]]:
    """One copy of a parameter per sample, shaped to broadcast with tensors of this layout.

    Returns the tensor whose gradient holds the per-sample gradients, the copies, and a function from that gradient to
    SampleGradients.
    """
    missing = len(layout.sizes) - source.dim()
    dim = layout.dim - missing
    if missing < 0:
        raise Unsupported
    if dim >= 0 and source.shape[dim] != 1:
        own = Layout(layout.sizes[missing:], dim, layout.outer, layout.inner)
        if source.shape[dim] != own.shape(samples)[dim]:
            raise Unsupported
        return source, source.view_as(source), lambda g: PerSample(g, own, samples)
    aligned = source.reshape([1] * missing + list(source.shape))
    dim = layout.dim
    before, after = aligned.shape[:dim], aligned.shape[dim + 1 :]
    each = aligned.unsqueeze(dim + 1).unsqueeze(dim).expand(*before, 1, samples, 1, *after)
    copies = each.expand(*before, layout.outer, samples, layout.inner, *after).flatten(dim, dim + 2)
    return each, copies, lambda g: Given(g.movedim(dim + 1, 0).reshape(samples, *source.shape))


def _rewritten(operation: str, args: Any, kwargs: Any, names: Callable[[Tensor], Any]) -> Callable[[], Any] | None:
    """An operation in terms of operations that have rules."""
    if kwargs or len(args) != 2:
        return None
    x, weight = args
    if operation == "matmul" and isinstance(weight, Tensor) and weight.dim() == 2 and names(weight):
        return lambda: torch.nn.functional.linear(x, weight.t())
    if operation == "prelu":
        shape = [1, -1] + [1] * (x.dim() - 2) if x.dim() > 1 else [-1]
        return lambda: x.clamp(min=0) + weight.view(shape) * x.clamp(max=0)
    return None


@functools.cache
def _python_body(func: Any) -> Callable[..., Any] | None:
    """A Python function of torch.nn.functional, without the check that dispatches it to a mode.

    When it runs, the mode sees the operations inside it.
    """
    if not isinstance(func, types.FunctionType) or func.__module__ != "torch.nn.functional":
        return None
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _replaced(value: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copies.get(id(value), value)
    if isinstance(value, tuple | list):
        return type(value)(_replaced(item, copies) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, copies) for key, item in value.items()}
    return value
