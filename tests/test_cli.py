"""The command line as a user meets it: files out, one line per mistake, interrupted and resumed, in two processes."""

import csv
import io
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
from torch.utils.data import DataLoader

from gradnorm_fast import GradNorm, HeadScores, cli, head_scores
from gradnorm_fast.cli import images, inputs, model, tables
from gradnorm_fast.evaluation import compare_methods, results_table
from gradnorm_fast.models import _load_checkpoint, default_transform

from resnet20 import ResNet20

HERE = Path(__file__).parent
MODEL = """
import torch
def small():
    torch.manual_seed(0)
    pooled = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), *pooled, torch.nn.Linear(8, 5))
def no_model():
    return 3
def other():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
def broken():
    raise KeyError("broken")
def no_tensor():
    return small(), lambda image: image
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


RUN = ("--device", "cpu", "--quiet")
SCORE = ("score", "--model", "own:small", *RUN)


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): the nth batch from now on ends in Ctrl-C; returns the list of batch sizes as they come."""
    real = GradNorm.head_scores

    def after(n):
        sizes = []

        def interrupted(self, images):
            sizes.append(len(images))
            if len(sizes) == n:
                raise KeyboardInterrupt
            return real(self, images)

        monkeypatch.setattr(GradNorm, "head_scores", interrupted)
        return sizes

    return after


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


def test_an_interrupted_run_goes_on_where_it_stopped(place, interrupt, capsys):
    few = (*SCORE, "--batch-size", 3, "--out", "s.csv")
    assert run(*few, "--images", "id") == 0
    whole = table("s.csv")
    sizes = interrupt(4)
    assert run(*few, "--images", "id") == 130
    part = Path("s.csv.part-0-of-1")
    part.write_bytes(part.read_bytes() + bytes(20))  # a row cut off in the middle
    for other in (
        ("--images", "ood"),
        ("--images", "id", "--temperature", 2),
        ("--images", "id", "--amp"),
        ("--images", "id", "--resize", 8),
        ("--images", "id", "--model", "own:other"),
    ):
        assert run(*few, *other, "--resume") == 2, other
        assert "over other inputs, or with another model or options" in capsys.readouterr().err
    part.rename("s.csv.part-1-of-2")  # as if there had been two processes
    assert run(*few, "--images", "id", "--resume") == 0
    assert sum(sizes) == 20 + 3  # the batch that was lost is the only one scored again
    assert table("s.csv") == whole and not list(place.glob("*.part*"))


def test_an_unreadable_image_is_tried_again(place, interrupt):
    Path("id/00.png").rename("kept.png")
    Path("id/00.png").write_text("no image")
    interrupt(2)
    assert run(*SCORE, "--images", "id", "--batch-size", 7, "--out", "s.csv") == 130
    Path("kept.png").rename("id/00.png")
    assert run(*SCORE, "--images", "id", "--batch-size", 7, "--out", "s.csv", "--resume") == 0
    assert len(table("s.csv")) == 20


def test_eval_goes_on_with_the_sets_that_are_complete(place, interrupt):
    few = ("eval", *SCORE[1:], "--id", "id", "--ood", "a=ood", "--batch-size", 4, "--out", "r")
    sizes = interrupt(5 + 2)
    assert run(*few) == 130
    assert run(*few, "--resume") == 0
    assert sum(sizes) == 20 + 12 + 4 and not list(place.glob("r/*.part*"))


@pytest.mark.parametrize("command", ["score", "fit"])
def test_nothing_is_lost_when_the_result_cannot_be_written(place, interrupt, monkeypatch, command):
    def full(*args):
        raise OSError("no space left")

    arguments = (command, *SCORE[1:], "--images" if command == "score" else "--id", "id", "--out", "x.csv")
    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_table", full)
        patch.setattr(GradNorm, "save", full)
        assert run(*arguments) == 2
    sizes = interrupt(1)
    assert run(*arguments, "--resume") == 0 and sizes == [] and Path("x.csv").exists()


def test_parquet_has_what_the_csv_has(place):
    parquet = pytest.importorskip("pyarrow.parquet")
    g = np.random.default_rng(1)
    np.save("F.npy", g.standard_normal((30, 6), dtype=np.float32))
    np.save("W.npy", g.standard_normal((4, 6), dtype=np.float32))
    for out in ("s.csv", "s.parquet"):
        assert run("score", "--features", "F.npy", "--weight", "W.npy", "--out", out, "--threshold", "1.5", *RUN) == 0
    rows = [{k: str(v) for k, v in row.items()} for row in parquet.read_table("s.parquet").to_pylist()]
    expected = table("s.csv")
    assert [r["path"] for r in rows] == [r["path"] for r in expected]
    assert [r["is_ood"] for r in rows] == [r["is_ood"] for r in expected]
    scores = [[float(r["score"]) for r in t] for t in (rows, expected)]
    np.testing.assert_allclose(*scores, rtol=1e-6)


