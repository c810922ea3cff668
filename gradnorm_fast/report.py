"""Scores as a page to look at: one HTML file that needs nothing else, with plots, a table and the images themselves."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ._files import replacing
from .evaluation import METHODS, MORE_METHODS, UNCERTAINTIES, Results, compare, plot_roc, plot_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_EXTRA = 'pip install "gradnorm_fast[eval]"'
_THUMBNAIL = 160  # pixels, of the longer side
_LONG = ' class="long"'  # of a detail that takes a line of its own
_PIXELATED = 64  # images up to this size are enlarged without smoothing
_FIELDS = {
    "gradnorm": "GradNorm",
    "feature_norm": "feature norm",
    "output_norm": "output norm",
    "msp": "MSP",
    "max_logit": "max logit",
    "energy": "energy",
}


class Scored(Protocol):
    """The images of a set and their scores; any object with these two will do."""

    @property
    def names(self) -> Sequence[str]:
        """The path, or another name, of each image."""

    @property
    def scores(self) -> Mapping[str, Any]:
        """(N,) tensors or arrays by field of `HeadScores`; fields other than the score reported may be absent."""


class ScoredImages(NamedTuple):
    """The plainest `Scored`."""

    names: Sequence[str]
    scores: Mapping[str, Any]


def write_report(
    path: str | os.PathLike[str],
    sets: Mapping[str, Scored],
    *,
    score: str = "gradnorm",
    threshold: float | None = None,
    results: Results | None = None,
    classes: Sequence[str] | None = None,
    details: Mapping[str, object] | None = None,
    read_image: Callable[[str], Image] | None = None,
    gallery: int = 24,
    title: str = "GradNorm report",
) -> None:
    """Write an HTML page with histogram, gallery and, for several sets, ROC curves and a table.

    The gallery holds the most and the least in-distribution images of each set, to be sorted and filtered in the page.
    Nothing is loaded from anywhere: the page can be mailed, and opened on a phone.

    Args:
        path: where to write; ends in .html. An existing file is replaced, whole or not at all.
        sets: by name. One set: images of any kind. Several: the first is in-distribution, the others are OOD.
        score: the field of `HeadScores` that is reported, larger = more in-distribution: neither entropy nor exgrad.
        threshold: images with a score below it are marked as OOD.
        results: of `compare_methods`, for the table. None: computed, where each set has the fields of METHODS in
            `gradnorm_fast.evaluation`.
        classes: names of the classes, to be shown in place of their numbers.
        details: what the reader should know of the run, as the model, by name.
        read_image: name to PIL image, for the gallery. None: the file of that name. An image that cannot be read has
            no picture, the rest of the page is the same.
        gallery: how many images of each end of each set.
        title: of the page.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        ImportError: matplotlib or Pillow is not installed.

    Examples:
        >>> scores = detector.head_scores_loader(id_loader)._asdict()
        >>> paths = [f"{i}.png" for i in range(len(scores["gradnorm"]))]
        >>> write_report("report.html", {"photos": ScoredImages(paths, scores)}, threshold=detector.threshold)
    """
    out = _checked_path(path)
    if not isinstance(sets, Mapping):
        raise TypeError(f"sets: expected a mapping from names to ScoredImages, got {type(sets).__name__}")
    if not sets:
        raise ValueError("sets: expected at least one named set of images, got an empty mapping")
    if score in UNCERTAINTIES:
        raise ValueError(f"score: expected one that is larger for in-distribution images, {score} is smaller")
    if isinstance(gallery, bool) or not isinstance(gallery, int) or gallery < 0:
        raise ValueError(f"gallery: expected a count, got {gallery!r}")
    if threshold is not None and (not isinstance(threshold, Real) or math.isnan(threshold)):
        raise ValueError(f"threshold: expected a number or None, got {threshold!r}")
    tables = {name: _Table.of(name, scored, score) for name, scored in sets.items()}
    alike = (n for t in tables.values() for n in t.names if os.path.basename(n) in (out.name, Path(path).name))
    if any(Path(name).resolve() == out for name in alike):
        raise ValueError(f"path: {out} is one of the images; give another name")
    finite = {name: table.values[score][table.ranking] for name, table in tables.items()}
    comparable = len(tables) > 1 and all(len(values) for values in finite.values())
    if results is None and comparable:
        results = _results(tables)

    plots = [_svg(_histogram(finite, score, threshold))]
    sections = [_overview(tables, score, threshold, details or {})]
    if comparable:
        (_, inside), *outside = finite.items()
        plots.append(_svg(_roc(inside, dict(outside))))
    sections.append(f'<div class="plots">{"".join(plots)}</div>')
    if results:
        sections.append(_results_table(results))
    if gallery:
        fields = [score] + [f for f in _FIELDS if f != score and any(f in t.values for t in tables.values())]
        cards = _Cards(fields, threshold, classes, read_image or _open, gallery)
        figures = [
            figure
            for number, ((name, table), color) in enumerate(zip(tables.items(), _colors(len(tables)), strict=True))
            for figure in cards.of(number, name, table, color)
        ]
        sections.append(_gallery(tables, figures, fields))
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, sections)), script=_SCRIPT)
    with replacing(out, encoding="utf-8", errors="replace") as file:
        file.write(page)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    out = Path(path)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path: expected a file that ends in .html, got {str(out)!r}")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"path: expected a file in a folder that exists, got {str(out)!r}")
    return out.resolve()  # a link stays, what it points to is replaced


class _Table(NamedTuple):
    names: list[str]
    values: dict[str, npt.NDArray[Any]]
    ranking: npt.NDArray[np.intp]  #: of the images with a finite score, the least in-distribution first

    @classmethod
    def of(cls, name: str, scored: Scored, score: str) -> _Table:
        if not hasattr(scored, "names") or not hasattr(scored, "scores"):
            raise TypeError(f"sets[{name!r}]: expected ScoredImages(names, scores), got {type(scored).__name__}")
        names = list(map(str, scored.names))
        values = {field: _array(v) for field, v in scored.scores.items()}
        if score not in values:
            raise ValueError(f"sets[{name!r}]: expected the score {score!r}, got {', '.join(values) or 'none'}")
        for field, array in values.items():
            if array.shape != (len(names),):
                raise ValueError(
                    f"sets[{name!r}]: expected {field} of shape ({len(names)},), one per name, got {array.shape}"
                )
        order = np.argsort(values[score], kind="stable")
        return cls(names, values, order[np.isfinite(values[score][order])])


def _array(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values)


def _results(tables: dict[str, _Table]) -> Results | None:
    if any(set(METHODS.values()) - table.values.keys() for table in tables.values()):
        return None
    inside, *outside = (
        {method: table.values[field][table.ranking] for method, field in METHODS.items()} for table in tables.values()
    )
    return compare(inside, dict(zip(list(tables)[1:], outside, strict=True)))


# The page


def _overview(tables: dict[str, _Table], score: str, threshold: float | None, details: Mapping[str, object]) -> str:
    head = ["set", "images", "median score"] + ([f"below {_number(threshold)}"] if threshold is not None else [])
    rows = []
    for i, (name, table) in enumerate(tables.items()):
        values = table.values[score][table.ranking]
        bad = len(table.names) - len(values)
        count = f"{len(table.names):,}" + (f" <b>({bad:,} without a finite score)</b>" if bad else "")
        shown = escape(_shown(name)) + (" (in-distribution)" if i == 0 and len(tables) > 1 else "")
        row = [shown, count, _number(np.median(values)) if len(values) else "none"]
        if threshold is not None:
            below = int((values < threshold).sum())
            row.append(f"{below:,} ({below / len(values):.1%})" if len(values) else "none")
        rows.append(row)
    texts = {escape(_shown(str(k))): escape(_shown(str(v))) for k, v in details.items()}
    facts = "".join(f"<div{_LONG if len(v) > 60 else ''}><dt>{k}</dt><dd>{v}</dd></div>" for k, v in texts.items())
    return (f"<dl>{facts}</dl>" if facts else "") + _html_table(head, rows)


def _results_table(results: Results) -> str:
    methods = [m for m in METHODS | MORE_METHODS if all(m in of_set for of_set in results.values())]
    fpr95 = next(k for k in ("fpr95", "fpr95_id_positive") if k in next(iter(results.values()))[methods[0]])
    columns = [[of_set[m][key] for m in methods] for of_set in results.values() for key in (fpr95, "auroc")]
    best = [(max if i % 2 else min)(column) for i, column in enumerate(columns)]
    rows = [
        [escape(method)]
        + [f"<b>{100 * c[i]:.2f}</b>" if c[i] == b else f"{100 * c[i]:.2f}" for c, b in zip(columns, best, strict=True)]
        for i, method in enumerate(methods)
    ]
    sets = "".join(f'<th colspan="2">{escape(_shown(name))}</th>' for name in results)
    note = "FPR95 with in-distribution as the positive class; all in %" if fpr95 == "fpr95_id_positive" else "In %"
    return (
        "<h2>In-distribution against OOD</h2>"
        + _html_table([""] + ["FPR95 ↓", "AUROC ↑"] * len(results), rows, f"<tr><th></th>{sets}</tr>")
        + f'<p class="note">{note}, the best of each column bold.</p>'
    )


def _html_table(head: list[str], rows: list[list[str]], above: str = "") -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{above}{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _gallery(tables: dict[str, _Table], cards: list[str], fields: list[str]) -> str:
    def options(choices: Mapping[str, str]) -> str:
        return "".join(f'<option value="{escape(k)}">{escape(v)}</option>' for k, v in choices.items())

    sets = {"": "all"} | {str(i): _shown(name) for i, name in enumerate(tables)}
    ends = {"": "both ends", "least": "least in-distribution", "most": "most in-distribution"}
    orders = {f: _FIELDS.get(f, f) for f in fields} | {"prediction": "prediction", "path": "path"}
    controls = {"set": ("Set", sets), "end": ("Show", ends), "sort": ("Sort by", orders)}
    if len(tables) == 1:
        del controls["set"]
    selects = "".join(
        f'<label>{label} <select id="{name}">{options(choices)}</select></label>'
        for name, (label, choices) in controls.items()
    )
    return (
        f'<h2>Most and least in-distribution images</h2><div class="controls">{selects}'
        '<button id="order" type="button">ascending ↑</button>'
        f'<span id="count">{len(cards)} images</span></div><div id="gallery">{"".join(cards)}</div>'
    )


class _Cards(NamedTuple):
    """The settings that all figures of the gallery share."""

    fields: list[str]  #: the score reported, then the others
    threshold: float | None
    classes: Sequence[str] | None
    read_image: Callable[[str], Image]
    each: int  #: images of each end

    def of(self, number: int, name: str, table: _Table, color: str) -> Iterator[str]:
        """The figures of one set, the least in-distribution image first."""
        badge = f'<span style="border-color:{color}">{escape(_shown(name))}</span>' if color else ""
        n = len(table.ranking)
        for place in sorted({*range(min(self.each, n)), *range(max(0, n - self.each), n)}):
            i = table.ranking[place]
            ends = ["least"] * (place < self.each) + ["most"] * (place >= n - self.each)
            values = {f: float(table.values[f][i]) for f in self.fields if f in table.values}
            prediction = int(table.values["prediction"][i]) if "prediction" in table.values else None
            data = {"set": str(number), "end": " ".join(ends), "path": _shown(table.names[i])}
            data |= {f: f"{v:.9g}" for f, v in values.items()}
            data["prediction"] = "" if prediction is None else str(prediction)
            attributes = " ".join(f'data-{k}="{escape(v)}"' for k, v in data.items())
            caption = self._caption(badge, values, prediction, _shown(table.names[i]))
            picture = _thumbnail(table.names[i], self.read_image)
            yield f"<figure {attributes}>{picture}<figcaption>{caption}</figcaption></figure>"

    def _caption(self, badge: str, values: dict[str, float], prediction: int | None, path: str) -> str:
        if self.threshold is not None and values[self.fields[0]] < self.threshold:
            badge += '<span class="ood">OOD</span>'
        label = "" if prediction is None else f"class {prediction}"
        if self.classes is not None and prediction is not None and 0 <= prediction < len(self.classes):
            label = self.classes[prediction]
        facts = "".join(
            f"<div><dt>{escape(_FIELDS.get(f, f))}</dt><dd>{_number(v)}</dd></div>" for f, v in values.items()
        )
        folder, slash, file = path.rpartition("/")
        return (
            f'<p class="badges">{badge}</p><p class="prediction">{escape(label)}</p><dl>{facts}</dl>'
            f'<p class="path"><span>{escape(folder + slash)}</span>{escape(file)}</p>'
        )


def _thumbnail(name: str, read_image: Callable[[str], Image]) -> str:
    """The picture as part of the page; a grey box where it cannot be read."""
    try:
        image = read_image(name)
        size = max(image.size)
        small = size <= _PIXELATED
        if not small:
            image = image.copy()
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        if image.mode not in ("RGB", "L"):
            image = image.convert("RGB")
        encoded = io.BytesIO()
        image.save(encoded, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 82}))
    except Exception:  # of any kind: a picture is missing, not the report
        return '<div class="picture">no picture</div>'
    kind = "png" if small else "jpeg"
    pixelated = ' class="pixelated"' if small else ""
    source = f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
    return f'<div class="picture"><img{pixelated} alt="" src="{source}"></div>'


def _open(name: str) -> Image:
    from PIL import Image, ImageOps

    with Image.open(name) as image:
        image.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))  # a JPEG need not be decoded in full
        return ImageOps.exif_transpose(image).convert("RGB")


# Plots


def _histogram(finite: dict[str, npt.NDArray[Any]], score: str, threshold: float | None) -> Figure:
    figure = _new_figure()
    ax = figure.subplots()
    drawn = {plot_label(name): values for name, values in finite.items() if len(values)}
    label = f"{_FIELDS.get(score, score)} (larger = more in-distribution)"
    if len(drawn) > 1:
        (_, inside), *outside = drawn.items()
        plot_scores(inside, dict(outside), ax, xlabel=label)
    else:
        from matplotlib.ticker import MaxNLocator

        for name, values in drawn.items():
            ax.hist(values.astype(np.float64), 40, color="0.75", label=name)
        ax.set(xlabel=label, ylabel="images")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if threshold is not None and math.isfinite(threshold):
        ax.axvline(threshold, color="crimson", linewidth=1.4, linestyle="--", label=f"threshold {_number(threshold)}")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(framealpha=0.85, edgecolor="none", fontsize="small")
    return figure


def _roc(inside: npt.NDArray[Any], outside: dict[str, npt.NDArray[Any]]) -> Figure:
    figure = _new_figure()
    ax = plot_roc(inside, {plot_label(name): values for name, values in outside.items()}, figure.subplots())
    ax.legend(framealpha=0.85, edgecolor="none", fontsize="small")
    return figure


def plot_label(name: str) -> str:
    """A name as matplotlib's text, where $ starts a formula and a leading _ hides the entry."""
    name = _shown(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"write_report needs matplotlib: {_EXTRA}") from error
    return Figure(figsize=(4.6, 3.2), layout="constrained")  # so small that its text can be read on a phone


