"""Confidence bounds and sampling plans: exact coverage by enumeration and exact dynamic programming, no simulation."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import beta, binom, multinomial, norm

from gsmooth_lightning.confidence import (
    LEAST_ALPHA,
    betting_upper,
    clopper_pearson_lower,
    clopper_pearson_upper,
    group_sequential,
    looks_up_to,
    proportion_interval,
    two_bounds,
)
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import FixedN, GroupSequential

# ---------------------------------------------------------------- Clopper-Pearson

SIZES = (1, 2, 3, 10, 57, 400, 2000)
ALPHAS = (0.1, 0.05, 1e-3, 1e-4)


def probabilities(n):
    """Many p: a grid, the extremes, and thresholds that certificates use."""
    return np.concatenate([np.linspace(0, 1, 201), [1e-6, 1 / n, 1 - 1 / n, 0.84, 0.999, 1 - 1e-6]])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_clopper_pearson_covers(n, alpha):
    """sum_k P_p(K = k) 1[lower(k) > p] <= alpha for every p, and the mirror image; every k is enumerated."""
    k = np.arange(n + 1)
    lower, upper = clopper_pearson_lower(k, n, alpha), clopper_pearson_upper(k, n, alpha)
    for p in probabilities(n):
        mass = binom.pmf(k, n, p)
        assert mass[lower > p].sum() <= alpha
        assert mass[upper < p].sum() <= alpha


@pytest.mark.parametrize("n", [1, 7, 100, 2000])
@pytest.mark.parametrize("alpha", [0.05, 1e-3])
def test_clopper_pearson_covers_at_its_own_values(n, alpha):
    """At p = lower(k), the worst case, P_p(K >= k) <= alpha in 40 digits, and hardly less: the bound is not slack.

    The upper bound is checked as 1 - upper(n - k), a lower bound for the failures.
    """
    with mpmath.workdps(40):
        for k in sorted({1, n // 2, n - 1, n} - {0}):
            for bound in (
                mpmath.mpf(float(clopper_pearson_lower(k, n, alpha))),
                1 - mpmath.mpf(float(clopper_pearson_upper(n - k, n, alpha))),
            ):
                term = mpmath.binomial(n, k) * bound**k * (1 - bound) ** (n - k)
                tail = term
                for i in range(k, n):  # P(K = i + 1) from P(K = i)
                    term *= bound / (1 - bound) * (n - i) / (i + 1)
                    tail += term
                assert tail <= alpha
                assert tail >= alpha * (1 - 1e-4)


@pytest.mark.parametrize("n", [1, 10, 100, 1000])
def test_clopper_pearson_against_bisection(n):
    """lower(k) solves binom.sf(k-1, n, p) = alpha, upper(k) solves binom.cdf(k, n, p) = alpha; rounded outwards."""
    alpha = 1e-3
    for k in sorted({1, n // 3, n // 2, n - 1, n} - {0}):
        root = brentq(lambda p, k=k: binom.sf(k - 1, n, p) - alpha, 1e-12, 1 - 1e-15, xtol=1e-24, rtol=1e-15)
        lower = float(clopper_pearson_lower(k, n, alpha))
        assert lower <= root
        assert lower == pytest.approx(root, rel=1e-10)
    for k in sorted({0, n // 3, n // 2, n - 1} - {n}):
        root = brentq(lambda p, k=k: binom.cdf(k, n, p) - alpha, 1e-15, 1 - 1e-15, xtol=1e-24, rtol=1e-15)
        upper = float(clopper_pearson_upper(k, n, alpha))
        assert upper >= root
        assert upper == pytest.approx(root, rel=1e-10)


def test_clopper_pearson_is_monotone_with_exact_ends():
    """0 at k = 0, alpha^(1/n) at k = n (Cohen's ceiling), 1 at k = n above; increasing in k and in alpha."""
    n = 1000
    k = np.arange(n + 1)
    lower, upper = clopper_pearson_lower(k, n, 1e-3), clopper_pearson_upper(k, n, 1e-3)
    assert lower[0] == 0
    assert lower[-1] == pytest.approx(1e-3 ** (1 / n), rel=1e-10)
    assert lower[-1] <= 1e-3 ** (1 / n)
    assert upper[-1] == 1
    assert upper[0] == pytest.approx(1 - 1e-3 ** (1 / n), rel=1e-9)
    assert (np.diff(lower) > 0).all()
    assert (np.diff(upper) > 0).all()
    assert (lower < k / n + 1e-15).all()
    assert (upper > k / n - 1e-15).all()
    assert (clopper_pearson_lower(k[1:], n, 1e-2) > lower[1:]).all()


def test_ceilings_of_the_theory():
    """z(alpha^(1/n)) at alpha = .001: 1.131 (n=50), 1.50 (100), 2.46 (1e3), 3.20 (1e4), 3.81 (1e5)."""
    for n, z in ((50, 1.131), (100, 1.50), (1000, 2.46), (10_000, 3.20), (100_000, 3.81)):
        assert norm.ppf(FixedN(n=n, alpha=1e-3).ceiling) == pytest.approx(z, abs=0.006)


def test_clopper_pearson_mirror_and_interval():
    """upper(k) = 1 - lower(n - k); the two-sided interval takes half of the level on each side."""
    n, k = 90, np.arange(91)
    mirrored = 1 - clopper_pearson_lower(n - k, n, 0.01)
    np.testing.assert_allclose(clopper_pearson_upper(k, n, 0.01), mirrored, atol=1e-10)
    low, high = proportion_interval(30, 90)
    assert float(low) == pytest.approx(beta.ppf(0.025, 30, 61), rel=1e-9)
    assert float(high) == pytest.approx(beta.ppf(0.975, 31, 60), rel=1e-9)


@pytest.mark.parametrize(("k", "n"), [(2, 10), (6, 10), (2, 1000), (5, 485180), (9990, 10_000)])
def test_quantiles_hold_down_to_the_least_alpha(k, n):
    """At p = lower(k), P_p(K >= k) <= alpha in 40 digits for alpha = 1e-50. At 1e-200, which is refused, SciPy's
    quantile for two of ten is 1e50 times too large."""
    with mpmath.workdps(40):
        p = mpmath.mpf(float(clopper_pearson_lower(k, n, LEAST_ALPHA)))
        assert mpmath.betainc(k, n - k + 1, 0, p, regularized=True) <= LEAST_ALPHA


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.5, 1.0, math.nan, 1e-60, 1e-200])
def test_alpha_out_of_range(alpha):
    for function in (clopper_pearson_lower, clopper_pearson_upper):
        with pytest.raises(RequestError, match="alpha"):
            function(1, 2, alpha)
    with pytest.raises(RequestError, match="alpha"):
        betting_upper(np.zeros(3), alpha)
    with pytest.raises(RequestError, match="alpha"):
        group_sequential(0.5, (10,), alpha)
    with pytest.raises(RequestError, match="alpha"):
        FixedN(alpha=alpha)
    with pytest.raises(RequestError, match="alpha"):
        GroupSequential([1.0], alpha=alpha)


