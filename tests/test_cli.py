"""The command line as a user meets it: help, and one line for every mistake."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradnorm_fast import HeadScores, _backends, fast_gradnorm, models

from command_line import MODEL_RUN, RUN, SCORE, run

WRONG = [
    (("--images", "nowhere"), "no file or folder nowhere"),
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
    (("--images", "id", "--model", "timm:resnet5000"), "timm has no model 'resnet5000'"),
    (("--images", "id", "--model", "resnet18", "--weights", "BEST"), "weights: resnet18 has IMAGENET1K_V1"),
    (("--images", "id", "--batch-size", "0"), "expected a whole number above 0"),
    (("--images", "id", "--device", "cuda:99"), "device: 'cuda:99' is not there"),
    (("--images", "id", "--device", "fpga9"), "device: expected cpu, cuda, cuda:N or another device here"),
    (("--images", "id", "--detector", "own.py"), "expected a detector saved"),
    (("--images", "id", "--reduction", "max"), "invalid choice"),
    (("--images", "own.py"), "none of 1 can be read: own.py: not an image"),
    (("--images", "id", "--std", "0", "0", "0"), "std: expected three numbers above 0"),
    (("--images", "id", "--model", "own:no_tensor"), "expected the preprocessing to return a tensor, got Image"),
    (("--images", "id", "--threshold", "nan"), "threshold: expected a finite number"),
    (("--images", "id", "--weight", "W.npy"), "weight: it cannot be combined with images (pretrained weights are"),
    (
        ("--images", "id", "--detector", "g.json", "--temperature", "2"),
        "temperature: it cannot be combined",
    ),
    (
        ("--images", "id", "--detector", "g.json", "--threshold", "2"),
        "threshold: it cannot be combined",
    ),
    (("--images", "id", "--detector", "g.json"), "g.json: No such file"),
    (("--images", "id", "--std", "nan", "1", "1"), "std: expected a finite number"),
    (("--images", "id", "--mean", "inf", "1", "1"), "mean: expected a finite number"),
    (("--images", "id", "--temperature", "nan"), "temperature: expected a finite number"),
    (("--images", "id", "--device", "meta"), "device: expected cpu, cuda, cuda:N or another device here"),
    (("--images", "id", "--device", "mps"), "device: expected cpu, cuda, cuda:N or another device here"),
    (("--images", "id", "--model", ":"), "expected module:function"),
    (("--images", "id", "--classes", "7"), "classes: 'own:small' decides that itself"),
    (("--images", "id", "--batch-size", 20 * "9"), "batch-size: expected a whole number, got"),
    (("--images", "id", "--score", "auto"), "score: auto is for fit alone"),
    (("--images", "id", "--resume", "--restart"), "resume: it cannot be combined with --restart"),
    ((), "expected --images with --model, or --features"),
    (("--features", "nothing.npy", "--weight", "W.npy"), "features: no file nothing.npy"),
    (("--features", "own.py", "--weight", "W.npy"), "features: cannot read own.py"),
    (("--features", "own.py"), "weight: expected --weight"),
    (("--features", "F.npy", "--weight", "W.npy", "--head", "fc"), "head: it cannot be combined with --features"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else ""
)
def test_every_mistake_gets_one_line(place, capsys, arguments, message):
    command = ("score", *RUN[:-2]) if "--features" in arguments else SCORE
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
        (("eval", *MODEL_RUN, "--id", "id", "--ood", "ood", "--out", "r"), "expected NAME=PATH"),
        (("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--ood", "a=ood", "--out", "r"), "'a' is taken"),
        (("fit", *MODEL_RUN, "--id", "id", "--tpr", "2", "--out", "g.json"), "tpr: expected a fraction"),
        (("fit", *MODEL_RUN, "--out", "g.json"), "--id"),
        (("nothing",), "invalid choice"),
        (("fit", *MODEL_RUN, "--id", "id", "--out", "empty"), "expected a file, empty is a folder"),
        (("eval", *MODEL_RUN, "--id", "id", "--ood", "a=ood", "--out", "own.py"), "own.py is a file"),
        (("eval", *MODEL_RUN, "--id", "id", "--ood", "id=ood", "--out", "r"), "'id' is taken"),
        (("eval", *MODEL_RUN, "--id", "id", "--ood", "a/b=ood", "--out", "r"), "got 'a/b'"),
    ]
    torch.save({"weight": torch.ones(2)}, "other.pt")
    wrong.append(((*SCORE, "--images", "id", "--checkpoint", "other.pt", "--out", "s.csv"), "is of another model"))
    for i, size in enumerate((9, 12)):
        Image.new("RGB", (size, size)).save(place / f"empty/{i}.png")
    wrong.append(((*SCORE, "--images", "empty", "--out", "s.csv"), "images: expected one size"))
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    Path("cut.npy").write_bytes(b"\x93NUMPY")
    weight = Path("W.npy").read_bytes()
    Path("negative.npy").write_bytes(weight.replace(b"(4, 6)", b"(-4,6)"))
    Path("endless.npy").write_bytes(weight.replace(b"(4, 6), }       ", b"(99999999999,6)}"))
    np.savez("archive.npz", weight)
    Path("archive.npz").rename("archive.npy")
    Path("nothing.csv").touch()
    wrong.append(
        (
            ("eval", "--id", "archive.npy", "--ood", "a=F.npy", "--weight", "W.npy", "--quiet", "--out", "r"),
            "an archive",
        )
    )
    wrong.append((("score", "--features", "negative.npy", "--weight", "W.npy", "--out", "s.csv"), "it is damaged"))
    for file in ("objects.npy", "cut.npy", "own.py", "endless.npy"):
        features = ("score", "--features", "F.npy", "--device", "cpu", "--out", "s.csv", "--weight", file)
        wrong.append((features, f"weight: cannot read {file} as a NumPy array: it is damaged, or no .npy file"))
    Path("nothing.txt").touch()
    Path("header.csv").write_text(",".join(("path", *HeadScores._fields)))
    wrong.append(((*SCORE, "--images", "nothing.txt", "--out", "s.csv"), "images: no path in nothing.txt"))
    for file, message in (("nothing.csv", "it is empty"), ("header.csv", "scores: no row in header.csv")):
        wrong.append((("eval", "--id", file, "--ood", f"a={file}", "--out", "r", "--quiet"), message))
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


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(models.device_of(name)) for name in (None, "cuda", "cuda:0", "cpu")] == ["cuda:1"] * 2 + [
        "cuda:0",
        "cpu",
    ]


def test_help_imports_neither_torch_nor_numpy():
    code = """
