"""How far an interpolated image is from linear in the parameters that move it.

psi(x, theta) takes each pixel's value from the interpolant of x at a position u(theta). Along one parameter, over a box
of half width t, a function whose slope stays within r of a number is within t r of its chord, and one with a second
derivative up to b within t^2 b / 2. Both hold for every smaller interval, and errors of several parameters add:
I - L1 L2 = (I - L1) + L1 (I - L2), where linear interpolation L1 enlarges nothing.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, pad

if TYPE_CHECKING:
    from gsmooth_lightning.transform.geometric import Warp

PRECISION = 2.0**-22
"""Rounding of the positions that grid_sample computes in float32, over the image's longer side: four units in the last
place of a coordinate, and as much again for every 90 (degrees) of a parameter, which is rounded to float32 too."""

VALUE = {"nearest": 0.0, "bilinear": 2.0**-22, "bicubic": 2.0**-18}
"""Rounding of a value that grid_sample computes in float32 at a known position: cubic weights are differences of
numbers up to 12, eight units of 2^-22 were found."""

FRAME = 4
"""Black pixels around the image: more than a kernel reaches."""

KERNEL = 1.375
"""Largest sum of the absolute weights of bicubic interpolation along one axis, at the middle of a cell."""

SLOPES = 3.0
"""Largest sum of the absolute slopes of the weights of bicubic interpolation along one axis."""

TOUCH = 1e-9
"""Parts of a pixel by which a box may reach into a cell without meeting it: less than what rounding is allowed."""

AT_ONCE = 2**20
"""Values that are held at once."""


def pixels_from_centre(h: int, w: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels to the right of the centre and below it, of all h w pixels row by row."""
    across, down = (torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2 for size in (w, h))
    return across.repeat(h), down.repeat_interleave(w)


def pixel_distance(h: int, w: int, like: Tensor) -> Tensor:
    """Distance of all h w pixels from the centre."""
    return torch.hypot(*pixels_from_centre(h, w, like))


def position_error(warp: Warp, low: Tensor, high: Tensor, h: int, w: int) -> Tensor:
    """Bound of the rounding errors of positions, in pixels, (k, 1), for parameters in boxes low, high, (k, dim). The
    map enlarges those of grid_sample's coordinates: its entries are at most 1, or largest at the ends of a box."""
    largest = torch.maximum(low.abs(), high.abs()).amax(1, keepdim=True)
    entries = torch.stack([entry for end in (low, high) for entry in warp.source(end.double())[:4]], 1)
    enlarged = entries.abs().amax(1, keepdim=True).clamp_min(1)
    return max(h, w) * PRECISION * enlarged * (1 + largest / 90)


# ---------------------------------------------------------------- distance from linear


