"""Tables of what was certified, and what it means."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gsmooth_lightning.certify import ABSTAIN
from gsmooth_lightning.confidence import proportion_interval
from gsmooth_lightning.error import Bound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.curves import (
    AXIS,
    Record,
    certified,
    certified_accuracy,
    chosen,
    envelope,
    largest,
    survivors,
    units,
)
from gsmooth_lightning.threat import Threat, TransformationThreat

MEANING = {
    "sound": "holds for every attack of the threat within the radius, with probability at least 1 - alpha an image",
    "distributional": "holds for a fraction q_E of images from the data's distribution, not for this image alone",
    "surrogate": "holds for the network that imitates the transformation, not for the transformation itself",
    "order-dependent": "holds for a classifier that remembers the regions it certified, for inputs that come later; in "
    "another order they may be other regions",
    "heuristic": "a hypothesis of the theorem was not proved: no proof against an attacker who finds where it fails",
}

RECEIVED = (
    "the prediction at a received file is that of the clean image that an attack within the radius made it of; attacks "
    "on the file itself are not covered"
)

BLACK_BOX = (
    "a black box, asked for labels alone; the certificate is for the function that was asked, which must answer "
    "the same when it is deployed"
)

ELLIPSOID = "any change within the ellipsoid of the noise whose half axes have the radius as their geometric mean"

INTERVALS = "95 % over images"

CHANCE = 1e-5
"""Level at which an attack's votes contradict a certificate."""


def default_radii(threat: Threat | None, records: Sequence[Record]) -> list[float]:
    """Radii that a table shows: thirds of the threat's range, or round steps past the largest radius, .25 at most.

    Of a log, threat is None.
    """
    if isinstance(threat, TransformationThreat):
        return [0.0, threat.reach / 3, 2 * threat.reach / 3, threat.reach]
    most = largest(records)
    steps = (s / 10**k for k in range(9) for s in (0.25, 0.1, 0.05))
    step = next((s for s in steps if s <= most / 2), 0.25)
    return [round(step * k, 12) for k in range(max(2, min(9, int(most / step) + 2)))]


def share(hits: int, n: int) -> str:
    """k/n with its 95 % interval."""
    low, high = proportion_interval(hits, n)
    return cell(hits / n, float(low), float(high))


def cell(value: float, low: float, high: float) -> str:
    """A share with its interval."""
    return f"{value:.3f}  [{low:.3f}, {high:.3f}]"


def accuracy_rows(records: Sequence[Record], radii: Sequence[float], unit: str) -> dict[str, str]:
    """Certified accuracy at each radius with its interval."""
    curve = zip(radii, *certified_accuracy(records, radii), strict=True)
    return {f"certified at {r:g} {unit}": cell(*estimate) for r, *estimate in curve}


def median_row(records: Sequence[Record], unit: str) -> dict[str, str]:
    """Median radius of the correct images."""
    radii = [r["radius"] for r, hit in zip(records, certified(records, 0.0), strict=True) if hit]
    median = f"{np.median(radii):.4g}" if radii else "none"
    return {f"median certified radius ({unit}, correct images)": median}


def log_rows(records: Sequence[Record], radii: Sequence[float] | None = None) -> dict[str, str]:
    """The lines of a log's table: what `logs.read_log` knows."""
    (unit,) = units(records)
    return {
        "images": f"{len(records)} (indices {records[0]['index']} to {records[-1]['index']})",
        "inputs": f"radii in {unit}",
        "abstained": str(sum(r["prediction"] == ABSTAIN for r in records)),
        **accuracy_rows(records, radii if radii is not None else default_radii(None, records), unit),
        **median_row(records, unit),
        "seconds an image": seconds_an_image(records),
        "guarantee": "as the log's author states it; a log names neither theorem, alpha nor draws",
        "intervals": INTERVALS,
    }


def envelope_rows(runs: Mapping[str, Sequence[Record]], radii: Sequence[float]) -> dict[str, str]:
    """The lines of the upper envelope of several runs, with the run that attains it."""
    curve = zip(radii, *envelope(runs, radii), strict=True)  # refuses different units
    (unit,) = set.union(*map(units, runs.values()))
    return {
        "images": "the same in every run",
        "inputs": f"radii in {unit}",
        **{
            f"certified at {r:g} {unit}": cell(value, low, high) + (f"  {best}" if value else "")
            for r, best, value, low, high in curve
        },
        "guarantee": "that of the named run; as it was picked on these images, the accuracy is optimistic",
        "intervals": f"95 % for the largest of the runs' true accuracies (Bonferroni over {len(runs)} runs)",
    }


