"""The paper's ablations and the baselines of its Table 1, from one cached set of features.

Gradients of other layers and ODIN with a perturbation need a second pass over the images (`ModelScorer.second_pass`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._files import replacing
from .._progress import Progress
from ..baselines import Mahalanobis, odin_from_logits
from ..evaluation import Results, ScoresLike, compare, fpr95, results_csv, results_table
from ..functional import gradnorm_from_logits
from .options import SCORE_OPTIONS
from .plan import TITLES, Plan
from .run_log import resumable
from .scorers import Scorer
from .tables import Array, Table

NORMS = {"L0.3": 0.3, "L0.8": 0.8, "L1": 1.0, "L2": 2.0, "L3": 3.0, "L4": 4.0, "L∞": math.inf}
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1024.0)
FACTORS = {"GradNorm": "gradnorm", "feature norm": "feature_norm", "output norm": "output_norm"}
CHUNK_BYTES = 64 * 2**20  #: of features and logits at a time


class Scores(NamedTuple):
    """Of each set, the ID set first: {set: {method or setting: (N,)}}."""

    baselines: dict[str, dict[str, Array]]
    ablation: dict[str, dict[str, dict[str, Array]]]  #: by part
    notes: list[str]  #: how the baselines were made


def scores_of(
    plan: Plan,
    scorer: Scorer,
    tables: Mapping[str, Table],
    features: Mapping[str, Path],
    second: Mapping[str, Table],
    train: Table | None,
    progress: bool,
) -> Scores:
    """The scores beside those of the one pass.

    Args:
        tables: of the one pass, the ID set first.
        features: the file (N, D) of each set, and of "train" where there is one.
        second: of the second pass, where there was one.
        train: of the one pass over the images that Mahalanobis is fitted to.
    """
    found = Scores({name: {} for name in tables}, {part: {name: {} for name in tables} for part in plan.parts}, [])
    loaded = {name: np.load(path, mmap_mode="r") for name, path in features.items()}
    cached = {"norm", "temperature"} & set(plan.parts)
    if cached or "odin" in plan.baselines:
        bar = Progress(sum(len(loaded[name]) for name in tables), "rows of features", progress)
        bar.start(bar.total)
        for name in tables:
            for part, of_set in _from_features(loaded[name], scorer, plan, bar).items():
                (found.baselines if part == "baselines" else found.ablation[part])[name].update(of_set)
        bar.close()
    for name, table in tables.items():
        if "factors" in plan.parts:
            found.ablation["factors"][name] = {label: table.scores[field] for label, field in FACTORS.items()}
        for column, values in second[name].scores.items() if plan.second_pass else ():
            if column == "odin":
                found.baselines[name]["ODIN"] = values
            else:
                found.ablation["layers"][name][column.removeprefix("gradnorm of ")] = values
    if "odin" in plan.baselines:
        found.notes.append(f"ODIN: temperature 1000, epsilon {plan.epsilon:g}.")
    if "mahalanobis" in plan.baselines:
        found.notes.append(_mahalanobis(found.baselines, tables, loaded, train))
    return found


def _from_features(features: Array, scorer: Scorer, plan: Plan, bar: Progress) -> dict[str, dict[str, Array]]:
    """By part of the ablation, or "baselines", and by setting or method."""
    detector = scorer.detector
    assert detector is not None
    weight, bias = detector._weights()
    dtype = torch.promote_types(weight.dtype, torch.from_numpy(np.empty(0, features.dtype)).dtype)
    device = scorer.device
    weight, bias = weight.flatten(1).to(device, dtype), None if bias is None else bias.to(device, dtype)
    options = {name: getattr(detector, name) for name in SCORE_OPTIONS}
    chunks: dict[tuple[str, str], list[torch.Tensor]] = {}
    step = max(1, CHUNK_BYTES // (weight.itemsize * sum(weight.shape)))
    for start in range(0, len(features), step):
        x = torch.from_numpy(np.array(features[start : start + step])).to(device, dtype)
        z = torch.nn.functional.linear(x, weight, bias)
        settings = {("norm", label): {"p": p} for label, p in NORMS.items()}
        settings |= {("temperature", f"{t:g}"): {"temperature": t} for t in TEMPERATURES}
        for (part, label), setting in settings.items():
            if part in plan.parts:
                score = gradnorm_from_logits(x, z, **options | setting)
                chunks.setdefault((part, label), []).append(score.cpu())
        if "odin" in plan.baselines and not plan.epsilon:
            chunks.setdefault(("baselines", "ODIN"), []).append(odin_from_logits(z).cpu())
        bar.advance(len(x))
    found: dict[str, dict[str, Array]] = {}
    for (part, label), rows in chunks.items():
        found.setdefault(part, {})[label] = torch.cat(rows).numpy()
    return found


def _mahalanobis(
    scores: dict[str, dict[str, Array]], tables: Mapping[str, Table], features: Mapping[str, Array], train: Table | None
) -> str:
    """Add the scores of every set; how they were made."""
    inside = next(iter(tables))
    name, fitted, rows = (
        ("train", train, slice(None)) if train is not None else (inside, tables[inside], slice(0, None, 2))
    )
    known = (fitted.labels >= 0).all()
    labels = fitted.labels if known else fitted.scores["prediction"]
    x = np.array(features[name][rows])
    detector = Mahalanobis().fit(x, labels[rows])
    for of_set in tables:
        scored = features[of_set][1::2] if train is None and of_set == inside else features[of_set]
        scores[of_set]["Mahalanobis"] = detector.score(np.array(scored)).numpy()
    where = f"the {len(x)} training images"
    if train is None:
        where = f"every other of the {len(labels)} ID images, scored on the rest"
    note = f"Mahalanobis: last layer only, fitted to {where}; classes {'as labelled' if known else 'as predicted'}."
    if len(x) <= x.shape[1] + len(detector.classes):
        note += f" Too few images for {x.shape[1]} features: its covariance is singular."
    return note


def check_finite(scores: Scores, tables: Mapping[str, Table]) -> None:
    for of_sets in (scores.baselines, *scores.ablation.values()):
        for name, by_method in of_sets.items():
            for method, values in by_method.items():
                bad = np.flatnonzero(~np.isfinite(values))
                if len(bad):
                    raise ValueError(
                        f"eval: expected finite scores, but in {name} {len(bad)} of {len(values)} by {method} are not"
                    )


def results_of(scores: Mapping[str, Mapping[str, ScoresLike]], **options: Any) -> Results:
    """`compare` of the first set with the others."""
    inside, *others = scores
    return compare(scores[inside], {name: scores[name] for name in others}, **options)


def write(out: Path, part: str, results: Results) -> None:
    """ablation-PART.md, .csv and .png."""
    texts = {
        ".md": f"GradNorm by {TITLES[part]}, in %\n\n{results_table(results)}\n",
        ".csv": results_csv(results),
    }
    with resumable(out):
        for suffix, text in texts.items():
            with replacing(out / f"ablation-{part}{suffix}", encoding="utf-8") as file:
                file.write(text)
        _draw(out / f"ablation-{part}.png", part, results)


def _draw(path: Path, part: str, results: Results) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..report import plot_label

    figure = Figure(figsize=(9, 3.6), layout="constrained")  # pyplot would choose a window system
    FigureCanvasAgg(figure)
    settings = list(next(iter(results.values())))
    for ax, title in zip(
        figure.subplots(1, 2), ("FPR95 in %, smaller is better", "AUROC in %, larger is better"), strict=True
    ):
        for i, (name, of_set) in enumerate(results.items()):
            values = [100 * (fpr95(of_set[s]) if title.startswith("FPR95") else of_set[s]["auroc"]) for s in settings]
            style = {"color": "black", "linewidth": 2.2} if name == "average" else {"color": f"C{i}", "linewidth": 1.2}
            ax.plot(range(len(settings)), values, marker="o", markersize=4, label=plot_label(name), **style)
        ax.set(title=title, xlabel=TITLES[part])
        long = max(map(len, settings)) > 6
        ax.set_xticks(range(len(settings)), settings, rotation=30 if long else 0, ha="right" if long else "center")
        ax.grid(axis="y", color="0.9")
    ax.legend(framealpha=0.85, edgecolor="none", fontsize=8)
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=80)
