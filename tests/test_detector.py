"""The detector on real architectures: the head it finds, the scores, the threshold, and the model left as it was."""

import copy
import json
import weakref

import pytest
import torch
import torchvision
from torch import nn

from gradnorm_fast import GradNorm, fast_gradnorm, heads
from gradnorm_fast.reference import autograd_gradnorm

from conftest import DEVICE


class Small(nn.Module):
    def __init__(self, bias=True, output=lambda z: z):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(8, 8, bias=bias)
        self.output = output

    def forward(self, x):
        return self.output(self.fc(self.body(x)))


def small(**options):
    torch.manual_seed(0)
    return Small(**options).to(DEVICE).eval()


def images(n=6, seed=1, size=12):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def truth(model, x, **options):
    features = model.body(x).double()
    bias = None if model.fc.bias is None else model.fc.bias.double()
    return autograd_gradnorm(features, model.fc.weight.double(), bias, **options)


CLASSIFIERS = torchvision.models.list_models(torchvision.models)
CONVOLUTION_HEADS = ("squeezenet1_0", "squeezenet1_1")


def test_there_are_eighty_torchvision_classifiers():
    assert len(CLASSIFIERS) >= 80


@pytest.fixture
def regnets_on_meta(monkeypatch):
    """Their constructor reads values of a few small tensors: those are made on the CPU."""
    made = torchvision.models.regnet.BlockParams.from_init_params

    def on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return made(*args, **kwargs)

    monkeypatch.setattr(torchvision.models.regnet.BlockParams, "from_init_params", on_cpu)


@pytest.mark.parametrize("name", [n for n in CLASSIFIERS if n not in CONVOLUTION_HEADS])
def test_the_head_of_every_torchvision_classifier(name, regnets_on_meta):
    """Without values (meta device): the head is found, has the right shape, and a score comes out per image."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
        batch = torch.empty(2, 3, 299 if name == "inception_v3" else 224, 299 if name == "inception_v3" else 224)
    detector = GradNorm(model)
    assert detector.score(batch).shape == (2,)
    head = dict(model.named_modules())[detector.head_name]
    assert isinstance(head, nn.Linear) and head.out_features == 1000
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "aux" not in n.lower()]
    assert detector.head_name == linear[-1]


@pytest.mark.parametrize("name", CONVOLUTION_HEADS)
def test_a_convolution_before_the_pooling_is_refused_with_the_reason(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=5).to(DEVICE)
    with pytest.raises(ValueError, match="sum of outer products over positions"):
        GradNorm(model).score(images(size=64))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "vit_b_32"]
)
def test_scores_of_torchvision_classifiers_against_autograd(name):
    """The gradient of the whole model's loss with respect to its head, by autograd through the model itself."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=7).to(DEVICE).eval()
    x = images(2, size=224)
    detector = GradNorm(model)
    scores = detector.score(x)
    head = dict(model.named_modules())[detector.head_name]
    for image, score in zip(x, scores, strict=True):
        loss = -torch.log_softmax(model(image[None]), 1).mean()
        (gradient,) = torch.autograd.grad(loss, head.weight)
        assert torch.isclose(gradient.abs().sum(), score, rtol=2e-4)  # a batch of one rounds differently


def test_named_heads_and_convolution_heads():
    model, x = small(), images()
    expected = GradNorm(model).score(x)
    for head in ("fc", model.fc):
        assert torch.equal(GradNorm(model, head).score(x), expected)
    torch.testing.assert_close(expected.double(), truth(model, x), rtol=1e-5, atol=0.0)
    convolution = nn.Conv2d(8, 8, 1).to(DEVICE)
    convolution.weight.data = model.fc.weight.data[:, :, None, None]
    convolution.bias.data = model.fc.bias.data
    pooled = nn.Sequential(*list(model.body)[:-1], convolution, nn.Flatten())
    detector = GradNorm(pooled)
    torch.testing.assert_close(detector.score(x), expected)
    assert detector.head_name == "4"


@pytest.mark.parametrize(
    ("head", "message"),
    [("nothing", "no module 'nothing'.*fc"), ("body.0", "expected a linear layer"), (3, "expected a module's name")],
)
def test_heads_that_do_not_fit(head, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GradNorm(small(), head).score(images())


def test_a_head_that_is_not_the_last_layer_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 4)).to(DEVICE)
    with pytest.raises(ValueError, match="is not the model's logits"):
        GradNorm(model, "1").score(images())
    with pytest.raises(ValueError, match="ends in a softmax"):
        GradNorm(small(output=lambda z: z.softmax(1))).score(images())
    with pytest.raises(ValueError, match="no part of the model"):
        GradNorm(model, nn.Linear(8, 4))