def certificate_rows(
    records: Sequence[Record], threat: Threat, images: str, source: str, radii: Sequence[float] | None = None
) -> dict[str, str]:
    """The lines of a run's table, in order."""
    n, unit = len(records), records[0]["unit"]
    radii = radii if radii is not None else default_radii(threat, records)
    rows = {
        "images": f"{n} ({images})",
        "data": source,
        "inputs": f"{threat.inputs}; radii in {unit}",
        "base accuracy (no noise, no attack)": share(sum(r["base"] == r["label"] for r in records), n),
        "smoothed accuracy (most votes)": share(sum(chosen(r) == r["label"] for r in records), n),
        "abstained": str(sum(r["prediction"] == ABSTAIN for r in records)),
    }
    if any("top_k" in r for r in records):
        rows["counts as certified"] = "a label that stays among the k most probable classes"
    rows |= accuracy_rows(records, radii, unit)
    alpha = max(r["alpha"] for r in records)
    covered = [r["details"]["q_E"] for r in records if "q_E" in r.get("details", {})]
    if covered:
        rows["fraction of images that E covers (q_E)"] = f"at least {rounded(min(covered), up=False)}"
    own = [r["details"] for r in records if "rho" in r.get("details", {})]
    rows |= quantile_rows([d["E"] for d in own], own, unit)
    rows |= {
        **median_row(records, unit),
        **region_rows(records),
        "evaluations an image": f"{np.mean([r['evaluations'] for r in records]):.0f}",
        "seconds an image": seconds_an_image(records),
        "alpha an image": f"{alpha:g} (of {n} images at most {n * alpha:.2g} false certificates expected)",
        "threat": ELLIPSOID if unit == AXIS else threat.describe(),
        "guarantee": meanings(records),
        **({"base classifier": BLACK_BOX} if any("base" in r.get("details", {}) for r in records) else {}),
        **rests_on(records),
        **left_rows(records),
        "intervals": INTERVALS,
    }
    return rows


def meanings(records: Sequence[Record]) -> str:
    """The guarantees of records, and what each means."""
    return "; ".join(f"{g}: {MEANING[g]}" for g in sorted({r["guarantee"] for r in records}))


def seconds_an_image(records: Sequence[Record]) -> str:
    """Their mean."""
    return f"{np.mean([r['seconds'] for r in records]):.3f}"


def region_rows(records: Sequence[Record]) -> dict[str, str]:
    """The ellipsoids of Gaussian pixel noise, if there are any: medians over the images that are right."""
    found = [r.get("details", {}).get("region") for r in records if r["prediction"] == r["label"]]
    right = [region for region in found if region]
    balls = (math.isclose(region["axis_least"], region["axis_largest"], rel_tol=1e-6) for region in right)
    if all(balls):  # of the certified radius
        return {}
    names = ("area", "axis_least", "axis_mean", "axis_largest", "linf")
    area, least, mean, largest, linf = (float(np.median([region[name] for region in right])) for name in names)
    return {
        "ellipsoid (medians, correct images)": f"area {area:.1f}; axes {least:.4g} to {largest:.4g}, mean {mean:.4g}; "
        f"l2 ball {least:.4g}, linf ball {linf:.4g}"
    }


def quantile_rows(errors: Sequence[float], details: Sequence[Record], unit: str) -> dict[str, str]:
    """Quantiles of error bounds, if there are any: E, or Corollary 1's M*, and how far a surrogate starts from x."""
    levels, rows = "50, 90, 99 % of images", {}

    def quantiles(values: Sequence[float]) -> str:
        return ", ".join(rounded(v, up=True) for v in np.quantile(values, [0.5, 0.9, 0.99]))

    if any(errors):
        of_slopes = any(d.get("slope") for d in details)
        what = f"M* a {unit}" if of_slopes else "E"
        rows[f"{what} in units of the noise, {levels}"] = quantiles(errors)
    if starts := [d["start"] for d in details if "start" in d]:
        rows[f"tau(0, x) to x in units of the noise, {levels}"] = quantiles(starts)
    return rows


def left_rows(records: Sequence[Record]) -> dict[str, str]:
    """Why certificates were left unfinished, and how many."""
    reasons = Counter(r["details"]["left"] for r in records if "left" in r.get("details", {}))
    return {"left": "; ".join(f"{n} images: {reason}" for reason, n in reasons.items())} if reasons else {}