def test_resume_sees_other_features(place, monkeypatch, capsys):
    g = np.random.default_rng(1)
    np.save("F.npy", g.standard_normal((3000, 6), dtype=np.float32))
    np.save("W.npy", g.standard_normal((4, 6), dtype=np.float32))
    arguments = ("score", "--features", "F.npy", "--weight", "W.npy", "--out", "s.npy", *RUN)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_table", lambda *_: 1 / 0)
        assert run(*arguments) == 1
    np.save("F.npy", g.standard_normal((3000, 6), dtype=np.float32))
    assert run(*arguments, "--resume") == 2
    assert "over other inputs" in capsys.readouterr().err


def test_sixteen_bit_images(place):
    pixels = np.random.default_rng(3).integers(0, 256, (9, 8), dtype=np.uint8)
    Path("gray").mkdir()
    Image.fromarray(pixels).save("gray/8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save("gray/16.png")
    Image.fromarray(pixels.astype(np.float32)).save("gray/float.tiff")  # no range: nobody knows what is white
    assert run(*SCORE, "--images", "gray", "--out", "s.csv") == 0
    sixteen, eight = table("s.csv")
    assert sixteen["score"] == eight["score"]


def test_every_image_once_through_links_and_repeated_folders(place):
    os.symlink(place / "id", "ood/linked")
    os.symlink(place / "ood", "ood/circle")
    os.symlink("nothing", "ood/nowhere.png")
    found = inputs.find_images(["ood", "ood/linked", Path("ood")])
    assert len(found) == 12 + 20 + 1 == len({os.path.realpath(f) for f in found}) and "ood/nowhere.png" in found


def test_workers_hand_over_one_tensor_per_batch():
    """One each would be one open file each: more than a process may have, with a few workers."""
    batch, reasons = images._collate([torch.ones(3, 2, 2), "not an image", torch.zeros(3, 2, 2)])
    assert batch.shape == (2, 3, 2, 2) and reasons == [None, "not an image", None]


def test_names_of_any_bytes(place):
    for name in (b"a\xff.png", b'b, "c"\n.png'):
        os.link("id/00.png", b"empty/" + name)
    assert run(*SCORE, "--images", "empty", "--out", "s.csv") == 0
    with open("s.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["empty/a\udcff.png", 'empty/b, "c"\n.png']


def test_features(place):
    g = np.random.default_rng(1)
    features, weight, bias = (g.standard_normal(s, dtype=np.float32) for s in ((3000, 6), (4, 6), (4,)))
    for name, array in (("F", features), ("W", weight), ("b", bias)):
        np.save(f"{name}.npy", array)
    files = ("--features", "F.npy", "--weight", "W.npy", "--bias", "b.npy")
    assert run("score", *files, "--out", "s.npy", *RUN) == 0
    expected = head_scores(*map(torch.from_numpy, (features, weight, bias)))
    got = np.load("s.npy")
    np.testing.assert_allclose(got["score"], expected.gradnorm, rtol=1e-5)
    assert got["prediction"].tolist() == expected.prediction.tolist() and got["path"].tolist()[-1] == "2999"


def test_eval(place):
    assert run("eval", *SCORE[1:], "--id", "id", "--ood", "noise=ood", "--bootstrap", 10, "--out", "r") == 0
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


def test_a_terminal_without_arrows(place, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True))
    assert run("eval", *SCORE[1:], "--id", "id", "--ood", "a=ood", "--out", "r") == 0
    assert b"FPR95 ? | AUROC ?" in sys.stdout.buffer.getvalue()


def test_two_processes_score_every_input_once_and_go_on_from_one(place, interrupt):
    Path("id/broken.png").write_text("no image")
    arguments = [*SCORE, "--images", "id", "--batch-size", "4", "--out", "two.csv"]
    interrupt(3)
    assert run(*arguments) == 130 and Path("two.csv.part-0-of-1").exists()
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
    done = subprocess.run(
        [*command, *arguments, "--resume"], env=environment, capture_output=True, text=True, cwd=place, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert run(*SCORE, "--images", "id", "--batch-size", 4, "--out", "one.csv") == 0
    one, two = table("one.csv"), table("two.csv")
    assert [r["path"] for r in one] == [r["path"] for r in two] and len(one) == 20
    np.testing.assert_allclose([float(r["score"]) for r in one], [float(r["score"]) for r in two], rtol=1e-5)
    assert not list(place.glob("*.part*"))


def test_amp_workers_and_compile(place, monkeypatch):
    assert run(*SCORE, "--images", "id", "--out", "a.csv") == 0
    real, compiled = torch.nn.Module.compile, []

    def compile_quickly(self):
        compiled.append(type(self).__name__)
        real(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    assert run(*SCORE, "--images", "id", "--out", "c.csv", "--compile") == 0
    assert compiled == ["Conv2d", "ReLU", "AdaptiveAvgPool2d", "Flatten"] and table("c.csv") == table("a.csv")
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
    (("--images", "id", "--device", "fpga9"), "device: expected one that is here"),
    (("--images", "id", "--detector", "own.py"), "expected a detector saved"),
    (("--images", "id", "--reduction", "max"), "invalid choice"),
    (("--images", "own.py"), "none of 1 can be read: own.py: not an image"),
    (("--images", "id", "--std", "0", "0", "0"), "preprocessing fails on id/00.png: std"),
    (("--images", "id", "--model", "own:no_tensor"), "expected the preprocessing to return a tensor, got Image"),
    (("--images", "id", "--threshold", "nan"), "threshold: expected a finite number"),
    (("--images", "id", "--weight", "W.npy"), "weight: it does not go with --images (pretrained weights are"),
    (("--images", "id", "--detector", "g.json", "--temperature", "2"), "temperature: it does not go with --detector"),
    (("--images", "id", "--detector", "g.json", "--threshold", "2"), "threshold: it does not go with --detector"),
    (("--images", "id", "--detector", "g.json"), "g.json: No such file"),
    (("--images", "id", "--device", "mps"), "device: expected one that is here"),
    (("--images", "id", "--model", ":"), "expected module:function"),
    ((), "expected --images with --model, or --features"),
    (("--features", "nothing.npy", "--weight", "W.npy"), "features: no file nothing.npy"),
    (("--features", "own.py", "--weight", "W.npy"), "features: cannot read own.py"),
    (("--features", "own.py"), "weight: expected --weight"),
    (("--features", "F.npy", "--weight", "W.npy", "--head", "fc"), "head: it does not go with --features"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else ""
)
def test_every_mistake_gets_one_line(place, capsys, arguments, message):
    command = ("score", *RUN) if "--features" in arguments else SCORE
    assert run(*command, *arguments, "--out", "s.csv") == 2
    assert not list(place.glob("*.part*"))
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
        (("fit", *SCORE[1:], "--id", "id", "--out", "empty"), "expected a file, empty is a folder"),
        (("eval", *SCORE[1:], "--id", "id", "--ood", "a=ood", "--out", "own.py"), "own.py is a file"),
        (("eval", *SCORE[1:], "--id", "id", "--ood", "id=ood", "--out", "r"), "'id' is taken"),
        (("eval", *SCORE[1:], "--id", "id", "--ood", "a/b=ood", "--out", "r"), "got 'a/b'"),
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
        assert not list(place.rglob("*.part*")), arguments


def test_what_the_users_own_code_raises_gets_one_line_too(place, capsys):
    assert run(*SCORE, "--images", "id", "--model", "own:broken", "--out", "s.csv") == 1
    assert capsys.readouterr().err == "gradnorm-fast: error: KeyError: 'broken' (--debug shows where)\n"
    with pytest.raises(KeyError):
        run(*SCORE, "--images", "id", "--model", "own:broken", "--out", "s.csv", "--debug")


def test_a_threshold_that_cannot_reject_is_said_to(place, capsys):
    assert run("fit", *SCORE[1:], "--id", "ood", "--out", "gate.json") == 0
    assert "12 images are too few to reject any: about 19 are needed" in capsys.readouterr().out


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(model.device_of(name)) for name in (None, "cuda", "cuda:0", "cpu")] == ["cuda:1"] * 2 + [
        "cuda:0",
        "cpu",
    ]


def test_env_says_what_would_run_and_checks_it(capsys):
    assert run("env", "--check", "--shape", 4, 5, 6) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "4x5x6 float32: " in out and "pass" in out and "FAIL" not in out


def test_help_imports_neither_torch_nor_numpy():
    code = """
import sys
from gradnorm_fast.cli import main
for arguments in ([], ["score"], ["eval"], ["fit"], ["demo"], ["env"], ["bench"]):
    try:
        main([*arguments, "--help"])
    except SystemExit:
        pass
print(sorted({"torch", "numpy", "triton"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_help_of_every_command_has_an_example(capsys):
    for command in ("score", "eval", "fit", "demo", "env", "bench"):
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code == 0 and f"gradnorm-fast {command}" in capsys.readouterr().out.split("example")[1]


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
