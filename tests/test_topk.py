"""Top-k certificates: against a linear program of the worst attack, exact coverage of the bounds, known numbers."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import coo_array
from scipy.special import ndtr, ndtri
from scipy.stats import multinomial, norm

from gsmooth_lightning.certify.topk import (
    MOST_SETS,
    check_top_k,
    top_k_bounds,
    top_k_candidates,
    top_k_radii,
    top_k_radius,
)
from gsmooth_lightning.confidence import clopper_pearson_lower, clopper_pearson_upper, two_bounds
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing import Exponential, FoldedNormal, Gaussian, Laplace, Uniform


def gaussian(p, radius):
    return ndtr(ndtri(p) - radius)


def sums_of(others, k):
    """(k,): the sum of the t smallest of the k largest."""
    return np.cumsum(np.sort(others)[-k:])


def exact_radius(probabilities, label, k, transfer=gaussian):
    return top_k_radius(probabilities[label], sums_of(np.delete(probabilities, label), k), transfer)


# ---------------------------------------------------------------- the condition


def worst_margin(radius, cells, rivals, lower, upper):
    """max over classifiers, constant on cells of the line, of the least Q(rival) - Q(class 0); a linear program.

    P = N(0, 1), Q = N(radius, 1). P(class 0) >= lower, P(class c) <= upper[c - 1].
    """
    edges = np.concatenate([[-np.inf], np.linspace(-5, 5 + radius, cells - 1), [np.inf]])
    p, q = np.diff(norm.cdf(edges)), np.diff(norm.cdf(edges - radius))
    classes, m = 1 + len(upper), cells
    size = classes * m + 1  # shares of the cells, and the margin
    ones = np.arange(m)
    rows, columns, values, most = [], [], [], []

    def constrain(entries, bound):
        for column, value in entries:
            rows.append(np.full(len(column), len(most)))
            columns.append(column)
            values.append(value)
        most.append(bound)

    for c in rivals:  # margin + Q(0) - Q(c) <= 0
        constrain([(np.array([size - 1]), np.ones(1)), (ones, q), (c * m + ones, -q)], 0.0)
    constrain([(ones, -p)], -lower)
    for c, bound in enumerate(upper, start=1):
        constrain([(c * m + ones, p)], bound)
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    above = coo_array(entries, shape=(len(most), size))
    shares = coo_array((np.ones(classes * m), (np.tile(ones, classes), np.arange(classes * m))), shape=(m, size))
    found = linprog(
        -np.eye(size)[-1],
        A_ub=above,
        b_ub=most,
        A_eq=shares,
        b_eq=np.ones(m),
        bounds=[(0, 1)] * (size - 1) + [(-1, 1)],
        method="highs",
    )
    assert found.status == 0, found.message
    return -found.fun


@pytest.mark.parametrize(
    ("k", "lower", "upper"),
    [
        (1, 0.6, [0.3, 0.1]),
        (1, 0.45, [0.4, 0.3, 0.1]),  # bounds leave the masses open
        (2, 0.5, [0.3, 0.15, 0.05]),
        (2, 0.4, [0.38, 0.12, 0.1]),
        (2, 0.6, [0.5, 0.45, 0.2]),  # capped
        (2, 0.3, [0.5, 0.15, 0.05]),  # not the most probable class
        (3, 0.4, [0.3, 0.3, 0.3]),  # capped
        (3, 0.28, [0.3, 0.25, 0.1, 0.07]),
        (3, 0.9, [0.05, 0.03, 0.02]),
    ],
)
def test_radius_is_where_the_worst_attack_begins_to_succeed(k, lower, upper):
    """Just inside no classifier within the bounds lets k others reach the class; just outside one does."""
    radius = top_k_radius(lower, np.minimum(sums_of(upper, k), 1 - lower), gaussian)
    assert radius > 0.03
    rivals = np.argsort(upper)[::-1][:k] + 1
    assert worst_margin(radius * 0.999, 300, rivals, lower, upper) < 0
    assert worst_margin(radius * 1.02, 300, rivals, lower, upper) > 0


def test_the_worst_rivals_are_the_most_probable_ones():
    """No other pair of rivals succeeds earlier."""
    lower, upper = 0.4, [0.3, 0.2, 0.1]
    radius = top_k_radius(lower, sums_of(upper, 2), gaussian)
    margins = {
        pair: worst_margin(radius * 1.02, 200, pair, lower, upper) for pair in itertools.combinations((1, 2, 3), 2)
    }
    assert {pair for pair, margin in margins.items() if margin > 0} == {(1, 2)}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_classifier_of_the_line_loses_the_class_inside_the_radius(k):
    """Random partitions of the line into 5 classes, smoothed exactly, attacked by shifts of both signs."""
    rng = np.random.default_rng(k)
    certified = 0
    for _ in range(150):
        edges = np.concatenate([[-np.inf], np.sort(rng.normal(scale=1.5, size=9)), [np.inf]])
        owner = np.append(np.arange(5), rng.integers(0, 5, 5))
        rng.shuffle(owner)
        label = int(owner[rng.integers(10)])

        def smoothed(shifts, edges=edges, owner=owner):
            mass = np.diff(norm.cdf(edges[None] - np.atleast_1d(shifts)[:, None]), axis=1)  # (n, 10)
            return mass @ np.eye(5)[owner]

        radius = exact_radius(smoothed(0.0)[0], label, k)
        if radius is None:
            continue
        certified += 1
        attacked = smoothed(np.linspace(-1, 1, 81) * radius)
        ahead = (np.delete(attacked, label, 1) >= attacked[:, [label]]).sum(1)
        assert (ahead < k).all()
    assert certified > 15


def test_numbers_of_theory():
    """Capped and published radii (theory.md section 2): .287 -> .684 and .237 -> .421, in sigmas."""
    for lower, upper, k, published, capped in ((0.6, [0.5, 0.45], 2, 0.287, 0.684), (0.4, [0.3] * 3, 3, 0.237, 0.421)):
        sums = sums_of(upper, k)
        assert sums[-1] > 1 - lower
        assert top_k_radius(lower, sums, gaussian) == pytest.approx(published, abs=5e-4)
        assert top_k_radius(lower, np.minimum(sums, 1 - lower), gaussian) == pytest.approx(capped, abs=5e-4)


@pytest.mark.parametrize("law", [Gaussian(1.0), Laplace(1.0), Uniform(0, 1), Exponential(1.0), FoldedNormal(1.0)])
@pytest.mark.parametrize(("pa", "pb"), [(0.9, 0.1), (0.6, 0.05), (0.999, 0.0005), (0.4, 0.3)])
def test_top_1_is_the_usual_radius(law, pa, pb):
    """The law's closed form for two bounds, to 1e-9, never above it."""
    radius = top_k_radius(pa, np.array([pb]), law.transfer)
    assert radius <= law.radius(pa, pb)
    assert radius == pytest.approx(float(law.radius(pa, pb)), rel=1e-9)


