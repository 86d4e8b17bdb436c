"""Certified accuracy as a function of the radius."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gsmooth_lightning.confidence import proportion_interval
from gsmooth_lightning.errors import RequestError

Record = dict[str, Any]


def certified(records: Sequence[Record], radius: float) -> np.ndarray:
    """Which images are predicted correctly with a certificate of at least `radius`, (n,) bool."""
    return np.array([r["prediction"] == r["label"] and r["radius"] >= radius for r in records], dtype=bool)


def for_label(record: Record) -> Record:
    """A top-k certificate as that of the image's label: certified as far as the label stays among the k classes. Other
    certificates as they are."""
    classes = record.get("prediction")
    if not isinstance(classes, list):
        return record
    held = dict(zip(classes, record["radius"], strict=True))
    label = record["label"]
    own = {"prediction": label, "radius": held[label]} if label in held else {"prediction": classes[0], "radius": 0.0}
    return record | own | {"top_k": True}


def certified_accuracy(
    records: Sequence[Record], radii: Sequence[float], level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Certified accuracy at each radius with its Clopper-Pearson interval over images: (value, low, high)."""
    hits = np.array([certified(records, radius).sum() for radius in radii])
    low, high = proportion_interval(hits, len(records), level)
    return hits / len(records), low, high


def survivors(attacked: Sequence[Record], classifier: str, radius: float = math.inf) -> int:
    """How many images the "base" or the "smoothed" classifier gets right in every try of an attack within a radius;
    an attack's parameters are float32."""
    near = [(r, np.array(r["distances"]) <= radius * (1 + 1e-6)) for r in attacked]
    return sum(bool(np.all(np.array(r[classifier])[tried] == r["label"])) for r, tried in near)


def envelope(
    runs: Mapping[str, Sequence[Record]], radii: Sequence[float]
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Upper envelope max_i a_i(r) of the certified accuracies of k runs on the same images, as papers print it over
    several sigmas (Cohen et al. 2019, Table 1): (run that attains it, the first of equals; value, low, high).

    The best run is picked at each radius on the very images that are reported: the value is optimistic. The interval
    is one for max_i of the runs' true accuracies at this radius: the k intervals of level 1 - .05/k hold together with
    probability .95 (Bonferroni), and then that maximum lies between the largest low and the largest high end.

    Raises:
        RequestError: fewer than two runs, other images, or radii in different units.
    """
    if len(runs) < 2:
        raise RequestError("envelope=true compares certificates of several runs; name two or more, or leave it out")
    check_comparable(runs)
    curves = [certified_accuracy(records, radii, 1 - 0.05 / len(runs)) for records in runs.values()]
    values, lows, highs = (np.array(part) for part in zip(*curves, strict=True))  # (runs, radii)
    names = list(runs)
    return [names[k] for k in values.argmax(0)], values.max(0), lows.max(0), highs.max(0)


def check_comparable(runs: Mapping[str, Sequence[Record]]) -> None:
    """Refuses runs with radii in different units, or on different images: in indices, labels or (where two runs state
    them) the inputs' digests."""
    for (first, records), (name, other) in itertools.combinations(runs.items(), 2):
        if units(records) != units(other):
            raise RequestError(f"{first} and {name} have radii in different units; leave envelope out")
        keys: list[Any] = ["index", "label"]
        if "input" in records[0] and "input" in other[0]:
            keys.append("input")
        if {tuple(r[k] for k in keys) for r in records} != {tuple(r[k] for k in keys) for r in other}:
            raise RequestError(f"{first} and {name} are on different images; certify the same, or leave envelope out")


def units(records: Sequence[Record]) -> set[str]:
    """Units of the radii."""
    return {r["unit"] for r in records}


def largest(records: Sequence[Record]) -> float:
    """The largest finite radius, 0 without one."""
    return max((r["radius"] for r in records if math.isfinite(r["radius"])), default=0.0)


# ---------------------------------------------------------------- certified area

AXIS = "mean axis"
"""Unit of the sizes of ellipsoids: the geometric mean of their half axes. D times its logarithm is the certified area
of Tecot et al. 2021; of isotropic noise it is the l2 radius."""


def by_area(records: Sequence[Record]) -> list[Record]:
    """Certificates of ellipsoids with their mean axis as the radius, and its unit.

    Raises:
        RequestError: a certificate without an ellipsoid.
    """
    kept = [r.get("details", {}).get("region") for r in records]
    if any(region is None and r["radius"] != 0 for r, region in zip(records, kept, strict=True)):
        raise RequestError("area=true is for certificates of Gaussian pixel noise under threat=l2; leave it out")
    sizes = [region["axis_mean"] if region else 0.0 for region in kept]
    return [r | {"radius": size, "unit": AXIS} for r, size in zip(records, sizes, strict=True)]


def tradeoff(records: Sequence[Record]) -> tuple[float, float]:
    """(mean certified area of the images that are right and certified, accuracy of the most votes)."""
    accuracy = np.mean([chosen(r) == r["label"] for r in records])
    areas = [r["details"]["region"]["area"] for r in records if r["prediction"] == r["label"] and r["radius"] > 0]
    return float(np.mean(areas)) if areas else -math.inf, float(accuracy)


def blanket(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (area, accuracy) points that no others cover, by area: from the most accurate on, a point is kept if its area
    is beyond those of all kept before it (Tecot et al. 2021, section B.1)."""
    kept: list[tuple[float, float]] = []
    for area, accuracy in sorted(points, key=lambda p: (-p[1], -p[0])):
        if not kept or not min(a for a, _ in kept) <= area <= max(a for a, _ in kept):
            kept.append((area, accuracy))
    return sorted(kept)


def chosen(record: Record) -> int:
    """The class with most votes; without votes (all draws abstain, or none were needed) the prediction."""
    votes = record["selection"]
    return int(np.argmax(votes)) if max(votes) > 0 else record["prediction"]
