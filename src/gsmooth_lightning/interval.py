"""Intervals of images, rounded outward: what an interpolated image can be while its parameters lie in a box."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from gsmooth_lightning.errors import UncertifiableError

Boxes = tuple[Tensor, Tensor, Tensor, Tensor]
"""Least and largest column, least and largest row, (k, h w) each, float64: where the values of h w pixels come from."""


def check_interpolation(interpolation: str, padding: str) -> None:
    """Refuses what `warp_range` does not bound.

    Raises:
        UncertifiableError: bicubic interpolation, whose kernel has negative weights, or mirrored borders.
    """
    if interpolation not in ("nearest", "bilinear"):
        raise UncertifiableError(
            f"intervals pass only through kernels without negative weights, and {interpolation} interpolation has "
            "some; use error.search=chords, or interpolation=bilinear"
        )
    if padding != "black":
        raise UncertifiableError(
            f"intervals are bounded with black outside the image, not {padding}; use padding=black"
        )


def warp_range(low: Tensor, high: Tensor, boxes: Boxes, interpolation: str) -> tuple[Tensor, Tensor]:
    """Least and largest value, (k, c, h, w) each, of images between low and high interpolated anywhere in each pixel's
    box; black outside.

    The weights are not negative, so the least value is one of `low`. Inside a cell, a square between four pixel
    centres, the interpolant is linear in each coordinate: over a part of it that is a rectangle it is least and largest
    at corners. A box that touches two cells at most along each axis is cut at the pixel between them, and the 3 x 3
    corners are tried. For wider boxes it is the least and largest pixel of a window that holds all they touch. The
    nearest pixel is the interpolant at whole numbers: the box is rounded first, both ways at ties.

    Args:
        low, high: (k, c, h, w) or (1, c, h, w), float64, black where 0; the same tensor twice for one image.
        boxes: see `Boxes`; rounding errors of positions lie inside them.
        interpolation: "nearest" or "bilinear".

    Raises:
        UncertifiableError: another interpolation.
    """
    check_interpolation(interpolation, "black")
    shape, (h, w) = (-1, *low.shape[1:]), low.shape[-2:]
    columns, rows = _ends(*boxes[:2], w, interpolation), _ends(*boxes[2:], h, interpolation)
    span = torch.maximum(columns[2] - columns[0], rows[2] - rows[0])
    reach, wide = int(span.max()) + 2, span > 1
    images = (low,) if low is high else (low, high)
    corners = [_corners(image, columns, rows) for image in images]
    least, most = corners[0].amin(0), corners[-1].amax(0)
    if reach > 3:
        first = rows[0], columns[0]
        least = torch.where(wide, -_pixels(_pooled(-low, reach), *first), least)
        most = torch.where(wide, _pixels(_pooled(high, reach), *first), most)
    return least.view(shape), most.view(shape)


def outward_norm(low: Tensor, high: Tensor) -> Tensor:
    """Largest l2 norm of an image between low and high, (k, *shape) -> (k,), rounded up: || max(|low|, |high|) ||."""
    return torch.maximum(low.abs(), high.abs()).flatten(1).norm(dim=1) * (1 + 1e-12)


Ends = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of one coordinate, (k, 1, h w) each: the whole number below the box's least value, how far that is above it, and the
same two of the largest value."""


def _ends(least: Tensor, most: Tensor, size: int, interpolation: str) -> Ends:
    ends = torch.stack([least, most]).clamp(-1, size)[:, :, None]  # all is black from there on
    if interpolation == "nearest":
        ends = torch.stack([(ends[0] - 0.5).ceil(), (ends[1] + 0.5).floor()])
    below = ends.floor()
    return below[0].long(), ends[0] - below[0], below[1].long(), ends[1] - below[1]


def _corners(image: Tensor, columns: Ends, rows: Ends) -> Tensor:
    """Values at the 3 x 3 corners of boxes that touch two cells at most along each axis, (9, k, c, h w)."""
    padded = pad(image, (1, 3, 1, 3))
    across = [_cut([_pixels(padded, rows[0] + i, columns[0] + j) for j in range(3)], columns) for i in range(3)]
    return torch.stack([value for line in zip(*across, strict=True) for value in _cut(line, rows)])


def _cut(pixels: Sequence[Tensor], ends: Ends) -> tuple[Tensor, Tensor, Tensor]:
    """Values at both ends of the box and at the pixel between them, or at one end twice, from three pixels in line."""
    first, begin, last, end = ends
    a, b, c = pixels
    crosses = last > first
    left = a.lerp(b, begin)
    return left, torch.where(crosses, b, left), torch.where(crosses, b, a).lerp(torch.where(crosses, c, b), end)


def _pixels(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pixels (k, c, h w) of an image with one more row above and column to the left, (k or 1, c, H, W)."""
    k, channels, width = len(row), image.shape[1], image.shape[-1]
    places = ((row + 1) * width + column + 1).expand(-1, channels, -1)
    return image.flatten(2).expand(k, -1, -1).gather(2, places)


def _pooled(image: Tensor, reach: int) -> Tensor:
    """The largest pixel among `reach` rows down and columns to the right, padded as `_corners` pads, or further."""
    padded = pad(image, (1, 3 + reach, 1, 3 + reach))
    return max_pool2d(max_pool2d(padded, (reach, 1), 1), (1, reach), 1)
