"""Stability training."""

from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.errors import at_least
from gsmooth_lightning.smoothed import SmoothedClassifier


class StabilityTraining(nn.Module):
    """CE(f(x), y) + weight * CE(f(psi(x, theta) + eps), softmax f(x)): right on clean images, the same under a draw.

    Zheng et al. 2016, equation 7, with Gaussian noise; for smoothed classifiers Li et al. 2019, section 5. The gradient
    reaches both terms, through the clean images too.

    Args:
        weight: of the second term.
        semantic: draw theta too; otherwise theta = 0, for transformations that come from data.augment.

    Raises:
        RequestError: a negative weight.
    """

    def __init__(self, weight: float = 2.0, semantic: bool = True):
        super().__init__()
        self.weight, self.semantic = at_least("objective.weight", weight, 0), semantic

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Loss, and the logits of the draw: x (n, ...), y (n,); `epoch` counts from 0."""
        clean = smoothed.base(smoothed.training_images(x, semantic=False))
        drawn = smoothed.training_images(x, self.semantic)
        logits = smoothed.base(drawn + smoothed.training_noise(drawn))
        stability = functional.cross_entropy(logits, clean.softmax(1))
        return functional.cross_entropy(clean, y) + self.weight * stability, logits
