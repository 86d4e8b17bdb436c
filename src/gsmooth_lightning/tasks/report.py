"""`gsmooth report`: table and picture of finished or running stores, and of other authors' logs."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gsmooth_lightning.certify.rebound import check_reboundable, rebound
from gsmooth_lightning.certify.store import Record, check_identity, read, read_identity
from gsmooth_lightning.certify.topk import check_top_k
from gsmooth_lightning.error import CalibratedBound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.report.curves import by_area, for_label
from gsmooth_lightning.report.figures import area_figure, comparison_figure, report_figure
from gsmooth_lightning.report.logs import as_log, read_log
from gsmooth_lightning.report.tables import (
    RECEIVED,
    attack_rows,
    bound_rows,
    by_run,
    calibrated_rows,
    certificate_rows,
    default_radii,
    envelope_rows,
    latex,
    log_rows,
    markdown,
    text,
)
from gsmooth_lightning.tasks.dashboard import log_table
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import (
    CLASSIFIER,
    data_module,
    identity_of,
    images_in_words,
    settings_of,
    smoothed_classifier,
)

JOINED = (*CLASSIFIER, "images", "checkpoint", "denoiser", "own code", "block", "votes", "versions")
"""What an attack and the certificates it is reported with have in common."""


@dataclass(frozen=True)
class Source:
    """What lies at a path.

    Attributes:
        kind: "certify", "bound" or "attack" of a store, or "log". A log has no identity, settings and threat.
    """

    path: Path
    kind: str
    records: list[Record]
    identity: dict[str, Any] = field(default_factory=dict)
    settings: DictConfig = field(default_factory=lambda: OmegaConf.create())
    threat: Any = None


def load(path: Path) -> Source:
    """Reads a store or a log.

    Raises:
        RequestError: neither; a run that reports nothing; or no image in it yet.
    """
    if path.is_file():
        return Source(path, "log", read_log(path))
    identity, records = read_identity(path), read(path)
    if identity["command"] not in ("certify", "attack", "bound"):
        raise RequestError(
            f"{path} is a {identity['command']} run; name folders written by certify, bound or attack, or logs"
        )
    if not records:
        raise RequestError(f"{path} holds no finished image yet; report it later")
    settings = settings_of(path)
    return Source(path, identity["command"], records, identity, settings, instantiate(settings.threat))


def with_other_bounds(source: Source, changes: dict[str, Any], top_k: int | None) -> Source:
    """The certificates of a store bounded again, where that is asked for; a top-k certificate becomes that of the
    image's own label, which is what tables count.

    Raises:
        RequestError: a store or log that cannot be.
    """
    records = source.records
    if changes or top_k is not None:
        if source.kind != "certify":
            raise RequestError(f"{source.path} holds no votes to bound again; leave alpha, bounds and top_k out")
        cfg = source.settings
        certifier = instantiate(cfg.certify)
        check_reboundable(certifier)
        if cfg.learned is not None or cfg.surrogate is not None:  # files that may be others now
            check_identity(source.path, identity_of(cfg, CLASSIFIER), CLASSIFIER)
        plan = certifier.plan
        certifier.plan = FixedN(**{"n0": plan.n0, "n": plan.n, "alpha": plan.alpha, "bounds": plan.bounds} | changes)
        certifier.top_k = certifier.top_k if top_k is None else top_k
        check_top_k(certifier.top_k, cfg.data.classes)
        smoothed = smoothed_classifier(cfg, nn.Identity())
        records = [rebound(record, certifier, smoothed, source.threat) for record in records]
    return replace(source, records=[for_label(record) for record in records])


def names_of(paths: Sequence[Path]) -> list[str]:
    """For each path the shortest end that no other shares."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise RequestError("stores names one folder or file twice; name each once")

    def end(part: tuple[str, ...]) -> str:
        tails = (part[-depth:] for depth in itertools.count(1))
        return "/".join(next(tail for tail in tails if sum(other[-len(tail) :] == tail for other in parts) == 1))

    return [end(part) for part in parts]


