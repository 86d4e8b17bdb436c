"""The worst of k random parameters."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat


@dataclass(frozen=True)
class Attacked:
    """The outcome of an attack on one image.

    Attributes:
        gammas: the parameters tried, (k, dim); the first are 0, the clean image.
        distances: smallest radius of the threat within which each of them lies.
        base, smoothed: the classes that the base and the smoothed classifier give each of them.
        worst: the parameters at which the true class has the smallest lead in votes.
        evaluations: forward passes spent.
    """

    gammas: list[list[float]]
    distances: list[float]
    base: list[int]
    smoothed: list[int]
    worst: list[float]
    evaluations: int


def check_effort(k: int, n: int) -> None:
    """Raises RequestError unless there are at least 4 parameters and one vote."""
    if not (isinstance(k, int) and isinstance(n, int) and k >= 4 and n >= 1):
        raise RequestError(f"attack.k must be a whole number from 4 on and attack.n from 1 on, got k={k}, n={n}")


def worst_of_k(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    x: Tensor,
    label: int,
    stream: Stream,
    k: int = 10,
    n: int = 128,
) -> Generator[Any, Any, Attacked]:
    """Tries 0, both ends of the threat's range (all parameters at their lower, all at their upper end) and uniform
    parameters, k in all, as a procedure (see `rounds`).

    The smoothed classifier's class is the majority of n votes; the base classifier sees the image without noise.
    """
    check_effort(k, n)
    low, high = np.array(threat.lows), np.array(threat.highs)
    uniform = stream.at("attack", 2**31, x.device).uniform(k - 3, len(low)).cpu().numpy()
    values = np.concatenate([[0 * low, low, high], low + (high - low) * uniform])
    if threat.step is not None:
        values = np.clip(np.round(values / threat.step), -(-low // threat.step), high // threat.step) * threat.step
    gammas = torch.tensor(values, dtype=torch.float32, device=x.device)
    with torch.inference_mode():
        files = threat.apply(x.expand(k, *x.shape), gammas)
        base = smoothed.classify_base(files)
    counts = []
    width = -(-n // smoothed.block) * smoothed.block
    for j, file in enumerate(files):
        votes = yield from smoothed.sample(file, stream, "attack", j * width, j * width + n)
        counts.append((votes.sum(0) if smoothed.votes == "soft" else votes)[:-1])
    votes = np.stack(counts)  # (k, classes)
    lead = votes[:, label] - np.delete(votes, label, 1).max(1)
    return Attacked(
        gammas=gammas.tolist(),
        distances=threat.distance(gammas).tolist(),
        base=base.tolist(),
        smoothed=votes.argmax(1).tolist(),
        worst=gammas[lead.argmin()].tolist(),
        evaluations=k * width + -(-k // smoothed.block) * smoothed.block,
    )
