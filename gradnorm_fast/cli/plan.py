"""What an evaluation adds to the scores of the one pass: the paper's baselines and ablations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from .parsing import finite, positive

if TYPE_CHECKING:
    from .scorers import Scorer

BASELINES = ("odin", "mahalanobis")
PARTS = ("norm", "temperature", "factors", "layers")  #: of the ablation
TITLES = {"norm": "norm", "temperature": "temperature", "factors": "factor", "layers": "layers"}


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the paper's baselines and ablations")
    group.add_argument(
        "--baselines",
        nargs="*",
        default=[],
        choices=BASELINES,
        metavar="NAME",
        help="rows of Table 1: odin mahalanobis",
    )
    group.add_argument(
        "--odin-epsilon",
        type=finite,
        metavar="E",
        help="move images by E, in units of the model's input, before ODIN scores them; takes a second pass with "
        "gradients (0, as in the paper's ImageNet code)",
    )
    group.add_argument(
        "--train",
        metavar="PATH",
        help="images or features that Mahalanobis is fitted to (default: half of the ID images)",
    )
    group.add_argument(
        "--ablation",
        nargs="*",
        choices=PARTS,
        metavar="PART",
        help="tables and plots by norm, temperature and factors (the default), all from one set of features, and by "
        "layers, which takes a second pass with gradients",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="at most N images of each set, evenly spaced")


class Plan(NamedTuple):
    """The baselines and ablations to compute beside the scores of the one pass."""

    baselines: list[str]
    parts: list[str]  #: of the ablation
    epsilon: float  #: of ODIN

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """Raises ValueError for options that would have no effect."""
        parts = [] if args.ablation is None else [p for p in PARTS if p in (args.ablation or PARTS[:3])]
        plan = cls([b for b in BASELINES if b in args.baselines], parts, args.odin_epsilon or 0.0)
        if args.odin_epsilon is not None and "odin" not in plan.baselines:
            raise ValueError("odin-epsilon: it goes with --baselines odin")
        if plan.epsilon < 0:
            raise ValueError(f"odin-epsilon: expected a number >= 0, got {plan.epsilon:g}")
        if args.train is not None and "mahalanobis" not in plan.baselines:
            raise ValueError("train: it goes with --baselines mahalanobis")
        if args.layers is not None and (plan.baselines or plan.parts):
            raise ValueError("layers: it does not go with --baselines and --ablation; compare with --ablation layers")
        return plan

    @property
    def features(self) -> bool:
        """Whether features are needed."""
        return bool(self.baselines or {"norm", "temperature"} & set(self.parts))

    @property
    def second_pass(self) -> bool:
        return self.epsilon > 0 or "layers" in self.parts

    def check(self, scorer: Scorer) -> None:
        """Refuse, before any work, what this scorer cannot give; ValueError."""
        from .scorers import FileScorer, ModelScorer

        option = "baselines" if self.baselines else "ablation"
        if self.features and isinstance(scorer, FileScorer):
            raise ValueError(f"{option}: expected images or features, files of scores do not hold enough")
        if self.second_pass and not isinstance(scorer, ModelScorer):
            option = "odin-epsilon" if self.epsilon else "ablation: layers"
            raise ValueError(f"{option}: expected images and --model, for a pass with gradients")