def departures(warp: Warp, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`Warp.departure`: distance from linear of each pixel, and twice what rounding the positions to float32 changes:
    at theta, and at the corners."""
    bound = {"bilinear": bilinear_bend, "bicubic": bicubic_bend, "nearest": nearest_range}[warp.interpolation]
    found = bound(warp, pad(x.double(), [FRAME] * 4), low.double(), high.double(), (x.shape[-2], x.shape[-1]))
    return found.transpose(0, 1).reshape(len(low), *x.shape)


def bends(warp: Warp, x: Tensor, low: Tensor, high: Tensor, seen: Tensor) -> Tensor:
    """The bend of psi(x, .): bound of ||psi(x, theta) - I(theta)||_2 over the pixels that are seen, (h, w), and over
    theta in boxes low, high, (k, dim), I as in `Warp.departure`: (k,)."""
    boxes = zip(*(ends.split(max(1, AT_ONCE // x.numel())) for ends in (low, high)), strict=True)
    norms = [(warp.departure(x, a, b) * seen).flatten(1).norm(dim=1) for a, b in boxes]
    return torch.cat(norms) * (1 + 1e-9)


def shifts(warp: Warp, x: Tensor, low: Tensor, high: Tensor, seen: Tensor) -> Tensor:
    """Bound of ||psi(x, theta) - psi(x, theta')||_2 over the pixels that are seen, (h, w), and over theta, theta' in
    boxes low, high, (k, dim), as float32 computes them: (k,)."""
    bound = nearest_range if warp.interpolation == "nearest" else smooth_range
    shape = (x.shape[-2], x.shape[-1])
    framed = pad(x.double(), [FRAME] * 4)
    counted = seen.flatten().to(x.device)
    parts = zip(*(ends.double().split(max(1, AT_ONCE // x.numel())) for ends in (low, high)), strict=True)
    norms = [bound(warp, framed, a, b, shape)[..., counted].square().sum((0, 2)).sqrt() for a, b in parts]
    return torch.cat(norms) * (1 + 1e-9)


def bilinear_bend(warp: Warp, framed: Tensor, low: Tensor, high: Tensor, shape: tuple[int, int]) -> Tensor:
    """Distance from linear of each pixel, (c, k, h w). Along a parameter the slope is g_x u_x' + g_y u_y', where the
    gradient g is piecewise linear: inside a cell g_x depends on the row alone, and jumps from cell to cell."""
    middle, half = (low + high) / 2, (high - low) / 2
    columns, rows, dx, dy = warp.reach(low, high, *shape)
    steepness = torch.add(*bilinear_derivatives(framed))
    total = rounded_twice(warp, position_error(warp, low, high, *shape), steepness, columns, rows, shape)
    wide = (dx > 0.5) | (dy > 0.5)
    bent = ((of_cells(_neighbours(steepness, 1, 1), columns, rows, shape) > 0).any(0) | wide).any(0).nonzero()[:, 0]
    columns, rows, dx, dy, wide = (part[:, bent] for part in (columns, rows, dx - TOUCH, dy - TOUCH, wide))
    left, right = inside(columns - dx, shape[1]), inside(columns + dx, shape[1])
    upper, lower = inside(rows - dy, shape[0]), inside(rows + dy, shape[0])
    across, down = framed.diff(dim=2), framed.diff(dim=1)
    gx = gradient_range(across, (upper, lower), (left, right), row_first=True)
    gy = gradient_range(down, (left, right), (upper, lower), row_first=False)
    largest = torch.maximum(across.abs().amax(), down.abs().amax())
    gx, gy = ((torch.where(wide, -largest, a), torch.where(wide, largest, b)) for a, b in (gx, gy))
    steep = [torch.maximum(a.abs(), b.abs()) for a, b in (gx, gy)]
    swing = warp.bending(low, high)[:, None] * pixel_distance(*shape, low)[bent] * half.sum(1, keepdim=True)
    for a, (sx, sy) in enumerate(warp.speeds(middle, *shape)):
        r = ((gx[1] - gx[0]) * sx[:, bent].abs() + (gy[1] - gy[0]) * sy[:, bent].abs()) / 2
        total[:, :, bent] += half[:, a : a + 1] * (r + (steep[0] + steep[1]) * swing)
    return total


def gradient_range(
    differences: Tensor, along: tuple[Tensor, Tensor], cells: tuple[Tensor, Tensor], row_first: bool
) -> tuple[Tensor, Tensor]:
    """Least and largest slope over boxes of positions that meet at most two cells each way, (c, k, p) each.

    differences: between neighbours along the axis of the slope, which are the slope on the grid lines across it.
    along: ends of the box across the slope's axis, where it is linear between grid lines; cells: ends along it.
    """
    flat, stride = differences.flatten(1), differences.shape[2]
    line = along[0].floor()
    first, last = along[0] - line, along[1] - line
    crosses = last > 1
    i, slopes = line.long() + FRAME, []
    for cell in cells:
        k = cell.floor().long() + FRAME
        place, step = (i * stride + k, stride) if row_first else (k * stride + i, 1)
        before, between, after = (flat[:, place + step * j] for j in range(3))
        start = torch.lerp(before, between, first)
        slopes += [start, torch.where(crosses, between, start)]
        slopes += [torch.where(crosses, torch.lerp(between, after, last - 1), torch.lerp(before, between, last))]
    return torch.stack(slopes).amin(0), torch.stack(slopes).amax(0)


def _neighbours(cells: Tensor, before: int, after: int) -> Tensor:
    """Of each cell the largest entry among its neighbours up to so many before and after it, each way."""
    return max_pool2d(pad(cells, [before, after] * 2), before + after + 1, 1)


def inside(positions: Tensor, size: int) -> Tensor:
    """Positions along an axis of `size` pixels, those in the black around the image brought next to it: all black."""
    return positions.clamp(-2.0, size + 1.0)


def rounded_twice(
    warp: Warp, error: Tensor, steepness: Tensor, columns: Tensor, rows: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Twice what an error of a position may change, (c, k, p), from |g_x| + |g_y| of each cell of the framed image."""
    nearby = _neighbours(steepness, 1, 1)  # rounding may lead to a neighbouring cell, as may the rest of a box
    return 2 * (error * of_cells(nearby, columns, rows, shape) + VALUE[warp.interpolation])


def not_black(warp: Warp, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Pixels of psi(x, theta) that may not be black for some theta in boxes low, high, (k, dim): (k, c, h, w)."""
    shape = (x.shape[-2], x.shape[-1])
    columns, rows, dx, dy = warp.reach(low.double(), high.double(), *shape)
    before = 2 if warp.interpolation == "bicubic" else 1  # pixels that a kernel and half a pixel more reach
    near = _neighbours((pad(x, [FRAME] * 4) != 0).double(), before, before + 1)
    found = (of_cells(near, columns, rows, shape) > 0) | (dx > 0.49) | (dy > 0.49)
    return found.transpose(0, 1).reshape(len(low), *x.shape)


def of_cells(cells: Tensor, columns: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """The entries, (c, k, p), of the cells (c, height, width) of the framed image in which positions (k, p) lie."""
    i, j = (inside(p, n).floor().long() + FRAME for p, n in ((rows, shape[0]), (columns, shape[1])))
    return cells.flatten(1)[:, i * cells.shape[2] + j]


def bicubic_bend(warp: Warp, framed: Tensor, low: Tensor, high: Tensor, shape: tuple[int, int]) -> Tensor:
    """Distance from linear of each pixel, (c, k, h w): t^2 / 2 times a bound of the second derivative u' H u' + g u'',
    with the largest gradient g and Hessian H of the cells that the box meets."""
    middle, half = (low + high) / 2, (high - low) / 2
    columns, rows, dx, dy = warp.reach(low, high, *shape)
    wide = (dx > 0.5) | (dy > 0.5)
    cells = bicubic_derivatives(framed)
    corners = list(itertools.product((columns - dx, columns + dx), (rows - dy, rows + dy)))
    found = [torch.stack([of_cells(part, *spot, shape) for spot in corners]).amax(0) for part in cells]
    x, y, xx, xy, yy = (torch.where(wide, part.amax(), own) for part, own in zip(cells, found, strict=True))
    second = warp.bending(low, high)[:, None] * pixel_distance(*shape, low)
    total = rounded_twice(warp, position_error(warp, low, high, *shape), cells[0] + cells[1], columns, rows, shape)
    for a, speed in enumerate(warp.speeds(middle, *shape)):
        sx, sy = (part.abs() + second * half.sum(1, keepdim=True) for part in speed)
        curvature = sx.square() * xx + 2 * sx * sy * xy + sy.square() * yy + second * (x + y)
        total = total + half[:, a : a + 1].square() / 2 * curvature
    return total


def bicubic_derivatives(framed: Tensor) -> tuple[Tensor, ...]:
    """Bounds of |d/dx|, |d/dy|, |d2/dx2|, |d2/dxdy| and |d2/dy2| of the bicubic interpolant in each cell, (c, H, W).

    Along an axis a derivative is a polynomial on the cell, which lies between its Bernstein coefficients; across it
    the absolute weights sum to at most KERNEL.
    """
    first, second = (table.to(framed) for table in _bernstein())  # (3, 4), (2, 4)
    image = framed[:, None]

    def along(table: Tensor, rows: bool) -> Tensor:
        weights, across = (table[:, None, None], (4, 1)) if rows else (table[:, None, :, None], (1, 4))
        return KERNEL * max_pool2d(conv2d(image, weights).abs().amax(1), across, 1)

    both = torch.einsum("ai,bj->abij", first, first).reshape(9, 1, 4, 4)
    mixed = conv2d(image, both).abs().amax(1)
    parts = along(first, True), along(first, False), along(second, True), mixed, along(second, False)
    return tuple(pad(part, (1, 2, 1, 2)) for part in parts)  # a convolution's first cell begins at its second tap


def cubic_weights(t: Any) -> tuple[Any, Any, Any, Any]:
    """Weights of the four taps of cubic convolution with a = -.75 at a share t, from 0 to 1, of the way from the second
    to the third: of a tensor their values, of a polynomial theirs in t."""
    a = -0.75

    def outer(s: Any) -> Any:
        return a * (s**3 - 5 * s**2 + 8 * s - 4)

    def inner(s: Any) -> Any:
        return (a + 2) * s**3 - (a + 3) * s**2 + 1

    return outer(1 + t), inner(t), inner(1 - t), outer(2 - t)


@lru_cache(maxsize=1)
def _bernstein() -> tuple[Tensor, Tensor]:
    """Bernstein coefficients of the first, (3, 4), and second, (2, 4), derivative of the four weights of cubic
    convolution, on the cell between the second and the third tap."""
    weights = cubic_weights(np.polynomial.Polynomial([0, 1]))
    slopes = [[*w.deriv().coef, 0.0, 0.0][:3] for w in weights]
    curves = [[*w.deriv(2).coef, 0.0][:2] for w in weights]
    first = torch.tensor([[c0, c0 + c1 / 2, c0 + c1 + c2] for c0, c1, c2 in slopes], dtype=torch.float64).T
    second = torch.tensor([[c0, c0 + c1] for c0, c1 in curves], dtype=torch.float64).T
    return first.contiguous(), second.contiguous()


def nearest_range(warp: Warp, framed: Tensor, low: Tensor, high: Tensor, shape: tuple[int, int]) -> Tensor:
    """The range of the pixels that a position may round to, (c, k, h w): all values and their chords lie in it."""
    left, right, upper, lower = (p + 0.5 for p in warp.boxes(low, high, *shape))
    wide = (right - left > 1) | (lower - upper > 1)
    values = torch.stack([of_cells(framed, *spot, shape) for spot in itertools.product((left, right), (upper, lower))])
    return torch.where(wide, framed.amax() - framed.amin(), values.amax(0) - values.amin(0))


def smooth_range(warp: Warp, framed: Tensor, low: Tensor, high: Tensor, shape: tuple[int, int]) -> Tensor:
    """How much the value of each pixel changes at most, (c, k, h w): by the largest gradient nearby times the box."""
    columns, rows, dx, dy = warp.reach(low, high, *shape)
    wide = (dx > 0.5) | (dy > 0.5)
    if warp.interpolation == "bilinear":
        gx, gy = bilinear_derivatives(framed)
    else:
        gx, gy = bicubic_derivatives(framed)[:2]
    x, y = (
        torch.where(wide, part.amax(), of_cells(_neighbours(part, 1, 1), columns, rows, shape)) for part in (gx, gy)
    )
    return 2 * (dx * x + dy * y) + rounded_twice(
        warp, position_error(warp, low, high, *shape), gx + gy, columns, rows, shape
    )


def bilinear_derivatives(framed: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of |d/dx| and |d/dy| of the bilinear interpolant in each cell, (c, H, W): the larger of both sides."""
    across, down = framed.diff(dim=2).abs(), framed.diff(dim=1).abs()
    gx, gy = max_pool2d(across, (2, 1), 1), max_pool2d(down, (1, 2), 1)
    return pad(gx, (0, 1, 0, 1)), pad(gy, (0, 1, 0, 1))


def rounding_shift(warp: Warp, theta: Tensor, seen: Tensor) -> Tensor:
    """Bound of what rounding positions to float32 changes in the seen pixels of psi(y, theta), (k,), for an image y
    with one channel and values that span 1: no pixel but those near a tie for "nearest"."""
    shape = (seen.shape[0], seen.shape[1])
    error = position_error(warp, theta, theta, *shape)
    if warp.interpolation == "nearest":
        ends = [[(p + 0.5 + side * error).floor() for p in warp.positions(theta, *shape)] for side in (-1, 1)]
        torn = (ends[0][0] != ends[1][0]) | (ends[0][1] != ends[1][1])
        return (torn & seen.flatten()).sum(1).double().sqrt()
    steepest = 2.0 if warp.interpolation == "bilinear" else KERNEL * SLOPES
    return (error[:, 0] * steepest + VALUE[warp.interpolation]) * math.sqrt(int(seen.sum()))


# ---------------------------------------------------------------- operator norm


def column_sums(warp: Warp, theta: Tensor, seen: Tensor) -> Tensor:
    """Sums of the absolute weights with which each pixel of x enters the seen pixels of psi(x, theta), (k, h, w). The
    operator norm is at most the root of the product of the largest one and the largest sum of a pixel of psi."""
    h, w = seen.shape
    columns, rows = (p[:, seen.flatten().bool()] for p in warp.positions(theta, h, w))
    error = position_error(warp, theta, theta, h, w)
    size = (h + 2 * FRAME) * (w + 2 * FRAME)
    sums = torch.zeros(len(theta), size, dtype=torch.float64, device=theta.device)
    taps = [_taps(warp.interpolation, inside(p, n), error) for p, n in ((rows, h), (columns, w))]
    for (i, a), (j, b) in itertools.product(*taps):
        sums.scatter_add_(1, (i + FRAME) * (w + 2 * FRAME) + j + FRAME, a * b)
    return sums.view(-1, h + 2 * FRAME, w + 2 * FRAME)[:, FRAME:-FRAME, FRAME:-FRAME]


def _taps(interpolation: str, positions: Tensor, error: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(pixels along one axis, absolute weights) that the interpolation takes at positions (k, p)."""
    if interpolation == "nearest":  # near a tie both pixels count
        one, other = ((positions + 0.5 + side * error).floor().long() for side in (-1, 1))
        return [(one, torch.ones_like(positions)), (other, (other != one).double())]
    first = positions.floor()
    t = positions - first
    if interpolation == "bilinear":
        return [(first.long(), 1 - t), (first.long() + 1, t)]
    return [(first.long() + k, weight.abs()) for k, weight in enumerate(cubic_weights(t), -1)]
