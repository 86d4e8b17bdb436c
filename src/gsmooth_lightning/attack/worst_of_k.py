"""The worst of k random parameters."""

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsmooth_lightning.attack.evaluation import Attacked, evaluate, of_parameters, permitted
from gsmooth_lightning.errors import check_whole
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat

UNIFORM = 2**31
"""Block of the stage "attack" that draws parameters; votes take the blocks below it."""


def worst_of_k(
    smoothed: SmoothedClassifier,
    threat: Threat,
    x: Tensor,
    label: int,
    stream: Stream,
    k: int = 10,
    n: int = 128,
) -> Generator[Any, Any, Attacked]:
    """Tries k parameters, those of `scattered`, as a procedure (see `rounds`).

    Args:
        smoothed, threat, x, label, stream: see `Attack`.
        k: parameters tried, at least 4.
        n: votes for each (see `evaluate`).

    Raises:
        RequestError: an effort too small.
    """
    check_whole("attack", k=(k, 4), n=(n, 1))
    threat = of_parameters(threat)
    gammas = permitted(threat, scattered(threat, stream, k, x.device))
    return (yield from evaluate(smoothed, threat, x, label, stream, gammas, n))


def scattered(threat: TransformationThreat, stream: Stream, k: int, device: torch.device) -> np.ndarray:
    """0, both ends of the threat's range (all parameters at their lower, all at their upper end) and uniform
    parameters, k in all: (k, dim)."""
    low, high = np.array(threat.lows), np.array(threat.highs)
    uniform = stream.at("attack", UNIFORM, device).uniform(k - 3, len(low)).cpu().numpy()
    return np.concatenate([[np.zeros_like(low), low, high], low + (high - low) * uniform])
