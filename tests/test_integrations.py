"""OpenOOD's and pytorch-ood's interfaces: their scores, their conventions, and nothing else changed."""

import gc
import importlib.util
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from gradnorm_fast.integrations import openood
from gradnorm_fast.integrations.openood import GradNormPostprocessor

from conftest import DEVICE

CLASSES, DEPTH = 7, 11


class Net(nn.Module):
    """A classifier with the interface of OpenOOD's networks, which counts how often its head is copied."""

    def __init__(self, bias=True, numpy=True, dtype=torch.float64, batchnorm=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(5, 9), nn.BatchNorm1d(9) if batchnorm else nn.Identity(), nn.ReLU(), nn.Linear(9, DEPTH)
        )
        self.fc = nn.Linear(DEPTH, CLASSES, bias=bias)
        self.numpy, self.copies = numpy, 0
        self.to(DEVICE, dtype).eval()

    def forward(self, x, return_feature=False):
        feature = self.body(x)
        logits = self.fc(feature)
        return (logits, feature) if return_feature else logits

    def get_fc(self):
        self.copies += 1
        head = self.fc.weight.detach(), None if self.fc.bias is None else self.fc.bias.detach()
        return tuple(t.cpu().numpy().copy() if self.numpy and t is not None else t for t in head)  # as from a GPU


def inputs(n=6, dtype=torch.float64, seed=1):
    return 3 * torch.randn(n, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loader(sizes, dtype=torch.float64):
    for i, n in enumerate(sizes):
        yield {"data": inputs(n, dtype, seed=i).cpu(), "label": torch.arange(n) + 100 * i}


def openood_loop(net, x):
    """What OpenOOD's loop computes: the weight's gradient of the cross entropy to all ones, one sample at a time."""
    scores = []
    for sample in x:
        net.zero_grad()
        (-net(sample[None]).log_softmax(dim=1)).sum().backward()
        scores.append(net.fc.weight.grad.abs().sum().item())
    net.zero_grad()
    return np.array(scores)


# OpenOOD


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "tensor"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 6])
def test_openood_scores_and_predictions(batch, bias, numpy):
    net, x = Net(bias, numpy), inputs(batch)
    pred, conf = GradNormPostprocessor(None).postprocess(net, x)
    assert conf.shape == pred.shape == (batch,) and pred.dtype == torch.int64 and conf.dtype == torch.float64
    np.testing.assert_allclose(conf.cpu(), openood_loop(net, x), rtol=1e-9)
    assert torch.equal(pred, net(x).argmax(1))
    assert not conf.requires_grad and pred.device == conf.device == x.device


def test_openood_float32():
    net, x = Net(dtype=torch.float32), inputs(40, torch.float32)
    _, conf = GradNormPostprocessor(None).postprocess(net, x)
    assert conf.dtype == torch.float32
    np.testing.assert_allclose(conf.cpu(), openood_loop(net, x), rtol=1e-5)


def test_openood_features_of_another_precision_than_the_head():
    net, x = Net(dtype=torch.float32), inputs(4, torch.float32)
    expected = openood_loop(net, x)
    net.register_forward_hook(lambda module, args, output: tuple(t.half() for t in output))
    _, conf = GradNormPostprocessor(None).postprocess(net, x)
    assert conf.dtype == torch.float32
    np.testing.assert_allclose(conf.cpu(), expected, rtol=1e-2)


def test_openood_inference():
    net = Net()
    pred, conf, label = GradNormPostprocessor(None).inference(net, loader([4, 1, 3]), False)
    x = torch.cat([batch["data"] for batch in loader([4, 1, 3])]).to(DEVICE)
    assert all(isinstance(column, np.ndarray) and column.shape == (8,) for column in (pred, conf, label))
    assert pred.dtype == label.dtype == int
    np.testing.assert_array_equal(label, [0, 1, 2, 3, 100, 200, 201, 202])
    np.testing.assert_array_equal(pred, net(x).argmax(1).cpu())
    np.testing.assert_allclose(conf, openood_loop(net, x), rtol=1e-9)
    with pytest.raises(ValueError, match="data_loader: expected at least one batch"):
        GradNormPostprocessor(None).inference(net, [], False)


