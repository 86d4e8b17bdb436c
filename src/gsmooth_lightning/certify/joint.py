"""The joint certificate: one flat Monte Carlo over parameters and pixels at once (Theorem J, theory.md section 7)."""

from gsmooth_lightning.certify.base import InterpolatedCertifier
from gsmooth_lightning.certify.transfer import Transfer, parameter_transfer
from gsmooth_lightning.error import Bound
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import Threat, TransformationThreat


class JointCertifier(InterpolatedCertifier):
    """Certified where sqrt( gamma' Sigma_theta^-1 gamma + E^2 ) < z(pA) - z(1/2 + rho); in one dimension
    r = sigma_theta sqrt( (z(pA) - z(1/2 + rho))^2 - E^2 ).

    Theta and the pixel noise are drawn together; E and rho bound the interpolation defect for every gamma of the
    threat (Theorem J; with a soft rho, Theorem J'). Rotation, scaling and translation together, whose parameters do not
    add, have a T of their own (see `similarity_transfer`). Votes are counted at the clean image. Total failure
    probability: that of the votes plus that of the error bound.
    """

    def transfer(self, smoothed: SmoothedClassifier, threat: Threat, bound: Bound, dim: int, slack: float) -> Transfer:
        assert isinstance(threat, TransformationThreat)
        assert smoothed.law is not None
        return parameter_transfer(smoothed.transform, smoothed.law, threat, bound, slack)
