"""What a surrogate learns."""

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import at_least, positive
from gsmooth_lightning.transform import Surrogate


class Imitation(nn.Module):
    """|| H(F1(xi) + F2(x) + w eps) - T(xi, x) ||_1 / D + penalty || F2(T(xi, x)) - F2(x) - A1 xi ||_2^2 / sigma^2.

    The first term is GSmooth's (section 5.1), w = 0. The second is ours: what F2 does not turn into a shift along A1
    must stay below the latent noise, for Theorem L to certify anything (theory.md section 9). F2 could make it small by
    its scale alone, and leave the classifier blind: so with a penalty H learns to see through the noise, w = 1.

    Args:
        penalty: weight of the residual.
        sigma: of the latent noise, eps ~ N(0, sigma^2 I).

    Raises:
        RequestError: a negative penalty, or sigma not positive.
    """

    def __init__(self, penalty: float = 0.0, sigma: float = 0.1):
        super().__init__()
        self.penalty, self.sigma = at_least("imitation.penalty", penalty, 0), positive("imitation.sigma", sigma)

    def forward(self, surrogate: Surrogate, x: Tensor, y: Tensor, xi: Tensor) -> Tensor:
        """The loss: clean images x and transformed ones y, (n, c, h, w), parameters xi, (n, dim)."""
        code = surrogate.encoder(x)
        latent = code + surrogate.parameters_code(xi)
        if self.penalty:
            latent = latent + self.sigma * torch.randn_like(latent)
        loss = (surrogate.decoder(latent) - y).abs().mean()
        if self.penalty:
            residual = surrogate.encoder(y) - code - torch.tensordot(xi, surrogate.directions, 1)
            loss = loss + self.penalty * residual.flatten(1).square().sum(1).mean() / self.sigma**2
        return loss