# ---------------------------------------------------------------- two bounds

LAWS = [(0.5, 0.3, 0.2), (0.4, 0.3, 0.3), (0.8, 0.1, 0.1), (0.34, 0.33, 0.33), (0.2, 0.5, 0.3), (0.6, 0.4, 0.0)]


def outcomes(n):
    """All counts of n draws over three classes."""
    return np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)])


@pytest.mark.parametrize("n", [5, 20, 45])
@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_two_bounds_cover_jointly(n, alpha):
    """P(pA_low > p_A or pB_up < max_{c != A} p_c) <= alpha for a class A fixed beforehand: all counts enumerated."""
    counts = outcomes(n)
    bounds = np.array([two_bounds(row, 0, n, alpha) for row in counts])
    assert (bounds.sum(1) <= 1 + 1e-12).all()  # pB_up never exceeds 1 - pA_low
    for law in LAWS:
        mass = multinomial.pmf(counts, n, law)
        assert mass.sum() == pytest.approx(1, abs=1e-9)
        failed = (bounds[:, 0] > law[0]) | (bounds[:, 1] < max(law[1:]))
        assert mass[failed].sum() <= alpha


def test_two_bounds_formula():
    """Each at alpha/2; pB from the largest other count."""
    pa, pb = two_bounds(np.array([10, 600, 50, 40, 0]), 1, 700, 0.002)
    assert pa == float(clopper_pearson_lower(600, 700, 0.001))
    assert pb == float(clopper_pearson_upper(50, 700, 0.001))


