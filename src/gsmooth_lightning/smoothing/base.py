"""The interface of a smoothing law."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.stream import Source, TrainingSource, sampling_slack


class Law(nn.Module, ABC):
    """Law of an additive random quantity Z in R^d: parameters theta or pixel noise epsilon.

    An attack shifts Z by delta. `gauge` measures delta in the law's own units, `transfer` says what is left of a
    probability p after such a shift, `radius` inverts it for every law (theory.md sections 1 and 2); a law overrides
    it where it has a closed form.

    Attributes:
        norm: the norm of the ball that `reach` measures, "l1" or "l2"; any for a law of one parameter.
        any_dimension: `transfer` and `gauge` hold for any number of independent coordinates, not for one alone.
        one_sided: only shifts delta >= 0 are certified.
        alpha: probability that `transfer` is no bound, for a law that estimates it once.
        kinks: where the density of one coordinate is not smooth, for `neyman_pearson`.
    """

    norm: str
    any_dimension: bool = False
    one_sided: bool = False
    alpha: float = 0.0
    kinks: tuple[float, ...] = ()

    @property
    @abstractmethod
    def span(self) -> tuple[float, float]:
        """Interval that holds all but 2^-52 of the mass of every coordinate."""

    def within(self, tail: float, dim: int) -> tuple[Tensor, Tensor]:
        """(low, high), (dim,) each: Z in R^dim lies between them but for a mass of `tail`, at least 2^-52 * dim."""
        low, high = self.span
        return torch.full((dim,), low, dtype=torch.float64), torch.full((dim,), high, dtype=torch.float64)

    def slack(self, dim: int, levels: int) -> float:
        """Total variation between Z in R^dim as sampled and rounded to k/levels, and the law itself: it counts every
        cell of the span, beyond which lies 2^-52 of the mass."""
        low, high = self.span
        return sampling_slack(dim, (high - low) * levels / 26)

    @abstractmethod
    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        """n independent draws: (n, *shape), in the source's precision."""

    @abstractmethod
    def log_density(self, z: Tensor) -> Tensor:
        """Logarithm of the density, constants included, (n, *shape) -> (n,) float64; -inf outside the support."""

    @abstractmethod
    def gauge(self, delta: Tensor) -> Tensor:
        """Size of shifts, (n, *shape) -> (n,) float64, in the law's own units; inf where nothing is certified."""

    @abstractmethod
    def transfer(self, p: ArrayLike, size: ArrayLike):
        """inf of Q(A) over events of probability p under the law, Q the law shifted by a delta with gauge `size`."""

    @abstractmethod
    def reach(self, size: ArrayLike):
        """Radius, in the units of Z, of the largest ball of `norm` whose shifts have gauge <= `size`; linear in it."""

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """Largest gauge of a shift that keeps transfer(pa) above 1 - transfer(1 - pb); 0 where pa <= pb."""
        pa, pb = np.broadcast_arrays(np.asarray(pa, dtype=float), np.asarray(pb, dtype=float))
        return largest(lambda size: self.transfer(pa, size) > 1 - self.transfer(1 - pb, size), pa > pb)

    def interval(self, pa: float, pb: float) -> tuple[float, float]:
        """(low, high): every shift between them is certified, in the units of Z, for a law of one parameter.

        The ends are not certified, except a low end of 0. (0, 0) where pA <= pB: abstain.
        """
        high = float(self.reach(self.radius(pa, pb)))
        return (0.0 if self.one_sided or high == 0 else -high), high


def largest(holds: Callable[[np.ndarray], np.ndarray], at_zero: np.ndarray) -> np.ndarray:
    """Largest size at which a condition holds that fails from some size on; rounded down. 0 where not `at_zero`.

    inf where it still holds at 2^64.
    """
    low, high = np.zeros(at_zero.shape), np.ones(at_zero.shape)
    with np.errstate(all="ignore"):  # sizes up to 2^64 overflow on the way to the answer
        for _ in range(64):
            endless = holds(high)
            if not endless.any():
                break
            high = np.where(endless, 2 * high, high)
        for _ in range(128):
            middle = (low + high) / 2
            inside = holds(middle)
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.where(at_zero, np.where(endless, np.inf, low), 0.0)


def round_down(radius: float) -> float:
    """The next float below, with an allowance for the rounding of Phi and its inverse."""
    return max(0.0, float(np.nextafter(radius * (1 - 1e-12), -np.inf)))


def rows(z: Tensor) -> Tensor:
    """Coordinates as float64 rows: (n, *shape) -> (n, d)."""
    return z.double().flatten(1) if z.ndim > 1 else z.double()[:, None]


def single(z: Tensor, law: str) -> Tensor:
    """The one coordinate of a law of one parameter: (n,) or (n, 1) -> (n,), float64.

    Raises:
        RequestError: more than one coordinate.
    """
    flat = rows(z)
    if flat.shape[1] != 1:
        raise RequestError(f"a {law} law is for one parameter, not {flat.shape[1]}; use a Gaussian law for several")
    return flat[:, 0]
