"""ODIN and Mahalanobis, against the formulas of their papers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gradnorm_fast.baselines import Mahalanobis, odin, odin_from_logits

from families import families


def classifier(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    return nn.Sequential(*layers).eval()


def images(n=6, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("classes", "most"), [(2, None), (10, None), (1000, 1000), (128256, 60)])
def test_the_excess_of_the_largest_probability(classes, most):
    """Two roundings to float32 cost 2⁻²³, the sums in float64, here and in the oracle, C·2⁻⁵⁰ each."""
    rtol = 2.0**-23 + classes * 2.0**-49
    for name, z, t in families(classes, most):
        for temperature in {t, 1000.0}:
            d = (z.double() - z.double().amax(1, keepdim=True)) / temperature
            mean = d.expm1().mean(1)  # C·max p − 1 = 1/(1 + mean) − 1
            expected = -mean / (1 + mean)
            found = odin_from_logits(z, temperature).double()
            torch.testing.assert_close(found, expected, rtol=rtol, atol=0.0, msg=f"{name}, T = {temperature}")


def test_rows_that_tie_in_float32_do_not_tie():
    z = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert len(torch.softmax(z / 1000, 1).amax(1).unique()) < 50
    assert len(odin_from_logits(z).unique()) > 450
    assert odin_from_logits(z.view(5, 100, 1000)).shape == (5, 100)


def test_odin_without_perturbation_is_one_forward_pass():
    model, x = classifier(), images()
    with torch.no_grad():
        assert torch.equal(odin(model, x), odin_from_logits(model(x)))


@pytest.mark.parametrize("std", [None, [0.2, 0.5, 1.0]])
def test_odin_moves_the_images_as_its_authors_do(std):
    model, epsilon, temperature = classifier().double(), 0.0014, 1000.0
    x = images().double().requires_grad_()
    logits = model(x) / temperature
    loss = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
    step = torch.autograd.grad(loss, x)[0].sign()
    if std:
        step = step / torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    with torch.no_grad():
        moved = model(x - epsilon * step)
        assert (moved.softmax(1).amax(1) > (model(x).softmax(1)).amax(1)).all()
    found = odin(model, x.detach(), epsilon=epsilon, std=std)
    torch.testing.assert_close(found, odin_from_logits(moved), rtol=1e-9, atol=0.0)


def test_confident_images_are_moved_too():
    """1 − max p = 0 in float32: the gradient as it is written is 0, and so would be its sign."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    model[1].weight.data = torch.tensor([[40.0, 1, 0, 2], [-40, 2, 1, 0], [0, 0, 3, -1]])
    x = torch.tensor([[[1.0, 0.5, 0.5, 0.5]]])
    assert model(x).softmax(1).amax() == 1.0
    with torch.no_grad():
        assert (odin(model, x, temperature=1.0, epsilon=0.1) >= 2.0).all()
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    odin(model, x, temperature=0.5, epsilon=0.1)
    handle.remove()
    assert ((seen[-1] - x).abs() > 0.05).all()


def test_odin_leaves_the_model_and_the_images():
    model, x = classifier().train(), images()
    before, kept = copy.deepcopy(model.state_dict()), x.clone()
    odin(model, x, epsilon=0.01)
    assert model.training and torch.equal(x, kept) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert odin(model, x[:0], epsilon=0.01).shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature: expected a finite positive number"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number"),
        ({"epsilon": -0.1}, ValueError, "epsilon: expected a finite number >= 0"),
        ({"epsilon": float("nan")}, ValueError, "epsilon"),
        ({"epsilon": 0.1, "std": [1.0]}, ValueError, "std: expected a positive number for each of the 3 channels"),
        ({"epsilon": 0.1, "std": 3}, ValueError, "std: expected a positive number for each of the 3 channels"),
        ({"images": images()[0, 0, 0]}, TypeError, "images: expected a batch"),
    ],
)
def test_odin_refuses_what_does_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        odin(classifier(), options.pop("images", images()), **options)


def test_logits_that_do_not_fit():
    for logits in ([1.0, 2.0], torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 0)):
        with pytest.raises(TypeError, match="logits: expected a floating-point tensor"):
            odin_from_logits(logits)


def features_and_labels(n=300, depth=6, classes=4):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    mixing = torch.randn(depth, depth, generator=generator)
    means = 3 * torch.randn(classes, depth, generator=generator)
    return means[labels] + torch.randn(n, depth, generator=generator) @ mixing, labels


def test_mahalanobis_distances():
    x, y = features_and_labels()
    detector = Mahalanobis().fit(x, y)
    a, labels = x.double().numpy(), y.numpy()
    means = np.stack([a[labels == c].mean(0) for c in range(4)])
    covariance = np.cov((a - means[labels]).T, bias=True)
    offsets = a[:50, None] - means
    distances = np.einsum("ncd,de,nce->nc", offsets, np.linalg.inv(covariance), offsets)
    np.testing.assert_allclose(detector.score(x[:50]).numpy(), -distances.min(1), rtol=1e-9)
    assert detector.score(x + 100).max() < detector.score(x).min()
    torch.testing.assert_close(detector.means, torch.from_numpy(means))
    # any labels, any affine map of the features
    moved = Mahalanobis().fit((x * 3 - 5).numpy(), (y * 7 - 2).numpy())
    torch.testing.assert_close(moved.score(x * 3 - 5), detector.score(x), rtol=1e-5, atol=1e-6)
    assert moved.classes.tolist() == [-2, 5, 12, 19]


def test_mahalanobis_with_fewer_images_than_features():
    x, y = features_and_labels(n=5)
    assert Mahalanobis().fit(x, y).score(x).isfinite().all()


def test_mahalanobis_poisons_one_row_only():
    x, y = features_and_labels()
    detector = Mahalanobis().fit(x, y)
    expected = detector.score(x)
    x[3, 1] = torch.inf
    found = detector.score(x)
    assert found[3].isnan() and torch.equal(found[4:], expected[4:])
    assert detector.score(x[:0]).shape == (0,)


def test_mahalanobis_refuses_what_does_not_fit():
    x, y = features_and_labels()
    with pytest.raises(ValueError, match="no class means yet"):
        Mahalanobis().score(x)
    for features, labels, error, message in (
        (x[0], y, ValueError, r"features: expected shape \(N, D\)"),
        ("x", y, TypeError, "features: expected a tensor"),
        (x, y[:5], ValueError, r"labels: expected integers of shape \(300,\)"),
        (x, y.float(), ValueError, "labels: expected integers"),
        (x, "abc", TypeError, "labels: expected a tensor"),
        (x * torch.nan, y, ValueError, "300 not finite"),
        (x[:1], y[:1], ValueError, "at least two finite rows"),
    ):
        with pytest.raises(error, match=message):
            Mahalanobis().fit(features, labels)
    with pytest.raises(ValueError, match=r"expected shape \(N, 6\) as in fit"):
        Mahalanobis().fit(x, y).score(x[:, :3])