def test_runner_up_selected_and_bounded_alone_is_caught():
    """The canary of two_bounds: naming the runner-up on n0 draws and bounding only its probability fails too often.

    P(fail) = sum_c P(c selected on n0) P(Binomial(n, p_c) has upper bound < max_{c != A} p_c), theory section 3.
    """
    alpha, n0, n, law = 0.05, 10, 200, (0.6, 0.215, 0.185)
    selection = outcomes(n0)
    mass = multinomial.pmf(selection, n0, law)
    k = np.arange(n + 1)
    upper = clopper_pearson_upper(k, n, alpha)
    error = sum(
        mass[1 + selection[:, 1:].argmax(1) == c].sum() * binom.pmf(k, n, law[c])[upper < law[1]].sum() for c in (1, 2)
    )
    assert error > 1.3 * alpha


# ---------------------------------------------------------------- betting


def crossing(values, alpha):
    """The bound of Waudby-Smith & Ramdas, one-sided, with plain loops and a root finder."""
    n = len(values)
    bets = []
    for i in range(n):
        past = values[:i]
        mean = (0.5 + sum(past)) / (i + 1)
        variance = max((0.25 + sum(v * v for v in past)) / (i + 1) - mean**2, 1e-6)
        bets.append(min(math.sqrt(2 * math.log(1 / alpha) / (variance * n)), 0.9))

    def wealth(m):
        return math.prod(1 + bet * (m - v) for bet, v in zip(bets, values, strict=True)) - 1 / alpha

    return brentq(wealth, 0, 1, xtol=1e-14) if wealth(0) < 0 < wealth(1) else float(wealth(1) < 0), bets


@pytest.mark.parametrize("n", [1, 5, 12])
@pytest.mark.parametrize("alpha", [0.1, 0.02])
def test_betting_upper_covers_bernoulli(n, alpha):
    """All 2^n sequences (the bound depends on their order): P(bound < mean) <= alpha."""
    sequences = np.array(list(itertools.product((0.0, 1.0), repeat=n)))
    bounds = betting_upper(sequences, alpha)
    ones = sequences.sum(1)
    for mean in (0.01, 0.1, 0.2, 0.24, 0.3, 0.5, 0.7, 0.9, 0.99):
        assert (mean**ones * (1 - mean) ** (n - ones))[bounds < mean].sum() <= alpha
    if n == 12:  # and it says something: no ones at all, (1 + .9 m)^12 = 1/alpha
        assert bounds[0] == pytest.approx(((1 / alpha) ** (1 / 12) - 1) / 0.9, rel=1e-6)
        assert bounds[0] < 0.5


def test_betting_upper_covers_three_values():
    """Values 0, 1/4, 1 with unequal weights, all 3^8 sequences: P(bound < mean) <= alpha."""
    support, alpha = np.array([0.0, 0.25, 1.0]), 0.1
    index = np.array(list(itertools.product(range(3), repeat=8)))
    bounds = betting_upper(support[index], alpha)
    for weights in ([0.9, 0.05, 0.05], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.7, 0.0, 0.3]):
        mass = np.prod(np.array(weights)[index], 1)
        assert mass.sum() == pytest.approx(1)
        assert mass[bounds < support @ weights].sum() <= alpha


def test_betting_wealth_is_a_martingale():
    """E prod_i (1 + l_i (m - X_i)) = 1 at the true mean m (so that Markov gives alpha), with the bets as documented."""
    m, n = 0.3, 9
    total = 0.0
    for values in itertools.product((0.0, 1.0), repeat=n):
        _, bets = crossing(values, 0.05)
        chance = m ** sum(values) * (1 - m) ** (n - sum(values))
        total += chance * math.prod(1 + bet * (m - v) for bet, v in zip(bets, values, strict=True))
    assert total == pytest.approx(1, rel=1e-12)


