"""What a transformation promises; the theorems ask for these types."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class Transform(nn.Module, ABC):
    """psi(x, theta) on batches, with psi(x, 0) = x.

    Attributes:
        dim: number of parameters.
        unit: unit of the parameters, as tables print it.
        name: name of the transformation in messages and tables.
    """

    dim: ClassVar[int]
    unit: ClassVar[str]
    name: ClassVar[str]

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
