"""`gsmooth attack`: the worst of k parameters against the base and the smoothed classifier."""

from pathlib import Path

from omegaconf import DictConfig

from gsmooth_lightning.attack import check_effort
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import AttackModule
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.setup import prepare
from gsmooth_lightning.threat import TransformationThreat


def attack(cfg: DictConfig) -> Path:
    """Attacks every visited image; returns the store's folder."""
    run = prepare(cfg, "attack", ("attack",))
    if not isinstance(run.threat, TransformationThreat):
        raise RequestError("this attack searches a transformation's parameters; use threat=rotation")
    check_effort(cfg.attack.k, cfg.attack.n)
    with run.store() as store:
        module = AttackModule(run.smoothed, run.threat, store, cfg.attack.k, cfg.attack.n, cfg.seed)
        run.trainer.predict(module, run.data, return_predictions=False)
        store.finish()
    return run.folder


def main() -> None:
    command("attack", lambda cfg: show([attack(cfg)]))


if __name__ == "__main__":
    main()
