"""Certified accuracy as a function of the radius."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gsmooth_lightning.confidence import proportion_interval

Record = dict[str, Any]


def certified(records: Sequence[Record], radius: float) -> np.ndarray:
    """Which images are predicted correctly with a certificate of at least `radius`, (n,) bool."""
    return np.array([r["prediction"] == r["label"] and r["radius"] >= radius for r in records], dtype=bool)


def certified_accuracy(records: Sequence[Record], radii: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Certified accuracy at each radius with its 95 % Clopper-Pearson interval over images: (value, low, high)."""
    hits = np.array([certified(records, radius).sum() for radius in radii])
    low, high = proportion_interval(hits, len(records))
    return hits / len(records), low, high
