"""SmoothAdv: adversarial training of the smoothed classifier."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.attack.pgd import checked_box
from gsmooth_lightning.errors import at_least, check_whole
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.train.adversarial import frozen, warmed
from gsmooth_lightning.train.draws import logits_under, noise_draws, soft_votes_under


class SmoothAdv(nn.Module):
    """Cross-entropy at noisy versions of inputs that are adversarial to the soft smoothed classifier.

    x'   = argmax over ||x' - x|| <= epsilon of -log( 1/m sum_i softmax f(x' + eps_i)_y )
    loss = 1/m sum_i CE(f(x' + eps_i), y), with the same draws eps_1, ..., eps_m

    Salman et al. 2019, sections 2.2 and 3. x is the image after transformation and preprocessing: what a certificate's
    error bound moves.

    Args:
        attack: (log_probabilities, x, y, epsilon=..., box=...) -> x', such as `attack.pgd` or `attack.ddn`.
        epsilon: radius of the attack, in units of the input.
        m: draws of the noise.
        warmup: epochs in which epsilon grows linearly to its value.
        box: range of valid inputs that x' is clipped to, or None.
        semantic: draw theta too; otherwise theta = 0, for transformations that come from data.augment.

    Raises:
        RequestError: m below 1, or a negative epsilon or warmup.
    """

    def __init__(
        self,
        attack: Callable[..., Tensor],
        epsilon: float,
        m: int = 2,
        warmup: int = 10,
        box: Sequence[float] | None = (0, 1),
        semantic: bool = True,
    ):
        super().__init__()
        check_whole("objective", m=(m, 1), warmup=(warmup, 0))
        self.attack, self.epsilon = attack, at_least("objective.epsilon", epsilon, 0)
        self.m, self.warmup = m, warmup
        self.box, self.semantic = checked_box(box), semantic

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Loss, and the logits of the first draw: x (n, ...), y (n,); `epoch` counts from 0."""
        clean = smoothed.training_images(x, self.semantic)
        noise = noise_draws(smoothed, clean, self.m)
        with frozen(smoothed.base):
            epsilon = warmed(self.epsilon, self.warmup, epoch)
            adversarial = self.attack(soft_votes_under(smoothed.base, noise), clean, y, epsilon=epsilon, box=self.box)
        logits = logits_under(smoothed.base, adversarial, noise)
        return functional.cross_entropy(logits.flatten(0, 1), y.repeat(self.m)), logits[0]
