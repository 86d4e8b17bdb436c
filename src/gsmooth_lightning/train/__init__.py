"""Training objectives for base classifiers."""

from gsmooth_lightning.train.noise import NoiseAugmentation

__all__ = ["NoiseAugmentation"]
