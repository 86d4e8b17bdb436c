"""Theorems J and J': closed forms, adversaries by quadrature, and error bounds against a slow reference."""

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from scipy.stats import norm

from gsmooth_lightning.certify import ABSTAIN, JointCertifier
from gsmooth_lightning.certify.transfer import largest_radius, parameter_transfer
from gsmooth_lightning.confidence import clopper_pearson_lower, clopper_pearson_upper
from gsmooth_lightning.error import Bound, ImageBound
from gsmooth_lightning.error.sampled import soft_excess
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.plans import FixedN, GroupSequential
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Additive, Rotation
from plans import Given, Known, finish

GRID = np.linspace(-10, 10, 2001)
WEIGHTS = norm.pdf(GRID) / norm.pdf(GRID).sum()


class Slide(Additive):
    """x + theta v, which adds exactly; an attacker's version may add sign(theta) d: a defect that is constant."""

    units = ("units",)
    name: ClassVar[str] = "slide"
    exact: ClassVar[bool] = True

    def __init__(self, direction, offset=None):
        super().__init__()
        self.direction, self.offset = direction, offset

    def forward(self, x, theta):
        moved = x + theta[:, :, None, None] * self.direction
        return moved if self.offset is None else moved + torch.sign(theta)[:, :, None, None] * self.offset


class HalfSpace(torch.nn.Module):
    """Class 0 where w.(input - x) <= c."""

    def __init__(self, normal, x, c):
        super().__init__()
        self.normal, self.x, self.c = normal.double(), x.double(), c

    def forward(self, inputs):
        value = ((inputs.double() - self.x) * self.normal).flatten(1).sum(1)
        return torch.stack([self.c - value, value - self.c], 1)


SIGMA, SIGMA_EPS, KAPPA = 2.0, 0.1, 0.02
UNIT = torch.tensor([[[0.5, -0.5], [0.5, 0.5]]])
X = torch.full((1, 2, 2), 0.5)


def slide(e, gamma, c=1.0):
    """A smoothed half-space in (theta, eps) and the threat by +-gamma whose defect has norm exactly e."""
    smoothed = SmoothedClassifier(
        HalfSpace(UNIT, X, c), 2, Slide(KAPPA * UNIT), None, Gaussian(SIGMA), Gaussian(SIGMA_EPS), block=16
    ).eval()
    threat = TransformationThreat(
        Slide(KAPPA * UNIT, e * SIGMA_EPS * UNIT), -gamma, gamma, step=gamma, saved="float", size=None
    )
    return smoothed, threat


def certified(pa, e, rho, pb=None, gamma=10.0):
    """The radius that JointCertifier states for known pA, E and rho; None for an abstention."""
    smoothed, threat = slide(e, gamma)
    error = Given(Bound(e, rho, 1e-4, "sound"))
    certifier = JointCertifier(Known(pa, pb), error)
    certificate = finish(certifier.procedure(smoothed, threat, X, Stream(0, 0)))
    return None if certificate.prediction < 0 else certificate.radius


# ---------------------------------------------------------------- the margin


def joint_margin(pa, pb, rho):
    """Radius in units of sigma without a defect."""
    threat = TransformationThreat(Rotation(), -100, 100)
    transfer = parameter_transfer(Rotation(), Gaussian(1.0), threat, Bound(0.0, rho, 0.0, "sound"), 0.0)
    return largest_radius(transfer, pa, pb, threat.reach) or 0.0


@pytest.mark.parametrize("pa", [0.500001, 0.6, 0.9, 0.99, 0.99999])
@pytest.mark.parametrize("rho", [0.0, 1e-4, 0.01, 0.2, 0.5, 0.7])
def test_margin_binary(pa, rho):
    """z(pA) - z(1/2 + rho), the root of Phi(z(pA) - m) - rho = 1/2; 0 when already rho spoils it."""
    margin = joint_margin(pa, 1 - pa, rho)
    if norm.cdf(norm.ppf(pa)) - rho <= 0.5:
        assert margin == 0
        return
    root = brentq(lambda m: norm.cdf(norm.ppf(pa) - m) - rho - 0.5, 0, 10, xtol=1e-13)
    assert margin == pytest.approx(root, abs=1e-9)


