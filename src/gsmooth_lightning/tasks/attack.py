"""`gsmooth attack`: the worst of k parameters against the base and the smoothed classifier."""

from pathlib import Path

from omegaconf import DictConfig

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import AttackModule
from gsmooth_lightning.report.tables import attack_rows, markdown
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import images_in_words, prepare
from gsmooth_lightning.threat import TransformationThreat


def attack(cfg: DictConfig) -> Path:
    """Attacks every visited image and prints what survives; returns the store's folder."""
    run = prepare(cfg, "attack", ("attack",))
    if not isinstance(run.threat, TransformationThreat):
        raise RequestError("this attack searches a transformation's parameters; use threat=rotation")
    store = run.store()
    run.data.done = store.done
    module = AttackModule(run.smoothed, run.threat, store, cfg.attack.k, cfg.attack.n, cfg.seed)
    run.trainer.predict(module, run.data, return_predictions=False)
    records = store.finish()
    rows = {"images": f"{len(records)} ({images_in_words(cfg)})"} | attack_rows(records, [])
    print(markdown({"attack": rows | {"threat": run.threat.describe()}}))
    print(f"attacks: {run.folder}")
    return run.folder


def main() -> None:
    command("attack", attack)


if __name__ == "__main__":
    main()
