"""What a denoiser in front of a classifier learns (Salman et al. 2020, Denoised Smoothing)."""

from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.errors import RequestError


class DenoisingMSE(nn.Module):
    """Mean squared error of pixels: || D(x + eps) - x ||_2^2 / D (equation 4). It needs no classifier."""

    def forward(self, denoiser: nn.Module, classifier: nn.Module | None, clean: Tensor, noisy: Tensor) -> Tensor:
        """The loss of clean images and noisy ones, (n, c, h, w)."""
        return functional.mse_loss(denoiser(noisy), clean)


class DenoisingStability(nn.Module):
    """Cross-entropy to the classifier's own answer: CE( f(D(x + eps)), argmax f(x) ) (equation 5).

    The classifier stays as it is. For a black box take another network of the same task in its place (a surrogate).
    """

    def forward(self, denoiser: nn.Module, classifier: nn.Module | None, clean: Tensor, noisy: Tensor) -> Tensor:
        """The loss of clean images and noisy ones, (n, c, h, w).

        Raises:
            RequestError: no classifier, or one that returns labels, which have no gradient.
        """
        logits = None if classifier is None else classifier(denoiser(noisy))
        if classifier is None or logits is None or logits.ndim != 2:
            raise RequestError(
                "denoising=stability needs a classifier with gradients; give checkpoint=FILE with its model, for a "
                "black box those of a network for the same task, or use denoising=mse"
            )
        return functional.cross_entropy(logits, classifier(clean).argmax(1))