@pytest.mark.parametrize(("pa", "pb"), [(0.6, 0.05), (0.9, 0.02), (0.45, 0.3), (0.99, 1e-6)])
@pytest.mark.parametrize("rho", [0.0, 0.001, 0.05, 0.1])
def test_margin_two_bounds(pa, pb, rho):
    """Phi(z(pA) - m) - rho = Phi(z(pB) + m) + rho; without rho (z(pA) - z(pB)) / 2; never beyond the root."""
    margin = joint_margin(pa, pb, rho)
    if pa - rho <= pb + rho:
        assert margin == 0
        return
    left, right = norm.cdf(norm.ppf(pa) - margin) - rho, norm.cdf(norm.ppf(pb) + margin) + rho
    assert 0 <= left - right < 1e-7
    if rho == 0:
        assert margin == pytest.approx((norm.ppf(pa) - norm.ppf(pb)) / 2, abs=1e-8)


def test_margin_forms_agree_and_refuse():
    """With pB just off 1 - pA the two forms agree; no lead, no margin; monotone in each argument."""
    for rho in (0.0, 0.01, 0.3):
        for pa in (0.6, 0.9, 0.999):
            assert joint_margin(pa, 1 - pa - 1e-10, rho) == pytest.approx(joint_margin(pa, 1 - pa, rho), abs=1e-6)
    for pa, pb in ((0.5, 0.5), (0.2, 0.8), (0.0, 0.0), (0.0, 1.0), (0.3, 0.3)):
        assert joint_margin(pa, pb, 0.0) == 0
    assert joint_margin(0.9, 0.1, 0.01) > joint_margin(0.9, 0.1, 0.02) > joint_margin(0.85, 0.15, 0.02)
    assert joint_margin(0.8, 0.05, 0.01) > joint_margin(0.8, 0.1, 0.01)


# ---------------------------------------------------------------- Theorem J: the oracle


@pytest.mark.parametrize("e", [0.2, 0.8, 1.5])
def test_half_space_meets_theorem_j_with_equality(e):
    """theta ~ N(0, s^2), eps ~ N(0, t^2 I), class 0 where u.(theta v + eps) <= c, defect d = E t u, v = kappa u.

    p(gamma) = Phi((c - gamma kappa - E t) / hypot(s kappa, t)). The half-space is the worst one for gamma with
    gamma / s = E s kappa / t, where p = Phi(z(pA) - hypot(gamma / s, E)): the radius is exactly that gamma when
    pA = Phi(hypot(gamma / s, E)).
    """
    gamma = SIGMA * e * SIGMA * KAPPA / SIGMA_EPS
    spread = math.hypot(SIGMA * KAPPA, SIGMA_EPS)
    margin = math.hypot(gamma / SIGMA, e)
    c = margin * spread
    pa = norm.cdf(c / spread)

    def attacked(g):
        return norm.cdf((c - g * KAPPA - e * SIGMA_EPS) / spread)

    assert attacked(gamma) == pytest.approx(0.5, abs=1e-12)
    assert attacked(gamma) == pytest.approx(norm.cdf(norm.ppf(pa) - margin), abs=1e-12)
    radius = certified(pa, e, 0.0)
    assert radius < gamma
    assert radius == pytest.approx(gamma, rel=1e-4)  # the slack of the sampler, 1e-6 of pA, is paid
    slack = slide(e, gamma)[0].slack(X)
    assert 0 < slack < 1e-5
    assert radius == pytest.approx(SIGMA * math.sqrt(norm.ppf(pa - slack) ** 2 - e**2), rel=1e-9)
    assert attacked(radius) > 0.5
    assert attacked(gamma * (1 + 1e-4)) < 0.5