@pytest.mark.parametrize("absent", [False, True])
def test_openood_bar_where_tqdm_is(monkeypatch, capsys, absent):
    if absent:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    else:
        pytest.importorskip("tqdm")
    _, conf, _ = GradNormPostprocessor(None).inference(Net(), loader([2, 2]))
    assert conf.shape == (4,)
    assert ("2it" in capsys.readouterr().err) != absent


def test_openood_head_is_copied_once_and_never_stale():
    net, x, postprocessor = Net(), inputs(), GradNormPostprocessor(None)

    def check():
        np.testing.assert_allclose(postprocessor.postprocess(net, x)[1].cpu(), openood_loop(net, x), rtol=1e-9)

    for _ in range(3):
        check()
    assert net.copies == 1
    with torch.no_grad():
        net.fc.weight.mul_(-2)
    check()
    net.load_state_dict({name: t + 0.1 for name, t in net.state_dict().items()})
    check()
    net.fc = nn.Linear(DEPTH, CLASSES).to(net.fc.weight)
    check()
    net.fc.weight.data = net.fc.weight.data.flip(0)
    check()
    assert net.copies == 5
    net.fc.weight.data.mul_(3)  # leaves no trace, so only inference starts anew
    batch = {"data": x, "label": torch.zeros(len(x))}
    np.testing.assert_allclose(
        postprocessor.inference(net, [batch, batch], False)[1][: len(x)], openood_loop(net, x), rtol=1e-9
    )
    assert net.copies == 6


def test_openood_nets_have_a_head_each():
    first, second, x, postprocessor = Net(), Net(bias=False), inputs(), GradNormPostprocessor(None)
    with torch.no_grad():
        second.fc.weight.mul_(2)
    for net in (first, second, first, second):
        np.testing.assert_allclose(postprocessor.postprocess(net, x)[1].cpu(), openood_loop(net, x), rtol=1e-9)
    assert first.copies == second.copies == 1


def test_openood_head_does_not_outlive_its_net():
    net = Net()
    GradNormPostprocessor(None).postprocess(net, inputs())
    assert net in openood._heads
    before = len(openood._heads)
    del net
    gc.collect()
    assert len(openood._heads) < before


def test_openood_net_whose_get_fc_needs_a_bias():
    class Theirs(Net):
        def get_fc(self):
            return self.fc.weight.detach().cpu().numpy(), self.fc.bias.detach().cpu().numpy()

    class WithLayer(Theirs):
        def get_fc_layer(self):
            return self.fc

    net, x = WithLayer(bias=False), inputs()
    np.testing.assert_allclose(
        GradNormPostprocessor(None).postprocess(net, x)[1].cpu(), openood_loop(net, x), rtol=1e-9
    )
    with pytest.raises(AttributeError, match="NoneType"):
        GradNormPostprocessor(None).postprocess(Theirs(bias=False), x)


def test_openood_leaves_the_net_as_it_was():
    net = Net().train()
    GradNormPostprocessor(None).postprocess(net, inputs())
    assert net.training and all(p.grad is None for p in net.parameters())


def test_openood_is_what_its_evaluator_expects():
    config = types.SimpleNamespace(postprocessor=types.SimpleNamespace(APS_mode=False, postprocessor_args=None))
    postprocessor = GradNormPostprocessor(config)
    assert postprocessor.config is config
    assert postprocessor.APS_mode is False and postprocessor.hyperparam_search_done is False
    assert postprocessor.setup(Net(), {}, {}) is None
    assert not hasattr(postprocessor, "setup_flag")  # its script would save a postprocessor that has one
    postprocessor.postprocess(Net(), inputs())
    assert isinstance(pickle.loads(pickle.dumps(postprocessor)), GradNormPostprocessor)