def test_radii_grow_with_k():
    probabilities = np.array([0.35, 0.25, 0.2, 0.15, 0.05])
    for label in range(5):
        radii = [exact_radius(probabilities, label, k) for k in range(1, 5)]
        assert [radius is None for radius in radii] == [k <= label for k in range(1, 5)]
        found = [radius for radius in radii if radius is not None]
        assert all(a < b for a, b in itertools.pairwise(found))


def test_radius_ends_on_a_value_that_holds():
    """At the returned radius the condition holds; one part in 1e9 further it does not. `reach` cuts it."""
    p, s = 0.5, np.array([0.1, 0.3])
    radius = top_k_radius(p, s, gaussian)

    def surplus(r):
        return gaussian(p, r) - min((1 - gaussian(1 - s, r)) / [1, 2])

    assert surplus(radius) > 0 > surplus(radius * (1 + 1e-9))
    assert top_k_radius(p, s, gaussian, reach=0.1) == 0.1
    assert top_k_radius(p, s, gaussian, reach=9.0) == radius


def test_a_tie_is_no_certificate():
    """Even unattacked: k others reach the class."""
    assert top_k_radius(0.3, np.array([0.3]), gaussian) is None
    assert top_k_radius(0.25, np.array([0.25, 0.5]), gaussian) is None
    assert top_k_radius(0.25, np.array([0.2, 0.7]), gaussian) > 0


