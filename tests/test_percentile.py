"""Median smoothing: exact levels of the order statistics, linear functions, attacks on exactly known medians."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import binom, multinomial, norm
from torch import nn

from gsmooth_lightning.certify import AdditiveCertifier, ReceivedCertifier
from gsmooth_lightning.certify.additive import GRID
from gsmooth_lightning.certify.base import TransferCertifier
from gsmooth_lightning.certify.percentile import CertifiedInterval, PercentileCertifier, lower_order_statistic
from gsmooth_lightning.error import Bound, InverseBound
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN, GroupSequential
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, FoldedNormal, Gaussian, Laplace, Uniform
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Brightness, GaussianBlur
from plans import finish

SIGMA = 0.25


class Linear(nn.Module):
    """w.x + b, one number an image."""

    def __init__(self, w, b=0.0, keepdim=False):
        super().__init__()
        self.w, self.b, self.keepdim = w.double(), b, keepdim

    def forward(self, x):
        value = (x.double() * self.w).flatten(1).sum(1, keepdim=self.keepdim) + self.b
        return value.float()


class Steps(nn.Module):
    """A step function of the mean: values[k] between edges k and k + 1."""

    def __init__(self, edges, values):
        super().__init__()
        self.edges, self.values = torch.as_tensor(edges), torch.as_tensor(values)

    def forward(self, x):
        return self.values[torch.bucketize(x.double().flatten(1).mean(1), self.edges)]


class Quantiles(SmoothedClassifier):
    """Draws the noise's n quantiles at (k + 1/2) / n in place of random ones: a sample without chance."""

    def draw(self, x, source, n):
        levels = (np.arange(n) + 0.5) / n
        return x + torch.from_numpy(self.quantile(levels)).view(-1, *[1] * x.ndim).to(x.dtype)


def image(seed=0, shape=(1, 4, 4)):
    """An 8-bit image, k/255."""
    return torch.from_numpy(np.random.default_rng(seed).integers(64, 192, shape)).float() / 255


def scalar(base, noise=None, **arguments):
    return SmoothedClassifier(base, 2, noise=noise or Gaussian(SIGMA), block=64, **arguments).eval()


def interval_of(smoothed, x, radius, threat=None, n=2000, alpha=1e-3, seed=0) -> CertifiedInterval:
    certifier = PercentileCertifier(AdditiveCertifier(FixedN(1, n, alpha)), radius)
    ((_, interval),) = certifier.certify(smoothed, threat or PixelThreat(), [(0, x)], seed)
    return interval


# ---------------------------------------------------------------- order statistics

LEVELS = (0.5, 0.6, 0.841344746, 0.97, 0.999)
SIZES = (1, 5, 40, 300, 5000)


@pytest.mark.parametrize("alpha", [0.1, 0.01, 5e-4])
def test_order_statistics_of_a_continuous_law_are_exact(alpha):
    """P(X_(i) >= the (1-q)-quantile) = P(Bin(n, 1-q) < i) <= alpha, and > alpha for i + 1; 0 means none would do."""
    for n, q in itertools.product(SIZES, LEVELS):
        i = lower_order_statistic(n, q, alpha)
        assert 0 <= i <= n / 2
        assert i == 0 or binom.cdf(i - 1, n, 1 - q) <= alpha
        assert binom.cdf(i, n, 1 - q) > alpha * (1 - 1e-9)
        assert (i == 0) == (q**n > alpha)


@pytest.mark.parametrize("alpha", [0.1, 0.01])
@pytest.mark.parametrize(
    "masses", [[0.16, 0.34, 0.5], [0.159, 0.341, 0.5], [0.1, 0.06, 0.84], [0.5, 0.5], [0.03, 0.97], [1.0], [0.2] * 5]
)
def test_order_statistics_with_atoms_hold_their_level(masses, alpha):
    """P(f >= X_(i)) > q, strictly, fails with probability <= alpha; the law of X_(i) over the atoms is exact."""
    masses = np.array(masses)
    at_least = masses[::-1].cumsum()[::-1]
    for n, q in itertools.product(SIZES, (*LEVELS, 0.84, 0.159, 0.97)):
        if q < 0.5 or not (i := lower_order_statistic(n, q, alpha)):
            continue
        below = np.append(0.0, binom.sf(i - 1, n, np.minimum(masses.cumsum(), 1.0)))  # P(X_(i) <= atom)
        assert np.diff(below)[at_least <= q].sum() <= alpha


