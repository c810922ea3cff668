"""What it costs to hold one row of each batch against the head: python benchmarks/verification.py [model] [batch].

On a CPU, one thread, processor time (other processes do not count), medians of interleaved rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torchvision

from gradnorm_fast import heads


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(name: str = "resnet18", batch: str = "32", rounds: int = 7) -> None:
    torch.set_num_threads(1)
    model = torchvision.models.get_model(name, weights=None).eval()
    images = torch.randn(int(batch), 3, 224, 224)
    passes, checks = [], []
    with torch.no_grad():
        head_name, head = heads.find_head(model, images[:2])
        features, logits = heads.features_and_logits(model, head, images)
        for row in range(rounds):
            passes.append(seconds(lambda: model(images)))

            def check(row: int = row) -> None:
                verification = heads.check_row(head_name, head, features, logits, row % len(images))
                assert verification is not None
                verification.raise_if_failed()

            checks.append(seconds(check))
    forward, verify = statistics.median(passes), statistics.median(checks)
    print(
        f"{name}, batch {batch}: pass {forward * 1e3:.0f} ms, verification {verify * 1e3:.2f} ms, "
        f"{verify / forward:.2%} of it"
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
