"""Independent laws beside each other."""

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing.base import Law, rows
from gsmooth_lightning.stream import Source, TrainingSource


class Product(Law):
    """Z = (Z_1, ..., Z_k), independent: the law of the parameters of a composition, a part for each transformation.

    A shift by (delta_1, ..., delta_k) leaves of a probability p at least T_k(... T_1(p) ...), in any order: given the
    other parts, T_1 bounds what is left after the shift of the first, and T_1 is convex (Jensen). Several Gaussian
    parts are one Gaussian law, whose gauges add as squares (theory.md section 4). There is no radius: regions are boxes
    of the parts' shifts.

    Args:
        parts: laws, in the order of the parameters.
        dims: number of parameters of each; one each by default.

    Raises:
        RequestError: fewer than two parts, not a number for each, or a part that is null.
    """

    norm = "none"

    def __init__(self, parts: Sequence[Law], dims: Sequence[int] | None = None):
        super().__init__()
        self.dims = list(dims) if dims is not None else [1] * len(parts)
        if len(parts) < 2 or len(self.dims) != len(parts):
            raise RequestError(f"a product needs two laws or more and a dimension for each, got {len(parts)} laws")
        if any(part is None for part in parts):
            raise RequestError(
                "of the two parts of a product one may be null (certify=cover); without any, use law=none"
            )
        self._parts = nn.ModuleList(parts)

    @property
    def parts(self) -> tuple[Law, ...]:
        """The laws, in the order of the parameters."""
        return tuple(self._parts)  # type: ignore[arg-type]

    @property
    def span(self) -> tuple[float, float]:
        return min(part.span[0] for part in self.parts), max(part.span[1] for part in self.parts)

    def within(self, tail: float, dim: int) -> tuple[Tensor, Tensor]:
        self._check(dim)
        share = tail / len(self.parts)
        lows, highs = zip(*(part.within(share, d) for part, d in zip(self.parts, self.dims, strict=True)), strict=True)
        return torch.cat(lows), torch.cat(highs)

    def _check(self, dim: int) -> None:
        if dim != sum(self.dims):
            raise RequestError(f"this product of laws is for {sum(self.dims)} parameters, not {dim}; set law.dims")

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """The coordinates of each part: (n, d) -> (n, dim) each."""
        return rows(z).split(self.dims, 1)

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        self._check(*shape)
        return torch.cat([part.sample(source, n, (dim,)) for part, dim in zip(self.parts, self.dims, strict=True)], 1)

    def log_density(self, z: Tensor) -> Tensor:
        return sum(part.log_density(own) for part, own in zip(self.parts, self.split(z), strict=True))  # type: ignore[return-value]

    def gauge(self, delta: Tensor) -> Tensor:
        raise RequestError("a product of laws has no one gauge; measure its parts")

    def transfer(self, p: ArrayLike, size: ArrayLike):
        raise RequestError("a product of laws has no one gauge; compose the transfer of its parts")

    def reach(self, size: ArrayLike):
        raise RequestError("a product of laws has no radius; its regions are boxes")
