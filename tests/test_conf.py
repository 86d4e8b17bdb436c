"""The configuration is the constructors' schema: every option composes and binds, found from the files."""

import importlib
import inspect
from pathlib import Path

import pytest
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer

from conftest import ROOT, compose
from gsmooth_lightning import cli
from gsmooth_lightning.lit import ImageDataModule
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.tasks.launch import OPTIONAL
from gsmooth_lightning.tasks.train import FOR_TRAINER

CONF = ROOT / "conf"
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ("experiment", "hparams_search", "launcher", "__pycache__")
}
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
COMMANDS = [path.stem for path in sorted(CONF.glob("*.yaml")) if "base" in (OmegaConf.load(path).get("defaults") or ())]
LATE = {"save_dir"}
"""Arguments that the tasks give when they know the run's folder."""


def targets(node, path: str = ""):
    """Every (path, mapping) with a _target_ below a resolved configuration."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for k, value in enumerate(node):
            yield from targets(value, f"{path}.{k}")


def resolved(cfg: DictConfig) -> dict:
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(found, dict)
    return found


def check_binding(cfg: DictConfig) -> int:
    """Every target exists and takes exactly the keys written for it; returns how many there were."""
    count = 0
    for path, node in targets(resolved(cfg)):
        constructor = get_object(node["_target_"])
        keywords = {k: v for k, v in node.items() if k not in ("_target_", "_partial_", "_convert_", "_recursive_")}
        missing = [k for k, v in keywords.items() if v == "???" and k not in LATE]
        assert not missing, f"{path} leaves {missing} open"
        if constructor.__module__ == "datetime":  # written in C, without a signature
            constructor(**keywords)
            continue
        signature = inspect.signature(constructor)
        try:
            (signature.bind_partial if node.get("_partial_") else signature.bind)(**keywords)
        except TypeError as failure:
            raise AssertionError(f"{path}: {failure}") from failure
        count += 1
    return count


def test_commands_and_configurations_are_the_same():
    """Each command has a primary configuration and each configuration a command; report and those of runs have no
    groups."""
    primary = {path.stem for path in CONF.glob("*.yaml")} - {"base", "quiet"}
    assert primary == set(cli.COMMANDS)
    assert primary - set(COMMANDS) == {"report", *cli.OF_RUNS}
    assert {path.stem for path in (ROOT / "src/gsmooth_lightning/tasks").glob("*.py")} >= primary


def test_folders_are_groups_with_options():
    """No empty group, no file in a group that is not an option."""
    for folder in (path for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert list(folder.glob("*.yaml")), f"{folder} is empty"
        assert {path.suffix for path in folder.iterdir()} == {".yaml"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_group_is_reachable(command):
    """A command's defaults name every group, so that GROUP=OPTION works without a plus."""
    cfg = compose(command)
    for group in GROUPS:
        assert group in cfg, f"{command} does not know {group}"
    keys = {"seed", "block", "backend", "checkpoint", "denoiser_checkpoint", "surrogate", "store", "bounds", "images"}
    assert keys <= set(cfg)


OWN = {
    ("model", "custom"): ("model._target_=gsmooth_lightning.model.SmallCNN",),
    ("model", "black_box"): ("model.function.path=torch.argmax",),
    ("attack", "pgd"): ("threat=l2",),
    ("threat", "brightness_contrast"): ("transform=brightness_contrast",),
    ("threat", "blur_brightness"): ("transform=blur_brightness",),
    ("threat", "rotation_brightness"): ("transform=rotation_brightness", "law.sigma=[30,0.3]"),
    ("threat", "similarity"): ("transform=similarity",),
    ("threat", "motion_blur"): ("transform=motion_blur",),
    ("threat", "defocus_brightness"): ("transform=defocus_brightness",),
}
"""What a user must add to an option that is nothing by itself."""


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_binds(group, option):
    """With certify and another command, in turn (a composition takes a tenth of a second, and all commands share
    base.yaml); all targets bind the keys of the composed configuration."""
    for command in {"certify", COMMANDS[OPTIONS.index((group, option)) % len(COMMANDS)]}:
        cfg = compose(command, f"{group}={option}", *OWN.get((group, option), ()))
        assert check_binding(cfg) > 8
        content = OmegaConf.load(CONF / group / f"{option}.yaml")
        if "@package _global_" in (CONF / group / f"{option}.yaml").read_text().splitlines()[0]:
            assert cfg[group] is None
        else:
            assert set(content) - {"defaults"} <= set(cfg[group])


