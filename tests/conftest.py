"""Shared by the tests: a small trained checkpoint, and commands run in process or as they are typed."""

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from filelock import FileLock
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning import LightningModule

from gsmooth_lightning.transform import Surrogate

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
DATA = ROOT / "data"
SETS = ("mnist", "fashion-mnist", "cifar10", "gtsrb", "imagenet-sample", "speech-commands", "kitti")
QUIET = ("trainer=cpu", "trainer.enable_progress_bar=false", "logger=none", "backend=fx")
TRAIN = (*QUIET, "train.epochs=6", "noise.sigma=0.25", "law.sigma=20")
SMALL = (
    *QUIET,
    "noise.sigma=0.25",
    "law.sigma=20",
    "threat.low=-10",
    "threat.high=10",
    "sampling.n0=32",
    "sampling.n=128",
    "error.draws=64",
    "error.choose=32",
    "error.points=3",
    "images.first=6",
)
"""Overrides under which certify, bound and attack take well under a second."""


def compose(command: str, *overrides: str) -> DictConfig:
    """The configuration that `gsmooth COMMAND OVERRIDES` would compose."""
    with initialize_config_module("gsmooth_lightning.conf", version_base="1.3"):
        return hydra.compose(command, list(overrides))


def run_task(command: str, *overrides: str) -> Any:
    """Runs a command's function in this process on a composed configuration; returns what it returns."""
    task = importlib.import_module(f"gsmooth_lightning.tasks.{command}")
    return getattr(task, command)(compose(command, *overrides))


@dataclass(frozen=True)
class Ended:
    """How a command ended: `error` is an exception that escaped from it, a bug."""

    code: Any
    out: str
    err: str
    error: BaseException | None = None

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


def run_main(command: str, *arguments: str) -> Ended:
    """Runs `main()` of a command's module in this process with these arguments, as a shell would."""
    task = importlib.import_module(f"gsmooth_lightning.tasks.{command}")
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    root, level = logging.getLogger(), logging.getLogger("pytorch_lightning").level
    handlers, root_level = root.handlers[:], root.level
    out, err = io.StringIO(), io.StringIO()
    code, error = 0, None
    sys.argv = [f"{command}.py", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                task.main()
            except SystemExit as ended:
                code = ended.code
            except BaseException as failure:
                code, error = 1, failure
    finally:
        sys.argv = argv
        root.handlers[:] = handlers
        root.setLevel(root_level)
        logging.getLogger("pytorch_lightning").setLevel(level)
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full
    return Ended(code, out.getvalue(), err.getvalue(), error)


def one_sentence(ended: Ended, *words: str) -> None:
    """Exit status 2, no traceback, one line on stderr that starts with gsmooth and holds the words."""
    if ended.error is not None:
        raise AssertionError(f"the exception escaped: {ended.error!r}; stderr: {ended.err}") from ended.error
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert len(ended.lines) == 1, ended.err
    assert ended.err.startswith("gsmooth")
    for word in words:
        assert word in ended.err


def environment(**changes: str) -> dict[str, str]:
    """Of child processes: one thread, and no account of anything."""
    dropped = ("WANDB_API_KEY", "WANDB_MODE", "HYDRA_FULL_ERROR", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def shell(*arguments: str | Path, cwd: Path, timeout: float = 300, **changes: str) -> Ended:
    """Runs a command line in a child process."""
    line = list(map(str, arguments))
    ended = subprocess.run(
        line, cwd=cwd, env=environment(**changes), timeout=timeout, text=True, capture_output=True, check=False
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def script(name: str) -> Path:
    """A console script of the running environment."""
    return Path(sys.executable).parent / name


def snapshot(folder: Path) -> dict[str, str]:
    """Everything under a folder: path -> hash of the content; locks of ranks come and go."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix != ".lock"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a finished store."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> dict[str, bytes]:
    """A finished store's files, with every `seconds` blanked: what must not depend on how it came about."""
    files = {name: (folder / name).read_bytes() for name in ("config.yaml", "fingerprint.json", "records.jsonl")}
    assert not list(folder.glob("rank-*.jsonl")), "shards are left"
    return {name: re.sub(rb'"seconds": [-+.e0-9]+', b'"seconds": T', content) for name, content in files.items()}


def interrupt(patch: pytest.MonkeyPatch, module: type[LightningModule], epoch: int) -> None:
    """The power goes in the middle of an epoch of a training."""
    step = module.training_step

    def failing(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (epoch, 2):
            raise ZeroDivisionError("power")
        return step(self, batch, batch_idx)

    patch.setattr(module, "training_step", failing)


def save_surrogate(surrogate: Surrogate, file: Path) -> None:
    """A file as `gsmooth surrogate` writes it."""
    state = {f"surrogate.{key}": value for key, value in surrogate.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state, "hyper_parameters": {"surrogate": surrogate.trained_on}}, file)


@pytest.fixture(scope="session")
def surrogate_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained surrogate of the default threat, for options that name one."""
    cfg, file = compose("surrogate", "network.widths=[4]"), tmp_path_factory.mktemp("surrogate") / "surrogate.ckpt"
    threat = hydra.utils.instantiate(cfg.threat)
    network = hydra.utils.instantiate(cfg.network)
    save_surrogate(network(threat.transform.name, threat.transform.units, threat.lows, threat.highs), file)
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained for a few epochs on digits, good enough to certify some images."""
    return run_task("train", *TRAIN, f"store={tmp_path_factory.mktemp('trained')}")


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> Callable[..., str]:
    """Writes an untrained network for a configuration: enough for everything that fails before a certificate."""

    def write(*overrides: str) -> str:
        path = tmp_path_factory.mktemp("network") / "network.ckpt"
        torch.save(hydra.utils.instantiate(compose("certify", *overrides).model).state_dict(), path)
        return str(path)

    return write


@pytest.fixture(scope="session")
def certified(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of six images."""
    return run_task("certify", *SMALL, f"checkpoint={checkpoint}", f"store={tmp_path_factory.mktemp('certified')}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


needs_real_data = pytest.mark.skipif(
    not SHARED.exists(),
    reason="MNIST, CIFAR-10 and five more data sets are not part of this repository; every reader of them is tested on "
    "small files of its format as well",
)


@pytest.fixture(scope="session")
def data() -> Path:
    """Where the real sets lie. They are unpacked once a machine: a marker says that a set is complete."""
    version = hashlib.sha256((SHARED / "unpack.py").read_bytes()).hexdigest()
    markers = DATA / ".unpacked"
    markers.mkdir(parents=True, exist_ok=True)
    with FileLock(markers / "lock"):  # other test processes wait here
        for name in SETS:
            marker = markers / name
            if marker.exists() and marker.read_text() == version:
                continue
            subprocess.run([sys.executable, SHARED / "unpack.py", DATA, name], check=True, capture_output=True)
            marker.write_text(version)
    return DATA
