"""`gsmooth verify`: a run's certificates, checked by somebody who need not trust who made them."""

import contextlib
import hashlib
import json
import math
import shlex
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gsmooth_lightning.certify import ABSTAIN, CoverCertifier, NestedCertifier, PerInputCertifier
from gsmooth_lightning.certify.base import TransferCertifier
from gsmooth_lightning.certify.rebound import rebound
from gsmooth_lightning.certify.store import COMPLETE, Record, Store, digest, read, read_identity
from gsmooth_lightning.data import Files, ImageData, Inputs
from gsmooth_lightning.error import Bound, CalibratedBound
from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.lit import BoundModule, CertificationModule
from gsmooth_lightning.lit.certification import StoredPrediction
from gsmooth_lightning.plans import FixedN, GroupSequential
from gsmooth_lightning.report.html import Audit, Difference, audit_page, check_shown
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.tasks.bound import norms_of, stored_bound
from gsmooth_lightning.tasks.launch import MOVABLE, command, without_leftovers
from gsmooth_lightning.tasks.run import Run
from gsmooth_lightning.tasks.setup import (
    CLASSIFIER,
    calibration_images,
    data_module,
    identity_of,
    images_in_words,
    plain,
    prepare,
    settings_of,
    smoothed_classifier,
)
from gsmooth_lightning.threat import Threat

GROUPS = ("error", "sampling", "certify")
"""What a certificate's identity holds beside the classifier."""

MACHINE = ("device", "versions")
"""What an auditor's machine may have of its own."""

EXACT = 1e-9
"""Share by which numbers may differ that another library or machine computed."""

PRINTED = 20
"""Differences that are printed; the page has all of them."""


def verify(cfg: DictConfig) -> Audit:
    """Checks the numbers of all images of a run, draws some images again, and writes the audit page.

    Raises:
        RequestError: no store of certificates, files or data that are not the run's, or certificates that cannot be
            drawn again one by one.
    """
    check_whole("", k=(cfg.k, 0), seed=(cfg.seed, 0))
    folder = Path(cfg.run)
    identity, records = read_identity(folder), read(folder)
    if identity["command"] != "certify":
        raise RequestError(f"{folder} is a {identity['command']} run; name a folder written by `gsmooth certify`")
    settings = settings_today(folder, cfg)
    data = data_module(settings)
    split, visited = data.split(settings.images.split), data.visited.indices
    now = identity_of(settings, (*CLASSIFIER, *GROUPS)) | {"images": f"{settings.images.split} {split.content_hash}"}
    check_same(folder, {key: identity.get(key) for key in now}, now)
    threat, certifier = instantiate(settings.threat), instantiate(settings.certify)
    if cfg.k:
        check_drawable(folder, identity, certifier)
    smoothed, store = smoothed_classifier(settings, nn.Identity()), calibration_store(folder, settings, certifier)
    fitted: Bound | None = None if store is None else certifier.error.fit(norms_of(read(store)), smoothed, threat)

    numbers = partial(
        arithmetic, certifier=certifier, smoothed=smoothed, threat=threat, seed=settings.seed, fitted=fitted
    )
    readable, differences = reading(records, numbers, split, threat)
    differences = listing(folder, records, visited) + differences
    if not readable:
        raise RequestError(f"{folder} holds no finished image that can be read; verify it later, or restore the store")

    notes, again = unchecked(folder, certifier, readable, visited), []
    if cfg.k:
        chosen = pick(readable, cfg.k, cfg.seed)
        again = draw_again(settings, folder, chosen, "certify", GROUPS, certifying(store), notes)
        differences += comparison(readable, again, "image", notes)
    if cfg.k and store is not None:
        own, chosen = calibration_images(settings_today(store, cfg)), pick(read(store), cfg.k, cfg.seed)
        measured = draw_again(own, store, chosen, "bound", ("error",), measuring, notes)
        differences += comparison(read(store), measured, "calibration image", notes)
        notes.append(f"Of the calibration images of the error bound {len(measured)} were measured again.")

    audit = Audit(
        run=str(folder),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=repetition(cfg),
        seed=cfg.seed,
        settings=cast(dict[str, Any], plain(settings)),
        identity=identity,
        smoothed=smoothed,
        threat=threat,
        records=readable,
        again=again,
        differences=differences,
        notes=notes,
        hashes=hashes(folder, identity),
        images=images_in_words(settings, readable),
        source=data.dataset.describe(),
        shared=fitted.alpha if fitted is not None else getattr(smoothed.noise, "alpha", 0.0),
        names=class_names(data.dataset, split),
    )
    page = Path(cfg.out) if cfg.out is not None else folder / "audit.html"
    save(page, audit_page(audit, data.image))
    print(audit.verdict, *differences[:PRINTED], sep="\n")
    if len(differences) > PRINTED:
        print(f"and {len(differences) - PRINTED} more, in the page")
    print("written:", page)
    return audit


