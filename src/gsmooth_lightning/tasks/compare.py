"""`gsmooth compare`: one model, one set of images, one threat, every certificate that applies."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.report.tables import default_radii
from gsmooth_lightning.tasks.certify import certify
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.setup import CLASSIFIER, identity_of, run_folder


def compare(cfg: DictConfig) -> str:
    """Certifies the images under each part of `cfg.certificates`, a store each; returns the table of all of them.

    A sequential plan decides the radii that the table shows. Certificates that the threat or classifier refuses have
    the reason in the table.
    """
    if cfg.bounds is not None:
        raise RequestError("compare makes the bounds of each certificate; leave bounds out")
    folder = run_folder(cfg, "compare", identity_of(cfg, (*CLASSIFIER, "images", "checkpoint")))
    stores: list[Path] = []
    refused: dict[str, str] = {}
    radii: list[float] | None = cfg.radii
    for name, part in cfg.certificates.items():
        settings = part_of(cfg, part, folder / str(name))
        if "radii" in settings.sampling:
            radii = radii or default_radii(instantiate(cfg.threat), [])
            settings.sampling.radii = radii
        print(f"{name}:")
        try:
            stores.append(certify(settings))
        except UncertifiableError as failure:
            refused[str(name)] = str(failure)
            print(f"does not apply: {failure}")
    if not stores:
        raise RequestError("no certificate applies: " + "; ".join(f"{k}: {why}" for k, why in refused.items()))
    return show(stores, radii, folder, refused=refused)


def part_of(cfg: DictConfig, part: DictConfig, store: Path) -> DictConfig:
    """The configuration with one certificate's error bound, sampling plan and theorem, and a law if it has its own."""
    settings = cfg.copy()
    with open_dict(settings):
        del settings["certificates"]
        settings.error, settings.certify = part.get("error"), part.certify
        settings.sampling = part.get("sampling", cfg.sampling)
        settings.law = part.get("law", cfg.law)
        settings.store = str(store)
    return settings


def main() -> None:
    command("compare", compare)


if __name__ == "__main__":
    main()