def test_the_interval_by_enumeration():
    """Both ends together, every multinomial outcome of n = 12 draws of 4 atoms: missed with probability <= alpha."""
    n, alpha, q = 12, 0.1, 0.6
    i = lower_order_statistic(n, q, alpha / 2)
    assert i > 0
    outcomes = np.array([c for c in itertools.product(range(n + 1), repeat=4) if sum(c) == n])
    ranks = outcomes.cumsum(1)
    low, high = (ranks >= i).argmax(1), (ranks >= n + 1 - i).argmax(1)
    for p in ([0.25] * 4, [0.4, 0.2, 0.2, 0.2], [0.39, 0.21, 0.01, 0.39], [0.41, 0.09, 0.09, 0.41]):
        at_least, at_most = np.cumsum(p[::-1])[::-1], np.cumsum(p)
        wrong = (at_least[low] <= q + 1e-12) | (at_most[high] <= q + 1e-12)
        assert multinomial.pmf(outcomes, n, p)[wrong].sum() <= alpha


# ---------------------------------------------------------------- linear functions


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.3])
def test_a_linear_function_moves_by_radius_times_norm(radius):
    """The median of w.x + b under the worst attack is w.x + b -+ r ||w||: inside, and the ends converge to it."""
    x = image()
    w = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 4, 4)))
    median, norm_w = float((w * x.double()).sum()) + 0.7, float(w.norm())
    widths = []
    for n in (500, 50_000):
        found = interval_of(scalar(Linear(w, 0.7)), x, radius, n=n)
        assert found.low <= median - radius * norm_w
        assert found.high >= median + radius * norm_w
        assert found.low <= found.prediction <= found.high
        assert found.prediction == pytest.approx(median, abs=6 * SIGMA * norm_w / math.sqrt(n))
        widths.append((found.high - found.low) / norm_w - 2 * radius)
        # of the order statistic: quantiles of Phi(-r/sigma) minus five standard errors
        p = norm.cdf(-radius / SIGMA)
        farthest = SIGMA * norm.ppf(max(p - 5 * math.sqrt(p * (1 - p) / n), 1e-4))
        assert found.low >= median + farthest * norm_w
        assert found.high <= median - farthest * norm_w
    assert widths[1] < widths[0] / 5


@pytest.mark.parametrize(("noise", "scale"), [(Laplace(0.2), 0.2), (Uniform(-0.5, 0.5), 0.25), (Uniform(0, 1), 0.25)])
def test_l1_attacks_on_one_pixel(noise, scale):
    """Where the l1 radius is attained: a function of one pixel moves by r; Uniform(0, 1) has its median at 1/2."""
    w = torch.zeros(1, 4, 4)
    w[0, 2, 1] = 1.0
    x, radius = image(), 0.1
    median = float(x[0, 2, 1]) + sum(noise.span) / 2
    found = interval_of(scalar(Linear(w), noise), x, radius, PixelThreat(norm="l1"), n=20_000)
    assert found.low <= median - radius < median + radius <= found.high
    assert found.high - found.low < 2 * radius + 0.2 * scale
    assert (found.unit, found.guarantee, found.radius) == ("l1", "sound", radius)


def test_a_parameter_of_brightness():
    """The mean under random brightness, attacked by brightness; a one-sided law bounds attacks upwards from 0."""
    x, base = image(), Linear(torch.full((1, 4, 4), 1 / 16))
    mean = float(x.double().mean())
    for law, low in ((Gaussian(0.2), -0.1), (FoldedNormal(0.2), 0.0)):
        threat = TransformationThreat(Brightness(), low, 0.1, saved="real")
        smoothed = SmoothedClassifier(base, 2, transform=Brightness(), law=law, block=64).eval()
        found = interval_of(smoothed, x, 0.5, threat, n=20_000)
        assert found.radius == 0.1  # the threat's range ends there
        assert found.guarantee == "heuristic"
        centre = mean + (0.0 if low else 0.2 * norm.ppf(0.75))
        assert found.low <= centre + low < centre + 0.1 <= found.high
        assert found.high < centre + 0.125


