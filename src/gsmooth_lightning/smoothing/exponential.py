"""The exponential law."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import xlog1py
from torch import Tensor

from gsmooth_lightning.errors import positive
from gsmooth_lightning.smoothing.base import Law, rows
from gsmooth_lightning.stream import Source, TrainingSource


class Exponential(Law):
    """Independent coordinates of density rate * exp(-rate * z), z >= 0: certifies shifts delta >= 0.

    A shift of size s = rate * sum(delta_i) leaves of a probability p at least (1 - (1 - p) e^s)_+, and the prediction
    is kept while s < -ln(1 - pA + pB). For parameters that an attacker can only increase, such as a variance of blur.

    Source: theory.md section 2; Li et al. 2021 (TSS), Gaussian blur.

    Args:
        rate: one over the mean, in one over the units of Z.

    Raises:
        RequestError: rate not positive and finite.
    """

    norm = "l1"
    any_dimension = True
    one_sided = True
    kinks = (0.0,)

    def __init__(self, rate: float):
        super().__init__()
        self.rate = positive("rate", rate)

    @property
    def span(self) -> tuple[float, float]:
        return 0.0, 37 / self.rate

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        return source.exponential(n, *shape).div_(self.rate)

    def log_density(self, z: Tensor) -> Tensor:
        z = rows(z)
        inside = z.shape[1] * math.log(self.rate) - self.rate * z.sum(1)
        return torch.where((z >= 0).all(1), inside, -torch.inf)

    def gauge(self, delta: Tensor) -> Tensor:
        """rate * sum(delta_i); inf where a coordinate is negative."""
        delta = rows(delta)
        return torch.where((delta >= 0).all(1), self.rate * delta.sum(1), torch.inf)

    def transfer(self, p: ArrayLike, size: ArrayLike):
        """(1 - (1 - p) e^size)_+."""
        return -np.expm1(np.minimum(xlog1py(1.0, -np.asarray(p)) + size, 0.0))  # no overflow, and 1 at p = 1

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """-ln(1 - pA + pB), 0 where pA <= pB; inf at pA = 1, pB = 0."""
        pa, pb = np.asarray(pa, dtype=float), np.asarray(pb, dtype=float)
        with np.errstate(divide="ignore"):
            return np.where(pa > pb, -np.log(np.minimum((1 - pa) + pb, 1.0)), 0.0)

    def reach(self, size: ArrayLike):
        """size / rate: an l1 radius of shifts >= 0."""
        return np.asarray(size) / self.rate

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
