"""Statistics of votes: confidence bounds, and the sampling plans built on them.

Lower bounds are rounded down, upper bounds up. Everything is vectorised over NumPy arrays.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.signal import fftconvolve
from scipy.stats import beta, binom

from gsmooth_lightning.errors import RequestError

Counts = np.ndarray
Sampler = Callable[[str, int, int], Generator[Any, Any, Counts]]
"""sampler(stage, first, last): a procedure (see `rounds`) that counts the votes of draws first..last-1 of a stage."""

GUARD = 1e-11
"""Relative allowance for the rounding errors of SciPy's incomplete beta function, on the safe side."""


def check_alpha(alpha: float) -> None:
    """Raises RequestError unless alpha is a number between 0 and 1/2."""
    if not isinstance(alpha, int | float) or not 0 < alpha < 0.5:
        raise RequestError(f"alpha must lie between 0 and 0.5, got {alpha}; 0.001 is usual")


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: float) -> np.ndarray:
    """One-sided lower bound of a binomial p: P_p(K >= k) <= alpha for every p at or below it. 0 at k = 0.

    BetaInv(alpha; k, n - k + 1) (Clopper & Pearson 1934).
    """
    check_alpha(alpha)
    k, n = np.asarray(k), np.asarray(n)
    quantile = beta.ppf(alpha, np.maximum(k, 1), np.maximum(n - k + 1, 1))
    return np.where(k <= 0, 0.0, quantile * (1 - GUARD))


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: float) -> np.ndarray:
    """One-sided upper bound of a binomial p: P_p(K <= k) <= alpha for every p at or above it. 1 at k = n."""
    check_alpha(alpha)
    k, n = np.asarray(k), np.asarray(n)
    quantile = beta.isf(alpha, np.maximum(k + 1, 1), np.maximum(n - k, 1))
    return np.where(k >= n, 1.0, np.minimum(1.0, quantile * (1 + GUARD)))


def two_bounds(counts: Counts, top: int, n: int, alpha: float) -> tuple[float, float]:
    """(pA_low, pB_up) from one set of n draws, each at alpha/2. `top` must have been fixed on other draws.

    pB_up bounds the largest other count of the same draws: it dominates the true runner-up's count, so no class needs
    to be named beforehand and alpha is not split over classes (theory.md section 3). pB_up never exceeds 1 - pA_low.
    """
    others = np.delete(counts, top)
    pa = float(clopper_pearson_lower(counts[top], n, alpha / 2))
    pb = float(clopper_pearson_upper(others.max(initial=0), n, alpha / 2))
    return pa, min(pb, 1 - pa)