def test_betting_upper_is_where_the_wealth_reaches_one_over_alpha():
    """Against the plain-loop version; never below it, also along the last axis of an array."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.beta(0.2, 3, (6, 80)), rng.integers(0, 2, (3, 80)) * 1.0, np.zeros((1, 80))])
    bounds = betting_upper(rows, 1e-3)
    for row, bound in zip(rows, bounds, strict=True):
        expected, _ = crossing(list(row), 1e-3)
        assert bound >= max(expected, row.mean()) - 1e-15
        assert bound == pytest.approx(max(expected, row.mean()), rel=1e-9)
    np.testing.assert_array_equal(bounds, [betting_upper(row, 1e-3) for row in rows])


@pytest.mark.parametrize("bad", [-1e-9, 1 + 1e-9, math.nan, math.inf])
def test_betting_upper_refuses_values_outside(bad):
    with pytest.raises(RequestError, match="between 0 and 1"):
        betting_upper(np.array([0.5, bad, 0.2]), 0.05)


# ---------------------------------------------------------------- the exact group-sequential test


def rejection_probability(looks, reject, p, futile=None):
    """P_p(some look j has count >= reject[j], without a stop for futility before): plain dynamic programming."""
    alive, seen, rejected = np.ones(1), 0, 0.0
    for j, look in enumerate(looks):
        pmf = binom.pmf(np.arange(look - seen + 1), look - seen, p)
        law = np.zeros(look + 1)
        for count, mass in enumerate(alive):
            if mass > 0:
                law[count : count + len(pmf)] += mass * pmf
        rejected += law[reject[j] :].sum()
        law[reject[j] :] = 0
        if futile is not None:
            law[: max(0, futile[j] + 1)] = 0
        alive, seen = law, look
    return rejected


LOOKS = looks_up_to(2000, 50)
LEVELS = [(p, alpha) for p in (0.5, 0.69, 0.84, 0.933, 0.977) for alpha in (1e-3, 0.05)]


def test_looks():
    """Increasing multiples of the block of about first * growth^k, then n; one look when n is small."""
    assert looks_up_to(100_000, 1) == (*sorted({math.ceil(100 * 1.2**k) for k in range(38)}), 100_000)
    assert looks_up_to(50, 64) == (50,)
    assert looks_up_to(100, 64) == (100,)
    for n, block in ((2000, 64), (10_000, 128), (1001, 2)):
        looks = looks_up_to(n, block)
        assert looks[-1] == n
        assert all(a < b for a, b in itertools.pairwise(looks))
        assert all(look % block == 0 for look in looks[:-1])
    assert len(LOOKS) >= 12


@pytest.mark.parametrize(("threshold", "alpha"), LEVELS)
def test_sequential_test_spends_alpha_and_no_more(threshold, alpha):
    """P(ever reject) at p = threshold is at most alpha, with and without the futility stop, and by look j at most what
    may be spent until then; any boundary lowered by a single vote would break that."""
    rule = group_sequential(threshold, LOOKS, alpha)
    error = rejection_probability(rule.looks, rule.reject, threshold)
    # measured: .950 .987 .847 .940 .882 of alpha = 1e-3, .942 .949 .917 .939 .777 of .05; the count is discrete
    assert 0.77 * alpha <= error <= alpha
    assert rejection_probability(rule.looks, rule.reject, threshold, rule.futile) <= error
    budgets = [0.02 * alpha * (j + 1) / (len(LOOKS) - 1) for j in range(len(LOOKS) - 1)]
    for j, budget in enumerate((*budgets, alpha)):
        assert rejection_probability(LOOKS[: j + 1], rule.reject[: j + 1], threshold) <= budget
        if rule.reject[j] <= LOOKS[j]:
            lowered = (*rule.reject[:j], rule.reject[j] - 1)
            assert rejection_probability(LOOKS[: j + 1], lowered, threshold) > budget


@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.99, 0.997, 0.9999])
@pytest.mark.parametrize("looks", [(7,), (5, 9, 30), (100, 101, 102, 400), LOOKS])
def test_sequential_test_keeps_its_level_at_extreme_thresholds(threshold, looks):
    """Where the discreteness leaves alpha over, or no count can reject at some looks, the level still holds."""
    for alpha in (1e-3, 0.2):
        rule = group_sequential(threshold, looks, alpha)
        assert rejection_probability(looks, rule.reject, threshold) <= alpha
        assert rejection_probability(looks, rule.reject, threshold, rule.futile) <= alpha


@pytest.mark.parametrize("threshold", [0.5, 0.84])
def test_sequential_test_is_monotone_in_p_and_has_power(threshold):
    """P_p(ever reject) grows with p; far above the threshold it is nearly 1, and futility costs nearly nothing."""
    alpha = 1e-3
    rule = group_sequential(threshold, LOOKS, alpha)
    grid = threshold + np.array([-0.1, -0.02, 0.0, 0.02, 0.04, 0.06])
    power = [rejection_probability(LOOKS, rule.reject, p) for p in grid]
    assert all(a < b for a, b in itertools.pairwise(power))
    assert power[2] <= alpha
    assert power[-1] > 0.98
    for p, free in zip(grid[3:], power[3:], strict=True):
        assert free - rejection_probability(LOOKS, rule.reject, p, rule.futile) < 2e-3
    # Clopper-Pearson at the full n is the most powerful of them; the looks cost little
    fixed = binom.sf(np.flatnonzero(clopper_pearson_lower(np.arange(2001), 2000, alpha) > threshold)[0] - 1, 2000, grid)
    assert (fixed - power < 0.005).all()


def test_one_look_is_the_binomial_test():
    """Without early looks: the smallest k with P(K >= k) <= alpha, that is Clopper-Pearson's."""
    for n, p in ((500, 0.7), (120, 0.5), (1000, 0.95)):
        rule = group_sequential(p, (n,), 0.01)
        assert rule.reject[0] == binom.isf(0.01, n, p) + 1
        assert rule.reject[0] == np.flatnonzero(clopper_pearson_lower(np.arange(n + 1), n, 0.01) > p)[0]
        assert rule.futile[0] == rule.reject[0] - 1


