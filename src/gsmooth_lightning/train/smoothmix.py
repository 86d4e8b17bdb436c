"""SmoothMix."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.attack.pgd import checked_box
from gsmooth_lightning.errors import at_least, check_whole, positive
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.train.adversarial import frozen
from gsmooth_lightning.train.draws import log_mean_softmax, logits_under, noise_draws, soft_votes_under


class SmoothMix(nn.Module):
    """Cross-entropy at m draws, and at mixtures of an input with one that is adversarial to the soft smoothed
    classifier, whose target goes to the uniform one along the way: with F the mean of softmax f(. + eps_i),

    x'   = steps gradient steps of length alpha from x up -log F(x)_y, in no ball,
    loss = 1/m sum_i CE(f(x + eps_i), y)
           + weight * 1/m sum_i CE(f(x + lambda (x' - x) + eps_i), (1 - lambda) F(x) + lambda / classes),

    the second term for images that F classifies as y; lambda uniform in [0, 1/2] for each image, the target without
    gradient, the same draws everywhere.

    Jeong et al. 2021, section 3 and their code (eta = weight). Transformation and preprocessing act before.

    Args:
        attack: (log_probabilities, x, y, epsilon=..., steps=..., step_size=..., box=...) -> x', `attack.pgd`.
        steps: T.
        alpha: of a step, in units of the input: .5, 1, 2 in the paper at sigma .25, .5, 1 on CIFAR-10.
        weight: eta.
        m: draws.
        box: range of valid inputs that x' is clipped to, or None.
        semantic: draw theta too; otherwise theta = 0, for transformations that come from data.augment.

    Raises:
        RequestError: m or steps below 1, alpha not positive, or a negative weight.
    """

    def __init__(
        self,
        attack: Callable[..., Tensor],
        alpha: float,
        steps: int = 4,
        weight: float = 5.0,
        m: int = 2,
        box: Sequence[float] | None = (0, 1),
        semantic: bool = True,
    ):
        super().__init__()
        check_whole("objective", m=(m, 1), steps=(steps, 1))
        self.attack, self.alpha, self.steps = attack, positive("objective.alpha", alpha), steps
        self.weight, self.m = at_least("objective.weight", weight, 0), m
        self.box, self.semantic = checked_box(box), semantic

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Loss, and the logits of the first draw: x (n, ...), y (n,); `epoch` counts from 0."""
        clean = smoothed.training_images(x, self.semantic)
        noise = noise_draws(smoothed, clean, self.m)
        with frozen(smoothed.base):
            steps = {"steps": self.steps, "step_size": self.alpha, "epsilon": self.steps * self.alpha}  # no ball
            adversarial = self.attack(soft_votes_under(smoothed.base, noise), clean, y, box=self.box, **steps)
        logits = logits_under(smoothed.base, clean, noise)
        share = torch.rand(len(clean), device=clean.device) / 2
        mixed = clean + share.view(-1, *[1] * (clean.ndim - 1)) * (adversarial - clean)
        mean = log_mean_softmax(logits).detach().exp()
        target = torch.lerp(mean, logits.new_tensor(1 / logits.shape[2]), share[:, None])
        apart = -(target * logits_under(smoothed.base, mixed, noise).log_softmax(2).mean(0)).sum(1)
        mixture = (apart * (mean.argmax(1) == y)).mean()
        return functional.cross_entropy(logits.flatten(0, 1), y.repeat(self.m)) + self.weight * mixture, logits[0]
