"""Nothing is lost and nothing stale is taken for fresh: runs that are interrupted, damaged, and resumed."""

import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradnorm_fast import GradNorm
from gradnorm_fast.cli import images, run_log, tables

from command_line import FEATURES_RUN, MODEL_RUN, SCORE, run, table


def test_an_interrupted_run_goes_on_where_it_stopped(place, interrupt, capsys):
    few = (*SCORE, "--batch-size", 3, "--out", "s.csv")
    assert run(*few, "--images", "id") == 0
    whole = table("s.csv")
    sizes = interrupt(4)
    assert run(*few, "--images", "id") == 130
    part = Path("s.part-0-of-1")
    part.write_bytes(part.read_bytes() + bytes(20))  # a row cut off in the middle
    for other, what in (
        (("--images", "ood"), "inputs"),
        (("--images", "id", "--temperature", 2), "temperature"),
        (("--images", "id", "--amp"), "amp"),
        (("--images", "id", "--resize", 8), "preprocessing"),
        (("--images", "id", "--model", "own:other"), "model's weights"),
    ):
        assert run(*few, *other, "--resume") == 2, other
        assert re.search(f"kept by a run that differs in .*{what}; --restart drops it", capsys.readouterr().err)
    assert run(*few, "--images", "id") == 2
    assert "has kept 9 rows; --resume goes on with them, --restart drops them" in capsys.readouterr().err
    part.rename("s.part-1-of-2")  # as if there had been two processes
    few = (*few[:-1], "s.npy")  # and into another format
    assert run(*few, "--images", "id", "--resume") == 0
    assert sum(sizes) == 20 + 3  # the batch that was lost is the only one scored again
    assert np.load("s.npy")["path"].tolist() == [row["path"] for row in whole]
    assert np.load("s.npy")["gradnorm"].tolist() == [np.float32(row["gradnorm"]) for row in whole]
    assert not list(place.glob("*.part*")) and not list(place.glob("*.lock"))


def kept(place, interrupt, *more, batches=4):
    """A run that is interrupted after 9 of 20 images; the part file, and the arguments to go on."""
    arguments = (*SCORE, "--batch-size", 3, "--out", "s.csv", "--images", "id", *more)
    assert run(*arguments, "--restart") == 0
    whole = table("s.csv")
    interrupt(batches)
    assert run(*arguments) == 130
    return Path("s.part-0-of-1"), (*arguments, "--resume"), whole


@pytest.mark.parametrize("damage", ["zeros", "hole", "tail", "flip", "cut"])
def test_damaged_rows_are_not_used(place, interrupt, capsys, damage):
    part, again, whole = kept(place, interrupt)
    header, rows = part.read_bytes().split(b"\n", 1)
    size = len(rows) // 9
    rows = {
        "zeros": rows + bytes(64) + bytes(size),
        "hole": rows[: 4 * size] + rows[4 * size + 8 :],
        "tail": rows + np.random.default_rng(0).bytes(3 * size),
        "flip": rows[: 4 * size + 20] + bytes([rows[4 * size + 20] ^ 1]) + rows[4 * size + 21 :],
        "cut": rows[: 4 * size + 5],
    }[damage]
    part.write_bytes(header + b"\n" + rows)
    sizes = interrupt(100)
    assert run(*again) == 0
    left = 9 if damage in ("zeros", "tail") else 4
    assert f"row {left + 1} is damaged or cut off; the {left} rows before it are kept" in capsys.readouterr().err
    assert sum(sizes) == 20 - left and [r["path"] for r in table("s.csv")] == [r["path"] for r in whole]
    np.testing.assert_allclose(
        [float(r["gradnorm"]) for r in table("s.csv")], [float(r["gradnorm"]) for r in whole], 1e-5
    )


def test_rows_that_an_earlier_version_kept_are_neither_used_nor_lost(place, interrupt, monkeypatch, capsys):
    """A row has seven scores. Of a part from before parts named their fields, at least the rows are counted."""
    with monkeypatch.context() as earlier:
        earlier.setattr(images, "FIELDS", tables.FIRST_FIELDS)
        part, again, whole = kept(place, interrupt)
    rows = part.read_bytes()
    assert run(*again) == 2
    assert "kept by a run that differs in fields; --restart drops it" in capsys.readouterr().err
    unnamed = rows.replace(b'"fields"', b'"columns"', 1)
    for of_part in (rows, unnamed):
        part.write_bytes(of_part)
        assert run(*[a for a in again if a != "--resume"]) == 2
        assert "s.csv has kept 9 rows" in capsys.readouterr().err and part.read_bytes() == of_part
    assert run(*[a if a != "--resume" else "--restart" for a in again]) == 0
    now = table("s.csv")
    assert [row | old for row, old in zip(now, whole, strict=True)] == now and "kl_uniform" in now[0]


