"""`gsmooth bound`: the interpolation error of each image, once, for `certify bounds=STORE`."""

from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from gsmooth_lightning.error import DistributionBound, ErrorBound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import BoundModule
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.setup import Run, prepare


def fit_if_needed(error: ErrorBound | None, run: Run) -> None:
    """A bound for the distribution is fitted on calibration images drawn at random from the training split."""
    if not isinstance(error, DistributionBound):
        return
    threat, training = error.check(run.smoothed, run.threat), run.data.split("train")
    total = len(training)  # type: ignore[arg-type]
    chosen = np.random.default_rng(run.cfg.seed).permutation(total)[: error.calibration]
    device = run.trainer.strategy.root_device
    images = ((int(i), threat.prepare(training[int(i)][0][None].to(device))[0]) for i in chosen)
    bound = error.fit(run.smoothed, threat, images, run.cfg.seed)
    print(f"E = {bound.value:.4f} with rho = {bound.rho:g} for a fraction q_E >= {bound.details['q_E']:.4f} of images")


def bound(cfg: DictConfig) -> Path:
    """Bounds every visited image; returns the store's folder."""
    if cfg.error is None:
        raise RequestError("there is nothing to bound with error=none; use error=image")
    run = prepare(cfg, "bound", ("error",))
    error = instantiate(cfg.error)
    error.check(run.smoothed, run.threat)
    with run.store() as store:
        fit_if_needed(error, run)
        run.trainer.predict(
            BoundModule(error, run.smoothed, run.threat, store, cfg.seed), run.data, return_predictions=False
        )
        store.finish()
    return run.folder


def main() -> None:
    command("bound", lambda cfg: show([bound(cfg)]))


if __name__ == "__main__":
    main()