def test_certain_futility_cannot_be_undone():
    """A count at or below futile[j] leaves the last boundary out of reach, or has chance below the stated level."""
    rule = group_sequential(0.84, LOOKS, 1e-3)
    for look, futile in zip(rule.looks, rule.futile, strict=True):
        beyond_reach = futile + (rule.looks[-1] - look) < rule.reject[-1]
        assert beyond_reach or binom.cdf(futile, look, 0.84) < 1e-2 <= binom.cdf(futile + 1, look, 0.84)


def naive_boundaries(looks, alpha, threshold):
    """What peeking does: at each look the smallest count whose Clopper-Pearson bound at alpha exceeds the threshold."""
    return [
        int(np.flatnonzero(np.append(clopper_pearson_lower(np.arange(n + 1), n, alpha), 1) > threshold)[0])
        for n in looks
    ]


def test_canary_peeking_has_several_times_the_error():
    """Recomputing the bound at the same alpha after each of 25 batches of 400: true error 7.59e-3 at p* = .84."""
    alpha, looks = 1e-3, tuple(range(400, 10_001, 400))
    error = rejection_probability(looks, naive_boundaries(looks, alpha, 0.84), 0.84)
    assert error == pytest.approx(7.59e-3, rel=1e-3)
    ours = group_sequential(0.84, looks, alpha)
    assert 0.8 * alpha <= rejection_probability(looks, ours.reject, 0.84) <= alpha


@pytest.mark.parametrize(("threshold", "alpha"), LEVELS)
def test_canary_peeking_at_our_looks(threshold, alpha):
    """The checker that passes `group_sequential` fails peeking on the same looks (3.1 to 6.8 times alpha)."""
    assert rejection_probability(LOOKS, naive_boundaries(LOOKS, alpha, threshold), threshold) > 2 * alpha


def test_boundaries_of_a_long_path():
    """33 looks up to 1e5 for six thresholds; the last boundary is that of the fixed test, up to the spent 2 %."""
    looks = looks_up_to(100_000, 128)
    assert len(looks) == 33
    for threshold in (0.5, 0.69, 0.84, 0.933, 0.977, 0.9987):
        rule = group_sequential(threshold, looks, 1e-3)
        assert len(rule.reject) == len(rule.futile) == len(looks)
        assert binom.isf(1e-3, 100_000, threshold) + 1 <= rule.reject[-1] <= binom.isf(0.98e-3, 100_000, threshold) + 1
        assert all(f < r for f, r in zip(rule.futile, rule.reject, strict=True))


