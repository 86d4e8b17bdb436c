"""Lightning: data, training, certification."""

from gsmooth_lightning.lit.callbacks import TrainingProgress
from gsmooth_lightning.lit.certification import AttackModule, BoundModule, CertificationModule
from gsmooth_lightning.lit.classifier import ClassifierModule
from gsmooth_lightning.lit.datamodule import ImageDataModule
from gsmooth_lightning.lit.denoiser import DenoiserModule
from gsmooth_lightning.lit.optimized import OptimizedModule
from gsmooth_lightning.lit.sigma import SigmaModule
from gsmooth_lightning.lit.surrogate import SurrogateModule

__all__ = [
    "AttackModule",
    "BoundModule",
    "CertificationModule",
    "ClassifierModule",
    "DenoiserModule",
    "ImageDataModule",
    "OptimizedModule",
    "SigmaModule",
    "SurrogateModule",
    "TrainingProgress",
]
