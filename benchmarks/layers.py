"""Gradient norms of all layers of a network: time and memory of every way to get them, in one run.

    python benchmarks/layers.py [--model resnet50] [--batch 8] [--rounds 5] [--threads 1]

Writes results/<device>/layers.json and layers.md. Nothing is downloaded: the weights are random, with running
statistics from a few random batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from gradnorm_fast.layers import layer_gradnorms

from measure import environment, peak_extra_memory, synchronize

Score = Callable[[], Tensor]
OURS, LOOP, PYTORCH_OOD = "layer_gradnorms", "per-sample loop", "pytorch-ood"


def calibrated(name: str, device: str) -> nn.Module:
    """A network with random weights, and running statistics that keep its activations in range."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).to(device)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(4, 3, 96, 96, device=device))
    return model.eval()


def loss(logits: Tensor) -> Tensor:
    return -torch.log_softmax(logits, 1).mean()


def loop(model: nn.Module, images: Tensor) -> Tensor:
    """One forward and one backward pass for each image, as the official code."""
    parameters = list(model.parameters())
    scores = []
    for i in range(len(images)):
        gradients = torch.autograd.grad(loss(model(images[i : i + 1])), parameters)
        scores.append(torch.stack([g.abs().sum() for g in gradients]).sum())
    return torch.stack(scores)


def saved_activations(model: nn.Module, images: Tensor) -> int:
    """Bytes that one forward pass of the batch keeps for its backward pass, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        logits = model(images)
    del logits
    return sum(kept.values())


def measure(model: nn.Module, images: Tensor, rounds: int, device: str) -> dict[str, Any]:
    from pytorch_ood.detector import GradNorm as PytorchOod

    theirs = PytorchOod(model)
    calls: dict[str, Score] = {
        OURS: lambda: layer_gradnorms(model, images),
        LOOP: lambda: loop(model, images),
        PYTORCH_OOD: lambda: -theirs.predict(images),
    }
    scores = {name: call() for name, call in calls.items()}  # also the warm-up
    truth = layer_gradnorms(model.double(), images.double())
    model.float()
    found = {
        name: {
            "wall": [],
            "cpu": [],
            "extra_memory": peak_extra_memory(call, device),
            "relative_error": ((scores[name].double() - truth) / truth).abs().max().item(),
        }
        for name, call in calls.items()
    }
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            synchronize(device)
            found[name]["wall"].append(time.perf_counter() - wall)
            found[name]["cpu"].append(time.process_time() - cpu)
    return found


def report(results: dict[str, Any]) -> str:
    clock, rows = results["clock"], results["implementations"]
    memory = results["saved_activations"]
    bound = 2 * memory + results["largest_gradient"]
    lines = [
        "# Gradient norms of all layers",
        "",
        f"{results['model']}, batch {results['batch']}, {results['parameters'] / 1e6:.1f} million parameters, 224², "
        f"float32, random weights; {results['environment']['device']}, {results['environment']['threads']} thread(s), "
        f"torch {results['environment']['torch']}. Times are "
        + ("CPU time" if clock == "cpu" else "wall time")
        + f", medians of {results['rounds']} rounds in turn; ratios are medians over rounds. Written by "
        "`python benchmarks/layers.py`.",
        "",
        "| | time | times ours | extra memory | relative error |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        ratio = statistics.median(a / b for a, b in zip(row[clock], rows[OURS][clock], strict=True))
        lines.append(
            f"| {name} | {statistics.median(row[clock]):.2f} s | {ratio:.2f} | {row['extra_memory'] / 2**20:.0f} MiB | "
            f"{row['relative_error']:.1e} |"
        )
    lines += [
        "",
        f"A forward pass of the batch keeps {memory / 2**20:.0f} MiB of activations; twice that and the gradient of "
        f"the largest parameter are {bound / 2**20:.0f} MiB. The error is the largest over the batch, against float64.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a torchvision classifier")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = calibrated(arguments.model, arguments.device)
    images = torch.randn(arguments.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(arguments.device)
    results: dict[str, Any] = {
        "environment": environment(arguments.device),
        "model": arguments.model,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "clock": "wall" if arguments.device.startswith("cuda") else "cpu",  # a shared machine's wall clock says little
        "parameters": sum(p.numel() for p in model.parameters()),
        "saved_activations": saved_activations(model, images),
        "largest_gradient": max(p.numel() * p.itemsize for p in model.parameters()),
        "implementations": measure(model, images, arguments.rounds, arguments.device),
    }
    folder = Path(__file__).parent / "results" / arguments.device.partition(":")[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layers.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "layers.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
