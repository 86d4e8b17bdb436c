"""Parametrised transformations psi(x, theta)."""

from gsmooth_lightning.transform.base import Additive, Identity, Resolvable, Transform, compute, is_exact, same
from gsmooth_lightning.transform.blur import GaussianBlur
from gsmooth_lightning.transform.compose import Composition
from gsmooth_lightning.transform.geometric import (
    CyclicTranslation,
    Rotation,
    Scaling,
    Shear,
    Similarity,
    Translation,
    Warp,
)
from gsmooth_lightning.transform.intensity import Brightness, BrightnessContrast, Contrast, Gamma, Volume

__all__ = [
    "Additive",
    "Brightness",
    "BrightnessContrast",
    "Composition",
    "Contrast",
    "CyclicTranslation",
    "Gamma",
    "GaussianBlur",
    "Identity",
    "Resolvable",
    "Rotation",
    "Scaling",
    "Shear",
    "Similarity",
    "Transform",
    "Translation",
    "Volume",
    "Warp",
    "compute",
    "is_exact",
    "same",
]
