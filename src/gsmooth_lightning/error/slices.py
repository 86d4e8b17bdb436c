"""An attack's parameters, listed or cut into slices within which the image hardly moves (theory.md section 8)."""

import itertools
import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gsmooth_lightning.error.movement import middle_images, movements
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.preprocess import lipschitz
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Composition, Function, Identity, Mover, Stepwise, Transform, compute
from gsmooth_lightning.transform.compose import AFFINE, VISITED

GRIDDED = (
    "the function was tried at the middles of a grid's cells, without a bound of how far it moves images in between"
)
"""What a certificate for a function without a movement bound takes for granted."""

AT_ONCE = 16
"""Slices whose movement is bounded side by side."""

MOST_SLICES = 20_000
"""How many slices an image may need before it is left."""

FAR = 8
"""Slices that move the image by more margins than this are halved; others are cut at once into as many as they need."""

START = 1e-5
"""By how much a pixel of psi(x, 0) may differ from x."""


class Ends(Protocol):
    """What has ends, (dim,) each."""

    @property
    def low(self) -> Tensor: ...

    @property
    def high(self) -> Tensor: ...


class Piece(NamedTuple):
    """A part of the attack's parameters.

    Attributes:
        low, high: ends, (dim,).
        moved: bound of the l2 distance between P(psi(x, gamma)) and P(psi(x, middle)), gamma in between.
        fixed: what files and floats round, and threat.l2, beside it.
        near: least radius of the threat at which the piece is met, rounded down.
    """

    low: Tensor
    high: Tensor
    moved: float
    fixed: float
    near: float


def covered(threat: Threat) -> tuple[Transform, Transform]:
    """The transformation whose parameters are visited, and what comes after it (the identity if nothing does). With
    threat.step it may be any: all parameters there are are listed.

    Raises:
        UncertifiableError: another transformation, settings of which no movement is known, or parameters it lacks.
    """
    if not isinstance(threat, TransformationThreat):
        raise UncertifiableError("pixel threats have no parameters to cover; use certify=direct")
    transform = threat.transform
    first, *rest = transform.parts if isinstance(transform, Composition) else (transform,)
    visited = isinstance(first, VISITED) or threat.step is not None
    if not visited or len(rest) > 1 or not all(isinstance(part, AFFINE) for part in rest):
        raise UncertifiableError(
            "covered are rotation, translation, scaling, shear, blurs (not the Gaussian one), pixelation and your own "
            "function, each alone or with brightness or contrast after it; use certify=direct or joint"
        )
    if isinstance(first, Mover) and threat.step is None:
        first.check_movement()
    return first, rest[0] if rest else Identity()


