"""Densities that a power of a norm sharpens at the origin (Zhang et al. 2020): for l1, l2 and l_inf shifts."""

import bisect
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid
from scipy.optimize import brentq
from scipy.special import betainc, erf, erfc, gammainc, gammaincinv, gammaln, ndtr, wrightomega
from torch import Tensor

from gsmooth_lightning.confidence import check_alpha
from gsmooth_lightning.errors import RequestError, check_whole, positive
from gsmooth_lightning.smoothing.base import Law, rows
from gsmooth_lightning.smoothing.gaussian import Gaussian
from gsmooth_lightning.smoothing.laplace import Laplace
from gsmooth_lightning.stream import Source, Stream, TrainingSource

COARSE, FINE = 512, 8192
"""Cells of the norm: on the coarse ones is found where the sum changes, on the fine ones it is bounded."""

ROUNDING = 1e-10
"""Of SciPy's distribution functions and of the sums over the cells; both are good to 1e-12."""

OUTWARD = 1e-14
"""Of a threshold, relative: the law of l1 jumps where it passes the size of the shift."""

LEVELS = (-50.0, 25.0)
"""Range of ln lambda that is searched: above it lambda * ROUNDING leaves nothing."""


class _Radial(Law):
    """Density proportional to s^-k exp(-s^e / e), s = ||z||_e / scale, for the norm l_e, e = 1 or 2.

    y = s^e is e Gamma((D - k) / e), independent of the direction, which is that of the law with k = 0.
    Z = S_1 ... S_m Z_0, with Z_0 of the law with k = 0 and independent S_j in (0, 1): given those the coordinates are
    independent, and nearer to 0 than those of Z_0. A relative error eta of the product moves the law by at most
    eta sqrt(D / 2) in total variation (Pinsker); with eta of k + 252 units of 2^-52, the uniforms' grid included, that
    is less than what `sampling_slack` allows a coordinate beside its cells, for D < 130,000 or k < 300 sqrt(D).

    Every lambda > 0 bounds E f after the shift from below (Zhang et al. 2020, Theorem 1):
        T(p) >= lambda p - D(lambda),  D(lambda) = int (lambda pi_0 - pi_delta)_+,
    and D(lambda) <= lambda M(ln lambda) - 1 + M(-ln lambda) with M(l) = P(g(Z - delta) >= g(Z) - l),
    g = -ln of the density (equal without ties): the last term is the reflection z -> delta - z of the first. Given y,
    M is the distribution function of one coordinate of the direction, at a threshold that is monotone in what it
    depends on. On cells of y whose masses are known it is bounded by its largest value in each cell: a sum from above,
    without an estimate of its error. lambda is chosen approximately.

    **The worst shift** of a ball is r e_1 (Theorem 2 there; our proof). int min(lambda pi_0, pi_delta) is the integral
    over t > 0 of Vol(K_t ∩ (L_t + delta)), where K_t = {lambda pi_0 > t} and L_t = {pi_0 > t} are balls of the norm. By
    Brunn-Minkowski each volume is quasi-concave in delta, so on a ball of shifts it is least at an extreme point; all
    extreme points are alike by symmetry, and smaller balls lie in larger ones. So a bound for r e_1 holds within r.

    Args:
        iid: the law with k = 0.
        scale: sigma or b.
        k: power of the norm.
        shape: shape of Z.
    """

    power: int
    any_dimension = True

    def __init__(self, iid: Laplace | Gaussian, scale: float, k: int, shape: Sequence[int]):
        super().__init__()
        self.iid, self.scale, self.shape = iid, scale, _shape(shape)
        self.dim = math.prod(self.shape)
        self.k = _whole(k, self.dim - 1)
        self.gamma = (self.dim - k) / self.power  # y / power is of this Gamma law
        self.edges = self.power * gammaincinv(self.gamma, ndtr(np.linspace(-7.3, 7.3, COARSE + 1)))
        self.mass = self._masses(self.edges)

    @property
    def span(self) -> tuple[float, float]:
        return self.iid.span

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        """Draws of the law with k = 0, each multiplied by its S_1 ... S_m.

        Raises:
            RequestError: not the law's shape.
        """
        _check_shape(self.shape, shape)
        draws = self.iid.sample(source, n, shape)
        return draws.mul_(self._shrink(source, n).reshape(n, *[1] * len(shape)))

    def _shrink(self, source: Source | TrainingSource, n: int) -> Tensor:
        """S_1 ... S_m, (n,), from powers of uniforms: its power e is Beta((D - k) / e, k / e), a product of Betas."""
        count = len(range(self.dim - self.k, self.dim + 1 - self.power, self.power))
        draws = source.uniform(n, count)
        steps = torch.arange(count, dtype=draws.dtype, device=draws.device)
        return draws.pow_(1 / (self.dim - self.k + self.power * steps)).prod(1)

    def log_density(self, z: Tensor) -> Tensor:
        z = rows(z)
        _check_shape((self.dim,), z.shape[1:])
        s = (z / self.scale).norm(self.power, dim=1)
        radial = (self.gamma - 1) * math.log(self.power) + gammaln(self.gamma)
        singular = self.k * s.log() if self.k else 0.0
        return -singular - s**self.power / self.power - self._log_sphere() - radial - self.dim * math.log(self.scale)

    @abstractmethod
    def _log_sphere(self) -> float:
        """Logarithm of c with int f(||z||) dz = c int f(s) s^(D-1) ds."""

    def gauge(self, delta: Tensor) -> Tensor:
        """||delta|| / scale, in the law's norm."""
        return (rows(delta) / self.scale).norm(self.power, dim=1)

    def reach(self, size: ArrayLike):
        """scale * size: a radius in the law's norm."""
        return self.scale * np.asarray(size)

    def transfer(self, p: ArrayLike, size: ArrayLike):
        """lambda (p - M(ln lambda)) + 1 - M(-ln lambda), for some lambda: below T by 1e-5 for D = 784, 1e-3 for 2."""
        return np.vectorize(self._transfer, otypes=[float])(p, size)

    def _transfer(self, p: float, size: float) -> float:
        if size == 0:
            return p
        if not size < math.inf:
            return 0.0
        p = min(p, 1 - 1e-9)  # T rises with p, and p = 1 has no lambda
        level = _root(lambda level: self._near(level, size) - p)
        return max(math.exp(level) * (p - self._above(level, size)) + 1 - self._above(-level, size), 0.0)

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """Gauge below which transfer(pa) > 1 - transfer(1 - pb), rounded down; 0 where pa <= pb."""
        return np.vectorize(self._radius, otypes=[float])(pa, pb)

    def _radius(self, pa: float, pb: float) -> float:
        def surplus(size: float) -> float:
            kept = self._transfer(pa, size)
            return kept + (kept if pa == 1 - pb else self._transfer(1 - pb, size)) - 1

        if not pa > pb:
            return 0.0
        high = 1.0
        while surplus(high) > 0:
            high *= 2
        radius = brentq(surplus, 0.0, high, xtol=1e-6)
        while radius > 0 and not surplus(radius) > 0:
            radius = max(radius * (1 - 1e-5) - 1e-6, 0.0)
        return radius

    # -------------------------------------------------- M(l)

    def _above(self, level: float, size: float) -> float:
        """M(level) from above: coarse cells are split into as many as narrow the sum most."""
        gaps = np.sqrt(self.mass * np.abs(np.diff(self._most(self.edges, self.edges, level, size))))
        parts = 1 + (FINE * gaps / max(gaps.sum(), 1e-300)).astype(int)
        share = (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)) / np.repeat(parts, parts)
        low = np.repeat(self.edges[:-1], parts) + share * np.repeat(np.diff(self.edges), parts)
        edges = np.append(low, self.edges[-1])
        mass = self._masses(edges)
        return float(mass @ self._most(edges[:-1], edges[1:], level, size) + 1 - mass.sum()) + ROUNDING

    def _near(self, level: float, size: float) -> float:
        """M(level) by the middles of the coarse cells, to choose lambda."""
        middle = (self.edges[:-1] + self.edges[1:]) / 2
        return float(self.mass @ self._most(middle, middle, level, size))

    def _masses(self, edges: np.ndarray) -> np.ndarray:
        return np.diff(gammainc(self.gamma, edges / self.power))

    def _drop(self, low: np.ndarray, high: np.ndarray, level: float) -> np.ndarray:
        """Largest y - y* in the cells, where the density at y* is e^level times that at y; monotone in y."""
        return np.maximum(*(_drop(y, self.power * level, self.k) for y in (low, high)))

    @abstractmethod
    def _most(self, low: np.ndarray, high: np.ndarray, level: float, size: float) -> np.ndarray:
        """At least P(g(Z - delta) >= g(Z) - level | y) for every y of the cells low..high; delta = size * e_1."""

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, k={self.k}, shape={list(self.shape)}"


