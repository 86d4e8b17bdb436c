"""The certificate of a received file (IndivSPT; theory.md section 7): the clean image is not known."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from gsmooth_lightning.certify.base import Certificate, InterpolatedCertifier
from gsmooth_lightning.certify.transfer import Transfer, parameter_transfer
from gsmooth_lightning.error import Bound, ErrorBound
from gsmooth_lightning.plans import SamplingPlan
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat


class ReceivedCertifier(InterpolatedCertifier):
    """The prediction at a received file is that of the clean image it was made from, whichever that is, if the attack's
    gamma is within the radius: where sqrt( gamma' Sigma_theta^-1 gamma + E^2 ) < z(pA - rho); in one dimension
    r = sigma_theta sqrt( z(pA - rho)^2 - E^2 ).

    Theta and the pixel noise are drawn together, at the file (Theorem J, reversed; theory.md section 7). Theta whose
    defect exceeds E, a mass rho under the law at the file, are taken out of the votes before the shift to the clean
    image's law, under which they may weigh more than rho. What holds for A's votes holds for those against another
    class B, so that bounds of both may be used.

    Args:
        plan, top_k: as in `TransferCertifier`.
        error: a bound for received files, error=inverse.
        attacked: images are first attacked, with a gamma that is uniform over the threat's parameters, and certified
            from that file alone; details["gamma"] names it. For experiments.
    """

    reverse = True

    def __init__(self, plan: SamplingPlan, error: ErrorBound | None, top_k: int = 1, attacked: bool = False):
        super().__init__(plan, error, top_k)
        self.attacked = attacked

    def transfer(self, smoothed: SmoothedClassifier, threat: Threat, bound: Bound, dim: int, slack: float) -> Transfer:
        assert isinstance(threat, TransformationThreat)
        assert smoothed.law is not None
        within = replace(bound, rho=0.0)
        shifted = parameter_transfer(smoothed.transform, smoothed.law, threat, within, slack)

        def transfer(p: ArrayLike, radius: float) -> np.ndarray:
            return shifted(np.asarray(p, dtype=float) - (bound.rho if radius else 0.0), radius)

        return transfer

    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        """The certificate of the file x, (c, h, w), or of what an attack makes of it."""
        if not self.attacked:
            return (yield from super().procedure(smoothed, threat, x, stream))
        assert isinstance(threat, TransformationThreat)
        gamma = threat.drawing(x.device)(stream.at("attack", 0, x.device), 1)
        (file,) = threat.apply(x[None], gamma)
        certificate = yield from super().procedure(smoothed, threat, file, stream)
        return replace(certificate, details=certificate.details | {"gamma": gamma[0].tolist()})