def test_half_space_through_the_whole_certifier():
    """Votes, measured defects and the stated radius of the same oracle: below the true radius, and not far below."""
    e = 0.8
    gamma = SIGMA * e * SIGMA * KAPPA / SIGMA_EPS
    c = math.hypot(gamma / SIGMA, e) * math.hypot(SIGMA * KAPPA, SIGMA_EPS)
    smoothed, threat = slide(e, gamma, c)
    error = ImageBound(draws=4096, choose=16, search="grid", quantile=1.0, alpha=1e-4, soft=False)  # every step
    bound = finish(error.procedure(smoothed, threat, X, Stream(1, 2)))
    assert bound.value == pytest.approx(e, rel=1e-3)
    assert bound.value >= e * (1 - 1e-4)  # the grid of LEVELS steps moves the defect by up to half a step a pixel
    assert bound.rho == float(clopper_pearson_upper(0, 4096, 1e-4))
    certifier = JointCertifier(FixedN(64, 40_000, 1e-3), error)
    ((index, certificate),) = certifier.certify(smoothed, threat, [(2, X)], seed=1)
    pa = norm.cdf(c / math.hypot(SIGMA * KAPPA, SIGMA_EPS))
    assert (index, certificate.prediction, certificate.guarantee) == (2, 0, "sound")
    assert certificate.alpha == pytest.approx(1e-3 + 1e-4)
    assert certificate.pa <= pa
    assert certificate.pa == float(clopper_pearson_lower(certificate.counts[0], 40_000, 1e-3))
    expected = certified(certificate.pa, certificate.details["E"], certificate.details["rho"])
    assert certificate.radius == pytest.approx(min(expected, gamma), rel=1e-9)
    assert certificate.radius < gamma
    # at twice the pixel margin, the radius is no longer small: clipped to the range of the threat
    smoothed, threat = slide(e, gamma, 2 * c)
    ((_, certificate),) = certifier.certify(smoothed, threat, [(2, X)], seed=1)
    assert certificate.radius == gamma


# ---------------------------------------------------------------- Theorem J: attacked


def clean_q(shape, pa):
    """q(t) = Phi(a + shape(t)) with a chosen so that E q = pA under N(0, 1)."""
    a = brentq(lambda a: WEIGHTS @ norm.cdf(a + shape(GRID)) - pa, -1e4, 1e4, xtol=1e-12)
    return lambda t: a + shape(t)


def remaining(z, gamma, e, rho):
    """E_theta Phi(z(q(theta + gamma)) - E) less the largest part that a set of mass rho can take."""
    s = norm.cdf(z(GRID + gamma) - e)
    order = np.argsort(-s)
    lost = np.clip(rho - (np.cumsum(WEIGHTS[order]) - WEIGHTS[order]), 0, WEIGHTS[order]) @ s[order]
    return WEIGHTS @ s - lost


def shapes(rng):
    """Random q: steps, ramps, waves, and their sums."""
    knots, heights = np.sort(rng.uniform(-4, 4, 6)), rng.normal(0, 2, 7)
    slope, wave, frequency, phase = rng.normal(0, 1.5), rng.normal(), rng.uniform(0, 6), rng.uniform(0, 7)
    kind = rng.integers(4)

    def shape(t):
        steps = heights[np.searchsorted(knots, t)]
        ramp = -slope * t
        waves = wave * np.sin(frequency * t + phase)
        return (steps, ramp, ramp + waves, steps + ramp + waves)[kind]

    return shape


CASES = [(0.9, 0.5, 0.0), (0.9, 0.5, 0.02), (0.99, 1.0, 0.01), (0.7, 0.1, 0.05), (0.999, 2.0, 0.1), (0.8, 0.3, 0.2)]


@pytest.mark.parametrize(("pa", "e", "rho"), CASES)
def test_no_adversary_flips_within_the_certified_radius(pa, e, rho):
    """For 200 conditional vote masses q(theta) with E q = pA, defect E everywhere and a mass rho of theta lost:
    at |gamma| = r and below, E s(q(theta + gamma)) - rho-part > 1/2. Quadrature on 2,001 points."""
    radius = certified(pa, e, rho) / SIGMA
    assert radius > 0.05
    rng = np.random.default_rng(7)
    for _ in range(200):
        z = clean_q(shapes(rng), pa)
        for gamma in (radius, -radius, radius / 2, 0.0):
            value = remaining(z, gamma, e, rho)
            assert value > 0.5 - 1e-6
            size = math.hypot(gamma, e)
            assert value >= norm.cdf(norm.ppf(pa) - size) - rho - 1e-6  # Theorem J itself


