"""ID against OOD sets: from images, features, and files of scores."""

import csv
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gradnorm_fast import GradNorm, HeadScores
from gradnorm_fast.cli.tables import read_table
from gradnorm_fast.evaluation import compare_methods, evaluate, results_table
from gradnorm_fast.models import _load_checkpoint, default_transform

from command_line import FEATURES_RUN, MODEL_RUN, run, table
from resnet20 import DATA, FIGURES, ResNet20

HERE = Path(__file__).parent


def test_eval(place):
    assert run("eval", *MODEL_RUN, "--id", "id", "--ood", "noise=ood", "--bootstrap", 10, "--out", "r") == 0
    results = json.loads(Path("r/results.json").read_text())
    assert (
        results["head"] == "4"
        and "Normalize" in results["preprocessing"]
        and results["images"] == {"id": 20, "noise": 12}
    )
    metrics = results["results"]["noise"]["GradNorm"]
    assert metrics["auroc_low"] <= metrics["auroc"] <= metrics["auroc_high"]
    assert Path("r/scores.png").read_bytes()[:4] == b"\x89PNG"
    assert "GradNorm" in Path("r/table.md").read_text() and len(table("r/table.csv")) == 10


def test_eval_never_scores_its_own_plot(place, capsys):
    Path("r").mkdir()
    os.symlink(place / "r", "id/results")
    arguments = ("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "r")
    assert run(*arguments) == 0
    assert run(*arguments) == 2
    assert "out: id/results/scores.png, which would be scored, is drawn by this run" in capsys.readouterr().err
    picture = Path("ood/00.png").rename("scores.png").read_bytes()
    assert run("eval", *MODEL_RUN, "--id", "ood", "--ood", "a=scores.png", "--out", ".") == 2
    assert Path("scores.png").read_bytes() == picture
    Path("scores.png").rename("another.png")
    assert run("eval", *MODEL_RUN, "--id", "ood", "--ood", "a=another.png", "--out", ".") == 0


def test_eval_by_the_convention_of_another_code(place, capsys):
    arguments = ("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "r", "--convention")
    assert run(*arguments, "openood") == 0
    results = json.loads(Path("r/results.json").read_text())["results"]
    assert set(results["average"]["GradNorm"]) == {"auroc", "aupr_in", "aupr_out", "fpr95"}
    assert "by the convention of openood" in Path("r/table.md").read_text()
    assert run(*arguments, "theirs") == 2
    assert "convention: expected one of official, openood" in capsys.readouterr().err


def test_report(place, capsys):
    sets = ("eval", *MODEL_RUN, "--id", "id", "--ood", "noise=ood")
    assert run(*sets, "--out", "r", "--report", "r/report.html") == 0  # in a folder that eval makes
    page = Path("r/report.html").read_text()
    auroc = json.loads(Path("r/results.json").read_text())["results"]["noise"]["GradNorm"]["auroc"]
    assert "id (in-distribution)" in page and f"{100 * auroc:.2f}" in page
    assert page.count("<figure ") == 32 == page.count('src="data:image/png')
    files = ("eval", "--id", "r/scores-id.csv", "--ood", "noise=r/scores-noise.csv", "--convention", "official")
    assert run(*files, "--out", "s", "--report", "again.html") == 0
    assert Path("again.html").read_text().count('src="data:image/png') == 32
    assert run(*sets, "--out", "t", "--report", "ood/r.html") == 2 and not Path("t").exists()
    assert "report: ood/r.html lies in ood, which is read" in capsys.readouterr().err


def test_a_report_names_the_classes_where_they_are_known(place):
    for i in range(20):
        (place / "id" / f"kind {i % 5}").mkdir(exist_ok=True)
        old = place / "id" / ("deep" if i % 3 else ".") / f"{i:02}.png"
        old.rename(place / "id" / f"kind {i % 5}" / old.name)
    (place / "id" / "deep").rmdir()
    sets = ("--id", "id", "--ood", "noise=ood", "--out", "r", "--report", "r.html")
    assert run("eval", *MODEL_RUN, *sets) == 0 and "class " in Path("r.html").read_text()
    assert run("eval", *MODEL_RUN, *sets, "--folder-labels") == 0
    page = Path("r.html").read_text()
    assert set(re.findall(r'class="prediction">(.*?)<', page)) <= {f"kind {i}" for i in range(5)}


def test_scikit_learn_is_not_needed(place, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "r", "--report", "r/r.html") == 0


def test_a_terminal_without_arrows(place, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True))
    assert run("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "r") == 0
    assert b"FPR95 ? | AUROC ?" in sys.stdout.buffer.getvalue()


def test_groups_and_the_accuracy(place, capsys):
    for i in range(20):
        deep = Path(f"id/deep/{i:02}.png")
        path = deep if deep.exists() else Path(f"id/{i:02}.png")
        Path(f"classes/{'b' if i % 4 else 'a'}").mkdir(parents=True, exist_ok=True)
        os.link(path, f"classes/{'b' if i % 4 else 'a'}/{i:02}.png")
    sets = ("--near", "p=ood", "--far", "q=ood/deep", "--far", "r=ood/00.png")
    assert run("eval", *MODEL_RUN, "--id", "classes", "--folder-labels", *sets, "--out", "e") == 0
    results = json.loads(Path("e/results.json").read_text())
    by_set = {name: of_set["GradNorm"]["auroc"] for name, of_set in results["results"].items()}
    assert list(by_set) == ["p", "q", "r", "near", "far", "average"]
    assert by_set["near"] == by_set["p"] and by_set["far"] == pytest.approx((by_set["q"] + by_set["r"]) / 2)
    rows = table("e/scores-id.csv")
    right = sum(row["prediction"] == str(int(row["path"].split("/")[1] == "b")) for row in rows)
    assert results["id_accuracy"] == pytest.approx(right / 20)
    assert f"ID accuracy: {5 * right:.2f}%" in capsys.readouterr().out
    assert run("eval", *MODEL_RUN, "--id", "id", "--folder-labels", *sets, "--out", "f") == 2
    assert "expected every image in a folder of its class, id/00.png is in none" in capsys.readouterr().err


def test_files_of_scores_and_features_say_what_the_images_said(place):
    assert run("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "r") == 0
    expected = Path("r/table.md").read_text()
    for name in ("id", "ood"):
        arguments = ("score", *MODEL_RUN, "--images", name, "--save-features", f"{name}.f.npy")
        assert run(*arguments, "--out", f"{name}.parquet") == 0
        assert run(*arguments, "--out", f"{name}.npy") == 0
    for suffix in (".parquet", ".npy"):
        assert run("eval", "--id", f"id{suffix}", "--ood", f"a=ood{suffix}", "--out", "s") == 0
        assert Path("s/table.md").read_text() == expected
    assert run("eval", "--id", "r/scores-id.csv", "--ood", "a=r/scores-a.csv", "--out", "s") == 0
    assert Path("s/table.md").read_text() == expected
    sys.path.insert(0, str(place))
    head = importlib.import_module("own").small()[-1]
    np.save("W.npy", head.weight.detach())
    np.save("b.npy", head.bias.detach())
    assert run("eval", "--id", "id.f.npy", "--ood", "a=ood.f.npy", *FEATURES_RUN, "--out", "s") == 0
    assert Path("s/table.md").read_text() == expected


LATER = ("entropy", "sum_squares", "exgrad", "kl_uniform")  # columns that earlier versions did not write


def of_an_earlier_version(source, out):
    rows = [{k: v for k, v in row.items() if k not in LATER} for row in table(source)]
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_methods_that_are_asked_for(place, capsys):
    sets = ("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "r")
    assert run(*sets, "--methods", "KL", "Entropy", "--report", "r/r.html") == 0
    results = json.loads(Path("r/results.json").read_text())["results"]
    inside, outside = ([-float(row["entropy"]) for row in table(f"r/scores-{name}.csv")] for name in ("id", "a"))
    assert list(results["a"]) == ["KL", "Entropy"] and results["a"]["Entropy"] == evaluate(inside, outside)
    assert f"{100 * results['a']['KL']['auroc']:.2f}" in Path("r/r.html").read_text()
    assert "| Entropy |" in capsys.readouterr().out
    assert run(*sets[:-1], "s", "--methods", "Margin") == 2 and not Path("s").exists()
    assert "methods: expected a list of GradNorm, MSP" in capsys.readouterr().err


def test_files_of_an_earlier_version(place, capsys):
    """They have seven scores; what needs another names the column."""
    assert run("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "r") == 0
    expected = Path("r/table.md").read_text()
    for name in ("id", "a"):
        of_an_earlier_version(f"r/scores-{name}.csv", f"{name}.csv")
    old = ("eval", "--id", "id.csv", "--ood", "a=a.csv", "--out", "s")
    assert run(*old, "--report", "s/r.html") == 0
    assert Path("s/table.md").read_text() == expected and "FPR95" in Path("s/r.html").read_text()
    assert not set(table("s/scores-id.csv")[0]) & set(LATER)
    assert run("eval", "--id", "r/scores-id.csv", "--ood", "a=a.csv", "--out", "s") == 0  # of both versions
    assert Path("s/table.md").read_text() == expected and "entropy" in table("s/scores-id.csv")[0]
    for name, column in (("Entropy", "entropy"), ("ExGrad", "exgrad"), ("SumSquares", "sum_squares")):
        assert run(*old, "--methods", "MSP", name) == 2
        assert f"expected the column '{column}' in id.csv" in capsys.readouterr().err
    head = ("--model", "own:small", "--head", "4", "--device", "cpu")
    for score, more in (("energy", ()), ("auto", ("--ood", "a.csv"))):
        assert run("fit", *head, "--id", "id.csv", *more, "--score", score, "--out", "g.json") == 0, score
        assert run("fit", *head, "--id", "r/scores-id.csv", *more, "--score", score, "--out", "h.json") == 0
        assert Path("g.json").read_text() == Path("h.json").read_text()


def test_what_eval_refuses(place, capsys):
    Path("few.csv").write_text("path,gradnorm\na,1\n")
    Path("words.csv").write_text("path,gradnorm\na,b\n")
    Path("uneven.csv").write_text("path,gradnorm\na\n")
    Path("twice.csv").write_text("path,gradnorm,gradnorm\na,1,2\n")
    Path("label.csv").write_text("path,gradnorm,label\na,1,cat\n")
    Path("mark.csv").write_text("\ufeffpath,gradnorm\na,1\n", encoding="utf-8")
    assert read_table(Path("mark.csv"), ["gradnorm"]).names == ["a"]
    features = np.load("G.npy")
    features[5] = np.nan
    np.save("G.npy", features)
    fit = ("fit", "--weight", "W.npy", "--quiet", "--out", "g.json", "--id")
    for arguments, message in (
        (("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "id"), "id lies in id, which is read"),
        (("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "ood/deep/new"), "lies in ood, which is read"),
        (
            ("eval", *MODEL_RUN, "--id", "id", "--ood", "a=F.npy", "--out", "r"),
            "a: expected images, as id, got features",
        ),
        (
            ("eval", *MODEL_RUN, "--id", "id", "F.npy", "--ood", "a=ood", "--out", "r"),
            "id: expected images, or one file",
        ),
        (("eval", *MODEL_RUN, "--id", "id", "--out", "r"), "ood: expected at least one set"),
        (("eval", "--id", "few.csv", "--ood", "a=few.csv", "--out", "r"), "expected the column 'feature_norm'"),
        ((*fit, "words.csv"), "expected numbers in column 'gradnorm' of words.csv"),
        ((*fit, "uneven.csv"), "line 2 has 1 values, the header 2"),
        ((*fit, "none.csv"), "no file none.csv"),
        ((*fit, "twice.csv"), "it has the column 'gradnorm' twice"),
        ((*fit, "label.csv"), "expected numbers in column 'label' of label.csv"),
        (("eval", "--id", "F.npy", "--ood", "a=G.npy", *FEATURES_RUN, "--out", "r"), "in a 1 of 200 scores are NaN"),
    ):
        assert run(*arguments) == 2, arguments
        err = capsys.readouterr().err
        assert message in err, err
    assert run("eval", "--id", "F.npy", "--ood", "a=G.npy", *FEATURES_RUN, "--out", "r") == 2
    assert "r/scores-id.csv has kept 3000 rows" in capsys.readouterr().err
    assert run(*fit, "few.csv") == 0


@pytest.mark.skipif(DATA is None, reason="the images and weights are not there")
def test_from_folders_to_the_table_on_real_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    sets = [x for name in FIGURES for x in ("--ood", f"{name}={DATA}/images/ood/{name}")]
    network = ("--model", "resnet20:ResNet20", "--checkpoint", DATA / "weights/resnet20-12fca82f.th")
    assert run("eval", *network, "--id", DATA / "images/id", *sets, "--out", tmp_path, "--quiet") == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    for name, (auroc, fpr95) in FIGURES.items():
        metrics = results[name]["GradNorm"]
        one_image = 100 / metrics["n_ood"]
        assert abs(100 * metrics["fpr95_id_positive"] - fpr95) <= one_image + 0.005
        assert abs(100 * metrics["auroc"] - auroc) <= one_image

    # The same by the Python API: folders, loaders, table.
    from torchvision.datasets import ImageFolder

    network, (transform, batch) = ResNet20(), (default_transform(), 100)
    _load_checkpoint(network, DATA / "weights/resnet20-12fca82f.th")
    detector = GradNorm(network)
    folders = [ImageFolder(DATA / "images" / name, transform) for name in ("id", "ood")]
    inside, outside = (detector.head_scores_loader(DataLoader(f, batch), progress=False) for f in folders)
    targets = torch.tensor(folders[1].targets)
    sets = {n: HeadScores(*(s[targets == i] for s in outside)) for n, i in folders[1].class_to_idx.items()}
    table = results_table(compare_methods(inside, sets))
    written = (tmp_path / "table.md").read_text(encoding="utf-8")
    note = "In %; FPR95: the share of OOD images accepted when 95 % of the ID images are."
    assert written == f"{table}\n\n{note}\n"


def test_names_that_matplotlib_would_read_as_formulas(place):
    assert run("eval", *MODEL_RUN, "--id", "id", "--ood", "5_$=ood", "--ood", "_b=ood", "--out", "e") == 0
    assert Path("e/scores.png").exists()


def test_files_of_scores_refuse_what_would_change_nothing(place, capsys):
    for name in ("id", "ood"):
        assert run("score", *MODEL_RUN, "--images", name, "--out", f"{name}.csv") == 0
    files = ("eval", "--id", "id.csv", "--ood", "x=ood.csv", "--out", "e", "--quiet")
    for option in (("--temperature", "10"), ("--reduction", "sum"), ("--resize", "5"), ("--layers", "all")):
        assert run(*files, *option) == 2
        assert f"{option[0][2:]}: it cannot be combined with files of scores" in capsys.readouterr().err
    assert run(*files) == 0
