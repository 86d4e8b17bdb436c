"""`gsmooth report`: table and picture of finished or running stores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gsmooth_lightning.certify.store import Record, check_identity, read, read_identity
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.figures import comparison_figure, report_figure
from gsmooth_lightning.report.tables import attack_rows, bound_rows, certificate_rows, markdown, text
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import CLASSIFIER, data_module, images_in_words

JOINED = (*CLASSIFIER, "images", "checkpoint", "block", "versions")
"""What an attack and the certificates it is reported with have in common."""


def show(stores: Sequence[str | Path], radii: Sequence[float] | None = None, out: str | Path | None = None) -> str:
    """Writes report.md and report.png into `out` (by default the last store), prints and returns the table.

    Attack stores are joined by image to the certificate store named before them.
    """
    if not stores:
        raise RequestError("there is nothing to report; name stores=[FOLDER,...]")
    if radii is not None and (isinstance(radii, str) or not all(isinstance(r, int | float) and r >= 0 for r in radii)):
        raise RequestError(f"radii must be a list of numbers from 0 on, such as [0,10,20], got {radii}")
    columns: dict[str, dict[str, str]] = {}
    certificates: list[Record] = []
    runs: dict[str, list[Record]] = {}
    attacked: list[Record] = []
    certified_with: DictConfig | None = None
    certified: dict[str, Any] = {}
    name = ""
    for folder in map(Path, stores):
        identity, records = read_identity(folder), read(folder)
        kind, source = identity["command"], identity.get("source", "")
        if kind not in ("certify", "attack", "bound"):
            raise RequestError(f"{folder} is a {kind} run; name folders written by certify, bound or attack")
        if not records:
            raise RequestError(f"{folder} holds no finished image yet; report it later")
        settings = cast(DictConfig, OmegaConf.load(folder / "config.yaml"))
        threat, images = instantiate(settings.threat), images_in_words(settings)
        if kind == "certify":
            certificates, certified_with, certified, name = records, settings, identity, folder.name
            runs[name] = records
            columns[name] = certificate_rows(records, threat, images, source, radii)
        elif kind == "attack":
            if certified_with is not None:
                check_identity(folder, certified, JOINED)
            attacked, name = records, name or folder.name
            columns.setdefault(
                name,
                {
                    "images": f"{len(records)} ({images})",
                    "data": source,
                    "inputs": f"{threat.inputs}; parameters in {threat.unit}",
                    "threat": threat.describe(),
                },
            )
            columns[name] |= attack_rows(records, certificates)
        else:
            columns[folder.name] = bound_rows(records, threat, images, source)
    target = Path(out) if out is not None else Path(stores[-1])
    written = [target / "report.md"]
    try:
        target.mkdir(parents=True, exist_ok=True)
        written[0].write_text(markdown(columns) + "\n")
        if certified_with is not None:
            if len(runs) > 1:
                figure = comparison_figure(runs)
            else:
                image = data_module(certified_with).image
                figure = report_figure(certificates, instantiate(certified_with.threat), image, attacked)
            written.append(target / "report.png")
            figure.savefig(written[-1], dpi=150)
    except OSError as failure:
        raise RequestError(f"cannot write the report to {target} ({failure.strerror}); set out=FOLDER") from failure
    table = text(columns)
    print(table)
    print("written:", *written)
    return table


def report(cfg: DictConfig) -> str:
    """The report of the stores named in the configuration."""
    return show([cfg.stores] if isinstance(cfg.stores, str) else cfg.stores, cfg.radii, cfg.out)


def main() -> None:
    command("report", report)


if __name__ == "__main__":
    main()
