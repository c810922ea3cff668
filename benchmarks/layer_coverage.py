"""`layer_gradnorms` on every classifier of torchvision, against autograd one sample at a time.

    python benchmarks/layer_coverage.py [NAME ...] [--out coverage.csv]

Random weights, float64, small images, L1 and L2 norms of every parameter. One model is in memory at a time; the largest
takes about 8 GB. A model passes if all norms agree to 1e-9 and no parameter needed a pass of its own for each sample.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from gradnorm_fast import layer_gradnorms
from gradnorm_fast.layers import LayerNorms

NORMS = (1.0, 2.0)
RELATIVE = 1e-9
FLOOR = 1e-6  #: of the largest norm: smaller ones are compared as if they were that, for some are 0 but for rounding
SIZES = {"inception_v3": 75, "alexnet": 63, "maxvit_t": 224, "googlenet": 48, "squeezenet": 48}  #: by prefix; else 32


class Outcome(NamedTuple):
    model: str
    parameters: int
    error: float  #: the largest relative difference of a norm
    one_by_one: int  #: parameters without a rule
    seconds: float
    reason: str  #: why it failed; empty where it did not


def check(name: str) -> Outcome:
    start = time.perf_counter()
    error, without_rule, parameters, reason = math.nan, 0, 0, ""
    try:
        model, images = build(name)
        parameters = sum(p.numel() for p in model.parameters())
        truth = sample_by_sample(model, images)
        error = 0.0
        for p in NORMS:
            found = layer_gradnorms(model, images, p=p, per_layer=True)
            assert isinstance(found, LayerNorms)
            without_rule = len(found.one_by_one)
            largest = max(norms.max() for norms in truth[p].values())
            for parameter, expected in truth[p].items():
                difference = (found[parameter] - expected).abs() / expected.clamp(min=float(FLOOR * largest))
                error = max(error, float(difference.max()))
                if not found[parameter].isfinite().all():
                    error = math.inf
        if not error <= RELATIVE:
            reason = "norms differ"
        elif without_rule:
            reason = "no rule for some parameters"
    except Exception as exception:  # the script is there to find models that cannot be scored
        reason = f"{type(exception).__name__}: {exception}"
    return Outcome(name, parameters, error, without_rule, time.perf_counter() - start, reason)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model in float64, no parameter or statistic at a value that hides a mistake, and two images."""
    torch.manual_seed(0)
    size = next((size for prefix, size in SIZES.items() if name.startswith(prefix)), 32)
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit"):
        size = 2 * int(name.rpartition("_")[2])
        options["image_size"] = size
    model = torchvision.models.get_model(name, weights=None, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


def sample_by_sample(model: nn.Module, images: Tensor) -> dict[float, dict[str, Tensor]]:
    """By p and parameter the norms (B,), from one backward pass of each image."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {p: {name: torch.zeros(len(images), dtype=images.dtype) for name in names.values()} for p in NORMS}
    for i in range(len(images)):
        with _gradients(model) as gradients:
            # two copies: torch's batch_norm is wrong on one image with a transposed gradient
            loss = -torch.log_softmax(model(images[[i, i]]), 1)[0].mean()
            gradients.append(lambda parameter, i=i: _note(found, names[parameter], i, parameter.grad))
            loss.backward()
    return found


def _note(found: dict[float, dict[str, Tensor]], name: str, i: int, gradient: Tensor) -> None:
    for p in NORMS:
        found[p][name][i] = torch.linalg.vector_norm(gradient, p)


@contextmanager
def _gradients(model: nn.Module) -> Iterator[list[Any]]:
    """Calls the function in the list with each parameter as its gradient is complete, which is then let go."""
    functions: list[Any] = []

    def complete(parameter: Tensor) -> None:
        functions[0](parameter)
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(complete) for p in model.parameters()]
    try:
        yield functions
    finally:
        for handle in handles:
            handle.remove()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models (default: all)")
    parser.add_argument("--out", type=Path, help="a CSV, one line per model")
    arguments = parser.parse_args()
    names = arguments.names or torchvision.models.list_models(torchvision.models)
    outcomes = []
    for i, name in enumerate(names):
        outcome = check(name)
        gc.collect()
        outcomes.append(outcome)
        print(
            f"{i + 1}/{len(names)} {name}: {outcome.reason or 'ok'}, error {outcome.error:.1e}, "
            f"{outcome.parameters / 1e6:.1f} million parameters, {outcome.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if arguments.out is not None:
            with open(arguments.out, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(Outcome._fields)
                writer.writerows(outcomes)
    failed = [outcome.model for outcome in outcomes if outcome.reason]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} models" + (f"; not {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
