"""Pictures of what was certified."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gsmooth_lightning.certify import ABSTAIN
from gsmooth_lightning.report.curves import Record, blanket, certified_accuracy, envelope, largest, survivors, tradeoff
from gsmooth_lightning.threat import Threat, TransformationThreat

COLUMNS = 8
"""Images in a row of the contact sheet."""

PIECES = 200
"""Of the time, in the picture of a waveform."""

INK, BLUE, RED = "#222222", "#2166ac", "#b2182b"


def report_figure(
    records: Sequence[Record], threat: Threat, image: Callable[[int], Tensor], attacked: Sequence[Record] = ()
) -> Figure:
    """The certified-accuracy curve; under a transformation beside images or waveforms at their certified ends.

    Args:
        records: certificates.
        threat: of the certificates.
        image: index -> clean image of the data set, (c, h, w), for the contact sheet.
        attacked: records of an attack on the same images.
    """
    if not isinstance(threat, TransformationThreat):
        figure = _canvas(6.4, 4.8)
        _curve(figure, records, threat, attacked)
        return figure
    figure = _canvas(12, 5.4)
    left, right = cast(np.ndarray, figure.subfigures(1, 2, width_ratios=(1.15, 1)))
    _curve(left, records, threat, attacked)
    places = np.unique(np.linspace(0, len(records) - 1, 2 * COLUMNS).astype(int))
    shown = [(records[i], image(records[i]["index"])) for i in places]
    sheet = _contact_sheet if shown[0][1].ndim == 3 else _waveforms
    sheet(right, shown, threat)
    return figure


def comparison_figure(runs: Mapping[str, Sequence[Record]], with_envelope: bool = False) -> Figure:
    """Certified accuracy of runs, a curve each with its 95 % interval over images; one panel for each unit of radii.

    Args:
        runs: certificates by name.
        with_envelope: draws the runs' upper envelope (`curves.envelope`).
    """
    panels: dict[str, dict[str, Sequence[Record]]] = {}
    for name, records in runs.items():
        panels.setdefault(records[0]["unit"], {})[name] = records
    figure = _canvas(7.2 * len(panels), 4.8)
    for axes, (unit, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        end = 1.05 * max(map(largest, shown.values())) or 1.0
        radii = np.linspace(0, end, 241)
        for name, records in shown.items():
            value, low, high = certified_accuracy(records, list(radii))
            (line,) = axes.plot(radii, value, linewidth=2, label=f"{name} ({len(records)} images)")
            axes.fill_between(radii, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        if with_envelope:
            _, value, _, _ = envelope(shown, list(radii))
            axes.plot(radii, value, color=INK, linestyle="--", linewidth=1, label="envelope (best run at each radius)")
        axes.set(xlabel=f"radius ({unit})", ylabel="certified accuracy", xlim=(0, end), ylim=(0, 1.02))
        _plain(axes)
    return figure


def imitation_figure(columns: Sequence[tuple[Sequence[float], Tensor, Tensor]]) -> Figure:
    """For each parameter, (parameter, transformed images, their imitations), a column: two rows an image."""
    images = len(columns[0][1])
    figure = _canvas(1.1 * len(columns), 2.2 * images)
    axes = figure.subplots(2 * images, len(columns), squeeze=False)
    figure.suptitle("transformed (above) and imitated (below), by parameter", fontsize=11)
    for k, (parameter, *both) in enumerate(columns):
        axes[0, k].set_title(", ".join(f"{v:+.3g}" for v in parameter), fontsize=8)
        for kind, shown in enumerate(both):
            for i, x in enumerate(shown):
                axes[2 * i + kind, k].imshow(displayed(x), cmap="gray", vmin=0, vmax=1)
    for cell in axes.flat:
        cell.axis("off")
    return figure


def denoising_figure(rows: Mapping[str, Tensor]) -> Figure:
    """Images, (n, c, h, w), a row each, by what was done to them."""
    images = len(next(iter(rows.values())))
    figure = _canvas(1.1 * images, 1.3 * len(rows))
    axes = figure.subplots(len(rows), images, squeeze=False)
    for row, (name, shown) in zip(axes, rows.items(), strict=True):
        row[0].set_title(name, fontsize=9, loc="left")
        for cell, x in zip(row, shown, strict=True):
            cell.imshow(displayed(x), cmap="gray", vmin=0, vmax=1)
            cell.axis("off")
    return figure


def area_figure(runs: Mapping[str, Sequence[Record]]) -> Figure:
    """Accuracy against the mean certified area, a point for each run, with the line of those that no others cover, of
    isotropic noise and of the rest (Tecot et al. 2021, Figure 2)."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for records in runs.values():
        regions = [r["details"]["region"] for r in records if "region" in r["details"]]
        alike = all(region["axis_largest"] <= region["axis_least"] * (1 + 1e-6) for region in regions)
        kinds.setdefault("isotropic" if alike else "not isotropic", []).append(tradeoff(records))
    return tradeoff_figure(dict(sorted(kinds.items())), "mean certified area (images that are right)")


