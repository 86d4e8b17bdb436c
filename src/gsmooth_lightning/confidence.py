"""Statistics of votes: confidence bounds and tests, on which `plans` are built.

Lower bounds are rounded down, upper bounds up. Everything is vectorised over NumPy arrays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.signal import fftconvolve
from scipy.special import betaincc, betaln
from scipy.stats import beta, binom

from gsmooth_lightning.errors import RequestError

Counts = np.ndarray

EARLY = 0.02
"""Share of alpha that a sequential test spends before its last look."""

GUARD = 1e-11
"""Relative allowance for the rounding errors of SciPy's incomplete beta function, on the safe side."""

LEAST_ALPHA = 1e-50
"""Where SciPy's quantiles are right to GUARD: from 1e-79 down they are not, and bounds would fail more often."""


def check_alpha(alpha: float) -> None:
    """Raises RequestError unless alpha is a number between LEAST_ALPHA and 1/2."""
    if not isinstance(alpha, int | float) or not 0 < alpha < 0.5:
        raise RequestError(f"alpha must lie between 0 and 0.5, got {alpha}; 0.001 is usual")
    if alpha < LEAST_ALPHA:
        raise RequestError(f"alpha and its shares must be at least {LEAST_ALPHA:g}, got {alpha}; 0.001 is usual")


def check_unit(values: np.ndarray, name: str) -> None:
    """Raises RequestError unless all values lie between 0 and 1."""
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise RequestError(f"{name} needs values between 0 and 1")


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
    check_unit(values, "betting_upper")
    n = values.shape[-1]
    seen = np.arange(n)
    before = np.cumsum(values, -1) - values
    squares = np.cumsum(values**2, -1) - values**2
    mean = (before + 0.5) / (seen + 1)
    variance = np.maximum((squares + 0.25) / (seen + 1) - mean**2, 1e-6)
    bets = np.minimum(np.sqrt(2 * math.log(1 / alpha) / (variance * n)), 0.9)

    def reached(m: np.ndarray) -> np.ndarray:
        return np.log1p(bets * (m[..., None] - values)).sum(-1) >= math.log(1 / alpha)

    _, high = _bisect(reached, values.mean(-1), np.ones(values.shape[:-1]))
    return np.minimum(1.0, high * (1 + GUARD))


def betting_lower(values: np.ndarray, alpha: float) -> np.ndarray:
    """Lower confidence bound of the mean of independent values in [0, 1], along the last axis: the mirror image."""
    return np.maximum(0.0, 1 - betting_upper(1 - np.asarray(values, dtype=np.float64), alpha)) * (1 - GUARD)


def bernstein_lower(values: np.ndarray, alpha: float) -> np.ndarray:
    """Lower confidence bound of the mean of independent values in [0, 1], along the last axis.

    mean - sqrt(2 V log(2/alpha) / n) - 7 log(2/alpha) / (3 (n - 1)), V the sample variance (Maurer & Pontil 2009,
    Theorem 4, for 1 - X); 0 where that is negative, or n = 1.
    """
    check_alpha(alpha)
    values = np.asarray(values, dtype=np.float64)
    check_unit(values, "bernstein_lower")
    n, log = values.shape[-1], math.log(2 / alpha)
    if n < 2:
        return np.zeros(values.shape[:-1])
    margin = np.sqrt(2 * values.var(-1, ddof=1) * log / n) + 7 * log / (3 * (n - 1))
    return np.maximum(0.0, values.mean(-1) - margin) * (1 - GUARD)


def _bisect(reached: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> tuple[Any, Any]:
    """Brackets, for each entry, where `reached` turns true between low and high: (not yet there, there)."""
    for _ in range(50):
        middle = (low + high) / 2
        there = reached(middle)
        low, high = np.where(there, low, middle), np.where(there, middle, high)
    return low, high


# ---------------------------------------------------------------- confidence sequence


def anytime_lower(k: ArrayLike, n: ArrayLike, alpha: float) -> np.ndarray:
    """Lower confidence bound of a binomial p that may be looked at after every draw: P_p(ever above p) <= alpha.

    The largest p0 at which the likelihood ratio against p0, mixed over q ~ Beta(1, 1/2) truncated to (p0, 1],

        M(p0) = int_p0^1 (q/p0)^k ((1-q)/(1-p0))^(n-k) (1-q)^(-1/2) / (2 (1-p0)^(1/2)) dq,

    is at least 1/alpha (Robbins 1970; Howard et al. 2021). For every p <= p0 the path M(p0) is a nonnegative
    supermartingale that starts at 1, so that it ever reaches 1/alpha with probability at most alpha (Ville 1939).

    M falls in p0 wherever it exceeds 1, so that the p0 rejected at one look are an interval from 0: with h = 1/(2
    (1-p0)), d log M / dp0 = h (1 - 1/M) - (k - n p0) / (p0 (1-p0)). Were this >= 0, then (k - n p0) / p0 <= 1 - 1/M,
    and log M <= n KL(k/n, p0) <= (k - n p0)^2 / (n p0 (1-p0)) <= (k - n p0) / p0 <= 1 - 1/M < log M.

    k need not be whole: the bound that a larger n would bring at the same rate.
    """
    check_alpha(alpha)
    k, n = np.broadcast_arrays(np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64))
    a, b = k + 1, n - k + 0.5
    constant = math.log(0.5) + betaln(a, b)
    needed = math.log(1 / alpha) + 1e-13 * (n + 100)  # betaln is a difference of terms n log n, each good to 2^-52

    def unreached(p: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # k = 0: no bound but 0
            return ~(constant + np.log(betaincc(a, b, p)) - k * np.log(p) - b * np.log1p(-p) >= needed)

    low, _ = _bisect(unreached, np.zeros(k.shape), k / n)
    return low * (1 - GUARD)


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
    threshold: float, looks: tuple[int, ...], alpha: float, early: float = EARLY, futility: float = 1e-2
) -> Boundary:
    """Exact group-sequential binomial test of p <= threshold at level alpha.

    The share `early` of alpha is spent evenly on the early looks, the rest at the last. The boundary of look j is the
    smallest count whose probability of being reached there first, under p = threshold, fits what is still unspent up
    to look j; the law of the surviving count is carried from look to look by exact convolution. Futility (the count is
    improbably low, at level `futility`, even for p = threshold) only ever gives up, so it costs no alpha and is not
    credited to it.

    The probability of ever rejecting is nondecreasing in p (couple the draws), so p = threshold is the worst case.

    The defaults were measured by benchmarks/samples.py on Cohen et al.'s logs: against the binomial test of 1e5 draws
    they take 50.0 times fewer draws (median over logs and radii) and lose at most .026 points of certified accuracy;
    10 % of alpha spent early, as theory.md suggests, with futility at 1e-3 take 46.8 times fewer and lose up to .062.
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
