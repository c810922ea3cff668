"""Both demonstrations from end to end, and the command line that starts them."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from gradnorm_fast import cli, demo, demo_imagenet
from gradnorm_fast.evaluation import METHODS
from gradnorm_fast.reference import autograd_gradnorm


def assert_drawn(path, width, height):
    """A picture at least so large, with marks in its left and its right half."""
    from matplotlib.image import imread

    picture = imread(path)[..., :3]
    assert picture.shape[0] > height and picture.shape[1] > width
    assert len(np.unique((picture * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 100
    for half in np.array_split(picture, 2, axis=1):
        assert (half.min(axis=2) < 0.9).mean() > 0.02


# The handwritten digits.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run on the CPU, shared by the tests that look at its results."""
    path = tmp_path_factory.mktemp("demo") / "picture.png"
    return demo.run(output=path, device="cpu", seed=0)


def test_learns_the_digits_and_knows_what_it_has_not_learnt(finished):
    assert 0.97 < finished["accuracy"] <= 1
    assert finished["device"] == "cpu"
    results = finished["results"]
    assert list(results) == ["digits 7-9", "inverted digits", "photo patches", "noise", "average"]
    assert all(set(of_set) == set(METHODS) for of_set in results.values())
    assert all(result["auroc"] > 0.9 for result in results["digits 7-9"].values())


def test_fast_gradnorm_agrees_with_autograd(finished):
    assert 0 <= finished["largest_relative_difference"] < 1e-5
    # How large the speed-up is depends on what else the machine does.
    assert finished["speedup"] == pytest.approx(finished["autograd_seconds"] / finished["fast_seconds"])


def test_picture(finished):
    assert_drawn(finished["output"], 1000, 500)


@pytest.mark.parametrize("ranks", [(0.9, 0.8), (0.8, 0.9)], ids=["first", "second"])
def test_verdict_follows_the_figures(ranks):
    ours, theirs = ranks
    average = {m: {"auroc": theirs, "fpr95_id_positive": 1 - theirs} for m in METHODS}
    average["GradNorm"] = {"auroc": ours, "fpr95_id_positive": 1 - ours}
    verdict = demo._verdict(average)
    assert ("GradNorm is the best" in verdict) == (ours > theirs)
    assert ("number 5 of 5; MSP is the best" in verdict) == (ours < theirs)


def test_same_seed_same_network_and_callers_random_state_untouched():
    data = demo.load_data(seed=3)
    state = torch.get_rng_state()
    first, second = (
        demo.train(data.train_images[:96], data.train_labels[:96], torch.device("cpu"), seed=3, epochs=1)
        for _ in range(2)
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
    patches = data.ood_images["photo patches"].flatten(1)
    assert (patches.amax(1) - patches.amin(1)).min() >= demo.CONTRAST - 1e-6


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


def test_output_check_leaves_files_as_they_are(tmp_path, no_training):
    old = tmp_path / "old.png"
    old.write_bytes(b"picture")
    for path in (old, tmp_path / "new.png"):
        with pytest.raises(AssertionError, match="the training was started"):
            demo.run(output=path, device="cpu")
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.png"]
    assert old.read_bytes() == b"picture"


@pytest.mark.parametrize(
    ("run", "module", "extra"),
    [(demo.run, "sklearn", "demo"), (demo_imagenet.run, "efficientnet_lite_pytorch", "imagenet")],
    ids=["digits", "imagenet"],
)
def test_missing_extra_says_what_to_install(run, module, extra, monkeypatch, tmp_path, no_training):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {module}: pip install "gradnorm_fast\[{extra}\]"'):
        run(output=tmp_path / "x.png")


# The photographs.


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """One run over the photographs and an image of the user's."""
    from PIL import Image

    orange = Image.new("RGB", (40, 30), "orange")
    return demo_imagenet.run(tmp_path_factory.mktemp("demo") / "picture.png", {"orange": orange}, "cpu")


def test_knows_what_is_on_the_photographs(imagenet):
    classes = {name: row["prediction"] for name, row in imagenet["scores"].items()}
    assert {name: classes[name] for name in ("china", "coffee", "rocket", "camera")} == {
        "china": "palace",
        "coffee": "espresso",
        "rocket": "missile",
        "camera": "tripod",
    }
    assert classes["chelsea"] in ("Egyptian cat", "tabby", "tiger cat")


def test_photographs_are_sorted_drawn_and_the_users_among_them(imagenet):
    scores = [row["gradnorm"] for row in imagenet["scores"].values()]
    assert scores == sorted(scores, reverse=True)
    assert set(imagenet["scores"]) == {"orange", *demo_imagenet.photographs()}
    assert_drawn(imagenet["output"], 1000, 500)


def test_scores_of_a_real_imagenet_head_match_float64_autograd(imagenet):
    network, transform, classes = demo_imagenet.load_network()
    assert len(classes) == 1000 and network._fc.weight.shape == (1000, 1280)
    pictures = demo_imagenet.photographs()
    with torch.no_grad():
        images = torch.stack([transform(image) for image in pictures.values()])
        features = network._avg_pooling(network.extract_features(images)).flatten(1)
    expected = autograd_gradnorm(features.double(), network._fc.weight.double(), network._fc.bias.double())
    got = torch.tensor([imagenet["scores"][name]["gradnorm"] for name in pictures], dtype=torch.float64)
    assert ((got - expected) / expected).abs().max() <= 2e-5


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
        (["demo", "--images", "photos"], "images: they go with --imagenet"),
        (["demo", "--imagenet", "--seed", "1"], "seed: it does not go with --imagenet"),
        (["demo", "--output", "missing/folder/x.png"], "output: cannot write"),
    ],
    ids=" ".join,
)
def test_user_errors_are_one_line(arguments, message, capsys, no_training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("arguments", [["--debug", "demo"], ["demo", "--debug"]], ids=["before", "after"])
def test_debug_shows_the_traceback(arguments):
    with pytest.raises(ValueError, match="'gpu'"):
        cli.main([*arguments, "--device", "gpu"])


def test_arguments_reach_the_demos(monkeypatch, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (40, 30), "orange").save(tmp_path / "orange.png")
    (tmp_path / "broken.png").write_text("no image")
    calls = []
    monkeypatch.setattr(demo, "run", lambda *arguments: calls.append(("digits", *arguments)))
    monkeypatch.setattr(demo_imagenet, "run", lambda output, images, device: calls.append((output, *images)))
    assert cli.main(["demo", "--device", "cpu"]) == 0
    assert cli.main(["demo", "--output", "a.png", "--device", "cpu", "--seed", "7"]) == 0
    assert cli.main(["demo", "--imagenet", "--images", str(tmp_path)]) == 0
    assert calls == [
        ("digits", "gradnorm_demo.png", torch.device("cpu"), 0),
        ("digits", "a.png", torch.device("cpu"), 7),
        ("gradnorm_imagenet.png", str(tmp_path / "orange.png")),
    ]
    assert capsys.readouterr().err == f"skipped {tmp_path / 'broken.png'}: not an image\n"


def test_interrupt_exits_130(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "gradnorm-fast: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]], ids=" ".join)
def test_help_has_an_example(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "gradnorm-fast demo --output gradnorm_demo.png" in capsys.readouterr().out


def test_as_a_module(tmp_path):
    def start(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "gradnorm_fast", *arguments], cwd=tmp_path, capture_output=True, text=True
        )

    version = start("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("gradnorm-fast ")
    wrong = start("no-such-command")
    assert wrong.returncode == 2
    assert "gradnorm-fast: error: " in wrong.stderr
