"""Wheel, editable installs and the repository's root, with Hugging Face's `kernels` installed beside."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gradnorm_fast

ROOT = Path(__file__).parents[1]
FIND = """
import gradnorm_fast
from importlib.util import find_spec
for sibling in ("setup", "tests", "benchmarks", "build"):
    assert find_spec("gradnorm_fast." + sibling) is None, sibling
assert find_spec("kernels").submodule_search_locations[0].endswith("site-packages/kernels")
print(gradnorm_fast.__file__)
print(find_spec("gradnorm_fast.kernels.tiled").origin)
"""
USE = """
import sys, torch
import gradnorm_fast, gradnorm_fast.kernels.tiled as tiled
import kernels
assert sys.modules["gradnorm_fast.kernels"] is gradnorm_fast.kernels and gradnorm_fast.kernels.tiled is tiled
assert hasattr(kernels, "get_kernel"), kernels
x, w = torch.ones(2, 3), torch.arange(12.0).reshape(4, 3)
expected = gradnorm_fast.fast_gradnorm(x, w, backend="torch")
torch.testing.assert_close(gradnorm_fast.fast_gradnorm(x, w, backend="triton"), expected)
"""


def run(*command, cwd, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def find(python, cwd):
    """Where python finds the package and a kernel."""
    return [Path(line) for line in run(python, "-c", FIND, cwd=cwd).split()[-2:]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the package is built from: a build writes beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("gradnorm_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder))
    run(*build, str(source), cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees this one's packages, but not its editable install of ours."""
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    here = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    Path(here, "packages.pth").write_text("\n".join(site.getsitepackages()))

    def install(*arguments):
        options = ("--python", str(python), "install", "-q", "--no-deps", "--no-build-isolation", "--ignore-installed")
        run(sys.executable, "-m", "pip", *options, *map(str, arguments), cwd=tmp_path)
        return python

    return install


def test_the_wheel_has_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"gradnorm_fast"}
    files = {f"gradnorm_fast/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    files |= {f"gradnorm_fast/{p.relative_to(ROOT / 'gradnorm_fast')}" for p in (ROOT / "gradnorm_fast").rglob("*.py")}
    assert files | {"gradnorm_fast/py.typed"} <= set(names)


def test_the_version_is_the_same_everywhere(wheel):
    assert wheel.name.split("-")[1] == gradnorm_fast.__version__


def test_wheel(environment, wheel, tmp_path):
    python = environment(wheel)
    run(python, "-c", USE, cwd=tmp_path, TRITON_INTERPRET="1")
    package, kernel = find(python, tmp_path)
    assert kernel == package.parent / "kernels/tiled.py" and tmp_path in package.parents


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable(environment, source, mode, tmp_path):
    python = environment("--config-settings", f"editable_mode={mode}", "--editable", source)
    package, kernel = find(python, tmp_path)
    assert package.samefile(source / "gradnorm_fast/__init__.py") and kernel.samefile(source / "kernels/tiled.py")


def test_repository_root():
    package, kernel = find(sys.executable, ROOT)
    assert package == ROOT / "gradnorm_fast/__init__.py" and kernel == ROOT / "kernels/tiled.py"


def test_without_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from gradnorm_fast import fast_gradnorm
x, w = torch.ones(2, 3), torch.ones(4, 3)
assert fast_gradnorm(x, w).tolist() == [0.0, 0.0]
try: fast_gradnorm(x, w, backend="triton")
except ValueError as error: print(error)
"""
    assert "pip install triton" in run(sys.executable, "-c", code, cwd=tmp_path)


def test_importing_the_package_imports_no_triton_and_touches_no_gpu(tmp_path):
    code = """
import sys, torch
before = "triton" in sys.modules
import gradnorm_fast
kernels = [name for name in sys.modules if name.startswith("gradnorm_fast.kernels.")]
print(torch.cuda.is_initialized(), ("triton" in sys.modules) != before, bool(kernels))
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["False"] * 3
