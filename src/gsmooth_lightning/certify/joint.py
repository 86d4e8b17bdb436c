"""The joint certificate: one flat Monte Carlo over parameters and pixels at once (Theorem J, theory.md section 7)."""

from collections.abc import Generator
from typing import Any

from torch import Tensor

from gsmooth_lightning.certify.base import TransferCertifier
from gsmooth_lightning.certify.transfer import Transfer, parameter_transfer
from gsmooth_lightning.error import Bound, ErrorBound
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.plans import SamplingPlan
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat


class JointCertifier(TransferCertifier):
    """Certified where sqrt( gamma' Sigma_theta^-1 gamma + E^2 ) < z(pA) - z(1/2 + rho); in one dimension
    r = sigma_theta sqrt( (z(pA) - z(1/2 + rho))^2 - E^2 ).

    Theta and the pixel noise are drawn together; E and rho bound the interpolation defect for every gamma of the
    threat (Theorem J; with a soft rho, Theorem J'). Rotation, scaling and translation together, whose parameters do not
    add, have a T of their own (see `similarity_transfer`). Votes are counted at the clean image. Total failure
    probability: that of the votes plus that of the error bound.

    Args:
        plan, top_k: as in `TransferCertifier`.
        error: bound on the defect.
    """

    def __init__(self, plan: SamplingPlan, error: ErrorBound | None, top_k: int = 1):
        super().__init__(plan, top_k)
        self.error = error

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if self.error is None:
            raise UncertifiableError("the joint certificate needs an error bound; use error=image")
        self.error.check(smoothed, threat)
        self.check_plan(smoothed, threat)

    def bound(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        assert isinstance(threat, TransformationThreat)
        assert self.error is not None
        return (yield from self.error.procedure(smoothed, threat, x, stream))

    def transfer(self, smoothed: SmoothedClassifier, threat: Threat, bound: Bound, dim: int, slack: float) -> Transfer:
        assert isinstance(threat, TransformationThreat)
        assert smoothed.law is not None
        return parameter_transfer(smoothed.transform, smoothed.law, threat, bound, slack)
