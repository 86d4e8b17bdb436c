"""Training objectives for base classifiers: (smoothed, x, y, epoch) -> (loss, logits); for surrogates, denoisers and
noise."""

from gsmooth_lightning.train.adversarial import AdversarialTraining
from gsmooth_lightning.train.consistency import Consistency
from gsmooth_lightning.train.denoising import DenoisingMSE, DenoisingStability
from gsmooth_lightning.train.imitation import Imitation
from gsmooth_lightning.train.macer import Macer
from gsmooth_lightning.train.maximise import CertifiedArea, CertifiedRange, Maximised
from gsmooth_lightning.train.noise import NoiseAugmentation
from gsmooth_lightning.train.scales import Scales
from gsmooth_lightning.train.smoothadv import SmoothAdv
from gsmooth_lightning.train.smoothmix import SmoothMix
from gsmooth_lightning.train.stability import StabilityTraining
from gsmooth_lightning.train.trades import Trades

__all__ = [
    "AdversarialTraining",
    "CertifiedArea",
    "CertifiedRange",
    "Consistency",
    "DenoisingMSE",
    "DenoisingStability",
    "Imitation",
    "Macer",
    "Maximised",
    "NoiseAugmentation",
    "Scales",
    "SmoothAdv",
    "SmoothMix",
    "StabilityTraining",
    "Trades",
]