def test_openood_base_class_where_it_is_installed(monkeypatch):
    package, postprocessors = types.ModuleType("openood"), types.ModuleType("openood.postprocessors")
    postprocessors.BasePostprocessor = type("BasePostprocessor", (), {})
    monkeypatch.setitem(sys.modules, "openood", package)
    monkeypatch.setitem(sys.modules, "openood.postprocessors", postprocessors)
    spec = importlib.util.find_spec("gradnorm_fast.integrations.openood")
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
    assert issubclass(ours.GradNormPostprocessor, postprocessors.BasePostprocessor)
    net, x = Net(), inputs()
    _, conf = ours.GradNormPostprocessor(None).postprocess(net, x)
    np.testing.assert_allclose(conf.cpu(), openood_loop(net, x), rtol=1e-9)


def test_openood_refuses_what_does_not_fit():
    class NoHead(nn.Module):
        def forward(self, x, return_feature=False):
            return x, x

    postprocessor, x = GradNormPostprocessor(None), inputs()
    with pytest.raises(TypeError, match=r"net: expected OpenOOD's get_fc\(\) on it, NoHead has none"):
        postprocessor.postprocess(NoHead(), x)
    net = Net()
    handle = net.register_forward_hook(lambda module, args, output: output[0])
    with pytest.raises(TypeError, match=r"net: expected \(logits, features\) .* got Tensor"):
        postprocessor.postprocess(net, x)
    handle.remove()
    net.register_forward_hook(lambda module, args, output: (output[0], [output[1]]))
    with pytest.raises(TypeError, match=r"net: expected \(logits, features\) .* got \['Tensor', 'list'\]"):
        postprocessor.postprocess(net, x)
    handle = (wrong := Net()).register_forward_hook(lambda module, args, output: (output[0], output[1][:, 1:]))
    with pytest.raises(ValueError, match="features: expected shape"):
        postprocessor.postprocess(wrong, x)


# pytorch-ood


@pytest.fixture
def ours():
    pytest.importorskip("pytorch_ood")
    return importlib.import_module("gradnorm_fast.integrations.pytorch_ood").GradNorm


def theirs(model, x, *names, **options):
    from pytorch_ood.detector import GradNorm

    return GradNorm(model, param_filter=lambda name: name in names, **options).predict(x)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 20.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 6, 70])
def test_pytorch_ood_scores(ours, batch, bias, temperature):
    model, x = Net(bias), inputs(batch)
    scores = ours(model, temperature=temperature).predict(x)
    assert scores.shape == (batch,) and scores.dtype == torch.float64 and scores.device == x.device
    assert (scores < 0).all() and not scores.requires_grad
    names = ("fc.weight", "fc.bias") if bias else ("fc.weight",)
    torch.testing.assert_close(scores, theirs(model, x, *names, temperature=temperature), rtol=1e-9, atol=0)
    weight_only = ours(model, temperature=temperature, include_bias=False).predict(x)
    torch.testing.assert_close(weight_only, theirs(model, x, "fc.weight", temperature=temperature), rtol=1e-9, atol=0)
    assert torch.equal(scores, weight_only) != bias


def test_pytorch_ood_float32(ours):
    model, x = Net(dtype=torch.float32), inputs(40, torch.float32)
    scores = ours(model).predict(x)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, theirs(model, x, "fc.weight", "fc.bias"), rtol=1e-5, atol=0)


def test_pytorch_ood_convolution_head(ours):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, CLASSES, 1), nn.Flatten()
    )
    model, x = model.to(DEVICE).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(ours(model).predict(x), theirs(model, x, "3.weight", "3.bias"), rtol=1e-9, atol=0)


def test_pytorch_ood_head_found_named_or_given(ours):
    model, x = Net(), inputs()
    expected = theirs(model, x, "fc.weight", "fc.bias")
    for head in (None, "fc", model.fc):
        detector = ours(model, head)
        torch.testing.assert_close(detector.predict(x), expected, rtol=1e-9, atol=0)
        assert detector.head is model.fc
        torch.testing.assert_close(detector.predict_features(model.body(x)), expected, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"head: .* None"):
        ours(model).predict_features(model.body(x))
    torch.testing.assert_close(ours(model, "fc").predict_features(model.body(x)), expected, rtol=1e-9, atol=0)


