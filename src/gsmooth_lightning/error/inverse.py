"""The error bound from the attacked file alone (IndivSPT; SPT slides): over every gamma of the threat, and over every
clean image that it could have made this file of.

The file tells much: a pixel v of it is w_1 x_1 + ... + w_4 x_4, up to its rounding, so that

    x_j = (v - sum_{i != j} w_i x_i) / w_j

bounds each of the four by the bounds of the others. Gammas for which the bounds of a pixel cross gave no such file.
"""

from collections.abc import Generator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gsmooth_lightning.confidence import check_alpha
from gsmooth_lightning.error.base import Bound, ErrorBound
from gsmooth_lightning.error.interval import FLOAT, check_intervals, encoded_norm, steps_of, widen
from gsmooth_lightning.error.sampled import Sampled, in_blocks, largest_rho
from gsmooth_lightning.errors import RequestError, UncertifiableError, check_whole
from gsmooth_lightning.interval import Boxes, warp_range
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Warp

ROUNDING = 1e-5
"""By which a value of a file may differ from the exact one, beyond its rounding to the format: float32's errors."""

CROSSED = 1e-9
"""By which a least value must exceed a largest one before they contradict each other."""

VACUOUS = 1e-4
"""Weight below which a file's pixel says nothing of a clean one."""

AT_ONCE = 2**15
"""Pixels of images that are held at once, nine positions for each."""


class Cells(NamedTuple):
    """Boxes of positions, (k, p), cut at the border between the two cells, squares of four pixels, that they touch at
    most along each axis: three columns and three rows, at whose nine crossings lie the extremes of every function that
    is monotone along each axis within a cell.

    Attributes:
        pixels: the first 3x3 pixels of the framed image that the box can touch, their places in it, (3, 3, k, p).
        rows, columns: weights of 3 of them at 3 rows and 3 columns, (crossing, pixel, k, p). In a box that touches more
            cells every pixel is without weight somewhere.
    """

    pixels: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, boxes: Boxes, h: int, w: int) -> "Cells":
        """The cells of boxes. Beyond the frame all is as on it: black."""
        first_column, columns = _axis(boxes[0], boxes[1], w)
        first_row, rows = _axis(boxes[2], boxes[3], h)
        steps = torch.arange(1, 4, device=rows.device)[:, None, None]
        return cls(((first_row + steps) * (w + 4))[:, None] + first_column + steps, rows, columns)

    def values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Values of framed images, (k, c, frame), at the 3x3 pixels and at the nine crossings: (3, 3, k, c, p) each."""
        places = self.pixels.permute(2, 0, 1, 3).flatten(1)[:, None].expand(-1, images.shape[1], -1)
        around = images.gather(2, places).unflatten(2, (3, 3, self.pixels.shape[3])).permute(2, 3, 0, 1, 4)
        along = _weighted(self.columns, around.unbind(1))  # (crossing, row, k, c, p)
        return around, _weighted(self.rows, along.unbind(1))


def _axis(least: Tensor, most: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First of three pixels along an axis, (k, p), and their weights at three crossings, (3, 3, k, p)."""
    least, most = least.clamp(-1, size), most.clamp(-1, size)
    first = least.floor()
    crossings = torch.stack([least, torch.minimum(most, first + 1), most]) - first
    places = torch.arange(3, dtype=least.dtype, device=least.device)[:, None, None]
    return first.long(), (1 - (crossings[:, None] - places).abs()).clamp_min(0)


def _weighted(weights: Tensor, values: tuple[Tensor, ...]) -> Tensor:
    """Sums of three values, (m, k, c, p) each, with weights (crossing, value, k, p): (crossing, m, k, c, p)."""
    first, second, third = (w[:, None, :, None] * value for w, value in zip(weights.unbind(1), values, strict=True))
    return first.add_(second).add_(third)


def framed(x: Tensor) -> Tensor:
    """Images, (..., h, w), flat, with black pixels around them: one before, and three after the last."""
    return pad(x, [1, 3, 1, 3]).flatten(-2)


