"""The detector: scores, threshold, threads, loaders, and the model left as it was."""

import collections
import copy
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gradnorm_fast import GradNorm, fast_gradnorm

from classifiers import images, loader, small, truth
from conftest import DEVICE


def test_the_model_is_left_as_it_was():
    model = small()
    model.train()
    model.body[1].eval()  # one module in another mode
    model.fc.weight.requires_grad_(False)
    model(images()).sum().backward()
    before = copy.deepcopy({k: v for k, v in model.state_dict().items()})
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    modes = [m.training for m in model.modules()]
    detector = GradNorm(model)
    scores = detector.score(images())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.fc.weight.requires_grad and model.fc.bias.requires_grad
    assert torch.equal(scores, GradNorm(model.eval()).score(images()))
    with pytest.raises(RuntimeError):
        detector.score(images(size=1))  # smaller than the convolution's kernel: fails inside
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compile"]
)
def test_wrappers(wrap):
    model, x = small(), images()
    assert torch.equal(GradNorm(wrap(model)).score(x), GradNorm(model).score(x))


def test_distributed_data_parallel():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, x = small(), images()
        assert torch.equal(GradNorm(nn.parallel.DistributedDataParallel(model)).score(x), GradNorm(model).score(x))
    finally:
        torch.distributed.destroy_process_group()


def test_hugging_face_style_output_and_no_bias():
    from types import SimpleNamespace

    model, x = small(bias=False, output=lambda z: SimpleNamespace(logits=z)), images()
    torch.testing.assert_close(GradNorm(model).score(x).double(), truth(model, x), rtol=1e-5, atol=0.0)
    with pytest.raises(ValueError, match="include_bias: expected a head with a bias"):
        GradNorm(model, include_bias=True).score(x)


def test_half_precision_and_autocast():
    model, x = small(), images()
    expected = GradNorm(model).score(x)
    half = copy.deepcopy(model).bfloat16()
    scores = GradNorm(half).score(x)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.1, atol=0.0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(GradNorm(model).score(x), expected, rtol=0.05, atol=0.0)


def test_options_reach_the_score():
    model, x = small(), images()
    options = dict(temperature=2.0, reduction="sum", include_bias=True)
    torch.testing.assert_close(
        GradNorm(model, **options).score(x).double(), truth(model, x, **options), rtol=1e-5, atol=0
    )
    with pytest.raises(ValueError, match="temperature"):
        GradNorm(model, temperature=0)


def test_threshold_and_p_values_are_conformal():
    detector = GradNorm(small()).fit(loader(99, 2), tpr=0.9, progress=False)
    calibration = detector.score_loader(loader(99, 2), progress=False)
    scores = torch.cat([calibration, torch.tensor([-1.0, 1e9, torch.nan])])
    p = detector.p_value(scores)
    expected = (1 + (calibration[:, None] <= scores[None, :]).sum(0)).double() / (99 + 1)
    assert torch.equal(p[:-1], expected[:-1]) and p[-1].isnan()
    ood = detector.is_ood(scores)
    assert torch.equal(ood[:-1], p[:-1] <= 1 - 0.9) and ood[-1]
    assert torch.equal(ood, ~(scores >= detector.threshold))
    labels, got, is_ood = detector.predict(images())
    assert torch.equal(got, detector.score(images())) and torch.equal(is_ood, detector.is_ood(got))
    assert torch.equal(labels, detector.model(images()).argmax(1))


@pytest.mark.parametrize("n", [1, 5, 19, 20, 21, 200])
@pytest.mark.parametrize("tpr", [0.05, 0.5, 0.9, 0.95])
def test_threshold_agrees_with_p_values_for_any_size(n, tpr):
    scores = torch.randint(0, 40, (n,), generator=torch.Generator().manual_seed(n)).float()  # with ties
    detector = GradNorm(small()).fit_scores(scores, tpr)
    tried = torch.arange(-1, 42).float()
    assert torch.equal(tried < detector.threshold, detector.p_value(tried) <= 1 - tpr)


def test_a_tpr_that_rejects_everything():
    detector = GradNorm(small()).fit_scores(torch.rand(9), 1e-20)
    assert detector.threshold == torch.inf and detector.is_ood(torch.tensor([1e9])).all()


def test_predictions_of_a_float64_model_are_float32():
    assert GradNorm(small().double()).fit_scores(torch.rand(40)).predict(images()).scores.dtype == torch.float32


