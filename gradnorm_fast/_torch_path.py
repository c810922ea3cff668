"""The score in plain torch: the path of CPUs, of devices without Triton, and of every backward.

The formula is that of kernels/deviation.py, arranged for a CPU: the logits of a chunk of rows are written once and then
worked on in pieces: softmax, and a quick sum for Σ|p − 1/C| where that is large, as it is in practice. Rows where it is
small are taken out and centred, with expm1 if near uniform. Extra memory stays below MEMORY, whatever B·C is; in
backward, apart from what gradients and a half-precision weight take in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad, softshrink

MIB = 2**20
MEMORY = 32 * MIB  # the promise; its parts:
LOGITS = 10 * MIB  # logits of a chunk of rows
OPERAND = 4 * MIB  # features, and classes of the weight, converted for the matmul
PIECE = 4 * MIB  # what is worked on at a time, in scratch memory allocated once: fresh pages cost more than work
LONGEST_ROW = 3 * MIB  # of logits; a longer one is taken in tiles of classes, computed twice

# As measured: BLAS takes less time, half of it at 4 rows, if the logits of FEW rows lie transposed in memory; softmax
# over 10 classes takes ten times as long as over NARROW, a whole vector.
FEW = 128
NARROW = 16

# A quick sum gives Σ|p − 1/C| with an absolute error of some 3e-7. That is enough where it is LARGE, as for any trained
# network. Where classes are MANY, rounding shows in Σp: it has to be 1 up to EXCESS. Other rows are computed again,
# centred.
MANY = 128
LARGE, LARGE_OF_MANY = 0.25, 0.5
EXCESS = 4

FIELDS = ("gradnorm", "feature_norm", "output_norm", "max_logit", "msp", "energy")

Logits = Callable[[slice, int, int], Tensor]  # rows, first class, last class + 1 -> (rows, classes)


def slices(count: int, size: int, budget: int) -> Iterator[slice]:
    """range(count) in slices whose items of `size` bytes fit the budget, at least one item each."""
    step = max(1, budget // max(1, size))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def _cut(t: Tensor, part: slice, dim: int = 0) -> Tensor:
    """The slice of t, and t itself where that is all of it: a view costs as much as a sum over a row."""
    size = part.stop - part.start
    return t if size == t.shape[dim] else t.narrow(dim, part.start, size)


def _usable(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether BLAS reads this matrix as it lies, rather than torch copying all of it first."""
    (m, n), (a, b) = matrix.shape, matrix.stride()
    return matrix.dtype == dtype and ((b == 1 and a >= max(1, n)) or (a == 1 and b >= max(1, m)))


def _converted(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _given_logits(logits: Tensor) -> Logits:
    return lambda rows, start, stop: _cut(_cut(logits, rows), slice(start, stop), 1)


def _transposed(rows: int, classes: int) -> bool:
    """Whether the logits are to lie transposed in memory."""
    return rows <= FEW < classes


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias, x, w.t(), out=out)


def _head_logits(features: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, elements: int) -> Logits:
    """Logits of the linear head, computed in dtype; each call overwrites what the last one returned."""
    size, depth = dtype.itemsize, weight.shape[1]
    buffer = torch.empty(elements, dtype=dtype, device=features.device)
    if bias is not None:
        bias = bias.to(dtype)
    convert_x, convert_w = not _usable(features, dtype), not _usable(weight, dtype)
    if convert_w and weight.numel() * size <= OPERAND:
        weight, convert_w = _converted(weight, dtype), False

    def logits(rows: slice, start: int, stop: int) -> Tensor:
        x, n, classes = _cut(features, rows), rows.stop - rows.start, stop - start
        if convert_x:
            x = _converted(x, dtype)
        z = buffer.as_strided((n, classes), (1, n) if _transposed(n, classes) else (classes, 1))
        for part in slices(classes, depth * size if convert_w else 0, OPERAND if convert_w else classes):
            here = slice(start + part.start, start + part.stop)
            w = _cut(weight, here)
            if convert_w:
                w = _converted(w, dtype)
            _linear(x, w, None if bias is None else _cut(bias, here), out=_cut(z, part, 1))
        return z

    return logits


def _in_scratch(scratch: Tensor, like: Tensor) -> Tensor:
    """Memory in the shape of `like`: scratch where that is large enough, else new."""
    memory = scratch if like.numel() <= len(scratch) else scratch.new_empty(like.numel())
    return memory.as_strided(like.shape, (like.shape[1], 1))


