"""What a transformation promises; the theorems ask for these types."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Transform(nn.Module, ABC):
    """psi(x, theta) on batches, with psi(x, 0) = x.

    Attributes:
        dim: number of parameters.
        unit: unit of the parameters, as tables print it.
        name: name of the transformation in messages and tables.
        lowest: least value of a parameter.
    """

    dim: ClassVar[int]
    unit: ClassVar[str]
    name: ClassVar[str]
    lowest: ClassVar[float] = -math.inf

    @abstractmethod
    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        """(n, *shape) images and (n, dim) parameters -> (n, *shape) images."""


class Resolvable(Transform):
    """psi(psi(x, alpha), beta) = psi(x, gamma(alpha, beta)), up to the interpolation error unless `exact`
    (TSS, Definition 2; Fischer et al. 2020, section 4).

    Attributes:
        exact: the equation holds in real arithmetic, so certificates need no error bound.
    """

    exact: ClassVar[bool]

    @abstractmethod
    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """gamma(alpha, beta), (n, dim)."""


class Additive(Resolvable):
    """Resolvable with gamma = alpha + beta: the attack shifts the law of the parameters."""

    def resolve(self, alpha: Tensor, beta: Tensor) -> Tensor:
        return alpha + beta


class Identity(Additive):
    """No transformation: smoothing by pixel noise alone."""

    dim = 0
    unit = ""
    name = "identity"
    exact = True

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return x


def same(a: Transform, b: Transform) -> bool:
    """Whether two transformations are one: the same class, settings and weights."""

    def settings(transform: Transform) -> dict[str, Any]:
        own = {k: v for k, v in vars(transform).items() if not k.startswith("_") and k != "training"}
        return own | dict(transform.state_dict())

    mine, others = settings(a), settings(b)
    return type(a) is type(b) and mine.keys() == others.keys() and all(_equal(mine[k], others[k]) for k in mine)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
