"""Noise in the latent space of a surrogate (GSmooth's augmented noise)."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from torch import Tensor

from gsmooth_lightning.errors import RequestError, positive
from gsmooth_lightning.smoothing.base import Law
from gsmooth_lightning.smoothing.gaussian import Gaussian
from gsmooth_lightning.stream import Source, Stream, TrainingSource, sampling_slack


class Latent(Law):
    """Z = A1 theta + epsilon: theta ~ law, epsilon ~ N(0, sigma^2 I) (GSmooth, Corollary 1; theory.md section 9).

    A shift delta = A1 a + r moves theta by a and epsilon by r, for every a: it leaves of p at least
    Phi(z(T_law(p; a)) - ||r|| / sigma). Of a Gaussian law with sigmas s the best a leaves
    Phi(z(p) - sqrt(delta' C^-1 delta)), C = A1 s^2 A1' + sigma^2 I (Theorem L). The gauge is that norm; of other laws
    it is ||delta|| / sigma, a = 0, and `split` says how to do better.

    Args:
        directions: A1, (dim, *shape): what a unit of each parameter adds to Z.
        law: of theta.
        sigma: of epsilon.

    Raises:
        RequestError: no finite directions, a sigma that is not positive, or a law that does not fit their number.
    """

    norm = "l2"
    any_dimension = True
    directions: Tensor
    spread: Tensor

    def __init__(self, directions: Tensor, law: Law, sigma: float):
        super().__init__()
        self.sigma = positive("noise.sigma", sigma)
        if directions.ndim < 2 or not torch.isfinite(directions).all():
            raise RequestError("directions must be finite, a latent for each parameter")
        self.register_buffer("directions", directions.detach().double(), persistent=False)
        self.law, self.dim = law, len(directions)
        if self.dim > 1 and not isinstance(law, Gaussian):
            raise RequestError(f"this law is for one parameter, the surrogate has {self.dim}; use a Gaussian law")
        if isinstance(law, Gaussian):
            if law.cholesky is not None or law.sigma.numel() not in (1, self.dim):
                raise RequestError(f"the law of {self.dim} parameters needs one sigma, or one for each")
            spread = law.sigma.flatten().expand(self.dim)
        else:  # an estimate will do: any split is a bound
            spread = law.sample(Stream(0, 0).at("select", 0), 4096, (1,)).std(0)
        self.register_buffer("spread", spread.clone().to(directions.device), persistent=False)

    @property
    def span(self) -> tuple[float, float]:
        low, high = self.law.span
        moved = float(self.directions.abs().sum(0).max()) * max(abs(low), abs(high))
        return -moved - 9 * self.sigma, moved + 9 * self.sigma

    def slack(self, dim: int, levels: int) -> float:
        """That of the sum's grid; that of theta on a grid of 2^28 cells; and what such a cell moves epsilon by, whose
        density is at most .4 / sigma."""
        low, high = self.law.span
        cell = (high - low) * 2.0**-28 * float(self.directions.flatten(1).norm(dim=1).sum())
        return super().slack(dim, levels) + sampling_slack(self.dim, 2.0**28) + 0.4 * cell / self.sigma

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        theta = self.law.sample(source, n, (self.dim,))
        noise = source.normal(n, *shape)
        return noise.mul_(self.sigma).add_(torch.tensordot(theta, self.directions.to(noise.dtype), 1))

    def split(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(a, r) with delta = A1 a + r: (n, *shape) -> (n, dim) and (n, *shape), float64.

        a = (A1'A1 + sigma^2 / s^2)^-1 A1'delta, the minimiser of |a / s|^2 + ||r||^2 / sigma^2 (no difference cancels);
        not below 0 for a one-sided law.
        """
        rows, delta = self.directions.flatten(1), delta.double()
        gram = rows @ rows.T + torch.diag(self.sigma**2 / self.spread**2)
        a = torch.linalg.solve(gram, rows @ delta.flatten(1).T).T
        if self.law.one_sided:
            a = a.clamp_min(0)
        return a, delta - torch.tensordot(a, self.directions, 1)

    def gauge(self, delta: Tensor) -> Tensor:
        if not isinstance(self.law, Gaussian):
            return delta.double().flatten(1).norm(dim=1) / self.sigma
        a, rest = self.split(delta)
        return torch.hypot((a / self.spread).norm(dim=1), rest.flatten(1).norm(dim=1) / self.sigma)

    def log_density(self, z: Tensor) -> Tensor:
        """By Sylvester's determinant identity; of a Gaussian law alone.

        Raises:
            RequestError: another law.
        """
        if not isinstance(self.law, Gaussian):
            raise RequestError("the density of this noise has no closed form; use a Gaussian law")
        rows, d = self.directions.flatten(1), self.directions[0].numel()
        s = self.spread[:, None]
        inner = torch.eye(self.dim, dtype=rows.dtype, device=rows.device) + s * (rows @ rows.T) * s.T / self.sigma**2
        constant = d * math.log(2 * math.pi * self.sigma**2) + torch.logdet(inner)
        return -(self.gauge(z).square() + constant) / 2

    def transfer(self, p: ArrayLike, size: ArrayLike):
        """Phi(z(p) - size)."""
        return ndtr(ndtri(p) - np.asarray(size))

    def reach(self, size: ArrayLike):
        """sigma * size: the inscribed l2 ball."""
        return self.sigma * np.asarray(size)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, sigma={self.sigma:g}"
