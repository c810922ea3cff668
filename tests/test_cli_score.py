"""Scores of images and of features into files."""

import csv
import errno
import importlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradnorm_fast import _progress, head_scores
from gradnorm_fast._files import replacing
from gradnorm_fast.cli import images, inputs, run_log

from command_line import FEATURES_RUN, MODEL_RUN, RUN, SCORE, run, table


def test_score_fit_and_gate(place, capsys):
    assert run("fit", *MODEL_RUN, "--id", "id", "--tpr", "0.9", "--out", "gate.json") == 0
    assert run(*SCORE, "--images", "id", "ood", "--detector", "gate.json", "--out", "s.csv") == 0
    rows = table("s.csv")
    assert list(rows[0]) == [
        "path",
        "prediction",
        "gradnorm",
        "feature_norm",
        "output_norm",
        "max_logit",
        "msp",
        "energy",
        "entropy",
        "sum_squares",
        "exgrad",
        "kl_uniform",
        "is_ood",
    ]
    assert len(rows) == 32 and rows[0]["path"].startswith("id") and rows[-1]["path"].startswith("ood")
    gate = json.loads(Path("gate.json").read_text())
    assert sum(r["is_ood"] == "True" for r in rows[:20]) == 2 - 1  # (1 + k)/21 <= 0.1 for k up to 1.1
    assert sorted(float(r["gradnorm"]) for r in rows[:20]) == pytest.approx(gate["calibration"], rel=1e-6)
    assert not list(place.glob("*.part*"))


def test_the_formats_hold_the_same(place):
    for name in ("s.csv", "s.npy"):
        assert run(*SCORE, "--images", "ood", "--threshold", "1.0", "--out", name) == 0
    rows, array = table("s.csv"), np.load("s.npy")
    assert [r["path"] for r in rows] == array["path"].tolist()
    assert np.array_equal(np.array([r["gradnorm"] for r in rows], dtype=np.float32), array["gradnorm"])
    assert array["is_ood"].tolist() == (array["gradnorm"] < 1.0).tolist()


def test_parquet_has_what_the_csv_has(place):
    parquet = pytest.importorskip("pyarrow.parquet")
    for out in ("s.csv", "s.parquet"):
        assert run("score", "--features", "G.npy", *FEATURES_RUN, "--out", out, "--threshold", "1.5") == 0
    rows = [{k: str(v) for k, v in row.items()} for row in parquet.read_table("s.parquet").to_pylist()]
    expected = table("s.csv")
    assert [r["path"] for r in rows] == [r["path"] for r in expected]
    assert [r["is_ood"] for r in rows] == [r["is_ood"] for r in expected]
    scores = [[float(r["gradnorm"]) for r in t] for t in (rows, expected)]
    np.testing.assert_allclose(*scores, rtol=1e-6)


def test_features(place):
    assert run("score", "--features", "F.npy", *FEATURES_RUN, "--out", "s.npy") == 0
    expected = head_scores(*(torch.from_numpy(np.load(f"{name}.npy")) for name in "FWb"))
    got = np.load("s.npy")
    for name, values in expected._asdict().items():
        np.testing.assert_allclose(got[name], values, rtol=1e-5, err_msg=name)
    assert got["path"].tolist()[-1] == "2999"


def test_unreadable_images_are_reported_and_skipped(place, capsys):
    Path("ood/broken.png").write_text("no image")
    assert run(*SCORE, "--images", "ood", "--out", "s.csv") == 0
    out, err = capsys.readouterr()
    assert "ood/broken.png" in err and "1 unreadable" in out and len(table("s.csv")) == 12
    assert run(*SCORE, "--images", "ood", "--out", "s.csv", "--strict") == 2
    assert "cannot read ood/broken.png" in capsys.readouterr().err


