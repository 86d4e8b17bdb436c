"""Bounds on the interpolation error: how far a transformation is from being resolvable."""

from gsmooth_lightning.error.base import Bound, ErrorBound
from gsmooth_lightning.error.sampled import DistributionBound, ImageBound
from gsmooth_lightning.error.stored import StoredBound

__all__ = ["Bound", "DistributionBound", "ErrorBound", "ImageBound", "StoredBound"]
