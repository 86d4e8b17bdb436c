"""Sampling plans: which draws are taken, when to stop, and what may be said then."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.stats import norm

from gsmooth_lightning.confidence import (
    EARLY,
    Boundary,
    Counts,
    anytime_lower,
    bernstein_lower,
    betting_lower,
    check_alpha,
    clopper_pearson_lower,
    clopper_pearson_upper,
    group_sequential,
    looks_up_to,
    two_bounds,
)
from gsmooth_lightning.errors import RequestError, check_whole

Sampler = Callable[[str, int, int], Generator[Any, Any, Counts]]
"""sampler(stage, first, last): a procedure (see `rounds`) that takes the draws first..last-1 of a stage. It returns the
number of votes for each class, (classes + 1,), or under soft votes every draw's votes, (last - first, classes + 1)."""

ROUND = 64
"""Blocks of soft votes that are held at once."""


@dataclass(frozen=True)
class Outcome:
    """What a plan learned from the votes for one image.

    Attributes:
        top: the class chosen on the n0 selection draws.
        selection, counts: votes of the selection and of the n estimation draws, added up. Their last entry is no class:
            the draws of nested smoothing that abstain, otherwise 0.
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

    soft: ClassVar[bool] = False
    """Whether the plan is for soft votes, numbers in [0, 1], and not for votes 0 and 1."""

    def __init__(self, n0: int, n: int, alpha: float):
        check_alpha(alpha)
        check_whole("sampling", n0=(n0, 1), n=(n, 1))
        self.n0, self.n, self.alpha = n0, n, alpha
        if (shown := self.ceiling) <= 0.5:
            self.n = math.ceil(math.log(alpha) / math.log(0.5)) + 1  # enough for Clopper-Pearson
            while self.ceiling <= 0.5:
                self.n += 1
            raise RequestError(
                f"n={n} draws can show at most pA > {shown:.3f} at alpha={alpha:g}, which certifies nothing; "
                f"take n={self.n} or more"
            )

    @property
    @abstractmethod
    def ceiling(self) -> float:
        """The largest pA that n votes for one class can show."""

    @abstractmethod
    def run(self, sample: Sampler, block: int, threshold: Callable[[float], float]) -> Generator[Any, Any, Outcome]:
        """The plan as a procedure. `threshold(radius)`: the pA that must be exceeded to certify that radius."""

    def check_votes(self, soft: bool) -> None:
        """Raises RequestError when the classifier's votes are not of the plan's kind."""
        if soft and not self.soft:
            raise RequestError("Clopper-Pearson and its kin count votes of 0 and 1; for soft votes use sampling=soft")
        if self.soft and not soft:
            raise RequestError("sampling=soft is for soft votes; for hard ones sampling=fixed has the tighter bound")

    def choose(self, sample: Sampler) -> Generator[Any, Any, tuple[int, Counts]]:
        """The class with most votes of the n0 selection draws, and these votes."""
        votes = yield from sample("select", 0, self.n0)
        self.check_votes(votes.ndim == 2)
        selection = votes.sum(0) if self.soft else votes
        return int(selection[:-1].argmax()), selection


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
        _, selection = yield from self.choose(sample)
        counts = yield from sample("estimate", 0, self.n)
        return self.conclude(selection, counts)

    def conclude(self, selection: Counts, counts: Counts) -> Outcome:
        """What the votes of n0 and of n draws show."""
        top = int(selection[:-1].argmax())
        if self.bounds == "two":
            pa, pb = two_bounds(counts, top, self.n, self.alpha)
        else:
            pa = float(clopper_pearson_lower(counts[top], self.n, self.alpha))
            pb = 1 - pa
        return Outcome(top, selection, counts, self.n, pa, pb)


class GroupSequential(SamplingPlan):
    """Decides the given radii, and stops as soon as all of them are decided.

    Radii, looks and boundaries are fixed before the first draw; a radius counts only if all smaller ones are certified
    too, so that the whole grid costs alpha once (fixed-sequence testing on one path). An image that fails the first
    radius abstains.

    Args:
        radii: target radii, increasing, in the unit of the threat. A leading 0 decides the prediction alone; an image
            that certifies nothing else may need all n draws for that.
        n0: draws that choose the class.
        n: most draws that are spent on an image.
        alpha: one minus the confidence of "certified up to the largest radius passed".
    """

    def __init__(self, radii: Sequence[float], n0: int = 100, n: int = 10_000, alpha: float = 1e-3):
        if isinstance(radii, (int, float, str)):
            raise RequestError(f"sampling.radii must be a list, such as [10,20,30], got {radii!r}")
        self.radii = tuple(float(r) for r in radii)
        if not self.radii or not self.radii[0] >= 0 or not all(a < b for a, b in itertools.pairwise(self.radii)):
            raise RequestError(f"sampling.radii must be increasing numbers, none below 0, got {list(radii)}")
        super().__init__(n0, n, alpha)

    @property
    def ceiling(self) -> float:
        return float(clopper_pearson_lower(self.n, self.n, (1 - EARLY) * self.alpha))

    def rules(self, looks: tuple[int, ...], threshold: Callable[[float], float]) -> list[Boundary]:
        """The test of each radius, up to the first that no votes could pass."""
        needed = itertools.takewhile(lambda p: p < 1, map(threshold, self.radii))
        return [group_sequential(p, looks, self.alpha) for p in needed]

    def run(self, sample: Sampler, block: int, threshold: Callable[[float], float]) -> Generator[Any, Any, Outcome]:
        top, selection = yield from self.choose(sample)
        looks = looks_up_to(self.n, block)
        return (yield from self.test(sample, top, selection, looks, self.rules(looks, threshold)))

    def test(
        self, sample: Sampler, top: int, selection: Counts, looks: Sequence[int], rules: Sequence[Boundary]
    ) -> Generator[Any, Any, Outcome]:
        """The radii decided for a class that was chosen on other draws, whose votes were `selection`."""
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


class ConfidenceSequence(SamplingPlan):
    """One bound that holds at all times (`anytime_lower`): stops early, and still states the full radius.

    An image is left when it is hopeless (even if its true rate were the largest plausible one, n draws would not show
    more than the prediction needs), or settled (z(pA) is within `tolerance` of what n draws would show at the present
    rate). Neither rule bears on the level: the bound holds whenever one stops. At n draws it costs .01 to .05 sigma
    against Clopper-Pearson.

    Args:
        n0: draws that choose the class.
        n: most draws that are spent on an image.
        alpha: one minus the confidence of the bound.
        tolerance: share of z(pA) that may be given away for stopping early.
    """

    def __init__(self, n0: int = 100, n: int = 100_000, alpha: float = 1e-3, tolerance: float = 0.1):
        if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
            raise RequestError(f"sampling.tolerance must lie between 0 and 1, got {tolerance!r}; 0.1 is usual")
        self.tolerance = tolerance
        super().__init__(n0, n, alpha)

    @property
    def ceiling(self) -> float:
        return float(anytime_lower(self.n, self.n, self.alpha))

    def run(self, sample: Sampler, block: int, threshold: Callable[[float], float]) -> Generator[Any, Any, Outcome]:
        top, selection = yield from self.choose(sample)
        counts, pa, needed = np.zeros_like(selection), 0.0, threshold(0.0)
        for seen, look in itertools.pairwise((0, *looks_up_to(self.n, block))):
            counts = counts + (yield from sample("estimate", seen, look))
            bound, likely, hopeful = self.outlook(counts[top], look)
            pa = max(pa, float(bound))
            if self.stops(bound, likely, hopeful, needed):
                break
        return Outcome(top, selection, counts, look, pa, 1 - pa)

    def outlook(self, count: np.ndarray, look: int) -> np.ndarray:
        """Three bounds for `count` votes in `look` draws: now, at n at the same rate, at n at the largest plausible."""
        plausible = clopper_pearson_upper(count, look, self.alpha)
        rates = np.stack([count / look, count / look, plausible])
        draws = np.array([look, self.n, self.n]).reshape(3, *[1] * np.ndim(count))
        return anytime_lower(rates * draws, draws, self.alpha)

    def stops(self, bound: np.ndarray, likely: np.ndarray, hopeful: np.ndarray, needed: float) -> np.ndarray:
        """Whether an image with this outlook is left, when its prediction needs pA > `needed`."""
        settled = (bound > needed) & (norm.ppf(bound) >= (1 - self.tolerance) * norm.ppf(likely))
        return settled | (hopeful <= needed)


class SoftVotes(SamplingPlan):
    """n0 draws choose the class, n other draws bound the mean of its soft votes, which lie in [0, 1].

    The theorems hold for the mean vote E F_A as they do for P(f = A); the votes of a draw add up to at most 1, so that
    pB = 1 - pA bounds the mean vote of every other class.

    Args:
        n0, n: draws.
        alpha: one minus the confidence of the bound.
        bound: "betting" (`betting_lower`), or "bernstein" (`bernstein_lower`), which is wider and does not depend on
            the order of the draws.
    """

    soft = True

    def __init__(self, n0: int = 100, n: int = 1000, alpha: float = 1e-3, bound: str = "betting"):
        if bound not in ("betting", "bernstein"):
            raise RequestError(f'sampling.bound must be "betting" or "bernstein", got {bound!r}')
        self.bound = bound
        super().__init__(n0, n, alpha)

    @property
    def ceiling(self) -> float:
        return float(self.lower(np.ones(self.n)))

    def lower(self, values: np.ndarray) -> np.ndarray:
        """The lower bound of the mean of some votes."""
        return (betting_lower if self.bound == "betting" else bernstein_lower)(values, self.alpha)

    def run(self, sample: Sampler, block: int, threshold: Callable[[float], float]) -> Generator[Any, Any, Outcome]:
        top, selection = yield from self.choose(sample)
        counts, values = np.zeros_like(selection), []
        for first in range(0, self.n, ROUND * block):  # the votes of all draws for all classes would not fit
            votes = yield from sample("estimate", first, min(first + ROUND * block, self.n))
            counts = counts + votes.sum(0)
            values.append(votes[:, top])
        pa = float(self.lower(np.concatenate(values)))
        return Outcome(top, selection, counts, self.n, pa, 1 - pa)