def test_sixteen_bit_images(place):
    pixels = np.random.default_rng(3).integers(0, 256, (9, 8), dtype=np.uint8)
    Path("gray").mkdir()
    Image.fromarray(pixels).save("gray/8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save("gray/16.png")
    Image.fromarray(pixels.astype(np.float32)).save("gray/float.tiff")  # no range: nobody knows what is white
    assert run(*SCORE, "--images", "gray", "--out", "s.csv") == 0
    sixteen, eight = table("s.csv")
    assert sixteen["gradnorm"] == eight["gradnorm"]


def test_every_image_once_through_links_and_repeated_folders(place):
    os.symlink(place / "id", "ood/linked")
    os.symlink(place / "ood", "ood/circle")
    os.symlink("nothing", "ood/nowhere.png")
    found = inputs.find_inputs(["ood", "ood/linked", Path("ood")])
    assert len(found) == 12 + 20 + 1 == len({os.path.realpath(f.path) for f in found})
    assert "ood/nowhere.png" in [f.name for f in found]


def test_workers_hand_over_one_tensor_per_batch():
    """One each would be one open file each: more than a process may have, with a few workers."""
    batch, reasons = images._collate([torch.ones(3, 2, 2), "not an image", torch.zeros(3, 2, 2)])
    assert batch.shape == (2, 3, 2, 2) and reasons == [None, "not an image", None]


def test_a_batch_may_be_larger_than_what_there_is(place):
    assert run(*SCORE, "--images", "id", "--batch-size", 18 * "9", "--out", "s.csv") == 0 and len(table("s.csv")) == 20


def test_workers_by_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    some, many = (images._Images([None] * n, images.Preprocessing(lambda image: image)) for n in (30, 40))
    assert [images._default_workers(i, 10) for i in (some, many)] == [0, 6]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert images._default_workers(many, 10) == 2
    monkeypatch.setattr(images.multiprocessing, "get_start_method", lambda: "spawn")
    assert images._default_workers(many, 10) == 0  # a lambda
    assert images._default_workers(images._Images([None] * 40, images.Preprocessing(str)), 10) == 2


def test_progress_names_what_is_slow(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    slow = {1: "the model is slow (97% of the time)", 24: "reading is slow, try more --workers (80% of the time)"}
    for waited, message in slow.items():
        bar = _progress.Progress(100, "images", True)
        bar.start(100)
        now[0] += 30
        bar.advance(100, waited)
        assert f"100/100 images, 3/s, {message}" in capsys.readouterr().err


def test_names_of_any_bytes(place):
    for name in (b"a\xff.png", b'b, "c"\n.png'):
        os.link("id/00.png", b"empty/" + name)
    assert run(*SCORE, "--images", "empty", "--out", "s.csv") == 0
    with open("s.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["empty/a\udcff.png", 'empty/b, "c"\n.png']


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
        assert a["path"] == b["path"] and float(a["gradnorm"]) == pytest.approx(float(b["gradnorm"]), rel=0.1)


def test_a_threshold_that_cannot_reject_is_said_to(place, capsys):
    assert run("fit", *MODEL_RUN, "--id", "ood", "--out", "gate.json") == 0
    assert "12 inputs are too few to reject any: about 19 are needed" in capsys.readouterr().out


def test_nan_scores_are_counted(place, capsys):
    features = np.load("G.npy")
    features[[3, 7], 0] = np.nan
    np.save("G.npy", features)
    arguments = ("score", "--features", "G.npy", *FEATURES_RUN, "--out", "s.csv")
    assert run(*arguments) == 0
    assert "2 of 200 scores are NaN, the first of 3" in capsys.readouterr().err
    assert run(*arguments, "--strict") == 1 and len(table("s.csv")) == 200
    assert run("fit", "--id", "G.npy", *FEATURES_RUN, "--out", "g.json") == 2
    assert "2 of 200 scores are NaN, the first of 3" in capsys.readouterr().err
    sys.path.insert(0, str(place))
    weights = importlib.import_module("own").small().state_dict()
    torch.save({name: torch.nan * value for name, value in weights.items()}, "nan.pt")
    arguments = (*SCORE, "--checkpoint", "nan.pt", "--images", "ood", "--out", "s.csv")
    assert run(*arguments) == 0 and run(*arguments, "--strict") == 1
    assert capsys.readouterr().err.count("12 of 12 scores are NaN, the first of ood/00.png") == 2


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_input_is_overwritten(place, link, capsys):
    link("W.npy", "other.npy")
    shutil.copy("W.npy", "c.npy")
    for wrong in (
        ("score", "--features", "F.npy", *FEATURES_RUN, "--out", "F.npy"),
        ("score", "--features", "F.npy", *FEATURES_RUN, "--out", "W.npy"),
        ("score", "--features", "F.npy", *FEATURES_RUN, "--out", "./b.npy"),
        ("score", "--features", "F.npy", *FEATURES_RUN, "--out", "other.npy"),
        (*SCORE, "--images", "id", "--out", "s.npy", "--save-features", "s.npy"),
        (*SCORE, "--images", "id", "--checkpoint", "c.npy", "--out", "s.csv", "--save-features", "c.npy"),
    ):
        before = {path: path.read_bytes() for path in place.glob("*.npy")}
        assert run(*wrong) == 2
        assert "is read by this run" in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in place.glob("*.npy")}
    picture = Path("id/00.png").read_bytes()
    assert run("fit", *MODEL_RUN, "--id", "id", "--out", "id/00.png") == 2
    assert "ending in .json" in capsys.readouterr().err and Path("id/00.png").read_bytes() == picture
    for command in (("score", *MODEL_RUN, "--images", "id"), ("score", *MODEL_RUN, "--images", ".")):
        assert run(*command, "--out", "id/s.csv") == 2
        assert "which is read; choose another place" in capsys.readouterr().err


def test_a_link_stays_a_link(place):
    Path("real.csv").write_text("old")
    os.symlink("real.csv", "s.csv")
    assert run(*SCORE, "--images", "ood", "--out", "s.csv") == 0
    assert os.path.islink("s.csv") and len(table("real.csv")) == 12


def test_what_is_no_image_file_is_skipped(place, capsys):
    os.mkfifo("pipe")
    os.symlink(place / "pipe", "ood/pipe.png")
    for name, size in (("long", (20000, 1)), ("tall", (1, 80000)), ("large", (20000, 20000))):
        Image.new("1", size).save(f"ood/{name}.png")
    assert run(*SCORE, "--images", "ood", "--out", "s.csv") == 0
    err = capsys.readouterr().err
    assert "cannot read ood/long.png: 20000x1 pixels: one side is more than 100 times the other" in err
    assert "ood/tall.png: 1x80000" in err and "ood/large.png" in err and "pipe" not in err
    assert len(table("s.csv")) == 12
    Path("list.txt").write_text("pipe\nood/01.png\n")
    assert run(*SCORE, "--images", "ood/deep/01.png", "list.txt", "--out", "s.csv") == 0
    assert "cannot read pipe: not a file" in capsys.readouterr().err
    assert run(*SCORE, "--images", "pipe", "--out", "s.csv") == 2
    assert "pipe is neither" in capsys.readouterr().err
    assert run(*SCORE, "--images", "id", "--resize", 20000, "--out", "s.csv") == 2
    assert "id/00.png: 8x9 pixels: resized to 20000" in capsys.readouterr().err


def test_an_error_without_words_is_named(monkeypatch):
    def transform(image):
        raise MemoryError

    with pytest.raises(ValueError, match=r"fails on a\.png: MemoryError"):
        images.transformed(None, transform, "a.png")


def test_images_are_turned_as_exif_says(place):
    pixels = np.random.default_rng(3).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Path("turned").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels)).save("turned/a.png", exif=exif)
    Image.fromarray(pixels).save("turned/b.png")
    Image.fromarray(np.rot90(pixels)).save("turned/c.png")
    assert run(*SCORE, "--images", "turned", "--out", "s.csv") == 0
    a, b, c = (row["gradnorm"] for row in table("s.csv"))
    assert a == b != c
    assert run(*SCORE, "--images", "turned", "--out", "s.csv", "--no-exif") == 0
    a, b, c = (row["gradnorm"] for row in table("s.csv"))
    assert a == c != b


