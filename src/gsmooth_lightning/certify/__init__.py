"""Theorems that turn votes into certificates."""

from gsmooth_lightning.certify.additive import AdditiveCertifier
from gsmooth_lightning.certify.base import ABSTAIN, Certificate, Certifier
from gsmooth_lightning.certify.joint import JointCertifier
from gsmooth_lightning.confidence import FixedN, GroupSequential
from gsmooth_lightning.errors import UncertifiableError

__all__ = [
    "ABSTAIN",
    "AdditiveCertifier",
    "Certificate",
    "Certifier",
    "FixedN",
    "GroupSequential",
    "JointCertifier",
    "UncertifiableError",
]
