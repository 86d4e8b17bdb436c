"""`gsmooth certify`: certificates for images, one line of the store each."""

from pathlib import Path
from typing import cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gsmooth_lightning.certify import Certifier, PerInputCertifier
from gsmooth_lightning.certify.store import digest, read, read_identity
from gsmooth_lightning.error import CalibratedBound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import CertificationModule
from gsmooth_lightning.report.tables import summary_rows, text
from gsmooth_lightning.tasks.bound import bound, stored_bound
from gsmooth_lightning.tasks.dashboard import log_store
from gsmooth_lightning.tasks.forecast import forecast
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.run import Run
from gsmooth_lightning.tasks.setup import prepare


def certify(cfg: DictConfig) -> Path:
    """Certifies every visited image; returns the store's folder. A bound for all images is calibrated first, in a store
    of its own beneath."""
    run, certifier = ready(cfg)
    with run.store() as store:
        if cfg.bounds is None and isinstance(certifier.error, CalibratedBound):
            own = OmegaConf.merge(cfg, {"store": str(run.folder / "bounds"), "logger": None})
            certifier.error = stored_bound(bound(cast(DictConfig, own)), certifier.error, run)
        if isinstance(certifier, PerInputCertifier):
            device = run.trainer.strategy.root_device
            done = ((record, run.data.image(record["index"])[None].to(device)) for record in read(run.folder))
            certifier.resume((record, run.threat.prepare(x)[0]) for record, x in done)
        module = CertificationModule(certifier, run.smoothed, run.threat, store, cfg.seed)
        records = run.predict(module)
        log_store(run.trainer.logger, cfg, run.folder, "log_certificates", records, run.threat, run.data.image)
    return run.folder


def ready(cfg: DictConfig, to_sample: bool = False) -> tuple[Run, Certifier]:
    """The run (see `prepare`), and its theorem, which has refused what it does not cover."""
    run = prepare(cfg, "certify", ("error", "sampling", "certify"), to_sample=to_sample)
    certifier = instantiate(cfg.certify)
    if cfg.bounds is not None and certifier.error is None:
        raise RequestError("bounds=STORE is for a theorem with an error bound (joint, nested); leave it out")
    certifier.check(run.smoothed, run.threat)
    if isinstance(certifier, PerInputCertifier) and run.trainer.world_size > 1:
        raise RequestError("certificates that depend on the order of inputs are made by one process; use devices=1")
    if cfg.bounds is not None:
        certifier.error = stored_bound(Path(cfg.bounds), certifier.error, run)
        made = read_identity(cfg.bounds)
        if made["threat"] != run.identity["threat"]:  # a bound for a wider range is another one
            run.identity["bounds"] = digest(made)
    return run, certifier


def finish(found: Path | dict[str, str]) -> None:
    """Prints the forecast; or the report of a store, and what it has cost."""
    if isinstance(found, dict):
        print(text({"dry run": found}))
        return
    show([found])
    print(text({"spent": summary_rows(read(found))}))


def certify_or_forecast(cfg: DictConfig) -> Path | dict[str, str]:
    if not isinstance(cfg.dry_run, bool):
        raise RequestError(f"dry_run must be true or false, got {cfg.dry_run!r}")
    return forecast(*ready(cfg, to_sample=True)) if cfg.dry_run else certify(cfg)


def main() -> None:
    command("certify", certify_or_forecast, finish)


if __name__ == "__main__":
    main()
