"""Which kernel and configuration a call takes: by the tables, or, with GRADNORM_FAST_AUTOTUNE=1, by timing them.

    C <= 256                        one_tile
    B <= 64, 256 < C <= 4096        few_rows, two launches
    the rest, and float64           library for float32 and float64, split for halves

cooperative, cluster and few_rows in one launch have not run on a GPU: only the tuner may choose them, once it has seen
them give the same scores, and sooner, on the device at hand. With GRADNORM_FAST_BATCH_INVARIANT=1 every batch takes the
configuration of a large one: then the bits of a row's score do not depend on the rows beside it, at the price of few
programs where the batch is small. (Not so for float64, whose matmul is always the library's.)
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from . import cluster, cooperative, few_rows, library, one_tile, split
from .targets import (
    ANY,
    INTERPRETED,
    Config,
    TensorDescriptor,
    architecture,
    cdiv,
    descriptors_fit,
    dot_precision,
    multiprocessors,
    power_of_2,
)


class Plan(NamedTuple):
    kernel: str  #: a key of KERNELS
    config: Config


KERNELS: dict[str, Callable[..., None]] = {
    "one_tile": one_tile.score_one_tile,
    "few_rows": few_rows.score_few_rows,
    "few_rows, one launch": partial(few_rows.score_few_rows, one_launch=True),
    "library": library.score_library,
    "split": split.score_split,
    "cooperative": cooperative.score_cooperative,
    "cluster": cluster.score_cluster,
}
_tuned: dict[tuple[Any, ...], Plan] = {}


def chosen(features: torch.Tensor, weight: torch.Tensor, run: Callable[[Plan], torch.Tensor]) -> Plan:
    """For features (B, D) and weight (C, D); `run` gives a plan's scores (B,), should they have to be timed, and may
    give them in the same memory each time."""
    (b, d), c, dtype, device = features.shape, weight.shape[0], features.dtype, features.device
    invariant = os.environ.get("GRADNORM_FAST_BATCH_INVARIANT") == "1"
    rows = ANY if invariant else b
    plan = by_table(rows, c, d, dtype, device)
    unfit = invariant or library.copies(features) or library.copies(weight)
    if plan.kernel == "library" and dtype == torch.float32 and unfit:
        plan = Plan("split", split.configuration(rows, c, d, dtype, architecture(device)))
    if invariant or dtype == torch.float64 or os.environ.get("GRADNORM_FAST_AUTOTUNE") != "1":
        return plan
    arch = architecture(device)
    readable = plan.kernel, descriptors_fit(arch, features, weight)  # by the library, by TMA
    key = (power_of_2(b), c, d, dtype, device, dot_precision(dtype, arch), readable)
    if key not in _tuned:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return plan
        _tuned[key] = fastest(plan, features, weight, run)
    return _tuned[key]


@lru_cache(4096)
def by_table(b: int, c: int, d: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The default: a pure function of shape, dtype and device."""
    arch = architecture(device)
    if c <= one_tile.MAX_CLASSES and dtype != torch.float64:
        return Plan("one_tile", one_tile.configuration(b, c, d, dtype, arch))
    if b <= few_rows.MAX_ROWS and c <= few_rows.MAX_CLASSES and dtype != torch.float64:
        return Plan("few_rows", few_rows.configuration(b, c, d, dtype, arch, multiprocessors(device)))
    if dtype.itemsize > 2:
        return Plan("library", library.CONFIGURATION)
    return Plan("split", split.configuration(b, c, d, dtype, arch))


