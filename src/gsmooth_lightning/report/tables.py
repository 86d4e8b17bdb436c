"""Tables of what was certified, and what it means."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gsmooth_lightning.confidence import proportion_interval
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.curves import Record, certified_accuracy
from gsmooth_lightning.threat import Threat, TransformationThreat

MEANING = {
    "sound": "holds for every attack of the threat within the radius, with probability at least 1 - alpha an image",
    "distributional": "holds for a fraction q_E of images from the data's distribution, not for this image alone",
    "surrogate": "holds for the network that imitates the transformation, not for the transformation itself",
    "heuristic": "a hypothesis of the theorem was not proved: no proof against an attacker who finds where it fails",
}


def default_radii(threat: Threat, records: Sequence[Record]) -> list[float]:
    """Radii that a table shows: thirds of the threat's range, or round steps past the largest radius, .25 at most."""
    if isinstance(threat, TransformationThreat):
        end = threat.clip(float("inf"))
        return [0.0, end / 3, 2 * end / 3, end]
    most = max((r["radius"] for r in records), default=0.0)
    steps = (s / 10**k for k in range(9) for s in (0.25, 0.1, 0.05))
    step = next((s for s in steps if s <= most / 2), 0.25)
    return [round(step * k, 12) for k in range(max(2, min(9, int(most / step) + 2)))]


def share(hits: int, n: int) -> str:
    """k/n with its 95 % interval."""
    low, high = proportion_interval(hits, n)
    return f"{hits / n:.3f}  [{float(low):.3f}, {float(high):.3f}]"


def certificate_rows(
    records: Sequence[Record], threat: Threat, images: str, source: str, radii: Sequence[float] | None = None
) -> dict[str, str]:
    """The lines of a run's table, in order."""
    n = len(records)
    radii = radii if radii is not None else default_radii(threat, records)
    correct = [r for r in records if r["prediction"] == r["label"]]
    rows = {
        "images": f"{n} ({images})",
        "data": source,
        "inputs": f"{threat.inputs}; radii in {threat.unit}",
        "base accuracy (no noise, no attack)": share(sum(r["base"] == r["label"] for r in records), n),
        "smoothed accuracy (most votes)": share(sum(int(np.argmax(r["selection"])) == r["label"] for r in records), n),
        "abstained": str(sum(r["prediction"] == -1 for r in records)),
    }
    for radius, value, low, high in zip(radii, *certified_accuracy(records, radii), strict=True):
        rows[f"certified at {radius:g} {threat.unit}"] = f"{value:.3f}  [{low:.3f}, {high:.3f}]"
    alpha = max(r["alpha"] for r in records)
    guarantee = sorted({r["guarantee"] for r in records})
    covered = [r["details"]["q_E"] for r in records if "q_E" in r.get("details", {})]
    if covered:
        rows["fraction of images that E covers (q_E)"] = f"at least {min(covered):.4f}"
    rows |= {
        f"median certified radius ({threat.unit}, correct images)": f"{np.median([r['radius'] for r in correct]):.4g}"
        if correct
        else "none",
        "evaluations an image": f"{np.mean([r['evaluations'] for r in records]):.0f}",
        "seconds an image": f"{np.mean([r['seconds'] for r in records]):.3f}",
        "alpha an image": f"{alpha:g} (of {n} images at most {n * alpha:.2g} false certificates expected)",
        "threat": threat.describe(),
        "guarantee": "; ".join(f"{g}: {MEANING[g]}" for g in guarantee),
        **rests_on(records),
        "intervals": "95 % over images",
    }
    return rows


def attack_rows(records: Sequence[Record], certificates: Sequence[Record]) -> dict[str, str]:
    """The lines of an attack, with its contradictions of certificates on the same images."""
    n = len(records)
    by_index = {c["index"]: c for c in certificates}
    rows = {
        "attacked accuracy, base (worst of k)": share(sum(_survives(r["base"], r["label"]) for r in records), n),
        "attacked accuracy, smoothed (worst of k)": share(
            sum(_survives(r["smoothed"], r["label"]) for r in records), n
        ),
    }
    if certificates:
        common = [r for r in records if r["index"] in by_index]
        if any(r["input"] != by_index[r["index"]]["input"] for r in common):
            raise RequestError("the attack and the certificates are of other images; report them apart")
        broken = sum(contradictions(r, by_index[r["index"]]) > 0 for r in common)
        rows["certificates contradicted by the attack"] = f"{broken} of {len(common)} attacked"
    return rows


def contradictions(attacked: Record, certificate: Record) -> int:
    """Attacks inside a certified radius that changed the smoothed prediction."""
    if certificate["prediction"] == -1:
        return 0
    return sum(
        abs(gamma) <= certificate["radius"] and predicted != certificate["prediction"]
        for gamma, predicted in zip(attacked["gammas"], attacked["smoothed"], strict=True)
    )


def bound_rows(records: Sequence[Record], threat: Threat, images: str, source: str) -> dict[str, str]:
    """Quantiles of the error bounds of a run, in units of the pixel noise's sigma."""
    values, rho = np.array([r["value"] for r in records]), np.array([r["rho"] for r in records])
    largest = np.array([r["details"].get("largest", np.nan) for r in records])
    rows = {
        "images": f"{len(records)} ({images})",
        "data": source,
        "inputs": f"{threat.inputs}; E in units of the noise's sigma",
    }
    for level in (0.5, 0.9, 0.99, 1.0):
        rows[f"E, {level:.0%} quantile over images"] = f"{np.quantile(values, level):.4f}"
    rows |= {
        "largest defect seen": f"{largest.max():.4f}",
        "rho, median and largest": f"{np.median(rho):.4g}, {rho.max():.4g}",
        "alpha_E an image": f"{max(r['alpha'] for r in records):g}",
        "threat": threat.describe(),
        "guarantee": "; ".join(f"{g}: {MEANING[g]}" for g in sorted({r["guarantee"] for r in records})),
        **rests_on(records),
        "seconds an image": f"{np.mean([r['seconds'] for r in records]):.3f}",
    }
    return rows


def rests_on(records: Sequence[Record]) -> dict[str, str]:
    """The row that names unproved hypotheses, if there are any."""
    named = {r.get("details", {}).get("rests_on") for r in records} - {None}
    return {"not proved": "; ".join(sorted(named))} if named else {}


def markdown(columns: dict[str, dict[str, str]]) -> str:
    """Rows by name, one column a run, as a markdown table."""
    return _frame(columns).to_markdown()


def text(columns: dict[str, dict[str, str]], width: int = 90) -> str:
    """The same table for a terminal, long cells wrapped."""
    widths = [None] + [max(30, width // len(columns))] * len(columns)
    return _frame(columns).to_markdown(tablefmt="simple", maxcolwidths=widths)


def _frame(columns: dict[str, dict[str, str]]) -> pd.DataFrame:
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    return pd.DataFrame({run: [rows.get(name, "") for name in names] for run, rows in columns.items()}, index=names)


def _survives(predictions: Sequence[int], label: int) -> bool:
    return all(p == label for p in predictions)
