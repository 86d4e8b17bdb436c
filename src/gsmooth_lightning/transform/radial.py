"""Blurs by motion during exposure: averages of an image that is rotated, enlarged or moved."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gsmooth_lightning.errors import check_whole, positive
from gsmooth_lightning.transform.base import Mover, check_images
from gsmooth_lightning.transform.geometric import Rotation, Translation, Warp


class Average(Mover):
    """psi(x, theta) = sum_k weights_k mover(x, times_k theta): what a sensor adds up while the image moves.

    The average departs from linear by at most the average of its parts' departures (theory.md section 8).

    Args:
        mover: what moves the image.
        times: when the frames are taken, as multiples of theta.
        weights: of the frames, which add up to 1; equal ones by default.
    """

    def __init__(self, mover: Warp, times: Sequence[float], weights: Sequence[float] | None = None):
        super().__init__()
        self._mover = mover
        self.times = list(times)
        self.weights = list(weights) if weights is not None else [1 / len(self.times)] * len(self.times)

    @property
    def gain(self) -> float:
        return self._mover.gain

    def check_movement(self) -> None:
        self._mover.check_movement()

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        blurred = torch.zeros_like(x)
        for t, weight in zip(self.times, self.weights, strict=True):
            blurred = blurred + weight * self._mover(x, t * theta)
        return blurred

    def departure(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        largest = 2 * self.gain * float(x.abs().amax())
        total = torch.full((len(low), *x.shape), (len(self.times) + 2) * 2.0**-23 * largest, device=x.device).double()
        for t, weight in zip(self.times, self.weights, strict=True):
            ends = (low, high) if t >= 0 else (high, low)
            total += weight * self._mover.departure(x, *(t * end for end in ends))
        return total


class RotationalBlur(Average):
    """Mean of the image turned by angles spaced evenly from -theta to theta degrees about its centre.

    The range of GSmooth's Table 1 is 10 degrees; the paper does not say whether that is the arc or half of it. This is
    the harder of the two.

    Args:
        frames: number of angles.

    Raises:
        RequestError: fewer than two frames.
    """

    units = ("degrees",)
    name = "rotational blur"
    lowest = 0.0

    def __init__(self, frames: int = 11):
        check_whole("transform", frames=(frames, 2))
        super().__init__(Rotation(), _evenly(-1.0, 1.0, frames))


class Enlargement(Warp):
    """Enlargement by a factor 1 + theta about the centre, which makes a `ZoomBlur`."""

    units = ("factor",)
    name = "enlargement"

    def source(self, theta: Tensor) -> tuple[Tensor, ...]:
        inverse = 1 / (1 + theta[:, 0])
        zero = torch.zeros_like(inverse)
        return inverse, zero, zero, inverse

    def slopes(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        slope = -((1 + theta[:, 0]) ** -2)
        zero = torch.zeros_like(slope)
        return [(slope, zero, zero, slope)]

    def bending(self, low: Tensor, high: Tensor) -> Tensor:
        return 2 * (1 + low[:, 0]) ** -3

    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        return alpha + beta + alpha * beta


class ZoomBlur(Average):
    """Mean of the image enlarged by factors spaced evenly from 1 to 1 + theta about its centre.

    The zoom blur of the common corruptions (Hendrycks and Dietterich 2019), with theta as in GSmooth's Table 1: .5.

    Args:
        frames: number of factors.

    Raises:
        RequestError: fewer than two frames.
    """

    units = ("factor",)
    name = "zoom blur"
    lowest = 0.0

    def __init__(self, frames: int = 11):
        check_whole("transform", frames=(frames, 2))
        super().__init__(Enlargement(), _evenly(0.0, 1.0, frames))


class MotionBlur(Average):
    """Mean of the image moved by t theta pixels (down, right), t >= 0 with weights exp(-t^2 / 2): it is smeared
    one way, as by ImageMagick and the common corruptions; |theta| is their sigma.

    Args:
        frames: number of times, spaced evenly from 0 to `last`.
        last: of the times; the common corruptions cut at (2 radius) / sigma.

    Raises:
        RequestError: fewer than two frames, or a last time that is not positive.
    """

    units = ("pixels down", "pixels right")
    name = "motion blur"

    def __init__(self, frames: int = 13, last: float = 3.0):
        check_whole("transform", frames=(frames, 2))
        times = _evenly(0.0, positive("transform.last", last), frames)
        weights = [math.exp(-t * t / 2) for t in times]
        super().__init__(Translation(), times, [weight / sum(weights) for weight in weights])


def _evenly(first: float, last: float, number: int) -> list[float]:
    return [first + (last - first) * k / (number - 1) for k in range(number)]