def test_an_image_that_was_replaced_is_scored_again(place, interrupt, capsys):
    _, again, whole = kept(place, interrupt)
    first = whole[0]["path"]
    os.replace("ood/00.png", first)
    sizes = interrupt(100)
    assert run(*again) == 0
    assert "inputs that have changed since and are scored again: 1" in capsys.readouterr().err and sum(sizes) == 11 + 1
    now = table("s.csv")
    assert now[0]["gradnorm"] != whole[0]["gradnorm"] and now[1]["gradnorm"] == whole[1]["gradnorm"]


def test_a_content_hash_sees_what_size_and_time_do_not(place, interrupt):
    _, again, whole = kept(place, interrupt, "--content-hash")
    first, second = whole[0]["path"], whole[1]["path"]
    status = os.stat(first)
    image = np.asarray(Image.open(first))
    Image.fromarray(255 - image).save(first)
    os.truncate(first, max(status.st_size, os.path.getsize(first)))
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(second)  # the same, touched
    sizes = interrupt(100)
    assert run(*again) == 0 and sum(sizes) == 11 + 1
    assert table("s.csv")[0]["gradnorm"] != whole[0]["gradnorm"]


def test_changed_code_of_a_model_is_another_model(place, interrupt, capsys):
    _, again, _ = kept(place, interrupt)
    Path("own.py").write_text(Path("own.py").read_text() + "\n# changed\n")
    assert run(*again) == 2
    assert "differs in model's code" in capsys.readouterr().err
    assert run(*[a for a in again if a != "--quiet"]) == 2
    assert "other code and files that they use are not compared" in capsys.readouterr().err


def test_an_empty_part_is_no_rows(place, interrupt):
    _, again, _ = kept(place, interrupt)
    Path("s.part-1-of-2").touch()
    sizes = interrupt(100)
    assert run(*again) == 0 and sum(sizes) == 11 and len(table("s.csv")) == 20


