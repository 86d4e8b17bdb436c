"""Changes of brightness, contrast, gamma and volume: pointwise and exact in real arithmetic, without clipping.

Values leave [0, 1]: a certificate speaks of the values as they are (threat.saved=real). Clipping is not exact:
brightness +.3 then -.3 loses what was clipped.
"""

import math

import torch
from torch import Tensor

from gsmooth_lightning.transform.base import Additive, Resolvable


class Brightness(Additive):
    """psi(x, b) = x + b."""

    units = ("brightness",)
    name = "brightness"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return x + column(theta, 0, x)

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        return float(error.norm())

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        return math.sqrt(x.numel()) * float(step[0])


class Contrast(Additive):
    """psi(x, k) = e^k x: exponents add."""

    units = ("log contrast",)
    name = "contrast"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return x * column(theta, 0, x).exp()

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        return float(error.norm()) * float(most[0].exp())

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        return float(x.norm()) * float(high[0].exp()) * float(step[0])


class BrightnessContrast(Resolvable):
    """psi(x, (k, b)) = e^k (x + b); resolves to (k1 + k2, b1 + e^-k1 b2): not additive (TSS, section 5.2)."""

    units = ("log contrast", "brightness")
    name = "brightness and contrast"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return (x + column(theta, 1, x)) * column(theta, 0, x).exp()

    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        contrast, brightness = alpha[:, 0], alpha[:, 1]
        return torch.stack([contrast + beta[:, 0], brightness + torch.exp(-contrast) * beta[:, 1]], 1)

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        return float(error.norm()) * float(most[0].exp())

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        brightest = math.sqrt(x.numel()) * max(abs(float(low[1])), abs(float(high[1])))
        moved = (float(x.norm()) + brightest) * float(step[0]) + math.sqrt(x.numel()) * float(step[1])
        return moved * float(high[0].exp())


class Gamma(Additive):
    """psi(x, g) = x^(e^g), pixels in [0, 1]: exponents multiply, so their logarithms add."""

    units = ("log gamma",)
    name = "gamma correction"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        positive = x.clamp_min(torch.finfo(x.dtype).tiny)  # x = 0 stays 0, with a gradient that is finite
        return torch.where(x > 0, positive ** column(theta, 0, x).exp(), torch.zeros_like(x))

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        """With c = e^theta and values y, y' in [0, 1], |y^c - y'^c| is at most c |y - y'| / min(y, y'), by the mean
        value of c y^c / y, and at most max(y, y')^c."""
        if bool((low < 0).any() or (high > 1).any()):
            return math.inf
        apart = float(most[0].exp()) * error / (low - error).clamp_min(0)  # 0 / 0: black stays black
        whole = (high + error).clamp_max(1) ** float(least[0].exp())
        return float(torch.where(error > 0, torch.minimum(apart, whole), 0).norm())

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        """The derivative c x^c ln x is at most 1/e."""
        return math.sqrt(x.numel()) / math.e * float(step[0])


class Volume(Additive):
    """psi(x, v) = 10^(v / 20) x, v in decibels: they add (Fischer et al. 2020, section 7.3)."""

    units = ("dB",)
    name = "volume"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return x * (column(theta, 0, x) * (math.log(10) / 20)).exp()

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        return float(error.norm()) * float((most[0] * (math.log(10) / 20)).exp())

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        return float(x.norm()) * float((high[0] * (math.log(10) / 20)).exp()) * (math.log(10) / 20) * float(step[0])


def column(theta: Tensor, k: int, x: Tensor) -> Tensor:
    """Parameter k of each image, (n, 1, ...) to go with images (n, ...)."""
    return theta[:, k].to(x.dtype).view(-1, *[1] * (x.ndim - 1))
