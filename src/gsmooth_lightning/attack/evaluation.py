"""What all attacks on parameters share: the range they keep to, and how the parameters that they try are judged."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.rounds import Procedure
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat


@dataclass(frozen=True)
class Attacked:
    """The outcome of an attack on one image.

    Attributes:
        gammas: the parameters tried, (k, dim), or the epsilons of changed pixels, (k, 1); the first are 0, the clean
            image.
        distances: smallest radius of the threat within which each of them lies.
        base, smoothed: the classes that the base and the smoothed classifier give each of them.
        votes: of the smoothed classifier, (k, classes).
        worst: the parameters at which the true class has the smallest lead in votes.
        evaluations: forward passes spent.
    """

    gammas: list[list[float]]
    distances: list[float]
    base: list[int]
    smoothed: list[int]
    votes: list[list[float]]
    worst: list[float]
    evaluations: int


Attack = Callable[[SmoothedClassifier, Any, Tensor, int, Stream], Procedure[Attacked]]
"""(smoothed, threat, prepared image (c, h, w), its label, its draws) -> the attack as a procedure (see `rounds`), which
refuses threats that it does not cover at once."""


def of_parameters(threat: Threat) -> TransformationThreat:
    """The threat of an attack that searches parameters.

    Raises:
        RequestError: it is one on pixels.
    """
    if not isinstance(threat, TransformationThreat):
        raise RequestError(
            "this attack searches a transformation's parameters; use threat=rotation, or attack=pgd for pixels"
        )
    return threat


def permitted(threat: TransformationThreat, values: np.ndarray) -> Tensor:
    """Parameters (k, dim) brought into the threat's range and onto its steps, float32."""
    if threat.step is None:
        kept = np.clip(values, threat.lows, threat.highs)
    else:  # with the allowance of `TransformationThreat.parameters`
        first, last = np.array(threat.lows) / threat.step, np.array(threat.highs) / threat.step
        kept = np.clip(np.round(values / threat.step), np.ceil(first - 1e-9), np.floor(last + 1e-9)) * threat.step
    return torch.tensor(kept, dtype=torch.float32)


def evaluate(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    x: Tensor,
    label: int,
    stream: Stream,
    gammas: Tensor,
    n: int,
) -> Generator[Any, Any, Attacked]:
    """Attacks the prepared image x, (c, h, w), with each of gammas, (k, dim), as a procedure (see `judge`).

    The smoothed classifier's class is the majority of n votes.
    """

    base, votes = yield from judge(
        smoothed, lambda some: threat.apply(x.expand(len(some), *x.shape), some), gammas.to(x.device), stream, n
    )
    spent = len(gammas) * smoothed.evaluations(0, n) + smoothed.evaluations(0, len(gammas))
    return attacked(gammas.tolist(), threat.distance(gammas), base, votes, label, spent)


def attacked(
    gammas: list[list[float]], distances: Tensor, base: list[int], votes: np.ndarray, label: int, evaluations: int
) -> Attacked:
    """The outcome, from the classes and votes, (k, classes), on k files."""
    lead = votes[:, label] - np.delete(votes, label, 1).max(1)
    return Attacked(
        gammas=gammas,
        distances=distances.tolist(),
        base=base,
        smoothed=votes.argmax(1).tolist(),
        votes=votes.tolist(),
        worst=gammas[int(lead.argmin())],
        evaluations=evaluations,
    )


def judge(
    smoothed: SmoothedClassifier, files: Callable[[Tensor], Tensor], parameters: Tensor, stream: Stream, n: int
) -> Generator[Any, Any, tuple[list[int], np.ndarray]]:
    """The base classifier's classes, k of them, and n votes of the smoothed classifier, (k, classes), on the files that
    are made with each of the parameters, (k, dim), as a procedure (see `rounds`).

    The base classifier sees a file without noise.
    """

    @torch.inference_mode()
    def classified(some: Tensor) -> tuple[Tensor, Tensor]:
        made = files(some)
        return made, smoothed.classify_base(made)

    base: list[int] = []
    counts: list[np.ndarray] = []
    width = smoothed.evaluations(0, n)
    for some in parameters.split(smoothed.block):
        [(made, classes)] = yield [partial(classified, some)]
        base += classes.tolist()
        for file in made:
            first = len(counts) * width
            votes = yield from smoothed.sample(file, stream, "attack", first, first + n)
            counts.append((votes.sum(0) if smoothed.votes == "soft" else votes)[:-1])
    return base, np.stack(counts)
