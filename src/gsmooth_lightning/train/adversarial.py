"""Adversarial training of the base classifier."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.attack.pgd import checked_box
from gsmooth_lightning.errors import at_least, check_whole
from gsmooth_lightning.smoothed import SmoothedClassifier


class AdversarialTraining(nn.Module):
    """Cross-entropy at inputs that are adversarial to the base classifier, without noise: E max CE(f(x'), y).

    Madry et al. 2018. Transformation and preprocessing act before the attack.

    Args:
        attack, epsilon, warmup, box, semantic: as for `SmoothAdv`.

    Raises:
        RequestError: a negative epsilon or warmup.
    """

    def __init__(
        self,
        attack: Callable[..., Tensor],
        epsilon: float,
        warmup: int = 0,
        box: Sequence[float] | None = (0, 1),
        semantic: bool = True,
    ):
        super().__init__()
        check_whole("objective", warmup=(warmup, 0))
        self.attack, self.epsilon, self.warmup = attack, at_least("objective.epsilon", epsilon, 0), warmup
        self.box, self.semantic = checked_box(box), semantic

    def forward(self, smoothed: SmoothedClassifier, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Loss, and the logits it was computed from: x (n, ...), y (n,); `epoch` counts from 0."""
        clean = smoothed.training_images(x, self.semantic)
        with frozen(smoothed.base):
            epsilon = warmed(self.epsilon, self.warmup, epoch)
            adversarial = self.attack(
                lambda inputs: smoothed.base(inputs).log_softmax(1), clean, y, epsilon=epsilon, box=self.box
            )
        logits = smoothed.base(adversarial)
        return functional.cross_entropy(logits, y), logits


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network as a fixed function: evaluation mode, so that an attack moves no batch statistics; no gradients of
    its weights."""
    modes = [(module, module.training) for module in network.modules()]
    needing = [p for p in network.parameters() if p.requires_grad]
    network.eval()
    for p in needing:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p in needing:
            p.requires_grad_(True)


def warmed(epsilon: float, warmup: int, epoch: int) -> float:
    """epsilon after a linear rise over the first `warmup` epochs."""
    return epsilon * min(1.0, (epoch + 1) / warmup) if warmup else epsilon