def not_scores(detector):
    nested = torch.sparse_coo_tensor([[0]], [1.0])
    return [
        (None, "NoneType"),
        ("0.9", "str of <U3"),
        (["a"], "list of <U1"),
        ([None], "list"),
        ([[1.0], [1.0, 2.0]], "a list of something else"),
        (True, "bool of bool"),
        (1j, "complex of complex128"),
        ({"a": 1}, "dict"),
        (torch.ones(2) > 0, r"a tensor of torch\.bool"),
        (torch.ones(2) * 1j, r"a tensor of torch\.complex64"),
        (torch.ones(2, device="meta"), "a tensor without values"),
        (nested, r"a tensor of layout torch\.sparse_coo"),
        (detector.head_scores(images()[:1]), "HeadScores; give one of its fields, gradnorm, "),
        (detector.predict(images()[:1]), "Prediction; give one of its fields, labels, scores, "),
    ]


def test_scores_of_odd_types():
    detector = GradNorm(small()).fit_scores(np.arange(40))
    for wrong, got in not_scores(detector):
        for method in (detector.fit_scores, detector.p_value, detector.is_ood):
            with pytest.raises(TypeError, match=f"^scores: expected real numbers, .* got {got}"):
                method(wrong)
    for wrong in (torch.ones(2, 2), torch.ones(2, 1), 3.0, np.ones((1, 1, 1))):
        with pytest.raises(ValueError, match=r"^scores: expected shape \(N,\), one per image, got \("):
            detector.fit_scores(wrong)
    for scores in (range(40), [float(i) for i in range(40)], torch.arange(40).half(), np.arange(40)[::-1]):
        assert GradNorm(small()).fit_scores(scores).threshold == detector.threshold
    assert detector.p_value(0) == detector.p_value(np.float64(0)) == 2 / 41 and detector.is_ood(-1)
    assert detector.p_value([[0.0], [-1.0]]).tolist() == [[2 / 41], [1 / 41]]
    for tpr in (np.float32(0.95), np.float64(0.95)):
        assert detector.fit_scores(range(40), tpr).tpr == float(tpr)
    for wrong in (None, "0.95", True, [0.95], np.array([0.95]), 0.5 + 0j, 0, 1, float("nan")):
        with pytest.raises(ValueError, match=r"^tpr: expected a fraction"):
            detector.fit_scores(range(40), wrong)
        with pytest.raises(ValueError, match=r"^tpr: expected a fraction"):
            detector.tpr = wrong


@pytest.mark.parametrize("layers", [None, "all"])
def test_images_of_odd_kinds(layers):
    detector, x = GradNorm(small(), layers=layers), images()
    with pytest.raises(ValueError, match=r"^images: the model fails on torch\.uint8 .* floating point pixels, .* \("):
        detector.score((x.abs() * 50).to(torch.uint8))
    with pytest.raises(ValueError, match=r"^images: .*\(3, 12, 12\).* a single image needs a dimension in front"):
        detector.score(x[0])
    for wrong in (x * 1j, x.to_sparse(), x[0, 0, 0]):
        with pytest.raises(ValueError, match=r"^images: expected a batch of shape \(B, \.\.\.\), dense and real, got"):
            detector.score(wrong)
    with pytest.raises(RuntimeError) as raised:  # the user's own model fails on what looks right: nothing to add
        detector.score(x[:, :2])
    assert "images:" not in str(raised.value)


def test_refusals_of_fit():
    detector = GradNorm(small())
    with pytest.raises(ValueError, match="no threshold yet"):
        detector.predict(images())
    with pytest.raises(ValueError, match="tpr"):
        detector.fit([], tpr=1.5)
    with pytest.raises(ValueError, match="0 images"):
        detector.fit([], progress=False)
    with pytest.raises(ValueError, match="1 not finite"):
        detector.fit([images() * torch.tensor([1, 1, 1, 1, 1, torch.nan], device=DEVICE)[:, None, None, None]])
    with pytest.raises(TypeError, match=r"images: expected a torch.Tensor"):
        detector.score([[1.0]])
    with pytest.raises(TypeError, match="model: expected"):
        GradNorm(fast_gradnorm)


def test_loaders_of_any_batches_and_numpy():
    detector, x = GradNorm(small()), images()
    expected = detector.score(x).cpu()
    for batches in ([x], [(x, 0)], [{"pixel_values": x}], [{"image": x}]):
        assert torch.equal(detector.score_loader(batches, progress=False), expected)
    assert (detector.score_loader([x], progress=False, numpy=True) == expected.numpy()).all()
    with pytest.raises(TypeError, match=r"pixel_values, .* or input_ids, got words"):
        detector.score_loader([{"words": x}], progress=False)


def test_an_empty_batch_scores_nothing_and_decides_nothing():
    detector = GradNorm(small())
    assert detector.score(images()[:0]).shape == (0,) and detector.head_name is None
    assert detector.head_scores(images()[:0]).prediction.shape == (0,)