def save(page: Path, text: str) -> None:
    """Writes the page.

    Raises:
        RequestError: it cannot be written there.
    """
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise RequestError(f"cannot write {page} ({failure.strerror}); set out=FILE elsewhere") from failure


# ---------------------------------------------------------------- what the run was


def settings_today(folder: Path, cfg: DictConfig) -> DictConfig:
    """The configuration that a store was made with, for one process on its kind of device; with the defaults of options
    that are newer than it, and with the places of files that the auditor names.

    Raises:
        RequestError: a store without a readable configuration.
    """
    made = settings_of(folder)
    files = {option: cfg[option] or made.get(option) for option in MOVABLE}
    settings = defaults().copy()
    for key, value in made.items():
        if key not in ("trainer", "devices", "shard", "logger", "store"):
            completed = key in ("data", "images", "train")
            settings[key] = OmegaConf.merge(settings[key], value) if completed else value
    settings.trainer.accelerator = "cpu" if read_identity(folder)["device"] == "cpu" else "gpu"
    settings.trainer.enable_progress_bar = False
    settings.logger = None
    settings.update(files)
    if cfg.data.dataset.root is not None:
        settings.data.dataset.root = cfg.data.dataset.root
    return settings


@cache
def defaults() -> DictConfig:
    """The configuration of certify without any option."""
    module, started = "gsmooth_lightning.conf", GlobalHydra.instance().is_initialized()
    with contextlib.nullcontext() if started else initialize_config_module(module, version_base="1.3"):
        settings = without_leftovers(compose("certify"))
    OmegaConf.set_struct(settings, False)
    return settings