def attack_rows(
    records: Sequence[Record], certificates: Sequence[Record], attack: str, within: Mapping[str, float]
) -> dict[str, str]:
    """The lines of an attack of that name, with its contradictions of certificates on the same images.

    within: radii up to which its tries count, in words; one for each pair of lines.
    """
    n = len(records)
    by_index = {c["index"]: c for c in certificates}
    rows = {
        f"attacked accuracy, {classifier} ({attack}){words}": share(survivors(records, classifier, radius), n)
        for words, radius in within.items()
        for classifier in ("base", "smoothed")
    }
    if any("top_k" in c for c in certificates):
        raise RequestError("an attack's one prediction says nothing about the k most probable; report them apart")
    if certificates:
        common = [r for r in records if r["index"] in by_index]
        if any(r["input"] != by_index[r["index"]]["input"] for r in common):
            raise RequestError("the attack and the certificates are of other images; report them apart")
        broken, flipped = (
            sum(contradictions(r, by_index[r["index"]], chance) > 0 for r in common) for chance in (CHANCE, 1.0)
        )
        more = f"; {flipped} by most votes, which chance explains" if flipped > broken else ""
        rows[f"certificates contradicted by the attack ({attack})"] = f"{broken} of {len(common)} attacked{more}"
    return rows


def contradictions(attacked: Record, certificate: Record, chance: float = CHANCE) -> int:
    """Attacks inside a certified radius that changed the smoothed prediction; an attack's parameters are float32.

    The classifier is seen through n votes: another class must lead by so many, d, that exp(-d^2 / 2n) <= chance, which
    bounds for each class how probable that is while the certified one is ahead (Hoeffding): 55 of 128 votes at 1e-5.
    At chance = 1, and in stores without votes, the predictions decide.
    """
    kept = certificate["prediction"]
    if kept == ABSTAIN:
        return 0
    changed = np.array(attacked["smoothed"]) != kept
    if "votes" in attacked:
        votes = np.array(attacked["votes"])
        lead = np.delete(votes, kept, 1).max(1) - votes[:, kept]
        changed &= np.exp(-(lead**2) / (2 * np.ceil(votes.sum(1)))) <= chance
    return int((changed & (np.array(attacked["distances"]) <= certificate["radius"] * (1 + 1e-6))).sum())


def bound_rows(
    records: Sequence[Record], threat: Threat, images: str, source: str, sigma: float | None = None
) -> dict[str, str]:
    """Quantiles of the error bounds of a run, in l2.

    sigma: of the noise, in whose units records keep them; None: it has several, and their units are shown. Those in
    latent space, whose curves have rows (radius, a, E), stay in these units.
    """
    if any(len(row) > 2 for r in records for row in r.get("curve", ())):
        own = [r["details"] | {"slope": r["slope"]} for r in records]
        unit, rows = f"radii in {threat.unit}", quantile_rows([r["value"] for r in records], own, threat.unit)
    else:
        unit, rows = unit_of_e(sigma), pixel_bound_rows(records, sigma or 1.0)
    return {
        "images": f"{len(records)} ({images})",
        "data": source,
        "inputs": f"{threat.inputs}; {unit}",
        **rows,
        "threat": threat.describe(),
        "guarantee": meanings(records),
        **rests_on(records),
        "seconds an image": seconds_an_image(records),
    }


def pixel_bound_rows(records: Sequence[Record], scale: float) -> dict[str, str]:
    """E, rho and alpha_E of bounds at the input, E in their units times a scale."""
    parts = scale * np.array([r.get("parts") or [r["value"]] for r in records])  # (images, parts)
    rho = np.array([r["rho"] for r in records])
    largest = [scale * r["details"]["largest"] for r in records if "largest" in r["details"]]
    levels = (0.5, 0.9, 0.99, 1.0)
    return {
        **{f"E, {q:.0%} quantile over images": _numbers(np.quantile(parts, q, axis=0)) for q in levels},
        "mean E": _numbers(parts.mean(0)),
        "largest defect seen": f"{max(largest):.4f}" if largest else "none measured",
        "rho, median and largest": f"{np.median(rho):.4g}, {rho.max():.4g}",
        "alpha_E an image": f"{max(r['alpha'] for r in records):g}",
    }


def unit_of_e(sigma: float | None) -> str:
    """In what E is shown (see `bound_rows`)."""
    return "E in " + (f"l2, sigma {sigma:g}" if sigma else "units of the noise's sigmas")