def proportion_interval(k: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided Clopper-Pearson interval: the sampling error of a certified accuracy over n images."""
    alpha = (1 - level) / 2
    return clopper_pearson_lower(k, n, alpha), clopper_pearson_upper(k, n, alpha)


def betting_upper(values: np.ndarray, alpha: float) -> np.ndarray:
    """Upper confidence bound of the mean of independent values in [0, 1], along the last axis.

    The wealth prod_i (1 + l_i (m - X_i)) with bets l_i fixed by X_1..X_{i-1} is a nonnegative martingale at the true
    mean m, and grows with m; the bound is where it reaches 1/alpha (Waudby-Smith & Ramdas 2024, one-sided, with
    their predictable plug-in bets truncated at .9). Markov's inequality at the last draw gives the level.
    """
    check_alpha(alpha)
    values = np.asarray(values, dtype=np.float64)
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise RequestError("betting_upper needs values between 0 and 1")
    n = values.shape[-1]
    seen = np.arange(n)
    before = np.cumsum(values, -1) - values
    squares = np.cumsum(values**2, -1) - values**2
    mean = (before + 0.5) / (seen + 1)
    variance = np.maximum((squares + 0.25) / (seen + 1) - mean**2, 1e-6)
    bets = np.minimum(np.sqrt(2 * math.log(1 / alpha) / (variance * n)), 0.9)
    low, high = values.mean(-1), np.ones(values.shape[:-1])
    for _ in range(50):
        middle = (low + high) / 2
        wealth = np.log1p(bets * (middle[..., None] - values)).sum(-1)
        reached = wealth >= math.log(1 / alpha)
        high = np.where(reached, middle, high)
        low = np.where(reached, low, middle)
    return np.minimum(1.0, high * (1 + GUARD))


# ---------------------------------------------------------------- exact group-sequential test


def looks_up_to(n: int, block: int, first: int = 100, growth: float = 1.2) -> tuple[int, ...]:
    """Numbers of draws at which a sequential test looks: about first * growth^k, whole blocks, the last one n."""
    sizes = []
    size: float = first
    while size < n:
        whole = math.ceil(size / block) * block
        if whole < n:
            sizes.append(whole)
        size *= growth
    return (*sorted(set(sizes)), n)


@dataclass(frozen=True)
class Boundary:
    """Stopping rule of one hypothesis p <= threshold on a path of looks.

    At look j (looks[j] draws in all) the hypothesis is rejected when count >= reject[j], given up when
    count <= futile[j].
    """

    threshold: float
    looks: tuple[int, ...]
    reject: tuple[int, ...]
    futile: tuple[int, ...]


@lru_cache(maxsize=4096)
def group_sequential(
    threshold: float, looks: tuple[int, ...], alpha: float, early: float = 0.1, futility: float = 1e-3
) -> Boundary:
    """Exact group-sequential binomial test of p <= threshold at level alpha.

    A tenth of alpha (`early`) is spent evenly on the early looks, the rest at the last. The boundary of look j is the
    smallest count whose probability of being reached there first, under p = threshold, fits what is still unspent up
    to look j; the law of the surviving count is carried from look to look by exact convolution. Futility (the count is
    improbably low, at level `futility`, even for p = threshold) only ever gives up, so it costs no alpha and is not
    credited to it.

    The probability of ever rejecting is nondecreasing in p (couple the draws), so p = threshold is the worst case.
    """
    check_alpha(alpha)
    if not 0 < threshold < 1:
        raise RequestError(f"the threshold of a sequential test must lie between 0 and 1, got {threshold}")
    budget = alpha * early / max(1, len(looks) - 1)
    survivors = np.ones(1)  # law of the count of paths not yet rejected
    seen, spent = 0, 0.0
    reject, futile = [], []
    for j, look in enumerate(looks):
        step = look - seen
        increment = binom.pmf(np.arange(step + 1), step, threshold)
        survivors = np.maximum(fftconvolve(survivors, increment) if seen else increment, 0.0)
        allowed = alpha if look == looks[-1] else (j + 1) * budget
        # fftconvolve's error is about 1e-16 a term; what it may hide is taken from the budget
        tail = np.cumsum(survivors[::-1])[::-1] + 1e-15 * look
        fits = np.flatnonzero(spent + tail <= allowed)
        boundary = int(fits[0]) if fits.size else look + 1
        if boundary <= look:
            spent += float(tail[boundary])
            survivors = survivors[:boundary]
        seen = look
        reject.append(boundary)
        futile.append(int(binom.ppf(futility, look, threshold)) - 1)
    for j, look in enumerate(looks):  # giving up for certain: the last boundary is out of reach
        futile[j] = max(futile[j], reject[-1] - (looks[-1] - look) - 1)
    return Boundary(threshold, looks, tuple(reject), tuple(futile))


# ---------------------------------------------------------------- sampling plans


@dataclass(frozen=True)
class Outcome:
    """What a plan learned from the votes for one image.

    Attributes:
        top: the class chosen on the n0 selection draws.
        selection, counts: votes of the selection and of the n estimation draws. Their last entry stands for outputs
            that are no class, and is 0.
        pa, pb: bounds at the plan's alpha, or None from a sequential plan, which only decides its own radii.
        passed: the largest of its radii that a sequential plan certified, None when not even the first.
    """

    top: int
    selection: Counts
    counts: Counts
    n: int
    pa: float | None = None
    pb: float | None = None
    passed: float | None = None


class SamplingPlan(ABC):
    """Which draws to take next, when to stop, and what may be said then at level alpha."""

    def __init__(self, n0: int, n: int, alpha: float):
        check_alpha(alpha)
        for name, value in (("n0", n0), ("n", n)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"sampling.{name} must be a whole number of draws, at least 1, got {value!r}")
        self.n0, self.n, self.alpha = n0, n, alpha
        if self.ceiling <= 0.5:
            needed = math.ceil(math.log(alpha) / math.log(0.5)) + 1
            raise RequestError(
                f"n={n} draws can show at most pA > {self.ceiling:.3f} at alpha={alpha:g}, which certifies nothing; "
                f"take n={needed} or more"
            )

    @property
    @abstractmethod
    def ceiling(self) -> float:
        """The largest pA that n votes for one class can show."""

    @abstractmethod
    def run(self, sample: Sampler, block: int, threshold: Callable[[float], float]) -> Generator[Any, Any, Outcome]:
        """The plan as a procedure. `threshold(radius)`: the pA that must be exceeded to certify that radius."""


class FixedN(SamplingPlan):
    """n0 draws choose the class, n other draws bound its probability (Cohen et al. 2019, CERTIFY).

    Args:
        n0, n: draws.
        alpha: one minus the confidence of the bounds.
        bounds: "binary" takes pB = 1 - pA; "two" bounds the largest other count as well, both at alpha/2, which helps
            when pA is moderate.
    """

    def __init__(self, n0: int = 100, n: int = 1000, alpha: float = 1e-3, bounds: str = "binary"):
        if bounds not in ("binary", "two"):
            raise RequestError(f'sampling.bounds must be "binary" or "two", got {bounds!r}')
        self.bounds = bounds
        super().__init__(n0, n, alpha)

    @property
    def ceiling(self) -> float:
        return float(clopper_pearson_lower(self.n, self.n, self.alpha / (2 if self.bounds == "two" else 1)))

    def run(self, sample: Sampler, block: int, threshold: Callable[[float], float]) -> Generator[Any, Any, Outcome]:
        selection = yield from sample("select", 0, self.n0)
        top = int(selection.argmax())
        counts = yield from sample("estimate", 0, self.n)
        if self.bounds == "two":
            pa, pb = two_bounds(counts, top, self.n, self.alpha)
        else:
            pa = float(clopper_pearson_lower(counts[top], self.n, self.alpha))
            pb = 1 - pa
        return Outcome(top, selection, counts, self.n, pa, pb)


class GroupSequential(SamplingPlan):
    """Decides the radius 0 and the given radii, and stops as soon as all of them are decided.

    Radii, looks and boundaries are fixed before the first draw; a radius counts only if all smaller ones are certified
    too, so that the whole grid costs alpha once (fixed-sequence testing on one path).

    Args:
        radii: target radii, increasing, in the unit of the threat.
        n0: draws that choose the class.
        n: most draws that are spent on an image.
        alpha: one minus the confidence of "certified up to the largest radius passed".
    """

    def __init__(self, radii: Sequence[float], n0: int = 100, n: int = 10_000, alpha: float = 1e-3):
        if isinstance(radii, (int, float, str)):
            raise RequestError(f"sampling.radii must be a list, such as [10,20,30], got {radii!r}")
        self.radii = (0.0, *(float(r) for r in radii if r != 0))
        if len(self.radii) < 2 or any(b <= a for a, b in itertools.pairwise(self.radii)):
            raise RequestError(f"sampling.radii must be positive and increasing, got {list(radii)}")
        super().__init__(n0, n, alpha)

    @property
    def ceiling(self) -> float:
        return float(clopper_pearson_lower(self.n, self.n, 0.9 * self.alpha))

    def run(self, sample: Sampler, block: int, threshold: Callable[[float], float]) -> Generator[Any, Any, Outcome]:
        selection = yield from sample("select", 0, self.n0)
        top = int(selection.argmax())
        looks = looks_up_to(self.n, block)
        goals = [_round_up(threshold(radius)) for radius in self.radii]
        rules = [group_sequential(p, looks, self.alpha) for p in goals if p < 1]
        rejected = [False] * len(rules)
        alive = len(rules)  # from this hypothesis on nothing can count any more
        counts, seen = np.zeros_like(selection), 0
        for j, look in enumerate(looks):
            counts = counts + (yield from sample("estimate", seen, look))
            seen = look
            for h in range(alive):
                rejected[h] = rejected[h] or bool(counts[top] >= rules[h].reject[j])
            given_up = (h for h in range(alive) if not rejected[h] and counts[top] <= rules[h].futile[j])
            alive = next(given_up, alive)
            if all(rejected[:alive]):
                break
        passed = next((h for h in range(alive) if not rejected[h]), alive)
        return Outcome(top, selection, counts, seen, passed=self.radii[passed - 1] if passed else None)


def _round_up(p: float) -> float:
    """A threshold rounded up so that 1 - p keeps three digits: images with nearly equal error bounds share rules."""
    q = 1 - p
    if q <= 0:
        return 1.0
    scale = 10.0 ** (math.floor(math.log10(q)) - 2)
    return 1 - math.floor(q / scale) * scale
