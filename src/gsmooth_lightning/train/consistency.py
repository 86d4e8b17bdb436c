"""Consistency regularisation."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.errors import at_least, check_whole
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.train.draws import log_mean_softmax, logits_of_draws


class Consistency(nn.Module):
    """Cross-entropy at m draws, and what holds them together: with F_i = softmax f(psi(x, theta_i) + eps_i), mean F,

    loss = 1/m sum_i CE(F_i, y) + weight * 1/m sum_i KL(F || F_i) + entropy * H(F).

    Jeong & Shin 2020, equation 9: their lambda and eta.

    Args:
        weight: lambda; 5, 10 or 20 in the paper, larger for smaller sigma.
        entropy: eta.
        m: draws.
        semantic: draw theta too; otherwise theta = 0, for transformations that come from data.augment.

    Raises:
        RequestError: m below 1, or negative weights.
    """

    def __init__(self, weight: float = 10.0, entropy: float = 0.5, m: int = 2, semantic: bool = True):
        super().__init__()
        check_whole("objective", m=(m, 1))
        self.weight, self.entropy = at_least("objective.weight", weight, 0), at_least("objective.entropy", entropy, 0)
        self.m, self.semantic = m, semantic

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Loss, and the logits of the first draw: x (n, ...), y (n,); `epoch` counts from 0."""
        logits = logits_of_draws(smoothed, x, self.m, self.semantic)
        each, mean = logits.log_softmax(2), log_mean_softmax(logits)
        apart = functional.kl_div(each, mean.expand_as(each), reduction="sum", log_target=True) / each[..., 0].numel()
        entropy = torch.special.entr(mean.exp()).sum(1).mean()
        loss = functional.cross_entropy(logits.flatten(0, 1), y.repeat(self.m))
        return loss + self.weight * apart + self.entropy * entropy, logits[0]
