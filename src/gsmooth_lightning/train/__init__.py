"""Training objectives for base classifiers: (smoothed, x, y, epoch) -> (loss, logits); and for surrogates."""

from gsmooth_lightning.train.adversarial import AdversarialTraining
from gsmooth_lightning.train.imitation import Imitation
from gsmooth_lightning.train.noise import NoiseAugmentation
from gsmooth_lightning.train.smoothadv import SmoothAdv

__all__ = ["AdversarialTraining", "Imitation", "NoiseAugmentation", "SmoothAdv"]
