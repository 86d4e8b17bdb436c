"""`gsmooth demo`: train, certify, attack and report, on real handwritten digits."""

import time
from pathlib import Path

from omegaconf import DictConfig, open_dict

from gsmooth_lightning.tasks.attack import attack
from gsmooth_lightning.tasks.certify import certify
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.train import train


def demo(cfg: DictConfig) -> str:
    """The commands train, certify, attack and report with one configuration; results go to `cfg.store`."""
    start = time.perf_counter()
    folder = Path(cfg.store)

    def stage(name: str) -> DictConfig:
        settings = cfg.copy()
        with open_dict(settings):
            settings.store = str(folder / name)
        return settings

    settings = stage("train")
    checkpoint = train(settings)
    stores = []
    for run in (certify, attack):
        settings = stage(run.__name__)
        settings.checkpoint = str(checkpoint)
        stores.append(run(settings))
    table = show(stores, cfg.radii, folder)
    print(f"the demo took {time.perf_counter() - start:.0f} s")
    return table


def main() -> None:
    command("demo", demo)


if __name__ == "__main__":
    main()
