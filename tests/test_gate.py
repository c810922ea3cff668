"""The file of a saved detector: what it was fitted to, and what is refused."""

import copy
import json
import os
import warnings

import pytest
import torch
from torch import nn

from gradnorm_fast import GradNorm

from classifiers import Small, images, loader, small
from conftest import DEVICE


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gate.json"


def saved(path, model=None, **options):
    detector = GradNorm(model or small(), **options).fit(loader(50, 3), progress=False)
    detector.save(path)
    return detector


@pytest.mark.parametrize("score", ["gradnorm", "msp", "energy", "max_logit", "feature_norm", "output_norm"])
def test_save_and_load(path, score):
    options = dict(score=score, temperature=2.0, reduction="sum", include_bias=True, preprocessing="resized to 12")
    detector = saved(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = GradNorm.load(path, small())
    assert loaded.threshold == detector.threshold and loaded.tpr == detector.tpr and loaded.head_name == "fc"
    assert repr(loaded) == repr(detector)
    for a, b in zip(loaded.predict(images()), detector.predict(images()), strict=True):
        assert torch.equal(a, b)
    scores = getattr(detector.head_scores(images()), score)
    assert torch.equal(loaded.predict(images()).scores, scores) and torch.equal(loaded.score(images()), scores)
    assert set(json.loads(path.read_text())) >= {"format", "head", "calibration", "tensors", "preprocessing", *options}


def test_saving_needs_a_head_and_keeps_links(path, tmp_path):
    with pytest.raises(ValueError, match="head is not known yet"):
        GradNorm(small()).save(path)
    GradNorm(small(), "fc").save(path)
    assert GradNorm.load(path, small())._calibration is None
    link = tmp_path / "link.json"
    link.symlink_to(path)
    detector = saved(link)
    assert link.is_symlink() and GradNorm.load(path, small()).threshold == detector.threshold
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gate.json", "link.json"]
    with pytest.raises(ValueError, match=r"'fc' is a Sequential"):
        other = small()
        other.fc = nn.Sequential(other.fc)
        GradNorm.load(path, other)


def test_what_a_killed_process_left_is_removed_after_an_hour(path, tmp_path):
    left = {age: tmp_path / f".gate.json.{age}-1.partial" for age in (1, 2)}
    others = [tmp_path / ".gate.json.partial", tmp_path / ".other.json.1-1.partial", tmp_path / "gate.json.1-1.partial"]
    for file in (*left.values(), *others):
        file.write_text("half")
        os.utime(file, (0, 0) if file != left[1] else None)
    saved(path)
    assert not left[2].exists() and left[1].exists() and all(file.exists() for file in others)


def test_tpr_can_be_changed_after_loading(path):
    detector = saved(path)
    loaded = GradNorm.load(path, small())
    loaded.tpr = 0.8
    assert loaded.threshold == GradNorm(small()).fit(loader(50, 3), 0.8, progress=False).threshold
    assert loaded.threshold > detector.threshold
    loaded.save(path)
    assert GradNorm.load(path, small()).threshold == loaded.threshold
    for wrong in (0, 1, True, "0.9", float("nan")):
        with pytest.raises(ValueError, match="tpr"):
            loaded.tpr = wrong


def changed(what):
    model = small()
    if what == "head":
        model.fc.weight.data[0, 0] += 1
    elif what == "backbone":
        model.body[0].weight.data[0, 0, 0, 0] += 1e-6
    elif what == "buffer":
        model.body[1].running_mean[3] += 1
    elif what == "shape":
        model.body[0] = nn.Conv2d(3, 8, 5).to(model.fc.weight.device)
    elif what == "names":
        model.neck = nn.Linear(2, 2)
    else:
        del model.body[1].running_var
        model.body[1].register_buffer("running_var", None)
    return model


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("head", r"1 of 8 tensors differ: fc\.weight\. Fit it again"),
        ("backbone", r"1 of 8 tensors differ: body\.0\.weight\. "),
        ("buffer", r"1 of 8 tensors differ: body\.1\.running_mean\. "),
        ("shape", r"body\.0\.weight has shape \(8, 3, 5, 5\), not \(8, 3, 3, 3\)"),
        ("names", r"2 of 8 tensors differ: neck\.weight is new, neck\.bias is new"),
        ("missing", r"1 of 8 tensors differ: body\.1\.running_var is missing"),
    ],
)
def test_another_model_is_refused_with_what_differs(path, what, message):
    detector = saved(path)
    with pytest.raises(ValueError, match=message):
        GradNorm.load(path, changed(what))
    with pytest.warns(UserWarning, match="loaded by force.*" + message.split(r"\. ")[0]):
        forced = GradNorm.load(path, changed(what), force=True)
    assert forced.threshold == detector.threshold


