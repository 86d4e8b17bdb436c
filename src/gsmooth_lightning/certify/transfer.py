"""What an attack leaves of the votes.

A theorem is a function T_r(p): of an event with probability p among the sampled votes, at least T_r(p) is left under
every attack of the threat within radius r. The rest is the same for all of them: a class A with p_A >= pA against
others with p_B <= pB is kept while T_r(pA) > 1 - T_r(1 - pB) (theory.md section 1).
"""

import itertools
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from gsmooth_lightning.certify.region import convert
from gsmooth_lightning.error import Bound
from gsmooth_lightning.smoothing import Gaussian, Law, Product
from gsmooth_lightning.smoothing.contrast_brightness import contrast_brightness_transfer
from gsmooth_lightning.smoothing.similarity import similarity_sigma, similarity_transfer
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import BrightnessContrast, Composition, Similarity, Transform, is_exact

Transfer = Callable[[ArrayLike, float], np.ndarray]
"""T: (p, radius) -> what is left of p, elementwise in p."""

MARGIN = 1e-12
"""By which a condition must hold: more than the rounding errors of Phi and its inverse."""


# ---------------------------------------------------------------- two families of attacks


def pixel_transfer(law: Law, threat: PixelThreat, dim: int, bound: Bound, slack: float) -> Transfer:
    """T of pixel noise in R^dim under changes of the pixels: the rounding to the grid, `bound`, adds to the radius."""
    unit = float(convert(float(law.reach(1.0)), law.norm, threat.norm, dim))  # the gauge is linear in the radius

    def transfer(p: ArrayLike, radius: float) -> np.ndarray:
        size = 0.0 if radius == 0 else radius / unit + bound.value
        return np.asarray(law.transfer(sampled(p, slack), size))

    return transfer


def parameter_transfer(
    transform: Transform, law: Law, threat: TransformationThreat, bound: Bound, slack: float
) -> Transfer:
    """T of random parameters under an attack on them, with a defect of at most E, in units of the pixel noise, but for
    a mass rho of the parameters: `law_transfer` less rho. E is bound.value, or what the bound's curve says of attacks
    up to that radius. At radius 0 the file is the clean one, if threat.l2 does not change it."""
    curve = bound.curve or ((0.0, bound.value),)

    @cache  # a search for a pA asks for one radius many times
    def left(radius: float) -> Callable[[ArrayLike], np.ndarray]:
        error = max(error for start, error in curve if start <= radius)
        return law_transfer(transform, law, *threat.box(radius), error)

    def transfer(p: ArrayLike, radius: float) -> np.ndarray:
        p = sampled(p, slack)
        return p if radius == 0 and not threat.l2 else np.maximum(left(radius)(p) - bound.rho, 0.0)

    return transfer


def law_transfer(
    transform: Transform, law: Law, low: tuple[float, ...], high: tuple[float, ...], error: float = 0.0
) -> Callable[[ArrayLike], np.ndarray]:
    """p -> a lower bound of Q(A) over all attacks between low and high on a transformation's parameters, for events of
    probability p under their law, when a defect moves the pixel noise by up to `error` sigma as well.

    Phi(z(T_k(... T_1(p))) - sqrt(m^2 + E^2)): T_1, ..., T_k are of the parts whose law is no shifted Gaussian, m is the
    gauge of all Gaussian ones, which with the pixel noise are one Gaussian mechanism (Theorem J). Given the other parts
    each factor bounds what is left, and it is convex (Jensen). `similarity_transfer` takes E into its own shift.
    """
    last: Callable[..., np.ndarray] = _shifted
    steps: list[Callable[[ArrayLike], np.ndarray]] = []
    squares, first = error**2, 0
    parts: list[tuple[Transform, Law]] = [(transform, law)]
    if isinstance(transform, Composition) and isinstance(law, Product):
        parts = list(zip(transform.parts, law.parts, strict=True))
    for part, own in parts:
        box = slice(first, first := first + part.dim)
        if isinstance(part, BrightnessContrast):
            assert isinstance(own, Gaussian)
            steps.append(partial(_contrast_brightness, own, low[box], high[box]))
        elif isinstance(part, Similarity):
            last = partial(similarity_transfer, low=low[box], high=high[box], sigma=similarity_sigma(own))
        elif isinstance(own, Gaussian):
            squares += _gauge(part, own, low[box], high[box]) ** 2
        else:
            steps.append(partial(own.transfer, size=_gauge(part, own, low[box], high[box])))

    def transfer(p: ArrayLike) -> np.ndarray:
        for step in steps:
            p = step(p)
        return last(p, beside=np.sqrt(squares))

    return transfer


