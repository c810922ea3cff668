"""The head: found on real architectures by what it does, verified on every batch, and refused in plain words."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from gradnorm_fast import GradNorm, heads, verification

from classifiers import Calls, Small, images, small, truth
from conftest import DEVICE

# one of each family, with the head it has
TORCHVISION = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "regnet_x_400mf": "fc",
    "regnet_y_400mf": "fc",
    "resnet18": "fc",
    "resnet50": "fc",
    "resnext50_32x4d": "fc",
    "shufflenet_v2_x0_5": "fc",
    "swin_t": "head",
    "swin_v2_t": "head",
    "vgg11": "classifier.6",
    "vit_b_32": "heads.head",
    "wide_resnet50_2": "fc",
}


@pytest.fixture
def regnets_on_meta(monkeypatch):
    """Their constructor reads values of a few small tensors: those are made on the CPU."""
    made = torchvision.models.regnet.BlockParams.from_init_params

    def on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return made(*args, **kwargs)

    monkeypatch.setattr(torchvision.models.regnet.BlockParams, "from_init_params", on_cpu)


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_head_of_torchvision_classifiers(name, regnets_on_meta):
    """Without values (meta device): the head is found, has the right shape, and a score comes out per image."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
        batch = torch.empty(2, 3, 299 if name == "inception_v3" else 224, 299 if name == "inception_v3" else 224)
    detector = GradNorm(model)
    assert detector.score(batch).shape == (2,)
    assert detector.head_name == TORCHVISION[name]


@pytest.mark.parametrize("name", ["squeezenet1_1"])
def test_a_convolution_before_the_pooling_is_refused_with_the_reason(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=5).to(DEVICE)
    with pytest.raises(ValueError, match="sum of outer products over positions"):
        GradNorm(model).score(images(size=64))


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "vit_b_32"])
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
    with pytest.raises(ValueError, match="the softmax of what 'fc' returns"):
        GradNorm(small(output=lambda z: z.softmax(1))).score(images())
    with pytest.raises(ValueError, match="not part of the model"):
        GradNorm(model, nn.Linear(8, 4))


def test_a_head_that_the_model_does_not_call_is_refused():
    model = small()
    model.spare = nn.Linear(8, 8).to(DEVICE)
    with pytest.raises(ValueError, match="head: the model did not call 'spare'"):
        GradNorm(model, "spare").score(images())
    detector = GradNorm(model)
    detector.score(images())
    model.fc = model.spare  # after the head was found
    with pytest.raises(ValueError, match="head: the model did not call it; is it the head of another model"):
        detector.score(images())


class Cosine(nn.Linear):
    def forward(self, x):
        return 10 * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


def test_a_head_that_is_no_product_or_called_twice_is_refused():
    model = small()
    model.fc = Cosine(8, 8).to(DEVICE)
    for head in (None, "fc"):
        with pytest.raises(ValueError, match=r"'fc', a Cosine, does not make the model's logits"):
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


def test_what_is_compiled_is_called_and_has_no_head():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.top = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Sequential(nn.ReLU())
            self.top.append(nn.Linear(4, 2))

    model, compiled = Blocks(), []
    heads.compile_backbone(model, model.top[1], compiled.append)
    assert compiled == [*model.blocks, model.top[0]]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    detector = GradNorm(model)
    assert detector.score(torch.empty(2, 3, 224, 224, device="meta")).shape == (2,)
    assert dict(model.named_modules())[detector.head_name] is model.get_classifier()


# Verified on every batch


