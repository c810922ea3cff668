"""The demonstration from end to end, and the command line that starts it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from gradnorm_fast import cli, demo

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run on the CPU, shared by the tests that look at its results."""
    path = tmp_path_factory.mktemp("demo") / "picture.png"
    return demo.run(output=path, device="cpu", seed=0)


def test_learns_the_digits(finished):
    assert 0.9 < finished["accuracy"] <= 1
    assert finished["device"] == "cpu"


def test_metrics_are_complete_and_averaged(finished):
    metrics = finished["metrics"]
    assert len(metrics) == 4
    for row in metrics.values():
        assert set(row) == set(demo.SCORES)
        for result in row.values():
            assert all(0 <= result[key] <= 1 for key in ("auroc", "fpr95_id_positive", "fpr95_ood_positive"))
            assert result["n_id"] == finished["batch_size"]
    for score, average in finished["mean"].items():
        for key in ("auroc", "fpr95_id_positive"):
            assert average[key] == pytest.approx(np.mean([row[score][key] for row in metrics.values()]))


def test_held_out_digits_score_lower(finished):
    """A network that knows the digits 0-6 is less sure of 7-9, whichever score is asked."""
    assert all(result["auroc"] > 0.7 for result in finished["metrics"]["held-out digits 7-9"].values())


def test_fast_gradnorm_agrees_with_autograd(finished):
    assert 0 <= finished["largest_relative_difference"] < 1e-5


def test_timing_is_consistent(finished):  # how large the speed-up is depends on what else the machine does
    assert finished["fast_seconds"] > 0
    assert finished["speedup"] == pytest.approx(finished["autograd_seconds"] / finished["fast_seconds"])


def test_picture_is_not_trivial(finished):
    from matplotlib.image import imread

    picture = imread(finished["output"])
    height, width, _ = picture.shape
    assert height > 500
    assert width > 1000
    colours = np.unique((picture[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
    assert len(colours) > 100
    for half in (picture[:, : width // 2], picture[:, width // 2 :]):  # histograms left, curves right
        assert (half[..., :3].min(axis=2) < 0.9).mean() > 0.02


def test_same_seed_same_network_and_callers_random_state_untouched():
    data = demo.load_data(seed=3)
    state = torch.get_rng_state()
    first, second = (
        demo.train(data.train_images, data.train_labels, torch.device("cpu"), seed=3, epochs=1) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, second.head.weight)


def test_data_is_split_without_overlap():
    data, again = demo.load_data(seed=1), demo.load_data(seed=1)
    rows = [{image.numpy().tobytes() for image in images} for images in (data.train_images, data.test_images)]
    assert not rows[0] & rows[1]
    assert set(data.train_labels.tolist()) == set(data.test_labels.tolist()) == set(range(demo.ID_DIGITS))
    for name, images in data.ood_images.items():
        assert images.shape[1:] == (1, 8, 8)
        assert 0 <= images.min() <= images.max() <= 1
        assert not rows[0] & {image.numpy().tobytes() for image in images}, f"{name} was trained on"
        assert torch.equal(images, again.ood_images[name])


# What is wrong must be found before the training.


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the training was started")

    monkeypatch.setattr(demo, "train", fail)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "missing/folder/x.png"}, "output: cannot write .*x.png: No such file"),
        ({"output": "x.pdf"}, "output: expected a name ending in .png, got 'x.pdf'"),
        ({"output": "folder.png"}, "output: cannot write .*folder.png: Is a directory"),
        ({"device": "gpu"}, "device: expected cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "meta"}, "device: expected cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not there"),
        ({"seed": -1}, "seed: expected 0 to"),
    ],
    ids=str,
)
def test_refused_before_training(arguments, message, no_training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=message):
        demo.run(**arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.png"]


def test_output_check_leaves_files_as_they_are(tmp_path, monkeypatch, no_training):
    old = tmp_path / "old.png"
    old.write_bytes(b"picture")
    for path in (old, tmp_path / "new.png"):
        with pytest.raises(AssertionError, match="the training was started"):
            demo.run(output=path, device="cpu")
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.png"]
    assert old.read_bytes() == b"picture"


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_missing_extra_says_what_to_install(module, monkeypatch, tmp_path, no_training):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {module}: pip install "gradnorm_fast\[demo\]"'):
        demo.run(output=tmp_path / "x.png")


# The command line.


def refused(capsys, *arguments):
    """Run a command that must be refused and return its message."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gradnorm-fast: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["no-such-command"], "'no-such-command'"),
        (["demo", "--no-such-option"], "--no-such-option"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--seed", "-1"], "seed: expected 0 to"),
        (["demo", "--device", "gpu"], "'gpu'"),
        (["demo", "--output", "missing/folder/x.png"], "output: cannot write"),
    ],
    ids=" ".join,
)
def test_user_errors_are_one_line(arguments, message, capsys, no_training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)


@needs_no_gpu
def test_cuda_where_there_is_none(capsys, no_training):
    assert "device: 'cuda' is not there, torch sees no CUDA GPU" in refused(capsys, "demo", "--device", "cuda")


@pytest.mark.parametrize("arguments", [["--debug", "demo"], ["demo", "--debug"]], ids=["before", "after"])
def test_debug_shows_the_traceback(arguments):
    with pytest.raises(ValueError, match="'gpu'"):
        cli.main([*arguments, "--device", "gpu"])


def test_arguments_reach_the_demo(monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "run", lambda **arguments: calls.append(arguments))
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--output", "a.png", "--device", "cpu", "--seed", "7"]) == 0
    assert calls == [
        {"output": "gradnorm_demo.png", "device": None, "seed": 0},
        {"output": "a.png", "device": "cpu", "seed": 7},
    ]


def test_interrupt_exits_130(monkeypatch, capsys):
    def interrupt(**arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "gradnorm-fast: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]], ids=" ".join)
def test_help_has_an_example(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "example: gradnorm-fast demo" in capsys.readouterr().out


def test_as_a_module(tmp_path):
    def start(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "gradnorm_fast", *arguments], cwd=tmp_path, capture_output=True, text=True
        )

    version = start("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("gradnorm-fast ")
    wrong = start("demo", "--output", "missing/x.png")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("gradnorm-fast: error: output: cannot write ")
    assert wrong.stderr.count("\n") == 1
