"""MACER: training that maximises the certified radius."""

from torch import Tensor, nn
from torch.nn import functional
from torch.special import ndtri

from gsmooth_lightning.errors import at_least, check_whole, positive
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.train.draws import log_mean_softmax, logits_of_draws


class Macer(nn.Module):
    """Cross-entropy of the soft smoothed classifier, and a hinge on its radius: with p the mean over m draws of
    softmax(beta f) and p_1, p_2 its values of the class y and of the best other class,

    loss = -log( 1/m sum_i softmax(f_i)_y ) + weight / 2 * (gamma - (z(p_1) - z(p_2))),

    the second term for images that p classifies as y with a z(p_1) - z(p_2) of at most gamma.

    Zhai et al. 2020, equation 13 and algorithm 1. The radius is sigma / 2 (z(p_1) - z(p_2)) in pixels, and of a
    parameter under its law: `weight` is their lambda times sigma, which fits any law.

    Args:
        weight: lambda sigma; lambda = 12 at sigma .25 on CIFAR-10 in the authors' code; on MNIST Jeong & Shin 2020 take
            16 (6 at sigma 1).
        start: epochs without the second term at first; Jeong & Shin 2020 wait until the learning rate has fallen, since
            the hinge keeps an untrained network from learning.
        gamma: of the hinge.
        beta: inverse temperature.
        m: draws.
        semantic: draw theta too; otherwise theta = 0, for transformations that come from data.augment.

    Raises:
        RequestError: m below 1, a negative start or weight, gamma or beta not positive.
    """

    def __init__(
        self,
        weight: float,
        gamma: float = 8.0,
        beta: float = 16.0,
        m: int = 16,
        start: int = 0,
        semantic: bool = True,
    ):
        super().__init__()
        check_whole("objective", m=(m, 1), start=(start, 0))
        self.weight, self.gamma = at_least("objective.weight", weight, 0), positive("objective.gamma", gamma)
        self.beta, self.m, self.start, self.semantic = positive("objective.beta", beta), m, start, semantic

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Loss, and the logits of the first draw: x (n, ...), y (n,); `epoch` counts from 0."""
        logits = logits_of_draws(smoothed, x, self.m, self.semantic)
        likelihood = functional.nll_loss(log_mean_softmax(logits), y)
        if epoch < self.start:
            return likelihood, logits[0]
        p = log_mean_softmax(self.beta * logits.double()).exp()
        own = p.gather(1, y[:, None])[:, 0]
        other = p.scatter(1, y[:, None], -1.0).amax(1)
        inside = (own > other) & (own < 1) & (other > 0)
        margin = ndtri(own[inside]) - ndtri(other[inside])
        hinge = (self.gamma - margin).clamp_min(0).sum() / len(x)
        return likelihood + self.weight / 2 * hinge.float(), logits[0]