def _shifted(p: ArrayLike, beside: float) -> np.ndarray:
    return ndtr(ndtri(p) - beside)


def _contrast_brightness(law: Gaussian, low: tuple[float, ...], high: tuple[float, ...], p: ArrayLike) -> np.ndarray:
    contrast, brightness = law.sigma.flatten().expand(2).tolist()
    return contrast_brightness_transfer(p, low, high, (contrast, brightness))


def _gauge(transform: Transform, law: Law, low: tuple[float, ...], high: tuple[float, ...]) -> float:
    """Largest gauge of the shifts that parameters in a box make: gauges are largest at corners."""
    least, most = transform.moves(low, high) if is_exact(transform) else (low, high)
    corners = torch.tensor(list(itertools.product(*zip(least, most, strict=True))), dtype=torch.float64)
    return float(law.gauge(corners).max())


def sampled(p: ArrayLike, slack: float) -> np.ndarray:
    """Probability under the laws as the theorem takes them, of an event with probability p among the sampled votes."""
    return np.maximum(np.asarray(p, dtype=float) - slack, 0.0)


# ---------------------------------------------------------------- what follows from T


def required(transfer: Transfer, radius: float) -> float:
    """The pA above which T_radius(pA) > 1/2, rounded up; 1 where no pA suffices.

    Not 1 - T_radius(1/2) in general: the two agree for laws whose shifts by delta and -delta cost alike.
    """

    def surplus(p: float) -> float:
        return float(transfer(p, radius)) - 0.5 - MARGIN

    if surplus(1.0) <= 0:
        return 1.0
    root = float(brentq(surplus, 0.0, 1.0, xtol=1e-15))
    return next((root + step for step in (1e-15, 1e-13, 1e-11) if surplus(root + step) > 0), 1.0)


def largest_radius(transfer: Transfer, pa: float, pb: float, reach: float) -> float | None:
    """Largest radius, at most `reach`, at which T(pA) > 1 - T(1 - pB); rounded down. None: not even at 0."""

    def surplus(radius: float) -> float:
        left = transfer(np.array([pa, 1 - pb]), radius)
        return float(left[0] + left[1]) - 1 - MARGIN

    return largest_where(surplus, reach)


def largest_where(surplus: Callable[[float], float], reach: float) -> float | None:
    """Largest radius, at most `reach`, at which a decreasing surplus is positive; rounded down. None: not even at 0."""
    if surplus(0.0) <= 0:
        return None
    high = min(1.0, reach)
    while surplus(high) > 0:
        if high == reach:
            return reach
        high = min(2 * high, reach)
    return certified_below(surplus, high)


def certified_below(surplus: Callable[[float], float], high: float) -> float:
    """A radius below `high` at which a decreasing surplus is positive, as near to its root as floats allow; 0 if none
    is found. The surplus is positive at 0, may jump there, and is not positive at `high`."""
    tiny = 1e-9 * high
    if surplus(tiny) <= 0:
        return 0.0
    root = brentq(surplus, tiny, high, xtol=1e-12 * high, rtol=1e-12)
    for step in (1e-12, 1e-10, 1e-8, 1e-6):
        if surplus(root * (1 - step)) > 0:
            return float(root * (1 - step))
    return 0.0
