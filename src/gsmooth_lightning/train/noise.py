"""Noise augmentation."""

from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.smoothed import SmoothedClassifier


class NoiseAugmentation(nn.Module):
    """Cross-entropy of the base classifier at one draw of the smoothing: E CE(f(psi(x, theta) + eps), y).

    Lecuyer et al. 2019; Cohen et al. 2019; with semantic draws Fischer et al. 2020, section 7.
    """

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and the logits it was computed from: x (n, c, h, w), y (n,)."""
        logits = smoothed.base(smoothed.training_batch(x))
        return functional.cross_entropy(logits, y), logits