@pytest.mark.parametrize(("pa", "e", "rho"), CASES)
def test_the_best_probit_ramp_attains_the_bound(pa, e, rho):
    """q = Phi(a - b theta): the numerically best b is gamma / E (s = 1) and leaves Phi(z(pA) - hypot(gamma, E)).

    So without rho the certified radius cannot be larger: a step outside it the ramp flips the class.
    """
    radius = certified(pa, e, 0.0) / SIGMA
    best = minimize(lambda b: remaining(clean_q(lambda t: -b[0] * t, pa), radius, e, 0.0), [1.0], method="Nelder-Mead")
    assert best.fun == pytest.approx(norm.cdf(norm.ppf(pa) - math.hypot(radius, e)), abs=1e-6)
    assert 0.5 < best.fun < 0.5 + 2e-4  # what is above 1/2 is the slack of the sampler
    assert best.x[0] == pytest.approx(radius / e, rel=0.02)
    outside = remaining(clean_q(lambda t: -(1.02 * radius / e) * t, pa), 1.02 * radius, e, 0.0)
    assert outside < 0.5
    with_rho = certified(pa, e, rho) / SIGMA
    assert with_rho <= radius
    assert remaining(clean_q(lambda t: -(with_rho / e) * t, pa), with_rho, e, rho) > 0.5 - 1e-6


@pytest.mark.parametrize(("pa", "e"), [(0.9, 0.5), (0.99, 1.0)])
def test_free_minimisation_does_not_beat_the_ramp(pa, e):
    """Eight knots of z(q(theta)) are moved freely from a random start: never below 1/2 at the radius."""
    radius = certified(pa, e, 0.0) / SIGMA
    knots = np.linspace(-4, 4, 8)
    start = -np.random.default_rng(3).uniform(0.2, 1.5) * knots

    def value(heights):
        return remaining(clean_q(lambda t: np.interp(t, knots, heights), pa), radius, e, 0.0)

    found = minimize(value, start, method="Powell", options={"maxfev": 400})
    assert found.fun <= value(start)
    assert found.fun >= 0.5 - 1e-6
    assert found.fun < 0.51  # and it comes close: the search is a real attack


@pytest.mark.parametrize(
    ("pa", "pb", "e", "rho"), [(0.6, 0.05, 0.3, 0.01), (0.8, 0.1, 0.7, 0.0), (0.5, 0.2, 0.2, 0.02)]
)
def test_two_bound_radius_keeps_the_lead(pa, pb, e, rho):
    """p_A' stays above p_B' at the radius: A loses at the worst ramp, B gains at the worst ramp; ends of the range."""
    radius = certified(pa, e, rho, pb) / SIGMA
    assert radius > certified(pa, e, rho) / SIGMA if pa > 0.5 + rho else radius > 0
    rng = np.random.default_rng(11)
    for _ in range(60):
        a, b = clean_q(shapes(rng), pa), clean_q(shapes(rng), pb)
        low = remaining(a, radius, e, 0.0) - rho
        high = WEIGHTS @ norm.cdf(b(GRID + radius) + e) + rho
        assert low > high - 1e-6
    size = math.hypot(radius, e)  # tight: the two worst ramps meet
    assert norm.cdf(norm.ppf(pa) - size) - rho == pytest.approx(norm.cdf(norm.ppf(pb) + size) + rho, abs=1e-4)


def test_votes_at_the_clean_image_not_at_the_attacked_one():
    """With votes counted at x', rho outside is false (pA = .9, shift .5, rho = .01: claimed .7728, possible .7662).

    Our claim is the one for votes at the clean x, and there the adversary leaves more than it claims.
    """
    claimed = norm.cdf(norm.ppf(0.9) - 0.5) - 0.01
    assert claimed == pytest.approx(0.7728, abs=5e-5)
    reverse = norm.cdf(norm.ppf(0.9 - 0.01) - 0.5)
    assert reverse == pytest.approx(0.7662, abs=1e-4)
    assert reverse < claimed
    ramp = clean_q(lambda t: -50.0 * t, 0.9)  # a half-line in theta
    assert remaining(ramp, 0.5, 0.0, 0.01) >= claimed - 1e-3


@pytest.mark.parametrize("gamma_range", [(-7.0, 7.0), (-3.0, 8.0), (0.0, 5.0), (-4.0, 0.0)])
def test_radius_is_clipped_to_the_attack_range(gamma_range):
    """E and rho hold only for the gammas of the threat: a radius reaches to the farther end of their range."""
    low, high = gamma_range
    smoothed, _ = slide(0.1, 1.0)
    threat = TransformationThreat(Slide(KAPPA * UNIT), low, high)
    error = Given(Bound(0.1, 0.0, 0.0, "sound"))
    certifier = JointCertifier(Known(1 - 1e-8), error)
    radius = finish(certifier.procedure(smoothed, threat, X, Stream(0, 0))).radius
    assert radius == max(-low, high)


