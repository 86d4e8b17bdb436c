"""The direct certificate: the attack shifts the smoothing law, and nothing else happens."""

import math
from collections.abc import Generator
from typing import Any

from torch import Tensor, nn

from gsmooth_lightning.certify.base import Certificate, Certifier, round_down
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.preprocess import Preprocess
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, Threat, TransformationThreat
from gsmooth_lightning.transform import Identity

ROUNDING = 1.1
"""Two half steps of the grid a pixel, and a tenth for the preprocessing's float32."""


class AdditiveCertifier(Certifier):
    """l2 radius sigma_min (z(pA) - z(pB)) / 2 for Gaussian pixel noise (Cohen et al. 2019, Theorem 1).

    Images that are not on the noise grid (float files, or after preprocessing) are rounded to it first; both images of
    a pair move by at most half a step a pixel, so the radius shrinks by 1.1 sqrt(D) / levels.
    """

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if isinstance(threat, TransformationThreat):
            how = getattr(threat.transform, "interpolation", "its")
            raise UncertifiableError(
                f"{threat.transform.name} is not exact under {how} interpolation; use certify=joint"
            )
        if not isinstance(threat, PixelThreat):
            raise UncertifiableError("the direct certificate covers pixel noise; use threat=l2")
        if not isinstance(smoothed.noise, Gaussian) or smoothed.noise.cholesky is not None:
            raise UncertifiableError("the direct certificate needs Gaussian pixel noise; use noise=gaussian")
        if smoothed.law is not None:
            raise UncertifiableError(
                "an l2 attack before a random transformation is not covered; use transform=identity with threat=l2"
            )
        if not isinstance(smoothed.transform, Identity):
            raise UncertifiableError("a fixed transformation before the noise is not covered; use transform=identity")
        if not _lipschitz(smoothed.preprocess) <= 1:
            raise UncertifiableError(
                "preprocessing must not stretch l2 distances, and say so: use steps with an attribute lipschitz <= 1"
            )
        self.refuse_unreachable(float(smoothed.noise.sigma.min() * self._gauge(smoothed, self.plan.ceiling)), "l2")

    @staticmethod
    def _gauge(smoothed: SmoothedClassifier, pa: float) -> float:
        assert smoothed.noise is not None
        return float(smoothed.noise.radius(pa, 1 - pa))

    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        noise = smoothed.noise
        assert isinstance(noise, Gaussian)
        sigma = float(noise.sigma.min())
        on_grid = (
            threat.levels is not None and smoothed.levels % threat.levels == 0 and _is_nothing(smoothed.preprocess)
        )
        rounding = 0.0 if on_grid else ROUNDING * math.sqrt(x.numel()) / smoothed.levels
        slack = smoothed.slack(x)

        def threshold(radius: float) -> float:
            size = 0.0 if radius == 0 else (radius + rounding) / sigma
            return 1 - float(noise.transfer(0.5, size)) + slack

        outcome = yield from self.plan.run(
            lambda stage, first, last: smoothed.sample(x, stream, stage, first, last), smoothed.block, threshold
        )
        radius = outcome.passed
        if outcome.pa is not None and outcome.pb is not None:
            pa, pb = outcome.pa - slack, outcome.pb + slack
            radius = round_down(sigma * float(noise.radius(pa, pb)) - rounding) if pa > pb else None
        return self.conclude(smoothed, outcome, radius, x, stream, unit="l2", guarantee="sound", alpha=self.plan.alpha)


def _is_nothing(preprocess: nn.Module) -> bool:
    return isinstance(preprocess, nn.Identity) or (isinstance(preprocess, Preprocess) and len(preprocess) == 0)


def _lipschitz(preprocess: nn.Module) -> float:
    """What preprocessing states about itself; infinity when it states nothing."""
    return 1.0 if _is_nothing(preprocess) else float(getattr(preprocess, "lipschitz", math.inf))  # type: ignore[arg-type]