def test_counters_devices_and_caches_do_not_matter(path):
    model = small()
    model.register_buffer("cache", torch.ones(3, device=model.fc.weight.device), persistent=False)
    saved(path, model)
    same = copy.deepcopy(model)
    same.body[1].num_batches_tracked += 7
    same.cache = None
    same.fc.weight.requires_grad_(False)
    same.body = torch.compile(same.body, backend="eager")  # prefixes names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradNorm.load(path, same)
        GradNorm.load(path, nn.DataParallel(copy.deepcopy(model)))
        GradNorm.load(path, copy.deepcopy(model).double())
    same.cache = torch.zeros(3)
    with pytest.raises(ValueError, match="differ: cache"):
        GradNorm.load(path, same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_model_in_another_dtype_is_known_by_its_rounded_values(path, dtype):
    model = small()
    for tensor in (model.body[1].weight.data, model.body[1].bias.data, *model.body[1].buffers()):
        if tensor.is_floating_point():
            tensor.uniform_()
    saved(path, model)
    with pytest.warns(UserWarning, match="another dtype .* 8 tensors are equal after rounding"):
        GradNorm.load(path, copy.deepcopy(model).to(dtype))
    other = copy.deepcopy(model).to(dtype)
    other.fc.weight.data[0, 0] *= 1.01
    with pytest.raises(ValueError, match="1 of 8 tensors differ: fc"):
        GradNorm.load(path, other)
    saved(path, copy.deepcopy(model).to(dtype))
    with pytest.warns(UserWarning, match="another dtype"):
        GradNorm.load(path, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradNorm.load(path, copy.deepcopy(model).to(dtype).float())  # the rounded values, exactly


def test_preprocessing_is_kept_and_compared(path):
    from torchvision.transforms import v2

    resize = v2.Compose([v2.Resize(16), v2.ToDtype(torch.float32, scale=True)])
    detector = saved(path, preprocessing=resize)
    assert "Resize(size=[16]" in detector.preprocessing and "Resize" in repr(detector)
    assert GradNorm.load(path, small()).preprocessing == detector.preprocessing
    GradNorm.load(path, small(), preprocessing=copy.deepcopy(resize))
    with pytest.raises(ValueError, match=r"the preprocessing was Compose.*16.* it is Compose.*32.*force=True"):
        GradNorm.load(path, small(), preprocessing=v2.Compose([v2.Resize(32)]))
    with pytest.warns(UserWarning, match="by force.*preprocessing was"):
        GradNorm.load(path, small(), preprocessing="none", force=True)
    for unknown in (None, lambda image: image, v2.Lambda(lambda image: image)):
        detector = saved(path, preprocessing=unknown)
        assert detector.preprocessing is None and "preprocessing unknown" in repr(detector)
        assert json.loads(path.read_text())["preprocessing"] is None
        with pytest.warns(UserWarning, match="the preprocessing of its images is unknown and was not compared"):
            assert GradNorm.load(path, small(), preprocessing="resized").preprocessing == "resized"


def test_autocast_is_kept_and_compared(path):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        detector = saved(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = GradNorm.load(path, small(), autocast="bfloat16")
            assert loaded.threshold == detector.threshold
            loaded.predict(images())
    with pytest.raises(ValueError, match=r"autocast was bfloat16, it is off.*force=True"):
        GradNorm.load(path, small(), autocast="off")
    with pytest.warns(UserWarning, match="by force.*autocast was bfloat16, it is off"):
        GradNorm.load(path, small(), autocast="off", force=True)
    with pytest.warns(UserWarning, match="fitted with autocast bfloat16, it predicts with autocast off"):
        GradNorm.load(path, small()).predict(images())
    state = json.loads(path.read_text())
    del state["autocast"]  # of a file that was saved before
    path.write_text(json.dumps(state))
    GradNorm.load(path, small(), autocast="off")
    for wrong in ("half", torch.bfloat16, True):
        with pytest.raises(ValueError, match="autocast: expected None or one of off, bfloat16"):
            GradNorm.load(path, small(), autocast=wrong)
        with pytest.raises(ValueError, match="autocast: expected None or one of off, bfloat16"):
            detector.fit_scores(torch.rand(30), autocast=wrong)


def test_a_file_of_format_1_says_what_it_does_not_know(path):
    detector = saved(path)
    state = json.loads(path.read_text())
    for key in ("tensors", "score", "preprocessing"):
        del state[key]
    state |= {"format": 1, "fingerprint": detector._fingerprint()}
    path.write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="format 1, which knows the head alone.*Fit and save it again"):
        loaded = GradNorm.load(path, changed("backbone"))
    assert loaded.threshold == detector.threshold and loaded.preprocessing is None
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="other weights of 'fc'"):
        GradNorm.load(path, changed("head"))


DEEP = "[" * 100_000 + "]" * 100_000
BAD = [
    ("{", "expected a detector saved by GradNorm.save"),
    (DEEP, "nested too deeply"),
    ("[1]", 'an object with the key "format"'),
    ("{}", 'an object with the key "format"'),
    ({"format": 3}, '"format": expected 1 or 2, got 3; it is written by a newer'),
    ({"format": True}, '"format": expected 1 or 2, got true'),
    ({"format": "2"}, '"format": expected 1 or 2, got "2"'),
    ({"head": 3}, '"head": expected a string, got 3'),
    ({"head": None}, '"head": expected a string, got null'),
    ({"head": "gone"}, "no module 'gone'"),
    ({"temperature": True}, '"temperature": expected a finite number, got true'),
    ({"temperature": 10**400}, '"temperature": expected a finite number'),
    ({"temperature": -1}, "temperature: expected a finite positive"),
    ({"reduction": ["mean"]}, '"reduction": expected one of mean, sum, got '),
    ({"include_bias": 1}, '"include_bias": expected true or false, got 1'),
    ({"score": "odin"}, '"score": expected one of gradnorm, .*, got "odin"'),
    ({"tpr": 1.5}, '"tpr": expected a fraction between 0 and 1, got 1.5'),
    ({"tpr": "0.95"}, '"tpr": expected a finite number, got "0.95"'),
    ({"calibration": "none"}, '"calibration": expected a list or null, got "none"'),
    ({"calibration": []}, '"calibration": expected null or at least one score'),
    ({"calibration": [1, "2"]}, '"calibration": expected finite float32 scores, got "2" at 1'),
    ({"calibration": [[1.0]]}, r'"calibration": .* got \[1.0\] at 0'),
    ({"calibration": [True]}, '"calibration": .* got true at 0'),
    ({"calibration": [1, float("nan")]}, '"calibration": .* got NaN at 1'),
    ({"calibration": [1e300]}, '"calibration": .* got 1e'),
    ({"calibration": [10**400]}, '"calibration": .* got 1000.* at 0'),
    ({"preprocessing": 3}, '"preprocessing": expected a string or null, got 3'),
    ({"autocast": "int8"}, '"autocast": expected one of off, bfloat16, .* got "int8"'),
    ({"autocast": True}, '"autocast": expected one of off, bfloat16, .* got true'),
    ({"tensors": []}, '"tensors": expected an object'),
    ({"tensors": {"fc.weight": 3}}, "\"tensors\": expected shape, dtype and digests of 'fc.weight', got 3"),
    ({"tensors": {"fc.weight": {"shape": [1], "dtype": "save"}}}, '"tensors": expected shape'),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_broken_files_are_refused_with_file_and_key(path, content, message):
    GradNorm(small(), "fc").fit_scores(torch.rand(30)).save(path)
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)gate\.json: .*{message}"):
        GradNorm.load(path, small())


@pytest.mark.parametrize(
    "key", ["head", "temperature", "reduction", "include_bias", "score", "tpr", "calibration", "tensors"]
)
def test_a_missing_key_is_named(path, key):
    GradNorm(small(), "fc").save(path)
    state = json.loads(path.read_text())
    del state[key]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf'gate\.json: "{key}": expected .*, got no such key'):
        GradNorm.load(path, small())


