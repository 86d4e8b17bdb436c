"""Certificates, and what every certifier does."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from gsmooth_lightning.certify.topk import check_top_k, top_k_candidates, top_k_radii
from gsmooth_lightning.certify.transfer import Transfer, largest_radius, required
from gsmooth_lightning.confidence import Counts
from gsmooth_lightning.error import Bound, ErrorBound
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.model import described, is_black_box
from gsmooth_lightning.plans import FixedN, Outcome, Sampler, SamplingPlan
from gsmooth_lightning.rounds import Workers, run_rounds, workers
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat

ABSTAIN = -1
GUARANTEES = ("sound", "distributional", "surrogate", "heuristic", "order-dependent")


@dataclass(frozen=True)
class Certificate:
    """With probability at least 1 - alpha over the draws: no attack of the threat within `radius` changes the smoothed
    classifier's prediction on this image. What kind of statement this is, `guarantee` says.

    Attributes:
        prediction: class, or ABSTAIN (-1); of a top-k certificate, the classes that stay among the k most probable.
        radius: certified radius in `unit`, rounded down; the closed region up to it is certified. 0: the prediction
            alone is certified. Of a top-k certificate, one for each class.
        guarantee: "sound", "distributional", "surrogate", "heuristic" or "order-dependent".
        alpha: total probability of a false statement, the error bound's part included.
        selection, counts: votes by class of the n0 selection draws and of the n estimation draws, added up: whole
            numbers for hard votes, sums of numbers in [0, 1] for soft ones.
        pa, pb: bounds used, None after a sequential test and of a top-k certificate.
        evaluations: forward passes of the network, padding included.
        seconds: time spent on this image.
    """

    prediction: int | list[int]
    radius: float | list[float]
    unit: str
    guarantee: str
    alpha: float
    selection: list[float]
    counts: list[float]
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


@dataclass(frozen=True)
class Limits:
    """What the certificate of one image may cost and show.

    Attributes:
        evaluations: forward passes of the network, padding included, at most; a sequential plan may stop earlier.
        radius: the largest, in the threat's unit, without an interpolation error; None: it is not known beforehand.
        alpha: probability that the certificate is false.
        beside: what the evaluations are for, and what comes on top, where they are not all.
    """

    evaluations: int
    radius: float | None
    alpha: float
    beside: str = ""


class Certifier(ABC):
    """A theorem. `check` refuses what it does not cover, before any work; `procedure` certifies one image.

    Attributes:
        error: bound on the interpolation error, of a theorem that asks for one.
    """

    error: ErrorBound | None = None

    @abstractmethod
    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        """Raises UncertifiableError when a hypothesis of the theorem does not hold."""

    @abstractmethod
    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        """The certificate of the clean image x, (c, h, w), as a procedure (see `rounds`)."""

    @abstractmethod
    def limits(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Limits]:
        """What that certificate may cost and show, as a procedure that does what comes before the votes."""

    def certify(
        self,
        smoothed: SmoothedClassifier,
        threat: Threat,
        images: Iterable[tuple[int, Tensor]],
        seed: int = 0,
        in_flight: int = 8,
        workers: Workers = workers,
    ) -> Iterator[tuple[int, Certificate]]:
        """Certifies clean images, given as (index, (c, h, w) in [0, 1]); yields (index, certificate) as they finish.

        The index addresses the image's draws: the same (seed, index) gives the same votes in any order, batch or
        process. The certificates' details state the form and precision of the network, and if it is a black box.
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

        known = {"network": described(smoothed.base)}
        if is_black_box(smoothed.base):
            known["base"] = "black box"
        for index, certificate, seconds in run_rounds(procedures(), first[1].device, in_flight, workers):
            yield index, replace(certificate, seconds=seconds, details=certificate.details | known)