def test_a_jump_at_zero_leaves_the_radius_0():
    """Rounding of inputs costs nothing without an attack and something for every attack."""

    def rounded(p, radius):
        return gaussian(p, radius + 0.5 * (radius > 0))

    assert top_k_radius(0.4, np.array([0.35]), rounded) == 0.0
    jumped, plain = (top_k_radius(0.95, np.array([0.05]), transfer) for transfer in (rounded, gaussian))
    assert jumped == pytest.approx(plain - 0.5, abs=1e-9)


# ---------------------------------------------------------------- the bounds


def outcomes(classes, n):
    """Every vector of counts."""
    bars = np.array(list(itertools.combinations(range(n + classes - 1), classes - 1)))
    full = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), n + classes - 1)], 1)
    return np.diff(full, axis=1) - 1


SIMPLEX = {
    3: [[1 / 3] * 3, [0.5, 0.3, 0.2], [0.45, 0.45, 0.1], [0.8, 0.1, 0.1], [0.9, 0.09, 0.01], [0.4, 0.35, 0.25]],
    4: [[0.25] * 4, [0.4, 0.2, 0.2, 0.2], [0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7], [0.33, 0.33, 0.33, 0.01]],
}


@pytest.mark.parametrize(("classes", "k", "n"), [(3, 1, 30), (3, 2, 30), (3, 2, 11), (4, 2, 11), (4, 3, 11)])
@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_all_bounds_hold_together(classes, k, n, alpha):
    """Every multinomial outcome, every set of candidates: the probability that any bound fails is at most alpha."""
    counts = outcomes(classes, n)
    assert len(counts) == math.comb(n + classes - 1, n)
    for candidates in itertools.combinations(range(classes), k):
        bounds = [top_k_bounds(count, np.array(candidates), alpha) for count in counts]
        for p in SIMPLEX[classes]:
            truth = np.array([sums_of(np.delete(p, label), k) for label in candidates])
            wrong = [
                bool((lower > np.array(p)[list(candidates)]).any() or (upper < truth - 1e-15).any())
                for lower, upper in bounds
            ]
            assert multinomial.pmf(counts, n, p)[wrong].sum() <= alpha


def test_false_radii_are_rarer_than_alpha():
    """End to end, exactly: a radius beyond the true one is claimed for any candidate with probability <= alpha."""
    n, alpha, k = 24, 0.05, 2
    counts = outcomes(3, n)
    candidates = np.array([0, 1])
    claims = [top_k_radii(count, candidates, alpha, gaussian) for count in counts]
    assert sum(claim[0] is not None for claim in claims) > 50
    for p in SIMPLEX[3]:
        truths = [exact_radius(np.array(p), label, k) for label in candidates]
        wrong = [
            any(c is not None and (t is None or c > t) for c, t in zip(claim, truths, strict=True)) for claim in claims
        ]
        assert multinomial.pmf(counts, n, p)[wrong].sum() <= alpha


def test_the_kth_largest_count_at_full_level_would_not_do():
    """A canary: the smaller of two other counts misses their common p with nearly twice the probability of one."""
    n, alpha = 30, 0.1
    p = float(clopper_pearson_upper(8, n, alpha)) + 1e-9
    counts = outcomes(3, n)
    mass = multinomial.pmf(counts, n, [1 - 2 * p, p, p])
    second = counts[:, 1:].min(1)
    assert mass[clopper_pearson_upper(second, n, alpha) < p].sum() > 1.8 * alpha
    assert mass[clopper_pearson_upper(second, n, alpha / 2) < p].sum() <= alpha


def test_top_1_bounds_are_the_two_bounds():
    for counts in ([80, 15, 5], [40, 35, 25], [100, 0, 0]):
        (p,), ((s,),) = top_k_bounds(np.array(counts), np.array([0]), 0.01)
        assert (p, s) == two_bounds(np.array(counts), 0, 100, 0.01)