@pytest.mark.parametrize("group", OPTIONAL)
def test_options_of_groups_that_can_be_switched_off_have_a_target(group):
    """`launch.without_leftovers` takes one without for an experiment's leftovers, and drops it."""
    assert "none" in GROUPS[group]
    for option in set(GROUPS[group]) - {"none"}:
        assert "_target_" in compose("certify", f"{group}={option}")[group], option


BOUND_ABOVE = ("logger", "train", "attack", "trainer")
"""Groups whose options need a run to be built; their signatures are checked by the binding test."""


@pytest.mark.parametrize(("group", "option"), [o for o in OPTIONS if o[0] not in BOUND_ABOVE])
def test_every_option_constructs(group, option, surrogate_file):
    """What hangs on the option alone is really built."""
    cfg = compose("certify", f"{group}={option}", *OWN.get((group, option), ()), f"surrogate={surrogate_file}")
    if group == "error" and option == "none":
        cfg = compose("certify", "error=none", "certify=direct")
    node = cfg[group].dataset if group == "data" else cfg[group]
    made = instantiate(node)
    if group == "network":  # the task tells it what it imitates
        made = made("rotation", ["degrees"], [-30.0], [30.0])
    if group == "scales":  # and where it starts
        made = made(Gaussian(0.5), (1, 28, 28))
    if node is None:
        assert made is None
    else:
        assert type(made).__module__.startswith(("gsmooth_lightning", "torch"))


def test_keys_without_targets():
    """`images` and `train` are handed to constructors by the tasks: the same rule holds for them."""
    cfg = compose("certify")
    images = set(cfg.images)
    parameters = inspect.signature(ImageDataModule).parameters
    assert images - {"split"} <= set(parameters)
    elsewhere = {"dataset", "classes", "batch_size", "augment", "workers", "split", "seed"}
    assert set(parameters) - elsewhere == images - {"split"}
    own = {"optimizer", "scheduler", "interval", "epochs", "batch_size", "ema", "patience"}
    assert set(cfg.train) == own | set(FOR_TRAINER)
    assert set(FOR_TRAINER) <= set(inspect.signature(Trainer).parameters)


def test_defaults_written_twice_agree():
    """Where a YAML repeats a constructor's default it says the same: FixedN, GroupSequential, error bounds, models."""
    for group, option in (
        ("sampling", "fixed"),
        ("sampling", "sequential"),
        ("error", "image"),
        ("model", "small_cnn"),
    ):
        cfg = resolved(compose("certify", f"{group}={option}", *OWN.get((group, option), ())))[group]
        parameters = inspect.signature(get_object(cfg.pop("_target_"))).parameters
        for key, value in cfg.items():
            default = parameters[key].default
            if default is not inspect.Parameter.empty:
                assert (list(value) if isinstance(value, list) else value) == (
                    list(default) if isinstance(default, tuple) else default
                ), f"{group}={option}: {key}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose(experiment):
    """Every experiment works with the command of the training, with certify and with another one, in turn, and
    binds."""
    for command in {"train", "certify", COMMANDS[EXPERIMENTS.index(experiment) % len(COMMANDS)]}:
        assert check_binding(compose(command, f"experiment={experiment}")) > 8
    header = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert header.startswith("# @package _global_\n#"), "an experiment opens with paper and command"
    assert f"experiment={experiment}" in header


def test_configuration_is_the_packages_own():
    """Hydra finds the folder through the package, wherever the command is started."""
    assert Path(importlib.import_module("gsmooth_lightning.conf").__file__).parent == CONF
