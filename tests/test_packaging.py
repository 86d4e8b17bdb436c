"""What is installed is complete, and the mathematics stands alone."""

import json
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT, script, shell

HIGH = ("pytorch_lightning", "lightning", "hydra", "omegaconf", "wandb", "matplotlib")
LOW = (
    "predict",
    "errors", "stream", "confidence", "plans", "rounds", "transform", "preprocess", "smoothing", "model", "data",
    "interval", "smoothed", "threat", "error", "attack", "certify", "train",
)  # fmt: skip
YAMLS = sorted(str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml"))
MODULES = sorted(
    str(path.relative_to(ROOT / "src" / "gsmooth_lightning"))
    for path in (ROOT / "src" / "gsmooth_lightning").rglob("*.py")
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the checkout."""
    folder = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def check_help_elsewhere(installed: Path, tmp_path: Path) -> None:
    """The installed package, not the checkout, answers from another folder."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import gsmooth_lightning as g, gsmooth_lightning.conf as c; print(g.__file__); print(c.__file__)"
    ended = shell(sys.executable, "-P", "-c", where, cwd=elsewhere, PYTHONPATH=str(installed))
    assert ended.code == 0, ended.err
    assert all(Path(line).is_relative_to(installed) for line in ended.out.split()), ended.out
    task = (sys.executable, "-P", "-m", "gsmooth_lightning.tasks.certify")
    ended = shell(*task, "--help", cwd=elsewhere, PYTHONPATH=str(installed))
    assert (ended.code, ended.err) == (0, "")
    assert "certify: cover, direct, enumerate, joint" in ended.out
    assert "gsmooth_lightning.certify.JointCertifier" in ended.out
    assert not list(elsewhere.iterdir())


def test_every_package_is_declared():
    """`packages` in pyproject.toml lists every folder of modules: a forgotten one would be missing from the wheel."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(("gsmooth_lightning", *Path(module).parent.parts)) for module in MODULES if "__pycache__" not in module
    }
    assert declared == folders | {"gsmooth_lightning.conf"}
    assert all((ROOT / "src" / Path(*name.split(".")) / "__init__.py").is_file() for name in folders)


def test_build_is_complete_and_runs_elsewhere(tree, tmp_path):
    """What setuptools puts into a wheel: every module, every YAML; and it runs from another folder."""
    library = tmp_path / "library"
    setup = "from setuptools import setup; setup()"
    ended = shell(sys.executable, "-c", setup, "-q", "build_py", "--build-lib", library, cwd=tree)
    assert ended.code == 0, ended.err
    package = library / "gsmooth_lightning"
    assert sorted(str(p.relative_to(package / "conf")) for p in package.rglob("*.yaml")) == YAMLS
    built = {str(p.relative_to(package)) for p in package.rglob("*.py")}
    assert built == {*MODULES, "conf/__init__.py"}
    check_help_elsewhere(library, tmp_path)


@pytest.mark.slow
def test_wheel(tree, tmp_path):
    """A real wheel, built and installed by pip: contents, entry point, requirements, help from another folder."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    ended = shell(*pip, "wheel", "--no-deps", "-w", tmp_path / "wheels", ".", cwd=tree)
    assert ended.code == 0, ended.err
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    prefix = "gsmooth_lightning/conf/"
    assert "gsmooth_lightning/conf/certify.yaml" in names
    assert sorted(n.removeprefix(prefix) for n in names if n.endswith(".yaml")) == YAMLS
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "conf/"))]
    assert "gsmooth = gsmooth_lightning.cli:main" in entry
    for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        assert f"Requires-Dist: {name.split('>=')[0]}" in metadata
    ended = shell(*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel, cwd=tmp_path)
    assert ended.code == 0, ended.err
    check_help_elsewhere(tmp_path / "installed", tmp_path)


def test_the_mathematics_imports_nothing_high(tmp_path):
    """Levels 0 to 4 in a fresh interpreter: no Lightning, Hydra, wandb or matplotlib comes along."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {LOW!r}: importlib.import_module('gsmooth_lightning.' + name)\n"
        f"print(json.dumps(sorted(m for m in sys.modules if m.split('.')[0] in {HIGH!r})))"
    )
    ended = shell(sys.executable, "-c", code, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == []


def test_levels_cover_every_module():
    """A new low module is added to the test above and to the contract in pyproject.toml."""
    top = {Path(module).parts[0].removesuffix(".py") for module in MODULES} - {"__init__"}
    assert top == {*LOW, "lit", "report", "tasks", "cli"}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    forbidden = next(c for c in contracts if c["type"] == "forbidden")
    assert {name.rsplit(".", 1)[1] for name in forbidden["source_modules"]} == set(LOW)
    layers = " ".join(next(c for c in contracts if c["type"] == "layers")["layers"])
    assert {name.rsplit(".", 1)[1] for name in layers.replace("|", " ").split()} == top


def test_import_levels():
    """import-linter's contracts hold."""
    ended = shell(script("lint-imports"), "--no-cache", cwd=ROOT)
    assert ended.code == 0, ended.out + ended.err
