"""Rows of logits on which Σ|p − 1/C| is hard to compute, and its value in float64."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

COUNTS = (1, 2, 10, 100)  # of classes that stand out
HEIGHTS = (0.3, 0.7, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
SPREADS = (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 0.1)  # of the others
CENTRES = (0.0, 5.0, -300.0)
TEMPERATURES = (1.0, 3.0, 1e3, 1e6, 1e9)


def deviation(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Σ|p − 1/C|/T of rows of logits."""
    return deviation_norm(logits, temperature, 1.0) / temperature


def deviation_norm(logits: Tensor, temperature: float, p: float) -> Tensor:
    """‖p − 1/C‖_p of rows of logits in float64, without ever subtracting nearly equal numbers.

    p·C − 1 = expm1(z/T − logmeanexp). What the rounding of logmeanexp leaves in its mean is taken out afterwards.
    """
    d = (logits.double() - logits.double().amax(1, keepdim=True)) / temperature
    # logmeanexp = log1p(mean expm1 d) keeps its digits where d is small; plain log where it is not.
    mean = torch.expm1(d).mean(1, keepdim=True)
    log_mean = torch.where(mean > -0.5, torch.log1p(mean), torch.logsumexp(d, 1, keepdim=True) - math.log(d.shape[1]))
    u = torch.expm1(d - log_mean)
    return _norm((u - u.mean(1, keepdim=True)).abs() / d.shape[1], p)


def residual_norm(logits: Tensor, labels: Tensor, temperature: float, p: float) -> Tensor:
    """‖p − e_y‖_p of float64 rows, where p_y rounds to 1 too: p_c of the others, and their sum."""
    z = logits.double() / temperature
    log_p = z - torch.logsumexp(z, 1, keepdim=True)
    others = log_p.exp().scatter(1, labels[:, None], 0.0)
    return _norm(torch.cat([others, others.sum(1, keepdim=True)], 1), p)


def _norm(values: Tensor, p: float) -> Tensor:
    largest = values.amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    return torch.linalg.vector_norm(values / unit, p, 1) * unit[:, 0]


def families(classes: int, most: int | None = None) -> Iterator[tuple[str, Tensor, float]]:
    """(name, float32 logits (1, C), temperature): all rows known to be hard, or a fixed choice of `most` of them."""
    cases = [*_outliers(classes), *_groups(classes)]
    if most is not None and most < len(cases):
        cases = random.Random(classes).sample(cases, most)
    normal = torch.randn(1, classes, generator=torch.Generator().manual_seed(classes))
    yield from hard_logits(classes, rows=1)
    for count, height, spread, centre, temperature in cases:
        z = normal * spread + centre
        z[:, classes // 3 :][:, :count] += height
        name = f"{count} of {classes} by {height:g}, others within {spread:g} around {centre:g}, T={temperature:g}"
        yield name, z, temperature


Case = tuple[int, float, float, float, float]  # classes that stand out, by how much, SPREADS, CENTRES, TEMPERATURES


def _outliers(classes: int) -> Iterator[Case]:
    """A few classes, less than half, stand out by h or by h·T."""
    counts = [count for count in COUNTS if count == 1 or 2 * count < classes]
    for case in itertools.product(counts, HEIGHTS, (1, -1), (False, True), SPREADS, CENTRES, TEMPERATURES):
        count, height, sign, scaled, spread, centre, temperature = case
        if not (scaled and temperature == 1.0):
            yield count, sign * height * (temperature if scaled else 1.0), spread, centre, temperature


def _groups(classes: int) -> Iterator[Case]:
    """A share of the classes stands out, up to two thirds."""
    for share, height, sign, spread in itertools.product((0.1, 0.25, 0.4, 0.5, 0.66), HEIGHTS, (1, -1), (0.0, 1e-4)):
        yield max(1, int(share * classes)), sign * height, spread, 0.0, 1.0


def hard_logits(classes: int, rows: int = 2) -> Iterator[tuple[str, Tensor, float]]:
    """(name, float32 logits (rows, C), temperature): one of each kind."""
    normal = torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes))
    yield "normal", normal, 1.0
    yield "sharp", normal * 30, 1.0
    yield "saturated by scale", normal * 1000, 1.0
    for temperature in (0.01, 30.0, 1e3, 1e6, 1e9):
        yield f"T={temperature:g}", normal * 4, temperature
    for spread in (1e-1, 1e-3, 1e-4, 1e-6):
        yield f"within {spread:g}", normal * spread, 1.0
    yield "within 1e-3 around 100", normal * 1e-3 + 100, 1.0
    for height in (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.3, 0.51, 0.69, 0.7, 1.0, 3.0, 10.0, 80.0, 3e4):
        for sign in (1, -1):
            z = torch.zeros(rows, classes)
            z[:, classes // 3] = sign * height
            yield f"one class {'above' if sign > 0 else 'below'} by {height:g}", z, 1.0
    for share, height in ((2, 0.69), (10, -20.0)):
        z = torch.zeros(rows, classes)
        z[:, : max(1, classes // share)] = height
        yield f"one in {share} by {height:g}", z, 1.0
    if classes > 2:
        masked = normal.clone()
        masked[:, ::2] = -torch.inf
        yield "masked classes", masked, 1.0
        tied = normal.clone()
        tied[:, -2:] = 5.0
        yield "ties", tied, 1.0


def by_temperature(cases: Iterable[tuple[str, Tensor, float]]) -> Iterator[tuple[float, tuple[str, ...], Tensor]]:
    """(temperature, names, logits (n, C)) of all rows that have this temperature."""
    cases = list(cases)
    for temperature in {t for _, _, t in cases}:
        names, logits = zip(*((name, z) for name, z, t in cases if t == temperature), strict=True)
        yield temperature, names, torch.cat(logits)
