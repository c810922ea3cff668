"""Everything that README, CONTRIBUTING and docs/ show runs as it stands there; links, figures and versions are true."""

import doctest
import importlib
import json
import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import gradnorm_fast
from gradnorm_fast import GradNorm, LayerNorms, cli, demo, demo_imagenet

import report

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OUTSIDE = re.compile(r"[a-z]+:|#")  # links that are no files of ours


class Model(nn.Module):
    """A classifier of small images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, 5)

    def forward(self, images):
        return self.fc(self.body(images))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def with_blocks(language):
    elsewhere = ["migration.md"]  # test_integrations.py runs it, beside the libraries it speaks of
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language) and page.name not in elsewhere]


@pytest.fixture
def one_rank():
    """A torch.distributed group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_snippets_run_in_their_order(page, tmp_path, monkeypatch, one_rank):
    monkeypatch.chdir(tmp_path)
    model, images = Model().eval(), torch.randn(24, 3, 32, 32)
    names = {"model": model, "images": images}
    names |= {"id_loader": images.split(8), "ood_loader": torch.rand(24, 3, 32, 32).split(8)}
    for i, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, snippet {i + 1}", "exec"), names)


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_run(page, tmp_path, monkeypatch, capsys):
    """Each `gradnorm-fast` command, a small model in place of the pretrained one; each make target is there."""
    from PIL import Image

    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for run in (demo, demo_imagenet):
        monkeypatch.setattr(run, "run", lambda *arguments: None)
    for folder in ("imagenet/val", "places", "dtd", "photos"):
        Path(folder).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((40, 40), 10 + 40 * i).convert("RGB").save(f"{folder}/{i}.png")
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    for line in lines:
        line = line.replace("--model resnet50 --weights DEFAULT", "--model test_docs:Model")
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "make":
            assert arguments[0] in targets, line
        elif program == "gradnorm-fast":
            assert cli.main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not OUTSIDE.match(link) and not (page.parent / link.split("#")[0]).exists()]
    assert not missing


def public():
    """{module: names} of docs/api.md."""
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^::: (\S+)$(?:(?!:::).)*?members: \[(.*?)\]", text, flags=re.M | re.S)
    return {module: names.split(", ") for module, names in blocks} | {"gradnorm_fast.reference": ["autograd_gradnorm"]}


@pytest.mark.parametrize("module", ["gradnorm_fast", *public()])
def test_examples_of_docstrings(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    model, images = Model().eval(), torch.randn(24, 3, 32, 32)
    id_loader, ood_loader = images.split(8), torch.rand(24, 3, 32, 32).split(8)
    detector = GradNorm(model).fit(id_loader)
    detector.save("gate.json")
    inside, outside = (detector.head_scores_loader(loader) for loader in (id_loader, ood_loader))
    names = dict(model=model, images=images, id_loader=id_loader, ood_loader=ood_loader, detector=detector)
    names |= dict(torch=torch, GradNorm=GradNorm, id_scores=inside, ood_scores=outside)
    examined = importlib.import_module(module)
    unknown = {name: value for name, value in names.items() if not hasattr(examined, name)}
    failed, attempted = doctest.testmod(examined, extraglobs=unknown)
    assert attempted > 0 and failed == 0


def test_every_public_call_has_an_example():
    calls = {
        name: getattr(importlib.import_module(module), name) for module, found in public().items() for name in found
    }
    assert {name for name in gradnorm_fast.__all__ if not name.startswith("_")} <= set(calls)
    results = {n for n, c in calls.items() if hasattr(c, "_fields") or is_dataclass(c) or c is LayerNorms}
    assert [name for name, call in calls.items() if name not in results and ">>> " not in call.__doc__] == []


def test_readme_figures_are_those_of_the_committed_benchmark():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks/results/cpu/bench.json").read_text())
    assert report.table(results) in text and report.headline(results) in text


def test_the_version_is_written_alike():
    version = gradnorm_fast.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1] in ("Unreleased", version)
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()