class Flat(nn.Module):
    """A head on 432 features as they are, changed in the way given."""

    def __init__(self, classes=10, change=None):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.change = nn.Linear(432, classes), change or (lambda fc, x: fc(x))

    def forward(self, x):
        return self.change(self.fc, x.flatten(1).relu())


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(432, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


BOTH_NUMBERS = r"logit of class \d+ is -?[\d.e-]+, x·Wᵀ \+ b is -?[\d.e-]+; rounding explains a difference of [\d.e-]+"


def test_what_is_added_after_the_first_batch_is_refused_with_both_numbers():
    model = Flat().to(DEVICE)
    model.fc = Lora(model.fc).to(DEVICE)
    detector = GradNorm(model)
    detector.score(images())
    assert detector.head_name == "fc.base"
    nn.init.normal_(model.fc.b.weight, std=1e-3)
    with pytest.raises(ValueError, match=BOTH_NUMBERS + ".*LoRA"):
        detector.score(images())

    model = Flat().to(DEVICE)
    detector = GradNorm(model, "fc")
    detector.score(images())
    hook = model.fc.register_forward_hook(lambda module, args, output: output / 8.7)
    with pytest.raises(ValueError, match=BOTH_NUMBERS + r".*0\.114943 times .*temperature=8\.7"):
        detector.head_scores(images())
    hook.remove()
    detector.score(images())


@pytest.mark.parametrize(
    "change",
    [
        lambda fc, x: F.linear(x, fc.weight * 1.01, fc.bias),
        lambda fc, x: fc(x) / 1.0005,
        lambda fc, x: fc(x) + torch.eye(10, device=x.device)[3] * 1e-3,
    ],
    ids=["weight", "logits", "one class"],
)
def test_small_changes_are_refused_in_float32(change):
    with pytest.raises(ValueError, match=BOTH_NUMBERS):
        head = Flat().to(DEVICE)
        head.fc.forward = lambda x: change(copy.copy(plain), x)  # inside the layer: only the numbers tell
        plain = nn.Linear(432, 10).to(DEVICE)
        plain.weight, plain.bias = head.fc.weight, head.fc.bias
        GradNorm(head).score(images())


def test_a_quantisation_aware_head_is_refused():
    qat = pytest.importorskip("torch.ao.nn.qat")
    model = Flat()
    head = qat.Linear(432, 10, qconfig=torch.ao.quantization.get_default_qat_qconfig())
    head.load_state_dict(model.fc.state_dict(), strict=False)
    model.fc = head
    with pytest.raises(ValueError, match=BOTH_NUMBERS + ".*quantisation-aware"):
        GradNorm(model.to(DEVICE)).score(images())


def test_each_batch_verifies_another_row():
    """A change of one row alone is found within as many batches as a batch has rows."""
    model = Flat().to(DEVICE)
    detector = GradNorm(model)
    detector.score(images())
    model.change = lambda fc, x: fc(x) + torch.eye(len(x), device=x.device)[:, 4:5]
    with pytest.raises(ValueError, match="in row 4 of the batch"):
        for _ in range(6):
            detector.score(images())


@pytest.mark.parametrize("depth", [3, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, "autocast"])
def test_rounding_is_no_reason_to_refuse_and_ten_tolerances_are(depth, dtype):
    """Positive terms, whose sums round worst, and mixed ones."""
    torch.manual_seed(depth)
    autocast = dtype == "autocast"
    head = nn.Linear(depth, 50, device=DEVICE, dtype=torch.float32 if autocast else dtype)
    for positive in (True, False):
        if positive:
            head.weight.data.abs_()
        else:
            nn.init.normal_(head.weight)
        x = torch.randn(40, depth, device=DEVICE, dtype=head.weight.dtype).relu() * 3
        with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            logits = head(x)
            for row in range(len(x)):
                found = heads.check_row("fc", head, x, logits, row)
                found.raise_if_failed()
                assert ((found.logits - found.product).abs() < 0.7 * found.tolerance).all()
            spoilt = logits.clone().double()
            spoilt[5, 7] += 10 * heads.check_row("fc", head, x, logits, 5).tolerance[7]
            assert heads.check_row("fc", head, x, spoilt.to(logits.dtype), 5).failed


def test_autocast_inside_the_model_and_float32_logits():
    """As a model wrapped by Accelerate: nothing outside shows that the head was computed in half precision."""

    def wrapped(fc, x):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return fc(x).float()

    model, x = Flat(change=wrapped).to(DEVICE), images()
    detector = GradNorm(model)
    for _ in range(7):
        detector.score(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert GradNorm(Flat(change=lambda fc, x: fc(x).float()).to(DEVICE)).score(x).isfinite().all()
    model.change = lambda fc, x: wrapped(fc, x) * 1.1
    with pytest.raises(ValueError, match="rounding explains"):
        detector.score(x)


def test_rows_that_cannot_be_compared():
    """NaN features, masked classes and halves that overflow are no fault of the head; NaN logits alone are."""
    model, x = Flat().to(DEVICE), images()
    model.fc.bias.data[2] = -torch.inf
    x[0] = torch.nan
    scores = GradNorm(model).score(x)
    assert scores[0].isnan() and scores[1:].isfinite().all()
    half = Flat().to(DEVICE).half()
    half.fc.weight.data.fill_(1000)
    assert GradNorm(half).score(images() * 100).shape == (6,)
    model.change = lambda fc, x: fc(x) * torch.nan
    with pytest.raises(ValueError, match="is nan, x·Wᵀ"):
        heads.check_row("fc", model.fc, x.flatten(1), model(x), 1).raise_if_failed()


def test_tf32_and_reduced_precision_widen_the_tolerance():
    def tolerance(head, device):
        return verification.epsilon(head, SimpleNamespace(device=torch.device(device), dtype=torch.float32))

    linear, convolution = nn.Linear(2, 2), nn.Conv2d(2, 2, 1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert tolerance(linear, "cuda") == tolerance(linear, "cpu") == tolerance(linear, "mps") == 2.0**-23
        assert tolerance(convolution, "cuda") == 2.0**-10  # cudnn's own switch, on by default
        torch.set_float32_matmul_precision("medium")
        assert tolerance(linear, "cuda") == 2.0**-10 and tolerance(linear, "cpu") == 2.0**-7
    finally:
        torch.set_float32_matmul_precision(before)


def test_on_a_gpu_the_verdict_comes_with_later_results(monkeypatch):
    """The outcome of each verification arrives late, as from a GPU: scores are NaN at once, the error comes after."""
    arrived = []

    def outcome(failed):
        i = len(arrived)
        arrived.append(False)
        return lambda: bool(failed) if arrived[i] else None

    model, x = Flat().to(DEVICE), images()
    detector = GradNorm(model).fit_scores(torch.rand(50))
    good = detector.score(x)
    monkeypatch.setattr(verification, "_outcome", outcome)
    assert torch.equal(detector.score(x), good)
    model.change = lambda fc, x: fc(x) * 2
    for _ in range(2):
        result = detector.predict(x)
        assert result.scores.isnan().all() and result.is_ood.all()
    arrived[0] = True
    assert detector.score(x).isnan().all()  # nothing is known of the bad ones yet
    arrived[:] = [True] * len(arrived)
    with pytest.raises(ValueError, match=BOTH_NUMBERS):
        detector.score(x)
    with pytest.raises(ValueError, match=BOTH_NUMBERS):
        detector.raise_refusals()
    headless = GradNorm(Flat(change=lambda fc, x: fc(x)).to(DEVICE))
    headless.model.fc = nn.Linear(432, 10, bias=False).to(DEVICE)
    assert headless.score(x).isfinite().all()
    monkeypatch.setattr(verification, "_outcome", lambda failed: lambda: bool(failed))
    loaded = iter([x, x])

    def spoiling():
        for batch in loaded:
            yield batch
            model.change = lambda fc, x: fc(x) * 2

    model.change = lambda fc, x: fc(x)
    with pytest.raises(ValueError, match=BOTH_NUMBERS):
        GradNorm(model).score_loader(spoiling(), progress=False)


# Told what it is, and what to do


def test_tied_weights_are_refused():
    """Autograd's gradient has a part through the other use; the closed form does not."""
    model = Calls(lambda fc, x: fc(x)).to(DEVICE)
    model.decoder = nn.Linear(8, 8).to(DEVICE)
    assert GradNorm(model).score(images()).isfinite().all()
    model.decoder.weight = model.fc.weight
    for head in (None, "fc"):
        with pytest.raises(ValueError, match=r"weight of 'fc' is tied to 'decoder.weight'.*second part.*clone"):
            GradNorm(model, head).score(images())
    model.decoder.weight = nn.Parameter(model.fc.weight.detach()[2:])  # another parameter in the same memory
    with pytest.raises(ValueError, match="tied"):
        GradNorm(model).score(images())
    model.decoder = nn.Linear(8, 8).to(DEVICE)
    model.decoder.bias = model.fc.bias
    assert GradNorm(model).score(images()).isfinite().all()
    with pytest.raises(ValueError, match="bias of 'fc' is tied"):
        GradNorm(model, include_bias=True).score(images())


class NormedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))

    def forward(self, x):
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)


