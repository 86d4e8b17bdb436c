"""Parametrised transformations psi(x, theta)."""

from gsmooth_lightning.transform.base import (
    Additive,
    Identity,
    Mover,
    Resolvable,
    Stepwise,
    Transform,
    compute,
    is_exact,
    same,
)
from gsmooth_lightning.transform.blur import Defocus, GaussianBlur
from gsmooth_lightning.transform.compose import Composition
from gsmooth_lightning.transform.function import Function
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
from gsmooth_lightning.transform.pixelate import GlassBlur, Pixelate
from gsmooth_lightning.transform.radial import MotionBlur, RotationalBlur, ZoomBlur
from gsmooth_lightning.transform.surrogate import Surrogate, load_surrogate

__all__ = [
    "Additive",
    "Brightness",
    "BrightnessContrast",
    "Composition",
    "Contrast",
    "CyclicTranslation",
    "Defocus",
    "Function",
    "Gamma",
    "GaussianBlur",
    "GlassBlur",
    "Identity",
    "MotionBlur",
    "Mover",
    "Pixelate",
    "Resolvable",
    "Rotation",
    "RotationalBlur",
    "Scaling",
    "Shear",
    "Similarity",
    "Stepwise",
    "Surrogate",
    "Transform",
    "Translation",
    "Volume",
    "Warp",
    "ZoomBlur",
    "compute",
    "is_exact",
    "load_surrogate",
    "same",
]