def test_diagnosis():
    from gradnorm_fast import HeadScores
    from gradnorm_fast.diagnosis import diagnose

    g = torch.Generator().manual_seed(0)

    def scores(feature_norm, output_norm, msp):
        product = feature_norm * output_norm
        factors = dict(gradnorm=product, feature_norm=feature_norm, output_norm=output_norm)
        return HeadScores(**dict.fromkeys(HeadScores._fields, msp) | factors)

    u = torch.rand(200, generator=g) + 1
    healthy = diagnose(scores(u, u, u), scores(0.4 * u, 0.4 * u, u))
    assert healthy.trustworthy and healthy.best == "gradnorm" and healthy.auroc["gradnorm"] > 0.99
    reversed_ = diagnose(scores(u, 1 / u**2, u), scores(3 * u, 1 / u**2, 0.4 * u))
    report = str(reversed_)
    assert reversed_.correlation < -0.9 and "anti-correlated" in report
    assert "direction is reversed" in report and "feature_norm" in report and reversed_.best != "gradnorm"
    with pytest.raises(ValueError, match="feature_norm: expected finite scores of at least one image, got 200, 1 not"):
        diagnose(scores(torch.cat([u[1:], u[:1] / 0]), 0 * u + 1, u)._replace(gradnorm=u))
    assert "collapsed" in str(diagnose(scores(torch.ones(200), 1 + 1e-5 * u, u)))
    report = GradNorm(small()).diagnose(loader(20, 1), loader(20, 5), progress=False)
    assert report.n_id == 20 and set(report.auroc) >= {"gradnorm", "msp", "energy"}


# Threads


@pytest.mark.parametrize("training", [True, False])
def test_threads_share_a_detector_and_a_model(training):
    """Each thread gets the scores of its own images, in evaluation mode; the model's mode and hooks are put back."""
    model = small().train(training)
    model.body[1].eval()
    batches = [images(4, seed) for seed in range(8)]
    detector, second = GradNorm(model), GradNorm(model, "fc", score="energy")
    expected = [(GradNorm(model).score(x), GradNorm(model, score="energy").score(x)) for x in batches]
    modes = [m.training for m in model.modules()]
    wrong, start = [], threading.Barrier(8)

    def work(i):
        start.wait()
        for _ in range(25):
            try:
                got = detector.score(batches[i]), second.score(batches[i])
                if not all(map(torch.equal, got, expected[i])):
                    wrong.append(got)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_pass_within_a_pass_keeps_modes_and_calls_apart():
    """A model that scores by another detector of its own parts, as an ensemble might."""
    inner = GradNorm(small(), "fc")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.fc = inner.model, nn.Linear(9, 3).to(DEVICE)

        def forward(self, x):
            return self.fc(torch.cat([self.part.body(x), inner.score(x)[:, None]], 1))

    model = Outer().train()
    assert GradNorm(model).score(images()).isfinite().all()
    assert all(m.training for m in model.modules()) and not model.fc._forward_hooks


def test_a_module_with_a_train_of_its_own_is_told_of_both_changes():
    """As LoRA layers that merge their weights for evaluation."""
    told = []

    class Merging(nn.Linear):
        def train(self, mode=True):
            told.append(mode)
            return super().train(mode)

    model = small()
    model.fc = Merging(8, 8).to(DEVICE)
    GradNorm(model.train()).score(images())
    assert told[-2:] == [False, True] and model.fc.training
    told.clear()
    GradNorm(model.eval()).score(images())
    assert told == [False]  # of model.eval() itself


def test_training_goes_on_after_scoring():
    """What a forward pass leaves in the model, a cached buffer or the parameters of a lazy layer, can be trained."""

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.LazyLinear(8), nn.LazyLinear(5)
            self.register_buffer("cache", None)

        def forward(self, x):
            h = self.body(x.flatten(1)).relu()
            if self.cache is None:
                self.cache = h.mean(0)
            return self.fc(h * self.cache)

    model = Caching().to(DEVICE)
    assert "'fc'" in repr(GradNorm(model, "fc"))
    assert GradNorm(model, "fc").score(images()).isfinite().all()
    model(images()).sum().backward()
    assert model.fc.weight.grad is not None and not model.cache.is_inference()


# Other scores


@pytest.mark.parametrize("name", ["msp", "energy", "max_logit", "feature_norm", "output_norm"])
def test_any_score_of_the_pass_can_be_the_gate(name):
    detector = GradNorm(small(), score=name).fit(loader(99, 2), 0.9, progress=False)
    field = getattr(detector.head_scores(images()), name)
    labels, scores, is_ood = detector.predict(images())
    assert torch.equal(detector.score(images()), field) and torch.equal(scores, field)
    assert torch.equal(is_ood, field < detector.threshold) and torch.equal(labels, detector.model(images()).argmax(1))
    calibration = getattr(detector.head_scores_loader(loader(99, 2), progress=False), name)
    assert torch.equal(detector.score_loader(loader(99, 2), progress=False), calibration)
    assert detector.threshold == GradNorm(small()).fit_scores(calibration, 0.9).threshold