# ---------------------------------------------------------------- attacks on exactly known medians


@pytest.mark.parametrize(
    ("noise", "law", "norm_of"),
    [
        (Gaussian(0.3), stats.norm(scale=0.3), "l2"),
        (Laplace(0.2), stats.laplace(scale=0.2), "l1"),
        (Uniform(-0.6, 0.6), stats.uniform(-0.6, 1.2), "l1"),
        (Uniform(0.0, 1.0), stats.uniform(0, 1), "l1"),
    ],
)
def test_no_shift_within_the_radius_moves_the_median_out(noise, law, norm_of):
    """40 random step functions of one pixel, atoms and all: the median of the attacked law, exactly, for 201 shifts.

    The certificate sees the law's quantiles in place of random draws, so that nothing here is left to chance; for
    increasing functions some interval is no wider than the attack and one step on each side.
    """
    rng = np.random.default_rng(0)
    x, n = torch.full((1, 1, 1), 0.5), 4096
    tight = 0
    for trial in range(40):
        radius = float(rng.uniform(0.02, 0.25))
        edges = np.sort(rng.uniform(-0.5, 1.5, 12))
        values = np.sort(rng.normal(size=13)) if trial % 2 else rng.normal(size=13).round(1)
        smoothed = Quantiles(Steps(edges, values), 2, noise=noise, block=n).eval()
        smoothed.quantile = law.ppf
        certifier = PercentileCertifier(AdditiveCertifier(FixedN(1, n, 1e-3)), radius)
        found = finish(certifier.procedure(smoothed, PixelThreat(norm=norm_of), x, Stream(0, 0)))

        shifts = np.linspace(-radius, radius, 201)
        bounds = np.concatenate([[-np.inf], edges, [np.inf]])
        mass = np.diff(law.cdf(bounds[None] - 0.5 - shifts[:, None]), axis=1)  # (201, 13)
        order = np.argsort(values)
        reached = mass[:, order].cumsum(1)
        least = values[order][(reached >= 0.5 - 1e-12).argmax(1)]  # the lower and the upper median
        most = values[order][(reached > 0.5 + 1e-12).argmax(1)]
        assert (least >= found.low).all()
        assert (most <= found.high).all()
        tight += least.min() == found.low and most.max() == found.high
    assert tight >= 5


@pytest.mark.parametrize("n", [60, 1000])
def test_ends_are_the_innermost_order_statistics_at_half_of_alpha(n):
    """Ranks of the ends among the outputs: P(Bin(n, p) < rank) <= alpha / 2, and no rank further in would do."""
    x, alpha = torch.full((1, 1, 1), 0.5), 0.01
    smoothed = Quantiles(Linear(torch.ones(1, 1, 1)), 2, noise=Gaussian(0.3), block=n).eval()
    smoothed.quantile = stats.norm(scale=0.3).ppf
    certifier = PercentileCertifier(AdditiveCertifier(FixedN(1, n, alpha)), 0.2)
    found = finish(certifier.procedure(smoothed, PixelThreat(), x, Stream(0, 0)))
    values = smoothed.base(smoothed.draw(x, None, n))
    p = found.details["percentile"]
    for rank in (int((values <= found.low).sum()), int((values >= found.high).sum())):
        assert binom.cdf(rank - 1, n, p) <= alpha / 2 < binom.cdf(rank, n, p)