def tradeoff_figure(kinds: Mapping[str, Sequence[tuple[float, float]]], size: str) -> Figure:
    """(size, accuracy) points of one or two kinds, each with its `curves.blanket`; `size` says what they measure."""
    figure = _canvas(7.2, 4.8)
    axes = figure.subplots()
    for (name, points), color in zip(kinds.items(), (BLUE, RED), strict=False):
        axes.plot(*np.transpose(points), "o", markersize=4, color=color, alpha=0.5)
        axes.plot(*np.transpose(blanket(points)), color=color, linewidth=2, label=name)
    axes.set(xlabel=size, ylabel="accuracy (most votes)")
    axes.set_ylim(top=1.02)
    _plain(axes)
    return figure


def sigma_figure(sigmas: Mapping[str, Tensor]) -> Figure:
    """Standard deviations of the noise as images, (c, h, w) each, dark for the least of an image and bright for its
    largest, over all channels alike; of a waveform, (c, t), as a curve (Tecot et al. 2021, Figure 3)."""
    figure = _canvas(3.2 * len(sigmas), 3.6)
    for axes, (name, sigma) in zip(figure.subplots(1, len(sigmas), squeeze=False)[0], sigmas.items(), strict=True):
        low, high = float(sigma.min()), float(sigma.max())
        axes.set_title(f"{name}: {low:.3g} to {high:.3g}", fontsize=10)
        if sigma.ndim != 3:
            axes.plot(sigma.flatten(0, -2).T.cpu().numpy(), color=BLUE, linewidth=0.5)
            continue
        axes.imshow(displayed((sigma - low) / max(high - low, 1e-12)), cmap="gray", vmin=0, vmax=1)
        axes.axis("off")
    return figure


