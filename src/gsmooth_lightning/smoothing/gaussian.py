"""The normal law, isotropic, diagonal or full."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from torch import Tensor

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing.base import Law
from gsmooth_lightning.stream import Source, TrainingSource, sampling_slack


class Gaussian(Law):
    """Z ~ N(0, Sigma).

    A shift by delta leaves of a probability p at least Phi(z(p) - sqrt(delta' Sigma^-1 delta)); the prediction is
    kept while sqrt(delta' Sigma^-1 delta) < (z(pA) - z(pB)) / 2 (Cohen et al. 2019, Theorem 1; for Sigma: theory.md
    section 2).

    A log-normal law of a parameter that an attack multiplies by c is this law of its logarithm: |ln c| is the shift.

    Args:
        sigma: standard deviation, one number for all coordinates or a tensor or list of the shape of Z.
        covariance: (d, d) covariance instead, for Z of shape (d,).

    Raises:
        RequestError: sigma not positive and finite, or covariance not symmetric positive definite.
    """

    norm = "l2"
    any_dimension = True
    sigma: Tensor
    cholesky: Tensor | None

    def __init__(
        self,
        sigma: float | Sequence[float] | Tensor | None = None,
        covariance: Sequence[Sequence[float]] | Tensor | None = None,
    ):
        super().__init__()
        if (sigma is None) == (covariance is None):
            raise RequestError("a Gaussian law needs either sigma or covariance")
        if covariance is None:
            try:
                value = torch.as_tensor(sigma, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError) as failure:
                raise RequestError(f"sigma must be a number or a list of numbers, got {sigma!r}") from failure
            wrong = value[~((value > 0) & torch.isfinite(value))]
            if wrong.numel():
                raise RequestError(f"sigma must be positive and finite, got {float(wrong[0]):g}")
            self.register_buffer("sigma", value, persistent=False)
            self.register_buffer("cholesky", None, persistent=False)
            return
        matrix = torch.as_tensor(covariance, dtype=torch.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not torch.equal(matrix, matrix.T):
            raise RequestError(f"covariance must be a symmetric matrix, got shape {tuple(matrix.shape)}")
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed or not torch.isfinite(factor).all():
            raise RequestError("covariance must be positive definite")
        self.register_buffer("cholesky", factor, persistent=False)
        self.register_buffer("sigma", matrix.diagonal().sqrt(), persistent=False)

    @property
    def largest_sigma(self) -> float:
        """The largest standard deviation of a coordinate."""
        return float(self.sigma.detach().max())

    @property
    def scale(self) -> float:
        """The one standard deviation of an isotropic law; refused for others."""
        if self.sigma.numel() != 1:
            raise RequestError("this law has more than one sigma; its region is an ellipsoid, not a radius")
        return float(self.sigma)

    @property
    def span(self) -> tuple[float, float]:
        return -9 * self.largest_sigma, 9 * self.largest_sigma

    def within(self, tail: float, dim: int) -> tuple[Tensor, Tensor]:
        if self.sigma.numel() not in (1, dim):
            raise RequestError(f"this law has {self.sigma.numel()} sigmas for {dim} parameters; give one for each")
        ends = self.sigma.flatten().expand(dim).cpu() * -ndtri(tail / 2 / dim)
        return -ends, ends

    def slack(self, dim: int, levels: int) -> float:
        return sampling_slack(dim, self.largest_sigma * levels)

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        self._check_shape(shape)
        draws = source.normal(n, *shape)
        if self.cholesky is not None:
            return draws @ self.cholesky.T.to(draws.dtype)
        return draws.mul_(self.sigma.to(draws.dtype))

    def log_density(self, z: Tensor) -> Tensor:
        z = z[:, None] if z.ndim == 1 else z
        scales = self.sigma.expand(z.shape[1:]) if self.cholesky is None else self.cholesky.diagonal()
        return -self.gauge(z).square() / 2 - scales.log().sum() - scales.numel() / 2 * math.log(2 * math.pi)

    def gauge(self, delta: Tensor) -> Tensor:
        """sqrt(delta' Sigma^-1 delta), float64."""
        delta = delta.double().to(self.sigma.device)
        if self.cholesky is not None:
            return torch.linalg.solve_triangular(self.cholesky, delta.T, upper=False).norm(dim=0)
        self._check_shape(tuple(delta.shape[1:]))
        return (delta / self.sigma).flatten(1).norm(dim=1)

    def half_log_det(self, shape: tuple[int, ...]) -> Tensor:
        """ln det(Sigma) / 2 of Z of this shape: sum log sigma_i of a diagonal Sigma."""
        if self.cholesky is not None:
            return self.cholesky.diagonal().log().sum()
        self._check_shape(shape)
        return self.sigma.expand(shape).log().sum()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuses draws or shifts of another shape than the sigmas'."""
        sizes = (1,) * (len(shape) - self.sigma.ndim) + tuple(self.sigma.shape)
        alike = len(sizes) == len(shape) and all(a in (1, b) for a, b in zip(sizes, shape, strict=True))
        if self.cholesky is None and not alike:
            raise RequestError(f"sigma of shape {tuple(self.sigma.shape)} does not fit draws of shape {shape}")

    def transfer(self, p: ArrayLike, size: ArrayLike):
        return ndtr(ndtri(p) - np.asarray(size))

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """(z(pA) - z(pB)) / 2 in gauge units (multiply by sigma for l2), 0 where pA <= pB."""
        pa, pb = np.asarray(pa, dtype=float), np.asarray(pb, dtype=float)
        return np.where(pa > pb, (ndtri(pa) - ndtri(pb)) / 2, 0.0)

    def reach(self, size: ArrayLike):
        """sigma * size: an l2 radius; for other laws than isotropic ones that of the ellipsoid's inscribed ball."""
        if self.cholesky is not None:
            return float(torch.linalg.matrix_norm(self.cholesky, -2)) * np.asarray(size)
        return float(self.sigma.min()) * np.asarray(size)

    def extra_repr(self) -> str:
        if self.cholesky is not None:
            return f"covariance {tuple(self.cholesky.shape)}"
        sizes = self.sigma.unique()
        if sizes.numel() == 1:
            return f"sigma={sizes.item():g}"
        return f"sigma={sizes.min().item():g}..{sizes.max().item():g}"
