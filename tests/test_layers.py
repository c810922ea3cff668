"""Gradient norms of any layer, against autograd through the whole model, one sample at a time."""

import copy
import math
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from gradnorm_fast import fast_gradnorm, layer_gradnorms
from gradnorm_fast.layers.layout import Layout, find_layout
from gradnorm_fast.layers.logit_gradient import target_gradient
from gradnorm_fast.layers.norms import p_norm

from families import deviation, families, hard_logits

NORMS = (1.0, 2.0, math.inf)


def alive(model):
    """In float64, and with no parameter or statistic at a value that hides a mistake, as a bias of 0 does."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform_loss(logits, temperature=1.0):
    return -torch.log_softmax(logits / temperature, 1).mean(1)


def gradients(model, x, loss=uniform_loss):
    """(B, ...) gradients of each parameter, by autograd; two copies of the image, for torch's batch_norm is wrong on
    one with a transposed gradient."""
    parameters = dict(model.named_parameters())
    found = {name: [] for name in parameters}
    for i in range(len(x)):
        value = loss(model(x[[i, i]]))[0]
        each = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True, allow_unused=True)
        for name, g in zip(parameters, each, strict=True):
            found[name].append(g)
    return {name: torch.stack(g) for name, g in found.items()}


def norms_of(found, p):
    return {name: torch.linalg.vector_norm(g.reshape(len(g), -1), p, dim=1) for name, g in found.items()}


def assert_exact(model, x):
    """Every parameter, every norm, to the rounding of float64; returns what was computed sample by sample."""
    truth = gradients(model, x)
    largest = max(g.abs().max() for g in truth.values())
    for p in NORMS:
        found = layer_gradnorms(model, x, p=p, per_layer=True)
        expected = norms_of(truth, p)
        assert list(found) == list(expected)
        for name in expected:  # some gradients are 0 but for rounding, as of a bias before a softmax
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-13 * largest, msg=name)
    return found.one_by_one


# Networks as they are used

TORCHVISION = {
    "squeezenet1_1": 48,
    "mobilenet_v3_small": 32,
    "shufflenet_v2_x0_5": 32,
    "mnasnet0_5": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "googlenet": 48,
}
TIMM = {
    "vit_tiny_patch16_224": 48,
    "deit_tiny_distilled_patch16_224": 32,
    "eva02_tiny_patch14_224": 28,
    "tinynet_e": 48,
    "mobilevit_xxs": 64,
    "edgenext_xx_small": 64,
    "convnextv2_atto": 64,
    "test_byobnet": 64,
}


def quietly(make, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return alive(make(*args, **options))


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_parameter_of_torchvision_classifiers(name):
    options = {"aux_logits": False} if name == "googlenet" else {}
    model = quietly(torchvision.models.get_model, name, weights=None, num_classes=7, **options)
    assert assert_exact(model, images(2, 3, TORCHVISION[name], TORCHVISION[name])) == ()


@pytest.mark.parametrize("name", TIMM)
def test_every_parameter_of_timm_classifiers(name):
    transformer = any(kind in name for kind in ("vit_tiny", "deit", "eva"))
    options = {"img_size": TIMM[name]} if transformer else {}
    model = quietly(timm.create_model, name, num_classes=7, **options)
    assert assert_exact(model, images(2, 3, TIMM[name], TIMM[name])) == ()


def test_small_transformers_of_torchvision():
    vit = torchvision.models.VisionTransformer(16, 8, 2, 2, 12, 24, num_classes=5)
    swin = torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=5)
    v2 = torchvision.models.swin_transformer.SwinTransformerBlockV2
    merging = torchvision.models.swin_transformer.PatchMergingV2
    swin_v2 = torchvision.models.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=5, block=v2, downsample_layer=merging
    )
    for model, size in ((vit, 16), (swin, 32), (swin_v2, 32)):
        assert assert_exact(quietly(lambda model=model: model), images(3, 3, size, size)) == ()


def test_big_transfer_network_of_the_paper():
    """Standardised weights: the gradient goes through the standardisation."""
    model = quietly(timm.models.ResNetV2, [1, 1], [128, 128], num_classes=5, stem_chs=32, stem_type="fixed")
    assert assert_exact(model, images(3, 3, 32, 32)) == ()


# Layers


def convolutions():
    for dimensions, cls in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        yield cls(4, 6, 3, stride=2, padding=1, dilation=2), dimensions
        yield cls(4, 6, 2, padding="same"), dimensions
        yield cls(4, 6, 1, stride=2, groups=2), dimensions
    for mode in ("zeros", "reflect", "replicate", "circular"):
        yield nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), padding_mode=mode, bias=False), 2
    yield nn.Conv2d(4, 8, 3, groups=4), 2
    yield nn.Conv2d(4, 8, (3, 4), padding="same", dilation=(1, 3)), 2
    yield nn.Conv2d(4, 6, 5, padding="valid"), 2
    yield nn.Conv2d(4, 6, 11), 2  # one position
    yield nn.Conv2d(32, 4, 3), 2  # samples as groups
    yield nn.ConvTranspose1d(4, 6, 3, stride=2), 1
    yield nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), 2
    yield nn.ConvTranspose3d(4, 6, 2), 3


class Pooled(nn.Module):
    def __init__(self, *layers, classes=3):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.fc = nn.LazyLinear(classes)

    def forward(self, x):
        return self.fc(self.layers(x).flatten(2).tanh().mean(2))


def pooled(*layers, x):
    model = Pooled(*layers).double()
    model(x)
    return alive(model)


@pytest.mark.parametrize(("layer", "dimensions"), list(convolutions()), ids=str)
def test_convolutions(layer, dimensions):
    channels = layer.in_channels
    x = images(3, channels, *[11, 12, 13][:dimensions])
    assert assert_exact(pooled(layer, x=x), x) == ()


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.LayerNorm([6, 5]),
        nn.LayerNorm(5, bias=False),
        nn.RMSNorm(5),
        nn.PReLU(),
        nn.PReLU(4),
        nn.Linear(5, 7),
        nn.Sequential(nn.Flatten(2), nn.Linear(30, 4)),
    ],
    ids=str,
)
def test_normalisations_and_others(layer):
    x = images(3, 4, 6, 5)
    model = pooled(nn.Conv2d(4, 4, 1), layer, x=x)
    assert assert_exact(model, x) == ()
    assert (
        assert_exact(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)) == ()
    )


class Called(nn.Module):
    """A few parameters, and a function that uses them in some way."""

    def __init__(self, call, **parameters):
        super().__init__()
        self.call = call
        generator = torch.Generator().manual_seed(3)
        for name, value in parameters.items():
            if isinstance(value, tuple):
                value = nn.Parameter(torch.randn(value, generator=generator, dtype=torch.float64))
            setattr(self, name, value.double() if isinstance(value, nn.Module) else value)

    def forward(self, x):
        return self.call(self, x)


def attention(**options):
    return nn.MultiheadAttention(8, 2, **options)


def first(output):
    return output[0]


def written_into(zeros, rows):
    zeros[:, 0] = rows
    return zeros


def heads_first(x):
    return x.unflatten(2, (2, 4)).transpose(1, 2)


def windows(x):
    """(B, T, 8) to (4B, T, 2)"""
    return x.unflatten(2, (4, 2)).transpose(1, 2).flatten(0, 1)


USES = {
    "a layer used twice": Called(lambda m, x: m.b(m.a(m.a(x).tanh())).mean(1), a=nn.Linear(8, 8), b=nn.Linear(8, 3)),
    "tied weights": Called(lambda m, x: F.linear(m.a(x), m.a.weight[:3]).mean(1), a=nn.Linear(8, 8)),
    "a class token": Called(
        lambda m, x: m.a(torch.cat([m.token.expand(len(x), -1, -1), x], 1)).tanh()[:, :2].sum(1),
        token=(1, 1, 8),
        a=nn.Linear(8, 3),
    ),
    "positions": Called(
        lambda m, x: m.a((x + m.position).sin() * m.scale).mean(1), position=(5, 8), scale=(8,), a=nn.Linear(8, 3)
    ),
    "in place": Called(
        lambda m, x: m.a(x.sin().add_(m.position).relu_()).relu_().mean(1), position=(5, 8), a=nn.Linear(8, 3)
    ),
    "a matrix": Called(lambda m, x: (x @ m.a).tanh().mean(1), a=(8, 3)),
    "batches of matrices": Called(lambda m, x: (heads_first(x) @ m.a).mean((1, 2)), a=(2, 4, 3)),
    "a matrix from the left": Called(lambda m, x: (m.a @ x).tanh()[:, :, :3].mean(1), a=(6, 5)),
    "a standardised weight": Called(
        lambda m, x: F.linear(x, F.layer_norm(m.a, (8,)) * m.gain, m.b).tanh().mean(1), a=(3, 8), gain=(3, 1), b=(3,)
    ),
    "positions first": Called(
        lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().mean(0)), a=nn.Linear(8, 8), b=nn.Linear(8, 3)
    ),
    "positions folded": Called(
        lambda m, x: m.b(m.a(x.transpose(0, 1).flatten(0, 1)).tanh().unflatten(0, (5, -1)).mean(0)),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 3),
    ),
    "windows": Called(
        lambda m, x: m.b((m.a(windows(x)) + m.c).tanh().mean(1).view(len(x), 4, 3).sum(1)),
        a=nn.Linear(2, 3),
        c=(5, 3),
        b=nn.Linear(3, 3),
    ),
    "attention": Called(
        lambda m, x: m.b(first(m.a(x, x, x))).mean(1), a=attention(batch_first=True), b=nn.Linear(8, 3)
    ),
    "attention, positions first": Called(
        lambda m, x: m.b(first(m.a(*[x.transpose(0, 1)] * 3))).mean(0), a=attention(add_bias_kv=True), b=nn.Linear(8, 3)
    ),
    "attention of other inputs": Called(
        lambda m, x: m.b(first(m.a(x, x[..., :3], x[..., 3:7]))).mean(1),
        a=attention(batch_first=True, kdim=3, vdim=4),
        b=nn.Linear(8, 3),
    ),
    "an encoder layer": Called(
        lambda m, x: m.b(m.a(x)).mean(1), a=nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), b=nn.Linear(8, 3)
    ),
    "a mask of attention": Called(
        lambda m, x: F.scaled_dot_product_attention(*[heads_first(x)] * 3, attn_mask=m.a).mean(2)[:, 0],
        a=(2, 5, 5),
    ),
    "a learned query": Called(
        lambda m, x: F.scaled_dot_product_attention(m.a.expand(len(x), -1, -1), x, m.b(x)).mean(1),
        a=(1, 2, 8),
        b=nn.Linear(8, 3),
    ),
    "a parameter that is not used": Called(lambda m, x: m.a(x).mean(1), a=nn.Linear(8, 3), b=nn.Linear(8, 3), c=()),
    "a branch that is not used": Called(lambda m, x: (m.b(x), m.a(x).mean(1))[1], a=nn.Linear(8, 3), b=nn.Linear(8, 3)),
    "a scalar": Called(lambda m, x: m.a(x).mean(1) * m.s, a=nn.Linear(8, 3), s=()),
    "no gradient": Called(lambda m, x: m.a(x).mean(1) + m.b(x).detach().mean(1), a=nn.Linear(8, 3), b=nn.Linear(8, 3)),
    "written into": Called(
        lambda m, x: (written_into(x.new_zeros(len(x), 2, 3), m.a(x).mean(1)) * m.b).sum(1),
        a=nn.Linear(8, 3),
        b=(2, 3),
    ),
    "weight normalised": Called(lambda m, x: m.a(x).mean(1), a=nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))),
}


@pytest.mark.parametrize("use", USES)
def test_uses_of_parameters(use):
    assert assert_exact(USES[use].eval(), images(4, 5, 8)) == ()


UNKNOWN = {
    "einsum": Called(
        lambda m, x: torch.einsum("btd,dc->bc", x.tanh(), m.a) + m.b(x).mean(1), a=(8, 3), b=nn.Linear(8, 3)
    ),
    "a recurrent layer": Called(
        lambda m, x: m.b(m.a(x)[0][:, -1]), a=nn.GRU(8, 4, batch_first=True), b=nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("use", UNKNOWN)
def test_what_has_no_rule_is_computed_sample_by_sample_and_named(use):
    model = UNKNOWN[use].eval()
    with pytest.warns(UserWarning, match=r"no rule for the use of a.*sample by sample"):
        names = assert_exact(model, images(3, 5, 8))
    assert names == tuple(name for name in dict(model.named_parameters()) if name.split(".")[0] == "a")


def test_a_function_that_torch_does_not_see():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum((0, 1))

    for frozen in (False, True):
        model = Called(lambda m, x: m.b(Twice.apply(x, m.a)).mean(1), a=(8,), b=nn.Linear(8, 3))
        x, expected = images(3, 5, 8), None
        expected = norms_of(gradients(model, x), 1.0)
        model.requires_grad_(not frozen)
        with pytest.warns(UserWarning, match="no rule for the use of a;"):
            found = layer_gradnorms(model, x, per_layer=True)
        torch.testing.assert_close(dict(found), expected, rtol=1e-9, atol=0.0)


def test_a_layer_that_was_zero_is_learned_again():
    """Zeros fit every layout; a fine-tuned layer often starts so."""
    model = Called(
        lambda m, x: m.b(m.a(x.flatten(0, 1)).unflatten(0, (-1, 5)).mean(1)), a=nn.Linear(8, 6), b=nn.Linear(6, 3)
    )
    nn.init.zeros_(model.a.weight)
    x = images(3, 5, 8)
    with pytest.warns(UserWarning, match="no rule"):
        layer_gradnorms(model, x)
    nn.init.normal_(model.a.weight, generator=torch.Generator().manual_seed(0))
    assert layer_gradnorms(model, x, per_layer=True).one_by_one == ()


def test_samples_that_depend_on_each_other_are_run_one_by_one():
    model = Called(
        lambda m, x: m.b((m.a(x) - m.a(x).mean(0)).tanh()).mean(1) + m.a(x)[:, 0, :3],
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 3),
    )
    x = images(3, 5, 8)
    with pytest.warns(UserWarning, match="no rule"):
        found = layer_gradnorms(model, x, layers=["b"])
    alone = torch.cat([layer_gradnorms(model, x[i : i + 1], layers=["b"]) for i in range(3)])
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=0.0)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, ids):
        return self.fc(self.embedding(ids).tanh().mean(1))


def test_embeddings():
    ids = torch.tensor([[1, 1, 2, 0, 3], [4, 0, 0, 5, 4], [7, 8, 9, 10, 1]])
    model = alive(Text())
    assert assert_exact(model, ids) == ()
    tied = Called(lambda m, x: F.linear(m.e(x).tanh().mean(1), m.e.weight), e=nn.Embedding(11, 6))
    assert assert_exact(tied, ids) == ()


def test_a_model_that_caches_what_it_derives_from_its_parameters():
    model = quietly(timm.create_model, "levit_128s", num_classes=5)
    x = images(2, 3, 224, 224)
    found = layer_gradnorms(model, x, per_layer=True)
    assert not any(getattr(m, "attention_bias_cache", None) for m in model.modules())
    again = layer_gradnorms(model, x, per_layer=True)
    torch.testing.assert_close(dict(found), dict(again), rtol=0.0, atol=0.0)
    biases = [name for name in found if name.endswith("attention_biases")]
    assert biases and found.one_by_one == () and all((found[name] > 0).all() for name in biases)
    model.train()  # does not cache; its batch norms in evaluation mode
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    expected = norms_of(gradients(model, x[:1]), 1.0)
    torch.testing.assert_close({n: found[n][:1] for n in biases}, {n: expected[n] for n in biases}, rtol=1e-7, atol=0.0)


# Targets, norms, options


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return alive(nn.Sequential(*layers))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0, 2.0, 3.0, 64.0, math.inf])
@pytest.mark.parametrize("target", ["uniform", "predicted", "labels"])
def test_targets_norms_and_temperatures(small, target, p):
    x, labels = images(4, 3, 8, 8), torch.tensor([0, 4, -100, 2])

    def loss(z):
        if target == "uniform":
            return uniform_loss(z, 0.7) * 5  # the sum over classes
        y = z.argmax(1) if target == "predicted" else labels[i].expand(len(z))
        return F.cross_entropy(z / 0.7, y, reduction="none")

    expected = []
    for i in range(4):
        found = gradients(small, x[i : i + 1], loss)
        expected.append(torch.cat([g.flatten() for g in found.values()]).norm(p))
    given = labels if target == "labels" else target
    options = {"reduction": "sum"} if target == "uniform" else {}
    scores = layer_gradnorms(small, x, target=given, p=p, temperature=0.7, **options)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-8, atol=0.0)
    if target == "labels":
        assert scores[2] == 0.0


def test_a_loss_of_ones_own(small):
    x = images(3, 3, 8, 8)
    found = gradients(small, x, lambda z: z.logsumexp(1))
    expected = torch.cat([g.flatten(1) for g in found.values()], 1).abs().sum(1)
    torch.testing.assert_close(layer_gradnorms(small, x, loss=lambda z: z.logsumexp(1)), expected, rtol=1e-9, atol=0.0)


def test_selections(small):
    x = images(3, 3, 8, 8)
    every = layer_gradnorms(small, x, per_layer=True)
    for layers, expected in {
        "head": ["5.weight", "5.bias"],
        ("0", "1"): ["0.weight", "0.bias", "1.weight", "1.bias"],
        ("",): list(every),
        (lambda name, parameter: parameter.dim() > 1): ["0.weight", "5.weight"],
    }.items():
        found = layer_gradnorms(small, x, layers=list(layers) if isinstance(layers, tuple) else layers, per_layer=True)
        assert list(found) == expected
        torch.testing.assert_close(dict(found), {n: every[n] for n in expected}, rtol=1e-12, atol=0.0)


def test_the_head_is_the_closed_form(small):
    x = images(3, 3, 8, 8)
    with torch.no_grad():
        features = small[:-1](x)
    expected = fast_gradnorm(features, small[-1].weight.detach(), small[-1].bias.detach(), include_bias=True)
    torch.testing.assert_close(layer_gradnorms(small, x, layers="head"), expected, rtol=1e-12, atol=0.0)


def test_the_head_of_squeezenet_is_its_convolution():
    model = quietly(torchvision.models.squeezenet1_1, num_classes=5)
    assert list(layer_gradnorms(model, images(2, 3, 48, 48), layers="head", per_layer=True)) == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]


def test_layouts_are_not_taken_from_a_batch_of_equal_images():
    """Learned from other images, so that a warm-up on zeros does no harm."""
    model = Called(lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().mean(0)), a=nn.Linear(8, 8), b=nn.Linear(8, 3))
    layer_gradnorms(model, torch.zeros(5, 5, 8, dtype=torch.float64))
    assert assert_exact(model, images(5, 5, 8)) == ()


def test_the_model_is_left_as_it_was(small):
    model, x = copy.deepcopy(small), images(3, 3, 8, 8)
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(5, dtype=torch.float64)
    before, kept = copy.deepcopy(model.state_dict()), x.clone()
    expected = layer_gradnorms(small, x)
    with torch.inference_mode():
        found = layer_gradnorms(model, x.clone())
    with torch.no_grad():
        assert torch.equal(layer_gradnorms(model, x), found)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5] and torch.equal(x, kept)
    assert all(p.grad is None for p in list(model.parameters())[:-1]) and model[5].bias.grad.eq(1).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and not found.requires_grad


def test_a_model_that_writes_into_its_images(small):
    model = nn.Sequential(small, nn.Identity())
    model.forward = lambda x: small(x.sub_(0.5))
    x = images(3, 3, 8, 8)
    kept = x.clone()
    torch.testing.assert_close(layer_gradnorms(model, x), layer_gradnorms(small, x - 0.5), rtol=1e-12, atol=0.0)
    assert torch.equal(x, kept)


def test_wrappers_and_halves(small):
    x = images(3, 3, 8, 8)
    expected = layer_gradnorms(small, x)
    assert torch.equal(layer_gradnorms(nn.DataParallel(small), x), expected)
    half = copy.deepcopy(small).bfloat16()
    found = layer_gradnorms(half, x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            layer_gradnorms(copy.deepcopy(small).float(), x).double(), expected, rtol=0.05, atol=0.0
        )


def test_nan_stays_in_its_row(small):
    x = images(4, 3, 8, 8)
    expected = layer_gradnorms(small, x)
    x[1, 0, 0, 0] = torch.nan
    found = layer_gradnorms(small, x)
    assert found[1].isnan()
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-12, atol=0.0)


def test_an_empty_batch(small):
    assert layer_gradnorms(small, images(0, 3, 8, 8)).shape == (0,)
    assert {v.shape for v in layer_gradnorms(small, images(0, 3, 8, 8), per_layer=True).values()} == {(0,)}


def test_confident_rows_keep_their_digits():
    """1 − p_y = e⁻⁶⁰ … e⁻⁸⁰ in float32, where p − e_y as it is written is 0."""
    model = nn.Linear(4, 3)
    model.weight.data = torch.eye(3, 4)
    model.bias.data.zero_()
    x = torch.tensor([[60.0, 0.0, -1.0, 2.0], [0.0, 80.0, 1.0, 1.0]])
    z = x[:, :3].double()
    others = torch.logsumexp(z.scatter(1, z.argmax(1, keepdim=True), -math.inf), 1) - z.amax(1)
    expected = 2 * others.sigmoid() * (x.double().abs().sum(1) + 1)
    torch.testing.assert_close(layer_gradnorms(model, x, target="predicted").double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("classes", "most"), [(2, None), (10, None), (1000, 1000), (128256, 60)])
def test_deviations_from_uniform_keep_their_digits(classes, most):
    """Rounding an element to float32 costs 2⁻²⁴ of it, the sums in float64 C·2⁻⁵⁰, the oracle 1e-9."""
    rtol = 2.0**-24 + classes * 2.0**-50 + 1e-9
    for name, z, temperature in families(classes, most):
        found = target_gradient(z, "uniform", temperature, 1.0).double()
        torch.testing.assert_close(found.abs().sum(1), deviation(z, temperature), rtol=rtol, atol=0.0, msg=name)


def test_labels_among_hard_logits():
    for name, z, temperature in hard_logits(10):
        for y in (0, 3, 9):
            found = target_gradient(z, torch.full((len(z),), y), temperature, 1.0).double()
            d = (z.double() - z.double()[:, y : y + 1]) / temperature
            if not d.isfinite().any():
                continue  # the label is masked
            others = torch.logsumexp(d.masked_fill(torch.arange(10) == y, -math.inf), 1)
            bound = 1e-6 + 6e-8 * d.abs().masked_fill(d.isinf(), 0.0).max()
            own = -found[:, y] * temperature
            torch.testing.assert_close(own, others.sigmoid(), rtol=bound, atol=1e-37, msg=name)
            torch.testing.assert_close(found.sum(1) + 1, torch.ones(len(z)).double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("p", [0.1, 1.0, 2.0, 3.0, 64.0, math.inf])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_of_long_and_extreme_rows(p, scale):
    values = torch.rand(2, 300_001, generator=torch.Generator().manual_seed(0)) + 0.5
    values *= torch.tensor([[scale], [scale]])
    expected = torch.linalg.vector_norm(values.double() / scale, p, dim=1) * scale
    if p >= 1.0:
        torch.testing.assert_close(p_norm(values, p).double(), expected, rtol=1e-6, atol=0.0)
    few = values[:, :20]
    expected = torch.linalg.vector_norm(few.double() / scale, p, dim=1) * scale
    rtol = 1e-6 if p >= 1.0 else 1e-5
    finite = expected < 3e38
    torch.testing.assert_close(p_norm(few, p).double()[finite], expected[finite], rtol=rtol, atol=0.0)


def test_layouts():
    x = images(2, 3, 4)
    for two, one, layout in (
        (x, x[1:], Layout((1, 3, 4), 0)),
        (x.transpose(0, 1), x[1:].transpose(0, 1), Layout((3, 1, 4), 1)),
        (x.flatten(0, 1), x[1:].flatten(0, 1), Layout((3, 4), 0, 1, 3)),
        (x.transpose(0, 1).flatten(0, 1), x[1:].transpose(0, 1).flatten(0, 1), Layout((3, 4), 0, 3, 1)),
        (torch.zeros(6, 4), torch.zeros(3, 4), None),  # all samples alike
        (x.sum(0), x[1:].sum(0), None),
        (x.flip(0), x[1:], None),
    ):
        assert find_layout(two, one) == layout


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "fc"}, ValueError, 'layers: expected "all", "head", a list'),
        ({"layers": ["5", "linear"]}, ValueError, "no module 'linear'"),
        ({"layers": 3}, TypeError, "layers: expected"),
        ({"layers": [3]}, TypeError, "layers: expected"),
        ({"layers": []}, ValueError, "layers: selects none of the model's 6"),
        ({"p": 0.05}, ValueError, "p: expected 0.1"),
        ({"p": "1"}, TypeError, "p: expected a number"),
        ({"target": "label"}, ValueError, "target: expected"),
        ({"target": 3}, TypeError, "target: expected"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"target: expected labels of shape \(3,\)"),
        ({"target": torch.tensor([0.0, 1, 2])}, TypeError, "dtype int64"),
        ({"target": torch.tensor([0, 1, 5])}, ValueError, "labels 0 … 4"),
        ({"target": "predicted", "reduction": "sum"}, ValueError, "uniform target only"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"loss": uniform_loss, "temperature": 2.0}, ValueError, "loss: expected it alone"),
        ({"loss": uniform_loss, "target": "predicted"}, ValueError, "loss: expected it alone"),
        ({"loss": 3}, TypeError, "loss: expected a callable"),
        ({"loss": lambda z: z.sum()}, ValueError, r"loss: expected it to return one loss per image, shape \(3,\)"),
        ({"loss": lambda z: z.argmax(1)}, ValueError, "differentiable"),
        ({"loss": lambda z: torch.ones(3, requires_grad=True)}, ValueError, "does not depend on them"),
        ({"loss": lambda z: z[:, 0], "temperature": torch.ones(2)}, ValueError, "loss: expected it alone"),
    ],
)
def test_arguments_that_do_not_fit(small, options, error, message):
    with pytest.raises(error, match=message):
        layer_gradnorms(small, images(3, 3, 8, 8), **options)


def test_models_and_images_that_do_not_fit(small):
    x = images(3, 3, 8, 8)
    with pytest.raises(TypeError, match="model: expected a torch"):
        layer_gradnorms(lambda x: x, x)
    with pytest.raises(ValueError, match="floating-point parameters"):
        layer_gradnorms(nn.Flatten(), x)
    with pytest.raises(TypeError, match="images: expected a torch"):
        layer_gradnorms(small, [x])
    with pytest.raises(ValueError, match="images: expected a batch"):
        layer_gradnorms(small, x[0, 0, 0])
    with pytest.raises(ValueError, match=r"model: expected logits \(B, C\)"):
        layer_gradnorms(small[:1], x)


def test_batch_statistics_and_dropout_are_refused_by_name(small):
    x = images(3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"model: '1' normalises by the statistics of the batch.*call model.eval"):
        layer_gradnorms(copy.deepcopy(small).train(), x)
    untracked = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()).double()
    with pytest.raises(ValueError, match="'1' normalises by the statistics"):
        layer_gradnorms(untracked.eval(), x)
    with pytest.raises(ValueError, match="'1' is dropout in training mode"):
        layer_gradnorms(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 3)), x)

    class StochasticDepth(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (torch.rand(len(x), 1).to(x) < 0.5) if self.training else super().forward(x)

    stochastic = nn.Sequential(nn.Flatten(), StochasticDepth(192, 3)).double()
    with pytest.raises(ValueError, match="draws random numbers in training mode"):
        layer_gradnorms(stochastic, x)
    assert not layer_gradnorms(stochastic.eval(), x, per_layer=True).one_by_one
    functional = Called(lambda m, x: F.batch_norm(m.a(x), None, None, m.w, training=True), a=nn.Linear(8, 3), w=(3,))
    with pytest.raises(ValueError, match="statistics of the batch"):
        layer_gradnorms(functional, images(3, 8))
