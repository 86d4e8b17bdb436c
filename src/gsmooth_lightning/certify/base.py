"""Certificates, and what every certifier does."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from gsmooth_lightning.confidence import Outcome, SamplingPlan
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat

ABSTAIN = -1
GUARANTEES = ("sound", "distributional", "surrogate", "heuristic")


@dataclass(frozen=True)
class Certificate:
    """With probability at least 1 - alpha over the draws: no attack of the threat within `radius` changes the smoothed
    classifier's prediction on this image. What kind of statement this is, `guarantee` says.

    Attributes:
        prediction: class, or ABSTAIN (-1).
        radius: certified radius in `unit`, rounded down; the closed region up to it is certified. 0: the prediction
            alone is certified.
        guarantee: "sound", "distributional", "surrogate" or "heuristic".
        alpha: total probability of a false statement, the error bound's part included.
        selection, counts: votes by class of the n0 selection draws and of the n estimation draws.
        pa, pb: bounds used, None after a sequential test.
        evaluations: forward passes of the network, padding included.
        seconds: time spent on this image.
    """

    prediction: int
    radius: float
    unit: str
    guarantee: str
    alpha: float
    selection: list[int]
    counts: list[int]
    n: int
    seed: int
    evaluations: int
    pa: float | None = None
    pb: float | None = None
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.guarantee not in GUARANTEES:
            raise ValueError(
                f"a certificate's guarantee must be one of {', '.join(GUARANTEES)}, not {self.guarantee!r}"
            )


class Certifier(ABC):
    """A theorem. `check` refuses what it does not cover, before any work; `procedure` certifies one image.

    Args:
        plan: how many draws, and when to stop.
    """

    def __init__(self, plan: SamplingPlan):
        self.plan = plan

    @abstractmethod
    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        """Raises UncertifiableError when a hypothesis of the theorem does not hold."""

    @abstractmethod
    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        """The certificate of the clean image x, (c, h, w), as a procedure (see `rounds`)."""

    def certify(
        self,
        smoothed: SmoothedClassifier,
        threat: Threat,
        images: Iterable[tuple[int, Tensor]],
        seed: int = 0,
        in_flight: int = 8,
    ) -> Iterator[tuple[int, Certificate]]:
        """Certifies clean images, given as (index, (c, h, w) in [0, 1]); yields (index, certificate) as they finish.

        The index addresses the image's draws: the same (seed, index) gives the same votes in any order, batch or
        process.
        """
        self.check(smoothed, threat)
        images = iter(images)
        first = next(images, None)
        if first is None:
            return
        smoothed.check_function(threat.prepare(first[1][None])[0])

        def procedures():
            for index, x in itertools.chain([first], images):
                yield index, self.procedure(smoothed, threat, threat.prepare(x[None])[0], Stream(seed, index))

        for index, certificate, seconds in run_rounds(procedures(), first[1].device, in_flight):
            yield index, replace(certificate, seconds=seconds)

    def refuse_unreachable(self, ceiling_radius: float, unit: str) -> None:
        """Refuses target radii that n votes for one class could not certify."""
        radii = getattr(self.plan, "radii", ())
        if radii and radii[-1] >= ceiling_radius:
            raise UncertifiableError(
                f"a radius of {radii[-1]:g} {unit} is out of reach: n={self.plan.n} votes for one class at "
                f"alpha={self.plan.alpha:g} certify less than {ceiling_radius:.4g} {unit}; raise sampling.n or the "
                "sigma, or lower sampling.radii"
            )

    def conclude(
        self, smoothed: SmoothedClassifier, outcome: Outcome, radius: float | None, x: Tensor, stream: Stream, **fields
    ) -> Certificate:
        """The certificate that an outcome supports; a radius of None means abstention."""
        n0, n = self.plan.n0, outcome.n
        return Certificate(
            prediction=ABSTAIN if radius is None else outcome.top,
            radius=0.0 if radius is None else radius,
            selection=outcome.selection[:-1].tolist(),
            counts=outcome.counts[:-1].tolist(),
            n=n,
            seed=stream.seed,
            evaluations=smoothed.evaluations(0, n0) + smoothed.evaluations(0, n),
            pa=outcome.pa,
            pb=outcome.pb,
            **fields,
        )


def round_down(radius: float) -> float:
    """The next float below, with an allowance for the rounding of Phi and its inverse."""
    return max(0.0, float(np.nextafter(radius * (1 - 1e-12), -np.inf)))
