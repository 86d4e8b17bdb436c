"""A sigma of its own for each input, with a memory (ANCER: Eiras et al. 2022; theory.md section 10)."""

import base64
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsmooth_lightning.certify.additive import AdditiveCertifier
from gsmooth_lightning.certify.base import ABSTAIN, Certificate, Certifier, Limits
from gsmooth_lightning.errors import RequestError, UncertifiableError, check_whole, positive
from gsmooth_lightning.model.fused import Compiled
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.preprocess import is_nothing
from gsmooth_lightning.rounds import Workers, workers
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Law
from gsmooth_lightning.smoothing.base import round_down
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat

MIXTURES = torch.linspace(-20, 20, 201, dtype=torch.float64).sigmoid()
"""Where `apart` looks for a proof: it finds all but 1/800 of the distance, between regions of any two sizes."""

ROUNDING = 1e-9
"""More than the share by which a gauge in float64 may be wrong."""


@dataclass(frozen=True)
class Kept:
    """A region that was certified: {delta: ||delta / sigma|| <= size} around x, where `prediction` is the answer."""

    x: Tensor
    sigma: Tensor
    size: float
    prediction: int

    def gauge(self, x: Tensor) -> float:
        """||(x - centre) / sigma||."""
        return float(((x - self.x) / self.sigma).norm())

    def holds(self, x: Tensor) -> bool:
        """Whether x is inside, or may be but for rounding."""
        return self.gauge(x) <= self.size * (1 + ROUNDING)

    def left(self, x: Tensor) -> float:
        """The l2 radius of what is left of the region around x, {delta: ||delta / sigma|| <= size - gauge(x)}; rounded
        down."""
        return round_down((self.size - self.gauge(x) * (1 + ROUNDING)) * float(self.sigma.min()))