def _svg(figure: Figure) -> str:
    import matplotlib

    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "gradnorm"}):
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = svg.getvalue()
    return f'<div class="plot">{text[text.index("<svg") :]}</div>'


def _colors(sets: int) -> list[str]:
    """Of each of several sets, as `plot_scores` draws it."""
    from matplotlib.colors import to_hex

    return [""] if sets == 1 else [to_hex("0.75"), *(to_hex(f"C{i % 10}") for i in range(sets - 1))]


def _number(value: Any) -> str:
    return f"{float(value):.4g}"


def _shown(name: str) -> str:
    """A name for the page: what is not UTF-8 in a path is replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 16px/1.45 system-ui, sans-serif; color: #1d2125;
  background: #fff; }
h1 { font-size: 1.5rem; margin: .2rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
dl { margin: 0 0 1rem; }
body > dl { display: grid; gap: .2rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); }
dl div { display: flex; gap: .5rem; justify-content: space-between; }
body > dl div { justify-content: flex-start; }
body > dl .long { grid-column: 1 / -1; }
figcaption dd { white-space: nowrap; }
dt { color: #5b6570; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #dfe3e7; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { color: #5b6570; font-weight: 600; }
.note { color: #5b6570; font-size: .9rem; }
thead tr:first-child th[colspan] { text-align: center; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.plot { flex: 1 1 22rem; max-width: 37rem; }
.plot svg { width: 100%; height: auto; display: block; }
.controls { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1rem; padding: .6rem 0;
  align-items: center; background: #fff; border-bottom: 1px solid #dfe3e7; }
.controls select, .controls button { font: inherit; padding: .3rem .5rem; min-height: 2.4rem; max-width: 100%; }
#count { color: #5b6570; }
#gallery { display: grid; gap: .8rem; margin-top: .8rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
figure { margin: 0; border: 1px solid #dfe3e7; border-radius: .5rem; overflow: hidden; font-size: .85rem; }
figure[hidden] { display: none; }
.picture { height: 10rem; background: #f1f3f5; display: flex; align-items: center; justify-content: center;
  color: #5b6570; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.pixelated { image-rendering: pixelated; }
figcaption { padding: .5rem .6rem .6rem; }
figcaption p { margin: 0 0 .3rem; overflow-wrap: anywhere; }
.badges span { border-left: .4rem solid; padding: 0 .5rem 0 .35rem; }
.badges .ood { border: 0; border-radius: .3rem; background: #b3123a; color: #fff; padding: 0 .4rem; }
.prediction { font-weight: 600; }
figcaption dl { margin: 0 0 .3rem; }
.path { color: #1d2125; font-size: .8rem; }
.path span { color: #5b6570; }
@media (max-width: 26rem) { #gallery { grid-template-columns: 1fr 1fr; gap: .5rem; } .picture { height: 8rem; }
  .controls { position: static; }
  .controls label { flex: 1 1 100%; display: flex; justify-content: space-between; align-items: center; gap: .5rem; } }
"""

