"""`gsmooth certify`: certificates for images, one line of the store each."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.loggers import WandbLogger

from gsmooth_lightning.certify import JointCertifier
from gsmooth_lightning.certify.store import check_identity, read, read_identity
from gsmooth_lightning.error import StoredBound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import CertificationModule
from gsmooth_lightning.tasks.bound import fit_if_needed
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.setup import CLASSIFIER, prepare

BOUND_KEYS = (*CLASSIFIER, "error", "images", "calibration", "checkpoint", "block", "device", "versions")
"""What a stored bound and a certificate must have in common."""


def certify(cfg: DictConfig) -> Path:
    """Certifies every visited image; returns the store's folder."""
    run = prepare(cfg, "certify", ("error", "sampling", "certify"))
    certifier = instantiate(cfg.certify)
    if cfg.bounds is not None and isinstance(certifier, JointCertifier):
        if read_identity(cfg.bounds)["command"] != "bound":
            raise RequestError(f"{cfg.bounds} holds no bounds; name a folder written by `gsmooth bound`")
        check_identity(cfg.bounds, run.identity, BOUND_KEYS)
        certifier.error = StoredBound(read(cfg.bounds))
    elif cfg.bounds is not None:
        raise RequestError("bounds=STORE belongs to certify=joint; leave it out")
    certifier.check(run.smoothed, run.threat)
    with run.store() as store:
        if isinstance(certifier, JointCertifier):
            fit_if_needed(certifier.error, run)
        module = CertificationModule(certifier, run.smoothed, run.threat, store, cfg.seed)
        run.trainer.predict(module, run.data, return_predictions=False)
        records = store.finish()
        if isinstance(run.trainer.logger, WandbLogger):
            from gsmooth_lightning.report.wandb import log_certificates  # wandb is not on every cluster

            log_certificates(run.trainer.logger, records, run.threat, run.data.image)
    return run.folder


def main() -> None:
    command("certify", lambda cfg: show([certify(cfg)]))


if __name__ == "__main__":
    main()