class TransferCertifier(Certifier):
    """A theorem that bounds what an attack leaves of a class's votes, by `bound` and `transfer`, for one image; what
    follows from votes is the same for all of these (see `transfer`).

    Args:
        plan: how many draws, and when to stop.
        top_k: 1, or the certificate names k classes, each with the radius within which it stays among the k most
            probable ones (see `topk`).

    Raises:
        RequestError: top_k beyond 1 with a plan that does not fix n.
    """

    def __init__(self, plan: SamplingPlan, top_k: int = 1):
        self.plan, self.top_k = plan, top_k
        if top_k != 1 and not isinstance(plan, FixedN):
            raise RequestError("top-k certificates need a number of draws fixed beforehand; use sampling=fixed")

    @abstractmethod
    def bound(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        """What the theorem's equation between attacked and transformed images misses on the clean image x, (c, h, w),
        as a procedure (see `rounds`)."""

    @abstractmethod
    def transfer(self, smoothed: SmoothedClassifier, threat: Threat, bound: Bound, dim: int, slack: float) -> Transfer:
        """T for an image of `dim` encoded values with this bound; `slack` is the sampler's total variation."""

    def region(
        self, smoothed: SmoothedClassifier, threat: Threat, dim: int, radius: float | list[float]
    ) -> dict[str, dict[str, float]]:
        """For a certificate's details, what else is certified with this radius of inputs of `dim` values:
        {"region": numbers by name} of a region larger than a ball, {} without one."""
        return {}

    def sampler(
        self,
        smoothed: SmoothedClassifier,
        x: Tensor,
        bound: Bound,
        stream: Stream,
        slack: float,
        spend: Callable[[int], None],
    ) -> Sampler:
        """The votes that the plan counts; `spend` is told of every forward pass. Here: the network's own votes."""

        def sample(stage: str, first: int, last: int) -> Generator[Any, Any, Counts]:
            spend(smoothed.evaluations(first, last))
            return smoothed.sample(x, stream, stage, first, last)

        return sample

    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        bound = yield from self.bound(smoothed, threat, x, stream)
        slack, dim = smoothed.slack(x), math.prod(smoothed.encoded_shape(x))
        transfer = self.transfer(smoothed, threat, bound, dim, slack)
        spent: list[int] = []
        outcome = yield from self.plan.run(
            self.sampler(smoothed, x, bound, stream, slack, spent.append),
            smoothed.block,
            lambda radius: required(transfer, radius),
        )
        prediction, radius = self.verdict(outcome, transfer, threat.reach)
        return Certificate(
            prediction=prediction,
            radius=radius,
            unit=threat.unit,
            guarantee=bound.guarantee,
            alpha=self.plan.alpha + bound.alpha,
            selection=outcome.selection[:-1].tolist(),
            counts=outcome.counts[:-1].tolist(),
            n=outcome.n,
            seed=stream.seed,
            evaluations=sum(spent),
            pa=outcome.pa if self.top_k == 1 else None,
            pb=outcome.pb if self.top_k == 1 else None,
            details={
                "E": bound.value,
                "rho": bound.rho,
                "alpha_E": bound.alpha,
                "slack": slack,
                "dim": dim,
                **({"curve": bound.curve, "slope": bound.slope} if bound.curve else {}),
                **bound.details,
                **self.region(smoothed, threat, dim, radius),
            },
        )

    def limits(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Limits]:
        bound = yield from self.bound(smoothed, threat, x, stream)
        radius = self.ceiling(smoothed, threat, math.prod(smoothed.encoded_shape(x)))
        decided = getattr(self.plan, "radii", (radius,))
        radius = max((r for r in decided if r <= radius), default=0.0)
        return Limits(most_evaluations(smoothed, self.plan), radius, self.plan.alpha + bound.alpha)

    def ceiling(self, smoothed: SmoothedClassifier, threat: Threat, dim: int) -> float:
        """The radius that n votes for one class certify for an image of `dim` encoded values, without any error."""
        transfer = self.transfer(smoothed, threat, Bound(0.0, 0.0, 0.0, "heuristic"), dim, 0.0)
        if self.top_k == 1:
            pa = self.plan.ceiling
            return largest_radius(transfer, pa, 1 - pa, threat.reach) or 0.0
        votes = np.zeros(smoothed.classes, dtype=int)
        votes[0] = self.plan.n
        found = top_k_radii(votes, top_k_candidates(votes, self.top_k), self.plan.alpha, transfer, threat.reach)
        return found[0] or 0.0

    def verdict(
        self, outcome: Outcome, transfer: Transfer, reach: float
    ) -> tuple[int | list[int], float | list[float]]:
        """(prediction, radius): the class, or the certified ones of k classes, and how far; ABSTAIN for none."""
        if self.top_k > 1:
            classes = top_k_candidates(outcome.selection[:-1], self.top_k)
            found = top_k_radii(outcome.counts[:-1], classes, self.plan.alpha, transfer, reach)
            held = {int(c): r for c, r in zip(classes, found, strict=True) if r is not None}
            return (list(held), list(held.values())) if held else (ABSTAIN, 0.0)
        radius = outcome.passed
        if outcome.pa is not None and outcome.pb is not None:
            radius = largest_radius(transfer, outcome.pa, outcome.pb, reach)
        elif radius is not None:
            radius = min(radius, reach)
        return (ABSTAIN, 0.0) if radius is None else (outcome.top, radius)

    def check_plan(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        """Refuses votes that the plan does not count, k not below the number of classes, and target radii that n votes
        for one class could not certify, even without any error."""
        self.plan.check_votes(smoothed.votes == "soft")
        check_top_k(self.top_k, smoothed.classes)
        radii = getattr(self.plan, "radii", ())
        if not radii:
            return
        if radii[-1] > threat.reach:
            raise UncertifiableError(
                f"sampling.radii end at {radii[-1]:g}, beyond the threat's range of {threat.reach:g} {threat.unit}; "
                "lower them, or widen the threat"
            )
        if radii[-1] <= (ceiling := self.ceiling(smoothed, threat, 1)):
            return
        raise UncertifiableError(
            f"a radius of {radii[-1]:g} {threat.unit} is out of reach: n={self.plan.n} votes for one class at "
            f"alpha={self.plan.alpha:g} certify at most {ceiling:.4g} {threat.unit} of this threat; raise sampling.n "
            "or the sigma, or lower sampling.radii"
        )


def most_evaluations(smoothed: SmoothedClassifier, plan: SamplingPlan) -> int:
    """Forward passes for the votes of one image, when the plan takes all of its draws."""
    return smoothed.evaluations(0, plan.n0) + smoothed.evaluations(0, plan.n)


class InterpolatedCertifier(TransferCertifier):
    """A theorem for transformations that interpolate: it asks for a bound on the defect.

    Args:
        plan, top_k: as in `TransferCertifier`.
        error: the bound.

    Attributes:
        reverse: votes are counted at a received file, and the bound must be for one; otherwise clean images.
        latent: the bound must be of a displacement in latent space.
    """

    reverse: bool = False
    latent: bool = False

    def __init__(self, plan: SamplingPlan, error: ErrorBound | None, top_k: int = 1):
        super().__init__(plan, top_k)
        self.error = error

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if self.error is None:
            raise UncertifiableError(
                "this theorem needs a bound on the interpolation error; use error=image with certify=joint, "
                "error=image_hard with certify=nested, error=inverse with certify=received, error=latent with "
                "certify=latent"
            )
        if self.error.latent != self.latent:
            raise UncertifiableError(
                "a displacement in latent space and certify=latent go together; use error=latent with it, and "
                "error=image with certify=joint"
            )
        if self.error.reverse and not self.reverse:
            raise UncertifiableError("this error bound is for received files; use certify=received, or error=image")
        if self.reverse and not self.error.reverse:
            raise UncertifiableError(
                "certify=received knows no clean image, which this error bound is for; use error=inverse"
            )
        self.error.check(smoothed, threat)
        self.check_plan(smoothed, threat)

    def bound(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        assert isinstance(threat, TransformationThreat)
        assert self.error is not None
        return (yield from self.error.procedure(smoothed, threat, x, stream))