def test_bytes_and_folders(path, tmp_path):
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"gate\.json: expected a detector saved"):
        GradNorm.load(path, small())
    path.write_text('{"format": ' + "1" * 5000 + "}")
    with pytest.raises(ValueError, match=r"gate\.json"):
        GradNorm.load(path, small())
    with pytest.raises(OSError):
        GradNorm.load(tmp_path, small())
    with pytest.raises(FileNotFoundError, match=r"none/gate\.json"):
        GradNorm(small(), "fc").save(tmp_path / "none" / "gate.json")
    GradNorm(small(), "fc").save(path)
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"gate\.json: model: expected values in 'body\.0\.weight'"),
    ):
        GradNorm.load(path, Small())


@pytest.mark.parametrize("what", ["weights", "head"])
def test_a_model_that_has_changed_since_fit_is_not_saved(path, what):
    """Its threshold is of the model that it was."""
    model = small()
    detector = GradNorm(model).fit(loader(50, 3), progress=False)
    if what == "weights":
        with torch.no_grad():
            model.fc.weight.mul_(2.0)
    else:
        model.fc = nn.Linear(model.fc.in_features, model.fc.out_features)
    with pytest.raises(ValueError, match=r"save: the model has changed since fit, \d of \d+ tensors differ: .*fc"):
        detector.save(path)
    assert not path.exists()
    GradNorm(model).fit(loader(50, 3), progress=False).save(path)
    assert GradNorm.load(path, model).tpr == 0.95
