"""Pixelation and glass blur: transformations with finitely many outcomes."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.transform.base import Stepwise, check_images


class Pixelate(Stepwise):
    """The image reduced to floor((1 - theta) side) pixels each way and blown up again, by PIL's box filter: pixelate of
    the common corruptions (Hendrycks and Dietterich 2019), without rounding to 8 bits in between.

    GSmooth's Table 1 has theta up to .5: a quarter of the pixels is left.

    Raises:
        RequestError: theta outside [0, 1), or so large that no pixel is left.
    """

    units = ("share of the side",)
    name = "pixelation"
    lowest = 0.0

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        rows, columns = (
            torch.stack([_reduced(size, m, x.device, x.dtype) for m in _left(theta[:, 0], size).tolist()])[:, None]
            for size in x.shape[-2:]
        )
        return rows @ x @ columns.transpose(-1, -2)

    def outcomes(self, low: float, high: float, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Those between the parameters at which a side loses a pixel, and all that floats make next to these."""
        sides = sorted(set(shape[-2:]))
        losses = torch.tensor(sorted({m / size for size in sides for m in range(1, size + 1)}), dtype=torch.float64)
        left = torch.cat([losses * (1 + k * 2.0**-24) for k in range(-8, 9)] + [(losses[1:] + losses[:-1]) / 2])
        ends = torch.tensor([low, high], dtype=torch.float64).float()  # as parameters are rounded
        at = torch.cat([ends, (1 - left).float().clamp(*ends)]).sort().values
        found = torch.stack([_left(at, size) for size in sides], 1)
        first = torch.cat([torch.ones(1, dtype=torch.bool), (found[1:] != found[:-1]).any(1)])
        at = at[first, None].double()
        return (at - 1e-6).clamp(low, high), at.clamp(low, high)


def _left(theta: Tensor, size: int) -> Tensor:
    """Pixels that are left of a side, (n,)."""
    left = ((1 - theta.float()) * size).floor().long()
    if bool(((left < 1) | (left > size)).any()):
        raise RequestError(f"pixelation by theta leaves floor((1 - theta) {size}) pixels, which must be 1 to {size}")
    return left


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _reduced(size: int, m: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A side reduced to m pixels and blown up again, as a matrix, (size, size)."""
    return (_box(m, size) @ _box(size, m)).to(device, dtype)


def _box(before: int, after: int) -> Tensor:
    """PIL's box filter from so many pixels to so many, (after, before): the mean of the pixels whose centres lie within
    a new one, half open; ties as PIL's rounding of doubles breaks them."""
    scale = before / after
    width, x = max(scale, 1.0), torch.arange(before, dtype=torch.float64)
    centre = (torch.arange(after, dtype=torch.float64)[:, None] + 0.5) * scale
    first, last = (centre - width / 2 + 0.5).long(), (centre + width / 2 + 0.5).long()
    offset = (x - centre + 0.5) * (1 / width)
    within = ((x >= first) & (x < last) & (offset > -0.5) & (offset <= 0.5)).double()
    return within / within.sum(1, keepdim=True)


SEVERITIES = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
"""(sigma, distance, rounds) of the glass blur of the common corruptions for images of 32 pixels."""


class GlassBlur(Stepwise):
    """The image seen through frosted glass: blurred, neighbouring pixels swapped at random, blurred again. The glass
    blur of the common corruptions (Hendrycks and Dietterich 2019) at severity theta, which is rounded; 0 is none. The
    swaps are fixed by the seed: another pane of glass is another transformation.

    Args:
        severities: (sigma of the blur in pixels, largest distance of a swap, rounds of swaps) for severity 1, 2, ...
        seed: of the swaps.

    Raises:
        RequestError: severities that are none.
    """

    units = ("severity",)
    name = "glass blur"
    lowest = 0.0

    def __init__(self, severities: Sequence[Sequence[float]] = SEVERITIES, seed: int = 0):
        super().__init__()
        check_whole("transform", seed=(seed, 0))
        self.severities = [tuple(row) for row in severities]
        for row in self.severities or [()]:
            positive = len(row) == 3 and all(isinstance(v, int | float) and 0 < v < math.inf for v in row)
            if not positive or not all(v == int(v) for v in row[1:]):
                raise RequestError(
                    "transform.severities must list [sigma, distance, rounds], positive numbers, the last two whole"
                )
        self.seed = seed

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        h, w = x.shape[-2:]
        level = _level(theta[:, 0])
        if bool(((level < 0) | (level > len(self.severities))).any()):
            raise RequestError(f"the severity of glass blur must lie between 0 and {len(self.severities)}")
        images = x.clone()
        for k in level.unique().tolist():
            if k == 0:
                continue
            sigma, distance, rounds = self.severities[k - 1]
            rows, columns = (_gaussian(size, sigma, x.device, x.dtype) for size in (h, w))
            swapped = _swaps(h, w, int(distance), int(rounds), self.seed).to(x.device)
            chosen = rows @ x[level == k] @ columns.T
            images[level == k] = rows @ chosen.flatten(2)[..., swapped].view_as(chosen) @ columns.T
        return images

    def outcomes(self, low: float, high: float, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The severities that parameters are rounded to."""
        first, last = _level(torch.tensor([low, high], dtype=torch.float64)).tolist()
        levels = torch.arange(first, last + 1).double()[:, None]
        return ((levels - 0.5) * (1 - 1e-6)).clamp(low, high), levels.clamp(low, high)


def _level(theta: Tensor) -> Tensor:
    """Severities of parameters, (n,), which float32 rounds before they are rounded here."""
    return (theta.float() + 0.5).floor().long()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _gaussian(size: int, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The blur of a side as a matrix, (size, size): cut at four sigma, the edge pixel repeated outside."""
    matrix = gaussian_filter1d(np.eye(size), sigma, axis=0, mode="nearest")
    return torch.from_numpy(matrix).to(device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _swaps(h: int, w: int, distance: int, rounds: int, seed: int) -> Tensor:
    """Where each pixel's value comes from, (h * w,), after each pixel in turn, from the last to the first, has been
    swapped with one at most `distance` before it or `distance` - 1 behind it, each way."""
    generator, source = np.random.default_rng(seed), np.arange(h * w).reshape(h, w)
    for _ in range(rounds):
        for i in range(h - distance, distance, -1):
            for j in range(w - distance, distance, -1):
                down, right = generator.integers(-distance, distance, size=2)
                other = (i + down, j + right)
                source[i, j], source[other] = source[other], source[i, j]
    return torch.from_numpy(source.ravel())
