"""What commands show on a Weights & Biases dashboard: while they work, and at their end."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import wandb
from matplotlib.figure import Figure
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from gsmooth_lightning.certify import ABSTAIN
from gsmooth_lightning.data.speech_commands import RATE
from gsmooth_lightning.report.curves import Record, by_area, certified_accuracy, largest, survivors
from gsmooth_lightning.report.figures import comparison_figure, displayed, report_figure
from gsmooth_lightning.report.tables import default_radii
from gsmooth_lightning.threat import Threat, TransformationThreat

COLUMNS = ("index", "label", "base", "prediction", "radius", "guarantee", "pa", "evaluations", "seconds")

PICTURED = 64
"""Images of a run that its tables show."""

PATIENCE = 30
"""Seconds that a run waits for wandb's server before it starts, and twice that at its end."""

Image = Callable[[int], Tensor]


def logger(offline: bool | None = None, **options: Any) -> WandbLogger:
    """A started run, on the server where there is a login and an answer, otherwise offline (`wandb sync` sends it).

    Args:
        offline: None: where there is no login.
        options: of Lightning's WandbLogger.
    """
    patience = {"init_timeout": PATIENCE, "finish_timeout": 2 * PATIENCE}
    if offline is None:
        offline = not wandb.login(prompt=False, verify=False)
    if not offline:
        online = WandbLogger(settings=patience, **options)
        try:
            _ = online.experiment
            return online
        except (wandb.errors.Error, OSError) as failure:
            reason = str(failure).partition("\n")[0]
            warnings.warn(f"wandb: {reason}; this run is logged offline, `wandb sync` sends it later", stacklevel=2)
    return WandbLogger(offline=True, mode="offline", settings=patience, **options)


def link(of: WandbLogger, made: tuple[str, str, Path] | None, used: Iterable[tuple[str, str]]) -> None:
    """Lineage: what a run used, and the file or folder it made, as artifacts (name, type). Offline, where wandb knows
    no artifact of others, the run's config and the artifact's metadata name what was used.

    Args:
        made: (name, type, path).
        used: (name, type) of each.
    """
    names = [name for name, _ in used]
    run = of.experiment
    run.config.update({"used": names}, allow_val_change=True)
    if not run.settings._offline:
        for name, kind in used:
            try:
                run.use_artifact(f"{name}:latest", type=kind)
            except (wandb.errors.Error, ValueError, OSError) as failure:  # made offline, or no answer
                warnings.warn(f"wandb: no artifact {name} ({str(failure).partition(chr(10))[0]})", stacklevel=2)
    if made is not None:
        name, kind, path = made
        artifact = wandb.Artifact(name, kind, metadata={"used": names})
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and not file.name.startswith("rank-"):
                artifact.add_file(str(file))
        run.log_artifact(artifact)


class Live:
    """Running means over the finished images: certified accuracy at the table's radii, E, or accuracy under attack, and
    images a second.

    Args:
        of: where they go.
        threat: of the run.
        before: records that the run began with.
    """

    def __init__(self, of: WandbLogger, threat: Threat, before: Sequence[Record]):
        self.logger, self.threat = of, threat
        self.sums: dict[str, float] = defaultdict(float)
        self.n = self.first = 0
        for record in before:
            self._add(record)
        self.first, self.start = self.n, time.monotonic()

    def _add(self, record: Record) -> None:
        self.n += 1
        for name, value in measures(record, self.threat).items():
            self.sums[name] += value

    def __call__(self, record: Record) -> None:
        self._add(record)
        means = {f"live/{name}": value / self.n for name, value in self.sums.items()}
        speed = (self.n - self.first) / max(time.monotonic() - self.start, 1e-9)
        self.logger.experiment.log({"live/images": self.n, "live/images a second": speed, **means})


def measures(record: Record, threat: Threat) -> dict[str, float]:
    """What is averaged of a record while a run works."""
    if "radius" in record and isinstance(record["radius"], float | int):
        hit = record["prediction"] == record["label"]
        radii = default_radii(threat, []) if isinstance(threat, TransformationThreat) else np.arange(0, 2.01, 0.25)
        found = {f"certified at {r:g} {threat.unit}": float(hit and record["radius"] >= r) for r in radii}
        spent = {name: float(record[name]) for name in ("evaluations", "seconds")}
        return found | {"abstained": float(record["prediction"] == ABSTAIN), **spent}
    if "gammas" in record:
        return {f"accuracy under attack, {who}": float(survivors([record], who)) for who in ("base", "smoothed")}
    return {"E": float(record["value"])} if "value" in record and np.isfinite(record["value"]) else {}


# ---------------------------------------------------------------- at the end