class MixedL1(_Radial):
    """Density proportional to ||z||_1^-k exp(-||z||_1 / b) in D coordinates: certifies l1 shifts.

    k = 0 is Laplace's law. Source: Zhang et al. 2020, Theorem 2.

    Args:
        b: scale, in the units of Z.
        k: a whole number from 0 to D - 1; ||Z||_1 / b is Gamma(D - k).
        shape: shape of Z, D numbers in all.

    Raises:
        RequestError: b not positive and finite, k out of range, or fewer than two coordinates.
    """

    norm, power, kinks = "l1", 1, (0.0,)

    def __init__(self, b: float, k: int, shape: Sequence[int]):
        iid = Laplace(b)
        super().__init__(iid, iid.b, k, shape)

    def _log_sphere(self) -> float:
        return self.dim * math.log(2) - float(gammaln(self.dim))

    def _most(self, low: np.ndarray, high: np.ndarray, level: float, size: float) -> np.ndarray:
        """||z - r e_1||_1 >= y* where |z_1 - r| - |z_1| >= -drop: z_1 <= (r + drop) / 2 for a drop between -r and r.

        |z_1| / y is Beta(1, D - 1), with a random sign.
        """
        drop = self._drop(low, high, level)
        beyond = np.clip(1 - (size + drop) / (2 * low), 0.0, 1.0) ** (self.dim - 1) / 2
        return np.where(drop >= size, 1.0, np.where(drop >= -size, 1 - beyond, 0.0))