class Slices:
    """The slices of one clean image x, (c, h, w).

    Attributes:
        first: the transformation whose parameters they are.
        cuts: whether they are cut from the range, and may be cut further; otherwise they are listed.
        gridded: whether they are cells of a grid, of which the middles alone are known.
    """

    def __init__(self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor):
        self.smoothed, self.threat, self.x = smoothed, threat, x
        self.first, _ = covered(threat)
        self.gridded = isinstance(self.first, Function) and self.first.bound is None and threat.step is None
        self.cuts = threat.step is None and not isinstance(self.first, Stepwise) and not self.gridded

    def whole(self, margin: float, cells: int) -> Generator[Any, Any, list[Piece] | None]:
        """All of the attacker's parameters by distance from 0, as a procedure (see `rounds`): listed by threat.step, by
        outcome or on a grid of `cells` along each axis, or cut (see `cut`)."""
        dim, threat, device = self.first.dim, self.threat, self.x.device
        low, high = (
            torch.tensor(ends[:dim], dtype=torch.float64, device=device) for ends in (threat.lows, threat.highs)
        )
        if threat.step is not None:
            at = threat.parameters(2)[0][:, :dim].unique(dim=0).double().to(device)
            return (yield from self.listed(at, at, at * (1 - 1e-6)))  # a multiple of the step may round up
        if isinstance(self.first, Stepwise):
            nearest, at = (ends.to(device) for ends in self.first.outcomes(float(low), float(high), self.x.shape))
            return (yield from self.listed(at, at, nearest))
        if self.gridded:
            axes = [torch.arange(cells, dtype=torch.float64, device=device)] * dim
            corner, width = torch.cartesian_prod(*axes).view(-1, dim), (high - low) / cells
            lows, highs = low + width * corner, low + width * (corner + 1)
            return (yield from self.listed(lows, highs, torch.zeros_like(lows).clamp(lows, highs)))
        return (yield from self.cut(low, high, margin))

    def listed(self, low: Tensor, high: Tensor, nearest: Tensor) -> Generator[Any, Any, list[Piece]]:
        """A slice for each row, (k, dim): what holds at its middle holds for all of it."""
        middle, found = (low + high) / 2, []
        for a, b, m, point in zip(*(part.split(AT_ONCE) for part in (low, high, middle, nearest)), strict=True):
            (moves,) = yield [partial(movements, self.smoothed, self.threat, self.first, self.x, m, m)]
            rows = zip(a, b, moves.tolist(), point, strict=True)
            found += [Piece(i, j, moved, fixed, self.near(p, p)) for i, j, (moved, fixed), p in rows]
        return sorted(found, key=lambda piece: piece.near)

    def cut(self, low: Tensor, high: Tensor, margin: float) -> Generator[Any, Any, list[Piece] | None]:
        """Slices of a box within which gamma moves the pixels by at most a margin, by distance from 0; None where there
        would be more than MOST_SLICES."""
        ends = zip(self.threat.highs, self.threat.lows, strict=True)
        width = torch.tensor([b - a for b, a in ends], dtype=torch.float64, device=low.device)[: len(low)]
        found: list[Piece] = []
        todo = [(low, high)]
        while todo:
            if len(found) + len(todo) > MOST_SLICES:
                return None
            lows, highs = (torch.stack(ends) for ends in zip(*todo, strict=True))
            moved = partial(movements, self.smoothed, self.threat, self.first, self.x)
            jobs = [partial(moved, a, b) for a, b in zip(lows.split(AT_ONCE), highs.split(AT_ONCE), strict=True)]
            moves = torch.cat((yield jobs)).tolist()
            todo = []
            for a, b, (moving, fixed) in zip(lows, highs, moves, strict=True):
                if moving <= margin:
                    found.append(Piece(a, b, moving, fixed, self.near(a, b)))
                else:
                    todo += parts(a, b, int(((b - a) / width.clamp_min(1e-300)).argmax()), moving / margin)
        return sorted(found, key=lambda piece: piece.near)

    def near(self, low: Tensor, high: Tensor) -> float:
        """The least radius of the threat within which a parameter of a box lies, rounded down."""
        nearest = torch.zeros(1, len(self.threat.lows), dtype=torch.float64, device=low.device)
        nearest[0, : len(low)] = torch.zeros_like(low).clamp(low, high)
        return float(self.threat.distance(nearest)) * (1 - 1e-12)

    @torch.inference_mode()
    def middles(self, slices: Sequence[Ends]) -> Tensor:
        """The images in the middle of slices, (k, c, h, w)."""
        low, high = (torch.stack(ends) for ends in zip(*((s.low, s.high) for s in slices), strict=True))
        return middle_images(self.threat, self.first, self.x, low, high)


@torch.inference_mode()
def start_error(smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor) -> float:
    """Bound of ||P(file(psi(x, 0))) - P(x)||_2: the class is chosen at x, but slices hold files, and that of 0 may
    differ from x by START a pixel.

    Raises:
        UncertifiableError: a pixel of psi(x, 0) differs from x by more than START.
        RequestError: a user's function that gives two results for the same parameters, at the ends of the range.
    """
    first, _ = covered(threat)
    start = compute(threat.transform, x[None], torch.zeros(1, threat.transform.dim, device=x.device))[0].float()
    if not bool((start - x).abs().max() <= START):
        raise UncertifiableError(
            f"{first.name} at 0 is not the image itself, so that what is covered does not contain it; change its "
            "options or its parameters so that 0 leaves every image alone"
        )
    if isinstance(first, Function):
        ends = threat.parameters(2)[0][[0, -1], : first.dim].to(x.device)
        once, again = (first(x.expand(2, *x.shape), ends) for _ in range(2))
        if not torch.equal(once, again):
            raise RequestError(f"{first.name} must be deterministic: the same image and parameters gave two results")
    return lipschitz(smoothed.preprocess) * float((threat.save(start).double() - x).norm()) * (1 + 1e-9)


def parts(low: Tensor, high: Tensor, axis: int, margins: float) -> list[tuple[Tensor, Tensor]]:
    """A box cut along an axis, by how many margins it moves the image."""
    number = 2 if margins > FAR else math.ceil(1.15 * margins)
    ends = torch.linspace(float(low[axis]), float(high[axis]), number + 1, dtype=torch.float64).tolist()
    found = []
    for a, b in itertools.pairwise(ends):
        lower, upper = low.clone(), high.clone()
        lower[axis], upper[axis] = a, b
        found.append((lower, upper))
    return found
