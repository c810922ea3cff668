"""The baselines of the paper's Table 1, its ablations, and the command that makes them all."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from gradnorm_fast import bit, fast_gradnorm, layer_gradnorms
from gradnorm_fast.baselines import Mahalanobis, odin, odin_from_logits
from gradnorm_fast.cli import scorers
from gradnorm_fast.cli.images import read_image
from gradnorm_fast.cli.inputs import Input, evenly_spaced
from gradnorm_fast.cli.paper import PUBLISHED, ROWS, beside_published
from gradnorm_fast.evaluation import evaluate
from gradnorm_fast.layers.groups import layer_groups
from gradnorm_fast.models import default_transform

from command_line import FEATURES_RUN, MODEL_RUN, run, table

SETS = ("--id", "id", "--ood", "a=ood")


def small(place):
    sys.path.insert(0, str(place))
    return importlib.import_module("own").small().eval()


def images(folder):
    transform = default_transform()
    return torch.stack([transform(read_image(Input(str(p), str(p)))) for p in sorted(Path(folder).rglob("*.png"))])


def results(folder):
    return json.loads(Path(folder, "results.json").read_text())


def of(results, method, name="a"):
    return results[name][method]["auroc"], results[name][method]["fpr95_id_positive"]


def expected(inside, outside):
    metrics = evaluate(inside, outside)
    return pytest.approx((metrics["auroc"], metrics["fpr95_id_positive"]))


@pytest.fixture
def truth(place):
    """The model, and of the two sets images, features and logits."""
    model = small(place)
    x = [images("id"), images("ood")]
    with torch.no_grad():
        features = [model[:4](images) for images in x]
        return model, x, features, [model[4](f) for f in features]


def test_baselines(place, truth, capsys):
    _, _, features, logits = truth
    assert run("eval", *MODEL_RUN, *SETS, "--baselines", "odin", "mahalanobis", "--out", "r") == 0
    found = results("r")["results"]
    assert of(found, "ODIN") == expected(*map(odin_from_logits, logits))
    detector = Mahalanobis().fit(features[0][::2], logits[0][::2].argmax(1))
    assert of(found, "Mahalanobis") == expected(detector.score(features[0][1::2]), detector.score(features[1]))
    note = "fitted to every other of the 20 ID images, scored on the rest; classes as predicted"
    assert note in Path("r/table.md").read_text() and note in capsys.readouterr().out
    assert found["a"]["Mahalanobis"]["n_id"] == 10 and found["a"]["GradNorm"]["n_id"] == 20
    np.testing.assert_allclose(np.load("r/features-a.npy"), features[1], rtol=1e-5, atol=1e-6)
    # the same from features
    np.save("W.npy", truth[0][4].weight.detach())
    np.save("b.npy", truth[0][4].bias.detach())
    sets = ("--id", "r/features-id.npy", "--ood", "a=r/features-a.npy")
    both = ("--baselines", "odin", "mahalanobis", "--ablation", "norm")
    assert run("eval", *FEATURES_RUN, *sets, *both, "--out", "s") == 0
    again = results("s")
    assert all(of(again["results"], m) == of(found, m) for m in found["a"])
    assert list(again["ablation"]) == ["norm"]
    sets = ("--imagenet", "r/features-id.npy", "--sun", "r/features-a.npy")
    assert run("paper", *FEATURES_RUN, *sets, "--out", "p") == 0
    assert list(results("p")["ablation"]) == ["norm", "temperature", "factors"]  # not layers


def test_mahalanobis_of_training_images(place, truth):
    _, _, features, _ = truth
    for i, path in enumerate(sorted(Path("id").rglob("*.png"))):
        Path(f"train/{i % 3}").mkdir(parents=True, exist_ok=True)
        Path(f"train/{i % 3}/{i:02}.png").write_bytes(path.read_bytes())
    train = ("--baselines", "mahalanobis", "--train", "train")
    assert run("eval", *MODEL_RUN, *SETS, *train, "--out", "r") == 0
    detector = Mahalanobis().fit(features[0], torch.arange(20) % 3)
    assert of(results("r")["results"], "Mahalanobis") == expected(*map(detector.score, features))
    assert "fitted to the 20 training images; classes as labelled" in results("r")["notes"][0]
    assert "train" not in results("r")["results"]


def test_ablation_from_one_set_of_features(place, truth):
    model, _, features, _ = truth
    assert run("eval", *MODEL_RUN, *SETS, "--ablation", "--out", "r") == 0
    found = results("r")["ablation"]
    assert list(found["norm"]["a"]) == ["L0.3", "L0.8", "L1", "L2", "L3", "L4", "L∞"]
    weight, bias = model[4].weight.detach(), model[4].bias.detach()
    for label, p in (("L0.3", 0.3), ("L1", 1.0), ("L3", 3.0), ("L∞", float("inf"))):
        assert of(found["norm"], label) == expected(*(fast_gradnorm(x, weight, bias, p=p) for x in features))
    for t in (0.25, 1, 1024):
        scores = [fast_gradnorm(x, weight, bias, temperature=t) for x in features]
        assert of(found["temperature"], f"{t:g}") == expected(*scores)
    assert of(found["factors"], "feature norm") == expected(*(x.abs().sum(1) for x in features))
    for part in found:
        assert Path(f"r/ablation-{part}.png").read_bytes()[:4] == b"\x89PNG"
        assert len(table(f"r/ablation-{part}.csv")) == 2 * len(found[part]["a"])
        assert "| average" in Path(f"r/ablation-{part}.md").read_text()


def test_layers_and_moved_images_take_a_pass_of_their_own(place, truth, monkeypatch, capsys):
    model, x, _, _ = truth
    more = ("--baselines", "odin", "--odin-epsilon", 0.02, "--ablation", "layers", "--batch-size", 5)
    arguments = ("eval", *MODEL_RUN, *SETS, *more, "--out", "r")
    real, sizes = scorers.layer_gradnorms, []

    def interrupted(model, images, **options):
        sizes.append(len(images))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return real(model, images, **options)

    monkeypatch.setattr(scorers, "layer_gradnorms", interrupted)
    assert run(*arguments) == 130
    assert run(*arguments) == 2
    assert "r/scores-id.csv has kept 20 rows" in capsys.readouterr().err
    assert run(*arguments, "--resume") == 0
    assert sizes == [5, 5, 5, 5, 5, 5, 5, 2]
    found = results("r")
    assert of(found["results"], "ODIN") == expected(*(odin(model, images, epsilon=0.02) for images in x))
    assert "epsilon 0.02" in found["notes"][0]
    assert list(found["ablation"]["layers"]["a"]) == ["0", "4", "all"]
    for layers in ("0", "4", "all"):
        names = "all" if layers == "all" else [layers]
        scores = [real(model, images, layers=names) for images in x]
        assert of(found["ablation"]["layers"], layers) == expected(*scores)
    columns = table("r/gradients-a.csv")[0]
    assert list(columns) == ["path", "odin", "gradnorm of 0", "gradnorm of 4", "gradnorm of all"]
    assert not list(Path("r").glob("*part*"))


def test_what_is_refused(place, capsys):
    Path("few.csv").write_text("path,gradnorm\na,1\n")
    features = ("eval", *FEATURES_RUN, "--id", "F.npy", "--ood", "a=G.npy", "--out", "r")
    model = ("eval", *MODEL_RUN, *SETS, "--out", "r")
    files = ("eval", "--id", "few.csv", "--ood", "a=few.csv", "--out", "r")
    paper = ("paper", "--imagenet", "id", "--out", "r")
    for arguments, message in (
        ((*model, "--baselines", "knn"), "invalid choice: 'knn'"),
        ((*model, "--odin-epsilon", 0.1), "odin-epsilon: it goes with --baselines odin"),
        ((*model, "--baselines", "odin", "--odin-epsilon", "-1"), "odin-epsilon: expected a number >= 0"),
        ((*model, "--train", "ood"), "train: it goes with --baselines mahalanobis"),
        ((*model, "--baselines", "mahalanobis", "--train", "none"), "no file or folder none"),
        ((*model, "--baselines", "mahalanobis", "--train", "F.npy"), "train: expected images, as id, got features"),
        ((*model, "--layers", "all", "--ablation"), "layers: it does not go with"),
        ((*files, "--ablation"), "ablation: expected images or features"),
        ((*features, "--ablation", "layers"), "ablation: layers: expected images and --model"),
        ((*features, "--baselines", "odin", "--odin-epsilon", 0.1), "odin-epsilon: expected images and --model"),
        ((*features, "--limit", 3), "limit: it goes with images"),
        (paper, "checkpoint: bits_r101x1 needs its published weights"),
        ((*paper, "--model", "own:small"), "expected at least one OOD set, by --inaturalist"),
        ((*paper, "--sun", "ood", "--checkpoint", "few.csv"), "cannot read few.csv"),
    ):
        assert run(*arguments) == 2, arguments
        err = capsys.readouterr().err
        assert message in err, err
    assert not Path("r").exists()


def test_a_limit_takes_images_evenly(place):
    assert run("eval", *MODEL_RUN, *SETS, "--limit", 5, "--out", "r") == 0
    everything = sorted(str(p) for p in Path("id").rglob("*.png"))
    assert [row["path"] for row in table("r/scores-id.csv")] == everything[::4]
    assert evenly_spaced([1, 2, 3], 3) == evenly_spaced([1, 2, 3], 9) == [1, 2, 3]
    assert evenly_spaced(list(range(7)), 3) == [0, 2, 4]


# The paper


def test_published_averages():
    *sets, average = PUBLISHED["GradNorm"].values()
    assert np.mean(sets, 0) == pytest.approx(average, abs=0.0051)


def test_published_figures_stand_beside_ours():
    ours = {name: {"GradNorm": {"fpr95": 0.1, "auroc": 0.9}} for name in ("SUN", "Textures", "average")}
    found, rows = beside_published(ours, same_network=False)
    assert rows[-2:] == ["GradNorm", "GradNorm, published (another network)"] and len(rows) == 2
    assert found["SUN"]["GradNorm"] == ours["SUN"]["GradNorm"]
    assert found["SUN"][rows[-1]]["auroc"] == pytest.approx(0.8903)
    assert np.isnan(found["average"][rows[-1]]["auroc"])  # of four sets, where these are two
    ours |= {name: ours["SUN"] for name in ("iNaturalist", "Places")}
    found, rows = beside_published(ours, same_network=False)
    assert found["average"][rows[-1]]["auroc"] == pytest.approx(0.8631) and rows[0].startswith("MSP, published")
    assert found["average"][rows[0]]["fpr95"] == pytest.approx(0.7696) and np.isnan(found["SUN"][rows[0]]["fpr95"])
    assert beside_published(ours, same_network=True)[1][-1] == "GradNorm, published"


def test_paper_is_eval_with_its_settings(place, capsys):
    sets = ("--imagenet", "id", "--sun", "ood", "--textures", "ood/deep")
    every = ("--ablation", "norm", "layers")
    assert run("paper", *MODEL_RUN, *sets, *every, "--out", "p") == 0
    out = capsys.readouterr().out
    text = Path("p/table1.md").read_text()
    assert text.splitlines()[0] in out and "this is another network, own:small" in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row for row in rows if "published" not in row] == list(ROWS)
    more = ("--convention", "official", "--baselines", "odin", "mahalanobis")
    own = ("--id", "id", "--ood", "SUN=ood", "--ood", "Textures=ood/deep")
    assert run("eval", *MODEL_RUN, *own, *more, *every, "--out", "e") == 0
    for name in ("table.md", "table.csv", *(f"ablation-{part}.csv" for part in every[1:])):
        assert Path("e", name).read_text() == Path("p", name).read_text()


class SmallBit(bit.ResNetV2):
    def __init__(self, classes=5):
        super().__init__((1, 2, 1, 1), 32, classes)


def weights(model, seed=0):
    """Random ones in the layout of the published files."""
    random = np.random.default_rng(seed)
    arrays = {"global_step": np.zeros(())}
    for name, value in model.state_dict().items():
        array = random.standard_normal(value.shape, dtype=np.float32)
        arrays[bit.array_name(name)] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return arrays


def test_the_network_of_the_paper(place, monkeypatch):
    monkeypatch.setattr(bit, "ResNetV2", SmallBit)
    monkeypatch.setattr(bit, "IMAGE_SIZE", 32)
    np.savez("w.npz", **weights(SmallBit()))
    arguments = ("paper", *MODEL_RUN[2:], "--classes", 5, "--imagenet", "id", "--sun", "ood", "--ablation", "factors")
    assert run(*arguments, "--checkpoint", "w.npz", "--out", "p") == 0
    text = Path("p/table1.md").read_text()
    assert "GradNorm, published |" in text and "another network" not in text
    assert results("p")["head"] == "head.conv" and "size=[32, 32]" in results("p")["preprocessing"]


def test_published_weights_give_what_timm_makes_of_them(tmp_path):
    timm = pytest.importorskip("timm")
    model = SmallBit().eval()
    np.savez(tmp_path / "w.npz", **weights(model))
    bit.load_npz(model, tmp_path / "w.npz")
    options = {"num_classes": 5, "stem_chs": 32, "stem_type": "fixed"}
    theirs = timm.models.ResNetV2([1, 2, 1, 1], [128, 256, 512, 1024], **options).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    x = torch.randn(2, 3, 70, 65, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_the_size_of_the_network():
    with torch.device("meta"):
        model = bit.ResNetV2()
    shapes = {bit.array_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == 44_541_480 and len(shapes) == 306
    assert shapes["resnet/block3/unit23/b/standardized_conv2d/kernel"] == (256, 256, 3, 3)


def test_weights_that_do_not_fit(tmp_path):
    model, path = SmallBit(), tmp_path / "w.npz"
    arrays = weights(model)
    kernel = "resnet/head/conv2d/kernel"
    for changed, message in (
        ({"a": np.zeros(2)}, "expected arrays named resnet/.* got a"),
        ({k: v for k, v in arrays.items() if k != kernel}, f"expected the array {kernel}"),
        (arrays | {kernel: np.zeros((1, 1, 1024, 7), np.float32)}, r"\(5, 1024, 1, 1\) floats .*--classes"),
        (arrays | {"resnet/block9/x": np.zeros(1)}, "of another network: it has resnet/block9/x too"),
        (arrays | {kernel: np.array(["x"], object)}, "cannot read .* as weights in .npz"),
    ):
        np.savez(path, **changed)
        with pytest.raises(ValueError, match=message):
            bit.load_npz(model, path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="cannot read"):
        bit.load_npz(model, path)
    with pytest.raises(ValueError, match="no file"):
        bit.load_npz(model, tmp_path / "none.npz")


def test_stages_of_models():
    def stages(name):
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        groups = layer_groups(model)
        assert groups["all"] == [n for n, _ in model.named_parameters()]
        parts = [name for group in list(groups.values())[:-1] for name in group]
        assert len(parts) == len(set(parts)) and set(parts) <= set(groups["all"])
        return list(groups)

    assert stages("resnet50") == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc", "all"]
    assert stages("densenet121")[:3] == ["features.conv0", "features.norm0", "features.denseblock1"]
    assert stages("vit_b_16")[1] == "encoder.layers.encoder_layer_0"
    assert list(layer_groups(torch.nn.Linear(2, 3))) == ["all"]
    with torch.device("meta"):
        network = bit.ResNetV2()
    assert list(layer_groups(network))[:3] == ["root", "body.block1", "body.block2"]


def test_layer_norms_of_the_network_of_the_paper():
    model = SmallBit().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
    x = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = layer_gradnorms(model, x, per_layer=True)
    assert found.one_by_one == ()
    for i in range(2):
        loss = -torch.log_softmax(model(x[i : i + 1]), 1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, g in zip(found, gradients, strict=True):
            torch.testing.assert_close(found[name][i], g.abs().sum(), rtol=1e-9, atol=1e-12, msg=name)