def fastest(best: Plan, features: torch.Tensor, weight: torch.Tensor, run: Callable[[Plan], torch.Tensor]) -> Plan:
    """The candidate with the lowest median time among those whose scores are the default's, `best` until then."""
    tf32 = dot_precision(features.dtype, architecture(features.device)) == "tf32"
    scores = run(best)
    expected, least = scores.clone(), _seconds(partial(run, best), features.device)
    for plan in candidates(features, weight):
        scores.fill_(-1.0)  # so that what a kernel does not write is not taken for its work
        try:
            if torch.allclose(run(plan), expected, rtol=1e-3 if tf32 else 1e-4, equal_nan=True):
                seconds = _seconds(partial(run, plan), features.device)
                best, least = (plan, seconds) if seconds < least else (best, least)
        except (RuntimeError, ValueError, TritonError):
            continue  # too large for this device, or a kernel that it cannot run
    return best


def candidates(features: torch.Tensor, weight: torch.Tensor) -> Iterator[Plan]:
    """What is worth timing for features (B, D) and weight (C, D), the likeliest first."""
    (b, d), c, half = features.shape, weight.shape[0], features.dtype.itemsize == 2
    arch, processors = architecture(features.device), multiprocessors(features.device)
    tma = (False, True) if TensorDescriptor is not None and (INTERPRETED or arch in ("sm_90", "sm_100")) else (False,)
    allowed = dot_precision(features.dtype, arch) == "tf32"
    exact = ("ieee",) if half or allowed or not arch.startswith("sm_") else ("tf32x3", "ieee")
    stages = (2,) if arch.startswith("gfx") else (3, 4)

    def tiles(kernel: str, *shapes: tuple[int, int, int, int], tma: tuple[bool, ...] = (False,)) -> Iterator[Plan]:
        for (rows, classes, step, warps), n, t, e in product(shapes, stages, tma, exact):
            yield Plan(kernel, Config(rows, classes, step, warps, n, t, float32=e))

    if c <= one_tile.MAX_CLASSES:
        width = one_tile.configuration(b, c, d, features.dtype, arch).block_c
        steps = (64, 128) if half else (32, 64)
        shapes = product((16, 32, 64, 128), (width,), steps, (4, 8))
        yield from tiles("one_tile", *(s for s in shapes if s[0] * width <= 64 * 32 * s[3] and s[0] <= max(16, b)))
        return
    if b <= few_rows.MAX_ROWS and c <= few_rows.MAX_CLASSES:
        default = few_rows.configuration(b, c, d, features.dtype, arch, processors)
        for classes, step, n in product((16, 32, 64), (64, 128, 256) if half else (32, 64), (1, 2, 4, 8, 16)):
            programs = cdiv(c, classes) * n
            if n * step <= d and processors // 4 <= programs <= 4 * processors:
                config = default._replace(block_c=classes, block_d=step, slices=n)
                yield Plan("few_rows", config)
                if programs <= processors:
                    yield Plan("few_rows, one launch", config)
        return
    wide: tuple[tuple[int, int, int, int], ...]
    if half:
        wide = ((128, 256, 64, 8), (128, 128, 64, 8), (64, 256, 64, 8), (256, 128, 64, 8), (64, 128, 64, 4))
    else:
        wide = ((128, 128, 32, 8), (64, 128, 32, 8), (64, 64, 32, 4))
    if library.fits(features):
        yield from (Plan("library", library.CONFIGURATION._replace(workspace=n)) for n in (64, 24))
    for by_tile in tiles("split", *wide, tma=tma):
        yield by_tile
        if 4 * b * c > 24 * 2**20:  # chunks that stay in L2
            yield by_tile._replace(config=by_tile.config._replace(workspace=24))
    yield from tiles("cooperative", *(s for s in wide if cdiv(c, s[1]) <= processors), tma=tma)
    if cluster.fits(features, weight):
        whole = max(512, power_of_2(c))
        for rows, classes, n in product((64, 128), (128, 256), stages):
            if whole // classes <= 16 and rows * classes <= 128 * 128:
                yield Plan("cluster", Config(rows, whole, 64, 8, n, tma=True, num_ctas=whole // classes))


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Median time of a call by itself, launches included, as its caller waits for it; on a GPU by events."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
    return statistics.median(times)