class MixedL2(_Radial):
    """Density proportional to ||z||_2^-k exp(-||z||_2^2 / 2 sigma^2) in D coordinates: certifies l2 shifts.

    k = 0 is the normal law. Source: Zhang et al. 2020, Theorem 2.

    Args:
        sigma: scale, in the units of Z.
        k: a whole number from 0 to D - 1; ||Z||_2^2 / sigma^2 is chi-square with D - k degrees.
        shape: shape of Z, D numbers in all.

    Raises:
        RequestError: sigma not positive and finite, k out of range, or fewer than two coordinates.
    """

    norm, power = "l2", 2

    def __init__(self, sigma: float, k: int, shape: Sequence[int]):
        iid = Gaussian(sigma)
        super().__init__(iid, iid.scale, k, shape)

    def _shrink(self, source: Source | TrainingSource, n: int) -> Tensor:
        """For odd k one more factor, whose square is Beta((D - 1) / 2, 1/2): Bailey's Student from two uniforms."""
        shrink = super()._shrink(source, n)
        if self.k % 2:
            draws = source.uniform(2, n)
            size = draws[0].pow(2 / (self.dim - 1))
            shrink *= (size / (size + (1 - size) * (2 * math.pi * draws[1]).cos().square())).sqrt()
        return shrink

    def _log_sphere(self) -> float:
        return math.log(2) + self.dim / 2 * math.log(math.pi) - float(gammaln(self.dim / 2))

    def _most(self, low: np.ndarray, high: np.ndarray, level: float, size: float) -> np.ndarray:
        """||z - r e_1||_2^2 >= y* where z_1 <= (r^2 + drop) / 2r; (1 + z_1 / sqrt(y)) / 2 is a Beta variable."""
        above = size**2 + self._drop(low, high, level)
        cosine = np.clip(above / (2 * size * np.sqrt(np.where(above > 0, low, high))), -1.0, 1.0)
        return betainc((self.dim - 1) / 2, (self.dim - 1) / 2, (1 + cosine) / 2)