def feature_norm(x: Tensor, scratch: Tensor) -> Tensor:
    """‖x‖₁ of each row, NaN where that is not finite: such a row has no score.  # (R, D) -> (R,)"""
    norms = []
    for part in slices(x.shape[0], x.shape[1], len(scratch)):
        rows = _cut(x, part)
        memory = _in_scratch(scratch, rows)
        magnitudes = torch.abs(rows, out=memory) if rows.dtype == memory.dtype else memory.copy_(rows).abs_()
        norms.append(magnitudes.sum(1))
    norm = norms[0] if len(norms) == 1 else torch.cat(norms)
    return norm.add_(norm - norm)


def _softmax(z: Tensor, inv_temperature: float, out: Tensor) -> Tensor:
    if inv_temperature != 1.0:
        z = _shifted(z, inv_temperature, out if z.device.type == "cpu" else torch.empty_like(out))
    return torch.softmax(z, 1, out=out)


def _shifted(z: Tensor, inv_temperature: float, out: Tensor) -> Tensor:
    """(z − max z)/T, shifted before it is divided."""
    return torch.sub(z, z.amax(1, keepdim=True), out=out).mul_(inv_temperature)


def _expm1_(d: Tensor) -> Tensor:
    """expm1 of d <= 0, in place. In float32 on a CPU, where torch's own may take 20 times an exp, by the polynomial of
    kernels/deviation.py."""
    if d.dtype != torch.float32 or d.device.type != "cpu":
        return d.expm1_()
    p = (d * (1 / 40320)).add_(1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1):
        p.mul_(d).add_(1 / factorial)
    far = d <= -0.5
    return torch.where(far, d.exp().sub_(1), p.mul_(d), out=d) if far.any() else d.mul_(p)


