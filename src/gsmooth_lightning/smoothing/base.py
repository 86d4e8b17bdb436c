"""The interface of a smoothing law."""

from abc import ABC, abstractmethod

from numpy.typing import ArrayLike
from torch import Tensor, nn

from gsmooth_lightning.stream import Source, TrainingSource


class Law(nn.Module, ABC):
    """Law of an additive random quantity Z in R^d: parameters theta or pixel noise epsilon.

    An attack shifts Z by delta. `gauge` measures delta in the law's own units, `transfer` says what is left of a
    probability p after such a shift, `radius` inverts it (theory.md sections 1 and 2).
    """

    @abstractmethod
    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        """n independent draws: (n, *shape), in the source's precision."""

    @abstractmethod
    def gauge(self, delta: Tensor) -> Tensor:
        """Size of shifts, (n, *shape) -> (n,), in the law's own units."""

    @abstractmethod
    def transfer(self, p: ArrayLike, size: ArrayLike):
        """inf of Q(A) over events of probability p under the law, Q the law shifted by a delta with gauge `size`."""

    @abstractmethod
    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """Largest gauge of a shift that keeps transfer(pa) above 1 - transfer(1 - pb); 0 where pa <= pb."""
