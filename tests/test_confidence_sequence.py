"""The any-time bound, its plan, and the replay of logs: exact dynamic programming and enumeration, no simulation."""

import importlib.util
import itertools
import math

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import betaincc, betaln
from scipy.stats import binom, norm
from torch import nn

from conftest import ROOT
from gsmooth_lightning.certify import ABSTAIN, AdditiveCertifier
from gsmooth_lightning.confidence import anytime_lower, clopper_pearson_lower, group_sequential, looks_up_to
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import ConfidenceSequence, FixedN, GroupSequential
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import PixelThreat
from plans import all_paths, finish, votes

HORIZON = 500
RATES = (0.05, 0.5, 0.84, 0.95, 0.99)

# ---------------------------------------------------------------- the bound


def smallest_above(bound, p, draws):
    """For each number of draws the smallest count whose bound exceeds p (draws + 1 if there is none)."""
    low = np.floor(draws * p).astype(int)  # not above: no bound exceeds the share of votes
    high = np.minimum(draws, low + 8 + 6 * np.sqrt(draws)).astype(int) + 1  # taken to be above
    while (high - low > 1).any():
        middle = (low + high) // 2
        above = bound(np.minimum(middle, draws), draws) > p
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return high


def ever_reached(boundary, p):
    """P_p(count >= boundary[t - 1] at some t): the law of the count, draw by draw."""
    alive, reached = np.ones(1), 0.0
    for limit in boundary:
        alive = np.append(alive * (1 - p), 0) + np.append(0, alive * p)
        reached += alive[limit:].sum()
        alive[limit:] = 0
    return reached


@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_the_bound_never_passes_p_but_with_probability_alpha(alpha):
    """P_p(any of the bounds after 1, 2, ..., 500 draws exceeds p) <= alpha, by exact dynamic programming over all t."""
    draws = np.arange(1, HORIZON + 1)
    errors = [ever_reached(smallest_above(lambda k, n: anytime_lower(k, n, alpha), p, draws), p) for p in RATES]
    assert max(errors) <= alpha
    assert max(errors) >= 0.2 * alpha  # the level is used, not given away


@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_canary_clopper_pearson_at_every_draw_fails(alpha):
    """The checker that passes the any-time bound catches Clopper-Pearson looked at after every draw."""
    draws = np.arange(1, HORIZON + 1)
    for p in (0.5, 0.84, 0.95):
        boundary = smallest_above(lambda k, n: clopper_pearson_lower(k, n, alpha), p, draws)
        assert ever_reached(boundary, p) > 3 * alpha


def mixture(p0, k, n):
    """M(p0) as it stands in the docstring, by quadrature; q = 1 - s^2 takes the singularity at 1 away."""
    p0 = mpmath.mpf(p0)
    around = [mpmath.mpf(k) / n + j / mpmath.sqrt(n) for j in range(-6, 7)]
    cuts = [mpmath.sqrt(1 - q) for q in sorted({p0, mpmath.mpf(1), *(q for q in around if p0 < q < 1)}, reverse=True)]
    return mpmath.quad(lambda s: ((1 - s * s) / p0) ** k * (s * s / (1 - p0)) ** (n - k) / mpmath.sqrt(1 - p0), cuts)


