"""Smoothing laws: what is sampled, and how far it certifies."""

from gsmooth_lightning.smoothing.base import Law
from gsmooth_lightning.smoothing.gaussian import Gaussian

__all__ = ["Gaussian", "Law"]