def test_lists_standard_input_and_shards(place, monkeypatch):
    assert run(*SCORE, "--images", "id", "--out", "s.csv") == 0
    expected = {row["path"]: pytest.approx(float(row["gradnorm"]), rel=1e-5) for row in table("s.csv")}  # other batches

    def scored(*columns):
        return [(*(row[c] for c in columns), float(row["gradnorm"])) for row in table("s.csv")]

    some = list(expected)[3:6]
    Path("some images.txt").write_text("".join(f"{os.path.basename(p)} {i}\n" for i, p in enumerate(some)) + "\n")
    assert run(*SCORE, "--images", "some images.txt", "--root", os.path.dirname(some[0]), "--out", "s.csv") == 0
    assert scored("label") == [(str(i), expected[p]) for i, p in enumerate(some)]

    shutil.copy(some[0], "a name 7")  # a file of that name is no label
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{some[1]} -1\r\na name 7\n".encode())))
    assert run(*SCORE, "--images", "-", "--out", "s.csv") == 0
    assert scored("path") == [(some[1], expected[some[1]]), ("a name 7", expected[some[0]])]
    assert "label" not in table("s.csv")[0]

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="where several processes read them, got -"):
        patch.setenv("WORLD_SIZE", "2")
        inputs.find_inputs(["-"])

    with tarfile.open("shard.tar", "w") as shard:
        for i, path in enumerate(some):
            shard.add(path, f"x/{i}.rgb.png")
            data = tarfile.TarInfo(f"x/{i}.cls")
            data.size = 1
            shard.addfile(data, io.BytesIO(str(4 - i).encode()))
    assert run(*SCORE, "--images", "shard.tar", "--out", "s.csv") == 0
    os.mkdir("shards")
    os.rename("shard.tar", "shards/a.tar")
    assert run(*SCORE, "--images", "shards", "--out", "t.csv") == 0
    assert [r["gradnorm"] for r in table("t.csv")] == [r["gradnorm"] for r in table("s.csv")]
    assert scored("path", "label") == [
        (f"shard.tar:x/{i}.rgb.png", str(4 - i), expected[path]) for i, path in enumerate(some)
    ]