def _canvas(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _plain(axes: Axes, **legend: Any) -> None:
    """Axes with a legend, a faint grid, and no frame above and at the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, **legend)


def _curve(figure, records: Sequence[Record], threat: Threat, attacked: Sequence[Record]) -> None:
    end = threat.reach if isinstance(threat, TransformationThreat) else 1.05 * largest(records) or 1.0
    radii = np.linspace(0, end, 241)
    value, low, high = certified_accuracy(records, list(radii))
    axes = figure.subplots()
    axes.fill_between(radii, low, high, color=BLUE, alpha=0.15, linewidth=0, label="95 % interval over images")
    axes.plot(radii, value, color=BLUE, linewidth=2, label="certified (smoothed classifier)")
    base = np.mean([r["base"] == r["label"] for r in records])
    axes.axhline(base, color=INK, linestyle=":", linewidth=1, label="base classifier, clean")
    for key, style in (("smoothed", "-."), ("base", "--")):
        if attacked:
            alive = [survivors(attacked, key, radius) / len(attacked) for radius in radii]
            axes.plot(radii, alive, color=RED, linestyle=style, linewidth=1, label=f"{key} classifier, attacked")
    guarantee = ", ".join(sorted({r["guarantee"] for r in records}))
    axes.set(
        xlabel=f"radius ({records[0]['unit']})",
        ylabel="accuracy",
        xlim=(0, end),
        ylim=(0, 1.02),
        title=f"{len(records)} images, alpha = {max(r['alpha'] for r in records):g}, guarantee: {guarantee}",
    )
    _plain(axes, loc="lower left")


def _contact_sheet(figure, shown: Sequence[tuple[Record, Tensor]], threat: TransformationThreat) -> None:
    """Two rows of images: each at one end of its certified range, clean, and at the other end."""
    axes = figure.subplots(6, COLUMNS, squeeze=False)
    figure.suptitle(f"at the ends of the certified range ({threat.unit})", fontsize=11)
    for cell in axes.flat:
        cell.axis("off")
    for k, (record, x) in enumerate(shown):
        clean = threat.prepare(x[None])
        top, column = 3 * (k // COLUMNS), k % COLUMNS
        good = record["prediction"] == record["label"]
        name = "abstained" if record["prediction"] == ABSTAIN else f"{record['prediction']}"
        low, high = threat.box(record["radius"])
        for row, end in enumerate((low, None, high)):
            cell = axes[top + row, column]
            shown_file = clean if end is None else threat.apply(clean, torch.tensor([end], dtype=torch.float32))
            cell.imshow(displayed(shown_file[0]), cmap="gray", vmin=0, vmax=1)
            if end is None:
                cell.set_title(name, fontsize=8, pad=1, color=INK if good else RED)
            elif good and record["radius"]:
                cell.set_title(", ".join(f"{value:+.3g}" for value in end), fontsize=7, pad=1)


def _waveforms(figure, shown: Sequence[tuple[Record, Tensor]], threat: TransformationThreat) -> None:
    """Clips, (1, t): the range of the samples in each of PIECES of the time, clean and at both ends of the certified
    range."""
    axes = figure.subplots(-(-len(shown) // 2), 2, squeeze=False, sharex=True, sharey=True).T.ravel()
    figure.suptitle(f"clean, and at the ends of the certified range ({threat.unit})", fontsize=11)
    for cell in axes:
        cell.axis("off")
    for cell, (record, x) in zip(axes, shown, strict=False):
        clean = threat.prepare(x[None])
        low, high = threat.box(record["radius"])
        good = record["prediction"] == record["label"]
        for end, color in ((high, BLUE), (None, INK), (low, RED)):
            file = clean if end is None else threat.apply(clean, torch.tensor([end], dtype=torch.float32))
            least, most = ranges(file[0], PIECES)
            cell.fill_between(range(len(least)), least, most, color=color, linewidth=0)
        ends = f": {low[0]:+.3g}, {high[0]:+.3g}" if record["radius"] else ": at 0 alone"
        name = "abstained" if record["prediction"] == ABSTAIN else f"{record['prediction']}{ends}"
        cell.set_title(name, fontsize=7, pad=1, color=INK if good else RED)


def ranges(x: Tensor, most: int) -> tuple[list[float], list[float]]:
    """The least and the largest sample of a waveform, (c, t), in each of so many pieces of the time, or fewer."""
    pieces = x[0].cpu().tensor_split(min(most, x.shape[1]))
    return [float(piece.min()) for piece in pieces], [float(piece.max()) for piece in pieces]


def displayed(x: Tensor) -> np.ndarray:
    """What a picture shows of x, (c, h, w): (h, w) or (h, w, 3) in [0, 1]."""
    if x.shape[0] not in (1, 3):  # latents
        x = x.mean(0, keepdim=True)
    return x.clamp(0, 1).permute(1, 2, 0).squeeze(-1).cpu().numpy()