def test_sequential_threshold_out_of_range():
    for threshold in (0.0, 1.0, -0.2, 1.3, math.nan):
        with pytest.raises(RequestError, match="threshold"):
            group_sequential(threshold, (100,), 1e-3)


# ---------------------------------------------------------------- plans


def finish(procedure):
    """Runs a procedure whose jobs are all empty."""
    with pytest.raises(StopIteration) as ended:
        next(procedure)
    return ended.value.value


class NeedsMore(Exception):
    """The plan asks for a look that the given path does not have."""


def votes(path, top=0):
    """A sampler without jobs: the selection chooses `top`, the k-th look brings path[k] votes for class 0."""
    left = iter(path)

    def sample(stage, first, last):
        n = last - first
        if stage == "select":
            return np.bincount([top], minlength=4) * n
        k = next(left, None)
        if k is None:
            raise NeedsMore
        return np.array([k, n - k, 0, 0])
        yield

    return sample


def test_fixed_plan():
    """Selection and estimation draws are counted apart; binary and two bounds."""
    outcome = finish(FixedN(10, 200, 0.01).run(votes([190]), 64, None))
    assert (outcome.top, outcome.n, outcome.passed) == (0, 200, None)
    assert outcome.pa == float(clopper_pearson_lower(190, 200, 0.01))
    assert outcome.pb == 1 - outcome.pa
    np.testing.assert_array_equal(outcome.selection, [10, 0, 0, 0])
    np.testing.assert_array_equal(outcome.counts, [190, 10, 0, 0])
    two = finish(FixedN(10, 200, 0.01, bounds="two").run(votes([150], top=1), 64, None))
    assert (two.pa, two.pb) == two_bounds(np.array([150, 50, 0, 0]), 1, 200, 0.01)
    assert two.pa < 0.5  # the class of the selection is kept although another one leads


THRESHOLDS = {0.0: 0.5, 1.0: 0.62, 2.0: 0.75, 3.0: 0.86}


def all_paths(plan, block):
    """What the plan concludes for every path of counts: [(path, steps, passed)], explored look by look."""
    looks = looks_up_to(plan.n, block)
    steps = [b - a for a, b in itertools.pairwise((0, *looks))]
    conclusions, open_paths = [], [()]
    while open_paths:
        path = open_paths.pop()
        try:
            outcome = finish(plan.run(votes(path), block, THRESHOLDS.__getitem__))
            assert outcome.n == looks[len(path) - 1]
            conclusions.append((path, outcome.passed))
        except NeedsMore:
            open_paths += [(*path, k) for k in range(steps[len(path)] + 1)]
    return steps, conclusions