def test_abstains_or_certifies_the_prediction_alone():
    """pA <= 1/2: abstain. E or rho beyond the margin: radius 0, the prediction on the clean image stands."""
    assert certified(0.5, 0.0, 0.0) is None
    assert certified(0.3, 0.0, 0.0) is None
    assert certified(0.4, 0.0, 0.0, pb=0.4) is None
    assert certified(0.9, 5.0, 0.0) == 0
    assert certified(0.9, 0.0, 0.45) == 0
    assert certified(0.9, math.inf, 0.0) == 0
    assert certified(0.9, 0.0, 0.0) == pytest.approx(SIGMA * norm.ppf(0.9), rel=1e-5)


def test_a_file_that_l2_changes_pays_at_radius_zero_too():
    """Radius 0 is the clean file unless threat.l2 changes it: then it takes Phi(z(pA) - E) - rho > 1/2 there too."""
    smoothed = SmoothedClassifier(HalfSpace(UNIT, X, 1.0), 2, Slide(UNIT), None, Gaussian(SIGMA), Gaussian(SIGMA_EPS))
    for l2, pa, prediction in ((0.0, 0.9, 0), (0.5, 0.9, ABSTAIN), (0.5, 0.95, 0)):
        threat = TransformationThreat(Slide(UNIT), -1, 1, l2=l2)
        certifier = JointCertifier(Known(pa), Given(Bound(1.5, 0.01, 0.0, "sound")))
        assert finish(certifier.procedure(smoothed, threat, X, Stream(0, 0))).prediction == prediction


# ---------------------------------------------------------------- Theorem J': soft rho


def test_soft_excess_bounds_the_cost_of_a_larger_defect():
    """For every vote mass q: Phi(z(q) - d) >= Phi(z(q) - E0) - (2 Phi((d - E0)_+ / 2) - 1); equality at the middle."""
    q = np.concatenate([np.linspace(0.001, 0.999, 999), [1e-9, 1 - 1e-9]])
    for e0 in (0.0, 0.3, 1.0, 4.0):
        for d in np.linspace(0, 9, 91):
            cost = float(soft_excess(np.array(d), e0))
            slackness = norm.cdf(norm.ppf(q) - d) - (norm.cdf(norm.ppf(q) - e0) - cost)
            assert slackness.min() >= -1e-12
            if d <= e0:
                assert cost == 0
            else:  # the half-line in the middle of the two laws attains the total variation
                z = (e0 + d) / 2
                assert norm.cdf(z - e0) - norm.cdf(z - d) == pytest.approx(cost, abs=1e-12)


def test_soft_excess_is_the_total_variation_of_two_normals():
    """1/2 int |phi(t - E0) - phi(t - d)| dt, by quadrature."""
    t = np.linspace(-12, 20, 400_001)
    for e0, d in ((0.0, 0.2), (0.5, 1.4), (1.0, 6.0)):
        variation = np.abs(norm.pdf(t - e0) - norm.pdf(t - d)).sum() * (t[1] - t[0]) / 2
        assert float(soft_excess(np.array(d), e0)) == pytest.approx(variation, abs=1e-8)


@pytest.mark.parametrize(("pa", "e0"), [(0.9, 0.3), (0.99, 0.8), (0.75, 0.1)])
def test_theorem_j_prime_attacked(pa, e0):
    """Random defects d(theta), aimed by the adversary, and random q: E Phi(z(q(theta + gamma)) - d(theta)) stays
    above Phi(z(pA) - hypot(gamma, E0)) - rho~, and above 1/2 at the certified radius with that rho~."""
    rng = np.random.default_rng(5)
    radii = []
    for _ in range(150):
        z = clean_q(shapes(rng), pa)
        bad = np.sin(GRID * rng.uniform(0, 4) + rng.uniform(0, 7)) > 0.7
        d = e0 * rng.uniform(0.2, 1) + rng.exponential(0.6) * bad
        rho = float(WEIGHTS @ soft_excess(d, e0))
        radius = (certified(pa, e0, rho) or 0.0) / SIGMA
        radii.append(radius)
        for gamma in (radius, -radius, 0.3):
            value = WEIGHTS @ norm.cdf(z(GRID + gamma) - d)
            assert value >= norm.cdf(norm.ppf(pa) - math.hypot(gamma, e0)) - rho - 1e-6
            if abs(gamma) <= radius and radius > 0:
                assert value > 0.5 - 1e-6
        assert rho <= WEIGHTS @ (d > e0)  # never worse than the hard rho
    assert np.mean(np.array(radii) > 0) > 0.3


