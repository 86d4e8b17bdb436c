"""Median smoothing of a network with one real output: a certified interval for the smoothed output."""

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from gsmooth_lightning.certify.base import Certifier, Limits, TransferCertifier
from gsmooth_lightning.certify.transfer import required
from gsmooth_lightning.confidence import GUARD, check_alpha
from gsmooth_lightning.error import Bound
from gsmooth_lightning.errors import RequestError, UncertifiableError, at_least
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.rounds import Job
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat


@dataclass(frozen=True)
class CertifiedInterval:
    """With probability at least 1 - alpha over the draws: under every attack of the threat within `radius`, every
    median of the network's output on random draws lies between `low` and `high`, both included.

    A median is any m with P(f <= m) >= 1/2 and P(f >= m) >= 1/2.

    Attributes:
        prediction: median of the n outputs at the clean image: an estimate, between low and high.
        low, high: two of the n outputs; -inf or inf where n is too small for this image's error bound.
        radius: in `unit`; attacks at exactly this radius are included.
        guarantee: "sound", "distributional", "surrogate" or "heuristic".
        alpha: total probability of a false statement, the error bound's part included.
        evaluations: forward passes of the network, padding included.
        seconds: time spent on this image.
    """

    prediction: float
    low: float
    high: float
    radius: float
    unit: str
    guarantee: str
    alpha: float
    n: int
    seed: int
    evaluations: int
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


def lower_order_statistic(n: int, q: float, alpha: float) -> int:
    """Largest i with P(Bin(n, 1 - q) < i) <= alpha: P(f >= X_(i)) > q holds with probability at least 1 - alpha.

    X_(i) is the i-th smallest of n independent values of f; 0 where n is too small for any (q^n > alpha). By symmetry,
    P(f <= X_(n+1-i)) > q. f may have atoms: the y with P(f >= y) <= q form a half-line D upwards, P(f in D) <= q (its
    end belongs to it or not), and X_(i) is in D only if fewer than i values are outside D.

    Raises:
        RequestError: alpha not between 0 and 1/2.
    """
    check_alpha(alpha)
    return int(binom.ppf(alpha * (1 - GUARD), n, 1 - q))  # the least x with P(Bin <= x) >= alpha, so P(Bin < x) < alpha


class PercentileCertifier(Certifier):
    """An interval that holds the median of f under attack, for a network f with one real output an image.

    With T the transfer function of `theorem` at the radius r, T(p) > 1/2 for p > q: if P(f >= low) > q, then
    P'(f >= low) > 1/2 under every attack within r, and no median of the attacked output lies below low; likewise
    P(f <= high) > q. Both ends are order statistics of n draws, at alpha / 2 each. For Gaussian noise q = Phi(r /
    sigma): low estimates the percentile Phi(-r / sigma) of the clean output (Chiang et al. 2020, "Detection as
    Regression", Lemma 1).

    The network returns (n,) or (n, 1) floating-point outputs; the number of classes and the n0 selection draws of the
    plan are not used. `certify` yields a `CertifiedInterval` for each image.

    Args:
        theorem: which attacks are covered, with a plan of fixed n (sampling=fixed).
        radius: attack radius in the threat's unit, at least 0; cut at the threat's range.

    Raises:
        RequestError: a negative radius, another plan, or a theorem about votes of its own (nested) or received files.
    """

    def __init__(self, theorem: TransferCertifier, radius: float):
        if not isinstance(theorem.plan, FixedN):
            raise RequestError("order statistics need a number of draws fixed before the first; use sampling=fixed")
        if type(theorem).sampler is not TransferCertifier.sampler or getattr(theorem, "reverse", False):
            raise RequestError("order statistics are of the network's own outputs; use the direct or the joint theorem")
        self.theorem, self.radius = theorem, at_least("certify.radius", radius, 0)
        self.n, self.alpha = theorem.plan.n, theorem.plan.alpha

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        """What the theorem refuses, and n that could not certify an interval even without any error.

        Raises:
            UncertifiableError: either.
        """
        self.theorem.check(smoothed, threat)
        radius = min(self.radius, threat.reach)
        q = required(self.theorem.transfer(smoothed, threat, Bound(0.0, 0.0, 0.0, "heuristic"), 1, 0.0), radius)
        if q >= 1:
            raise UncertifiableError(
                f"no percentile of the clean output bounds the median at a radius of {radius:g} {threat.unit}; lower "
                "certify.radius, or raise the sigma"
            )
        if not lower_order_statistic(self.n, q, self.alpha / 2):
            needed = math.ceil(math.log(self.alpha / 2) / math.log(q)) + 1
            raise UncertifiableError(
                f"n={self.n} draws cannot bound the percentile {1 - q:.3g} that a radius of {radius:g} {threat.unit} "
                f"needs at alpha={self.alpha:g}; take sampling.n={needed} or more, lower certify.radius, or raise the "
                "sigma"
            )

    def procedure(  # type: ignore[override]  # an interval is a certificate of another kind
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, CertifiedInterval]:
        bound = yield from self.theorem.bound(smoothed, threat, x, stream)
        slack, dim = smoothed.slack(x), math.prod(smoothed.encoded_shape(x))
        radius = min(self.radius, threat.reach)
        q = required(self.theorem.transfer(smoothed, threat, bound, dim, slack), radius)
        jobs: list[Job] = [
            partial(outputs, smoothed, x, stream, block) for block in range(-(-self.n // smoothed.block))
        ]
        values = np.sort(torch.cat((yield jobs))[: self.n].double().cpu().numpy())  # NaN come last
        if bad := int((~np.isfinite(values)).sum()):
            raise RequestError(
                f"the network returned NaN or infinity on {bad} of {self.n} draws of image {stream.image}; check the "
                "checkpoint"
            )
        i = lower_order_statistic(self.n, q, self.alpha / 2)
        return CertifiedInterval(
            prediction=float(np.median(values)),
            low=float(values[i - 1]) if i else -math.inf,
            high=float(values[self.n - i]) if i else math.inf,
            radius=radius,
            unit=threat.unit,
            guarantee=bound.guarantee,
            alpha=self.alpha + bound.alpha,
            n=self.n,
            seed=stream.seed,
            evaluations=smoothed.evaluations(0, self.n),
            details={"percentile": 1 - q, "E": bound.value, "rho": bound.rho, "slack": slack, **bound.details},
        )

    def limits(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Limits]:
        bound = yield from self.theorem.bound(smoothed, threat, x, stream)
        return Limits(smoothed.evaluations(0, self.n), min(self.radius, threat.reach), self.alpha + bound.alpha)


@torch.inference_mode()
def outputs(smoothed: SmoothedClassifier, x: Tensor, stream: Stream, block: int) -> Tensor:
    """Outputs of the network on one block of draws of the stage "estimate", (block,), on the device.

    Raises:
        RequestError: the network does not return one floating-point number an image.
    """
    inputs = smoothed.draw(x, stream.at("estimate", block, x.device), smoothed.block)
    with torch.autocast(x.device.type, enabled=False):
        out = smoothed.base(inputs)
    if out.shape not in ((len(inputs),), (len(inputs), 1)) or not out.is_floating_point():
        raise RequestError(
            f"percentile smoothing needs a network with one floating-point output an image, got {out.dtype} of shape "
            f"{tuple(out.shape)}; return (n,) or (n, 1)"
        )
    return out.flatten()
