"""The gloo ranks of test_distributed.py: one process imports torch and forks them, and each saves its results.

python tests/distributed_ranks.py FOLDER writes FOLDER/WORLD-RANK.pt for every world and rank below.
"""

import datetime
import itertools
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from gradnorm_fast import distributed
from gradnorm_fast._torch_forward import Budget
from gradnorm_fast.distributed import sharded_gradnorm

from families import hard_logits

TIMEOUT = 10.0  # seconds, of the groups in which a rank fails
FAULTS = ("killed", "raising", "asleep")
SIZES = (2, 3, 4)
CLASSES = 600
NORMS = (1.0, 2.0, math.inf, 0.5, 3.0)


def shards(classes: int, ranks: int) -> list[int]:
    """Sizes of the shards: uneven, and for more than two ranks one is empty."""
    return {2: [classes - 7, 7], 3: [5, 0, classes - 5], 4: [0, classes // 2, 1, classes - classes // 2 - 1]}[ranks]


def hard_problems():
    """(name, logits (R, CLASSES), temperature, options): the logits of one-hot features are the weight's columns."""
    by_temperature: dict[float, list[torch.Tensor]] = {}
    for _, logits, temperature in hard_logits(CLASSES):
        if logits.isinf().any():
            continue  # 0·inf; the bias masks classes below
        by_temperature.setdefault(temperature, []).append(logits)
    for (temperature, rows), p, target in itertools.product(by_temperature.items(), NORMS, ("uniform", "predicted", 3)):
        logits = torch.cat(rows)
        target = torch.full((len(logits),), 450) if target == 3 else target
        name = f"T={temperature:g}, p={p:g}, {target if isinstance(target, str) else 'labels'}"
        yield name, logits, temperature, dict(target=target, p=p, temperature=temperature)


def plain_problems():
    """(name, features, weight, bias, options); every product and sum is exact in float32."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randint(-8, 9, shape, generator=g) / 4 for shape in ((3, 5, 12), (CLASSES, 12), (CLASSES,)))
    b[::3] = -torch.inf
    labels = torch.randint(0, CLASSES // 3, (3, 5), generator=g) * 3 + 1
    labels[1, 2] = -100
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for target, p in itertools.product(("uniform", "predicted", labels), (1.0, 2.0)):
            options = dict(target=target, p=p, temperature=1.7, include_bias=p == 1.0)
            yield f"{dtype}, {options}", x.to(dtype), w.to(dtype), b.to(dtype), options
    yield "sum", x, w, b, dict(reduction="sum")
    yield "no bias, masks a shard", x, torch.cat([w[:5] * 0, w[5:]]), None, dict(p=math.inf)
    yield "no rows", x[:, :0], w, b, dict(target="predicted")
    bad = x.clone()
    bad[0, 0, 0], bad[1, 1, 1], bad[2, 4] = torch.nan, torch.inf, 0.0
    for target in ("uniform", "predicted", labels):
        yield f"not finite, {target}", bad, w, b, dict(target=target)


def bad_inputs():
    """(name, function of a rank that gives what it passes)"""
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    labels = torch.tensor([0, 15])

    def given(rank, **change):
        change = {key: value for key, value in change.items() if rank == 2}
        return dict(dict(features=x, local_weight=w), **change)

    yield "shape", lambda rank: given(rank, local_weight=w[:, :2])
    yield "type", lambda rank: given(rank, local_weight=[[1.0]])
    yield "temperature", lambda rank: dict(given(rank, features=x), temperature=0.0 if rank == 2 else 1.0)
    yield "disagree", lambda rank: dict(given(rank), temperature=2.0 if rank == 2 else 1.0)
    yield "rows", lambda rank: given(rank, features=x[:1])
    yield "bias", lambda rank: dict(given(rank), local_bias=None if rank == 2 else torch.zeros(4))
    yield "labels", lambda rank: dict(given(rank), target=labels + 1 if rank == 2 else labels)
    yield "label", lambda rank: dict(given(rank), target=labels + 1)
    yield "gradient", lambda rank: given(rank, features=x.clone().requires_grad_())
    yield "empty", lambda rank: given(rank) | dict(local_weight=w[:0])
    yield "unexpected", lambda rank: given(rank, local_weight=Exploding())


class Exploding(torch.Tensor):
    """A tensor that fails where no check expects it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise ZeroDivisionError("boom")


def whole_world(rank: int) -> dict[str, object]:
    """The results of one of four ranks."""
    groups = {n: dist.new_group(list(range(n))) for n in SIZES}
    found: dict[str, object] = {}
    sent: list[int] = []
    gather = distributed.all_gather

    def counting(out, t, **options):
        sent.append(t.numel() * t.itemsize)
        return gather(out, t, **options)

    distributed.all_gather = counting
    for n, group in groups.items():
        if rank >= n:
            continue
        here = slice(sum(shards(CLASSES, n)[:rank]), sum(shards(CLASSES, n)[: rank + 1]))
        for name, logits, _, options in hard_problems():
            sent.clear()
            x = torch.eye(len(logits))
            found[f"{n} {name}"] = sharded_gradnorm(x, logits.t()[here], group=group, **options)
            found[f"{n} {name} sent"] = list(sent)
        for name, x, w, b, options in plain_problems():
            b = b if b is None else b[here]
            found[f"{n} {name}"] = sharded_gradnorm(x, w[here], b, group=group, **options)
    for name, arguments in bad_inputs():
        found[f"bad {name}"] = attempt(**arguments(rank))
    found["not a member"] = attempt(torch.ones(2, 3), torch.ones(4, 3), group=groups[2])
    x, w = torch.ones(2, 3), torch.arange(12.0).view(4, 3)[rank : rank + 1]
    found["uniform"] = counted(sent, x, w, target="uniform")
    found["near-uniform"] = counted(sent, x, w * 1e-3, target="uniform")
    found["uniform, p = 2"] = counted(sent, x, w, target="uniform", p=2.0)
    found["label"] = counted(sent, x, w, target=torch.tensor([0, 3]))
    found["predicted, p = 3"] = counted(sent, x, w, target="predicted", p=3.0)
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]] * 2 + [[0.0, 0.0, 9.0, 0.0]])
    logits[2] *= 1e-3
    found["chunks whole"] = sharded_gradnorm(torch.eye(5), logits.t()[rank : rank + 1])
    budget_of, distributed.budget_of = distributed.budget_of, lambda device: Budget(4 * distributed.LIVE * 2, 0, 64)
    sent.clear()
    found["chunks"] = sharded_gradnorm(torch.eye(5), logits.t()[rank : rank + 1])
    found["chunks sent"] = list(sent)
    distributed.budget_of, distributed.all_gather = budget_of, gather
    found |= dtensors(rank)
    return found


