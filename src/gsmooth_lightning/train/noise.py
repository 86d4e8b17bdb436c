"""Noise augmentation."""

from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.smoothed import SmoothedClassifier


class NoiseAugmentation(nn.Module):
    """Cross-entropy of the base classifier at one draw of the smoothing: E CE(f(psi(x, theta) + eps), y).

    Lecuyer et al. 2019; Cohen et al. 2019; with semantic draws Fischer et al. 2020, section 7.

    Args:
        semantic: draw theta too; otherwise theta = 0, for transformations that come from data.augment.
    """

    def __init__(self, semantic: bool = True):
        super().__init__()
        self.semantic = semantic

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Loss, and the logits it was computed from: x (n, ...), y (n,); `epoch` counts from 0."""
        clean = smoothed.training_images(x, self.semantic)
        logits = smoothed.base(clean + smoothed.training_noise(clean))
        return functional.cross_entropy(logits, y), logits
