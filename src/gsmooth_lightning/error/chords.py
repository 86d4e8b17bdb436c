"""The largest defect over every gamma of the threat, by branch and bound with a proven remainder.

Between the corners of a box of gammas, psi(x, gamma) and psi(x, theta + gamma) are linear in gamma up to their bends
(see `transform.interpolate`); psi(., theta) and the preprocessing are linear maps, and the norm is convex. So on it

    ||defect(gamma)|| <= max over corners + L ( ||psi_theta|| bend(gamma) + bend(theta + gamma) ) + rest,

L the preprocessing's Lipschitz constant, rest what rounding the file and floats change. Only boxes that can still
exceed the bound asked for are split. Preprocessing that is not linear has how far a box moves the image in place of the
bend.
"""

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.preprocess import is_linear, lipschitz, visible
from gsmooth_lightning.rounds import Job
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Brightness, Composition, Translation, Warp, same
from gsmooth_lightning.transform.interpolate import bends, not_black, rounding_shift, shifts

Steps = Generator[list[Job], list[Any], Any]

SPLITS = 6
"""How often a box is halved at most."""

MOVE = 0.25
"""Pixels by which the first boxes move the image, about."""

WINDOW = 4
"""Bends along theta + gamma are of windows wider than a box by one part in WINDOW, which serve many theta."""

ROUNDED = 1.5
"""Steps of the noise grid, a pixel: half a step for each of two images, and float32 in the preprocessing."""

PAIRS = 256
"""Pairs of theta and gamma that are evaluated at once."""

BOXES = 64
"""Boxes whose bends are computed at once: neighbours, which bend the same pixels."""


def warp_of(threat: TransformationThreat) -> Warp:
    """The part of the threat that interpolates: the first one, and only brightness may come after it.

    Raises:
        UncertifiableError: another transformation.
    """
    first, *rest = threat.transform.parts if isinstance(threat.transform, Composition) else (threat.transform,)
    if not isinstance(first, Warp):
        raise UncertifiableError(f"the error of {threat.transform.name} is not maximised; use error.search=grid")
    if rest and not (all(isinstance(part, Brightness) for part in rest) and threat.saved == "real"):
        raise UncertifiableError(
            "the error is maximised over an interpolation, or one with brightness after it and threat.saved=real; use "
            "error.search=grid, or certify=cover"
        )
    return first


def check_chords(smoothed: SmoothedClassifier, threat: TransformationThreat) -> None:
    """Refuses what `chord_norms` has no proof for.

    Raises:
        UncertifiableError: transformations whose bends are unknown, preprocessing without a Lipschitz constant.
    """
    warp = warp_of(threat)
    warp.bending(*torch.zeros(2, 1, warp.dim))
    if not same(smoothed.transform, threat.transform):
        raise UncertifiableError(
            f"the file is made by {threat.transform}, and the classifier draws {smoothed.transform}: give both the "
            "same interpolation and padding, or use error.search=intervals or grid"
        )
    if isinstance(threat.transform, Composition) and not is_linear(smoothed.preprocess):
        raise UncertifiableError(
            "with brightness after an interpolation the error is maximised through linear preprocessing alone; use "
            "steps with an attribute linear, error.search=grid, or certify=cover"
        )
    if not math.isfinite(lipschitz(smoothed.preprocess)):
        raise UncertifiableError(
            "to maximise the error, preprocessing must say how much it stretches l2 distances: use steps with an "
            "attribute lipschitz, or error.search=grid"
        )