def test_a_median_at_an_atom_is_inside():
    """f jumps where the attack just moves half of the mass: the interval must hold the value beyond the jump."""
    x, radius, n = torch.full((1, 1, 1), 0.5), 0.2, 4096
    for place, side in ((0.5 - radius, "low"), (0.5 + radius, "high")):
        smoothed = Quantiles(Steps([place], [0.0, 1.0]), 2, noise=Gaussian(0.3), block=n).eval()
        smoothed.quantile = stats.norm(scale=0.3).ppf
        certifier = PercentileCertifier(AdditiveCertifier(FixedN(1, n, 1e-3)), radius)
        found = finish(certifier.procedure(smoothed, PixelThreat(), x, Stream(0, 0)))
        assert getattr(found, side) == (0.0 if side == "low" else 1.0)
        assert found.prediction == (1.0 if side == "low" else 0.0)


# ---------------------------------------------------------------- what enters the level


def test_percentile_is_that_of_chiang_less_the_slack():
    """Phi(-r / sigma) - slack; inputs off the noise grid add their rounding to the radius."""
    x, smoothed = image(), scalar(Linear(torch.ones(1, 4, 4)))
    slack = smoothed.slack(x)
    found = interval_of(smoothed, x, 0.2)
    assert found.details["percentile"] == pytest.approx(norm.cdf(-0.2 / SIGMA) - slack, abs=1e-11)
    assert found.details["percentile"] < norm.cdf(-0.2 / SIGMA)
    found = interval_of(smoothed, x, 0.2, PixelThreat(saved="float"))
    rounding = GRID * 4 / smoothed.levels
    assert found.details["percentile"] == pytest.approx(norm.cdf(-(0.2 + rounding) / SIGMA) - slack, abs=1e-11)


class Missing(TransferCertifier):
    """A theorem that misses a mass rho of the draws, at its own alpha."""

    def __init__(self, plan, rho):
        super().__init__(plan)
        self.rho = rho

    def check(self, smoothed, threat):
        pass

    def bound(self, smoothed, threat, x, stream):
        return Bound(0.0, self.rho, 1e-4, "distributional")
        yield

    def transfer(self, smoothed, threat, bound, dim, slack):
        return lambda p, radius: np.maximum(norm.cdf(norm.ppf(p) - radius) - bound.rho, 0.0)


def test_an_error_bound_widens_the_interval_and_may_leave_nothing():
    """rho is taken from the percentile, its alpha added; from rho = 1/2 on nothing is known about the median."""
    x, smoothed = image(), scalar(Linear(torch.ones(1, 4, 4)))
    certify = {
        rho: finish(
            PercentileCertifier(Missing(FixedN(1, 2000), rho), 0.5).procedure(smoothed, PixelThreat(), x, Stream(0, 0))
        )
        for rho in (0.0, 0.1, 0.5)
    }
    assert certify[0.1].low < certify[0.0].low < certify[0.0].high < certify[0.1].high
    assert certify[0.1].details["percentile"] == pytest.approx(1 - norm.cdf(norm.ppf(0.6) + 0.5), abs=1e-9)
    assert (certify[0.5].low, certify[0.5].high) == (-math.inf, math.inf)
    assert certify[0.1].alpha == pytest.approx(1.1e-3)
    assert certify[0.1].guarantee == "distributional"


def test_images_and_layouts():
    """Several images in flight, (n,) and (n, 1) outputs, a last block in part: the same numbers; draws by index."""
    x, w = image(), torch.ones(1, 4, 4)
    theorem = AdditiveCertifier(FixedN(1, 100, 0.01))
    found = {}
    for keepdim in (False, True):
        certifier = PercentileCertifier(theorem, 0.05)
        smoothed = scalar(Linear(w, keepdim=keepdim))
        found[keepdim] = dict(certifier.certify(smoothed, PixelThreat(), [(0, x), (1, x), (2, image(3))], seed=4))
    assert [i.low for i in found[True].values()] == [i.low for i in found[False].values()]
    first, second, third = (found[True][k] for k in range(3))
    assert first.low != second.low
    assert third.prediction != first.prediction
    assert (first.n, first.evaluations, first.seed) == (100, 128, 4)
    assert first.seconds > 0
    alone = interval_of(scalar(Linear(w)), x, 0.05, n=100, alpha=0.01, seed=4)
    assert (alone.low, alone.prediction, alone.high) == (first.low, first.prediction, first.high)


