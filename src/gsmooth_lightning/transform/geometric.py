"""Rotation about the image's centre, and cyclic translation."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform.base import Additive, check_images

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class Rotation(Additive):
    """Rotation by theta degrees, counterclockwise, about the centre; black outside the image.

    The value at a pixel is interpolated at its position turned back. Angles add, up to the interpolation error
    (Fischer et al. 2020, section 5). Pixels are square: a non-square image is turned, not sheared.

    Args:
        interpolation: "nearest", "bilinear" or "bicubic" (the convolution kernel with a = -.75; it overshoots).
    """

    units = ("degrees",)
    name = "rotation"
    exact = False

    def __init__(self, interpolation: str = "bilinear"):
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise RequestError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        self.interpolation = interpolation

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        n, _, h, w = x.shape  # x: (n, c, h, w), theta: (n, 1)
        angle = theta[:, 0] * (math.pi / 180)
        cos, sin = torch.cos(angle), torch.sin(angle)
        # grid_sample's coordinates run from -1 to 1 over each side, so the turn is done in pixels and scaled back.
        turn = torch.stack([cos, -sin * (h / w), sin * (w / h), cos], 1).to(x.dtype)
        grid = (turn.view(n * 2, 2) @ _centred_grid(h, w, x.device, x.dtype)).view(n, 2, h, w).permute(0, 2, 3, 1)
        return functional.grid_sample(x, grid, mode=self.interpolation, align_corners=False)

    def extra_repr(self) -> str:
        return self.interpolation


class CyclicTranslation(Additive):
    """Moves pixels down (first parameter) and right (second) by whole numbers (rounded); those that leave come back on
    the other side.

    A finite group: shifts add modulo the image's size, exactly.
    """

    units = ("pixels", "pixels")
    name = "cyclic translation"
    exact = True
    permutes = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        n, channels, h, w = x.shape
        shift = (theta + 0.5).floor().long()  # (n, 2): down, right; halves go up, so that whole numbers add
        rows = (torch.arange(h, device=x.device) - shift[:, :1]) % h
        columns = (torch.arange(w, device=x.device) - shift[:, 1:]) % w
        batch = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(channels, device=x.device)[None, :, None, None]
        return x[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def moves(self, low: Sequence[float], high: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
        """Whole numbers: 0.6 moves by a pixel."""
        return [math.floor(a + 0.5) for a in low], [math.floor(b + 0.5) for b in high]

    def values(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Between the image's own least and largest value."""
        return x.double().amin().expand(x.shape), x.double().amax().expand(x.shape)

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        return float(error.norm())

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        """None: the steps in which parameters are drawn divide 1, and the rounding of ties is decided there."""
        return 0.0


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _centred_grid(h: int, w: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pixel centres in grid_sample's coordinates, (2, h * w): first x, then y."""
    xs = (torch.arange(w, device=device, dtype=dtype) + 0.5) * (2 / w) - 1
    ys = (torch.arange(h, device=device, dtype=dtype) + 0.5) * (2 / h) - 1
    return torch.stack([xs.repeat(h), ys.repeat_interleave(w)])
