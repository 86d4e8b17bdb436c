"""Rotation, translation, scaling and shear by interpolation, rotation with scaling and translation, and cyclic
translation."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.transform.base import Additive, Mover, Resolvable, check_images
from gsmooth_lightning.transform.interpolate import (
    KERNEL,
    TOUCH,
    column_sums,
    departures,
    pixel_distance,
    pixels_from_centre,
    position_error,
)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
PADDINGS = {"black": "zeros", "reflection": "reflection"}
"""What lies outside the image, and grid_sample's name for it."""


class Warp(Resolvable, Mover):
    """The value at a pixel is interpolated where it lay before; black outside the image, which blends into the edge.

    Pixels are square: a non-square image is turned, not sheared. Nothing is smoothed first: shrunk images alias.

    Args:
        interpolation: "nearest", "bilinear" or "bicubic" (the convolution kernel with a = -.75; it overshoots).
    """

    exact = False
    padding = "black"

    def __init__(self, interpolation: str = "bilinear"):
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise RequestError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        self.interpolation = interpolation

    @abstractmethod
    def source(self, theta: Tensor) -> tuple[Tensor, ...]:
        """(xx, xy, yx, yy), or these and (x0, y0), (n,) each: what is x pixels to the right of the centre and y below
        it lay at (xx x + xy y + x0, yx x + yy y + y0)."""

    def slopes(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        """Derivatives of `source` along each parameter.

        Raises:
            UncertifiableError: none are known (see `bending`).
        """
        raise self._unknown()

    def _unknown(self) -> UncertifiableError:
        return UncertifiableError(
            f"no bound is known of how {self.name} moves pixels between two parameters; use error.search=grid"
        )

    def bending(self, low: Tensor, high: Tensor) -> Tensor:
        """Bound of |d^2 u / d theta^2| over boxes low, high, (k, dim): u the position a pixel's value comes from, as a
        multiple of the pixel's distance from the centre, (k,).

        Raises:
            UncertifiableError: none is known.
        """
        raise self._unknown()

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        n, _, h, w = x.shape  # x: (n, c, h, w), theta: (n, dim)
        xx, xy, yx, yy, *shift = self.source(theta)
        # grid_sample's coordinates run from -1 to 1 over each side, so the map is made in pixels and scaled back.
        matrix = torch.stack([xx, xy * (h / w), yx * (w / h), yy], 1).to(x.dtype).view(n * 2, 2)
        grid = _centred_grid(h, w, x.device, x.dtype)
        if shift:
            offset = torch.stack([shift[0] * (2 / w), shift[1] * (2 / h)], 1).to(x.dtype).view(n * 2, 1)
            grid = torch.addmm(offset, matrix, grid)
        else:
            grid = matrix @ grid
        grid = grid.view(n, 2, h, w).permute(0, 2, 3, 1)
        padding = PADDINGS[self.padding]
        return functional.grid_sample(x, grid, mode=self.interpolation, padding_mode=padding, align_corners=False)

    # -------------------------------------------------- where values come from

    def positions(self, theta: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Columns and rows, as real numbers from 0, where the values of the h w pixels come from: two (k, h w),
        float64, for parameters (k, dim)."""
        return self._mapped(self.source(theta.double()), h, w, 1.0)

    def speeds(self, theta: Tensor, h: int, w: int) -> list[tuple[Tensor, Tensor]]:
        """Derivatives of `positions` along each parameter."""
        return [self._mapped(slope, h, w, 0.0) for slope in self.slopes(theta.double())]

    def reach(self, low: Tensor, high: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Columns and rows of the positions in the middle of boxes low, high, (k, dim), and how far those of all
        parameters within lie from them at most, (k, h w) each.

        u(theta) is within sum_a |du / dtheta_a| t_a + |d^2 u| |t|^2 / 2 of the middle, t the half widths.
        """
        low, high = low.double(), high.double()
        middle, half = (low + high) / 2, (high - low) / 2
        more = self.bending(low, high)[:, None] * pixel_distance(h, w, low) * half.square().sum(1, keepdim=True) / 2
        speeds = self.speeds(middle, h, w)
        dx, dy = (sum((s[k].abs() * half[:, a : a + 1] for a, s in enumerate(speeds)), more) for k in (0, 1))
        return *self.positions(middle, h, w), dx, dy

    def boxes(self, low: Tensor, high: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes that contain the positions, as grid_sample computes them, of all parameters between low and high,
        (k, dim): least and largest column, least and largest row, (k, h w) each."""
        columns, rows, dx, dy = self.reach(low, high, h, w)
        error = position_error(self, low, high, h, w)
        return columns - dx - error, columns + dx + error, rows - dy - error, rows + dy + error

    def check_movement(self) -> None:
        try:
            self.bending(*torch.zeros(2, 1, self.dim))
        except UncertifiableError as failure:
            raise UncertifiableError(
                f"no bound is known of how {self.name} moves pixels between two parameters; list them by threat.step, "
                "or use certify=joint"
            ) from failure
        if self.interpolation == "nearest":
            raise UncertifiableError(
                "under nearest interpolation pixels jump however narrow a slice is; use interpolation=bilinear"
            )

    def departure(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """As `Mover.departure`; see `interpolate.departures`."""
        return departures(self, x, low, high)

    def stretch(self, theta: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(bound of the l2 operator norm of x -> seen psi(x, theta), sum of |weights| into each pixel of x): (k,) and
        (k, h, w), for parameters (k, dim). See `interpolate.column_sums`."""
        sums = column_sums(self, theta, seen)
        return (sums.flatten(1).amax(1) * self.gain).sqrt() * (1 + 1e-4), sums

    @property
    def gain(self) -> float:
        return KERNEL**2 if self.interpolation == "bicubic" else 1.0

    @staticmethod
    def _mapped(source: tuple[Tensor, ...], h: int, w: int, offset: float) -> tuple[Tensor, Tensor]:
        xx, xy, yx, yy, *shift = (entry[:, None] for entry in source)
        x, y = pixels_from_centre(h, w, xx)
        columns, rows = xx * x + xy * y + offset * (w - 1) / 2, yx * x + yy * y + offset * (h - 1) / 2
        return (columns + shift[0], rows + shift[1]) if shift else (columns, rows)

    def extra_repr(self) -> str:
        return self.interpolation


class Rotation(Warp, Additive):
    """Rotation by theta degrees, counterclockwise, about the centre; black outside the image.

    Angles add, up to the interpolation error (Fischer et al. 2020, section 5).

    Args:
        interpolation: as in `Warp`.
    """

    units = ("degrees",)
    name = "rotation"

    def source(self, theta: Tensor) -> tuple[Tensor, ...]:
        angle = theta[:, 0] * (math.pi / 180)
        cos, sin = torch.cos(angle), torch.sin(angle)
        return cos, -sin, sin, cos

    def slopes(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        angle = theta[:, 0] * (math.pi / 180)
        cos, sin = torch.cos(angle) * (math.pi / 180), torch.sin(angle) * (math.pi / 180)
        return [(-sin, -cos, cos, -sin)]

    def bending(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.full_like(low[:, 0], (math.pi / 180) ** 2)


class Translation(Warp, Additive):
    """Moves the image down (first parameter) and right (second) by real numbers of pixels.

    Shifts add, up to the interpolation error and what leaves the image. Whole numbers need no interpolation.

    Args:
        interpolation: as in `Warp`.
        padding: "black": zeros outside the image. "reflection": the image mirrored at its edges, again and again, each
            edge pixel twice: row -1 is row 0, row -2 is row 1, row h is row h - 1 (half-sample symmetric: numpy's
            "symmetric", scipy's "reflect"); nothing is black, but the content of the image returns mirrored.

    Raises:
        RequestError: another padding.
    """

    units = ("pixels", "pixels")

    def __init__(self, interpolation: str = "bilinear", padding: str = "black"):
        super().__init__(interpolation)
        if padding not in PADDINGS:
            raise RequestError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        self.padding = padding
        self.name = "translation" if padding == "black" else "translation with mirrored borders"

    def source(self, theta: Tensor) -> tuple[Tensor, ...]:
        down, right = theta.unbind(1)
        one, zero = torch.ones_like(down), torch.zeros_like(down)
        return one, zero, zero, one, -right, -down

    def slopes(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        zero = torch.zeros_like(theta[:, 0])
        return [(zero, zero, zero, zero, zero, zero - 1), (zero, zero, zero, zero, zero - 1, zero)]

    def bending(self, low: Tensor, high: Tensor) -> Tensor:
        if self.padding != "black":
            raise self._unknown()
        return torch.zeros_like(low[:, 0])

    def departure(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Between whole numbers a bilinear translation is bilinear in its parameters: rounding alone is left."""
        if self.interpolation != "bilinear":
            return super().departure(x, low, high)
        steepest = 2 * float(x.amax().clamp_min(0) - x.amin().clamp_max(0))
        rounding = 2 * (position_error(self, low, high, x.shape[-2], x.shape[-1]) * steepest + 2.0**-22)
        departure = rounding[:, :, None, None] * torch.ones_like(x, dtype=torch.float64)
        crosses = ((high - TOUCH).ceil() - (low + TOUCH).floor() > 1).any(1)
        departure[crosses] = super().departure(x, low[crosses], high[crosses])
        return departure

    def extra_repr(self) -> str:
        return f"{self.interpolation}, {self.padding}"


class Scaling(Warp, Additive):
    """Scaling by a factor e^theta about the centre, enlarged for theta > 0; black outside the image.

    Logarithms of factors add, up to the interpolation error and what leaves the image.

    Args:
        interpolation: as in `Warp`.
    """

    units = ("log factor",)
    name = "scaling"

    def source(self, theta: Tensor) -> tuple[Tensor, ...]:
        inverse = torch.exp(-theta[:, 0])
        zero = torch.zeros_like(inverse)
        return inverse, zero, zero, inverse

    def slopes(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        inverse = torch.exp(-theta[:, 0])
        zero = torch.zeros_like(inverse)
        return [(-inverse, zero, zero, -inverse)]

    def bending(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.exp(-low[:, 0])


class Shear(Warp, Additive):
    """Horizontal shear: what is y pixels below the centre moves right by theta y pixels, what is above it to the left;
    black outside the image.

    Shears add, up to the interpolation error and what leaves the image.

    Args:
        interpolation: as in `Warp`.
    """

    units = ("pixels per row",)
    name = "shear"

    def source(self, theta: Tensor) -> tuple[Tensor, ...]:
        shear = theta[:, 0]
        one, zero = torch.ones_like(shear), torch.zeros_like(shear)
        return one, -shear, zero, one

    def slopes(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        zero = torch.zeros_like(theta[:, 0])
        return [(zero, zero - 1, zero, zero)]

    def bending(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.zeros_like(low[:, 0])


class Similarity(Warp):
    """Translation by t = (down, right) pixels, then rotation by r degrees counterclockwise and scaling by e^s about the
    centre, in one interpolation: what is at v from the centre moves to A (v + t), A = e^s Rot(r); black outside the
    image. The parameters are (r, s, down, right).

    Resolves to (r1 + r2, s1 + s2, t1 + A1^-1 t2), from A2 (A1 (v + t1) + t2), up to the interpolation error and what
    leaves the image: not additive (the same structure as brightness and contrast; TSS, Definition 2).

    Args:
        interpolation: as in `Warp`.
    """

    units = ("degrees", "log factor", "pixels down", "pixels right")
    name = "rotation, scaling and translation"

    def source(self, theta: Tensor) -> tuple[Tensor, ...]:
        cos, sin = _inverse(theta)
        return cos, -sin, sin, cos, -theta[:, 3], -theta[:, 2]

    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        cos, sin = _inverse(alpha)
        down, right = beta[:, 2], beta[:, 3]
        back = torch.stack([cos * down + sin * right, cos * right - sin * down], 1)  # A^-1 (down, right)
        return torch.cat([alpha[:, :2] + beta[:, :2], alpha[:, 2:] + back], 1)


def _inverse(theta: Tensor) -> tuple[Tensor, Tensor]:
    """e^-s cos(r) and e^-s sin(r), (n,) each: the entries of A^-1."""
    angle, shrink = theta[:, 0] * (math.pi / 180), torch.exp(-theta[:, 1])
    return shrink * torch.cos(angle), shrink * torch.sin(angle)


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