def attempt(*args, **options):
    try:
        return sharded_gradnorm(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)


def counted(sent, *args, **options):
    sent.clear()
    sharded_gradnorm(*args, **options)
    return list(sent)


def dtensors(rank: int) -> dict[str, object]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    x = torch.arange(8.0).view(2, 4) / 8
    w, b = torch.arange(40.0).view(10, 4) % 7, torch.arange(10.0)
    labels = torch.tensor([3, 9])
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    found: dict[str, object] = {"DTensor whole": (x, w, b, labels)}
    for name, mesh, placements in (
        ("line", line, [Shard(0)]),
        ("square", square, [Replicate(), Shard(0)]),
        ("few classes", line, [Shard(0)]),
        ("columns", line, [Shard(1)]),
        ("replicated", line, [Replicate()]),
    ):
        some = 2 if name == "few classes" else 10
        weight, bias = (distribute_tensor(t[:some], mesh, placements) for t in (w, b.new_zeros(10, 4)))
        bias = distribute_tensor(b[:some], mesh, placements) if name != "columns" else None
        found[f"DTensor {name}"] = attempt(x, weight, bias, target="predicted" if some == 2 else labels, p=2.0)
        if name == "square":
            found["DTensor other group"] = attempt(x, weight, bias, group=dist.group.WORLD)
            parameter = torch.nn.Parameter(weight)
            with torch.no_grad():
                replicated = distribute_tensor(x, mesh, [Replicate(), Replicate()])
                found["DTensor parameter"] = attempt(replicated, parameter, bias, target=labels, p=2.0)
            found["DTensor gradient"] = attempt(x, parameter, bias)
    return found


def faulty_world(rank: int, fault: str) -> dict[str, object]:
    """Three ranks, the last of which fails after a first call."""
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    sharded_gradnorm(x, w)
    if rank == 2:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raising":
            raise ValueError("a rank that fails elsewhere")
        time.sleep(1.3 * TIMEOUT)
        return {}
    start = time.monotonic()
    return {"result": attempt(x, w), "seconds": time.monotonic() - start}


def run(folder: Path, world: str, rank: int, size: int) -> None:
    seconds = TIMEOUT if world in FAULTS else 60.0
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / world}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    found = faulty_world(rank, world) if world in FAULTS else whole_world(rank)
    torch.save(found, folder / f"{world}-{rank}.pt")


def main() -> int:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    children = []
    for world, size in (("whole", max(SIZES)), *((fault, 3) for fault in FAULTS)):
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    run(folder, world, rank, size)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)  # skip the store's shutdown: other ranks may be gone
            children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