def calibrated_rows(
    norms: np.ndarray,
    bound: Bound | None,
    threat: Threat,
    images: str,
    source: str,
    seconds: float,
    sigma: float | None,
) -> dict[str, str]:
    """Defects on calibration images (images, draws, parts), and the bound for all images that they show, in l2: columns
    of Fischer et al. 2020, Tables 1 and 4, and of the SPT slides' Table 11 (the largest observed error).

    bound: None if the run is not finished. sigma: see `bound_rows`.
    """
    scale = sigma or 1.0
    flat = scale * norms.reshape(-1, norms.shape[-1])
    rows = {
        "images": f"{len(norms)} ({images}), {norms.shape[1]} draws each",
        "data": source,
        "inputs": f"{threat.inputs}; {unit_of_e(sigma)}",
    }
    if bound is not None:
        rows["E"] = ", ".join(rounded(scale * part, up=True) for part in bound.parts)
        rows["rho"] = f"{bound.rho:.4g}"
        rows["fraction that E covers (q_E)"] = f"at least {rounded(bound.details['q_E'], up=False)}"
        rows["alpha_E, once"] = f"{bound.alpha:g}"
    for level in (0.5, 0.9, 0.99, 0.999):
        rows[f"defect, {level:.1%} quantile"] = _numbers(np.quantile(flat, level, axis=0))
    rows |= {"largest defect seen": _numbers(flat.max(0)), "threat": threat.describe()}
    if bound is not None:
        stated = [{"guarantee": bound.guarantee, "details": bound.details}]
        rows |= {"guarantee": meanings(stated), **rests_on(stated)}
    return rows | {"seconds an image": f"{seconds:.3f}"}


def _numbers(values: np.ndarray) -> str:
    """One number for each part."""
    return ", ".join(f"{value:.4f}" for value in values)


def rests_on(records: Sequence[Record]) -> dict[str, str]:
    """The row that names unproved hypotheses, if there are any."""
    named = {r.get("details", {}).get("rests_on") for r in records} - {None}
    return {"not proved": "; ".join(sorted(named))} if named else {}


COMPARED = ("certified at", "median certified radius", "evaluations an image", "seconds an image", "does not apply")
"""Rows by which certificates are compared, beside their guarantee."""


def by_run(columns: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The rows that compare runs as columns, one row a run."""
    rows = {name: None for run in columns.values() for name in run if name.startswith(COMPARED)}
    found = {name: {run: values.get(name, "") for run, values in columns.items()} for name in rows}
    return {"guarantee": {run: values.get("guarantee", "").split(":")[0] for run, values in columns.items()}} | found


def markdown(columns: dict[str, dict[str, str]]) -> str:
    """Rows by name, one column a run, as a markdown table."""
    return _frame(columns).to_markdown()


def latex(columns: dict[str, dict[str, str]]) -> str:
    """The same table in LaTeX, with the rules of the package booktabs and as wide as the text."""
    widths = [0.25] + [0.7 / len(columns)] * len(columns)
    return _frame(columns).to_latex(escape=True, column_format="".join(rf"p{{{w:.3f}\textwidth}}" for w in widths))


def text(columns: dict[str, dict[str, str]], width: int = 90) -> str:
    """The same table for a terminal, long cells wrapped."""
    widths = [None] + [max(30, width // len(columns))] * len(columns)
    return _frame(columns).to_markdown(tablefmt="simple", maxcolwidths=widths)


def _frame(columns: dict[str, dict[str, str]]) -> pd.DataFrame:
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    return pd.DataFrame({run: [rows.get(name, "") for name in names] for run, rows in columns.items()}, index=names)


def rounded(value: float, up: bool) -> str:
    """Four decimals, on the safe side."""
    return f"{(np.ceil if up else np.floor)(value * 1e4) / 1e4:.4f}"


def summary_rows(records: Sequence[Record]) -> dict[str, str]:
    """What a run has spent so far: of all its images, by all its processes."""
    if not records:
        return {}
    rows = {"seconds of work": f"{sum(r['seconds'] for r in records):.1f}"}
    if "evaluations" in records[0]:
        rows["evaluations"] = str(sum(r["evaluations"] for r in records))
    if "prediction" in records[0]:
        abstained = sum(r["prediction"] == ABSTAIN for r in records)
        rows["abstained"] = f"{abstained} of {len(records)}"
        spent = sum(r["alpha"] for r in records)
        rows["alpha spent"] = f"{spent:.4g} over all images: at most so many false certificates expected"
    return rows