def log_certificates(of: WandbLogger, records: Sequence[Record], threat: Threat, image: Image) -> None:
    """The certified-accuracy curve, a table of certificates, clean images and the ends of their certified ranges, the
    contact sheet, and for sweeps the average certified radius and the accuracies in the run's summary."""
    end = threat.reach if isinstance(threat, TransformationThreat) else largest(records)
    radii = np.linspace(0, end, 61)
    curve = zip(radii.tolist(), *(c.tolist() for c in certified_accuracy(records, list(radii))), strict=True)
    accuracy = wandb.Table(columns=["radius", "accuracy", "low", "high"], data=list(map(list, curve)))
    of.experiment.log(
        {
            "certificates": wandb.Table(columns=list(COLUMNS), data=[[r[c] for c in COLUMNS] for r in records]),
            "certified_accuracy": accuracy,
            "certified accuracy": wandb.plot.line(accuracy, "radius", "accuracy", title=f"radius ({threat.unit})"),
            "report": wandb.Image(report_figure(records, threat, image)),
            "images": pictures(records, threat, image),
        }
    )
    if any("region" in r["details"] for r in records):
        by_size = comparison_figure({"certified": by_area(records)})
        of.experiment.log({"certified_area": wandb.Image(by_size)})
    hits = [r["radius"] if r["prediction"] == r["label"] else 0.0 for r in records]
    if all(isinstance(r["radius"], float | int) for r in records):
        of.experiment.summary["average_certified_radius"] = float(np.mean(hits))
    shown = default_radii(threat, records)
    for radius, value in zip(shown, certified_accuracy(records, shown)[0].tolist(), strict=True):
        of.experiment.summary[f"certified_at/{radius:g}"] = value


def pictures(records: Sequence[Record], threat: Threat, image: Image) -> wandb.Table:
    """Some images with their certificates; under a transformation with both ends of the certified range."""
    moved = isinstance(threat, TransformationThreat)
    rows: list[Iterable[Any]] = []
    for record in spread(records):
        clean = threat.prepare(image(record["index"])[None])
        row = [record["index"], record["label"], record["prediction"], record["radius"], drawn(clean[0])]
        if isinstance(threat, TransformationThreat):
            radius = record["radius"] if isinstance(record["radius"], float | int) else 0.0
            row += [at(threat, clean, list(end)) for end in threat.box(radius)]
        rows.append(row)
    ends = ["lower end", "upper end"] if moved else []
    return wandb.Table(columns=["index", "label", "prediction", "radius", "clean", *ends], data=rows)


def log_bounds(of: WandbLogger, records: Sequence[Record], threat: Threat, image: Image) -> None:
    """The histogram of E, or of the norms of defects, and the images with it."""
    if "norms" in records[0]:
        of.experiment.log({"norms": wandb.Histogram(np.concatenate([r["norms"] for r in records]).tolist())})
        return
    finite = [r["value"] for r in records if np.isfinite(r["value"])]
    rows: list[Iterable[Any]] = [
        [r["index"], r["label"], r["value"], drawn(threat.prepare(image(r["index"])[None])[0])] for r in spread(records)
    ]
    table = wandb.Table(columns=["index", "label", "E", "clean"], data=rows)
    of.experiment.log({"E": wandb.Histogram(finite), "images": table})


def log_attacks(of: WandbLogger, records: Sequence[Record], threat: Threat, image: Image) -> None:
    """Images, clean and in the attack's worst file (of parameters: changed pixels are not kept), and how many
    survive."""
    moved = isinstance(threat, TransformationThreat)
    rows: list[Iterable[Any]] = []
    for record in spread(records):
        clean = threat.prepare(image(record["index"])[None])
        row = [record["index"], record["label"], str(record["worst"]), drawn(clean[0])]
        if isinstance(threat, TransformationThreat):
            row.append(at(threat, clean, record["worst"]))
        rows.append(row)
    worst = ["worst attack"] if moved else []
    of.experiment.log({"images": wandb.Table(columns=["index", "label", "worst", "clean", *worst], data=rows)})
    for who in ("base", "smoothed"):
        of.experiment.summary[f"accuracy_under_attack/{who}"] = survivors(records, who) / len(records)


def log_report(of: WandbLogger, columns: Mapping[str, Mapping[str, str]], figures: Mapping[str, Figure]) -> None:
    """A report's table, a row a run, and its pictures."""
    frame = pd.DataFrame(columns).T.rename_axis("run").reset_index()
    shown = {name.removesuffix(".png"): wandb.Image(figure) for name, figure in figures.items()}
    of.experiment.log({"table": wandb.Table(dataframe=frame.fillna("")), **shown})


def spread(records: Sequence[Record]) -> list[Record]:
    """Some records from all over."""
    places = np.unique(np.linspace(0, len(records) - 1, PICTURED).astype(int))
    return [records[place] for place in places]


def at(threat: TransformationThreat, clean: Tensor, gamma: list[float]) -> Any:
    """The file that an attacker makes of a prepared image, (1, c, h, w)."""
    return drawn(threat.apply(clean, torch.tensor([gamma], dtype=torch.float32))[0])


def drawn(x: Tensor) -> Any:
    """An image, or a waveform to listen to."""
    if x.ndim == 3:
        return wandb.Image(displayed(x))
    return wandb.Audio(x[0].cpu().numpy(), sample_rate=RATE)
