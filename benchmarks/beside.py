"""The rest of the package side by side with what others use: processor time of one CPU thread, medians of rounds.

    python benchmarks/beside.py                       all of it, or some of the subjects: --help names them
    python benchmarks/beside.py layers --threads 2    wall time of two threads

The first row of a table is its unit, and what results of the same shape are compared with. Nothing is downloaded: heads
and networks have random weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's package, whatever else is installed

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, log_softmax, one_hot, softmax

from gradnorm_fast import _torch_targets, fast_gradnorm, heads, layer_gradnorms, token_statistics
from gradnorm_fast.kernels.problem import Problem

from measure import peak_extra_memory

Calls = dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]
ROUNDS = 5


def head(rows: int, depth: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weight and labels."""
    return torch.rand(rows, depth), torch.randn(classes, depth) / depth**0.5, torch.randint(0, classes, (rows,))


def targets() -> Calls:
    """Every target and norm, 1024 x 2048 x 1000"""
    x, w, labels = head(1024, 2048, 1000)
    calls: Calls = {"matmul": lambda: x @ w.T}
    for name, target in (("uniform", "uniform"), ("label", labels), ("predicted", "predicted")):
        for p in (1.0, 2.0, float("inf"), 3.0):

            def norm(target: str | Tensor = target, p: float = p) -> Tensor:
                return fast_gradnorm(x, w, target=target, p=p)

            calls[f"{name}, p = {p:g}"] = norm
    return calls | {"token_statistics": lambda: token_statistics(x, w, labels)}


def expressions(z: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    log_p = log_softmax(z, 1)
    p = log_p.exp()
    return log_p.gather(1, labels[:, None])[:, 0], -(p * log_p).sum(1), p.square().sum(1)


def tokens() -> Calls:
    """Log probability, entropy and Σp², 256 x 64 x 32000"""
    x, w, labels = head(256, 64, 32000)
    ours = lambda: tuple(token_statistics(x, w, labels)[:3])  # noqa: E731
    return {"token_statistics": ours, "one log_softmax": lambda: expressions(x @ w.T, labels)}


def logits() -> Calls:
    """Log probability, entropy and Σp² of given logits, 256 x 32000"""
    z, labels = 3.0 * torch.randn(256, 32000), torch.randint(0, 32000, (256,))
    problem = Problem(torch.ones(256, 1), None, None, z, 1.0, target=labels, p=2.0)

    def ours() -> tuple[Tensor, ...]:
        """What token_statistics runs on the logits of a tile; no public call takes logits."""
        _torch_targets.token_statistics(problem, out := torch.empty(4, 256))
        return out[:3].unbind(0)

    def separate() -> tuple[Tensor, ...]:
        log_p = log_softmax(z, 1).gather(1, labels[:, None])[:, 0]
        return log_p, -(softmax(z, 1) * log_softmax(z, 1)).sum(1), softmax(z, 1).square().sum(1)

    def verl() -> tuple[Tensor, ...]:
        """By its formulas, from the sums of exponentials."""
        log_p = z.gather(1, labels[:, None])[:, 0] - z.logsumexp(1)
        entropy = z.logsumexp(1) - (softmax(z, 1) * z).sum(1)
        return log_p, entropy, ((2.0 * z).logsumexp(1) - 2.0 * z.logsumexp(1)).exp()

    shared = lambda: expressions(z, labels)  # noqa: E731
    return {"token_statistics": ours, "one log_softmax": shared, "three expressions": separate, "verl's formulas": verl}


def weights() -> Calls:
    """‖p − e_y‖₂², 256 x 64 x 32000: verl's optimal token baseline and EL2N"""
    x, w, labels = head(256, 64, 32000)

    def verl() -> Tensor:
        z = x @ w.T
        log_p = z.gather(1, labels[:, None])[:, 0] - z.logsumexp(1)
        return 1 - 2 * log_p.exp() + ((2.0 * z).logsumexp(1) - 2.0 * z.logsumexp(1)).exp()

    def el2n() -> Tensor:
        p = softmax(x @ w.T, 1)
        return (p - one_hot(labels, 32000)).norm(dim=1).square()

    ours = lambda: token_statistics(x, w, labels).residual_norm.square()  # noqa: E731
    return {"token_statistics": ours, "verl's formula": verl, "EL2N's formula": el2n}


def grand() -> Calls:
    """GraNd of the last layer, 64 x 2048 x 1000"""
    (x, w, labels), b = head(64, 2048, 1000), torch.zeros(1000)

    def deepcore() -> Tensor:
        """By its formula, with the gradients (B, C, D + 1) in memory."""
        z = linear(x, w, b).requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(z, labels, reduction="sum"), z)
        return torch.cat([g, (x[:, None] * g[:, :, None]).flatten(1)], 1).norm(dim=1)

    ours = lambda: fast_gradnorm(x, w, b, target=labels, p=2.0, include_bias=True)  # noqa: E731
    return {"fast_gradnorm": ours, "DeepCore's formula": deepcore}


