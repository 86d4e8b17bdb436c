"""The uniform law."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gsmooth_lightning.errors import RequestError, finite
from gsmooth_lightning.smoothing.base import Law, rows
from gsmooth_lightning.stream import Source, TrainingSource


class Uniform(Law):
    """Independent coordinates, uniform on [low, high): a box [-l, l]^D of noise, or a parameter in [0, a].

    With w = high - low, the gauge of a shift is its total variation v = 1 - prod(1 - |delta_i| / w)_+. It leaves of a
    probability p at least (p - v)_+, and the prediction is kept while v < (pA - pB) / 2. Shifts of both signs are
    certified, also for [0, a].

    Source: theory.md section 2; Yang et al. 2020 (l1: w (pA - pB) / 2).

    Args:
        low, high: ends of the interval, in the units of Z.

    Raises:
        RequestError: ends not finite, or low not below high.
    """

    norm = "l1"
    any_dimension = True

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = finite("low", low), finite("high", high)
        self.width = self.high - self.low
        self.kinks = (self.low, self.high)
        if not 0 < self.width < math.inf:
            raise RequestError(f"low must be below high, got low={low} and high={high}")

    @property
    def span(self) -> tuple[float, float]:
        return self.low, self.high

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        return source.uniform(n, *shape).mul_(self.width).add_(self.low)

    def log_density(self, z: Tensor) -> Tensor:
        z = rows(z)
        outside = ((z < self.low) | (z > self.high)).any(1)
        inside = torch.full_like(z[:, 0], -z.shape[1] * math.log(self.width))
        return inside.masked_fill(outside, -torch.inf)

    def gauge(self, delta: Tensor) -> Tensor:
        """1 - prod(1 - |delta_i| / w)_+, between 0 and 1."""
        return -torch.expm1(torch.log1p(-(rows(delta).abs() / self.width).clamp_max(1)).sum(1))

    def transfer(self, p: ArrayLike, size: ArrayLike):
        """(p - size)_+."""
        return np.maximum(np.asarray(p) - np.asarray(size), 0.0)

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """(pA - pB) / 2, 0 where pA <= pB."""
        return np.maximum(np.asarray(pa, dtype=float) - np.asarray(pb, dtype=float), 0.0) / 2

    def reach(self, size: ArrayLike):
        """w * size: an l1 radius in every dimension, the absolute shift of one parameter."""
        return self.width * np.asarray(size)

    def extra_repr(self) -> str:
        return f"low={self.low:g}, high={self.high:g}"