def test_a_process_of_many_has_its_part_on_disk_before_it_works(place, monkeypatch):
    monkeypatch.setattr(run_log, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(run_log, "_barrier", lambda world: None)
    monkeypatch.setattr(run_log.torch.distributed, "is_initialized", lambda: True)
    seen = []

    def batches(todo):
        seen.append((todo, Path("s.part-1-of-2").read_bytes()))
        return iter(())

    job = run_log.Job(["a", "b", "c", "d"], np.zeros(4, np.uint64), np.full(4, -1), {"x": 1}, "rows")
    assert run_log.run(job, batches, Path("s.csv"), progress=False) is None
    assert seen == [([1, 3], run_log._header(job))]


def test_inputs_without_a_row_are_an_error(place):
    job = run_log.Job(["a", "b", "c"], np.zeros(3, np.uint64), np.full(3, -1), {"x": 1}, "rows")

    def batches(todo):
        yield run_log.Batch([], None, [(todo[0], "is no image")])

    with pytest.raises(ValueError, match=r"s.csv: 2 of 3 inputs have no row; is a process missing\?"):
        run_log.run(job, batches, Path("s.csv"), progress=False)


def test_files_with_the_name_of_a_part_are_left_alone(place, capsys):
    for name in ("s.part-7-of-9", "s.part-notes", "s.csv.part-0-of-1", "s.csv.partial"):
        Path(name).write_text("my own")
    assert run(*SCORE, "--images", "ood", "--out", "s.csv") == 0
    assert run(*SCORE, "--images", "ood", "--out", "s.csv", "--restart") == 0
    assert [p.read_text() for p in sorted(place.glob("s.*part*"))] == ["my own"] * 4
    for name in ("s.part-0-of-1", "s.part-features"):
        Path(name).write_text("my own")
        assert run(*SCORE, "--images", "ood", "--out", "s.csv", "--restart") == 2
        assert f"{name} is in the way" in capsys.readouterr().err
        assert Path(name).read_text() == "my own"
        Path(name).unlink()


def test_a_file_that_looks_like_the_lock_is_left_alone(place, capsys):
    Path("poetry.lock").write_text("my own")
    assert run(*SCORE, "--images", "ood", "--out", "poetry.csv") == 2
    assert "poetry.lock is in the way" in capsys.readouterr().err
    assert Path("poetry.lock").read_text() == "my own"


def test_a_second_run_into_the_same_file_is_refused(place, capsys):
    code = "import sys; from pathlib import Path; from gradnorm_fast.cli.run_log import locked\n"
    code += "with locked(Path('s.csv')): print('locked', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout.readline() == "locked\n"
        assert run(*SCORE, "--images", "ood", "--out", "s.npy") == 2
        assert f"process {other.pid} on {socket.gethostname()} is writing s.npy" in capsys.readouterr().err
        other.kill()
    assert Path("s.lock").exists()  # which does not matter: nobody holds it
    assert run(*SCORE, "--images", "ood", "--out", "s.npy") == 0 and not Path("s.lock").exists()


def test_a_full_disk_names_the_file_and_loses_nothing(place, capsys, interrupt):
    arguments = (*SCORE, "--images", "id", "--batch-size", 3, "--out", "s.csv")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        assert run(*arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert "s.part-0-of-1: File too large; --resume goes on with the rows that are kept" in err
    sizes = interrupt(100)
    assert run(*arguments, "--resume") == 0 and 0 < sum(sizes) < 20 and len(table("s.csv")) == 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no room even for the lock's owner
    try:
        assert run(*arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "s.part-0-of-1: File too large; --resume goes on" in capsys.readouterr().err
    assert not Path("s.lock").exists() and not list(place.glob("*.part*"))


def test_an_unreadable_image_is_tried_again(place, interrupt):
    Path("id/00.png").rename("kept.png")
    Path("id/00.png").write_text("no image")
    interrupt(2)
    assert run(*SCORE, "--images", "id", "--batch-size", 7, "--out", "s.csv") == 130
    Path("kept.png").rename("id/00.png")
    assert run(*SCORE, "--images", "id", "--batch-size", 7, "--out", "s.csv", "--resume") == 0
    assert len(table("s.csv")) == 20


def test_eval_goes_on_with_the_sets_that_are_complete(place, interrupt):
    few = ("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--batch-size", 4, "--out", "r")
    sizes = interrupt(5 + 2)
    assert run(*few) == 130
    assert run(*few, "--resume") == 0
    assert sum(sizes) == 20 + 12 + 4 and not list(place.glob("r/*.part*"))


@pytest.mark.parametrize("command", ["score", "fit"])
def test_nothing_is_lost_when_the_result_cannot_be_written(place, interrupt, monkeypatch, command):
    def full(*args):
        raise OSError("no space left")

    arguments = (command, *MODEL_RUN, "--images" if command == "score" else "--id", "id")
    out = "x.csv" if command == "score" else "x.json"
    arguments = (*arguments, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_table", full)
        patch.setattr(GradNorm, "save", full)
        assert run(*arguments) == 2
    sizes = interrupt(1)
    assert run(*arguments, "--resume") == 0 and sizes == [] and Path(out).exists()


def test_resume_sees_other_features(place, monkeypatch, capsys):
    arguments = ("score", "--features", "F.npy", *FEATURES_RUN, "--out", "s.npy")
    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_table", lambda *_: 1 / 0)
        assert run(*arguments) == 1
    features = np.load("F.npy")
    features[1234, 5] += 1
    np.save("F.npy", features)
    assert run(*arguments, "--resume") == 2
    assert "kept by a run that differs in features" in capsys.readouterr().err


def test_two_processes_score_every_input_once_and_go_on_from_one(place, interrupt):
    Path("id/broken.png").write_text("no image")
    arguments = [*SCORE, "--images", "id", "--batch-size", "4", "--out", "two.csv"]
    interrupt(3)
    assert run(*arguments) == 130 and Path("two.part-0-of-1").exists()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "gradnorm_fast",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, *arguments, "--resume"], env=environment, capture_output=True, text=True, cwd=place, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert run(*SCORE, "--images", "id", "--batch-size", 4, "--out", "one.csv") == 0
    one, two = table("one.csv"), table("two.csv")
    assert [r["path"] for r in one] == [r["path"] for r in two] and len(one) == 20
    np.testing.assert_allclose([float(r["gradnorm"]) for r in one], [float(r["gradnorm"]) for r in two], rtol=1e-5)
    assert not list(place.glob("*.part*"))
