"""Several transformations after each other."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform.base import Mover, Resolvable, Stepwise, Transform
from gsmooth_lightning.transform.blur import GaussianBlur
from gsmooth_lightning.transform.function import Function
from gsmooth_lightning.transform.geometric import CyclicTranslation
from gsmooth_lightning.transform.intensity import Brightness, BrightnessContrast, Contrast

COMMUTE: tuple[frozenset[type[Resolvable]], ...] = tuple(
    frozenset(pair)
    for pair in itertools.product((GaussianBlur, CyclicTranslation), (Brightness, Contrast, BrightnessContrast))
)
"""Pairs whose order does not matter: averages and moves of pixels, with affine changes of every pixel alike."""

AFFINE = (Brightness, Contrast, BrightnessContrast)
"""What may come after a transformation that certify=cover visits, smoothed over by a law of its own."""

VISITED = (Mover, Stepwise, Function)
"""What certify=cover visits; it may stand before changes of brightness and contrast."""


class Composition(Resolvable):
    """psi(x, (theta_1, ..., theta_k)) = psi_k(... psi_1(x, theta_1) ..., theta_k), for parts that commute.

    psi(psi(x, alpha), beta) applies psi_1 with alpha_1, ..., psi_k with alpha_k, psi_1 with beta_1, ...; parts that
    commute may be sorted, so that the parameters of each part resolve by themselves. Parts that do not commute leave no
    such equation: contrast after brightness scales what brightness added (use BrightnessContrast), gamma correction of
    a blurred image is no blur of a corrected one. Blur commutes with these parts alone, and with cyclic translation
    only without its reflecting borders. What certify=cover visits, such as rotation or defocus blur, may stand first,
    with changes of brightness and contrast after it; for other certificates of an interpolation these commute inside
    the image, and what black moves in counts as an interpolation error.

    Args:
        parts: in the order in which they are applied.

    Raises:
        RequestError: fewer than two parts, or parts that do not commute.
    """

    def __init__(self, parts: Sequence[Transform]):
        super().__init__()
        if len(parts) < 2:
            raise RequestError("a composition needs two parts or more; give one transformation by itself")
        for a, b in itertools.combinations(parts, 2):
            visited = a is parts[0] and isinstance(a, VISITED) and isinstance(b, AFFINE)
            if frozenset((type(a), type(b))) not in COMMUTE and not visited:
                raise RequestError(
                    f"{a.name} and {b.name} do not commute, so attacks by both are no shift of the parameters; "
                    "compose blur or cyclic translation with brightness, contrast or transform=brightness_contrast, or "
                    "put brightness or contrast after rotation, another blur or pixelation"
                )
        self.exact = all(isinstance(part, Resolvable) and part.exact for part in parts)
        self._parts = nn.ModuleList(parts)
        self.units = tuple(unit for part in parts for unit in part.units)
        self.name = ", then ".join(part.name for part in parts)

    @property
    def parts(self) -> tuple[Resolvable, ...]:
        """The transformations, in the order in which they are applied."""
        return tuple(self._parts)  # type: ignore[arg-type]

    @property
    def least(self) -> tuple[float, ...]:
        return tuple(least for part in self.parts for least in part.least)

    def split(self, theta: Tensor) -> tuple[Tensor, ...]:
        """The parameters of each part: (..., dim) -> (..., dim of the part) each."""
        return theta.split([part.dim for part in self.parts], -1)

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        for part, own in zip(self.parts, self.split(theta), strict=True):
            x = part(x, own)
        return x

    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        own = zip(self.parts, self.split(alpha), self.split(beta), strict=True)
        return torch.cat([part.resolve(a, b) for part, a, b in own], 1)

    def values(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Part by part: each keeps the order of two images, one of which is nowhere above the other."""
        least = most = x
        for part, a, b in zip(self.parts, self.split(low), self.split(high), strict=True):
            least, most = part.values(least, a, b)[0], part.values(most, a, b)[1]
        return least, most

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        """The parts' factors multiply: each stretches distances by a factor, wherever the pixels are."""
        stretches = (
            part.spread(low, high, torch.ones_like(error), a, b) / math.sqrt(error.numel())
            for part, a, b in zip(self.parts, self.split(least), self.split(most), strict=True)
        )
        return math.prod(stretches) * float(error.norm())

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        """Each part's own drift, stretched by the parts after it."""
        moved, image, ones = 0.0, x, torch.ones_like(x)
        for part, a, b, s in zip(self.parts, self.split(low), self.split(high), self.split(step), strict=True):
            moved = moved * part.spread(image, image, ones, a, b) / math.sqrt(x.numel()) + part.drift(image, a, b, s)
            image = torch.maximum(*(ends.abs() for ends in part.values(image, a, b)))
        return moved
