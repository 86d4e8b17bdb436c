"""What a transformation promises; the theorems ask for these types."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError


class Transform(nn.Module, ABC):
    """psi(x, theta) on batches, with psi(x, 0) = x.

    Attributes:
        units: unit of each parameter, as tables print it.
        name: name of the transformation in messages and tables.
        lowest: least value of a parameter; threats and laws that go below it are refused.
    """

    units: tuple[str, ...]
    name: str
    lowest: ClassVar[float] = -math.inf

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return len(self.units)

    @property
    def least(self) -> tuple[float, ...]:
        """Least value of each parameter."""
        return (self.lowest,) * self.dim

    @abstractmethod
    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        """(n, *shape) images and (n, dim) parameters -> (n, *shape) images."""


class Resolvable(Transform):
    """psi(psi(x, alpha), beta) = psi(x, gamma(alpha, beta)), up to the interpolation error unless `exact`
    (TSS, Definition 2; Fischer et al. 2020, section 4).

    Attributes:
        exact: the equation holds in real arithmetic, so certificates need no bound on an interpolation error. Such a
            transformation is computed in float64.
        permutes: it only moves values to other places: the equation holds in floating point too.
    """

    exact: bool
    permutes: ClassVar[bool] = False

    @abstractmethod
    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """gamma(alpha, beta), (n, dim)."""

    def moves(self, low: Sequence[float], high: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
        """Ends of the shifts of the law that parameters between low and high make: others if parameters are rounded."""
        return low, high

    def values(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value of each pixel of psi(x, gamma), gamma between low and high, (dim,): two (c, h, w).

        Those at the corners of the box: right for a transformation whose pixels are monotone in each parameter while
        the others are fixed.
        """
        corners = torch.cartesian_prod(*torch.stack([low, high], 1)).reshape(-1, self.dim)
        attacked = self(x.double().expand(len(corners), *x.shape), corners.to(x.device))
        return attacked.amin(0), attacked.amax(0)

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        """Bound of ||psi(y, theta) - psi(y', theta)||_2 over files with values between low and high, (c, h, w), that
        differ by at most error, (c, h, w), and over theta between least and most, (dim,); inf: none is known."""
        return math.inf

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        """Bound of ||psi(x, theta) - psi(x, theta')||_2 over parameters between low and high that differ by at most
        step, (dim,) each; inf: none is known."""
        return math.inf


class Mover(Transform):
    """A transformation of which is known how far it moves an image between two parameters, so that certify=cover can
    visit them (theory.md section 8).

    Attributes:
        gain: largest sum of the absolute weights with which pixels make a pixel of psi.
    """

    @property
    def gain(self) -> float:
        return 1.0

    def check_movement(self) -> None:
        """Refuses settings of which it is not known.

        Raises:
            UncertifiableError: with what to use instead.
        """

    @abstractmethod
    def departure(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Bound of |psi(x, theta) - I(theta)| over theta in boxes low, high, (k, dim), I the multilinear interpolation
        of psi(x, .) between the corners of any box within, both as float32 computes them: (k, c, h, w) float64."""


class Stepwise(Transform):
    """A transformation with finitely many outcomes over any range of its parameter: all of them are visited."""

    @abstractmethod
    def outcomes(self, low: float, high: float, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(nearest, at), (k, 1) float64 each: all outcomes of psi(x, .), x of shape (c, h, w), over parameters between
        low and high. psi(x, at) has the outcome, and no parameter nearer to 0 than `nearest` does."""


class Additive(Resolvable):
    """Resolvable with gamma = alpha + beta: the attack shifts the law of the parameters."""

    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        return alpha + beta


class Identity(Additive):
    """No transformation: smoothing by pixel noise alone."""

    units = ()
    name = "identity"
    exact = True
    permutes = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return x


def check_images(x: Tensor, name: str) -> None:
    """Raises RequestError unless x holds images, (n, c, h, w)."""
    if x.ndim != 4:
        raise RequestError(f"{name} is for images, not for inputs of shape {tuple(x.shape[1:])}; use transform=volume")


def is_exact(transform: Transform) -> TypeGuard[Resolvable]:
    """Whether psi(psi(x, alpha), beta) = psi(x, gamma(alpha, beta)) without an interpolation error."""
    return isinstance(transform, Resolvable) and transform.exact


def compute(transform: Transform, x: Tensor, theta: Tensor) -> Tensor:
    """psi(x, theta): in float64 if psi is exact but for rounding, in float32 if it interpolates or only permutes."""
    if not is_exact(transform):
        return transform(x, theta.float())
    return transform(x if transform.permutes else x.double(), theta.double())


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two transformations, preprocessing steps or laws are one: the same class, settings, weights and parts."""

    def settings(module: nn.Module) -> dict[str, Any]:
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        return own | dict(module.named_parameters(recurse=False)) | module._buffers  # buffers of laws are not saved

    mine, others = settings(a), settings(b)
    if type(a) is not type(b) or mine.keys() != others.keys():
        return False
    parts, theirs = list(a.children()), list(b.children())
    alike = len(parts) == len(theirs) and all(map(same, parts, theirs))
    return alike and all(_equal(mine[k], others[k]) for k in mine)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a.cpu(), b.cpu()) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