def narrow(least: Tensor, most: Tensor, low: Tensor, high: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """Tighter bounds of framed clean images, (k, c, frame), whose values in the cells lie between low and high,
    (c, p): for each pixel those of all values together.

    x_j <= [v - sum_{i != j} w_i least_i] / w_j, at the worst crossing: along one axis within a cell numerator and
    denominator are linear, and their quotient is monotone. Without weight at a crossing there is no bound.
    """
    around_least, values_least = cells.values(least)
    around_most, values_most = cells.values(most)
    above = high - values_least  # (3, 3, k, c, p)
    below = low - values_most
    upper, lower = most.clone(), least.clone()
    for row in range(2):  # the third is out of the first crossing's reach
        for column in range(2):
            weight = (cells.rows[:, None, row] * cells.columns[None, :, column])[:, :, :, None]
            vacuous = weight.amin((0, 1)) < VACUOUS
            weight = weight.clamp_min(VACUOUS)
            most_here = (above / weight).amax((0, 1)).add_(around_least[row, column])
            least_here = (below / weight).amin((0, 1)).add_(around_most[row, column])
            places = cells.pixels[row, column][:, None].expand_as(most_here)
            upper.scatter_reduce_(2, places, most_here.masked_fill(vacuous, torch.inf), "amin")
            lower.scatter_reduce_(2, places, least_here.masked_fill(vacuous, -torch.inf), "amax")
    return lower, upper


class Sources(NamedTuple):
    """Pieces of the threat's range and, for each, bounds of the clean images that some gamma in it makes the file of.

    Attributes:
        low, high: ends of the pieces, (k, 1) float64.
        least, most: bounds of the framed clean images, (k, c, frame).
    """

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor

    def where(self, kept: Tensor) -> "Sources":
        return Sources(*(entry[kept] for entry in self))

    def halves(self) -> "Sources":
        middle = (self.low + self.high) / 2
        least, most = self.least.repeat(2, 1, 1), self.most.repeat(2, 1, 1)
        return Sources(torch.cat([self.low, middle]), torch.cat([middle, self.high]), least, most)


@torch.inference_mode()
def sources(threat: TransformationThreat, file: Tensor, pieces: int, splits: int, refinements: int) -> Sources:
    """Every clean image that the threat can have made this file of, (c, h, w), lies within the bounds of a piece that
    holds its gamma. At most `pieces` pieces; they are halved `splits` times while that many suffice."""
    h, w = file.shape[1:]
    half = ROUNDING + (0.5 / threat.levels if threat.levels else 0.0)
    value = file.double().flatten(1)
    low, high = value - half, value + half
    ends = torch.linspace(threat.low, threat.high, pieces + 1, dtype=torch.float64, device=file.device)[:, None]
    white = framed(torch.ones_like(file, dtype=torch.float64)).expand(pieces, -1, -1)
    found = Sources(ends[:-1], ends[1:], torch.zeros_like(white), white)
    for split in range(splits + 1):
        found = found.halves() if split else found
        assert isinstance(threat.transform, Warp)
        parts = zip(*(entry.split(max(1, AT_ONCE // file.numel())) for entry in found), strict=True)
        kept = [_refined(threat.transform, Sources(*part), low, high, h, w, refinements) for part in parts]
        found = Sources(*map(torch.cat, zip(*kept, strict=True)))
        if 2 * len(found.low) > pieces:
            break
    return found


def _refined(transform: Warp, found: Sources, low: Tensor, high: Tensor, h: int, w: int, refinements: int) -> Sources:
    """Bounds refined by each other, and pieces without any image left out."""
    for _ in range(refinements):
        cells = Cells.of(transform.boxes(found.low, found.high, h, w), h, w)
        least, most = narrow(found.least, found.most, low, high, cells)
        found = Sources(found.low, found.high, least, most)
        found = found.where((least <= most + CROSSED).flatten(1).all(1))
    return found


@torch.inference_mode()
def inverse_norms(smoothed: SmoothedClassifier, file: Tensor, found: Sources, theta: Tensor) -> Tensor:
    """Bound of ||P psi(file, theta) - P psi(x, gamma + theta)|| over all pieces and their images, in units of the
    noise: (n,), for each theta, (n, 1) float64.

    Both are intervals, and their difference goes through the preprocessing as in `error.interval`.
    """
    assert isinstance(smoothed.transform, Warp)
    transform, (h, w) = smoothed.transform, file.shape[1:]
    rounding = FLOAT + (h + w + 6) * 2.0**-23 * len(steps_of(smoothed))  # a step may sum over a row and a column
    own = file[None].double()
    turned = widen(*warp_range(own, own, transform.boxes(theta, theta, h, w), "bilinear"), rounding)
    least, most = (_unframed(entry, file.shape) for entry in (found.least, found.most))
    worst = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
    pairs = torch.cartesian_prod(torch.arange(len(theta)), torch.arange(len(found.low))).to(theta.device)
    for draw, piece in (part.unbind(1) for part in pairs.split(max(1, AT_ONCE // file.numel()))):
        boxes = transform.boxes(theta[draw] + found.low[piece], theta[draw] + found.high[piece], h, w)
        straight = widen(*warp_range(least[piece], most[piece], boxes, "bilinear"), rounding)
        norms = encoded_norm(smoothed, turned[0][draw] - straight[1], turned[1][draw] - straight[0])
        worst.scatter_reduce_(0, draw, norms, "amax")
    return worst


def _unframed(images: Tensor, shape: torch.Size) -> Tensor:
    c, h, w = shape
    return images.view(-1, c, h + 4, w + 4)[..., 1 : h + 1, 1 : w + 1]


class InverseBound(ErrorBound):
    """E and rho for a received file: for every gamma of the threat and every clean image x that it makes this file of,
    P_theta( ||psi(file, theta) - psi(x, gamma + theta)|| > E ) <= rho (IndivSPT; theory.md section 5).

    For certify=received. Rotation, scaling and shear, bilinear, in steps of any size. E is a quantile of `choose`
    bounds (see `inverse_norms`); rho is bounded by Clopper-Pearson on `draws` other ones.

    Args:
        draws: parameters theta that bound rho.
        choose: parameters theta that choose E.
        quantile: of the bounds, where E is put.
        alpha: probability that the bound is none; added to that of the votes.
        pieces: of the threat's range, at most; a file that many gammas explain takes time in proportion.
        splits: how often the pieces that remain are halved.
        refinements: how often the bounds of clean pixels refine each other.
    """

    reverse = True

    def __init__(
        self,
        draws: int = 1024,
        choose: int = 256,
        quantile: float = 1.0,
        alpha: float = 1e-4,
        pieces: int = 64,
        splits: int = 4,
        refinements: int = 10,
    ):
        check_whole("error", draws=(draws, 2), choose=(choose, 2), pieces=(pieces, 1), splits=(splits, 0))
        check_whole("error", refinements=(refinements, 1))
        check_alpha(alpha)
        if not 0 <= quantile <= 1:
            raise RequestError(f"error.quantile must lie between 0 and 1, got {quantile}")
        self.draws, self.choose, self.quantile, self.alpha = draws, choose, quantile, alpha
        self.pieces, self.splits, self.refinements = pieces, splits, refinements

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        """Refuses also what files cannot be traced back through.

        Raises:
            UncertifiableError: other than bilinear warps with one parameter, black outside, of images; preprocessing
                without a Lipschitz constant.
        """
        threat = super().check(smoothed, threat)
        for transform in (threat.transform, smoothed.transform):
            if not isinstance(transform, Warp) or transform.dim != 1 or transform.interpolation != "bilinear":
                raise UncertifiableError(
                    "files are traced back through bilinear rotation, scaling or shear alone; use one of these for "
                    "transform and threat, or certify clean images with error=image"
                )
        if threat.saved not in ("8bit", "float"):
            raise UncertifiableError(
                f"files are traced back to images in [0, 1], and threat.saved={threat.saved}; use 8bit or float"
            )
        check_intervals(smoothed, threat)
        return threat

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        """The bound for the received file x, (c, h, w)."""
        (found,) = yield [partial(sources, threat, x, self.pieces, self.splits, self.refinements)]
        chosen = yield from self._sample(smoothed, x, found, stream, "error-choose", self.choose)
        value = float(np.quantile(chosen, self.quantile, method="higher"))
        fresh = yield from self._sample(smoothed, x, found, stream, "error-bound", self.draws)
        rho = float(largest_rho(fresh, (value,), self.alpha, soft=False))
        details = {
            "draws": self.draws,
            "largest": float(max(chosen.max(), fresh.max())),
            "soft": False,
            "pieces": len(found.low),
            "gammas": [float(found.low.min()), float(found.high.max())],
            "width": float((found.most - found.least).clamp_min(0).sum() / len(found.low) / x.numel()),
        }
        return Bound(value, rho, self.alpha, "sound", details)

    @staticmethod
    def _sample(
        smoothed: SmoothedClassifier, x: Tensor, found: Sources, stream: Stream, stage: str, draws: int
    ) -> Sampled:
        """Bounds for parameters theta ~ law, (draws, 1), as a procedure."""

        def block(b: int) -> Tensor:
            theta = smoothed.draw_parameters(stream.at(stage, b, x.device), smoothed.block)
            return inverse_norms(smoothed, x, found, theta)[:, None]

        return (yield from in_blocks(smoothed, stream, draws, block))