_SCRIPT = """
const gallery = document.getElementById("gallery");
if (gallery) {
  const cards = Array.from(gallery.children), chosen = id => (document.getElementById(id) || {}).value || "";
  const button = document.getElementById("order");
  let ascending = true;
  function show() {
    const field = chosen("sort"), sign = ascending ? 1 : -1;
    const text = card => card.getAttribute("data-" + field) || "nan";
    const number = card => isNaN(text(card)) ? Infinity : Number(text(card));
    cards.sort((a, b) => sign * (field === "path" ? text(a).localeCompare(text(b), undefined, {numeric: true})
      : number(a) === number(b) ? 0 : number(a) - number(b)));
    let shown = 0;
    for (const card of cards) {
      const {set, end} = card.dataset;
      card.hidden = !((chosen("set") === "" || set === chosen("set"))
        && (chosen("end") === "" || end.split(" ").includes(chosen("end"))));
      shown += !card.hidden;
      gallery.append(card);
    }
    document.getElementById("count").textContent = shown + (shown === 1 ? " image" : " images");
    button.textContent = ascending ? "ascending ↑" : "descending ↓";
  }
  button.addEventListener("click", () => { ascending = !ascending; show(); });
  for (const select of document.querySelectorAll(".controls select")) select.addEventListener("change", show);
  show();
}
"""

# The policy keeps the promise: nothing is loaded from anywhere.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""