class MixedLinf(Law):
    """Density proportional to ||z||_inf^-k exp(-||z||_2^2 / 2 sigma^2) in D coordinates: certifies l_inf shifts.

    **The worst shift** of a ball is (r, ..., r) (Zhang et al. 2020, Theorem 3; our proof): as a function of one
    coordinate the density is even and falls on both sides. So int min(lambda pi_0, pi_delta) over that coordinate is
    made of lengths |I_t ∩ (J_t + delta_i)| of centred intervals, which fall with |delta_i|.

    **The bound is from draws, made once for all images.** For every lambda > 0, T(p) >= S(lambda) - lambda (1 - p) with
    S(lambda) = E min(lambda L(Z), 1), L the likelihood ratio of the shift (reflected as for l2). The minimum rises with
    L within [0, 1], so by Massart's one-sided inequality S is at least its mean over n draws less
    sqrt(ln(J / alpha) / 2n), for every lambda and J sizes of the shift at once, with probability 1 - alpha. The sizes
    are r sqrt(D) / sigma = 0.02, 0.04, ..., 5; others are rounded up to the next. The first use takes seconds, at
    ImageNet's size minutes.

    Z is sampled by ||z||_inf^-k = int_0^inf 1{||z||_inf < t^(-1/k)} dt: t has a density proportional to
    G(t) = P(max |z_i| < t^(-1/k)) of the normal law, and given t the coordinates are independent truncated normals.

    Args:
        sigma: scale, in the units of Z.
        k: a whole number from 0 to D / 2.
        shape: shape of Z, D numbers in all.
        draws: n.
        alpha: probability that `transfer` and `radius` are wrong at all, once for every certificate made with them.

    Raises:
        RequestError: sigma, k, shape, draws or alpha out of range.
    """

    norm = "linf"
    any_dimension = True

    def __init__(self, sigma: float, k: int, shape: Sequence[int], draws: int = 200_000, alpha: float = 1e-4):
        super().__init__()
        self.sigma, self.shape = positive("sigma", sigma), _shape(shape)
        self.dim = math.prod(self.shape)
        self.k = _whole(k, self.dim // 2)
        check_alpha(alpha)
        check_whole("noise", draws=(draws, 1000))
        self.draws, self.alpha = draws, alpha
        self.sizes = np.arange(1, 251) * 0.02 / math.sqrt(self.dim)
        self.error = math.sqrt(math.log(len(self.sizes) / alpha) / (2 * draws))

    @property
    def span(self) -> tuple[float, float]:
        return -9 * self.sigma, 9 * self.sigma

    def sample(self, source: Source | TrainingSource, n: int, shape: tuple[int, ...]) -> Tensor:
        """Normals truncated to [-cap, cap] by their quantiles.

        Raises:
            RequestError: not the law's shape.
        """
        _check_shape(self.shape, shape)
        draws = source.uniform(n, *shape).mul_(2).sub_(1)
        draws *= torch.erf(self._caps(source, n) / math.sqrt(2)).to(draws.dtype).reshape(n, *[1] * len(shape))
        largest = 1 - torch.finfo(draws.dtype).eps
        return draws.clamp_(-largest, largest).erfinv_().mul_(math.sqrt(2) * self.sigma)

    def _log_g(self, cap: np.ndarray) -> np.ndarray:
        """ln G at t = cap^-k: ln P(max |z_i| < cap) of D standard normals."""
        side = cap / math.sqrt(2)
        with np.errstate(divide="ignore"):
            return self.dim * np.where(side < 1, np.log(erf(side)), np.log1p(-erfc(side)))

    @functools.cached_property
    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Falling caps from 9, and ln G: the last is where t G(t) is e^-60 of its maximum and falls faster than 1/t."""
        caps = np.geomspace(9.0, 1e-30, 100_001)
        weight = self._log_g(caps) - self.k * np.log(caps)
        caps = np.geomspace(9.0, caps[weight > weight.max() - 60].min(), 2**14)
        return caps, self._log_g(caps)

    def _caps(self, source: Source | TrainingSource, n: int) -> Tensor:
        """n draws of t^(-1/k), float64: points under steps above G, kept where they lie under G."""
        if self.k == 0:
            return torch.full((n,), math.inf, dtype=torch.float64, device=source.device)
        right, log_g = self._steps
        top = np.append(0.0, log_g[:-1])  # ln G at the left end of a step, the first from t = 0
        share = np.append(0.0, (right[1:] / right[:-1]) ** self.k)  # t at the left end over that at the right end
        log_area = top - self.k * np.log(right) + np.log1p(-share)
        areas = np.cumsum(np.exp(log_area - log_area.max()))
        kept = np.empty(0)
        while len(kept) < n:
            place, along, height = source.uniform(3, n).double().cpu().numpy()
            step = np.minimum(np.searchsorted(areas, place * areas[-1], side="right"), len(areas) - 1)
            cap = right[step] * (1 - along * (1 - share[step])) ** (-1 / self.k)
            kept = np.append(kept, cap[height < np.exp(self._log_g(cap) - top[step])])
        return torch.from_numpy(kept[:n]).to(source.device)

    def log_density(self, z: Tensor) -> Tensor:
        z = rows(z) / self.sigma
        _check_shape((self.dim,), z.shape[1:])
        normal = -z.square().sum(1) / 2 - self.dim * math.log(self.sigma * math.sqrt(2 * math.pi))
        if self.k == 0:
            return normal
        caps, log_g = self._steps  # E max |z_i|^-k of the normal law: the area under G
        weight = log_g - self.k * np.log(caps)
        area = self.k * trapezoid(np.exp(weight - weight.max()), -np.log(caps))
        mean = np.logaddexp(np.log(area) + weight.max(), -self.k * math.log(9.0))
        return normal - self.k * z.abs().amax(1).log() - float(mean)

    def gauge(self, delta: Tensor) -> Tensor:
        """||delta||_inf / sigma."""
        return (rows(delta) / self.sigma).abs().amax(1)

    def reach(self, size: ArrayLike):
        """sigma * size: an l_inf radius."""
        return self.sigma * np.asarray(size)

    @functools.cached_property
    def _extremes(self) -> np.ndarray:
        """Sum, least and largest coordinate of the draws over sigma, (3, n): all that L depends on."""
        blocks, size = [], max(1, 2**20 // self.dim)
        for first in range(0, self.draws, size):
            source = Stream(0, 2**64 - 1).at("error-bound", first)  # of no image
            z = self.sample(source, min(size, self.draws - first), self.shape).flatten(1).div_(self.sigma)
            blocks.append(torch.stack([z.sum(1), *z.aminmax(dim=1)]))
        return torch.cat(blocks, 1).numpy()

    def _bounds(self, size: float) -> tuple[np.ndarray, np.ndarray]:
        """(lambda, S(lambda) from below) at a size of the grid; lambda = 1 / L of every draw."""
        total, least, largest = self._extremes
        before, after = np.maximum(largest, -least), np.maximum(largest - size, size - least)
        ratio = np.sort(np.exp(self.k * np.log(before / after) + size * total - self.dim * size**2 / 2))
        clipped = np.cumsum(ratio) / ratio + np.arange(len(ratio) - 1, -1, -1)
        return 1 / ratio, clipped / len(ratio) - self.error - ROUNDING

    def _left(self, p: float, step: int) -> float:
        """T(p) from below at the step-th size of the grid, 0 beyond it."""
        if step >= len(self.sizes):
            return 0.0
        levels, kept = self._bounds(self.sizes[step])
        return max(float((kept - levels * (1 - p)).max()), 0.0)

    def transfer(self, p: ArrayLike, size: ArrayLike):
        """max over lambda of S(lambda) - lambda (1 - p), at the next size of the grid; p without a shift."""

        def left(p: float, size: float) -> float:
            return p if size == 0 else self._left(p, int(np.searchsorted(self.sizes, size)))

        return np.vectorize(left, otypes=[float])(p, size)

    def radius(self, pa: ArrayLike, pb: ArrayLike):
        """Largest size of the grid with transfer(pa) > 1 - transfer(1 - pb); 0 where there is none."""

        def last(pa: float, pb: float) -> float:
            steps = range(len(self.sizes))
            kept = bisect.bisect_left(steps, True, key=lambda j: not self._left(pa, j) + self._left(1 - pb, j) > 1)
            return float(self.sizes[kept - 1]) if kept else 0.0

        return np.vectorize(last, otypes=[float])(pa, pb)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, k={self.k}, shape={list(self.shape)}, alpha={self.alpha:g}"


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple; refused unless it holds two numbers or more."""
    try:
        sizes = tuple(shape)
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    except TypeError:
        whole = False
    if not whole or math.prod(sizes) < 2:
        raise RequestError(f"shape must list whole numbers of product 2 or more, such as [1,28,28], got {shape!r}")
    return sizes


def _check_shape(mine: tuple[int, ...], asked: Sequence[int]) -> None:
    if tuple(asked) != mine:
        raise RequestError(f"this law is of shape {list(mine)}, not {list(asked)}; set noise.shape to the latter")


def _whole(k: int, most: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= most:
        raise RequestError(f"k must be a whole number from 0 to {most} for this shape, got {k!r}")
    return k


def _drop(y: np.ndarray, level: float, k: int) -> np.ndarray:
    """d with y - d + k ln(y - d) = y + k ln y - level, rounded up: Wright's omega, then one Newton step.

    The equation d - k ln(1 - d / y) = level is convex and rising in d: a Newton step never ends below its root.
    """
    up = OUTWARD * abs(level)
    if k == 0:
        return np.full_like(y, level + up)
    d = y - k * wrightomega((y - level) / k + np.log(y / k))
    with np.errstate(all="ignore"):
        exact = d - (d - k * np.log1p(-d / y) - level) / (1 + k / (y - d))
    return np.where(np.isfinite(exact), exact, max(level, 0.0)) + up


def _root(rising: Callable[[float], float]) -> float:
    """About where a rising function of ln lambda is 0, within the range that is searched."""
    low, high = LEVELS
    if rising(low) >= 0:
        return low
    if rising(high) <= 0:
        return high
    return brentq(rising, low, high, xtol=1e-10)
