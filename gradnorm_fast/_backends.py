"""Which backend a call takes, and the call of it: the one place that knows both the kernels and the torch path."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import _torch_backward, _torch_forward, _torch_targets
from ._autocast import without_autocast
from ._switches import switch
from ._targets import check_classes
from .kernels.problem import Problem, Scores

BACKENDS = ("auto", "triton", "torch")


@cache
def why_not_triton(device: torch.device) -> str:
    """Why Triton kernels cannot run on this device and what to do about it; empty where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed; install it with `pip install triton` (Linux), or use backend='torch'"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            return f"the kernels need compute capability 8.0, {device} has {major}.{minor}; use backend='torch'"
        return _why_no_driver()
    from .kernels.device import INTERPRETED

    if device.type == "cpu" and INTERPRETED:
        return ""
    return (
        f"Triton does not run on {device.type} tensors; move them to a GPU, use backend='torch', or, to run them "
        "in Triton's interpreter on a CPU, set TRITON_INTERPRET=1 before triton is first imported"
    )


def _why_no_driver() -> str:
    """Why Triton cannot load its driver, for which it compiles a few lines of C on first use; empty where it can."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever stops Triton must not stop the call
        reason = " ".join(str(error).split())[:200]
        return (
            f"Triton cannot load its driver ({type(error).__name__}: {reason}); is there a C compiler (gcc or clang)? "
            "Or use backend='torch'"
        )
    return ""


@cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(f"gradnorm_fast runs in plain torch: {reason}", RuntimeWarning, stacklevel=2)


def uses_triton(backend: str, device: torch.device) -> bool:
    """ "auto" is Triton on a GPU wherever it can run, else torch, with one warning that says why."""
    if backend != "auto" or device.type != "cuda":
        return backend == "triton"
    if reason := why_not_triton(device):
        _warn_of_fallback(reason)
    return not reason


@cache
def batch_invariant() -> bool:
    """Whether a row's bits may not depend on its batch. Read at the first call: a look into the environment takes as
    long as two torch operations."""
    return switch("GRADNORM_FAST_BATCH_INVARIANT")


def _by_kernel(problem: Problem, backend: str) -> bool:
    """Whether a kernel takes the problem; ValueError where none does and the backend is "triton"."""
    if not uses_triton(backend, problem.features.device):
        return False
    from .kernels import dispatch

    reason = dispatch.why_not(problem)
    if reason and backend == "triton":
        raise ValueError(f"backend: {reason}; use 'auto' or 'torch'")
    return not reason


def on_cpu_without_float64(call: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Apple's GPUs have no float64, which the torch path computes in: there, copy to the CPU and back."""
    if not torch.backends.mps.is_built():
        return call

    @wraps(call)
    def wrapped(*args: Any) -> tuple[Tensor | None, ...]:
        if not args[0].is_mps:
            return call(*args)
        found = call(*(a.cpu() if isinstance(a, Tensor) else a for a in args))
        return tuple(t if t is None else t.to(args[0].device) for t in found)

    return wrapped


@on_cpu_without_float64
def run(
    features: Tensor,
    logits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    target: str,
    p: float,
    temperature: float,
    reduction: str,
    include_bias: bool,
    backend: str,
    head: bool,
) -> Scores:
    """Scores of features (B, D) from logits (B, C), or from weight (C, D) and bias (C,).

    target: "uniform", "predicted", or "labels", which are labels (B,). head asks for all fields. ValueError for labels
    of classes that do not exist, on a CPU, and for a problem that no kernel takes where the backend is "triton".
    """
    problem = _problem(features, logits, weight, bias, labels, target, p, temperature, reduction, include_bias)
    batch, dtype, invariant = features.shape[0], score_dtype(features, logits), batch_invariant()
    by_kernel = batch > 0 and _by_kernel(problem, backend)
    forward = _torch_forward.forward if problem.uniform else _torch_targets.forward
    if batch and not by_kernel and not invariant:
        return forward(problem, dtype, head)
    scores = Scores.empty(features, dtype, head)
    if by_kernel:
        from .kernels import dispatch

        with _current(features.device):
            dispatch.score(problem, scores, invariant)
        return scores
    for i in range(batch):  # a row by itself: how a matmul rounds depends on how many rows it has
        for all_rows, row in zip(scores, forward(problem.rows(i, i + 1), dtype, head), strict=True):
            if all_rows is not None:
                all_rows[..., i : i + 1] = row
    return scores


@on_cpu_without_float64
def run_backward(
    grad: Tensor,
    features: Tensor,
    logits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    target: str,
    p: float,
    temperature: float,
    reduction: str,
    include_bias: bool,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for features, logits, weight and bias, empty where not needed, given the gradient of run's out."""
    check_differentiable(p)
    problem = _problem(features, logits, weight, bias, labels, target, p, temperature, reduction, include_bias)
    backward = _torch_backward.backward if target == "uniform" else _torch_targets.backward
    with without_autocast(features.device):
        return backward(grad, problem, needed)


def check_differentiable(p: float) -> None:
    """NotImplementedError for a norm whose gradient is not implemented."""
    if p not in (1.0, 2.0):
        raise NotImplementedError(f"p: gradients are implemented for p = 1 and p = 2, got p = {p:g}; detach the inputs")


@on_cpu_without_float64
def run_token_statistics(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    """log p_y and entropy (2, B), and Σp² and ‖p − e_y‖₂ (2, B), of features (B, D) and labels (B,). ValueError as in
    `run`."""
    check_classes(labels, weight.shape[0], "labels")
    batch = len(features)
    out = torch.empty((4, batch), dtype=score_dtype(features, None), device=features.device)
    problem = Problem(features, weight, bias, None, temperature, target=labels, p=2.0)
    invariant = batch_invariant()
    if batch and _by_kernel(problem, backend):
        from .kernels import dispatch

        with _current(features.device):
            dispatch.score(problem, Scores(out, None), invariant)
        return out[:2].clone(), out[2:].clone()
    step = 1 if invariant else max(1, batch)
    for i in range(0, batch, step):
        _torch_targets.token_statistics(problem.rows(i, i + step), out[:, i : i + step])
    return out[:2].clone(), out[2:].clone()


@on_cpu_without_float64
def run_token_statistics_backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for features, weight and bias, empty where not needed, given that of log p_y and entropy."""
    problem = Problem(features, weight, bias, None, temperature, target=labels, p=2.0)
    with without_autocast(features.device):
        return _torch_targets.token_statistics_backward(grad, problem, needed)


def score_dtype(features: Tensor, logits: Tensor | None) -> torch.dtype:
    """float64 for float64 input, else float32: half precision is for storage, never for sums."""
    double = features.dtype == torch.float64 or (logits is not None and logits.dtype == torch.float64)
    return torch.float64 if double else torch.float32


def _problem(
    features: Tensor,
    logits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    target: str,
    p: float,
    temperature: float,
    reduction: str,
    include_bias: bool,
) -> Problem:
    scale, bias_norm = 1.0, 1.0 if include_bias else 0.0
    problem = Problem(
        features, weight, bias, logits, temperature, scale, bias_norm, target if labels is None else labels, p
    )
    if labels is not None:
        check_classes(labels, problem.classes)
    return problem._replace(scale=float(problem.classes)) if reduction == "sum" else problem  # C times the mean


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
