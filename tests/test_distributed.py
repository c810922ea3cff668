"""Classes sharded over gloo ranks, against the unsharded call. 13 processes are forked once and save their results."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradnorm_fast import fast_gradnorm
from gradnorm_fast.distributed import HEADER, sharded_gradnorm

import distributed_ranks as ranks
from families import deviation_norm, residual_norm

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of every rank, by world and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run = subprocess.run(
        [sys.executable, ranks.__file__, str(folder)], capture_output=True, text=True, timeout=200, check=True
    )
    saved = {path.stem: torch.load(path) for path in Path(folder).glob("*.pt")}
    assert {f"whole-{rank}" for rank in range(4)} <= saved.keys(), run.stderr
    return saved


def close(got, expected, p):
    """Whether equal to 1e-6, or 5e-5 below p = 1, and to float32's least numbers; NaN where the other is."""
    got, expected = got.double(), expected.double()
    within = (got - expected).abs() <= (1e-6 if p >= 1.0 else 5e-5) * expected.abs() + 1e-37
    return bool((within | (got.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("size", ranks.SIZES)
def test_hard_rows(found, size):
    """Equal to the unsharded call, and to float64 on the same logits; the same bits on all ranks."""
    for name, logits, temperature, options in ranks.hard_problems():
        all_ranks = [found[f"whole-{rank}"][f"{size} {name}"] for rank in range(size)]
        assert all(torch.equal(all_ranks[0], other) for other in all_ranks), name
        target, p, got = options["target"], options["p"], all_ranks[0]
        assert close(got, fast_gradnorm(torch.eye(len(logits)), logits.t(), **options), p), name
        if isinstance(target, str) and target == "uniform":
            truth = deviation_norm(logits, temperature, p)
        else:
            labels = target if isinstance(target, torch.Tensor) else logits.argmax(1)
            truth = residual_norm(logits, labels, temperature, p)
        assert close(got * temperature, truth, p), name


@pytest.mark.parametrize("size", ranks.SIZES)
def test_dtypes_biases_and_rows_that_are_not_finite(found, size):
    for name, x, w, b, options in ranks.plain_problems():
        all_ranks = [found[f"whole-{rank}"][f"{size} {name}"] for rank in range(size)]
        assert all(torch.equal(a.view(torch.uint8), all_ranks[0].view(torch.uint8)) for a in all_ranks), name
        expected = fast_gradnorm(x, w, b, **options)
        assert all_ranks[0].dtype == expected.dtype and all_ranks[0].shape == expected.shape
        assert close(all_ranks[0], expected, options.get("p", 1.0)), name


def test_how_often_ranks_exchange_and_how_much(found):
    """What docs/gradients.md says, in bytes per rank and row of float32."""
    per_row = {
        "uniform": [24, 8],
        "near-uniform": [24, 8],
        "uniform, p = 2": [24, 16],
        "label": [16],
        "predicted, p = 3": [20],
    }
    for rank in range(4):
        for name, numbers in per_row.items():
            assert found[f"whole-{rank}"][name] == [HEADER, *(2 * number for number in numbers)], name
        # logits of two rows at a time
        rows = found[f"whole-{rank}"]["chunks sent"]
        assert rows == [HEADER, 48, 16, 48, 16, 24, 8]
        assert close(found[f"whole-{rank}"]["chunks"], found[f"whole-{rank}"]["chunks whole"], 1.0)
    # whatever the rows, all ranks send alike
    for size in ranks.SIZES:
        for name, *_ in ranks.hard_problems():
            sent = [found[f"whole-{rank}"][f"{size} {name} sent"] for rank in range(size)]
            assert all(one == sent[0] for one in sent)


def test_bad_input_on_one_rank_raises_on_all_and_names_it(found):
    expected = {
        "shape": ("ValueError", "rank 2: features: expected shape (..., 2) to match local_weight (4, 2), got (2, 3)"),
        "type": ("TypeError", "rank 2: local_weight: expected a torch.Tensor, got list"),
        "temperature": ("ValueError", "rank 2: temperature: expected a finite positive number"),
        "disagree": ("ValueError", "rank 2: temperature: expected what rank 0 has, 1.0, got 2.0"),
        "rows": ("ValueError", "rank 2: features: expected what rank 0 has, [[2, 3], 'torch.float32'], got [[1,"),
        "bias": ("ValueError", "rank 2: local_bias: expected one on all ranks or on none"),
        "labels": ("ValueError", "rank 2: target: expected the labels that rank 0 has, got others"),
        "label": ("ValueError", "rank 0: target: expected labels 0 … 15, or -100 to ignore a row, got others"),
        "gradient": ("NotImplementedError", "rank 2: sharded scores have no gradient"),
        "empty": ("ValueError", "local_weight: expected at least one class on some rank, got none"),
        "unexpected": ("RuntimeError", "rank 2: ZeroDivisionError: boom"),
    }
    assert {name for name, _ in ranks.bad_inputs()} == expected.keys()
    for rank in range(4):
        for name, (kind, message) in expected.items():
            got = found[f"whole-{rank}"][f"bad {name}"]
            assert got[0] == kind and got[1].startswith(message), (rank, name, got)
    assert found["whole-3"]["not a member"] == ("ValueError", "group: this process is not a member of it")


def test_dtensors_bring_their_group(found):
    x, w, b, labels = found["whole-0"]["DTensor whole"]
    whole = fast_gradnorm(x, w, b, target=labels, p=2.0)
    few = fast_gradnorm(x, w[:2], b[:2], target="predicted", p=2.0)
    for rank in range(4):
        got = found[f"whole-{rank}"]
        for name, expected in (("line", whole), ("square", whole), ("parameter", whole), ("few classes", few)):
            assert close(got[f"DTensor {name}"], expected, 2.0), name
        for name, message in (
            ("columns", "local_weight: expected a DTensor with one placement Shard(0), got (Shard(dim=1),)"),
            ("replicated", "local_weight: expected a DTensor with one placement Shard(0), got (Replicate(),)"),
            ("other group", "local_weight: is sharded over ranks [0, 1], but group has ranks [0, 1, 2, 3]"),
        ):
            assert message in got[f"DTensor {name}"][1], name
        assert got["DTensor gradient"][0] == "NotImplementedError"


@pytest.mark.parametrize("fault", ranks.FAULTS)
def test_a_rank_that_does_not_answer_ends_the_others(found, fault):
    """In a group with a timeout of 10 s, within 20 s."""
    for rank in range(2):
        got = found[f"{fault}-{rank}"]
        assert got["result"][0] in ("RuntimeError", "DistBackendError", "DistNetworkError"), got
        assert got["seconds"] <= 2 * ranks.TIMEOUT


def test_without_a_group():
    with pytest.raises(RuntimeError, match=r"group: torch\.distributed is not initialised"):
        sharded_gradnorm(torch.ones(2, 3), torch.ones(4, 3), p=math.inf)


def test_a_device_that_the_group_does_not_serve():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        x, w = torch.ones(2, 3, device="meta"), torch.ones(4, 3, device="meta")
        with pytest.raises(ValueError, match="features: on meta, where the group does not communicate"):
            sharded_gradnorm(x, w)
    finally:
        torch.distributed.destroy_process_group()
