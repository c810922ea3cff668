"""GradNorm scores of a head whose classes are sharded over a torch.distributed group, as in tensor parallelism.

Every rank has all features and some of the classes. Ranks do not exchange logits: each reduces its own to a few numbers
per row; then all ranks gather these numbers and merge them in rank order.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._autocast import without_autocast
from ._backends import score_dtype
from ._targets import IGNORE
from ._torch_forward import budget_of, feature_norms, logits_of, with_bias
from ._torch_targets import Others, Probabilities, Sums, blocks, merged, others_of, tiles_of
from .functional import _autocast, _check_gradient, _check_head, _check_options, _rows
from .kernels.problem import Problem

HEADER = 2048  # bytes that each rank sends first
LONGEST = 400  # characters of the error message in it, at most four bytes each
ERRORS = {error.__name__: error for error in (TypeError, ValueError, NotImplementedError, RuntimeError)}
# Renamed in torch 2.14. A torch build may have neither.
all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
LIVE = 3  # memory of a chunk in units of its float32 logits: these, and the deviations in float64


def sharded_gradnorm(
    features: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    target: str | Tensor = "uniform",
    p: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    include_bias: bool = False,
) -> Tensor:
    """`fast_gradnorm` of a head whose classes are sharded over the ranks of a group; a collective call.

    The whole head has the classes of rank 0, then those of rank 1, and so on. Shards may differ in size and may be
    empty. Forward only, in plain torch, on any device. docs/gradients.md describes what the ranks exchange.

    Args:
        features: (..., D), the same on every rank.
        local_weight: (C', D), this rank's classes; or a DTensor with placement Shard(0).
        local_bias: (C',) on every rank, or None on every rank.
        group: of torch.distributed; None for the DTensor's group, or else the default group.
        target: "uniform", "predicted", or int64 labels of the whole head's classes, the same on every rank.
        p, temperature, reduction, include_bias: as in `fast_gradnorm`, the same on every rank.

    Returns:
        (...), float32, or float64 for float64 features: the same bits on every rank.

    Raises:
        TypeError, ValueError, NotImplementedError: bad input on any rank. All ranks raise the error, which names the
            rank. An input that requires grad is a NotImplementedError.
        RuntimeError: torch.distributed is not initialised, or a rank does not answer within the group's timeout.

    Examples:
        >>> features, weight = torch.rand(4, 8), torch.randn(5, 8)  # a single rank here, which has all classes
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> sharded_gradnorm(features, weight, p=2.0).shape
        torch.Size([4])
        >>> dist.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group: torch.distributed is not initialised; call torch.distributed.init_process_group")
    group = group or _group_of(local_weight)
    if dist.get_rank(group) < 0:
        raise ValueError("group: this process is not a member of it")
    problem, cause = None, None
    try:
        problem, own = _checked(
            features, local_weight, local_bias, target, p, temperature, reduction, include_bias, group
        )
    except Exception as error:  # tell the other ranks, which are waiting
        own, cause = _Header(kind=type(error).__name__, message=str(error)), error
    headers = _exchange_headers(own, group)
    offset = _agreed(headers, group, cause)
    assert problem is not None
    classes = [header.classes for header in headers]
    if reduction == "sum":
        problem = problem._replace(scale=float(sum(classes)))
    ranks, x = _Ranks(group, classes), problem.features
    out = torch.empty(len(x), dtype=score_dtype(x, None), device=x.device)
    if len(out):
        with torch.no_grad(), without_autocast(x.device):
            if isinstance(problem.target, str) and problem.target == "uniform":
                _uniform(problem, ranks, out)
            else:
                _one_hot(problem, offset, ranks, out)
    return out.reshape(features.shape[:-1])


class _Header(NamedTuple):
    """A rank's first message: its error, or what the other ranks need to know and agree on."""

    kind: str = ""  #: the name of an exception
    message: str = ""
    classes: int = 0
    bias: bool = False
    labels: tuple[int, int] | None = None  #: the smallest and largest, except IGNORE
    agreed: dict[str, Any] = {}  #: values that must be the same on all ranks, by argument  # noqa: RUF012


class _Ranks(NamedTuple):
    """The group, and the number of classes on each rank."""

    group: dist.ProcessGroup
    classes: list[int]

    def gather(self, *values: Tensor) -> Tensor:
        """All ranks' values, each (B,): (ranks, values, B)."""
        return _gather(torch.stack(values), self.group)


def _gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, stacked in rank order."""
    out = t.new_empty((dist.get_world_size(group), *t.shape))
    assert all_gather is not None
    all_gather(out.view(-1), t.contiguous().view(-1), group=group)
    return out


def _group_of(weight: Any) -> dist.ProcessGroup:
    """The group of a DTensor's sharded mesh dimension, or the default group."""
    if not _is_dtensor(weight):
        return dist.group.WORLD  # type: ignore[return-value]
    sharded = [i for i, placement in enumerate(weight.placements) if placement.is_shard()]
    return weight.device_mesh.get_group(sharded[0] if sharded else 0)


def _is_dtensor(value: object) -> bool:
    if type(value) is Tensor or not isinstance(value, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _local(value: Any, name: str, group: dist.ProcessGroup, sharded: bool) -> Any:
    """This rank's part of a DTensor, which must be sharded by classes, or else replicated; other values unchanged."""
    if not _is_dtensor(value):
        return value
    from torch.distributed.tensor import Shard

    dims = [i for i, placement in enumerate(value.placements) if not placement.is_replicate()]
    if sharded:
        if len(dims) != 1 or value.placements[dims[0]] != Shard(0):
            raise ValueError(f"{name}: expected a DTensor with one placement Shard(0), got {value.placements}")
        theirs, ours = (dist.get_process_group_ranks(g) for g in (value.device_mesh.get_group(dims[0]), group))
        if theirs != ours:
            raise ValueError(f"{name}: is sharded over ranks {theirs}, but group has ranks {ours}")
    elif dims:
        raise ValueError(f"{name}: expected a replicated DTensor, got placements {value.placements}")
    return value.to_local()


def _checked(
    features: Any,
    weight: Any,
    bias: Any,
    target: Any,
    p: Any,
    temperature: Any,
    reduction: Any,
    include_bias: Any,
    group: dist.ProcessGroup,
) -> tuple[Problem, _Header]:
    """This rank's problem, with labels of the whole head, and its header for the other ranks."""
    features, target = _local(features, "features", group, False), _local(target, "target", group, False)
    weight, bias = _local(weight, "local_weight", group, True), _local(bias, "local_bias", group, True)
    features, weight, bias = _autocast(features, weight, bias)
    weight = _check_head(features, weight, bias, include_bias, prefix="local_", fewest=0)
    temperature = _check_options(features, temperature, reduction, "torch", include_bias)
    labels, name, p = _check_gradient(features, target, p, reduction, ())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (features, weight, bias)):
        raise NotImplementedError("sharded scores have no gradient; call under torch.no_grad() or detach the inputs")
    devices = dist.get_backend_config(group)
    if f"{features.device.type}:" not in devices:
        raise ValueError(f"features: on {features.device}, where the group does not communicate ({devices})")
    problem = Problem(
        _rows(features), weight, bias, None, temperature,
        bias_norm=1.0 if include_bias else 0.0, target=name if labels is None else labels, p=p,
    )  # fmt: skip
    agreed = {
        "features": [list(features.shape), str(features.dtype)],
        "target": name,
        "p": str(p),
        "temperature": temperature,
        "reduction": reduction,
        "include_bias": bool(include_bias),
    }
    extent = None
    if labels is not None:
        on_cpu = labels.cpu()
        agreed["labels"] = zlib.crc32(on_cpu.contiguous().numpy().tobytes())
        counted = on_cpu[on_cpu != IGNORE]
        extent = (int(counted.min()), int(counted.max())) if len(counted) else None
    return problem, _Header(classes=len(weight), bias=bias is not None, labels=extent, agreed=agreed)


def _exchange_headers(own: _Header, group: dist.ProcessGroup) -> list[_Header]:
    own = own._replace(message=own.message[:LONGEST])
    data = json.dumps(own, ensure_ascii=False).encode()
    cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
    header = torch.frombuffer(bytearray(data.ljust(HEADER)), dtype=torch.uint8).to(device)
    return [_Header(*json.loads(bytes(row.tolist()))) for row in _gather(header, group).cpu()]


def _agreed(headers: list[_Header], group: dist.ProcessGroup, cause: Exception | None) -> int:
    """How many classes the ranks before this one have. If a rank has an error, or if ranks disagree, all ranks raise
    the same error."""

    def named(i: int) -> str:
        return f"rank {dist.get_global_rank(group, i)}"

    for i, header in enumerate(headers):
        if header.kind:
            kind = "" if header.kind in ERRORS else f"{header.kind}: "
            raise ERRORS.get(header.kind, RuntimeError)(f"{named(i)}: {kind}{header.message}") from cause
    first, total = headers[0], sum(header.classes for header in headers)
    if total == 0:
        raise ValueError("local_weight: expected at least one class on some rank, got none")
    for i, header in enumerate(headers):
        for name, value in header.agreed.items():
            if value != first.agreed.get(name):
                if name == "labels":
                    raise ValueError(f"{named(i)}: target: expected the labels that {named(0)} has, got others")
                raise ValueError(
                    f"{named(i)}: {name}: expected what {named(0)} has, {first.agreed.get(name)}, got {value}"
                )
        if header.bias != first.bias:
            raise ValueError(f"{named(i)}: local_bias: expected one on all ranks or on none")
        if header.labels is not None and not 0 <= header.labels[0] <= header.labels[1] < total:
            raise ValueError(
                f"{named(i)}: target: expected labels 0 … {total - 1}, or {IGNORE} to ignore a row, got others"
            )
    return sum(header.classes for header in headers[: dist.get_rank(group)])


def _one_hot(problem: Problem, offset: int, ranks: _Ranks, out: Tensor) -> None:
    """Label and predicted targets: one exchange of each rank's sums over the other classes.

    The label's logit is −inf on ranks that do not have the label. For the predicted target, the highest of the ranks'
    top classes is y, and the rest count among the other classes.
    """
    p, inv_temperature, labels = problem.p, 1.0 / problem.temperature, problem.target
    some_powers = p not in (1.0, math.inf)
    sent = torch.empty((5 if some_powers else 4, len(out)), dtype=out.dtype, device=out.device)
    sent[0] = feature_norms(problem, out.dtype)[:, 0]
    here = problem if isinstance(labels, str) else problem._replace(target=labels - offset)
    for rows, some, columns in blocks(here, out.dtype):
        others = others_of(some, tiles_of(some, out.dtype, columns), p, False)
        for k, value in enumerate((others.z_y, others.m, others.s, others.powers)[: len(sent) - 1], 1):
            sent[k, rows] = value[:, 0].to(out.dtype)
    received = _gather(sent, ranks.group)
    norm = received[0, 0]
    wide = received.double()[..., None]  # (ranks, numbers, B, 1)
    none, zero, one = wide[0, 0] * 0.0 - torch.inf, torch.zeros_like(wide[0, 0]), torch.ones_like(wide[0, 0])
    z_y: Tensor = none
    sums: Sums = none, zero, zero, zero
    for theirs in wide:
        z, m, s = theirs[1:4]
        sums = merged(sums, (m, s, theirs[4] if some_powers else s, zero), inv_temperature, p)
        if not isinstance(labels, str):
            z_y = torch.maximum(z_y, z)
            continue
        better = ~(z <= z_y)  # NaN too
        z_y, lower = torch.where(better, z, z_y), torch.where(better, z_y, z)
        sums = merged(sums, (lower, zero, one, zero), inv_temperature, p)
    m, s, r, q = sums
    found = Probabilities(Others(z_y.long(), z_y, m, s, r, q), inv_temperature, p)
    value = found.residual_norm(p) * inv_temperature * with_bias(norm[:, None], problem.bias_norm, p)
    if not isinstance(labels, str):
        value = torch.where(labels[:, None] == IGNORE, 0.0, value)
    out.copy_(value[:, 0])


def _uniform(problem: Problem, ranks: _Ranks, out: Tensor) -> None:
    """The uniform target, in chunks of as many rows as fit: the mean of expm1, then the deviations from it."""
    norms = feature_norms(problem, out.dtype)[:, 0]
    row = max(1, max(ranks.classes)) * out.itemsize
    step = max(1, budget_of(out).chunk // LIVE // row)
    for i in range(0, len(out), step):
        chunk = problem.rows(i, i + step)
        norm, v = _deviations(chunk, norms[i : i + step], ranks)
        for factor in (problem.scale, 1.0 / problem.temperature):
            v = v * factor
        out[i : i + step] = with_bias(norm[:, None], problem.bias_norm, problem.p)[:, 0] * v


def _deviations(problem: Problem, norm: Tensor, ranks: _Ranks) -> tuple[Tensor, Tensor]:
    """‖x‖_p as computed by the first rank, and ‖p − 1/C‖_p, of one chunk of rows.  # -> 2 x (R,)

    As in _torch_forward.deviations. With m_j the maximum of rank j, C_j its classes, q_j = Σ expm1((z − m_j)/T) over
    them and a = (m_j − m)/T:  Σ expm1((z − m)/T) = q_j exp(a) + C_j expm1(a) over the same classes.
    """
    inv_temperature, classes = 1.0 / problem.temperature, sum(ranks.classes)
    z = logits_of(problem, norm.dtype) if problem.classes else norm.new_empty(len(norm), 0)
    m = z.amax(1).double() if z.shape[1] else norm.new_full(norm.shape, -torch.inf, dtype=torch.float64)
    theirs = ranks.gather(norm.double(), m, _expm1(z, m, inv_temperature).sum(1))
    norm, maxima, sums = theirs[0, 0], theirs[:, 1], theirs[:, 2]
    m = maxima.amax(0)
    a = (maxima - _finite(m)) * inv_temperature
    counts = torch.tensor(ranks.classes, dtype=torch.float64, device=a.device)[:, None]
    q = _in_order(sums * a.exp() + counts * a.expm1())
    u = _expm1(z, m, inv_temperature).sub_((q / classes)[:, None])
    return norm, _merged_norm(ranks.gather(*_norm_parts(u, problem.p)), problem.p) / (q + classes)


def _expm1(z: Tensor, m: Tensor, inv_temperature: float) -> Tensor:
    """expm1((z − m)/T) in float64.  # (R, C'), (R,) -> (R, C')"""
    return z.to(torch.float64, copy=True).sub_(_finite(m)[:, None]).mul_(inv_temperature).expm1_()


def _norm_parts(u: Tensor, p: float) -> tuple[Tensor, ...]:
    """A rank's part of ‖u‖_p: the norm itself for p = 1 and ∞, else max|u| and Σ(|u|/max|u|)^p; overwrites u."""
    magnitudes = u.abs_()
    if p == 1.0:
        return (magnitudes.sum(1),)
    largest = magnitudes.amax(1) if u.shape[1] else u.new_zeros(len(u))
    if p == math.inf:
        return (largest,)
    return largest, magnitudes.div_(torch.where(largest > 0, largest, 1.0)[:, None]).pow_(p).sum(1)


def _merged_norm(parts: Tensor, p: float) -> Tensor:
    """‖u‖_p over all classes, from all ranks' parts.  # (ranks, parts, R) -> (R,)"""
    if p == 1.0:
        return _in_order(parts[:, 0])
    largest = parts[:, 0].amax(0)
    if p == math.inf:
        return largest
    scale = parts[:, 0] / torch.where(largest > 0, largest, 1.0)
    root = _in_order(parts[:, 1] * scale.pow(p)).pow(0.5 / p)  # in two halves: C^(1/p) alone may overflow
    return largest * root * root


def _in_order(values: Tensor) -> Tensor:
    """The sum over ranks, in rank order.  # (ranks, R) -> (R,)"""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


def _finite(m: Tensor) -> Tensor:
    """What to subtract from a row whose maximum is m; 0 if all its logits are −inf."""
    return torch.where(m == -torch.inf, 0.0, m)