@pytest.mark.parametrize("radii", [(0.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (2.0,)])
def test_grid_of_radii_has_family_wise_error_alpha(radii):
    """Every path of counts at the looks 100, 120, 140: P_p(passed >= r) <= alpha whenever p <= threshold(r).

    No simulation: the conclusions of the plan itself are enumerated and weighted with their probabilities.
    """
    alpha = 0.05
    steps, conclusions = all_paths(GroupSequential(radii, n0=5, n=140, alpha=alpha), block=2)
    assert steps == [100, 20, 20]
    value = np.array([-1.0 if passed is None else passed for _, passed in conclusions])
    largest = {}
    for p in sorted({*THRESHOLDS.values(), *np.linspace(0.3, 0.95, 27)}):
        pmf = [binom.pmf(np.arange(step + 1), step, p) for step in steps]
        mass = np.array([math.prod(pmf[j][k] for j, k in enumerate(path)) for path, _ in conclusions])
        assert mass.sum() == pytest.approx(1, abs=1e-12)  # every path is there, once
        wrong = [radius for radius in radii if THRESHOLDS[radius] >= p]
        if wrong:
            error = mass[value >= min(wrong)].sum()
            assert error <= alpha
            largest[p] = error
        if p > 0.94:
            assert mass[value == radii[-1]].sum() > 0.5
    assert max(largest.values()) > 0.5 * alpha  # the level is used


def test_grid_agrees_with_the_single_hypotheses():
    """passed >= r for the paths on which all smaller hypotheses, and this one, cross their own boundaries."""
    plan = GroupSequential(list(THRESHOLDS), n0=5, n=2000, alpha=1e-3)
    looks = looks_up_to(2000, 50)
    rules = [group_sequential(p, looks, 1e-3) for p in THRESHOLDS.values()]
    rng = np.random.default_rng(1)
    seen = set()
    for p in np.linspace(0.45, 0.93, 60):
        path = rng.binomial(np.diff((0, *looks)), p)
        outcome = finish(plan.run(votes(path), 50, THRESHOLDS.__getitem__))
        used = looks.index(outcome.n) + 1
        np.testing.assert_array_equal(outcome.counts[0], path[:used].sum())
        totals = path.cumsum()[:used]
        crossed = [bool((totals >= rule.reject[:used]).any()) for rule in rules]
        gated = next((h for h, c in enumerate(crossed) if not c), len(rules))
        assert outcome.passed == (None if gated == 0 else list(THRESHOLDS)[gated - 1])
        if used < len(looks):  # stopped early: everything crossed, or the first that did not was hopeless
            assert gated == len(rules) or (totals <= rules[gated].futile[:used]).any()
        seen.add(outcome.passed)
        assert outcome.pa is None
        assert outcome.pb is None
    assert seen == {None, 0.0, 1.0, 2.0, 3.0}


def test_boundaries_are_not_monotone_so_the_gate_is_explicit():
    """Thresholds .708 < .71: at 144 draws 125 votes reject the larger one and not the smaller. If the path never rises
    again, p <= .708 stands and nothing may be certified, although the hypothesis p <= .71 was rejected."""
    looks = looks_up_to(400, 2)
    j = looks.index(144)
    smaller, larger = (group_sequential(p, looks, 1e-3) for p in (0.708, 0.71))
    assert larger.reject[j] < smaller.reject[j]
    totals = [min(125, look - 19) for look in looks]  # 125 votes at 144 draws, none after them
    for i, total in enumerate(totals):
        assert total < smaller.reject[i]
        assert (total >= larger.reject[i]) == (i == j)
    path = np.diff((0, *totals))
    thresholds = {0.0: 0.708, 1.0: 0.71}
    outcome = finish(GroupSequential([0.0, 1.0], n=400).run(votes(path), 2, thresholds.__getitem__))
    assert outcome.passed is None
    thresholds = {0.0: 0.5, 1.0: 0.708, 2.0: 0.71}
    outcome = finish(GroupSequential([0.0, 1.0, 2.0], n=400).run(votes(path), 2, thresholds.__getitem__))
    assert outcome.passed == 0.0


def test_sequential_plan_stops_as_soon_as_all_is_decided():
    """Hopeless images stop at the first look, clear ones long before n; the looks say when, and nothing is reset."""
    plan = GroupSequential([0.0, 1.0, 2.0, 3.0], n0=5, n=2000)
    looks = looks_up_to(2000, 50)
    steps = np.diff((0, *looks))
    hopeless = finish(plan.run(votes(0 * steps), 50, THRESHOLDS.__getitem__))
    assert (hopeless.n, hopeless.passed) == (looks[0], None)
    clear = finish(plan.run(votes(steps), 50, THRESHOLDS.__getitem__))
    assert clear.passed == 3.0
    rules = [group_sequential(p, looks, 1e-3) for p in THRESHOLDS.values()]
    assert clear.n == next(n for n in looks if all(rule.reject[looks.index(n)] <= n for rule in rules)) < 2000
    # between the thresholds .5 and .62: the smaller is passed, the larger given up, neither waits for all 2000 draws
    middle = finish(plan.run(votes((steps * 0.56).astype(int)), 50, {**THRESHOLDS, 1.0: 0.7}.__getitem__))
    assert middle.passed == 0.0
    assert middle.n < 2000
    # half of the votes: whether p > 1/2 takes all draws, that p <= .62 for the first radius very few
    half = finish(plan.run(votes(steps // 2), 50, THRESHOLDS.__getitem__))
    alone = finish(GroupSequential([1.0, 2.0], n0=5, n=2000).run(votes(steps // 2), 50, THRESHOLDS.__getitem__))
    assert half.passed is alone.passed is None
    assert half.n == 2000 > 5 * alone.n


def test_thresholds_that_nothing_reaches():
    """A radius whose threshold is 1 (rho >= 1/2, or E huge) is never passed; radius 0 still is."""
    plan = GroupSequential([0.0, 1.0, 2.0], n=1000)
    outcome = finish(plan.run(votes([100] * 40), 100, lambda radius: 0.5 if radius == 0 else 1.0))
    assert outcome.passed == 0.0
    assert finish(plan.run(votes([100] * 40), 100, lambda radius: 1.5)).passed is None


def test_ceiling_is_reachable_and_stated():
    """All votes for one class: FixedN shows its ceiling; a sequential test rejects thresholds below its own."""
    for bounds, alpha in (("binary", 1e-3), ("two", 5e-4)):
        plan = FixedN(n=700, alpha=1e-3, bounds=bounds)
        assert plan.ceiling == finish(plan.run(votes([700]), 64, None)).pa
        assert plan.ceiling == pytest.approx(alpha ** (1 / 700), rel=1e-10)
    plan = GroupSequential([1.0], n=700, alpha=1e-3)
    below, above = plan.ceiling - 1e-4, 1e-3 ** (1 / 700) + 1e-4
    path = np.diff((0, *looks_up_to(700, 100)))
    assert finish(plan.run(votes(path), 100, lambda r: below)).passed == 1.0
    assert finish(plan.run(votes(path), 100, lambda r: above)).passed is None
    assert plan.ceiling == pytest.approx(0.98e-3 ** (1 / 700), rel=1e-10)


def test_plans_refuse_what_cannot_succeed():
    """n votes show at most alpha^(1/n): refused while that is 1/2 or less, and the n that helps is named."""
    with pytest.raises(RequestError, match="take n=11 or more"):
        FixedN(n=9, alpha=1e-3)
    assert FixedN(n=11, alpha=1e-3).ceiling > 0.5
    with pytest.raises(RequestError, match="certifies nothing"):
        GroupSequential([1.0], n=8, alpha=1e-3)
    for plan in (FixedN, lambda **k: GroupSequential([1.0], **k)):
        for name in ("n0", "n"):
            for bad in (0, -3, 100.0, 1e3, True, "100"):
                with pytest.raises(RequestError, match=f"sampling.{name} must be a whole number"):
                    plan(**{name: bad})


@pytest.mark.parametrize("bounds", ["binary", "two"])
@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.4])
def test_the_number_of_draws_that_is_named_suffices(bounds, alpha):
    with pytest.raises(RequestError) as refused:
        FixedN(n=1, alpha=alpha, bounds=bounds)
    named = int(str(refused.value).split("take n=")[1].split(" ")[0])
    assert FixedN(n=named, alpha=alpha, bounds=bounds).ceiling > 0.5


@pytest.mark.parametrize(
    "radii", [[], [0.0, 0.0], [2.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [math.nan], [1.0, math.nan], 3, "3"]
)
def test_radii_must_increase(radii):
    with pytest.raises(RequestError, match=r"sampling\.radii"):
        GroupSequential(radii)


def test_radius_zero_is_decided_only_when_listed():
    """The prediction alone passes the plan that lists 0, and leaves the other one without a certificate."""
    outcomes = {}
    for radii in ((0,), (0, 2), (2,)):
        plan = GroupSequential(radii, n0=5, n=2000)
        assert plan.radii == radii
        steps = np.diff((0, *looks_up_to(2000, 50)))
        outcomes[radii] = finish(plan.run(votes((steps * 0.6).astype(int)), 50, THRESHOLDS.__getitem__)).passed
    assert outcomes == {(0,): 0.0, (0, 2): 0.0, (2,): None}


def test_unknown_bounds():
    with pytest.raises(RequestError, match=r"sampling\.bounds"):
        FixedN(bounds="three")