class Cosine(nn.Linear):
    def forward(self, x):
        return 10 * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class Calls(Small):
    """Calls its head in another way."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(self.fc, self.body(x))


def test_a_head_that_is_no_product_or_called_twice_is_refused():
    model = small()
    model.fc = Cosine(8, 8).to(DEVICE)
    for head in (None, "fc"):
        with pytest.raises(ValueError, match=r"'fc', a Cosine, does not compute x·Wᵀ \+ b"):
            GradNorm(model, head).score(images())
    with pytest.raises(ValueError, match="expected one call of it in a pass, the model made 2"):
        GradNorm(Calls(lambda fc, x: fc(fc(x))).to(DEVICE)).score(images())
    named = Calls(lambda fc, x: fc(input=x)).to(DEVICE).eval()
    torch.testing.assert_close(GradNorm(named).score(images()).double(), truth(named, images()), rtol=1e-5, atol=0.0)


def test_finding_the_head_keeps_no_activations():
    """A ViT's tokens or a ResNet's maps, all of them at once, are gigabytes."""
    kept, alive = [], []

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.fc = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 5)

        def forward(self, x):
            x = x.flatten(1, 2)
            for layer in self.layers:
                x = layer(x)
                kept.append(weakref.ref(x))
            alive.append(sum(r() is not None for r in kept))
            return self.fc(x.mean(1))

    GradNorm(Tokens().to(DEVICE)).score(images())
    assert alive[0] == 1


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


def test_what_is_compiled_is_called_and_has_no_head():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.top = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Sequential(nn.ReLU())
            self.top.append(nn.Linear(4, 2))

    model, compiled = Blocks(), []
    heads.compile_backbone(model, model.top[1], compiled.append)
    assert compiled == [*model.blocks, model.top[0]]


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


def loader(n, seed, batch=8):
    return [(part, torch.zeros(len(part))) for part in images(n, seed).split(batch)]


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


def test_save_and_load(tmp_path):
    model = small()
    detector = GradNorm(model, temperature=2.0).fit(loader(50, 3), progress=False)
    detector.save(tmp_path / "d.json")
    loaded = GradNorm.load(tmp_path / "d.json", model)
    assert loaded.threshold == detector.threshold and loaded.temperature == 2.0 and loaded.head_name == "fc"
    for a, b in zip(loaded.predict(images()), detector.predict(images()), strict=True):
        assert torch.equal(a, b)
    other = small()
    other.fc.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        GradNorm.load(tmp_path / "d.json", other)
    (tmp_path / "x.json").write_text("not json")
    with pytest.raises(ValueError, match="expected a detector saved"):
        GradNorm.load(tmp_path / "x.json", model)
    state = json.loads((tmp_path / "d.json").read_text())
    del state["calibration"]
    (tmp_path / "x.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="expected a detector saved"):
        GradNorm.load(tmp_path / "x.json", model)
    other.fc = nn.Sequential(other.fc)
    with pytest.raises(ValueError, match="'fc' is a Sequential"):
        GradNorm.load(tmp_path / "d.json", other)
    with pytest.raises(ValueError, match="head is not known yet"):
        GradNorm(model).save(tmp_path / "y.json")


def test_loaders_of_any_batches_and_numpy():
    detector, x = GradNorm(small()), images()
    expected = detector.score(x).cpu()
    for batches in ([x], [(x, 0)], [{"pixel_values": x}], [{"image": x}]):
        assert torch.equal(detector.score_loader(batches, progress=False), expected)
    assert (detector.score_loader([x], progress=False, numpy=True) == expected.numpy()).all()
    with pytest.raises(TypeError, match="pixel_values or image, got words"):
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
        return HeadScores(product, feature_norm, output_norm, torch.zeros(200), msp, msp, msp)

    u = torch.rand(200, generator=g) + 1
    healthy = diagnose(scores(u, u, u), scores(0.4 * u, 0.4 * u, u))
    assert healthy.trustworthy and healthy.best == "gradnorm" and healthy.auroc["gradnorm"] > 0.99
    reversed_ = diagnose(scores(u, 1 / u**2, u), scores(3 * u, 1 / u**2, 0.4 * u))
    report = str(reversed_)
    assert reversed_.correlation < -0.9 and "run against one another" in report
    assert "direction is reversed" in report and "feature_norm" in report and reversed_.best != "gradnorm"
    with pytest.raises(ValueError, match="feature_norm: expected finite scores of at least one image, got 200, 1 not"):
        diagnose(scores(torch.cat([u[1:], u[:1] / 0]), 0 * u + 1, u)._replace(gradnorm=u))
    assert "collapsed" in str(diagnose(scores(torch.ones(200), 1 + 1e-5 * u, u)))
    report = GradNorm(small()).diagnose(loader(20, 1), loader(20, 5), progress=False)
    assert report.n_id == 20 and set(report.auroc) >= {"gradnorm", "msp", "energy"}


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    detector = GradNorm(model)
    assert detector.score(torch.empty(2, 3, 224, 224, device="meta")).shape == (2,)
    assert dict(model.named_modules())[detector.head_name] is model.get_classifier()