def show(
    stores: Sequence[str | Path],
    radii: Sequence[float] | None = None,
    out: str | Path | None = None,
    envelope: bool = False,
    cohen: str | Path | None = None,
    alpha: float | None = None,
    bounds: str | None = None,
    top_k: int | None = None,
    refused: Mapping[str, str] | None = None,
    area: bool = False,
    log: Callable[[Path, dict[str, dict[str, str]], dict[str, Figure]], None] | None = None,
) -> str:
    """Writes report.md, report.tex and report.png into `out`, prints and returns the table.

    Attack stores are joined by image to the certificate store named before them.

    Args:
        stores: folders of runs, and logs in the format of Cohen et al. 2019.
        radii: to show; by default those of `default_radii`, the same for all runs with one unit.
        out: folder; by default the last store, or the last log's folder.
        envelope: adds the upper envelope of all certificates (`curves.envelope`).
        cohen: file to which the certificates of the one store are written as a log.
        alpha, bounds, top_k: bound the votes of stores with a fixed n again, in this way (see `rebound`).
        area: measures certificates of pixel noise by their ellipsoids (`curves.by_area`), and writes area.png.
        log: told the folder, the table's columns and the figures.
        refused: certificates that do not apply, with the reason: compares the others, a row each, above the table.
    """
    check_options(stores, radii, envelope=envelope, area=area)
    paths = [Path(store) for store in stores]
    changes = {key: value for key, value in (("alpha", alpha), ("bounds", bounds)) if value is not None}
    loaded = [with_other_bounds(source, changes, top_k) for source in map(load, paths)]
    if area:
        if any(source.kind == "attack" for source in loaded):
            raise RequestError("area=true compares certificates by their ellipsoids; report attacks without it")
        loaded = [replace(source, records=by_area(source.records)) for source in loaded]
    sources = dict(zip(names_of(paths), loaded, strict=True))
    runs = {name: source.records for name, source in sources.items() if source.kind in ("certify", "log")}
    if cohen is not None and len(runs) != 1:
        raise RequestError(f"cohen=FILE takes the certificates of one store, not of {len(runs)}; name one in stores")
    shown = {name: radii or shown_radii(sources[name], runs) for name in runs}
    columns = rows(sources, shown)
    columns |= {name: {"does not apply": reason} for name, reason in (refused or {}).items()}
    if envelope:
        columns["upper envelope"] = envelope_rows(runs, next(iter(shown.values()), []))
    target = Path(out) if out is not None else (paths[-1].parent if paths[-1].is_file() else paths[-1])
    whole = markdown(columns) + "\n"
    if refused is not None:
        whole = markdown(by_run(columns)) + "\n\n" + whole
    files = {target / "report.md": whole, target / "report.tex": latex(columns)}
    if cohen is not None:
        (records,) = runs.values()
        files[Path(cohen)] = as_log(records)
    figures = {"report.png": picture(sources, runs, envelope)} if runs else {}
    if area:
        figures["area.png"] = area_figure(runs)
    write(target, files, figures)
    if log is not None:
        log(target, columns, figures)
    table = text(columns if refused is None else by_run(columns))
    print(table)
    print("written:", *files, *(target / name for name in figures))
    return table


def check_options(stores: Sequence[str | Path], radii: Sequence[float] | None, **switches: bool) -> None:
    """Refuses options of the wrong kind before anything is read."""
    if not stores:
        raise RequestError("there is nothing to report; name stores=[FOLDER,...]")
    if radii is not None and (isinstance(radii, str) or not all(isinstance(r, int | float) and r >= 0 for r in radii)):
        raise RequestError(f"radii must be a list of numbers from 0 on, such as [0,10,20], got {radii}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false, got {value!r}")


def write(target: Path, texts: Mapping[Path, str], figures: Mapping[str, Figure]) -> None:
    """Writes texts, and figures into the folder `target`.

    Raises:
        RequestError: one of them cannot be written.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, content in texts.items():
            path.write_text(content)
        for name, figure in figures.items():
            figure.savefig(target / name, dpi=150)
    except OSError as failure:
        raise RequestError(
            f"cannot write {failure.filename or target} ({failure.strerror}); set out=FOLDER, and cohen=FILE, elsewhere"
        ) from failure


def shown_radii(source: Source, runs: Mapping[str, Sequence[Record]]) -> list[float]:
    """Radii for a run's table: the same for all runs with its unit."""
    unit = source.records[0]["unit"]
    return default_radii(source.threat, [r for records in runs.values() for r in records if r["unit"] == unit])


