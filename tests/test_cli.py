"""The command line as a user meets it: files out, one line per mistake, interrupted and resumed, in two processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_real_data import DATA, FIGURES

from gradnorm_fast import cli, head_scores, scoring

HERE = Path(__file__).parent
MODEL = """
import torch
def small():
    torch.manual_seed(0)
    pooled = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), *pooled, torch.nn.Linear(8, 5))
def no_model():
    return 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two folders of images and a model of one's own."""
    random = np.random.default_rng(0)
    for name, n in (("id", 20), ("ood", 12)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(n):
            pixels = random.integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / ("deep" if i % 3 else ".") / f"{i:02}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


SCORE = ("score", "--model", "own:small", "--device", "cpu", "--quiet")


def test_score_fit_and_gate(place, capsys):
    assert run("fit", *SCORE[1:], "--id", "id", "--tpr", "0.9", "--out", "gate.json") == 0
    assert run(*SCORE, "--images", "id", "ood", "--detector", "gate.json", "--out", "s.csv") == 0
    rows = table("s.csv")
    assert list(rows[0]) == ["path", "score", "prediction", "feature_norm", "output_norm", "is_ood"]
    assert len(rows) == 32 and rows[0]["path"].startswith("id") and rows[-1]["path"].startswith("ood")
    gate = json.loads(Path("gate.json").read_text())
    assert sum(r["is_ood"] == "True" for r in rows[:20]) == 2 - 1  # (1 + k)/21 <= 0.1 for k up to 1.1
    assert sorted(float(r["score"]) for r in rows[:20]) == pytest.approx(gate["calibration"], rel=1e-6)
    assert not list(place.glob("*.part*"))


def test_the_formats_hold_the_same(place):
    for name in ("s.csv", "s.npy"):
        assert run(*SCORE, "--images", "ood", "--threshold", "1.0", "--out", name) == 0
    rows, array = table("s.csv"), np.load("s.npy")
    assert [r["path"] for r in rows] == array["path"].tolist()
    assert np.array_equal(np.array([r["score"] for r in rows], dtype=np.float32), array["score"])
    assert array["is_ood"].tolist() == (array["score"] < 1.0).tolist()


def test_unreadable_images_are_reported_and_skipped(place, capsys):
    Path("ood/broken.png").write_text("no image")
    assert run(*SCORE, "--images", "ood", "--out", "s.csv") == 0
    out, err = capsys.readouterr()
    assert "ood/broken.png" in err and "1 unreadable" in out and len(table("s.csv")) == 12
    assert run(*SCORE, "--images", "ood", "--out", "s.csv", "--strict") == 2
    assert "cannot read ood/broken.png" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_stopped(place, monkeypatch, capsys):
    assert run(*SCORE, "--images", "id", "--batch-size", 3, "--out", "whole.csv") == 0
    real, calls = scoring.GradNorm.head_scores, []

    def interrupted(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(scoring.GradNorm, "head_scores", interrupted)
    assert run(*SCORE, "--images", "id", "--batch-size", 3, "--out", "s.csv") == 130
    part = Path("s.csv.part-0-of-1")
    part.write_text(part.read_text() + "9,0.5")  # a line cut off in the middle
    assert run(*SCORE, "--images", "ood", "--batch-size", 3, "--out", "s.csv", "--resume") == 2
    assert "other inputs" in capsys.readouterr().err
    assert run(*SCORE, "--images", "id", "--batch-size", 3, "--out", "s.csv", "--resume") == 0
    assert sum(calls) == 20 + 3  # the batch that was lost is the only one scored again
    assert table("s.csv") == table("whole.csv")


def test_features(place):
    g = np.random.default_rng(1)
    features, weight, bias = (g.standard_normal(s, dtype=np.float32) for s in ((3000, 6), (4, 6), (4,)))
    for name, array in (("F", features), ("W", weight), ("b", bias)):
        np.save(f"{name}.npy", array)
    files = ("--features", "F.npy", "--weight", "W.npy", "--bias", "b.npy")
    assert run("score", *files, "--out", "s.npy", "--quiet", "--device", "cpu") == 0
    expected = head_scores(*map(torch.from_numpy, (features, weight, bias)))
    got = np.load("s.npy")
    np.testing.assert_allclose(got["score"], expected.gradnorm, rtol=1e-5)
    assert got["prediction"].tolist() == expected.prediction.tolist() and got["path"].tolist()[-1] == "2999"


def test_eval(place):
    assert run("eval", *SCORE[1:], "--id", "id", "--ood", "noise=ood", "--bootstrap", 10, "--out", "r") == 0
    results = json.loads(Path("r/results.json").read_text())
    assert results["head"] == "4" and results["images"] == {"id": 20, "noise": 12}
    metrics = results["results"]["noise"]["GradNorm"]
    assert metrics["auroc_low"] <= metrics["auroc"] <= metrics["auroc_high"]
    assert Path("r/scores.png").read_bytes()[:4] == b"\x89PNG"
    assert "GradNorm" in Path("r/table.md").read_text() and len(table("r/table.csv")) == 10


def test_two_processes_score_every_input_once(place):
    Path("id/broken.png").write_text("no image")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "gradnorm_fast",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    arguments = [*SCORE, "--images", "id", "--batch-size", "4", "--out", "two.csv"]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, cwd=place, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert run(*SCORE, "--images", "id", "--batch-size", 4, "--out", "one.csv") == 0
    one, two = table("one.csv"), table("two.csv")
    assert [r["path"] for r in one] == [r["path"] for r in two] and len(one) == 20
    np.testing.assert_allclose([float(r["score"]) for r in one], [float(r["score"]) for r in two], rtol=1e-5)
    assert not list(place.glob("*.part*"))


def test_amp_workers_and_compile(place):
    assert run(*SCORE, "--images", "id", "--out", "a.csv") == 0
    assert run(*SCORE, "--images", "id", "--out", "b.csv", "--amp", "--workers", 2) == 0
    for a, b in zip(table("a.csv"), table("b.csv"), strict=True):
        assert a["path"] == b["path"] and float(a["score"]) == pytest.approx(float(b["score"]), rel=0.1)


WRONG = [
    (("--images", "nowhere"), "no folder nowhere"),
    (("--images", "empty"), "no image in empty"),
    (("--images", "id", "--head", "head"), "no module 'head'"),
    (("--images", "id", "--head", "0"), "expected a linear layer"),
    (("--images", "id", "--temperature", "0"), "temperature: expected a finite positive"),
    (("--images", "id", "--checkpoint", "own.py"), "checkpoint: cannot read own.py"),
    (("--images", "id", "--checkpoint", "nothing.pt"), "checkpoint: no file nothing.pt"),
    (("--images", "id", "--model", "own:nothing"), "no function 'nothing'"),
    (("--images", "id", "--model", "nowhere:f"), "no module 'nowhere'"),
    (("--images", "id", "--model", "own:no_model"), "expected own:no_model to return a torch.nn.Module"),
    (("--images", "id", "--model", "resnet5000"), "no classifier 'resnet5000'"),
    (("--images", "id", "--model", "resnet18", "--weights", "BEST"), "weights: resnet18 has IMAGENET1K_V1"),
    (("--images", "id", "--batch-size", "0"), "expected a whole number above 0"),
    (("--images", "id", "--device", "cuda:99"), "device: 'cuda:99' is not there"),
    (("--images", "id", "--device", "fpga9"), "device: expected cpu, cuda"),
    (("--images", "id", "--detector", "own.py"), "expected a detector saved"),
    (("--images", "id", "--reduction", "max"), "invalid choice"),
    ((), "expected --images with --model, or --features"),
    (("--features", "nothing.npy", "--weight", "W.npy"), "features: no file nothing.npy"),
    (("--features", "own.py", "--weight", "W.npy"), "features: cannot read own.py"),
    (("--features", "own.py"), "weight: expected --weight"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else ""
)
def test_every_mistake_gets_one_line(place, capsys, arguments, message):
    assert run(*SCORE, *arguments, "--out", "s.csv") == 2
    err = capsys.readouterr().err.replace(
        "note: no --weights and no --checkpoint: the model's weights are random\n", ""
    )
    assert message in err and err.count("\n") == 1 and err.startswith("gradnorm-fast: error: ")


def test_more_mistakes(place, capsys):
    wrong = [
        ((*SCORE, "--images", "id", "--out", "s.txt"), "ending in .csv"),
        ((*SCORE, "--images", "id", "--out", "no/s.csv"), "no folder no"),
        (("eval", *SCORE[1:], "--id", "id", "--ood", "ood", "--out", "r"), "expected NAME=DIR"),
        (("eval", *SCORE[1:], "--id", "id", "--ood", "a=ood", "--ood", "a=ood", "--out", "r"), "'a' is taken"),
        (("fit", *SCORE[1:], "--id", "id", "--tpr", "2", "--out", "g.json"), "tpr: expected a fraction"),
        (("fit", *SCORE[1:], "--out", "g.json"), "--id"),
        (("nothing",), "invalid choice"),
    ]
    torch.save({"weight": torch.ones(2)}, "other.pt")
    wrong.append(((*SCORE, "--images", "id", "--checkpoint", "other.pt", "--out", "s.csv"), "is of another model"))
    for i, size in enumerate((9, 12)):
        Image.new("RGB", (size, size)).save(place / f"empty/{i}.png")
    wrong.append(((*SCORE, "--images", "empty", "--out", "s.csv"), "of several sizes"))
    for arguments, message in wrong:
        assert run(*arguments) == 2, arguments
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


def test_env_says_what_would_run_and_checks_it(capsys):
    assert run("env", "--check", "--shape", 4, 5, 6) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "4x5x6 float32: " in out and "pass" in out and "FAIL" not in out


def test_help_of_every_command_has_an_example(capsys):
    for command in ("score", "eval", "fit", "demo", "env", "bench"):
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code == 0 and f"gradnorm-fast {command}" in capsys.readouterr().out.split("example")[1]


@pytest.mark.skipif(DATA is None, reason="the images and weights are not there")
def test_from_folders_to_the_table_on_real_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    sets = [x for name in FIGURES for x in ("--ood", f"{name}={DATA}/images/ood/{name}")]
    model = ("--model", "resnet20:ResNet20", "--checkpoint", DATA / "weights/resnet20-12fca82f.th")
    assert run("eval", *model, "--id", DATA / "images/id", *sets, "--out", tmp_path, "--quiet") == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    for name, (auroc, fpr95) in FIGURES.items():
        metrics = results[name]["GradNorm"]
        one_image = 100 / metrics["n_ood"]
        assert abs(100 * metrics["fpr95_id_positive"] - fpr95) <= one_image + 0.005
        assert abs(100 * metrics["auroc"] - auroc) <= one_image
