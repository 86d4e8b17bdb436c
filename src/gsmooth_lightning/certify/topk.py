"""Top-k certificates: which classes stay among the k most probable ones (Jia et al. 2020).

Let T be the transfer function of a theorem (see `transfer`) and U(q) = 1 - T(1 - q) what an event of probability q can
become. A class l leaves the top k only if k others reach it (ties count against it). Of any k classes the t least
probable ones have together at most p_St, the sum of the t smallest among the k largest other probabilities; after the
attack they have at most U(p_St) together, and the least of them at most U(p_St) / t. So l stays while

    T(p_l) > min_{t <= k} U(min(p_St, 1 - p_l)) / t.

The published form sums upper bounds of single classes; here p_St is bounded as a whole and capped at 1 - p_l, which the
events' being disjoint allows (theory.md section 2). k = 1 is T(p_A) > U(p_B).
"""

import math

import numpy as np
from scipy.special import comb

from gsmooth_lightning.certify.transfer import MARGIN, Transfer, largest_where
from gsmooth_lightning.confidence import Counts, clopper_pearson_lower, clopper_pearson_upper
from gsmooth_lightning.errors import RequestError, check_whole

MOST_SETS = 10**6
"""Sets of t classes up to which their sum is bounded; beyond, only the cap 1 - p_l is used and no alpha is spent."""


def check_top_k(k: int, classes: int) -> None:
    """Raises RequestError unless k is a whole number from 1 to classes - 1."""
    check_whole("certify", top_k=(k, 1))
    if k >= classes:
        raise RequestError(
            f"certify.top_k={k} is not below the number of classes, {classes}: every class is always among them; take "
            f"{classes - 1} at most"
        )


def top_k_candidates(selection: Counts, k: int) -> np.ndarray:
    """The k classes with most votes of the n0 selection draws, (classes,) -> (k,); the lower class first on ties.

    Raises:
        RequestError: k below 1, or not below the number of classes.
    """
    check_top_k(k, len(selection))
    return np.argsort(-np.asarray(selection), kind="stable")[:k]


def top_k_bounds(counts: Counts, candidates: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(p, s): p[i] <= p_l for l = candidates[i], and s[i, t-1] >= p_St for l and t = 1..k; (k,) and (k, k).

    With probability at least 1 - alpha all of them hold together. p: Clopper-Pearson at alpha / 2k. s: Clopper-Pearson
    of the sum of the t smallest among the k largest other **counts**, at alpha / (2 T m_t), where T is the number of t
    that are bounded and m_t = min(C(k+1, t), k C(k, t)); at most 1 - p. For k = 1 these are `two_bounds`.

    Proof. Let B be the k truly most probable classes other than l, fixed but unknown. The t smallest counts in B sum to
    at most the t smallest of the k largest other counts, since sorted they are dominated one by one. They are the
    counts of some set A of t classes in B, whose probability is at least p_St, so that the bound fails only if the
    Clopper-Pearson bound of the binomial count of one such A does. For one l there are C(k, t) sets A; for all k
    candidates, at most k times as many, and all of them lie in the k + 1 most probable classes. No alpha is split over
    the other classes; a k-th largest count at full level would not do, because the smallest of several counts is
    biased downwards.

    Args:
        counts: (classes,) votes of the n estimation draws.
        candidates: k distinct classes, fixed on other draws.
        alpha: one minus the confidence of all bounds together.

    Raises:
        RequestError: soft votes, or k not below the number of classes.
    """
    counts, k = np.asarray(counts), len(candidates)
    check_top_k(k, len(counts))
    if not np.issubdtype(counts.dtype, np.integer):
        raise RequestError("top-k bounds count votes of 0 and 1, not soft votes; use votes=hard")
    n = counts.sum()
    p = clopper_pearson_lower(counts[candidates], n, alpha / (2 * k))
    sums = np.cumsum([np.sort(np.delete(counts, label))[-k:] for label in candidates], axis=1)
    t = np.arange(1, k + 1)
    sets = np.minimum(comb(k + 1, t), k * comb(k, t))
    used = np.flatnonzero(sets <= MOST_SETS)
    s = np.ones((k, k))
    for j in used:
        s[:, j] = clopper_pearson_upper(sums[:, j], n, alpha / float(2 * len(used) * sets[j]))
    return p, np.minimum(s, 1 - p[:, None])


def top_k_radius(p: float, s: np.ndarray, transfer: Transfer, reach: float = math.inf) -> float | None:
    """Largest radius at which T(p) > U(s_t) / t for some t; rounded down. None: not even at 0.

    Args:
        p, s: lower bound of p_l, and (k,) upper bounds of p_S1, ..., p_Sk, at most 1 - p.
        transfer: T, as (probabilities, radius) -> what is left of them.
        reach: the threat's largest radius.
    """
    t = np.arange(1, len(s) + 1)

    def surplus(radius: float) -> float:
        left = transfer(np.append(p, 1 - s), radius)
        return float(left[0] - ((1 - left[1:]) / t).min()) - MARGIN

    return largest_where(surplus, reach)


def top_k_radii(
    counts: Counts, candidates: np.ndarray, alpha: float, transfer: Transfer, reach: float = math.inf
) -> list[float | None]:
    """For each candidate, the radius within which it stays among the k = len(candidates) most probable classes.

    All of them hold together with probability at least 1 - alpha. None: not certified even without an attack.

    Args:
        counts: (classes,) votes of n draws, n fixed before them.
        candidates: of `top_k_candidates`.
        alpha: one minus the confidence.
        transfer, reach: the theorem's T, and the threat's largest radius.
    """
    return [
        top_k_radius(float(p), s, transfer, reach)
        for p, s in zip(*top_k_bounds(counts, candidates, alpha), strict=True)
    ]