import sys
from gradnorm_fast.cli import main
for arguments in ([], ["gradnorm"], ["eval"], ["fit"], ["demo"], ["env"], ["bench"]):
    try:
        main([*arguments, "--help"])
    except SystemExit:
        pass
print(sorted({"torch", "numpy", "triton"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("module", ["torch", "argparse"])
def test_ctrl_c_while_it_starts_is_one_line(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    command = [sys.executable, "-c", "from gradnorm_fast.cli import main; raise SystemExit(main(['env']))"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "gradnorm-fast: interrupted\n")


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == "gradnorm_fast.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "gradnorm_fast.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("gradnorm_fast", run_name="__main__")
    assert stop.value.code == 130 and capsys.readouterr().err == "gradnorm-fast: interrupted\n"


def test_switches_that_are_none(monkeypatch, capsys):
    monkeypatch.setenv("GRADNORM_FAST_BATCH_INVARIANT", "yes")
    _backends.batch_invariant.cache_clear()  # as at the first call of a process
    with pytest.raises(ValueError, match="GRADNORM_FAST_BATCH_INVARIANT: expected 0 or 1, got 'yes'"):
        fast_gradnorm(torch.ones(2, 3), torch.ones(4, 3), backend="torch")
    for name, value, message in (
        ("GRADNORM_FAST_BATCH_INVARIANT", "true", "GRADNORM_FAST_BATCH_INVARIANT: expected 0 or 1, got 'true'"),
        ("GRADNORM_FAST_AUTOTUNING", "1", "GRADNORM_FAST_AUTOTUNING: unknown environment variable"),
    ):
        with monkeypatch.context() as patch:
            patch.delenv("GRADNORM_FAST_BATCH_INVARIANT")
            patch.setenv(name, value)
            assert run("env") == 2 and message in capsys.readouterr().err


def test_help_of_every_command_has_an_example(capsys):
    for command in ("score", "eval", "fit", "demo", "env", "bench"):
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code == 0 and f"gradnorm-fast {command}" in capsys.readouterr().out.split("example")[1]