def _centered(z: Tensor, inv_temperature: float, u: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Into u the deviations s·(p − 1/C) of the rows of logits z, to the last digits.  # -> s, max p, each (R,)

    u = t − mean t, where t is p, or expm1 in near rows, and then less its own mean: that takes out what rounding the
    first mean left. Given top, max p but for the rounding of Σ exp.
    """
    near = top * z.shape[1] < 2.0  # Σ exp(d) = 1/top > C/2
    if z.device.type != "cpu":  # never wait for the data: both branches for every row
        p = _softmax(z, inv_temperature, u)
        torch.where(near[:, None], _shifted(z, inv_temperature, torch.empty_like(u)).expm1_(), p, out=u)
    elif near.all():
        _expm1_(_shifted(z, inv_temperature, u))
    else:
        _softmax(z, inv_temperature, u)
        if near.any():
            some = z[near]
            u[near] = _expm1_(_shifted(some, inv_temperature, some))
    q = u.sum(1)
    u.sub_((q / z.shape[1])[:, None])
    u.sub_(u.mean(1, keepdim=True))
    s = torch.where(near, q + z.shape[1], q)
    return s, torch.where(near, 1.0, top) / s


def _deviation(z: Tensor, inv_temperature: float, scratch: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Σ|p − 1/C| and max p of the rows of logits z, given top, max p roughly.  # (R, C) -> 2 x (R,)"""
    u = _in_scratch(scratch, z)
    s, msp = _centered(z, inv_temperature, u, top)
    return u.abs_().sum(1) / s, msp


def _score_rows(z: Tensor, inv_temperature: float, scratch: Tensor, head: bool) -> tuple[Tensor, ...]:
    """Logits z (R, C) to Σ|p − 1/C|; with head also to max_logit, msp, energy and prediction.  # each (R,)"""
    z = z.to(scratch.dtype)
    padded = z if z.shape[1] >= NARROW else pad(z, (0, NARROW - z.shape[1]), value=-torch.inf)
    p = _softmax(padded, inv_temperature, _in_scratch(scratch, padded))
    if z.device.type == "cpu":
        msp = p.amax(1) if head else p
        # Σ|p − 1/C| = 2·Σ max(p − 1/C, 0) − (Σp − 1)
        many, worst, tolerance = z.shape[1] > MANY, 0.0, EXCESS * torch.finfo(p.dtype).eps
        large = LARGE_OF_MANY if many else LARGE
        excess = p.sum(1).sub_(1.0) if many else p
        deviation = softshrink(p, 1.0 / z.shape[1], out=p).sum(1).mul_(2.0)  # type: ignore[call-arg]
        if many:
            deviation.sub_(excess)
            worst = excess.abs_().max().item()
        if not (deviation.min().item() >= large and worst <= tolerance):
            doubtful = (deviation < large) | (excess > tolerance) if many else deviation < large
            unsure = doubtful.nonzero()[:, 0]
            rows = z if len(unsure) == len(z) else z[unsure]
            top = p.amax(1)[unsure] + 1.0 / z.shape[1]
            deviation[unsure], top = _deviation(rows, inv_temperature, scratch, top)
            if head:
                msp[unsure] = top
    else:  # never wait for the data
        deviation, msp = _deviation(z, inv_temperature, scratch, p.amax(1))
    if not head:
        return (deviation,)
    m, prediction = z.max(1)
    return deviation, m, msp, m - msp.log() / inv_temperature, prediction


def _score_long_row(
    tiles: Sequence[Callable[[], Tensor]], classes: int, inv_temperature: float, scratch: Tensor
) -> tuple[Tensor, ...]:
    """The same, always all five, for one row in tiles (1, n), called for twice; kernels/rows.py explains the merge."""
    m = scratch.new_full((1,), -torch.inf)
    s, q, total, delta, sigma = (torch.zeros_like(m) for _ in range(5))
    prediction, seen = torch.zeros_like(m, dtype=torch.int64), 0
    for tile in tiles:  # max, Σ exp and Σ expm1, rebased whenever the maximum rises
        z = tile().to(scratch.dtype)
        tile_m, index = z.max(1)
        prediction = torch.where(tile_m > m, index + seen, prediction)
        old, m = m, torch.maximum(m, tile_m)
        shift = torch.where(m == -torch.inf, 0.0, m)
        rise = torch.expm1((old - shift) * inv_temperature)
        d = z.sub(shift[:, None]).mul_(inv_temperature)
        s = s * (1 + rise) + d.exp().sum(1)
        q = q * (1 + rise) + seen * rise + _expm1_(d).sum(1)
        seen += z.shape[1]
    near = s > 0.5 * classes
    mean = torch.where(near, q, s) / classes
    for tile in tiles:
        d = tile().to(scratch.dtype).sub(m[:, None]).mul_(inv_temperature)
        u = torch.where(near[:, None], _expm1_(d.clone()), d.exp_()).sub_(mean[:, None])
        total, delta, sigma = total + u.abs().sum(1), delta + u.sum(1), sigma + u.sign_().sum(1)
    s = mean * classes + delta + torch.where(near, classes, 0)
    return (total - delta * sigma / classes) / s, m, 1 / s, m + s.log() / inv_temperature, prediction


def forward(
    features: Tensor,
    logits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    prediction: Tensor | None,
    temperature: float,
    scale: float,
    bias_norm: float,
) -> None:
    """Scores of features (B, D), from logits (B, C) or from a head, into out (1, B), or (6, B) with prediction (B,)."""
    dtype, size, inv_temperature = out.dtype, out.itemsize, 1.0 / temperature
    batch, depth = features.shape
    classes = logits.shape[1] if logits is not None else weight.shape[0]  # type: ignore[union-attr]
    width = max(classes, NARROW)
    elements = batch * max(width, depth)
    small = elements * size <= PIECE  # then all in one piece, by few calls: they may take longer than the work
    elements = min(elements, PIECE // size)
    scratch = torch.empty(elements, dtype=dtype, device=features.device)

    def score(here: slice, scores: tuple[Tensor, ...]) -> None:
        """Write the scores of these rows, given those of their logits."""
        target, norm, output_norm = _cut(out, here, 1), feature_norm(_cut(features, here), scratch), scores[0]
        for factor in (scale, inv_temperature):  # in this order: 0·inf is not 0
            if factor != 1.0:
                output_norm = output_norm * factor
        torch.mul(norm + bias_norm if bias_norm else norm, output_norm, out=target[0])
        if prediction is not None:
            poison = (norm - norm) + (scores[0] - scores[0])  # a row without a score has no other number either
            for field, value in enumerate((norm, output_norm, *scores[1:4]), 1):
                torch.add(value, poison, out=target[field])
            prediction[here] = torch.where(poison == 0, scores[4], 0)

    head = prediction is not None
    if logits is not None:
        z, row_bytes, source = logits, 1, _given_logits(logits)
    else:
        assert weight is not None
        if small := small and _usable(features, dtype) and _usable(weight, dtype):
            strides = (1, batch) if _transposed(batch, classes) else (classes, 1)
            z = torch.empty_strided((batch, classes), strides, dtype=dtype, device=features.device)
            _linear(features, weight, bias, out=z)
        else:
            row_bytes = max(classes, 0 if _usable(features, dtype) else depth * LOGITS // OPERAND) * size
            elements = min(batch * classes, max(LOGITS // size, min(classes, LONGEST_ROW // size)))
            source = _head_logits(features, weight, bias, dtype, elements)
    if small:
        score(slice(0, batch), _score_rows(z, inv_temperature, scratch, head))
        return
    long = classes * size > LONGEST_ROW
    for rows in slices(batch, LOGITS if long else row_bytes, LOGITS):
        chunk = None if long else source(rows, 0, classes)
        for part in slices(rows.stop - rows.start, (width + 8) * size, PIECE):
            here = slice(rows.start + part.start, rows.start + part.stop)
            if chunk is not None:
                score(here, _score_rows(_cut(chunk, part), inv_temperature, scratch, head))
            else:
                tiles = [partial(source, here, c.start, c.stop) for c in slices(classes, size, LONGEST_ROW)]
                score(here, _score_long_row(tiles, classes, inv_temperature, scratch))


def backward(
    grad: Tensor,
    features: Tensor,
    logits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    scale: float,
    bias_norm: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for features, logits, weight and bias, given grad (1, B), or (6, B), of forward's out.

    With V = scale/T·Σ|p − 1/C| and sign(0) = 0:  ∂V/∂z_k = scale/T²·p_k (sign(p_k − 1/C) − Σ_c sign(p_c − 1/C)·p_c),
    ∂(‖x‖₁ + bias_norm)·V = V·sign(x) for x and (‖x‖₁ + bias_norm)·∂V for z; then z = xWᵀ + b as in any linear layer.
    """
    dtype, inv_temperature = grad.dtype, 1.0 / temperature
    grad_x, grad_z, grad_w, grad_b = (
        torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        if need and like is not None
        else features.new_empty(0)
        for like, need in zip((features, logits, weight, bias), needed, strict=True)
    )
    if logits is not None:
        classes, source = logits.shape[1], _given_logits(logits)
    else:
        assert weight is not None
        classes, w = weight.shape[0], weight.to(dtype)
        source = _head_logits(features, weight, bias, dtype, max(PIECE // dtype.itemsize, classes))
    for rows in slices(features.shape[0], classes * dtype.itemsize, PIECE):
        x, z, g = features[rows].to(dtype), source(rows, 0, classes).to(dtype), grad[:, rows]
        prediction = z.argmax(1)
        p, u = _softmax(z, inv_temperature, torch.empty_like(z)), torch.empty_like(z)
        s, _ = _centered(z, inv_temperature, u, p.amax(1))
        norm = x.abs().sum(1)
        output_norm = u.abs().sum(1) / s * scale * inv_temperature
        grad_norm, grad_output = g[0] * output_norm, g[0] * (norm + bias_norm)
        if len(g) > 1:
            grad_norm, grad_output = grad_norm + g[1], grad_output + g[2]
        dz = u.sign_()
        dz.sub_((dz * p).sum(1, keepdim=True)).mul_(p).mul_((grad_output * scale * inv_temperature)[:, None])
        dz *= inv_temperature  # not squared before: 1/T² may overflow where dz is 0
        if len(g) > 1:
            msp = p.gather(1, prediction[:, None])[:, 0]
            dz += p * (g[5] - g[4] * msp * inv_temperature)[:, None]
            dz.scatter_add_(1, prediction[:, None], (g[3] + g[4] * msp * inv_temperature)[:, None])
        if needed[0]:
            grad_x[rows] = x.sign() * grad_norm[:, None]
            if logits is None:
                grad_x[rows] += dz @ w
        if needed[1]:
            grad_z[rows] = dz
        if needed[2]:
            grad_w += dz.t() @ x
        if needed[3]:
            grad_b += dz.sum(0)
    return (
        grad_x.to(features.dtype),
        grad_z if logits is None else grad_z.to(logits.dtype),
        grad_w if weight is None else grad_w.to(weight.dtype),
        grad_b if bias is None else grad_b.to(bias.dtype),
    )
