"""The report page: what it contains, what it must never contain, and how it works in a browser."""

import base64
import errno
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from gradnorm_fast import head_scores
from gradnorm_fast.evaluation import METHODS, compare_methods, results_table
from gradnorm_fast.report import ScoredImages, write_report

CLASSES = 5


def scores_of(n, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return head_scores(scale * torch.rand(n, 8, generator=g), torch.randn(CLASSES, 8, generator=g))


def scored(n, scale=1.0, seed=0, names=None):
    return ScoredImages(names or [f"folder/{i}.png" for i in range(n)], scores_of(n, scale, seed)._asdict())


class Page(HTMLParser):
    """Tags with their attributes, the text of the cells, and the figures of the gallery."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.figures, self.texts, self.cells = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append(dict(attrs))
        self.inside = tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())
        if getattr(self, "inside", None) in ("td", "b", "th"):
            self.cells.append(data)

    def pictures(self):
        found = [attrs["src"] for tag, attrs in self.tags if tag == "img"]
        assert all(source.startswith("data:image/") for source in found)
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in found]


def write(tmp_path, sets, **options):
    path = tmp_path / "report.html"
    write_report(path, sets, **{"read_image": lambda name: Image.new("RGB", (32, 20), "teal"), **options})
    return Page(path)


def test_gallery_holds_both_ends_in_the_order_of_the_score(tmp_path):
    images = scored(50)
    page = write(tmp_path, {"photos": images}, gallery=6)
    order = images.scores["gradnorm"].argsort().tolist()
    ends = order[:6] + order[-6:]
    assert [f["data-path"] for f in page.figures] == [images.names[i] for i in ends]
    assert [f["data-end"] for f in page.figures] == ["least"] * 6 + ["most"] * 6
    for figure, i in zip(page.figures, ends, strict=True):
        for field in ("prediction", "output_norm", *METHODS.values()):
            values = images.scores[field]
            assert float(figure[f"data-{field}"]) == pytest.approx(values[i].item(), rel=1e-6)
    assert len(page.pictures()) == 12
    assert "50" in page.cells


def test_few_images_are_shown_once_each(tmp_path):
    page = write(tmp_path, {"photos": scored(5)}, gallery=4)
    assert [f["data-end"] for f in page.figures] == ["least", *["least most"] * 3, "most"]
    assert not write(tmp_path, {"photos": scored(5)}, gallery=0).figures


def test_threshold_marks_what_is_below_it(tmp_path):
    images = scored(20)
    threshold = images.scores["gradnorm"].sort().values[7].numpy()[()]  # as NumPy's own kind of float
    page = write(tmp_path, {"photos": images}, threshold=threshold)
    assert page.texts.count("OOD") == 7
    assert "7 (35.0%)" in page.cells
    assert any(text.startswith("threshold ") for text in page.texts)  # in the plot's legend
    assert "OOD" not in write(tmp_path, {"photos": images}).texts
    assert "OOD" not in write(tmp_path, {"photos": images}, threshold=-float("inf")).texts


def test_classes_and_details(tmp_path):
    images = scored(6)
    names = [f"name {c}" for c in range(CLASSES - 1)]  # one name too few
    page = write(tmp_path, {"photos": images}, classes=names, details={"model": "a & b"}, title="<Title>")
    expected = [names[p] if p < len(names) else f"class {p}" for p in images.scores["prediction"].tolist()]
    assert sorted(t for t in page.texts if t in names or t == f"class {CLASSES - 1}") == sorted(expected)
    assert {"model", "a & b", "<Title>"} <= set(page.texts)


def test_table_and_curves_of_several_sets(tmp_path):
    sets = {"id": scored(60, 1.0), "near": scored(40, 0.8, 1), "far": scored(30, 0.4, 2)}
    page = write(tmp_path, sets)
    expected = compare_methods(scores_of(60), {"near": scores_of(40, 0.8, 1), "far": scores_of(30, 0.4, 2)})
    numbers = re.findall(r"\d+\.\d\d(?= )", results_table(expected))
    assert len(numbers) == 6 * len(METHODS)
    assert [c for c in page.cells if re.fullmatch(r"\d+\.\d\d", c)][-len(numbers) :] == numbers
    assert any("AUROC" in text and "near" in text for text in page.texts)  # in the legend of the curves
    assert {f["data-set"] for f in page.figures} == {"0", "1", "2"}
    by_openood = compare_methods(scores_of(60), {"near": scores_of(40, 0.8, 1)}, convention="openood")
    page = write(tmp_path, sets, results=by_openood)
    assert f"{100 * by_openood['near']['MSP']['fpr95']:.2f}" in page.cells
    page = write(
        tmp_path, {name: ScoredImages(s.names, {"gradnorm": s.scores["gradnorm"]}) for name, s in sets.items()}
    )
    assert "FPR95 ↓" not in page.cells  # nothing to compare GradNorm with, but curves and gallery are there
    assert any("AUROC" in text for text in page.texts) and page.figures


def test_another_score(tmp_path):
    images = scored(10)
    page = write(tmp_path, {"photos": images}, score="msp", gallery=3)
    order = images.scores["msp"].argsort().tolist()
    assert [f["data-path"] for f in page.figures] == [images.names[i] for i in order[:3] + order[-3:]]
    assert next(v for tag, v in page.tags if tag == "option" and v["value"] in images.scores)["value"] == "msp"


def test_scores_of_an_earlier_version_and_scores_of_the_wrong_sign(tmp_path):
    sets = {"id": scored(60, 1.0), "near": scored(40, 0.8, 1)}
    later = ("entropy", "sum_squares", "exgrad", "kl_uniform")
    earlier = {n: ScoredImages(s.names, {f: v for f, v in s.scores.items() if f not in later}) for n, s in sets.items()}
    assert write(tmp_path, earlier).cells == write(tmp_path, sets).cells
    for score in ("entropy", "exgrad"):
        with pytest.raises(ValueError, match=f"score: expected one that is larger for in-dist.*, {score} is smaller"):
            write(tmp_path, sets, score=score)


def test_scores_that_are_not_finite(tmp_path):
    scores = {"gradnorm": np.array([1.0, np.nan, 3.0, np.inf])}
    page = write(tmp_path, {"photos": ScoredImages(list("abcd"), scores)})
    assert [f["data-path"] for f in page.figures] == ["a", "c"]
    assert "(2 without a finite score)" in page.cells
    page = write(tmp_path, {"id": ScoredImages(["a"], {"gradnorm": [np.nan]}), "ood": scored(3), "none": scored(0)})
    assert len(page.figures) == 3


def test_bfloat16_scores(tmp_path):
    page = write(tmp_path, {"photos": ScoredImages(["a", "b"], {"gradnorm": torch.tensor([1.0, 2.0]).bfloat16()})})
    assert [f["data-gradnorm"] for f in page.figures] == ["1", "2"]


def test_pictures(tmp_path):
    sizes = {"large.jpg": (900, 300), "small.png": (32, 20), "grey.png": (500, 400), "clear.png": (300, 300)}
    for name, size in sizes.items():
        mode = {"grey.png": "I;16", "clear.png": "RGBA"}.get(name, "RGB")
        Image.new(mode, size).save(tmp_path / name)
    upright = Image.new("RGB", (400, 200), "red")
    exif = upright.getexif()
    exif[0x0112] = 6  # to be turned by 90°
    upright.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "text.png").write_text("no image")
    names = [*sizes, "turned.jpg", "text.png", "missing.png"]
    images = ScoredImages([str(tmp_path / n) for n in names], {"gradnorm": np.arange(7.0)})
    page = write(tmp_path, {"photos": images}, read_image=None)
    assert [p.size for p in page.pictures()] == [(160, 53), (32, 20), (160, 128), (160, 160), (80, 160)]
    assert page.texts.count("no picture") == 2
    assert sum(attrs.get("class") == "pixelated" for tag, attrs in page.tags if tag == "img") == 1


def test_nothing_is_loaded_and_names_are_only_text(tmp_path):
    hostile = ['"><script>alert(1)</script>', "</script><img src=http://example.org/x>", "a'b&amp;.png", "\udce9.png"]
    sets = {f"_<i>$\\x$ {k}": scored(4, seed=k, names=hostile) for k in range(2)}
    page = write(tmp_path, sets, classes=hostile * 2, details={"<u>": "</dl><script>"}, title="</title><script>")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and not {"i", "u", "link", "iframe", "object"} & set(tags)
    assert {f["data-path"] for f in page.figures} == {*hostile[:3], "\ufffd.png"}
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<>]*", page.source.replace("http://example.org", "")))
    assert addresses == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # names, not places
    loading = [(tag, attrs[k]) for tag, attrs in page.tags for k in ("src", "data", "poster", "srcset") if k in attrs]
    assert loading and all(tag == "img" and value.startswith("data:image/") for tag, value in loading)
    references = [attrs[k] for _, attrs in page.tags for k in ("href", "xlink:href") if k in attrs]
    assert all(reference.startswith("#") for reference in references)
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, target = tmp_path / "report.html", tmp_path / "target.html"
    target.write_text("before")
    path.symlink_to(target)
    write_report(path, {"photos": scored(3)})
    assert path.is_symlink() and target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "replace", full)
    target.write_text("before")
    with pytest.raises(OSError, match="no space left"):
        write_report(path, {"photos": scored(3)})
    assert target.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == [
        "report.html",
        "target.html",
    ]


def test_refusals(tmp_path):
    good, out = {"photos": scored(3)}, tmp_path / "report.html"
    for arguments, options, error, message in [
        ((tmp_path / "report.txt", good), {}, ValueError, r"path: expected a file that ends in \.html"),
        ((tmp_path / "none" / "r.html", good), {}, ValueError, "path: expected a file in a folder that exists"),
        ((out, ["x"]), {}, TypeError, "sets: expected a mapping from names to ScoredImages, got list"),
        ((out, {"x": {"gradnorm": [1.0]}}), {}, TypeError, r"sets\['x'\]: expected ScoredImages.* got dict"),
        ((out, {}), {}, ValueError, "sets: expected at least one"),
        ((out, {"x": ScoredImages(["a"], {})}), {}, ValueError, r"sets\['x'\]: expected the score 'gradnorm', got n"),
        (
            (out, {"x": ScoredImages(["a"], {"gradnorm": [1.0, 2.0]})}), {}, ValueError,
            r"sets\['x'\]: expected gradnorm of shape \(1,\), one per name, got \(2,\)",
        ),
        ((out, good), {"gallery": -1}, ValueError, "gallery: expected a count, got -1"),
        ((out, good), {"threshold": "0.5"}, ValueError, "threshold: expected a number or None, got '0.5'"),
        ((out, good), {"threshold": float("nan")}, ValueError, "threshold: expected a number or None, got nan"),
        ((out, {"x": ScoredImages([str(out)], {"gradnorm": [1.0]})}), {}, ValueError, "path: .* is one of the images"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            write_report(*arguments, **options)
    assert not out.exists()


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib: pip install "gradnorm_fast\[eval\]"'):
        write_report(tmp_path / "report.html", {"photos": scored(3)})


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

LOOK = """
<script>
const seen = () => [...document.querySelectorAll("figure")].filter(f => !f.hidden).map(f => f.dataset.path);
const choose = (id, value) => { const s = document.getElementById(id); s.value = value;
  s.dispatchEvent(new Event("change")); };
const found = {first: seen()};
choose("sort", "feature_norm"); found.feature_norm = seen();
document.getElementById("order").click(); found.descending = seen();
choose("sort", "path"); document.getElementById("order").click(); found.path = seen();
choose("set", "1"); found.set = seen();
choose("end", "most"); found.most = seen(); found.count = document.getElementById("count").textContent;
choose("end", ""); choose("set", "");
found.width = [document.documentElement.scrollWidth, window.innerWidth];
found.small = Math.min(...[...document.querySelectorAll("figure *, td, th, .plot text")].map(e => {
  const size = parseFloat(getComputedStyle(e).fontSize), svg = e.closest(".plot svg");
  return svg ? size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : size; }));
found.pictures = [...document.images].every(i => i.complete && i.naturalWidth > 0);
const result = document.createElement("pre"); result.id = "found"; result.textContent = JSON.stringify(found);
document.body.append(result);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(tmp_path, width):
    """Sorting, filtering, pictures; and on a phone no sideways scrolling and no tiny text."""
    sets = {
        "id": scored(9, names=[f"id/{i}.png" for i in range(9)]),
        "ood": scored(12, 0.7, 1, names=[f"ood/{i}.png" for i in range(12)]),
    }
    page = write(tmp_path, sets, gallery=20, threshold=1.0)
    (tmp_path / "look.html").write_text(page.source.replace("</body>", LOOK + "</body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "look.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL).group(1)))

    def ordered(field):
        rows = [(s.scores[field][i].item(), name) for s in sets.values() for i, name in enumerate(s.names)]
        return [name for _, name in sorted(rows)]

    names = [name for s in sets.values() for name in s.names]
    assert found["first"] == ordered("gradnorm")
    assert found["feature_norm"] == ordered("feature_norm")
    assert found["descending"] == ordered("feature_norm")[::-1]
    assert found["path"] == names  # 10 after 9
    assert found["set"] == found["most"] == sets["ood"].names
    assert found["count"] == "12 images" and found["pictures"]
    assert found["width"][0] <= found["width"][1] and found["small"] >= 9
