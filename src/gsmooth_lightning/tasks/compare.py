"""`gsmooth compare`: one model, one set of images, one threat, every certificate that applies."""

from functools import partial
from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.report.tables import default_radii
from gsmooth_lightning.tasks.certify import certify
from gsmooth_lightning.tasks.dashboard import log_table
from gsmooth_lightning.tasks.launch import command, first_process, without_leftovers
from gsmooth_lightning.tasks.report import show
from gsmooth_lightning.tasks.setup import CLASSIFIER, identity_of, run_folder

OWN = ("law", "noise", "learned", "preprocess", "model", "checkpoint", "denoiser", "denoiser_checkpoint")
"""What a certificate may have beside its theorem, error bound and sampling plan, instead of what all have."""


def compare(cfg: DictConfig) -> str:
    """Certifies the images under each part of `cfg.certificates`, or under those that `cfg.only` names, a store each;
    returns the table of all of them.

    A sequential plan decides the radii that the table shows. Certificates that the threat or classifier refuses have
    the reason in the table.
    """
    if cfg.bounds is not None:
        raise RequestError("compare makes the bounds of each certificate; leave bounds out")
    unknown = set(cfg.only or ()) - set(cfg.certificates)
    if unknown:
        raise RequestError(
            f"only names no certificate {', '.join(sorted(unknown))}; choose of {', '.join(cfg.certificates)}"
        )
    denoised = ("denoiser", "denoiser_checkpoint") if cfg.denoiser is not None else ()
    folder = run_folder(cfg, "compare", identity_of(cfg, (*CLASSIFIER, "images", "checkpoint", *denoised)))
    stores: list[Path] = []
    refused: dict[str, str] = {}
    radii: list[float] | None = cfg.radii
    for name in cfg.only or cfg.certificates:
        part = cfg.certificates[name]
        settings = part_of(cfg, part, folder / str(name))
        if "radii" in settings.sampling:
            radii = radii or default_radii(instantiate(cfg.threat), [])
            settings.sampling.radii = radii
        print(f"{name}:")
        try:
            stores.append(certify(settings))
        except (UncertifiableError, InstantiationException) as failure:
            reason = refusal(failure)
            if reason is None:
                raise
            refused[str(name)] = reason
            print(f"does not apply: {reason}")
    if not stores:
        raise RequestError("no certificate applies: " + "; ".join(f"{k}: {why}" for k, why in refused.items()))
    if not first_process():
        return ""
    return show(stores, radii, folder, refused=refused, log=partial(log_table, cfg, "compare", stores))


def refusal(failure: BaseException | None) -> str | None:
    """Why a certificate does not apply, if that is what a failure says: at first, or of a part that Hydra made."""
    while failure is not None:
        if isinstance(failure, UncertifiableError):
            return str(failure)
        failure = failure.__cause__
    return None


def part_of(cfg: DictConfig, part: DictConfig, store: Path) -> DictConfig:
    """The configuration with one certificate's error bound, sampling plan and theorem, and what else it has of its own:
    a law, or another classifier."""
    settings = cfg.copy()
    with open_dict(settings):
        del settings["certificates"], settings["only"]
        settings.error, settings.certify = part.get("error"), part.certify
        for key in ("sampling", *OWN):
            settings[key] = part.get(key, cfg[key])
        settings.store = str(store)
    return without_leftovers(settings)


def main() -> None:
    command("compare", compare)


if __name__ == "__main__":
    main()
