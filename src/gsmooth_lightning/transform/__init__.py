"""Parametrised transformations psi(x, theta)."""

from gsmooth_lightning.transform.base import Additive, Identity, Resolvable, Transform
from gsmooth_lightning.transform.geometric import Rotation

__all__ = ["Additive", "Identity", "Resolvable", "Rotation", "Transform"]
