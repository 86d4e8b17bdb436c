"""The Laplace law."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import laplace
from torch import Tensor

from gsmooth_lightning.errors import positive
from gsmooth_lightning.smoothing.base import Law, rows
from gsmooth_lightning.stream import Source, TrainingSource


class Laplace(Law):
    """Independent coordinates of density exp(-|z| / b) / 2b: certifies l1 shifts, in every dimension.

    With F the standard Laplace distribution function, a shift of l1 norm b * s leaves of a probability p at least
    F(F^-1(p) - s), and the prediction is kept while s < (F^-1(pA) - F^-1(pB)) / 2. One coordinate alone attains it;
    several cannot do worse, since moving one after the other composes to the same bound.

    Source: theory.md section 2. Teng et al. 2019 print max{(b/2) ln(pA/pB), -b ln(1 - pA + pB)}, which is never larger;
    with pB = 1 - pA both give -b ln(2 (1 - pA)).

    Args:
        b: scale, in the units of Z; the standard deviation is b sqrt(2).

    Raises:
        RequestError: b not positive and finite.
    """

    norm = "l1"
    any_dimension = True
    kinks = (0.0,)

    def __init__(self, b: float):
        super().__init__()
        self.b = positive("b", b)

    @property
    def span(self) -> tuple[float, float]:
        return -37 * self.b, 37 * self.b

    def within(self, tail: float, dim: int) -> tuple[Tensor, Tensor]:
        ends = torch.full((dim,), -self.b * math.log(tail / dim), dtype=torch.float64)
        return -ends, ends

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        """Sign and exponential size from one uniform: its leading bit, and the rest. Never infinite."""
        doubled = source.uniform(n, *shape).mul_(2)
        upper = doubled >= 1
        size = doubled.sub_(upper.to(doubled.dtype)).neg_().log1p_()  # ln(1 - rest), in (-36.1, 0]
        return torch.where(upper, -size, size).mul_(self.b)

    def log_density(self, z: Tensor) -> Tensor:
        z = rows(z)
        return -(z / self.b).abs().sum(1) - z.shape[1] * math.log(2 * self.b)

    def gauge(self, delta: Tensor) -> Tensor:
        """||delta||_1 / b."""
        return (rows(delta) / self.b).abs().sum(1)

    def transfer(self, p: ArrayLike, size: ArrayLike):
        """F(F^-1(p) - size)."""
        return laplace.cdf(laplace.ppf(p) - np.asarray(size))

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """(F^-1(pA) - F^-1(pB)) / 2 in gauge units (multiply by b for l1), 0 where pA <= pB."""
        pa, pb = np.asarray(pa, dtype=float), np.asarray(pb, dtype=float)
        return np.where(pa > pb, (laplace.ppf(pa) - laplace.ppf(pb)) / 2, 0.0)

    def reach(self, size: ArrayLike):
        """b * size: an l1 radius (for l2 divide by sqrt(d), for l_inf by d)."""
        return self.b * np.asarray(size)

    def extra_repr(self) -> str:
        return f"b={self.b:g}"
