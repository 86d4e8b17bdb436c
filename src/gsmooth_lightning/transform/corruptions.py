"""The common corruptions (Hendrycks and Dietterich 2019) as our transformations at the severities of their files.

Each function says where it differs from theirs. Their files cut values to whole steps of 8 bits, ours are rounded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, pad

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.stream import Source
from gsmooth_lightning.transform.base import Transform, check_images, compute
from gsmooth_lightning.transform.blur import Defocus, GaussianBlur
from gsmooth_lightning.transform.function import Function
from gsmooth_lightning.transform.intensity import Brightness
from gsmooth_lightning.transform.pixelate import SEVERITIES, GlassBlur, Pixelate
from gsmooth_lightning.transform.radial import MotionBlur, ZoomBlur


@dataclass(frozen=True)
class Corruption:
    """psi(x, theta), one corruption at one severity, before it is clipped and saved.

    Attributes:
        transform, theta: psi and its parameters.
        turn: degrees; theta = (down, right) is turned by an angle uniform within +-turn, another one for each image.
        border: pixels by which the edge is repeated outside the image, cut off again after psi.
    """

    transform: Transform
    theta: tuple[float, ...]
    turn: float = 0.0
    border: int = 0

    def __call__(self, x: Tensor, source: Source) -> Tensor:
        """A clean image, (c, h, w), corrupted; source: of the angle."""
        check_images(x[None], "a corruption")
        theta = torch.tensor([self.theta], dtype=torch.float64, device=x.device)
        if self.turn:
            angle = (2 * source.uniform(1) - 1) * math.radians(self.turn)
            cos, sin = torch.cos(angle), torch.sin(angle)
            theta = theta @ torch.stack([torch.cat([cos, -sin]), torch.cat([sin, cos])])
        framed = pad(x[None], [self.border], padding_mode="edge") if self.border else x[None]
        return center_crop(compute(self.transform, framed, theta).float(), list(x.shape[-2:]))[0]


def zoom_blur(stop: float, step: float) -> Corruption:
    """Mean of the image and of the image enlarged by np.arange(1, stop, step), which begins with the image again.

    Theirs crops to whole pixels, ceil(h / factor) of them, before it enlarges: its mean lies about half a pixel lower
    and more to the right at 32 pixels, a quarter at 224.
    """
    factors = np.arange(1, stop, step)
    blur = ZoomBlur(len(factors))
    blur.weights = [(2 if k == 0 else 1) / (len(factors) + 1) for k in range(len(factors))]
    return Corruption(blur, (float(factors[-1] - 1),))


def defocus_blur(radius: float, alias: float) -> Corruption:
    """Mean over the pixels at most `radius` away, then a Gaussian blur of 3 x 3 taps and sigma `alias`.

    Theirs takes 5 x 5 taps beyond radius 8, and from 8 on cuts what the disc is blurred beyond its own square.
    """
    return Corruption(Defocus(edge=0.02, alias=alias), (radius + 0.01,))


def glass_blur(sigma: float, distance: int, rounds: int) -> Corruption:
    """Gaussian blur, pixels swapped with neighbours, Gaussian blur.

    Theirs draws other swaps for each image, rounds to 8 bits before them, and copies one way instead of swapping:
    x[a], x[b] = x[b], x[a] with rows of a NumPy array gives both the value of x[b].
    """
    return Corruption(GlassBlur([(sigma, distance, rounds)]), (1.0,))


def motion_blur(radius: int, sigma: float) -> Corruption:
    """ImageMagick's: a mean of 2 radius + 1 copies, k pixels apart from the image with weight exp(-k^2 / 2 sigma^2), at
    an angle uniform in +-45 degrees; the edge is repeated outside.

    Theirs moves copies by whole pixels, the nearest ones; ours interpolates.
    """
    blur = MotionBlur(frames=2 * radius + 1, last=2 * radius / sigma)
    return Corruption(blur, (0.0, -sigma), turn=45.0, border=2 * radius)


def gaussian_blur(sigma: float) -> Corruption:
    """Blur by the semigroup, of the variance that their kernel has: a Gaussian sampled at whole pixels and cut at four
    sigma. That is .081 instead of .16 at sigma = .4, .352 instead of .36 at .6, and sigma^2 within 1 % from .7 on.

    The kernels differ (a tap along one axis by .084 at sigma = .8, by .008 at 2), and theirs repeats the edge, ours
    mirrors it.
    """
    taps = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    return Corruption(GaussianBlur(), (float(np.average(taps**2, weights=weights)),))


def brightness(amount: float) -> Corruption:
    """x + amount. Theirs adds to V of HSV, the largest channel, and scales the others with it: the same on grey."""
    return Corruption(Brightness(), (amount,))


def contrast(left: float) -> Corruption:
    """(x - mean) left + mean, the mean of each channel, as theirs."""
    return Corruption(Function(_towards_mean, ["share of contrast lost"], "contrast about the mean"), (1 - left,))


def _towards_mean(image: Tensor, lost: Tensor) -> Tensor:
    return torch.lerp(image, image.mean((-2, -1), keepdim=True).expand_as(image), lost)


def pixelate(left: float) -> Corruption:
    """floor(side left) pixels are left of a side. Theirs rounds to 8 bits in between."""
    return Corruption(Pixelate(), (1 - left,))


CORRUPTIONS: dict[str, Callable[..., Corruption]] = {
    make.__name__: make
    for make in (zoom_blur, defocus_blur, pixelate, motion_blur, glass_blur, gaussian_blur, brightness, contrast)
}
"""Name -> what makes the corruption from its settings."""

SETTINGS: dict[int, dict[str, Sequence[Any]]] = {
    32: {
        "zoom_blur": [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
        "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        "glass_blur": SEVERITIES,
        "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
        "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
        "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
    },
    224: {
        "zoom_blur": [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
        "defocus_blur": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
        "pixelate": [0.6, 0.5, 0.4, 0.3, 0.25],
        "motion_blur": [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        "glass_blur": [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        "gaussian_blur": [1, 2, 3, 4, 6],
        "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
        "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
    },
}
"""Pixels of a side -> name -> settings at severity 1 to 5: of CIFAR-10-C and of ImageNet-C."""


def corruption(name: str, severity: int, side: int) -> Corruption:
    """A corruption of images with this shorter side, by the settings for the nearer of the two sizes, as a ratio.

    Raises:
        RequestError: no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise RequestError(f"{name} is not made here; choose corruptions from {', '.join(CORRUPTIONS)}")
    levels = SETTINGS[min(SETTINGS, key=lambda size: abs(math.log(side / size)))][name]
    if severity not in range(1, len(levels) + 1):
        raise RequestError(f"severities must be whole numbers from 1 to {len(levels)}, got {severity}")
    chosen = levels[severity - 1]
    return CORRUPTIONS[name](*(chosen if isinstance(chosen, tuple) else [chosen]))