def test_options_of_the_detector_that_do_not_fit():
    for wrong in ("odin", "prediction", "entropy", "exgrad", None, 3):  # entropy and exgrad are smaller on ID images
        with pytest.raises(ValueError, match="score: expected one of gradnorm, feature_norm"):
            GradNorm(small(), score=wrong)
    with pytest.raises(TypeError, match="include_bias: expected a bool"):
        GradNorm(small(), include_bias="yes")


def test_repr_tells():
    detector = GradNorm(small(), temperature=2)
    assert repr(detector) == (
        "GradNorm(Small, head found on the first batch, score='gradnorm', temperature=2, reduction='mean', "
        "include_bias=False; not fitted; preprocessing unknown)"
    )
    detector.fit(loader(30, 1), 0.9, progress=False)
    assert "head 'fc' (8, 8)" in repr(detector)
    assert f"threshold {detector.threshold:.6g} from 30 images at tpr 0.9" in repr(detector)


# Loaders


def test_a_dataset_in_place_of_a_loader():
    x = images(70)
    data = torch.utils.data.TensorDataset(x, torch.arange(70))
    detector = GradNorm(small())
    batched = torch.utils.data.DataLoader(data, 64)
    expected = detector.score_loader(batched, progress=False)
    assert torch.equal(detector.score_loader(data, progress=False), expected)
    assert detector.fit(data, progress=False).threshold == detector.fit(batched, progress=False).threshold

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return object(), 0

    with pytest.raises(TypeError, match=r"items of this dataset, the first a object, .* a transform to tensors"):
        detector.fit(Pictures(), progress=False)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (torch.ones(4, 3, 12, 12), r"got a tensor \(4, 3, 12, 12\); give tensor.split"),
        (3, "expected an iterable of batches, as a DataLoader, got int"),
        ({"image": torch.ones(4, 3, 12, 12)}, r"got one dict; give \[batch\]"),
        ("folder", "got one str"),
        (np.float32(3), "got a NumPy float32"),
        (np.ones((4, 3, 12, 12)), "got a NumPy ndarray"),
        ([{"label": torch.ones(4)}], "one of the keys pixel_values, image, images, data or input_ids, got label"),
    ],
)
def test_loaders_that_are_none(loader, message):
    with pytest.raises(TypeError, match="loader: .*" + message):
        GradNorm(small()).fit(loader, progress=False)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        h = self.embedding(input_ids)
        m = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {"logits": self.fc((h * m[..., None]).sum(1) / m.sum(1, keepdim=True))}


def test_text_is_passed_as_keywords():
    torch.manual_seed(0)
    model = Text().to(DEVICE)
    ids, mask = torch.randint(0, 20, (5, 7)), torch.ones(5, 7, dtype=torch.int64).tril()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(5), "text": ["a"] * 5}
    detector = GradNorm(model)
    scores = detector.score_loader([batch, collections.UserDict(batch)], progress=False)
    h = (model.embedding(ids.to(DEVICE)) * mask.to(DEVICE)[..., None]).sum(1) / mask.sum(1, keepdim=True).to(DEVICE)
    expected = fast_gradnorm(h, model.fc.weight, model.fc.bias).cpu()
    torch.testing.assert_close(scores, torch.cat([expected, expected]))
    assert not torch.allclose(detector.score({"input_ids": ids}).cpu(), expected)
    assert detector.score({"input_ids": ids[:0]}).shape == (0,)
    with pytest.raises(TypeError, match=r"expected a mapping to tensors \(B, \.\.\.\), got text: list"):
        detector.score({"input_ids": ids, "text": ["a"]})
    with pytest.raises(TypeError, match="got an empty one"):
        detector.score({})


def test_nan_scores_are_counted():
    detector = GradNorm(small())
    x = images()
    x[1:3] = torch.nan
    with pytest.warns(UserWarning, match="2 of 6 scores are NaN"):
        assert detector.score_loader([x], progress=False).isnan().sum() == 2
    with pytest.warns(UserWarning, match="2 of 6 scores are NaN"):
        detector.head_scores_loader([x], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="2 not finite; are the model's weights and the preprocessing finite"):
            detector.fit([x], progress=False)
        assert detector.score_loader([images()], progress=False).isfinite().all()
    broken = small()
    broken.body[0].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="6 not finite"):
        GradNorm(broken).fit([images()], progress=False)
    assert GradNorm(broken).fit_scores(torch.rand(30)).predict(images()).is_ood.all()