def test_pytorch_ood_sees_changed_weights(ours):
    model, x = Net(), inputs()
    detector = ours(model)
    before = detector.predict(x)
    with torch.no_grad():
        model.fc.weight.mul_(-2)
    assert not torch.equal(detector.predict(x), before)
    torch.testing.assert_close(detector.predict(x), theirs(model, x, "fc.weight", "fc.bias"), rtol=1e-9, atol=0)


def test_pytorch_ood_is_a_detector(ours):
    from pytorch_ood.api import Detector
    from pytorch_ood.metrics import OODMetrics

    model, x = Net(), inputs()
    detector = ours(model)
    assert isinstance(detector, Detector) and detector.requires_fit is False
    assert detector.fit(None) is detector and detector.to(DEVICE) is detector
    assert torch.equal(detector(x), detector.predict(x))
    assert detector.device == x.device and detector.predict(x.cpu()).device == x.device
    # Logits near zero are as uncertain as can be: in pytorch-ood those are the outliers, with the higher scores.
    near_uniform, confident = 1e-3 * x, 10 * x
    nn.init.zeros_(model.fc.bias)
    metrics = OODMetrics()
    metrics.update(detector(torch.cat([near_uniform, confident])), torch.tensor([-1] * 6 + [0] * 6).to(DEVICE))
    assert metrics.compute()["AUROC"] == 1.0


def test_pytorch_ood_empty_batch_says_nothing_about_the_head(ours):
    model, x = Net(), inputs()
    detector = ours(model)
    assert detector.predict(x[:0]).shape == (0,) and detector.head is None
    torch.testing.assert_close(detector.predict(x), theirs(model, x, "fc.weight", "fc.bias"), rtol=1e-9, atol=0)


def test_pytorch_ood_leaves_the_model_as_it_was(ours):
    model, x = Net(batchnorm=True), inputs()
    expected = theirs(model, x, "fc.weight", "fc.bias")
    model.train()
    model.body[3].eval()
    model.fc.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.testing.assert_close(ours(model).predict(x), expected, rtol=1e-9, atol=0)
    assert model.training and model.body[1].training and not model.body[3].training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model.fc.weight.requires_grad
    assert hooks(model) == 0

    def boom(module, args):
        raise RuntimeError("boom")

    model.fc.register_forward_pre_hook(boom)
    for detector in (ours(model), ours(model, "fc")):
        with pytest.raises(RuntimeError, match="boom"):
            detector.predict(x)
        assert hooks(model) == 1 and model.training  # only boom itself


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_pytorch_ood_refuses_what_does_not_fit(ours):
    from pytorch_ood.api import ModelNotSetException

    model, x = Net(), inputs()
    with pytest.raises(ModelNotSetException, match="model: expected"):
        ours(None)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        ours(lambda x: x)
    with pytest.raises(TypeError, match=r"head: .* got function"):
        ours(model, lambda name: True)  # pytorch-ood's param_filter in its place
    with pytest.raises(ValueError, match=r"head: .*'classifier'"):
        ours(model, "classifier")
    with pytest.raises(ValueError, match="head: "):
        ours(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"head: .*body\.3.* is not the model's logits"):
        ours(model, "body.3").predict(x)
    with pytest.raises(ValueError, match=r"temperature: expected .* got 0"):
        ours(model, temperature=0)


def test_without_the_other_library():
    def importing(name):
        code = f"import sys; sys.modules[{name!r}] = None; import gradnorm_fast.integrations.{name}"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip()

    assert importing("openood") == ""
    assert importing("pytorch_ood").splitlines()[-1] == (
        "ImportError: gradnorm_fast.integrations.pytorch_ood needs pytorch-ood: pip install pytorch-ood"
    )
