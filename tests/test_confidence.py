"""Confidence bounds and sequential tests: exact coverage by enumeration and dynamic programming, no simulation."""

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