class PerInputCertifier(Certifier):
    """Chooses sigma for each input by gradient ascent on the certified area, and certifies the ellipsoid around it.

    A sigma that depends on the input certifies nothing by itself: the attacked input would choose another. So this
    classifier remembers the regions that it certified. An input inside one gets that region's prediction, and the part
    of the region around it; a new region is shrunk until it meets none of another prediction. Certificates hold for
    inputs that come later, in this order: `order-dependent`. One input at a time. A certifier is the memory of one
    classifier: make another for another.

    Args:
        plan: how many draws; sampling=fixed.
        maximise: (smoothed, threat, x, y) -> (loss, measures), e.g. `train.CertifiedArea`: what sigma maximises, for
            the class that has most votes among n0 draws of the initial noise.
        scales: (initial noise, shape) -> what is learned, a diagonal `train.Scales`.
        steps, lr: of Adam.

    Raises:
        RequestError: a number of the wrong kind.
    """

    def __init__(
        self,
        plan: FixedN,
        maximise: nn.Module,
        scales: Callable[[Law, tuple[int, ...]], nn.Module],
        steps: int = 50,
        lr: float = 0.1,
    ):
        check_whole("certify", steps=(steps, 1))
        self.theorem, self.maximise, self.scales = AdditiveCertifier(plan), maximise, scales
        self.steps, self.lr = steps, positive("certify.lr", lr)
        self.memory: list[Kept] = []

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        self.theorem.check(smoothed, threat)
        self.maximise.check(smoothed, threat)  # type: ignore[operator]
        if not isinstance(self.theorem.plan, FixedN) or smoothed.votes == "soft":
            raise UncertifiableError("a sigma for each input is certified with sampling=fixed and votes=hard")
        if isinstance(smoothed.base, Compiled):
            raise UncertifiableError("a sigma for each input needs gradients of the network; use backend=fx")
        if not is_nothing(smoothed.preprocess):
            raise UncertifiableError("preprocessing is not known to keep ellipsoids; use preprocess=none")

    def certify(
        self,
        smoothed: SmoothedClassifier,
        threat: Threat,
        images: Iterable[tuple[int, Tensor]],
        seed: int = 0,
        in_flight: int = 1,
        workers: Workers = workers,
    ) -> Iterator[tuple[int, Certificate]]:
        """As `Certifier.certify`, in the order given, one after the other."""
        return super().certify(smoothed, threat, images, seed, 1, workers)

    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        """The certificate of x after the images before, which `memory` holds; x is remembered when it ends."""
        place = x.double().cpu()
        inside = [kept for kept in self.memory if kept.holds(place)]
        if inside:  # all of one prediction
            return self.recalled(smoothed, threat, x, max(inside, key=lambda kept: kept.left(place)), stream)
        own = smoothed.under((yield [partial(self.own_noise, smoothed, threat, x, stream)])[0])
        found = yield from self.theorem.procedure(own, threat, x, stream)
        found = replace(found, guarantee="order-dependent", evaluations=found.evaluations + self.learning)
        if found.prediction == ABSTAIN:
            return found
        assert isinstance(own.noise, Gaussian)
        assert isinstance(found.radius, float)
        assert isinstance(found.prediction, int)  # of one class, not of k
        sigma, prediction = own.noise.sigma.cpu(), found.prediction
        kept = Kept(place, sigma, found.radius / float(sigma.min()), prediction)
        others = [other for other in self.memory if other.prediction != prediction]
        kept = replace(kept, size=round_down(kept.size * shrinkage(kept, others)))
        self.memory.append(kept)
        radius = round_down(kept.size * float(sigma.min()))
        packed = base64.b64encode(sigma.float().numpy().tobytes()).decode()  # it came from float32
        details = {name: value for name, value in found.details.items() if name != "region"}
        details |= {"size": kept.size, "sigma": packed, **self.theorem.region(own, threat, x.numel(), radius)}
        return replace(found, radius=radius, details=details)

    def limits(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Limits]:
        found = yield from self.theorem.limits(smoothed, threat, x, stream)
        return replace(found, evaluations=found.evaluations + self.learning, radius=None)

    @property
    def learning(self) -> int:
        """Forward and backward passes that choose a sigma."""
        return int(self.maximise.n0) * (1 + 2 * self.steps)  # type: ignore[arg-type]

    def recalled(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, kept: Kept, stream: Stream
    ) -> Certificate:
        """The certificate of an input inside a remembered region: what is left of it around x, without draws."""
        radius, own = kept.left(x.double().cpu()), smoothed.under(Gaussian(kept.sigma))
        none = [0.0] * smoothed.classes
        return Certificate(
            prediction=kept.prediction,
            radius=radius,
            unit=threat.unit,
            guarantee="order-dependent",
            alpha=self.theorem.plan.alpha,
            selection=none,
            counts=none,
            n=0,
            seed=stream.seed,
            evaluations=0,
            details={"recalled": True, **self.theorem.region(own, threat, x.numel(), radius)},
        )

    def own_noise(self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream) -> Gaussian:
        """The noise chosen for x, by draws that are used for nothing else.

        Raises:
            RequestError: the loss is not finite.
            UncertifiableError: scales of correlated noise.
        """
        assert smoothed.noise is not None
        devices = [x.device] if x.is_cuda else []
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(np.random.SeedSequence((stream.seed, stream.image)).generate_state(1)[0]))
            x = x.clone()[None]
            scales = self.scales(smoothed.noise, tuple(x.shape[1:]))
            if not isinstance(scales.law(), Gaussian):  # type: ignore[operator]
                raise UncertifiableError("regions of correlated noise are not kept apart; use scales.rank=0")
            scales = scales.to(x.device)
            optimizer = torch.optim.Adam(scales.parameters(), self.lr)
            with torch.no_grad():
                y = self.maximise.votes(smoothed, x).argmax(1)  # type: ignore[operator]
            for _ in range(self.steps):
                loss, _ = self.maximise(smoothed.under(scales.law()), threat, x, y)  # type: ignore[operator]
                if not torch.isfinite(loss):
                    raise RequestError(
                        f"the area of image {stream.image} is not finite; lower certify.lr, or check the checkpoint"
                    )
                optimizer.zero_grad()
                loss.backward(inputs=list(scales.parameters()))  # the network's own gradients stay as they are
                optimizer.step()
            return Gaussian(scales.sigma().detach())  # type: ignore[operator]

    def resume(self, finished: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        """Remembers the regions of a store's records, given with their prepared images."""
        for record, x in finished:
            if "sigma" in record["details"]:
                sigma = np.frombuffer(base64.b64decode(record["details"]["sigma"]), np.float32).copy()
                own = torch.from_numpy(sigma).double().view(x.shape)
                self.memory.append(Kept(x.double().cpu(), own, record["details"]["size"], record["prediction"]))


def shrinkage(new: Kept, others: Sequence[Kept]) -> float:
    """Largest factor, at most 1, by which the new region shrinks to meet none of the others; rounded down. Its centre
    lies in none of them."""
    near = [other for other in others if not apart(new, other, 1.0)]
    low, high = 0.0, 1.0
    if not near:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if all(apart(new, other, middle) for other in near) else (low, middle)
    return low


def apart(new: Kept, other: Kept, factor: float) -> bool:
    """Whether ellipsoids of half axes a = factor * size * sigma and b around two centres, d apart, are proved to be
    disjoint: a common point y has (1 - m) sum (y / a)^2 + m sum ((y - d) / b)^2 <= 1 for every m in [0, 1], and the
    least value of the left side is sum d^2 / (a^2 / (1 - m) + b^2 / m)."""
    a, b = factor * new.size * new.sigma, other.size * other.sigma
    d, m = (other.x - new.x).flatten(), MIXTURES[:, None]
    least = (d.square() / (a.square().flatten() / (1 - m) + b.square().flatten() / m)).sum(1)
    return bool((least > 1 + 4 * ROUNDING).any())
