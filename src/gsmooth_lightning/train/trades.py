"""TRADES."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.attack.pgd import checked_box
from gsmooth_lightning.errors import at_least, check_whole
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.train.adversarial import frozen, warmed

NEAR = 1e-3
"""Standard deviation of the place from which the attack starts, in units of the input (the authors' code)."""


class Trades(nn.Module):
    """CE(f(x + eps), y) + weight * max over ||x' - x|| <= epsilon of KL( softmax f(x + eps) || softmax f(x' + eps) ),
    at one draw eps of the noise.

    Zhang et al. 2019, equation 5, with noise=none; weight is their 1 / lambda. Transformation and preprocessing act
    before the attack.

    Args:
        attack: (log_probabilities, x, y, epsilon=..., box=...) -> x', such as `attack.pgd`; it ascends the divergence,
            given as one class's -log p, from a random place near x, because at x it has no gradient.
        epsilon: radius of the attack, in units of the input.
        weight: see above.
        warmup: epochs in which epsilon grows linearly to its value.
        box: range of valid inputs that x' is clipped to, or None.
        semantic: draw theta too; otherwise theta = 0, for transformations that come from data.augment.

    Raises:
        RequestError: a negative epsilon, weight or warmup.
    """

    def __init__(
        self,
        attack: Callable[..., Tensor],
        epsilon: float,
        weight: float = 6.0,
        warmup: int = 0,
        box: Sequence[float] | None = (0, 1),
        semantic: bool = True,
    ):
        super().__init__()
        check_whole("objective", warmup=(warmup, 0))
        self.attack, self.epsilon = attack, at_least("objective.epsilon", epsilon, 0)
        self.weight, self.warmup = at_least("objective.weight", weight, 0), warmup
        self.box, self.semantic = checked_box(box), semantic

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Loss, and the logits at x + eps: x (n, ...), y (n,); `epoch` counts from 0."""
        clean = smoothed.training_images(x, self.semantic)
        noise = smoothed.training_noise(clean)
        with frozen(smoothed.base):
            p, near = smoothed.base(clean + noise).softmax(1).detach(), noise + NEAR * torch.randn_like(clean)

            def agreement(inputs: Tensor) -> Tensor:
                return (p * smoothed.base(inputs + near).log_softmax(1)).sum(1, keepdim=True)

            epsilon = warmed(self.epsilon, self.warmup, epoch)
            adversarial = self.attack(agreement, clean, torch.zeros_like(y), epsilon=epsilon, box=self.box)
        logits, attacked = smoothed.base(clean + noise), smoothed.base(adversarial + noise)
        apart = functional.kl_div(
            attacked.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True
        )
        return functional.cross_entropy(logits, y) + self.weight * apart, logits
