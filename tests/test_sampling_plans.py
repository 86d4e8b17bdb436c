"""Plans of fixed n and group-sequential ones: every path of counts enumerated, no simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from gsmooth_lightning.confidence import clopper_pearson_lower, group_sequential, looks_up_to, two_bounds
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import FixedN, GroupSequential
from plans import all_paths, finish, votes


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


@pytest.mark.parametrize("radii", [(0.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (2.0,)])
def test_grid_of_radii_has_family_wise_error_alpha(radii):
    """Every path of counts at the looks 100, 120, 140: P_p(passed >= r) <= alpha whenever p <= threshold(r).

    No simulation: the conclusions of the plan itself are enumerated and weighted with their probabilities.
    """
    alpha = 0.05
    steps, found = all_paths(GroupSequential(radii, n0=5, n=140, alpha=alpha), 2, THRESHOLDS.__getitem__)
    assert steps == [100, 20, 20]
    value = np.array([-1.0 if outcome.passed is None else outcome.passed for _, outcome in found])
    largest = {}
    for p in sorted({*THRESHOLDS.values(), *np.linspace(0.3, 0.95, 27)}):
        pmf = [binom.pmf(np.arange(step + 1), step, p) for step in steps]
        mass = np.array([math.prod(pmf[j][k] for j, k in enumerate(path)) for path, _ in found])
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
