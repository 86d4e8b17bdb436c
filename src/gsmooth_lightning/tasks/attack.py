"""`gsmooth attack`: a search of the worst parameters or pixels against the base and the smoothed classifier."""

import inspect
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from gsmooth_lightning.lit import AttackModule
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.setup import prepare, trained_network


def attack(cfg: DictConfig) -> Path:
    """Attacks every visited image; returns the store's folder."""
    run = prepare(cfg, "attack", ("attack",))
    search, device = instantiate(cfg.attack), run.trainer.strategy.root_device
    if "network" in inspect.signature(search).parameters:  # gradients need the plain network, `prepare` compiles it
        network = trained_network(cfg, "attack")
        search = partial(search, network=network.to(device).eval().requires_grad_(False))
    image, label, index = run.data.visited[0]
    x = run.threat.prepare(image[None])[0].to(device)
    next(search(run.smoothed, run.threat, x, label, Stream(cfg.seed, index)))  # refuses wrong options before any work
    with run.store() as store:
        module = AttackModule(search, run.smoothed, run.threat, store, cfg.seed)
        run.trainer.predict(module, run.data, return_predictions=False)
        store.finish()
    return run.folder


def main() -> None:
    command("attack", lambda cfg: show([attack(cfg)]))


if __name__ == "__main__":
    main()