@pytest.mark.parametrize("n", [1, 7, 60, 1000, 20_000])
def test_the_bound_is_where_the_mixture_reaches_one_over_alpha(n):
    """Against mpmath's quadrature of the mixture: at least 1/alpha there (rounded down), and hardly more."""
    with mpmath.workdps(30):
        for k in sorted({1, n // 2, (9 * n) // 10, n - 1, n} - {0}):
            for alpha in (1e-3, 0.3):
                value = mixture(float(anytime_lower(k, n, alpha)), k, n) * alpha
                assert 1 <= value < 1 + 1e-6


@pytest.mark.parametrize("p0", [0.5, 0.84, 0.99])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_the_mixture_is_a_martingale(p0, n):
    """E M_n(p0) = 1 at p0, and no more below: what Ville's inequality needs."""
    with mpmath.workdps(20):
        values = np.array([float(mixture(p0, k, n)) for k in range(n + 1)])
    assert binom.pmf(np.arange(n + 1), n, p0) @ values == pytest.approx(1, abs=1e-9)
    assert binom.pmf(np.arange(n + 1), n, 0.8 * p0) @ values <= 1


def test_what_is_rejected_is_an_interval():
    """The mixture falls in p0 wherever it exceeds 1, so that every p below the bound is rejected too."""
    for k, n in ((1, 1), (1, 9), (9, 9), (20, 30), (29, 30), (450, 500)):
        p = np.linspace(0.004, 0.996, 249)
        a, b = k + 1, n - k + 0.5
        log = np.log(betaincc(a, b, p) / 2) + betaln(a, b) - k * np.log(p) - b * np.log1p(-p)
        assert log[100] == pytest.approx(float(mpmath.log(mixture(p[100], k, n))))
        falls = np.diff(log) < 0
        assert falls[log[:-1] > 0].all()


def test_the_bound_is_monotone_with_exact_ends():
    """0 at k = 0; increasing in k, whole or not, and in alpha; below Clopper-Pearson."""
    for n in (1, 2, 40, 3000):
        k = np.arange(n + 1)
        bound = anytime_lower(k, n, 1e-3)
        assert bound[0] == 0
        assert (np.diff(bound) > 0).all()
        assert (bound <= clopper_pearson_lower(k, n, 1e-3)).all()
        assert (anytime_lower(k[1:], n, 1e-2) > bound[1:]).all()
        between = anytime_lower(k[:-1] + 0.5, n, 1e-3)
        assert ((bound[:-1] < between) & (between < bound[1:])).all()


def test_what_it_costs_at_100_000_draws():
    """In z, against Clopper-Pearson at the same alpha: .007 to .053."""
    n = 100_000
    k = np.array([50_000, 60_000, 84_000, 90_000, 99_000, 99_900, 99_990, 99_999, n])
    cost = norm.ppf(clopper_pearson_lower(k, n, 1e-3)) - norm.ppf(anytime_lower(k, n, 1e-3))
    assert (cost > 0.007).all()
    assert (cost < 0.053).all()
    assert (cost[:5] < 0.017).all()


def test_alpha_is_checked():
    with pytest.raises(RequestError, match="alpha"):
        anytime_lower(1, 2, 0.7)


# ---------------------------------------------------------------- the plan


def concluded(plan, path, block, threshold=lambda radius: 0.5):
    return finish(plan.run(votes(path), block, threshold))


def test_the_plans_bound_holds_whenever_it_stops():
    """Every path at the looks 100 and 120, weighted with its probability: P_p(pA_low > p) <= alpha; pB = 1 - pA."""
    alpha = 0.05
    steps, found = all_paths(ConfidenceSequence(5, 120, alpha, tolerance=0.4), 2, lambda radius: 0.5)
    pa = np.array([outcome.pa for _, outcome in found])
    assert all(outcome.pb == 1 - outcome.pa for _, outcome in found)
    assert {outcome.n for _, outcome in found} == {100, 120}
    for p in np.linspace(0.3, 0.99, 24):
        pmf = [binom.pmf(np.arange(step + 1), step, p) for step in steps]
        mass = np.array([math.prod(pmf[j][k] for j, k in enumerate(path)) for path, _ in found])
        assert mass.sum() == pytest.approx(1, abs=1e-12)
        assert mass[pa > p].sum() <= alpha


def test_the_plan_keeps_the_largest_bound_it_saw():
    """All votes at the first look, none at the next: the bound of the first stands, and the counts are those of all."""
    plan = ConfidenceSequence(5, 140, tolerance=0.0)
    outcome = concluded(plan, [100, 0, 0], 2)
    assert outcome.pa == float(anytime_lower(100, 100, 1e-3)) > float(anytime_lower(100, outcome.n, 1e-3))
    assert outcome.counts[0] == 100
    assert outcome.counts.sum() == outcome.n > 100


def test_the_plan_leaves_hopeless_and_settled_images():
    """Hopeless at the first look; settled when z(pA) is within the tolerance of what n draws would show; else n."""
    plan = ConfidenceSequence(5, 20_000)
    looks = looks_up_to(20_000, 64)
    steps = np.diff((0, *looks))
    assert concluded(plan, 0 * steps, 64).n == looks[0]
    exact = ConfidenceSequence(5, 20_000, tolerance=0.0)
    outcome = concluded(exact, steps, 64)
    assert outcome.n == 20_000
    assert outcome.pa == exact.ceiling
    clear = concluded(plan, steps - steps // 10, 64)
    total, seen = int(clear.counts[0]), clear.n
    assert seen < 20_000
    limit = 0.9 * norm.ppf(anytime_lower(total / seen * 20_000, 20_000, 1e-3))
    assert norm.ppf(clear.pa) >= limit
    before = looks.index(seen) - 1
    count = (steps - steps // 10)[: before + 1].sum()
    rate = count / looks[before]
    shown = norm.ppf(anytime_lower(count, looks[before], 1e-3))
    assert shown < 0.9 * norm.ppf(anytime_lower(rate * 20_000, 20_000, 1e-3))
    # the prediction needs more than the image can ever show: left at once
    assert concluded(plan, steps, 64, lambda radius: 0.9999).n == looks[0]


class HalfSpace(nn.Module):
    """Class 1 where the mean of the 16 pixels exceeds 1/2."""

    def forward(self, x):
        value = x.double().flatten(1).mean(1) - 0.5
        return torch.stack([-value, value], 1)


@pytest.mark.parametrize("level", [0.51, 0.6, 0.75])
def test_certificates_with_early_stopping(level):
    """The full radius from fewer than n draws, and never beyond the distance to the decision boundary."""
    x = torch.full((1, 4, 4), round(level * 255) / 255)
    distance = 4 * (round(level * 255) / 255 - 0.5)
    smoothed = SmoothedClassifier(HalfSpace(), 2, noise=Gaussian(0.5), block=32).eval()
    certifier = AdditiveCertifier(ConfidenceSequence(32, 20_000, 1e-4))
    ((_, certificate),) = certifier.certify(smoothed, PixelThreat(), [(0, x)])
    assert certificate.prediction in (1, ABSTAIN)
    assert certificate.radius < distance
    assert certificate.n < 20_000
    if level > 0.55:
        assert certificate.radius > 0.8 * distance
        assert certificate.radius == pytest.approx(0.5 * norm.ppf(certificate.pa), rel=1e-4)


def test_what_the_plan_refuses():
    """The number of draws that is named suffices, although Clopper-Pearson's would not."""
    with pytest.raises(RequestError, match="take n=12 or more"):
        ConfidenceSequence(n=11)
    assert ConfidenceSequence(n=12).ceiling > 0.5
    assert FixedN(n=11).ceiling > 0.5
    for bad in (-0.1, 1.0, "much", math.nan):
        with pytest.raises(RequestError, match=r"sampling\.tolerance"):
            ConfidenceSequence(tolerance=bad)


# ---------------------------------------------------------------- the replay of logs


@pytest.fixture(scope="module")
def samples():
    """benchmarks/samples.py as a module."""
    spec = importlib.util.spec_from_file_location("samples", ROOT / "benchmarks" / "samples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


N, ALPHA, BLOCK = 120, 0.05, 2
P = np.array([0.4, 0.5, 0.7, 0.9, 0.99])


def expected(plan, good):
    """Mean draws and probability of a good outcome, by running the plan on every path of counts."""
    steps, found = all_paths(plan, BLOCK, {0.0: 0.5, 1.0: 0.75}.__getitem__)
    mass = np.array(
        [math.prod(binom.pmf(k, step, P) for k, step in zip(path, steps, strict=False)) for path, _ in found]
    )
    draws = np.array([outcome.n for _, outcome in found])
    return draws @ mass, np.array([good(outcome) for _, outcome in found]) @ mass


def test_the_replay_is_what_the_plans_do(samples):
    """Mean draws and chance of a certificate of the replay equal those of the plans themselves, run on every path."""
    looks = looks_up_to(N, BLOCK)
    replay = samples.Replay(P, looks)
    rules = [group_sequential(p, looks, ALPHA) for p in (0.5, 0.75)]
    found = replay(samples.prediction_and_radius(*rules), 4)
    truth = expected(GroupSequential([0.0, 1.0], 5, N, ALPHA), lambda outcome: outcome.passed == 1.0)
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-9)
    assert 0.05 < truth[1][3] < 1
    found = replay(samples.one_radius(rules[1]), 1)
    truth = expected(GroupSequential([1.0], 5, N, ALPHA), lambda outcome: outcome.passed == 1.0)
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-9)
    assert 0.05 < truth[1][3] < 1
    plan = ConfidenceSequence(5, N, ALPHA, tolerance=0.3)
    found = replay(samples.sequence(plan, looks)(0.75), 2)
    truth = expected(plan, lambda outcome: outcome.pa > 0.75)
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-9)
    assert 0.05 < truth[1][3] < 1


def test_the_replay_of_one_radius(samples):
    """The test of one radius over 14 looks, against plain dynamic programming over all counts."""
    looks = looks_up_to(2000, 50)
    rule = group_sequential(0.84, looks, 1e-3)
    for p in (0.8, 0.84, 0.87):
        alive, seen, draws, certified = np.ones(1), 0, 0.0, 0.0
        for look, reject, futile in zip(looks, rule.reject, rule.futile, strict=True):
            alive = np.convolve(alive, binom.pmf(np.arange(look - seen + 1), look - seen, p))
            draws += look * (alive[reject:].sum() + alive[: futile + 1].sum())
            certified += alive[reject:].sum()
            alive[reject:], alive[: futile + 1], seen = 0, 0, look
        found = samples.Replay(np.array([p]), looks)(samples.one_radius(rule), 1)
        np.testing.assert_allclose(np.ravel(found), [draws, certified], rtol=1e-9)
        assert samples.fewest(np.array([p]), np.array([certified]), 0.84, 1e-3)[0] <= draws


def test_the_table_of_a_log(samples, tmp_path):
    """A log of four images: the wrong one counts in the draws, and not in the certified accuracy."""
    path = tmp_path / "sigma_0.50"
    log = {
        "idx": range(4),
        "label": 0,
        "predict": [0, 0, 1, -1],
        "radius": [1.2, 0.6, 1.2, 0.0],
        "correct": [1, 1, 0, 0],
    }
    pd.DataFrame(log | {"time": "0:00:01"}).to_csv(path, sep="\t", index=False)
    sigma, p, correct = samples.votes_of(path)
    np.testing.assert_allclose(p, norm.cdf([2.4, 1.2, 2.4, 0.0]))
    assert (sigma, correct.tolist()) == (0.5, [True, True, False, False])
    looks = looks_up_to(300, 64)
    anytime = samples.sequence(ConfidenceSequence(n=300, alpha=1e-3), looks)
    (row,) = samples.rows(p, correct, {0.5: float(norm.cdf(1.0))}, 1e-3, looks, anytime)
    least = np.flatnonzero(clopper_pearson_lower(np.arange(301), 300, 1e-3) > norm.cdf(1.0))[0]
    assert row["certified"] == pytest.approx(100 * binom.sf(least - 1, 300, p[:2]).sum() / 4)
    (rule,) = GroupSequential([0.5], n=300, alpha=1e-3).rules(looks, lambda radius: norm.cdf(radius / 0.5))
    draws, certified = samples.Replay(p, looks)(samples.one_radius(rule), 1)
    assert row["draws"] == pytest.approx(draws.mean())
    assert row["fewer"] == pytest.approx(300 / draws.mean())
    assert row["lost"] == pytest.approx(row["certified"] - 100 * certified[:2].sum() / 4)
    assert row["fewer"] < row["possible"]
    assert all(a > b for a, b in itertools.pairwise((row["fewer"], row["fewer with 0"])))
