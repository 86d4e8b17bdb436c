"""The logarithm of the Rayleigh law."""

import math

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from gsmooth_lightning.errors import positive
from gsmooth_lightning.smoothing.base import Law, largest, single
from gsmooth_lightning.stream import Source, TrainingSource


class Rayleigh(Law):
    """Z = ln theta with theta of density theta / scale^2 exp(-theta^2 / (2 scale^2)), one parameter.

    For an attack that multiplies theta by c, hence shifts Z by ln c: use it with transformations whose parameter is a
    logarithm (gamma correction, contrast). The law is not symmetric: of a probability p are left at least
    1 - (1-p)^(1/c^2) for c > 1 and p^(1/c^2) for c < 1. The gauge is |ln c|, `transfer` and `radius` hold for both
    directions, and `interval` gives each direction its own end:
    (1-pA)^(1/c^2) + pB^(1/c^2) < 1 for c > 1 and pA^(1/c^2) + (1-pB)^(1/c^2) > 1 for c < 1;
    with pB = 1 - pA, sqrt(-log2 pA) < c < sqrt(-log2(1 - pA)).

    Source: theory.md section 2. What is certified does not depend on the scale.

    Args:
        scale: mode of theta; its median is scale * sqrt(2 ln 2).

    Raises:
        RequestError: scale not positive and finite.
    """

    norm = "l1"

    def __init__(self, scale: float):
        super().__init__()
        self.scale = positive("scale", scale)

    @property
    def span(self) -> tuple[float, float]:
        return math.log(self.scale) - 18.5, math.log(self.scale) + 2.2

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        """ln(scale) + ln(2 E) / 2 with E exponential; E = 0, of probability 2^-53, counts as 2^-54."""
        return source.exponential(n, *shape).clamp_min_(2**-54).mul_(2).log_().div_(2).add_(math.log(self.scale))

    def log_density(self, z: Tensor) -> Tensor:
        square = 2 * (single(z, "Rayleigh") - math.log(self.scale))  # ln(theta^2 / scale^2)
        return square - square.exp() / 2

    def gauge(self, delta: Tensor) -> Tensor:
        """|ln c|."""
        return single(delta, "Rayleigh").abs()

    def transfer_up(self, p: ArrayLike, size: ArrayLike):
        """1 - (1-p)^(1/c^2), c = e^size: what a shift by +size leaves."""
        return 1 - (1 - np.asarray(p)) ** np.exp(-2 * np.asarray(size))

    def transfer_down(self, p: ArrayLike, size: ArrayLike):
        """p^(1/c^2), c = e^-size: what a shift by -size leaves."""
        return np.asarray(p) ** np.exp(2 * np.asarray(size))

    def transfer(self, p: ArrayLike, size: ArrayLike):
        """The smaller of `transfer_up` and `transfer_down`."""
        return np.minimum(self.transfer_up(p, size), self.transfer_down(p, size))

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """The smaller of the two ends of `interval`; 0 where pA <= pB.

        At least what `transfer` gives for A and B separately, since one shift has the same direction for both.
        """
        return np.minimum(*self._ends(pa, pb))

    def interval(self, pa: float, pb: float) -> tuple[float, float]:
        down, up = self._ends(pa, pb)
        return -float(down) + 0.0, float(up)  # + 0.0: no minus zero

    @staticmethod
    def _ends(pa: ArrayLike, pb: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Largest certified |ln c| for c < 1 and for c > 1."""
        pa, pb = np.broadcast_arrays(np.asarray(pa, dtype=float), np.asarray(pb, dtype=float))

        def holds_up(size: np.ndarray) -> np.ndarray:
            k = np.exp(-2 * size)
            return (1 - pa) ** k + pb**k < 1

        def holds_down(size: np.ndarray) -> np.ndarray:
            k = np.exp(2 * size)
            return pa**k + (1 - pb) ** k > 1

        return largest(holds_down, pa > pb), largest(holds_up, pa > pb)

    def reach(self, size: ArrayLike):
        """size: |ln c|, the factor is c = e^size or e^-size."""
        return np.asarray(size)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"
