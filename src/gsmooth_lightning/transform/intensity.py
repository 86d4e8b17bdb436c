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

    dim = 1
    unit = "brightness"
    name = "brightness"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return x + column(theta, 0, x)


class Contrast(Additive):
    """psi(x, k) = e^k x: exponents add."""

    dim = 1
    unit = "log contrast"
    name = "contrast"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return x * column(theta, 0, x).exp()


class BrightnessContrast(Resolvable):
    """psi(x, (k, b)) = e^k (x + b); resolves to (k1 + k2, b1 + e^-k1 b2): not additive (TSS, section 5.2)."""

    dim = 2
    unit = "log contrast, brightness"
    name = "brightness and contrast"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return (x + column(theta, 1, x)) * column(theta, 0, x).exp()

    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        contrast, brightness = alpha[:, 0], alpha[:, 1]
        return torch.stack([contrast + beta[:, 0], brightness + torch.exp(-contrast) * beta[:, 1]], 1)


class Gamma(Additive):
    """psi(x, g) = x^(e^g), pixels in [0, 1]: exponents multiply, so their logarithms add."""

    dim = 1
    unit = "log gamma"
    name = "gamma correction"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        positive = x.clamp_min(torch.finfo(x.dtype).tiny)  # x = 0 stays 0, with a gradient that is finite
        return torch.where(x > 0, positive ** column(theta, 0, x).exp(), torch.zeros_like(x))


class Volume(Additive):
    """psi(x, v) = 10^(v / 20) x, v in decibels: they add (Fischer et al. 2020, section 7.3)."""

    dim = 1
    unit = "dB"
    name = "volume"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return x * (column(theta, 0, x) * (math.log(10) / 20)).exp()


def column(theta: Tensor, k: int, x: Tensor) -> Tensor:
    """Parameter k of each image, (n, 1, ...) to go with images (n, ...)."""
    return theta[:, k].to(x.dtype).view(-1, *[1] * (x.ndim - 1))