def rows(sources: Mapping[str, Source], radii: Mapping[str, Sequence[float]]) -> dict[str, dict[str, str]]:
    """A column of the table for each source; an attack's lines join those of the certificates named before it."""
    columns: dict[str, dict[str, str]] = {}
    certified = None
    attacks = Counter(attack_name(source) for source in sources.values() if source.kind == "attack")
    for name, source in sources.items():
        records, threat = source.records, source.threat
        if source.kind == "log":
            columns[name] = log_rows(records, radii[name])
            continue
        images, data = images_in_words(source.settings, records), source.identity["source"]
        attack = attack_name(source) if source.kind == "attack" else ""
        attack += f", {name}" if attacks[attack] > 1 else ""
        if source.kind == "certify":
            columns[name], certified = certificate_rows(records, threat, images, data, radii[name]), name
            if source.settings.certify._target_.endswith(".ReceivedCertifier"):
                columns[name]["certified is"] = RECEIVED
        elif source.kind == "bound":
            columns[name] = error_rows(source, images, data)
        elif certified is not None:
            check_identity(source.path, sources[certified].identity, JOINED)
            theorem = sources[certified].settings.certify._target_
            other = theorem.endswith((".NestedCertifier", ".ReceivedCertifier"))  # of another classifier or image
            certificates = [] if other else sources[certified].records
            columns[certified] |= attack_rows(records, certificates, attack, tried(source))
        else:
            columns[name] = {
                "images": f"{len(records)} ({images})",
                "data": data,
                "inputs": f"{threat.inputs}; distances in {threat.unit}",
                "threat": threat.describe(),
                **attack_rows(records, (), attack, tried(source)),
            }
    return columns


def attack_name(source: Source) -> str:
    """The attack of a store, in words; older ones are of the worst of k."""
    node = source.identity["attack"]
    craft = node.get("craft", node)
    inner = craft.get("attack", craft.get("make", craft))
    first, *_, last = inner.get("_target_", "worst_of_k").split(".")
    return last.replace("_", " ") if first in ("gsmooth_lightning", last) else f"{first} {last}"


def tried(source: Source) -> dict[str, float]:
    """How far an attack's tries are from the clean input, in words: up to each epsilon, or anywhere in the range."""
    epsilons = source.identity["attack"].get("epsilons")
    return {"": math.inf} if epsilons is None else {f" up to {e:g} {source.threat.unit}": e for e in epsilons}


def error_rows(source: Source, images: str, data: str) -> dict[str, str]:
    """The lines of a store of error bounds, or of the defects from which one bound for all images is made."""
    records, threat = source.records, source.threat
    learned = source.settings.get("learned") is not None
    sigma = source.settings.noise.get("sigma") if source.settings.noise is not None and not learned else None
    scale = float(sigma) if isinstance(sigma, int | float) else None
    if "norms" not in records[0]:
        return bound_rows(records, threat, images, data, scale)
    error: CalibratedBound = instantiate(source.settings.error)
    norms = np.array([r["norms"] for r in records])
    bound = error.conclude(norms, threat) if len(norms) == error.calibration else None
    seconds = float(np.mean([r["seconds"] for r in records]))
    return calibrated_rows(norms, bound, threat, images, data, seconds, scale)


def picture(sources: Mapping[str, Source], runs: Mapping[str, Sequence[Record]], envelope: bool) -> Figure:
    """One store's curve and contact sheet, with the attack named after it, or the curves of several runs."""
    from_stores = list(itertools.dropwhile(lambda source: source.kind != "certify", sources.values()))
    if len(runs) > 1 or not from_stores:
        return comparison_figure(runs, envelope)
    attacks: list[Sequence[Record]] = [(), *(source.records for source in from_stores if source.kind == "attack")]
    certified = from_stores[0]
    return report_figure(certified.records, certified.threat, data_module(certified.settings).image, attacks[-1])


def report(cfg: DictConfig) -> str:
    """The report of the stores named in the configuration."""
    stores = [cfg.stores] if isinstance(cfg.stores, str) else cfg.stores
    log = partial(log_table, cfg, "report", [Path(store) for store in stores])
    options = (cfg.radii, cfg.out, cfg.envelope, cfg.cohen, cfg.alpha, cfg.bounds, cfg.top_k)
    return show(stores, *options, area=cfg.area, log=log)


def main() -> None:
    command("report", report)


if __name__ == "__main__":
    main()