def test_levels_add_up_to_alpha():
    """Each bound at its own level: halves for lower and upper bounds, and shares for the t and their sets."""
    counts = np.array([500, 300, 100, 60, 40])
    candidates, alpha = np.array([0, 1]), 0.02
    p, s = top_k_bounds(counts, candidates, alpha)
    np.testing.assert_array_equal(p, clopper_pearson_lower(counts[:2], 1000, alpha / 4))
    # t = 1: the three sets {c} of the k + 1 = 3 most probable classes; t = 2: one set for each candidate
    assert s[0, 0] == clopper_pearson_upper(100, 1000, alpha / 2 / 2 / 3)
    assert s[0, 1] == clopper_pearson_upper(400, 1000, alpha / 2 / 2 / 2)
    assert s[1, 0] == clopper_pearson_upper(100, 1000, alpha / 2 / 2 / 3)
    assert s[1, 1] == clopper_pearson_upper(600, 1000, alpha / 2 / 2 / 2)


def test_merged_sums_beat_sums_of_single_bounds():
    """Jia et al. bound each of 10 classes at alpha / 10 and add: looser from t = 2 on, and a smaller radius."""
    counts, alpha, k = np.array([400, 150, 120, 90, 70, 60, 50, 30, 20, 10]), 1e-3, 3
    p, s = top_k_bounds(counts, np.array([0, 1, 2]), alpha)
    single = sums_of(clopper_pearson_upper(counts[1:], 1000, alpha / 10), k)
    assert (s[0, 1:] < single[1:]).all()
    published = top_k_radius(float(clopper_pearson_lower(400, 1000, alpha / 10)), single, gaussian)
    assert top_k_radius(float(p[0]), s[0], gaussian) > published * 1.05


def test_many_candidates_stay_finite():
    """k = 30 of 40: sums of 12 classes have 5e7 sets and get no alpha; the cap stands in."""
    counts = np.random.default_rng(0).multinomial(10_000, np.full(40, 1 / 40))
    p, s = top_k_bounds(counts, np.arange(30), 1e-3)
    assert (s <= 1 - p[:, None]).all()
    t = 12
    assert math.comb(31, t) > MOST_SETS
    np.testing.assert_array_equal(s[:, t - 1], 1 - p)
    assert (s[:, 0] < 0.1).all()


def test_all_classes_but_one():
    """k = C - 1: the class must not be the least probable one; two classes with k = 1 are the binary case."""
    first, second, third = top_k_radii(np.array([800, 100, 80, 20]), np.array([0, 1, 2]), 1e-3, gaussian)
    assert first > second > third > 0
    radius, none = top_k_radii(np.array([900, 100]), np.array([0]), 1e-3, gaussian), None
    assert radius == [pytest.approx(float(norm.ppf(clopper_pearson_lower(900, 1000, 5e-4))), rel=1e-9)]
    assert top_k_radii(np.array([900, 100]), np.array([1]), 1e-3, gaussian) == [none]


# ---------------------------------------------------------------- candidates and refusals


def test_candidates_are_the_most_voted():
    assert top_k_candidates(np.array([3, 9, 0, 9, 5]), 3).tolist() == [1, 3, 4]
    assert top_k_candidates(np.array([0, 0, 7]), 2).tolist() == [2, 0]


@pytest.mark.parametrize("k", [3, 4, 0, -1, True, 1.0, "2"])
def test_k_is_refused(k):
    with pytest.raises(RequestError, match=r"certify\.top_k") as refused:
        check_top_k(k, 3)
    assert "\n" not in str(refused.value)
    with pytest.raises(RequestError, match=r"certify\.top_k"):
        top_k_candidates(np.array([1, 2, 3]), k)


def test_soft_votes_are_refused():
    with pytest.raises(RequestError, match="votes=hard"):
        top_k_bounds(np.array([6.5, 3.0, 0.5]), np.array([0]), 0.01)