def test_save_features(place, interrupt, capsys):
    Path("id/broken.png").write_text("no image")
    arguments = (*SCORE, "--images", "id", "--batch-size", 4, "--out", "s.npy", "--save-features", "f.npy")
    interrupt(3)
    assert run(*arguments) == 130
    part = run_log.features_part(Path("s.npy"))
    part.rename("elsewhere")
    assert run(*arguments, "--resume") == 2
    assert f"save-features: {part} is gone, with the features of the run" in capsys.readouterr().err
    Path("elsewhere").rename(part)
    assert run(*arguments, "--resume") == 0
    features, scores = np.load("f.npy"), np.load("s.npy")
    assert features.shape == (20, 8) and features.dtype == np.float32
    sys.path.insert(0, str(place))
    head = importlib.import_module("own").small()[-1]
    expected = head_scores(torch.from_numpy(features), head.weight, head.bias)
    np.testing.assert_allclose(scores["gradnorm"], expected.gradnorm.detach(), rtol=1e-5)
    assert not list(place.glob("*.part*"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate here")
def test_features_have_their_room_on_the_disk_before_any_work(place, interrupt, monkeypatch, capsys):
    """Writing to a mapped file on a full disk ends the process without a word."""
    arguments = (*SCORE, "--images", "id", "--out", "s.csv", "--save-features", "f.npy", "--batch-size", 4)
    interrupt(2)
    assert run(*arguments) == 130
    part = Path("s.part-features").stat()
    assert part.st_blocks * 512 >= part.st_size > 20 * 8 * 4

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    sizes = interrupt(0)
    assert run(*arguments, "--restart") == 2 and sum(sizes) == 0
    assert re.search(r"s.part-features: 640 bytes of features: No space left on device", capsys.readouterr().err)
    assert not Path("s.part-features").exists()

    def no_header(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a full disk: no file is named

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", no_header)
    assert run(*arguments, "--restart") == 2 and "s.part-features: 640 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_resume_needs_the_features_that_were_kept(place, interrupt, monkeypatch, capsys, damage):
    arguments = (*SCORE, "--images", "id", "--out", "s.csv", "--save-features", "f.npy", "--batch-size", 4)
    interrupt(3)
    assert run(*arguments) == 130
    part = Path("s.part-features")
    part.unlink() if damage == "gone" else os.truncate(part, 100 if damage == "damaged" else 0)
    assert run(*arguments, "--resume") == 2
    assert f"s.part-features is {damage}, with the features of the run; --restart" in capsys.readouterr().err
    # A restart that is killed with its new file of features, before any row: the old rows are not taken up again.
    with monkeypatch.context() as patch:
        patch.setattr(images, "run", lambda *_, **__: 1 / 0)
        assert run(*arguments, "--restart") == 1
    sizes = interrupt(100)
    assert run(*arguments, "--resume") == 0 and sum(sizes) == 20 and np.load("f.npy").any(1).all()


def test_an_own_model_may_import_beside_itself_while_it_runs(place):
    Path("beside.py").write_text("SCALE = 1")
    Path("late.py").write_text(
        "import own, torch\n"
        "class Late(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = own.small()\n"
        "    def forward(self, x):\n"
        "        import beside\n"
        "        return self.body(beside.SCALE * x)\n"
    )
    assert run(*SCORE, "--model", "late:Late", "--images", "id", "--out", "s.csv") == 0


def test_parquet_refuses_other_names_before_any_work(place, interrupt, capsys):
    os.link("id/00.png", b"empty/a\xff.png")
    sizes = interrupt(1)
    assert run(*SCORE, "--images", "empty", "--out", "s.parquet") == 2
    assert ".parquet holds UTF-8 alone" in capsys.readouterr().err and sizes == []


def test_a_gate_fitted_to_features_or_scores(place, capsys):
    assert run("fit", "--id", "G.npy", *FEATURES_RUN, "--tpr", "0.9", "--out", "g.json") == 0
    assert run("score", "--features", "G.npy", *FEATURES_RUN, "--detector", "g.json", "--out", "s.csv") == 0
    assert sum(row["is_ood"] == "True" for row in table("s.csv")) == 19  # (1 + k)/201 <= 0.1
    assert run("fit", "--id", "s.csv", *FEATURES_RUN, "--tpr", "0.9", "--out", "h.json") == 0
    one, two = (json.loads(Path(name).read_text()) for name in ("g.json", "h.json"))
    assert one == two
    assert run("fit", "--id", "s.csv", "--quiet", "--out", "h.json") == 2
    assert "does not say which model made it" in capsys.readouterr().err
    assert run(*SCORE, "--images", "id", "--out", "i.csv") == 0
    assert run("fit", *MODEL_RUN, "--head", "4", "--id", "i.csv", "--out", "i.json") == 0
    assert run(*SCORE, "--images", "id", "--detector", "i.json", "--out", "s.csv") == 0
    np.save("W.npy", np.load("W.npy") + 1)
    assert run("score", "--features", "G.npy", *FEATURES_RUN, "--detector", "g.json", "--out", "s.csv") == 2
    assert "fitted to another head than that of --weight" in capsys.readouterr().err


def test_a_gate_of_features_goes_with_their_model_and_the_other_way_round(place, capsys):
    assert run(*SCORE, "--images", "id", "--out", "i.npy", "--save-features", "f.npy") == 0
    sys.path.insert(0, str(place))
    head = importlib.import_module("own").small()[-1]
    np.save("W.npy", head.weight.detach())
    np.save("b.npy", head.bias.detach())
    assert run("fit", "--id", "f.npy", *FEATURES_RUN, "--head", "4", "--tpr", 0.8, "--out", "f.json") == 0
    capsys.readouterr()
    assert run(*SCORE, "--images", "id", "--detector", "f.json", "--out", "s.csv") == 0
    assert "it knows the head alone: neither the rest of the model" in capsys.readouterr().err
    assert run("fit", *MODEL_RUN, "--id", "id", "--tpr", 0.8, "--out", "i.json") == 0
    assert run("score", "--features", "f.npy", *FEATURES_RUN, "--detector", "i.json", "--out", "t.csv") == 0
    assert [r["is_ood"] for r in table("s.csv")] == [r["is_ood"] for r in table("t.csv")]
    assert sum(r["is_ood"] == "True" for r in table("s.csv")) == 3  # (1 + k)/21 <= 0.2


def test_a_gate_by_another_score(place, capsys):
    assert run("fit", *MODEL_RUN, "--id", "id", "--score", "energy", "--tpr", 0.8, "--out", "e.json") == 0
    capsys.readouterr()
    assert run(*SCORE, "--images", "id", "--detector", "e.json", "--out", "s.csv") == 0
    assert re.search("3 of 20 below the threshold .* of energy", capsys.readouterr().out)
    rows = sorted(table("s.csv"), key=lambda row: float(row["energy"]))
    assert [row["is_ood"] for row in rows] == ["True"] * 3 + ["False"] * 17
    assert run("fit", *MODEL_RUN, "--id", "id", "--ood", "ood", "--score", "auto", "--out", "a.json") == 0
    best = re.search(r"score to take: (\w+)", capsys.readouterr().out)[1]
    assert json.loads(Path("a.json").read_text())["score"] == best
    for arguments, message in (
        (("--score", "auto"), "expected --score auto and --ood together"),
        (("--ood", "ood"), "expected --score auto and --ood together"),
        (("--score", "entropy"), "score: expected one of gradnorm"),
    ):
        assert run("fit", *MODEL_RUN, "--id", "id", *arguments, "--out", "x.json") == 2
        assert message in capsys.readouterr().err


def test_a_gate_knows_its_model_and_preprocessing(place, capsys, interrupt):
    assert run("fit", *MODEL_RUN, "--id", "id", "--out", "g.json") == 0
    gate = (*SCORE, "--images", "id", "--detector", "g.json", "--out", "s.csv")
    assert run(*gate) == 0
    for other in (("--resize", 16), ("--no-exif",)):
        assert run(*gate, *other) == 2
        err = capsys.readouterr().err
        assert "the preprocessing was" in err and "or give --force" in err and err.count("\n") == 1
        assert run(*gate, *other, "--force") == 0
        assert "the preprocessing was" in capsys.readouterr().err
    state = json.loads(Path("g.json").read_text())
    Path("n.json").write_text(json.dumps(state | {"calibration": None}))
    sizes = interrupt(1)
    assert run(*gate, "--detector", "n.json") == 2
    assert "no threshold yet" in capsys.readouterr().err and sizes == []  # before any work
    Path("own2.py").write_text(Path("own.py").read_text().replace("torch.nn.ReLU()", "torch.nn.BatchNorm2d(8)"))
    assert run(*gate, "--model", "own2:small") == 2
    assert "tensors differ" in capsys.readouterr().err


def test_a_preprocessing_that_is_unknown_is_said_to_be(place, capsys):
    with open("own.py", "a") as file:
        file.write("def untold():\n    from torchvision.transforms.v2.functional import to_dtype, to_image\n")
        file.write("    return small(), lambda image: to_dtype(to_image(image), torch.float32, scale=True)\n")
    assert run("fit", *MODEL_RUN, "--model", "own:untold", "--id", "id", "--out", "g.json") == 0
    assert "g.json does not know the preprocessing" in capsys.readouterr().err
    for model, message in (("small", "is unknown and was not compared"), ("untold", "has no text to compare")):
        gate = (*SCORE, "--model", f"own:{model}", "--images", "id", "--detector", "g.json", "--out", "s.csv")
        assert run(*gate) == 0 and message in capsys.readouterr().err


def test_a_gate_knows_whether_it_was_fitted_with_amp(place, capsys):
    for amp, other, message in (
        ((), ("--amp",), "was off, it is bfloat16"),
        (("--amp",), (), "was bfloat16, it is off"),
    ):
        assert run("fit", *MODEL_RUN, "--id", "id", *amp, "--out", "g.json") == 0
        gate = (*SCORE, "--images", "id", "--detector", "g.json", "--out", "s.csv")
        assert run(*gate, *amp) == 0
        capsys.readouterr()
        assert run(*gate, *other) == 2
        assert f"autocast {message}. Fit it again, or give --force" in capsys.readouterr().err
        assert run(*gate, *other, "--force") == 0
        assert f"autocast {message}" in capsys.readouterr().err
    assert run(*SCORE, "--images", "id", "--out", "s.csv") == 0  # scores do not say how they were made
    assert run("fit", *MODEL_RUN[:-1], "0", "--head", "4", "--id", "s.csv", "--out", "g.json") == 0
    assert json.loads(Path("g.json").read_text())["autocast"] is None and run(*gate, "--amp") == 0


def test_report(place, capsys):
    arguments = (*SCORE, "--images", "id", "ood", "--threshold", "1.0", "--out", "s.csv", "--report")
    assert run(*arguments, "r.html") == 0
    page, rows = Path("r.html").read_text(), table("s.csv")
    assert page.count("<figure ") == 32 == page.count('src="data:image/png')  # 24 of each end, of 32
    assert page.count('class="ood"') == sum(float(row["gradnorm"]) < 1.0 for row in rows)
    assert all(row["path"].rpartition("/")[2] in page for row in rows) and "own:small" in page
    features = ("score", "--features", "F.npy", *FEATURES_RUN, "--out", "f.npy", "--report")
    assert run(*features, "f.html") == 0 and "<figure " not in Path("f.html").read_text()
    Path("s.csv").unlink()
    for path, message in (
        ("r.txt", "report: expected a name ending in .html, got 'r.txt'"),
        ("nowhere/r.html", "report: no folder nowhere"),
        ("id/deep/r.html", "report: id/deep/r.html lies in id, which is read"),
    ):
        assert run(*arguments, path) == 2
        assert message in capsys.readouterr().err and not Path("s.csv").exists()
    os.link("W.npy", "W.html")
    assert run(*features, "W.html") == 2 and "report: W.html is read by this run" in capsys.readouterr().err


def test_a_damaged_shard_is_not_taken_for_a_shorter_one(place, capsys):
    with tarfile.open("s.tar", "w") as shard:
        for name in ("00", "03", "06"):
            shard.add(f"ood/{name}.png", f"{name}.png")
    with tarfile.open("s.tar") as shard:
        third = shard.getmembers()[2].offset
    whole = Path("s.tar").read_bytes()
    damaged = bytearray(whole)
    damaged[third] ^= 1
    for content, message in (
        (damaged, "damaged, cut off, or continued at byte"),
        (whole[: third + 100], "damaged, cut off, or continued at byte"),
        (whole[:third], "cut off: it has no end mark at byte"),  # between two members
        (whole[:third] + bytes(100), "cut off: it has no end mark at byte"),
        (whole[:third] + bytes(1024) + whole[third:], "damaged, cut off, or continued at byte"),  # two in one file
    ):
        Path("s.tar").write_bytes(content)
        assert run(*SCORE, "--images", "s.tar", "--out", "s.csv") == 2
        assert f"images: s.tar is {message} {third}, after 2 images" in capsys.readouterr().err
    Path("s.tar").write_bytes(whole[:third] + bytes(512))  # some writers leave one block
    assert run(*SCORE, "--images", "s.tar", "--out", "s.csv") == 0 and len(table("s.csv")) == 2


def test_a_list_with_a_byte_order_mark(place):
    Path("list.txt").write_bytes(b"\xef\xbb\xbfood/00.png\r\nood/03.png\r\n")
    assert run(*SCORE, "--images", "list.txt", "--out", "s.csv", "--strict") == 0
    assert [row["path"] for row in table("s.csv")] == ["ood/00.png", "ood/03.png"]


def test_features_are_not_narrowed_to_the_dtype_of_the_head(place):
    features, weight = 1e5 * np.load("G.npy"), np.load("W.npy").astype(np.float16)
    np.save("large.npy", features)
    for dtype in (np.float16, np.float32):  # the same values
        np.save("head.npy", weight.astype(dtype))
        out = f"{np.dtype(dtype)}.csv"
        assert run("score", "--features", "large.npy", "--weight", "head.npy", *RUN[:3], "--out", out, "--strict") == 0
    assert Path("float16.csv").read_text() == Path("float32.csv").read_text()


def test_report_of_images_in_a_shard(place):
    with tarfile.open("s.tar", "w") as shard:
        for name in ("00", "03"):
            shard.add(f"ood/{name}.png", f"{name}.png")
    assert run(*SCORE, "--images", "s.tar", "--out", "s.csv", "--report", "r.html") == 0
    assert Path("r.html").read_text().count('src="data:image/png') == 2


def test_an_output_that_is_no_regular_file(place, capsys):
    """A device or a pipe would become a file."""
    os.mkfifo("pipe")
    for name in ("s.csv", "x.png"):
        os.symlink("pipe", name)
    assert run("score", "--features", "F.npy", *FEATURES_RUN, "--out", "s.csv") == 2
    assert "out: expected a regular file, got a device or a pipe: s.csv" in capsys.readouterr().err
    assert run("demo", "--output", "x.png") == 2 and "not a regular file" in capsys.readouterr().err
    with pytest.raises(OSError, match="not a regular file"), replacing("pipe"):
        pass
    assert Path("pipe").is_fifo()


def test_a_file_that_is_replaced_keeps_its_permissions(place):
    for name in ("new.csv", "old.csv"):
        if name == "old.csv":
            Path(name).touch()
            Path(name).chmod(0o600)
        assert run("score", "--features", "F.npy", *FEATURES_RUN, "--out", name) == 0
    assert Path("old.csv").stat().st_mode & 0o777 == 0o600 != Path("new.csv").stat().st_mode & 0o777
    assert Path("old.csv").read_text() == Path("new.csv").read_text()


def test_a_rank_without_a_world(place, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run(*SCORE, "--images", "id", "--out", "s.csv") == 2
    assert "RANK: expected 0 ... 0 for WORLD_SIZE=1, got 1" in capsys.readouterr().err
    assert not list(place.glob("s*"))


def test_the_demo_does_not_draw_over_its_images(place, capsys):
    before = Path("id/00.png").read_bytes()
    assert run("demo", "--imagenet", "--images", "id", "--output", "id/00.png") == 2
    assert "output: id/00.png lies in id, which is read" in capsys.readouterr().err
    assert Path("id/00.png").read_bytes() == before


def test_a_wider_bias_is_not_rounded_to_the_weight(place):
    """With a bias beyond float16's range the logits would be infinite, and every score NaN."""
    np.save("W16.npy", np.load("W.npy").astype(np.float16))
    np.save("W32.npy", np.load("W16.npy").astype(np.float32))
    np.save("far.npy", np.array([1e5, 1e5 + 1, 0, 0], np.float32))
    for weight in ("W16.npy", "W32.npy"):
        given = ("--features", "G.npy", "--weight", weight, "--bias", "far.npy", "--out", f"{weight}.csv")
        assert run("score", *given, "--device", "cpu", "--quiet") == 0
    assert Path("W16.npy.csv").read_text() == Path("W32.npy.csv").read_text()
