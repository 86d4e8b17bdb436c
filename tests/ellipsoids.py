"""Ellipsoids for tests of the certificates with a memory: random ones, and where two meet."""

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from gsmooth_lightning.certify.per_input import Kept


def kept(rng: np.random.Generator, dim: int, size: float = 1.0, prediction: int = 0) -> Kept:
    centre, sigma = rng.normal(size=dim), np.exp(rng.normal(size=dim))
    return Kept(torch.tensor(centre), torch.tensor(sigma), size, prediction)


def scaled(one: Kept, by: float) -> Kept:
    return Kept(one.x, one.sigma, one.size * by, one.prediction)


def meeting(one: Kept, two: Kept) -> tuple[float, Tensor]:
    """(by how much both regions must be scaled to meet, a point that is then in both), by a convex solver.

    The point's own gauges are the first number: that the regions meet at this scale is proved, that they do not before
    is as good as the solver.
    """
    a, b = (k.size * k.sigma.numpy().ravel() for k in (one, two))
    d, unit = (two.x - one.x).numpy().ravel(), 1 / np.hypot(1 / a, 1 / b)  # in these units both are well-conditioned

    def gauges(u: np.ndarray) -> np.ndarray:
        return np.array([np.linalg.norm(u * unit / a), np.linalg.norm((u * unit - d) / b)])

    def slopes(z: np.ndarray) -> np.ndarray:
        u, (p, q) = z[:-1], np.maximum(gauges(z[:-1]), 1e-300)
        return np.array([[*(-u * (unit / a) ** 2 / p), 1.0], [*(-(u * unit - d) * unit / b**2 / q), 1.0]])

    start = d / unit * a**2 / (a**2 + b**2)
    scale = gauges(start).max()
    found = minimize(
        lambda z: z[-1] / scale,
        np.array([*start, scale]),
        jac=lambda z: np.eye(len(z))[-1] / scale,
        constraints={"type": "ineq", "fun": lambda z: z[-1] - gauges(z[:-1]), "jac": slopes},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    y = one.x + torch.from_numpy(found.x[:-1] * unit).view(one.x.shape)
    return max(one.gauge(y) / one.size, two.gauge(y) / two.size), y