def chord_norms(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    x: Tensor,
    theta: Tensor,
    masks: Tensor,
    ceiling: Sequence[float] | None = None,
    tolerance: float = 0.02,
) -> Generator[list[Job], list[Any], Tensor]:
    """Upper bounds of max over gamma of ||psi(file(psi(x, gamma)), theta) - psi(x, theta + gamma)|| on each part, after
    preprocessing and in units of the noise, for each theta: (n, parts), as a procedure (see `rounds`).

    Args:
        x: clean image, (c, h, w).
        theta: (n, dim) float64.
        masks: (parts, *e), of what the noise is added to.
        ceiling: (parts,), bounds that need not be undercut.
        tolerance: a box is split until its bound exceeds the largest defect found by at most this part of it.
    """
    search = _Search(smoothed, threat, x, theta, masks)
    yield from search.prepare()
    boxes = yield from search.first_boxes()
    bounds = torch.zeros(len(theta), len(masks), dtype=torch.float64, device=x.device)
    found = bounds.clone()
    for depth in range(SPLITS + 1):
        tops = boxes.corners.flatten(1, -2).amax(1)  # (boxes, parts)
        own = tops + (yield from search.bends(boxes))[:, None] + search.rest[boxes.owner]
        found = _largest(boxes.owner, tops, found)
        limit = found * (1 + tolerance) + search.rest
        limit = limit if ceiling is None else torch.maximum(limit, torch.as_tensor(ceiling).to(limit))
        wide = (own > limit[boxes.owner]).any(1) & (depth < SPLITS)
        bounds = _largest(boxes.owner[~wide], own[~wide], bounds)
        if not wide.any():
            break
        boxes = yield from search.halve(boxes.chosen(wide), axis=depth % search.warp.dim)
    return bounds


@dataclass
class _Boxes:
    """Boxes of gammas, with the theta that each is for.

    Attributes:
        owner: index of theta, (m,).
        low, high: (m, dim).
        corners: norms of the defect, (m, 2, ..., 2, parts), an axis for each parameter.
    """

    owner: Tensor
    low: Tensor
    high: Tensor
    corners: Tensor

    def chosen(self, which: Tensor) -> "_Boxes":
        return _Boxes(self.owner[which], self.low[which], self.high[which], self.corners[which])