def check_same(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to draw under conditions that are not the run's, but for the machine.

    Raises:
        RequestError: names what differs.
    """
    now = json.loads(json.dumps(now))
    differing = sorted(key for key in (stored.keys() | now.keys()) - {*MACHINE} if stored.get(key) != now.get(key))
    if differing:
        texts = {key: value for key, value in stored.items() if isinstance(value, str)}
        hashes = {key: f" ({texts[key]:.16}, here {now.get(key)!s:.16})" for key in differing if key in texts}
        raise RequestError(
            f"{folder} was made with another {', another '.join(key + hashes.get(key, '') for key in differing)}; name "
            "the run's own files (checkpoint=FILE, data.dataset.root=DIR, ...), or restore its config.yaml"
        )


def check_drawable(folder: Path, identity: Mapping[str, Any], certifier: Any) -> None:
    """Refuses what cannot be drawn again, image by image, on this machine."""
    how = "use k=0, which checks the numbers alone"
    if isinstance(certifier, PerInputCertifier):
        raise RequestError(f"each certificate of certify=per_input depends on those before it, of all images; {how}")
    if "bounds" in identity:
        raise RequestError(f"{folder} took its error bounds from another store, made for a wider range; {how}")
    if identity["device"] != "cpu" and not torch.cuda.is_available():
        raise RequestError(
            f"{folder} was drawn on a GPU ({identity['device']}), whose draws a CPU cannot repeat; verify it on a GPU, "
            f"or {how}"
        )


def calibration_store(folder: Path, settings: DictConfig, certifier: Any) -> Path | None:
    """Where the calibration of a bound for all images lies: beneath the run, or where the run took it from.

    Raises:
        RequestError: nowhere.
    """
    if not isinstance(certifier.error, CalibratedBound):
        return None
    for place in (folder / "bounds", Path(settings.bounds or folder / "bounds")):
        if (place / "fingerprint.json").is_file():
            return place
    raise RequestError(f"the calibration of {folder} is missing; put the store that its bounds=... named at {place}")


# ---------------------------------------------------------------- without drawing


def listing(folder: Path, records: Sequence[Record], visited: Sequence[int]) -> list[Difference]:
    """Images that are listed twice, that a finished run lacks, or that its configuration does not visit."""
    found: list[Difference] = []
    done = {record["index"] for record in records}
    if (folder / COMPLETE).exists():
        times = Counter(json.loads(line)["index"] for line in (folder / COMPLETE).read_text().split("\n")[:-1])
        found += [
            Difference(f"image {i}", "record", f"{count} times", "once for an image", "must be")
            for i, count in sorted(times.items())
            if count > 1
        ]
        lacking = sorted(set(visited) - done)
        found += [Difference(f"image {i}", "record", None, "one", "by config.yaml") for i in lacking]
    more = sorted(done - set(visited))
    return found + [Difference(f"image {i}", "record", "one", "none", "by config.yaml") for i in more]


def reading(
    records: Sequence[Record], numbers: Callable[[Record], Iterator[Difference]], split: Inputs, threat: Threat
) -> tuple[list[Record], list[Difference]]:
    """The records that can be read and shown, and what contradicts them (see `arithmetic` and `labelling`) or cannot be
    read: a store may hold anything."""
    readable: list[Record] = []
    differences: list[Difference] = []
    for record in records:
        try:
            differences += numbers(record)
            differences += labelling(record, split)
            check_shown(record, threat)
            readable.append(record)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as failure:
            differences.append(Difference(name(record), "record", record, f"no certificate ({failure!r})", "read as"))
    return readable, differences


def arithmetic(
    record: Record,
    certifier: Any,
    smoothed: SmoothedClassifier,
    threat: Threat,
    seed: int,
    fitted: Bound | None = None,
) -> Iterator[Difference]:
    """What of a record contradicts the rest of it, or the configuration. With a number of draws fixed beforehand the
    prediction, bounds and radius follow from the votes.

    Args:
        record: of one image.
        certifier, smoothed, threat: of the run, the classifier without its network.
        seed: the run's.
        fitted: the bound of all images, if there is one.
    """
    image, details = name(record), record["details"]
    theorem = getattr(certifier, "theorem", certifier)  # that of certify=per_input lies beneath
    plan = theorem.plan if isinstance(theorem, TransferCertifier) else None
    fixed = plan if isinstance(plan, FixedN) and theorem is certifier else None
    alpha = getattr(plan or certifier, "alpha", 0.0) + details.get("alpha_E", 0.0)
    expected: dict[str, Any] = {"seed": seed, "unit": threat.unit, "alpha": alpha}
    if fixed is not None:
        expected["n"] = fixed.n
    by_config = {field: value for field, value in expected.items() if not agree(record[field], value)}
    yield from (Difference(image, field, record[field], value, "by config.yaml") for field, value in by_config.items())
    if fitted is not None:
        own = {"E": fitted.value, "rho": fitted.rho, "alpha_E": fitted.alpha}
        wrong = {field: value for field, value in own.items() if not agree(details[field], value)}
        yield from (
            Difference(image, f"details.{field}", details[field], value, "from its calibration")
            for field, value in wrong.items()
        )
    whole = isinstance(certifier, TransferCertifier | CoverCertifier) and smoothed.votes == "hard"
    if whole and not isinstance(certifier, NestedCertifier) and sum(record["counts"]) != record["n"]:
        yield Difference(image, "counts", f"{sum(record['counts'])} in all", record["n"], "by n")
    radii = record["radius"] if isinstance(record["radius"], list) else [record["radius"]]
    if not all(0 <= radius <= threat.reach for radius in radii):
        yield Difference(image, "radius", record["radius"], f"0 to {threat.reach:g}", "by the threat")
    if "n" in by_config:
        return
    if fixed is not None:
        again = rebound(record, theorem, smoothed, threat)
        for field in ("prediction", "radius", "pa", "pb"):
            if not agree(record[field], again[field]):
                yield Difference(image, field, record[field], again[field], "from its votes")
        region = again["details"].get("region")
        if not agree(details.get("region"), region):
            yield Difference(image, "details.region", details.get("region"), region, "from its radius")
    elif isinstance(plan, GroupSequential):
        top = int(np.argmax(record["selection"]))
        if record["prediction"] not in (ABSTAIN, top):
            yield Difference(image, "prediction", record["prediction"], top, "from its votes")
        targets = [min(radius, threat.reach) for radius in plan.radii] if record["prediction"] != ABSTAIN else [0.0]
        if not any(agree(record["radius"], target) for target in targets):
            yield Difference(image, "radius", record["radius"], targets, "one of")


def labelling(record: Record, split: Inputs) -> Iterator[Difference]:
    """A label that is not the data's.

    Raises:
        IndexError: the data have no such image.
    """
    if not 0 <= record["index"] < len(split):  # type: ignore[arg-type]
        raise IndexError(f"the data have no image {record['index']}")
    label = int(split[record["index"]][1])
    if record["label"] != label:
        yield Difference(name(record), "label", record["label"], label, "in the data")


def unchecked(folder: Path, certifier: Any, records: Sequence[Record], visited: Sequence[int]) -> list[str]:
    """What the store does not allow to check, in words."""
    notes = []
    if not (folder / COMPLETE).exists():
        notes.append(f"The run is not finished: {len(records)} of its {len(visited)} images are here.")
    if not (isinstance(certifier, TransferCertifier) and isinstance(certifier.plan, FixedN)):
        notes.append(
            "Of images that were not drawn again, radii and guarantees are taken as stored: where sampling "
            "stopped at what it saw, or votes are soft or of single parameters, the final counts do not tell what was "
            "decided."
        )
    else:
        notes.append(
            "Of images that were not drawn again, guarantees, votes and what comes before them (E, rho, alpha_E, "
            "slack, dim) are taken as stored; their predictions and radii follow from these."
        )
    return notes


# ---------------------------------------------------------------- with draws


def pick(records: Sequence[Record], k: int, seed: int) -> list[int]:
    """Indices of k of the images at random, or of all where there are fewer."""
    indices = sorted(record["index"] for record in records)
    return sorted(np.random.default_rng(seed).permutation(indices)[:k].tolist())


def draw_again(
    settings: DictConfig,
    folder: Path,
    chosen: Sequence[int],
    command: str,
    groups: tuple[str, ...],
    module: Callable[[Run, Store], StoredPrediction],
    notes: list[str],
) -> list[Record]:
    """Records of the chosen images of a store, drawn again from their addresses as its command drew them, in a folder
    that is removed afterwards. What this machine has of its own goes to stderr and to the notes.

    Raises:
        RequestError: anything else differs from what the store was made with.
    """
    identity = read_identity(folder)
    images = {"indices": list(chosen), "first": None, "every": 1}
    with tempfile.TemporaryDirectory() as place:
        own = cast(DictConfig, OmegaConf.merge(settings, {"store": f"{place}/store", "images": images}))
        run = prepare(own, command, groups, with_network=command == "certify")
        check_same(folder, identity, run.identity)
        note = other_machine(identity, run.identity)
        if note and note not in notes:
            print(f"gsmooth verify: {note}", file=sys.stderr)
            notes.append(note)
        run.identity |= {key: identity[key] for key in MACHINE}  # a bound's store is compared with it
        with run.store() as store:
            return run.predict(module(run, store))


def certifying(calibration: Path | None) -> Callable[[Run, Store], StoredPrediction]:
    """What certifies images, with the bound of a calibration if there is one."""

    def module(run: Run, store: Store) -> StoredPrediction:
        certifier = instantiate(run.cfg.certify)
        certifier.check(run.smoothed, run.threat)
        if calibration is not None:
            certifier.error = stored_bound(calibration, certifier.error, run)
        return CertificationModule(certifier, run.smoothed, run.threat, store, run.cfg.seed)

    return module


def measuring(run: Run, store: Store) -> StoredPrediction:
    """What measures calibration images."""
    return BoundModule(instantiate(run.cfg.error), run.smoothed, run.threat, store, run.cfg.seed)


def other_machine(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what this machine differs from the run's, and what that may do."""
    pairs = {"device": (stored["device"], now["device"])}
    pairs |= {key: (stored["versions"].get(key), value) for key, value in now["versions"].items()}
    other = [f"{key} {before}, here {here}" for key, (before, here) in pairs.items() if before != here]
    return f"the run was made with {'; '.join(other)}: counts may differ in borderline draws" if other else ""


def comparison(stored: Sequence[Record], again: Sequence[Record], image: str, notes: list[str]) -> Iterator[Difference]:
    """Every field, but seconds, in which records differ from those drawn again. What none of them states, because a
    newer version does, is a note."""
    by_index = {record["index"]: flat(record) for record in stored}
    known = set().union(*by_index.values())
    unknown = {field for record in again for field in flat(record)} - known
    notes += [f"No record states {field}, which this version does." for field in sorted(unknown)]
    for record in again:
        own, found = by_index[record["index"]], flat(record)
        for field in sorted((own.keys() | found.keys()) - unknown - {"seconds"}):
            if not agree(own.get(field), found.get(field)):
                yield Difference(f"{image} {record['index']}", field, own.get(field), found.get(field), "drawn again")


def flat(record: Record) -> Record:
    """A record with its details as fields of their own."""
    details = {f"details.{key}": value for key, value in record.get("details", {}).items()}
    return {key: value for key, value in record.items() if key != "details"} | details


def agree(a: Any, b: Any) -> bool:
    """Whether two values of a record are the same, numbers up to the last digits."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(agree(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(agree, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return a == b or math.isclose(a, b, rel_tol=EXACT, abs_tol=1e-3 * EXACT)
    return bool(a == b)


# ---------------------------------------------------------------- for the page


def name(record: Record) -> str:
    return f"image {record['index']}"


def hashes(folder: Path, identity: Mapping[str, Any]) -> dict[str, str]:
    """What names the run's bytes, and those of all it depends on."""
    rows = {"fingerprint": digest(dict(identity))}
    for file in ("fingerprint.json", "config.yaml", COMPLETE):
        if (folder / file).exists():
            rows[f"{file} (SHA-256)"] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    rows |= {"checkpoint": identity["checkpoint"] or "none", "data": identity["images"]}
    if "denoiser" in identity:
        rows["denoiser"] = identity["denoiser"]["checkpoint"]
    if isinstance(identity["noise"], str):
        rows["learned noise"] = identity["noise"]
    if identity.get("calibration") is not None:
        rows["calibration images"] = identity["calibration"]
    rows |= {f"own code, {module}": made for module, made in identity.get("own code", {}).items()}
    versions = ", ".join(f"{key} {value}" for key, value in identity["versions"].items())
    return rows | {"versions": versions, "device": identity["device"], "network's backend": str(identity["backend"])}


def class_names(dataset: ImageData, split: Inputs) -> dict[int, str]:
    """Names of the classes, of data sets that know them or have a folder for each."""
    if names := dataset.names:
        return dict(enumerate(names))
    folders: dict[int, set[str]] = defaultdict(set)
    for file, label in split.files if isinstance(split, Files) else []:
        folders[label].add(Path(file).parent.name)
    found = {label: min(names) for label, names in folders.items()}
    alone = all(len(names) == 1 for names in folders.values()) and len(set(found.values())) == len(found)
    return found if alone else {}


def repetition(cfg: DictConfig) -> str:
    """The command that does this again."""
    given = {option: cfg[option] for option in MOVABLE} | {"data.dataset.root": cfg.data.dataset.root, "out": cfg.out}
    options = [f"{option}={value}" for option, value in given.items() if value is not None]
    return shlex.join(["gsmooth", "verify", str(cfg.run), f"k={cfg.k}", f"seed={cfg.seed}", *options])


def end(audit: Audit) -> None:
    """Exit status 1 where something does not hold."""
    if audit.differences:
        raise SystemExit(1)


def main() -> None:
    command("verify", verify, end)


if __name__ == "__main__":
    main()
