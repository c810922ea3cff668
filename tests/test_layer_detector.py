"""The detector and the command line by gradients of layers."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradnorm_fast import GradNorm, layer_gradnorms

from classifiers import images, loader, small
from command_line import FEATURES_RUN, MODEL_RUN, RUN, SCORE, run, table


@pytest.mark.parametrize(
    "layers", ["all", "head", ["body.0", "fc"], lambda name, p: p.dim() == 4], ids=["all", "head", "names", "predicate"]
)
@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "reduction": "sum"}], ids=["plain", "T and sum"])
def test_scores(layers, options):
    model, x = small(), images()
    detector = GradNorm(model.train(), layers=layers, **options)
    found = detector.head_scores(x)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    model.eval()
    torch.testing.assert_close(found.gradnorm, layer_gradnorms(model, x, layers=layers, **options))
    assert torch.equal(detector.score(x), found.gradnorm)
    others = GradNorm(model, **options).head_scores(x)
    for name in ("output_norm", "prediction", "max_logit", "msp", "energy"):
        torch.testing.assert_close(getattr(found, name), getattr(others, name), msg=name)
    torch.testing.assert_close(found.feature_norm * found.output_norm, found.gradnorm)


def test_the_head_by_its_weight_is_the_closed_form():
    model, x = small(), images()
    by_layers = GradNorm(model, layers=lambda name, p: name == "fc.weight").head_scores(x)
    for name, expected in GradNorm(model).head_scores(x)._asdict().items():
        torch.testing.assert_close(getattr(by_layers, name), expected, msg=name)


def test_a_row_that_is_not_finite_poisons_itself_alone():
    model, x = small(), images()
    clean = GradNorm(model, layers="all").head_scores(x)
    x[2] = torch.nan
    found = GradNorm(model, layers="all").head_scores(x)
    for name, values in found._asdict().items():
        good = torch.arange(len(x)) != 2
        torch.testing.assert_close(values[good], getattr(clean, name)[good], msg=name)
        assert values[2].isnan() if name != "prediction" else values[2] == 0
    assert GradNorm(model, layers="head").head_scores(x[:0]).gradnorm.shape == (0,)


def test_a_network_without_a_linear_head(tmp_path):
    squeezenet = pytest.importorskip("torchvision").models.squeezenet1_1
    torch.manual_seed(0)
    model, x = squeezenet(num_classes=7), images(8, size=40)
    detector = GradNorm(model, layers="all").fit([x[:6]], tpr=0.5, progress=False)
    labels, scores, is_ood = detector.predict(x)
    model.eval()
    assert torch.equal(labels, model(x).argmax(1)) and torch.equal(is_ood, scores < detector.threshold)
    torch.testing.assert_close(scores, layer_gradnorms(model, x))
    detector.save(tmp_path / "gate.json")
    loaded = GradNorm.load(tmp_path / "gate.json", model)
    assert repr(loaded) == repr(detector) and "layers 'all'" in repr(loaded)
    assert torch.equal(loaded.predict(x).is_ood, is_ood)


def test_save_and_load(tmp_path):
    model, path = small(), tmp_path / "gate.json"
    detector = GradNorm(model, layers=(name for name in ("body.0", "fc")), temperature=2.0)
    detector.fit(loader(20, 1), progress=False).save(path)
    loaded = GradNorm.load(path, model)
    assert loaded.layers == ["body.0", "fc"] and loaded.threshold == detector.threshold
    assert torch.equal(loaded.score(images()), detector.score(images()))
    state = json.loads(path.read_text())
    for wrong in ("most", [], ["fc", 3], 1, {}):
        path.write_text(json.dumps(state | {"layers": wrong}))
        with pytest.raises(ValueError, match='"layers": expected null, "all", "head" or names of modules'):
            GradNorm.load(path, model)
    path.write_text(json.dumps(state | {"layers": ["fd"]}))
    with pytest.raises(ValueError, match=r"gate\.json: layers: the model has no module 'fd'"):
        GradNorm.load(path, model)
    path.write_text(json.dumps(state | {"head": "fc"}))
    with pytest.raises(ValueError, match='"head": expected null'):
        GradNorm.load(path, model)
    predicate = GradNorm(model, layers=lambda name, p: "fc" in name)
    predicate.score(images())
    with pytest.raises(ValueError, match="save: a file cannot hold the predicate that layers is; give the names"):
        predicate.save(path)


def test_what_does_not_go_with_layers():
    model = small()
    for options, message in (
        ({"head": "fc"}, "head: expected None where layers are given, got 'fc'"),
        ({"include_bias": True}, "include_bias: expected False where layers are given"),
        ({"layers": "most"}, 'layers: expected "all", "head"'),
        ({"layers": ["fd"]}, "layers: the model has no module 'fd'"),
    ):
        with pytest.raises(ValueError, match=message):
            GradNorm(model, **{"layers": "all"} | options)
    with pytest.raises(TypeError, match="layers: expected"):
        GradNorm(model, layers=3)
    with pytest.raises(ValueError, match="module: gradients of layers need a backward pass"):
        GradNorm(model, layers="all").fit(loader(20, 1), progress=False).module()


def test_threads_share_a_model():
    model = small()
    detector, x = GradNorm(model, layers="all"), [images(4, seed) for seed in range(4)]
    expected, wrong = [detector.score(part) for part in x], []

    def work(i):
        for _ in range(10):
            try:
                if not torch.allclose(detector.score(x[i]), expected[i], rtol=1e-5):
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_commands(place, capsys):
    by_all, gate = ("--layers", "all"), ("--detector", "gate.json")
    assert run("fit", *MODEL_RUN, *by_all, "--id", "id", "--tpr", "0.9", "--out", "gate.json") == 0
    assert run(*SCORE, "--images", "id", "ood", *gate, "--out", "s.csv") == 0
    calibration = json.loads(Path("gate.json").read_text())["calibration"]
    assert sorted(float(r["gradnorm"]) for r in table("s.csv")[:20]) == pytest.approx(calibration, rel=1e-5)
    assert run(*SCORE, "--images", "id", "--layers", "0", "4", "--out", "two.csv") == 0
    assert run(*SCORE, "--images", "id", "--out", "head.csv") == 0
    alone, two, every = (np.array([float(r["gradnorm"]) for r in table(f"{n}.csv")[:20]]) for n in ("head", "two", "s"))
    assert (alone < two).all() and np.allclose(two, every, rtol=1e-5)  # only these two have parameters
    assert run("eval", *MODEL_RUN, *by_all, "--id", "id", "--ood", "a=ood", "--out", "r", "--report", "r.html") == 0
    assert json.loads(Path("r/results.json").read_text())["layers"] == "all"
    capsys.readouterr()
    for arguments, message in (
        ((*SCORE, "--images", "id", *by_all, "--head", "4", "--out", "t.csv"), "head: expected None where layers"),
        ((*SCORE, "--images", "id", *by_all, "--compile", "--out", "t.csv"), "compile: gradients of layers"),
        ((*SCORE, "--images", "id", *by_all, *gate, "--out", "t.csv"), "layers: it does not go with --detector"),
        (
            (*SCORE, "--images", "id", *by_all, "--save-features", "f.npy", "--out", "t.csv"),
            "layers: it does not go with --save-features",
        ),
        (
            ("score", "--features", "F.npy", *FEATURES_RUN, *by_all, "--out", "t.csv"),
            "layers: it does not go with --features",
        ),
        (("score", "--features", "F.npy", *FEATURES_RUN, *gate, "--out", "t.csv"), "fitted to gradients of layers"),
        ((*SCORE, "--images", "id", "--layers", "5", "--out", "t.csv"), "layers: the model has no module '5'"),
    ):
        assert run(*arguments) == 2, arguments
        err = capsys.readouterr().err
        assert message in err and not Path("t.csv").exists(), err
    assert run("fit", "--model", "own:small", *by_all, "--id", "s.csv", "--out", "g.json") == 0
    assert json.loads(Path("g.json").read_text())["layers"] == "all"
    saved = ("score", "--model", "own:other", *RUN, "--images", "id", *gate)
    assert run(*saved, "--out", "t.csv") == 2 and "fitted to something else" in capsys.readouterr().err