class _Search:
    """What `chord_norms` evaluates: defects at corners, and the bends between them."""

    def __init__(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, theta: Tensor, masks: Tensor
    ):
        assert isinstance(smoothed.noise, Gaussian)
        self.smoothed, self.threat, self.x, self.masks = smoothed, threat, x, masks
        self.noise, self.warp = smoothed.noise, warp_of(threat)
        self.theta, self.h, self.w = theta[:, : self.warp.dim], x.shape[-2], x.shape[-1]
        ends = torch.tensor([threat.lows, threat.highs], dtype=torch.float64, device=x.device)
        self.low, self.high = ends[:, : self.warp.dim]
        self.brightest = float(ends[:, self.warp.dim :].abs().sum(1).max())
        self.linear = is_linear(smoothed.preprocess)
        self.distance = partial(bends if self.linear else shifts, self.warp, x)
        self.seen = visible(smoothed.preprocess, x)
        self.scale = lipschitz(smoothed.preprocess) / float(self.noise.sigma.min())

    # -------------------------------------------------- for each theta

    def prepare(self) -> Steps:
        """The stretch of psi(., theta), the pixels of the file that it uses, and `rest`, (n, parts)."""
        found = yield [partial(self._of_theta, part) for part in self.theta.split(PAIRS)]
        self.stretch, rest, used = (torch.cat(part) for part in zip(*found, strict=True))
        self.used = used.any(0)
        if self.threat.levels:  # the file rounds each pixel by half a step, and a tie by what float32 makes of it
            (rounded,) = yield [self._rounded]
            most = (self.stretch * rounded).clamp_max(self.warp.gain * math.sqrt(self._pixels()))
            rest = rest + most * (0.5 / self.threat.levels + 2.0**-22)
        step = torch.ones_like(self.masks[:1]) / self.smoothed.levels
        grid = torch.cat([self.noise.gauge(step * mask) for mask in self.masks])
        self.rest = rest[:, None] * self.scale + ROUNDED * grid

    def _pixels(self) -> int:
        """Pixels that are seen, in all channels."""
        return len(self.x) * int(self.seen.sum())

    @torch.inference_mode()
    def _rounded(self) -> float:
        """Root of the number of used pixels of a file, in all channels, that may not be black."""
        if self.warp.dim > 1:
            return math.sqrt(len(self.x) * int(self.used.sum()))
        (gammas,) = self._axes()
        lit = not_black(self.warp, self.x, gammas[0, :-1, None], gammas[0, 1:, None])
        return math.sqrt(int((lit & self.used).flatten(1).sum(1).max()))

    @torch.inference_mode()
    def _of_theta(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stretch, sums = self.warp.stretch(theta, self.seen)
        used = sums > 0
        span = self.warp.gain * float(self.x.amax().clamp_min(0) - self.x.amin().clamp_max(0)) + self.brightest
        rounding = rounding_shift(self.warp, theta, self.seen) * math.sqrt(len(self.x))
        rest = 2 * span * rounding + stretch * self.threat.l2
        if self.brightest:  # brightness that psi(., theta) carries over the edge
            ones = self.warp(torch.ones_like(self.x).expand(len(theta), *self.x.shape), theta.float())
            rest = rest + self.brightest * ((ones - 1) * self.seen).flatten(1).norm(dim=1)
        return stretch, rest, torch.nn.functional.max_pool2d(used.double(), 3, 1, 1) > 0

    # -------------------------------------------------- boxes

    def first_boxes(self) -> Steps:
        """The range of gamma in boxes, for every theta."""
        axes = list(self._axes())  # (n, nodes) each
        shape = tuple(nodes.shape[1] for nodes in axes)
        gammas = torch.stack(
            [
                nodes.view(len(nodes), *[-1 if a == b else 1 for b in range(len(axes))]).expand(-1, *shape)
                for a, nodes in enumerate(axes)
            ],
            -1,
        )  # (n, *nodes, dim)
        owner = torch.arange(len(self.theta), device=self.x.device).view(-1, *[1] * len(axes)).expand(gammas.shape[:-1])
        norms = (yield from self.defects(owner.flatten(), gammas.flatten(0, -2))).view(*gammas.shape[:-1], -1)

        def corner(of: Tensor, bits: tuple[int, ...]) -> Tensor:
            for axis, bit in enumerate(bits, 1):
                of = of.narrow(axis, bit, of.shape[axis] - 1)
            return of.flatten(0, len(bits))

        dim = len(axes)
        corners = torch.stack([corner(norms, bits) for bits in itertools.product((0, 1), repeat=dim)], 1)
        zeros, ones = (0,) * dim, (1,) * dim
        return _Boxes(
            corner(owner, zeros), corner(gammas, zeros), corner(gammas, ones), corners.unflatten(1, (2,) * dim)
        )

    def _axes(self) -> Generator[Tensor, None, None]:
        """Gammas along each axis, (n, nodes): evenly spaced, or where bilinear translations have their kinks."""
        kinks = isinstance(self.warp, Translation) and self.warp.interpolation == "bilinear"
        dx, dy = self.warp.reach(self.low[None], self.high[None], self.h, self.w)[2:]
        farthest = float((torch.hypot(dx, dy)[0] * self.seen.flatten()).max())
        number = max(1, math.ceil(2 * farthest / MOVE))
        for a, (low, high) in enumerate(zip(self.low.tolist(), self.high.tolist(), strict=True)):
            if kinks:
                whole = torch.arange(math.floor(low), math.ceil(high) + 1, dtype=torch.float64, device=self.x.device)
                between = whole + (-self.theta[:, a : a + 1]) % 1
                nodes = torch.cat([whole.expand_as(between), between], 1).clamp(low, high)
                ends = torch.tensor([low, high], dtype=torch.float64, device=self.x.device).expand(len(nodes), 2)
                yield torch.cat([nodes, ends], 1).sort(1).values
            else:
                even = torch.linspace(low, high, number + 1, dtype=torch.float64, device=self.x.device)
                yield even.expand(len(self.theta), -1)

    def halve(self, boxes: _Boxes, axis: int) -> Steps:
        """Each box as two, halved along one axis."""
        middle = (boxes.low + boxes.high)[:, axis] / 2
        others = [(0, 1) if a != axis else (0,) for a in range(self.warp.dim)]
        gammas = []
        for bits in itertools.product(*others):
            corner = torch.where(torch.tensor(bits, device=middle.device).bool(), boxes.high, boxes.low)
            corner[:, axis] = middle
            gammas.append(corner)
        owner = boxes.owner.repeat(len(gammas))
        norms = (yield from self.defects(owner, torch.cat(gammas))).view(len(gammas), len(middle), -1).transpose(0, 1)
        new = norms.reshape(len(middle), *[2] * (self.warp.dim - 1), norms.shape[-1])
        lower, upper = boxes.corners.unbind(axis + 1)
        low, high = boxes.low.clone(), boxes.high.clone()
        low[:, axis] = high[:, axis] = middle
        return _Boxes(
            boxes.owner.repeat(2),
            torch.cat([boxes.low, low]),
            torch.cat([high, boxes.high]),
            torch.cat([torch.stack([lower, new], axis + 1), torch.stack([new, upper], axis + 1)]),
        )

    # -------------------------------------------------- defects and bends

    def defects(self, owner: Tensor, gammas: Tensor) -> Steps:
        """Norms of the defect, in units of the noise, before anything is rounded, (m, parts)."""
        order = gammas[:, 0].argsort(stable=True)  # files of one gamma serve many theta
        norms = yield [partial(self._defects, owner[part], gammas[part]) for part in order.split(PAIRS)]
        result = torch.empty(len(owner), len(self.masks), dtype=torch.float64, device=self.x.device)
        result[order] = torch.cat(norms)
        return result

    @torch.inference_mode()
    def _defects(self, owner: Tensor, gammas: Tensor) -> Tensor:
        different, which = gammas.unique(dim=0, return_inverse=True)
        theta, preprocess = self.theta[owner], self.smoothed.preprocess
        turned = self.warp(self._files(different)[which], theta.float())
        straight = self.warp(self.x.expand_as(turned), self.warp.resolve(gammas, theta).float())
        defect = preprocess(turned - straight) if self.linear else preprocess(turned) - preprocess(straight)
        return torch.stack([self.noise.gauge(defect * mask) for mask in self.masks], 1)

    def _files(self, gammas: Tensor) -> Tensor:
        return self.threat.clip(self.warp(self.x.expand(len(gammas), *self.x.shape), gammas.float()))

    def bends(self, boxes: _Boxes) -> Steps:
        """How far a defect may exceed those at the corners of its box, in units of the noise, (m,)."""
        theta = self.theta[boxes.owner]
        file = yield from self._table(boxes.low, boxes.high, self._bend_of_files)
        low, high = self.warp.resolve(boxes.low, theta), self.warp.resolve(boxes.high, theta)
        if self.warp.dim == 1:  # boxes of one depth are of one width
            step = float((high - low).max()) / WINDOW
            low = (low / step).floor() * step
            high = low + (WINDOW + 1) * step
        straight = yield from self._table(low, high, partial(self.distance, seen=self.seen))
        return self.scale * (self.stretch[boxes.owner] * file + straight)

    def _table(self, low: Tensor, high: Tensor, bend: Callable[[Tensor, Tensor], Tensor]) -> Steps:
        """bend(low, high) of many boxes, (m,), each different one computed once."""
        if self.warp.dim > 1:
            different, which = torch.cat([low, high], 1).unique(dim=0, return_inverse=True)
        else:  # boxes of one depth are of one width, up to rounding
            first, which = low[:, 0].unique(return_inverse=True)
            last = first.scatter_reduce(0, which, high[:, 0], "amax")
            different = torch.stack([first, last], 1)
        found = yield [partial(_inferring, bend, *part.chunk(2, 1)) for part in different.split(BOXES)]
        return torch.cat(found)[which]

    def _bend_of_files(self, low: Tensor, high: Tensor) -> Tensor:
        """Bends, or shifts, of the file's pixels that are used."""
        bend = self.distance(low, high, seen=self.used)
        if not self.linear or self.warp.interpolation != "bicubic":  # clipping moves nothing apart; others do not clip
            return bend
        corners = itertools.product(*zip(low.unbind(1), high.unbind(1), strict=True))
        parameters = torch.stack([torch.stack(corner, 1) for corner in corners])
        images = self.warp(self.x.expand(parameters[..., 0].numel(), *self.x.shape), parameters.flatten(0, 1).float())
        kinks = clip_kinks(self.threat, images.view(len(parameters), -1, *self.x.shape))
        return bend + (kinks * self.used).flatten(1).norm(dim=1)


def clip_kinks(threat: TransformationThreat, corners: Tensor) -> Tensor:
    """How far clipped files between corners, (corners, ...), may be from linear beyond the unclipped ones: where the
    corners leave the format's range unequally, by that much at most. What is clipped between them, and its linear
    interpolation, both lie between the least and the most that is clipped at a corner."""
    over = corners - threat.clip(corners)
    return over.amax(0) - over.amin(0)


def _inferring(bend: Callable[[Tensor, Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    with torch.inference_mode():
        return bend(low, high)


def _largest(owner: Tensor, values: Tensor, least: Tensor) -> Tensor:
    """Largest of the values, (m, parts), of each owner, (n, parts), and `least`."""
    return least.scatter_reduce(0, owner[:, None].expand_as(values), values, "amax")
