"""The folded normal law."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from torch import Tensor

from gsmooth_lightning.errors import positive
from gsmooth_lightning.smoothing.base import Law, largest, single
from gsmooth_lightning.stream import Source, TrainingSource


class FoldedNormal(Law):
    """Z = |N(0, sigma^2)|, one parameter: certifies shifts delta >= 0.

    A shift by sigma * s leaves of a probability p at least (2 Phi(z((1+p)/2) - s) - 1)_+, and the prediction is kept
    while Phi(z((1+pA)/2) - s) + Phi(z(1 - pB/2) - s) > 3/2; with pB = 1 - pA, s < z((1+pA)/2) - z(3/4).

    Source: theory.md section 2; Hao et al. 2022 (GSmooth) use the law in an ablation.

    Args:
        sigma: standard deviation before folding, in the units of Z.

    Raises:
        RequestError: sigma not positive and finite.
    """

    norm = "l1"
    one_sided = True
    kinks = (0.0,)

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = positive("sigma", sigma)

    @property
    def span(self) -> tuple[float, float]:
        return 0.0, 9 * self.sigma

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        return source.normal(n, *shape).abs_().mul_(self.sigma)

    def log_density(self, z: Tensor) -> Tensor:
        z = single(z, "folded normal") / self.sigma
        inside = -z.square() / 2 - math.log(self.sigma * math.sqrt(math.pi / 2))
        return torch.where(z >= 0, inside, -torch.inf)

    def gauge(self, delta: Tensor) -> Tensor:
        """delta / sigma; inf where it is negative."""
        delta = single(delta, "folded normal") / self.sigma
        return torch.where(delta >= 0, delta, torch.inf)

    def transfer(self, p: ArrayLike, size: ArrayLike):
        """(2 Phi(z((1+p)/2) - size) - 1)_+."""
        return np.maximum(1 - 2 * ndtr(ndtri((1 - np.asarray(p)) / 2) + np.asarray(size)), 0.0)

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """The s of the class's condition, by bisection; 0 where pA <= pB."""
        pa, pb = np.broadcast_arrays(np.asarray(pa, dtype=float), np.asarray(pb, dtype=float))
        a, b = -ndtri((1 - pa) / 2), -ndtri(pb / 2)
        return largest(lambda size: ndtr(size - a) + ndtr(size - b) < 0.5, pa > pb)

    def reach(self, size: ArrayLike):
        """sigma * size."""
        return self.sigma * np.asarray(size)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}"
