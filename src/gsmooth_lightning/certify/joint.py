"""The joint certificate: one flat Monte Carlo over parameters and pixels at once (Theorem J, theory.md section 7)."""

from collections.abc import Generator
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from gsmooth_lightning.certify.base import Certificate, Certifier, round_down
from gsmooth_lightning.confidence import SamplingPlan
from gsmooth_lightning.error import ErrorBound
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat


def joint_margin(pa: float, pb: float, rho: float) -> float:
    """Largest m with Phi(z(pA) - m) - rho >= Phi(z(pB) + m) + rho; 0 when there is none.

    Binary (pB = 1 - pA): m = z(pA) - z(1/2 + rho). A shift whose size sqrt(gamma' Sigma_theta^-1 gamma + E^2) stays
    below m keeps the prediction (Theorem J).
    """
    za, zb = float(norm.ppf(pa)), float(norm.ppf(pb))
    if pa <= pb or pa <= 0.0:
        return 0.0
    if abs(pb - (1 - pa)) < 1e-15:
        return max(0.0, za - float(norm.ppf(min(0.5 + rho, 1.0))))

    def surplus(m: float) -> float:
        return float(norm.cdf(za - m) - norm.cdf(zb + m)) - 2 * rho

    if surplus(0.0) <= 0:
        return 0.0
    return float(brentq(surplus, 0.0, (za - zb) / 2 + 1, xtol=1e-12)) * (1 - 1e-9)


class JointCertifier(Certifier):
    """r = sigma_theta sqrt( (z(pA) - z(1/2 + rho))^2 - E^2 ) for one-parameter additive transformations.

    Theta and the pixel noise are drawn together; E and rho bound the interpolation defect for every gamma of the
    threat (Theorem J; with a soft rho, Theorem J'). Votes are counted at the clean image. Total failure probability:
    that of the votes plus that of the error bound.

    Args:
        plan: how many draws, and when to stop.
        error: bound on the defect.
    """

    def __init__(self, plan: SamplingPlan, error: ErrorBound):
        super().__init__(plan)
        self.error = error

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if self.error is None:
            raise UncertifiableError("the joint certificate needs an error bound; use error=image")
        self.error.check(smoothed, threat)
        assert isinstance(smoothed.law, Gaussian)
        pa = self.plan.ceiling
        self.refuse_unreachable(smoothed.law.scale * joint_margin(pa, 1 - pa, 0), threat.unit)

    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        assert isinstance(threat, TransformationThreat)
        assert isinstance(smoothed.law, Gaussian)
        sigma, slack = smoothed.law.scale, smoothed.slack(x)
        bound = yield from self.error.procedure(smoothed, threat, x, stream)

        def threshold(radius: float) -> float:  # the attack gamma = 0 leaves the clean file, without a defect
            if radius == 0:
                return 0.5 + slack
            if bound.rho >= 0.5:
                return 1.0
            return float(norm.cdf(np.hypot(radius / sigma, bound.value) + norm.ppf(0.5 + bound.rho))) + slack

        outcome = yield from self.plan.run(
            lambda stage, first, last: smoothed.sample(x, stream, stage, first, last), smoothed.block, threshold
        )
        radius = outcome.passed
        if outcome.pa is not None and outcome.pb is not None:
            pa, pb = outcome.pa - slack, outcome.pb + slack
            margin = joint_margin(pa, pb, bound.rho)
            reach = sigma * np.sqrt(max(0.0, margin**2 - bound.value**2))
            radius = round_down(reach) if pa > pb else None
        return self.conclude(
            smoothed,
            outcome,
            None if radius is None else threat.clip(radius),
            x,
            stream,
            unit=threat.unit,
            guarantee=bound.guarantee,
            alpha=self.plan.alpha + bound.alpha,
            details={"E": bound.value, "rho": bound.rho, "alpha_E": bound.alpha, **bound.details},
        )
