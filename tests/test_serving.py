"""detector.module(): a plain nn.Module that exports, compiles, and is shared by threads."""

import copy
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from gradnorm_fast import GradNorm, Prediction

from classifiers import Calls, images, loader, small
from conftest import DEVICE


def fitted(model=None, **options):
    return GradNorm(model or small(), **options).fit(loader(60, 2), 0.8, progress=False)


def assert_same(got, expected):
    assert isinstance(got, Prediction)
    assert torch.equal(got.labels, expected.labels) and torch.equal(got.is_ood, expected.is_ood)
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-5, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("score", ["gradnorm", "energy"])
def test_the_module_predicts_what_the_detector_does(score):
    detector = fitted(score=score, temperature=2.0, include_bias=True)
    module, x = detector.module(), images(40)
    x[3] = torch.nan
    expected = detector.predict(x)
    assert expected.is_ood.any() and not expected.is_ood.all()
    assert_same(module.train()(x), expected)
    assert not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters()) and all(p.requires_grad for p in small().parameters())
    convolution = nn.Sequential(*list(small().body)[:-1], nn.Conv2d(8, 4, 1), nn.Flatten()).to(DEVICE).eval()
    other = fitted(convolution)
    assert_same(other.module()(images()), other.predict(images()))


def test_the_model_and_the_module_do_not_disturb_one_another():
    detector = fitted()
    model, before = detector.model, copy.deepcopy(detector.model.state_dict())
    module = detector.module()
    assert module.backbone.body[0].weight.data_ptr() == model.body[0].weight.data_ptr()  # no second copy in memory
    module.to(torch.float64)(images().double())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.fc, nn.Linear) and model.fc.weight.requires_grad and model.fc.weight.dtype == torch.float32


def test_a_saved_gate_rebuilds_the_module(tmp_path):
    detector = fitted(score="msp")
    detector.save(tmp_path / "gate.json")
    loaded = GradNorm.load(tmp_path / "gate.json", small())
    assert_same(loaded.module()(images()), detector.predict(images()))
    assert loaded.module().double().threshold == detector.threshold


def test_export_with_any_batch_size(tmp_path):
    detector = fitted()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(detector.module(), (images(4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "gate.pt2")
    served = torch.export.load(tmp_path / "gate.pt2").module()
    for n in (1, 4, 7):
        assert_same(served(images(n)), detector.predict(images(n)))


def test_a_fresh_process_loads_what_was_exported(tmp_path):
    """It imports `gradnorm_fast.serving`, which registers the operators and the type; nothing else does."""
    detector, x = fitted(), images(4)
    torch.export.save(torch.export.export(detector.module(), (x,)), tmp_path / "gate.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = """
        import torch
        import gradnorm_fast.serving
        served = torch.export.load("gate.pt2").module()
        prediction = served(torch.load("x.pt"))
        assert type(prediction) is gradnorm_fast.Prediction
        torch.save(tuple(prediction), "prediction.pt")
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment, check=True)
    assert_same(Prediction(*torch.load(tmp_path / "prediction.pt")), detector.predict(x))


def test_compile_in_one_graph():
    detector = fitted()
    compiled = torch.compile(detector.module(), backend="aot_eager", fullgraph=True)
    for n in (2, 5):
        assert_same(compiled(images(n)), detector.predict(images(n)))


def test_threads_share_the_module():
    detector = fitted()
    module, batches = detector.module(), [images(4, seed) for seed in range(8)]
    expected, wrong = [module(x) for x in batches], []

    def work(i):
        for _ in range(20):
            if not all(map(torch.equal, module(batches[i]), expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_and_dtypes():
    detector = fitted()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_same(detector.module()(images()), detector.predict(images()))


def test_what_cannot_be_served():
    with pytest.raises(ValueError, match="no threshold yet"):
        GradNorm(small(), "fc").module()
    with pytest.raises(ValueError, match="head is not known yet"):
        GradNorm(small()).fit_scores(torch.rand(30)).module()
    model = Calls(lambda fc, x: fc(x)[:, :6]).to(DEVICE)  # does nothing to six logits, cuts the eight features
    model.fc = nn.Linear(8, 6).to(DEVICE)
    with pytest.raises(ValueError, match=r"expected features \(B, 8\) of it without its head, got \(6, 6\)"):
        fitted(model).module()(images())
    model = Calls(lambda fc, x: fc(x).clamp(-3, 3)).to(DEVICE)  # which these logits do not meet, but features do
    model.fc.weight.data *= 1e-3
    detector, bright = fitted(model), 100 * images()
    detector.score(bright)
    with pytest.raises(ValueError, match="it does more with the head's output than return it"):
        detector.module()(bright)
    model.fc = nn.Linear(8, 4).to(DEVICE)
    with pytest.raises(ValueError, match="head: 'fc' was replaced since the detector was fitted"):
        detector.module()


def test_a_model_that_asks_for_the_weight_of_its_head():
    model = Calls(lambda fc, x: fc(x.to(fc.weight.dtype)[:, : fc.in_features])).to(DEVICE)
    detector = fitted(model)
    assert_same(detector.module()(images()), detector.predict(images()))