def uncertainty() -> Calls:
    """GradUncertainty of the last layer, 64 x 2048 x 1000"""
    from pytorch_ood.detector import GradUncertainty  # type: ignore[import-untyped]

    (x, w, _), b = head(64, 2048, 1000), torch.zeros(1000)
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 2048, 1000)
    layer.load_state_dict({"weight": w, "bias": b})
    theirs = GradUncertainty(layer)
    ours = lambda: -fast_gradnorm(x, w, b, p=2.0, reduction="sum", include_bias=True).square()  # noqa: E731
    return {"fast_gradnorm": ours, "pytorch-ood": lambda: theirs.predict(x)}


def exgrad() -> Calls:
    """ExGrad of the last layer, 1 x 2048 x 1000"""
    x, w, labels = head(1, 2048, 1000)

    def loop() -> Tensor:
        """By its formula, the mean over labels drawn from p of ‖∂ log p_y/∂W‖₁."""
        p = softmax(x @ w.T, 1)[0]
        norms = []
        for y in range(1000):
            weight = w.requires_grad_()
            (g,) = torch.autograd.grad(log_softmax(x @ weight.T, 1)[0, y], weight)
            norms.append(g.abs().sum())
        w.requires_grad_(False)
        return (p * torch.stack(norms)).sum()[None]

    def ours() -> Tensor:
        found = token_statistics(x, w, labels)
        return 2 * x.abs().sum(1) * (1 - found.sum_squares)

    return {"token_statistics": ours, "a gradient for each class": loop}


def layers() -> Calls:
    """GradNorm of all layers, ResNet-50, batch 8"""
    from pytorch_ood.detector import GradNorm as PytorchOod

    torch.manual_seed(0)
    model, images = torchvision.models.resnet50(), torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        for _ in range(20):  # running statistics that keep its activations in range
            model(torch.randn(4, 3, 96, 96))
    theirs, parameters = PytorchOod(model.eval()), list(model.parameters())

    def loop() -> Tensor:
        scores = []
        for image in images.split(1):
            gradients = torch.autograd.grad(-log_softmax(model(image), 1).mean(), parameters)
            scores.append(torch.stack([g.abs().sum() for g in gradients]).sum())
        return torch.stack(scores)

    def bound() -> tuple[Tensor, ...]:
        """The gradients summed over the batch: no way through the library's convolutions takes less."""
        return torch.autograd.grad(-log_softmax(model(images), 1).mean(1).sum(), parameters)

    ours = lambda: layer_gradnorms(model, images)  # noqa: E731
    return {
        "layer_gradnorms": ours,
        "forward and backward of the batch": bound,
        "per-sample loop": loop,
        "pytorch-ood": lambda: -theirs.predict(images),
    }


def verification() -> Calls:
    """One row of each batch held against the head, ResNet-18, batch 32"""
    model, images = torchvision.models.resnet18().eval(), torch.randn(32, 3, 224, 224)
    model.requires_grad_(False)
    name, linear_head = heads.find_head(model, images[:2])
    features, logits = heads.features_and_logits(model, linear_head, images)

    def check() -> tuple[Tensor, ...]:
        found = heads.check_row(name, linear_head, features, logits, 0)
        assert found is not None
        found.raise_if_failed()
        return ()

    return {"forward pass": lambda: model(images), "verification": check}


def difference(a: object, b: object) -> str:
    """The largest relative difference of results of the same shapes; - for others."""
    left, right = ([t] if isinstance(t, Tensor) else list(t) if isinstance(t, tuple) else [] for t in (a, b))
    if not left or [t.shape for t in left] != [t.shape for t in right]:
        return "-"
    return f"{max(((t - u).abs() / u.abs()).max().item() for t, u in zip(left, right, strict=True)):.1g}"


def show(calls: Calls, clock: Callable[[], float]) -> None:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(ROUNDS + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if k:  # the first warms up
                times[name].append(1e3 * (clock() - start))
    unit, first = next(iter(times.values())), next(iter(calls.values()))()
    print("| | ms | ratio | extra memory | difference |\n|---|---:|---:|---:|---:|")
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, unit, strict=True))
        memory = peak_extra_memory(calls[name]) / 2**20
        differs = difference(calls[name](), first)
        print(f"| {name} | {statistics.median(found):.2f} | {ratio:.3g} | {memory:.1f} MiB | {differs} |")


if __name__ == "__main__":
    subjects = {
        call.__name__: call
        for call in (targets, tokens, logits, weights, grand, uncertainty, exgrad, layers, verification)
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"some of: {', '.join(subjects)} (all)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; wall time for more than one")
    args = parser.parse_args()
    chosen = args.subjects or list(subjects)
    if unknown := set(chosen) - set(subjects):
        parser.error(f"expected some of {', '.join(subjects)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    for name in chosen:
        print(f"\n{subjects[name].__doc__}\n")
        show(subjects[name](), time.process_time if args.threads == 1 else time.perf_counter)