# ---------------------------------------------------------------- sequential thresholds


@pytest.mark.parametrize("rho", [0.0, 0.003, 0.1])
@pytest.mark.parametrize("e", [0.0, 0.4, 1.1])
@pytest.mark.parametrize("radius", [0.1, 1.0, 3.0])
def test_threshold_of_a_radius_is_where_the_fixed_radius_reaches_it(radius, e, rho):
    """pA just above threshold(r) certifies r with known pA, just below does not: one theorem, two plans."""
    smoothed, threat = slide(e, 10.0)
    plan = Known(0.9)
    error = Given(Bound(e, rho, 0.0, "sound"))
    finish(JointCertifier(plan, error).procedure(smoothed, threat, X, Stream(0, 0)))
    threshold = plan.threshold(radius)
    slack = smoothed.slack(X)
    assert threshold == pytest.approx(norm.cdf(math.hypot(radius / SIGMA, e) + norm.ppf(0.5 + rho)) + slack, abs=1e-11)
    step = 1e-7 * (1 - threshold)
    assert certified(threshold + step, e, rho) >= radius
    assert certified(threshold - step, e, rho) < radius
    assert plan.threshold(0.0) == pytest.approx(0.5 + slack, abs=2e-12)
    assert certified(0.5 + slack + 1e-9, e, rho) is not None
    assert certified(0.5 + slack - 1e-9, e, rho) is None


def test_threshold_is_out_of_reach_when_rho_is():
    """rho >= 1/2 leaves nothing: threshold 1, never passed."""
    for rho in (0.5, 0.8, 1.0):
        smoothed, threat = slide(0.1, 10.0)
        plan = Known(0.9)
        error = Given(Bound(0.1, rho, 0.0, "sound"))
        certificate = finish(JointCertifier(plan, error).procedure(smoothed, threat, X, Stream(0, 0)))
        assert plan.threshold(0.1) >= 1
        assert certificate.radius == 0


# ---------------------------------------------------------------- what is refused


def test_refusals():
    """Pixel threats, other transformations, laws and noises that Theorem J does not cover, radii out of reach."""
    smoothed, threat = slide(0.1, 1.0)
    error = Given(Bound(0.1, 0.0, 0.0, "sound"))
    certifier = JointCertifier(Known(0.9), error)
    certifier.check(smoothed, threat)
    with pytest.raises(UncertifiableError, match="certify=direct"):
        certifier.check(smoothed, PixelThreat())
    with pytest.raises(UncertifiableError, match="smoothed over slide, the threat is rotation"):
        certifier.check(smoothed, TransformationThreat(Rotation(), -30, 30))
    without = SmoothedClassifier(smoothed.base, 2, Slide(KAPPA * UNIT), None, Gaussian(SIGMA), None, block=16)
    with pytest.raises(UncertifiableError, match="Gaussian pixel noise"):
        certifier.check(without, threat)
    correlated = Gaussian(covariance=torch.eye(4))
    without = SmoothedClassifier(smoothed.base, 2, Slide(KAPPA * UNIT), None, Gaussian(SIGMA), correlated, block=16)
    with pytest.raises(UncertifiableError, match="noise=gaussian"):
        certifier.check(without, threat)
    plain = SmoothedClassifier(smoothed.base, 2, noise=Gaussian(0.1))
    with pytest.raises(UncertifiableError, match="without a law nothing is drawn of slide"):
        certifier.check(plain, threat)
    ceiling = SIGMA * norm.ppf(FixedN(n=1000, alpha=0.98e-3).ceiling)
    with pytest.raises(UncertifiableError, match="beyond the threat's range of 1 units"):
        JointCertifier(GroupSequential([0.99 * ceiling], n=1000), error).check(smoothed, threat)
    smoothed, threat = slide(0.1, 10.0)
    JointCertifier(GroupSequential([0.99 * ceiling], n=1000), error).check(smoothed, threat)
    with pytest.raises(UncertifiableError, match="out of reach"):
        JointCertifier(GroupSequential([1.0, 1.01 * ceiling], n=1000), error).check(smoothed, threat)
