"""`gsmooth attack`: a search of the worst parameters or pixels against the base and the smoothed classifier."""

import inspect
import re
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import AttackModule
from gsmooth_lightning.model import file_hash
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.tasks.dashboard import log_store
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.setup import prepare, trained_network, unwrapped


def attack(cfg: DictConfig) -> Path:
    """Attacks every visited image; returns the store's folder."""
    run = prepare(cfg, "attack", ("attack",))
    search, device = instantiate(cfg.attack), run.trainer.strategy.root_device
    options = inspect.signature(unwrapped(search)).parameters
    unknown = set(cfg.attack) - {"_target_", "_partial_", *options}
    if unknown:
        raise RequestError(f"attack has no option {', '.join(sorted(unknown))}; correct the options of attack")
    run.identity |= other_code(cfg.attack)
    if "network" in options:  # gradients need the plain network, `prepare` compiles it
        network = trained_network(cfg, "attack")
        search = partial(search, network=network.to(device).eval().requires_grad_(False))
    image, label, index = run.data.visited[0]
    x = run.threat.prepare(image[None])[0].to(device)
    jobs = next(search(run.smoothed, run.threat, x, label, Stream(cfg.seed, index)))
    jobs[0]()  # refuses wrong options before any work
    with run.store() as store:
        module = AttackModule(search, run.smoothed, run.threat, store, cfg.seed)
        records = run.predict(module)
        log_store(run.trainer.logger, cfg, run.folder, "log_attacks", records, run.threat, run.data.image)
    return run.folder


def other_code(node: Any) -> dict[str, dict[str, str]]:
    """Versions of the packages, or hashes of the user's own files, that an attack's configuration names."""
    names = re.findall(r"(?:_target_|path): ([\w.]+)", OmegaConf.to_yaml(node, resolve=True))
    found = {}
    for name in sorted({name.split(".")[0] for name in names} - {"gsmooth_lightning", "hydra"}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            file = getattr(sys.modules.get(name), "__file__", None)
            found[name] = file_hash(file) if file else ""
    return {"attack code": found} if found else {}


def main() -> None:
    command("attack", attack, lambda folder: show([folder]))


if __name__ == "__main__":
    main()