class Other(Small):
    """Small with another head, and what becomes of its features."""

    def __init__(self, fc, call=lambda model, x: model.fc(x), **parts):
        super().__init__()
        self.fc, self.call = fc, call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.call(self, self.body(x))


def linear(n=5):
    return nn.Linear(8, n)


def quantised():
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    return quantize(nn.Sequential(linear()), {nn.Linear}, dtype=torch.qint8)[0]


OTHERS = {
    "TorchScript head": (lambda: Other(torch.jit.script(linear())), "'fc' is TorchScript"),
    "quantised head": (lambda: Other(quantised()), "'fc', a Linear, which is quantised"),
    "F.linear": (
        lambda: Other(None, lambda m, x: F.linear(x, m.w), w=nn.Parameter(torch.randn(5, 8))),
        r"parameter 'w', shape \(5, 8\), may be its head.*torch.nn.Linear",
    ),
    "einsum": (
        lambda: Other(None, lambda m, x: torch.einsum("bd,dc->bc", x, m.w), w=nn.Parameter(torch.randn(8, 5))),
        r"parameter 'w', shape \(8, 5\), may be its head",
    ),
    "NormedLinear": (lambda: Other(NormedLinear()), "'fc', a NormedLinear, which is not a torch.nn.Linear"),
    "average": (
        lambda: Other(linear(), lambda m, x: (m.fc(x) + m.teacher(x)) / 2, teacher=linear()),
        "the average of 'fc', 'teacher'",
    ),
    "copy": (
        lambda: Other(h := linear(), lambda m, x: (m.fc(x), m.teacher(x))[0], teacher=copy.deepcopy(h)),
        "'fc' and 'teacher' return the same logits.*head='fc'",
    ),
    "CLIP": (
        lambda: Other(linear(), lambda m, x: 100 * m.fc(F.normalize(x))),
        r"that of 'fc', scaled.*100 times.*temperature=0\.01",
    ),
    "softmax": (lambda: Other(linear(), lambda m, x: m.fc(x).softmax(1)), "the softmax of what 'fc' returns"),
    "log_softmax": (lambda: Other(linear(), lambda m, x: m.fc(x).log_softmax(1)), "the log_softmax of"),
    "sigmoid": (lambda: Other(linear(), lambda m, x: m.fc(x).sigmoid()), "the sigmoid of"),
    "other layer": (
        lambda: Other(linear(), out=nn.LayerNorm(5), call=lambda m, x: m.out(m.fc(x))),
        "'out', a LayerNorm",
    ),
    "tokens": (lambda: nn.Sequential(nn.Flatten(2), nn.Linear(144, 9)), "logits per token or position.*fast_gradnorm"),
    "several outputs": (
        lambda: Other(linear(), lambda m, x: (m.fc(x), m.second(x)), second=linear(3)),
        "several outputs, made by 'fc', 'second'.*Name 'fc'",
    ),
    "one vector": (lambda: Other(linear(1), lambda m, x: m.fc(x)[:, 0]), r"expected logits \(B, C\)"),
    "exported": (lambda: torch.export.export(small(), (images(),)).module(), "traced or exported program"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_has_no_linear_head_is_told_so(kind):
    make, message = OTHERS[kind]
    with pytest.raises(ValueError, match=message):
        GradNorm(make().to(DEVICE)).score(images())


def test_what_cannot_be_looked_into_is_told_so():
    scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(432, 5)).eval())
    for model in (scripted, torch.jit.freeze(scripted), torch.nn.DataParallel(scripted)):
        with pytest.raises(TypeError, match=r"TorchScript module.*fast_gradnorm\(features, weight, bias\)"):
            GradNorm(model)
    with pytest.raises(TypeError, match=r"got ExportedProgram, a program without layers.*exported from"):
        GradNorm(torch.export.export(small(), (images(),)))
    with pytest.raises(TypeError, match="got the class Small; give an instance"):
        GradNorm(Small)
    with pytest.raises(TypeError, match="dict with the keys 'a', 'b'; wrap the model"):
        GradNorm(small(output=lambda z: {"a": z, "b": z})).score(images())
    with pytest.raises(TypeError, match="list of str; wrap"):
        GradNorm(small(output=lambda z: ["a"])).score(images())
    with pytest.raises(ValueError, match="per token or position"):
        GradNorm(nn.Sequential(nn.Flatten(2), nn.Linear(144, 9)).to(DEVICE), "1").score(images())


def test_what_is_usual_needs_no_words():
    """An averaged model, logits with the features, an embedding before the head, one output of several by name."""
    torch.manual_seed(0)
    averaged = torch.optim.swa_utils.AveragedModel(small())
    assert torch.equal(GradNorm(averaged).score(images()), GradNorm(averaged.module).score(images()))
    pairs = {
        "features": Other(linear(), lambda m, x: (m.fc(x), x)),
        "embedding": Other(linear(), lambda m, x: (m.fc(e := m.proj(x)), e), proj=nn.Linear(8, 8)),
    }
    for model in pairs.values():
        detector = GradNorm(model.to(DEVICE))
        assert detector.score(images()).isfinite().all() and detector.head_name == "fc"
    two = Other(linear(), lambda m, x: (m.fc(x), m.second(x)), second=linear(3)).to(DEVICE)
    assert GradNorm(two, "fc").score(images()).isfinite().all()
