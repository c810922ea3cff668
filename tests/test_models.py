"""Models by name: checkpoints as training programs write them, and clear errors without a network."""

import argparse
import urllib.error
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradnorm_fast.models import (
    IMAGENET_MEAN,
    _load_checkpoint,
    class_names,
    default_transform,
    load_model,
    normalisation_of,
)


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def prefixed(prefix, state):
    return OrderedDict((prefix + name, value) for name, value in state.items())


STATE = network(1).state_dict()
OTHER = network(2).state_dict()


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "optimizer": {"lr": 0.1}},
        {"model_state_dict": STATE, "args": argparse.Namespace(lr=0.1)},
        {"net": prefixed("module.", STATE), "acc": 0.9},
        {"model": prefixed("_orig_mod.", STATE), "epoch": 3},
        {
            "state_dict": prefixed("model.", STATE) | {"criterion.weight": torch.ones(2)},
            "pytorch-lightning_version": "2",
        },
        {"state_dict": prefixed("model.", STATE) | prefixed("ema_model.", OTHER)},
        {"state_dict": prefixed("classifier.module._orig_mod.", STATE)},
        {k: v for k, v in STATE.items() if not k.endswith("num_batches_tracked")},
    ],
    ids=lambda content: " ".join(map(str, content))[:40],
)
def test_checkpoints_of_training_programs(content, tmp_path):
    torch.save(content, tmp_path / "c.pt")
    model = network(0)
    _load_checkpoint(model, tmp_path / "c.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, STATE[name]), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": STATE, "epoch": 3}, "under state_dict, model_state_dict, model, net, got the keys weights, epoch"),
        (network(0), "it holds torch.nn.*may run code; save the state dict alone"),
        ([1, 2], "got a list"),
        ({1: torch.ones(2)}, "got the keys 1"),
        (prefixed("a.", STATE) | prefixed("b.", OTHER), r"holds the model several times, as a\., b\."),
        (prefixed("module.", dict(list(STATE.items())[:-1])), "1 missing, 0 unknown .no 3.bias"),
        (STATE | {"3.weight": torch.ones(3, 4)}, "does not fit the model: size mismatch for 3.weight"),
    ],
    ids=lambda v: v[:20] if isinstance(v, str) else "",
)
def test_what_a_checkpoint_holds_is_said(content, message, tmp_path):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        _load_checkpoint(network(0), tmp_path / "c.pt")


def test_weights_without_a_network(monkeypatch, tmp_path):
    pytest.importorskip("torchvision")

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot download ResNet18_Weights.IMAGENET1K_V1 from https.*: Temp") as info:
        load_model("resnet18", "DEFAULT")
    assert str(tmp_path / "hub/checkpoints") in str(info.value) and "--checkpoint FILE" in str(info.value)


def test_timm_weights_without_a_network(monkeypatch):
    timm = pytest.importorskip("timm")
    real = timm.create_model

    def offline(name, pretrained, **options):
        if pretrained:
            raise RuntimeError("offline")
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"cannot download the weights of resnet18: offline.*--checkpoint FILE"):
        load_model("timm:resnet18", "DEFAULT")


def test_names_of_the_classes():
    names = class_names(nn.Linear(2, 2), "resnet18", "DEFAULT")
    assert len(names) == 1000 and names[0] == "tench"
    assert (
        class_names(nn.Linear(2, 2), "resnet18") is None and class_names(nn.Linear(2, 2), "timm:x", "DEFAULT") is None
    )
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(id2label={1: "dog", 0: "cat"})
    assert class_names(model, "own:model") == ["cat", "dog"]
    model.config.id2label = {"a": "cat"}
    assert class_names(model, "own:model") is None


def test_classes_are_an_own_models_own(tmp_path):
    with pytest.raises(ValueError, match="classes: 'own:small' decides that itself"):
        load_model("own:small", classes=10)


def test_another_size_keeps_the_normalisation_of_the_weights():
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    vit = timm.data.resolve_data_config(
        pretrained_cfg={"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}
    )
    with torch.device("meta"):
        _, bits = load_model("bits_r101x1")
    for transform in (bits, timm.data.create_transform(**vit), default_transform(**half)):
        assert normalisation_of(transform) == half
    weights = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
    for transform in (weights, None, lambda image: image):
        assert normalisation_of(transform)["mean"] == pytest.approx(IMAGENET_MEAN)
