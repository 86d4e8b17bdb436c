"""`gsmooth bound`: the interpolation error of images, once, for `certify bounds=STORE`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from gsmooth_lightning.certify.store import Record, check_identity, read, read_identity
from gsmooth_lightning.error import CalibratedBound, Conditions, ErrorBound, StoredBound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import BoundModule
from gsmooth_lightning.report.tables import rounded
from gsmooth_lightning.tasks.dashboard import log_store
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.run import Run
from gsmooth_lightning.tasks.setup import calibration_images, prepare, settings_of, smoothed_classifier

SHARED = ("data", "error", "seed", "block", "device", "versions")
"""What a stored bound and a certificate have in common; `Conditions` compares classifier and threat."""


def bound(cfg: DictConfig) -> Path:
    """Bounds every visited image, or measures the calibration images of a bound for all; returns the store's folder."""
    if cfg.error is None:
        raise RequestError("there is nothing to bound with error=none; use error=image")
    error = instantiate(cfg.error)
    if isinstance(error, CalibratedBound):
        cfg = calibration_images(cfg)
    run = prepare(cfg, "bound", ("error",), with_network=False)
    error.check(run.smoothed, run.threat)  # before a folder is made
    with run.store() as store:
        module = BoundModule(error, run.smoothed, run.threat, store, cfg.seed)
        records = run.predict(module)
        log_store(run.trainer.logger, cfg, run.folder, "log_bounds", records, run.threat, run.data.image)
    return run.folder


def stored_bound(folder: Path, error: ErrorBound, run: Run) -> ErrorBound:
    """The bound that `gsmooth bound` made, for this run.

    Raises:
        RequestError: it was made for other data, images or settings, or its configuration cannot be read.
        UncertifiableError: it was made for another classifier or threat (see `Conditions`).
    """
    if read_identity(folder)["command"] != "bound":
        raise RequestError(f"{folder} holds no bounds; name a folder written by `gsmooth bound`")
    check_identity(folder, run.identity, (*SHARED, "calibration" if isinstance(error, CalibratedBound) else "images"))
    mine, own = run.identity.get("own code", {}), read_identity(folder).get("own code", {})
    if changed := [module for module, made in own.items() if mine.get(module) != made]:
        raise RequestError(f"the bounds in {folder} were made with another {', '.join(changed)}; bound the error again")
    made = settings_of(folder)
    smoothed, threat = smoothed_classifier(made, nn.Identity()), instantiate(made.threat)
    conditions, records = Conditions(smoothed, threat), read(folder)
    conditions.check(run.smoothed, run.threat)  # type: ignore[arg-type]  # of a transformation: the certifier checks it
    if not isinstance(error, CalibratedBound):
        return StoredBound(records, conditions, error)
    fitted = error.fit(norms_of(records), smoothed, threat)
    covered = rounded(fitted.details["q_E"], up=False)
    print(f"E = {rounded(fitted.value, up=True)} with rho = {fitted.rho:.4g} for a fraction q_E >= {covered} of images")
    return error


def norms_of(records: Sequence[Record]) -> dict[int, Any]:
    """The measured defects of calibration images, by index."""
    return {record["index"]: record["norms"] for record in records}


def main() -> None:
    command("bound", bound, lambda folder: show([folder]))


if __name__ == "__main__":
    main()