# ---------------------------------------------------------------- refusals


class Fails(nn.Module):
    """NaN for bright images."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.where(mean > 0.55, torch.nan, mean)


def test_nan_is_refused():
    with pytest.raises(RequestError, match=r"NaN or infinity on \d+ of 2000 draws of image 0"):
        interval_of(scalar(Fails()), torch.full((1, 4, 4), 128 / 255), 0.1)


@pytest.mark.parametrize(
    "output",
    [
        lambda x: x.flatten(1)[:, :2],
        lambda x: x.flatten(1)[:, :1].long(),
        lambda x: x,
        lambda x: x.mean(),
    ],
)
def test_networks_without_one_real_output_are_refused(output):
    class Odd(nn.Module):
        def forward(self, x):
            return output(x)

    certifier = PercentileCertifier(AdditiveCertifier(FixedN(1, 100, 0.01)), 0.05)
    with pytest.raises(RequestError, match="one floating-point output"):
        finish(certifier.procedure(scalar(Odd()), PixelThreat(), image(), Stream(0, 0)))


def test_too_few_draws_are_refused_with_the_number_that_works():
    x, smoothed = image(), scalar(Linear(torch.ones(1, 4, 4)))
    with pytest.raises(UncertifiableError, match=r"take sampling\.n=") as refused:
        interval_of(smoothed, x, 0.6, n=100)
    needed = int(str(refused.value).split("sampling.n=")[1].split()[0])
    assert needed == pytest.approx(math.log(5e-4) / math.log(norm.cdf(0.6 / SIGMA)), abs=2)
    found = interval_of(smoothed, x, 0.6, n=needed)
    assert -math.inf < found.low < found.high < math.inf


def test_a_radius_far_out_of_an_exponential_laws_reach_is_refused():
    """e^(rate * radius) is beyond floats, and T(1) is still 1."""
    smoothed = SmoothedClassifier(nn.Flatten(), 2, GaussianBlur(), law=Exponential(100.0), noise=Gaussian(0.1))
    threat = TransformationThreat(GaussianBlur(), 0, 36, saved="real")
    with pytest.raises(UncertifiableError, match=r"lower certify\.radius"):
        PercentileCertifier(AdditiveCertifier(FixedN(n=1000)), 30.0).check(smoothed, threat)


def test_a_radius_out_of_the_laws_reach_is_refused():
    with pytest.raises(UncertifiableError, match="no percentile"):
        interval_of(scalar(Linear(torch.ones(1, 4, 4)), Uniform(-0.5, 0.5)), image(), 0.6, PixelThreat(norm="l1"))


def test_hypotheses_are_the_theorems():
    """An l1 attack on Gaussian noise beside a transformation, say: AdditiveCertifier refuses it, before any work."""
    smoothed = SmoothedClassifier(
        Linear(torch.ones(1, 4, 4)), 2, transform=Brightness(), law=Gaussian(0.1), noise=Gaussian(0.25)
    ).eval()
    with pytest.raises(UncertifiableError, match="random transformation"):
        interval_of(smoothed, image(), 0.1)


@pytest.mark.parametrize("radius", [-0.1, math.inf, math.nan, True, "1"])
def test_radius_is_refused(radius):
    with pytest.raises(RequestError, match=r"certify\.radius"):
        PercentileCertifier(AdditiveCertifier(FixedN()), radius)


def test_sequential_plans_are_refused():
    with pytest.raises(RequestError, match="sampling=fixed"):
        PercentileCertifier(AdditiveCertifier(GroupSequential([0.1])), 0.1)


def test_received_files_are_refused():
    """Their theorem is about the clean image that an attack made them of, not about attacks on them."""
    with pytest.raises(RequestError, match="use the direct or the joint theorem"):
        PercentileCertifier(ReceivedCertifier(FixedN(), InverseBound()), 5.0)


def test_levels_of_order_statistics_are_checked():
    with pytest.raises(RequestError, match="alpha"):
        lower_order_statistic(10, 0.5, 0.6)
