"""Bounds on the interpolation error: how far a transformation is from being resolvable."""

from gsmooth_lightning.error.assumed import AssumedBound
from gsmooth_lightning.error.base import Bound, Conditions, ErrorBound
from gsmooth_lightning.error.imitation import CorollaryBound, SurrogateDisplacement
from gsmooth_lightning.error.inverse import InverseBound
from gsmooth_lightning.error.latent import RealDisplacement
from gsmooth_lightning.error.sampled import CalibratedBound, DistributionBound, ImageBound, PooledBound
from gsmooth_lightning.error.stored import StoredBound

__all__ = [
    "AssumedBound",
    "Bound",
    "CalibratedBound",
    "Conditions",
    "CorollaryBound",
    "DistributionBound",
    "ErrorBound",
    "ImageBound",
    "InverseBound",
    "PooledBound",
    "RealDisplacement",
    "StoredBound",
    "SurrogateDisplacement",
]
