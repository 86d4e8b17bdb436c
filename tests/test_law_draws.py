"""What smoothing laws draw and measure: gauges, inscribed balls, densities and samples against SciPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from gsmooth_lightning.smoothing import Exponential, Gaussian, Laplace, Rayleigh, Uniform
from gsmooth_lightning.stream import Stream, TrainingSource
from laws import IN_BOXES, LAWS, ONE_SIDED, every_law, law_of

# ---------------------------------------------------------------- gauge and reach


def test_gauges():
    """In numbers, for images and vectors, in float64 whatever comes in."""
    delta = torch.tensor([[[[0.5, -0.25]]], [[[0.0, 1.0]]]], dtype=torch.float32)
    for law, expected in (
        (Laplace(0.5), [1.5, 2.0]),
        (Uniform(-1, 1), [1 - 0.75 * 0.875, 0.5]),
        (Uniform(0, 0.8), [1 - 0.375 * 0.6875, 1.0]),
        (Exponential(2.0), [math.inf, 2.0]),
    ):
        gauge = law.gauge(delta)
        assert gauge.dtype == torch.float64
        np.testing.assert_allclose(gauge, expected, rtol=1e-6)
    many = torch.full((1, 3, 224, 224), 1e-9, dtype=torch.float64)
    assert float(Uniform(-1, 1).gauge(many)) == pytest.approx(-math.expm1(150528 * math.log1p(-5e-10)), rel=1e-6)


@every_law
def test_gauge_of_one_parameter_in_any_shape(name):
    """(n,), (n, 1) and (n, 1, 1) are the same parameter; 0 has size 0."""
    law = law_of(name)
    delta = torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    if name != "gaussian":
        assert torch.equal(law.gauge(delta), law.gauge(delta[:, None]))
    assert torch.equal(law.gauge(delta[:, None]), law.gauge(delta[:, None, None]))
    assert float(law.gauge(delta[:, None])[0]) == 0
    assert torch.equal(law.log_density(delta), law.log_density(delta[:, None, None]))
    assert law.log_density(delta.float()).dtype == torch.float64


@pytest.mark.parametrize("name", ONE_SIDED)
def test_one_sided_laws_certify_no_negative_shift(name):
    """gauge inf, a low end of 0, and the attribute that says so."""
    law = law_of(name)
    assert law.one_sided
    assert float(law.gauge(torch.tensor([[-1e-9]]))) == math.inf
    assert law.interval(0.9, 0.05)[0] == 0.0
    assert not any(law_of(other).one_sided for other in LAWS if other not in ONE_SIDED)


@pytest.mark.parametrize("name", IN_BOXES)
def test_reach_is_the_inscribed_ball(name):
    """Shifts in the ball of the law's norm stay within the size, on an axis they meet it."""
    law, random = law_of(name), np.random.default_rng(0)
    order = {"gaussian": 2}.get(name, 1)
    for size in (0.05, 0.4, 0.9):
        reach = float(law.reach(size))
        shifts = np.concatenate([random.normal(size=(50, 4)), np.eye(4)])
        shifts = np.abs(shifts) if law.one_sided else shifts
        shifts *= reach / np.linalg.norm(shifts, ord=order, axis=1, keepdims=True)
        gauge = law.gauge(torch.from_numpy(shifts)).numpy()
        assert (gauge <= size + 1e-12).all()
        np.testing.assert_allclose(gauge[-4:], size, rtol=1e-12)
    assert {Gaussian: "l2", Laplace: "l1", Uniform: "l1", Exponential: "l1"}[type(law)] == law.norm


def test_reach_of_ellipsoids():
    """The inscribed ball: the smallest sigma, the root of the smallest eigenvalue."""
    assert Gaussian([0.2, 0.9]).norm == "l2"
    assert float(Gaussian([0.2, 0.9]).reach(2.0)) == pytest.approx(0.4)
    covariance = np.array([[1.0, 0.7], [0.7, 2.0]])
    expected = math.sqrt(np.linalg.eigvalsh(covariance)[0])
    assert float(Gaussian(covariance=covariance).reach(1.0)) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- density


@every_law
def test_density(name):
    """SciPy's, and it integrates to 1 over the span, split at the kinks."""
    law, distribution = LAWS[name]
    low, high = law.span
    z = np.linspace(low - 0.5, high + 0.5, 1001)
    density = np.exp(law.log_density(torch.from_numpy(z)).numpy())
    np.testing.assert_allclose(density, distribution.pdf(z), rtol=1e-9, atol=1e-15)
    assert distribution.cdf(low) + distribution.sf(high) < 2**-51

    def at(point):
        return math.exp(float(law.log_density(torch.tensor([point], dtype=torch.float64))))

    middle = distribution.ppf([0.01, 0.5, 0.99])
    pieces = np.unique(np.concatenate([[low, high], middle, [k for k in law.kinks if low < k < high]]))
    assert sum(quad(at, a, b)[0] for a, b in itertools.pairwise(pieces)) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("name", IN_BOXES)
def test_density_of_independent_coordinates(name):
    """The sum over coordinates, for images."""
    law, distribution = LAWS[name]
    z = torch.from_numpy(distribution.rvs(size=(5, 1, 2, 3), random_state=0))
    np.testing.assert_allclose(law.log_density(z), distribution.logpdf(z.numpy()).sum((1, 2, 3)), rtol=1e-12)
    outside = z.clone()
    outside[0, 0, 0, 0] = -100.0
    expected = distribution.logpdf(outside.numpy()).sum((1, 2, 3))
    np.testing.assert_allclose(law.log_density(outside), expected, rtol=1e-12)


def test_density_of_anisotropic_gaussians():
    """SciPy's multivariate normal."""
    covariance = np.array([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]])
    z = np.random.default_rng(0).normal(size=(6, 3))
    full = Gaussian(covariance=covariance).log_density(torch.from_numpy(z))
    np.testing.assert_allclose(full, stats.multivariate_normal(np.zeros(3), covariance).logpdf(z), rtol=1e-12)
    diagonal = Gaussian([0.2, 1.0, 3.0]).log_density(torch.from_numpy(z))
    expected = stats.multivariate_normal(np.zeros(3), np.diag([0.04, 1, 9])).logpdf(z)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-12)


# ---------------------------------------------------------------- sampling

N = 200_000


@every_law
def test_samples_follow_the_law(name):
    """Mean and variance within five standard errors, Kolmogorov-Smirnov, float64, inside the span."""
    law, distribution = LAWS[name]
    z = law.sample(Stream(0, 0).at("estimate", 0), N, (1,)).numpy()
    assert z.dtype == np.float64
    assert z.shape == (N, 1)
    z = z[:, 0]
    assert law.span[0] <= z.min()
    assert z.max() <= law.span[1]
    mean, variance = exact_moments(name)
    fourth = ((z - mean) ** 4).mean()
    assert abs(z.mean() - mean) < 5 * math.sqrt(variance / N)
    assert abs(((z - mean) ** 2).mean() - variance) < 5 * math.sqrt((fourth - variance**2) / N)
    assert stats.kstest(z, distribution.cdf).pvalue > 1e-3


def exact_moments(name):
    """Mean and variance; those of ln theta for Rayleigh: ln(scale) + (ln 2 - Euler) / 2 and pi^2 / 24."""
    return {
        "gaussian": (0, 0.49),
        "laplace": (0, 0.32),
        "uniform": (0, 0.75),
        "uniform from 0": (1.5, 0.75),
        "exponential": (0.5, 0.25),
        "folded normal": (0.5 * math.sqrt(2 / math.pi), 0.25 * (1 - 2 / math.pi)),
        "rayleigh": (math.log(2) + (math.log(2) - np.euler_gamma) / 2, math.pi**2 / 24),
    }[name]


@pytest.mark.parametrize("name", IN_BOXES)
def test_coordinates_are_independent(name):
    """Correlation of coordinates, of their sizes, and of neighbouring draws within five standard errors."""
    z = law_of(name).sample(Stream(1, 0).at("estimate", 0), N, (2,)).numpy()
    sizes = np.abs(z - z.mean(0))
    for a, b in ((z[:, 0], z[:, 1]), (sizes[:, 0], sizes[:, 1]), (z[1:, 0], z[:-1, 1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(N)


@every_law
def test_draws_are_addressed(name):
    """The same block again gives the same draws, another one others; any shape; float32 for training."""
    law = law_of(name)

    def draw(block, shape=(1, 2, 2)):
        return law.sample(Stream(4, 2).at("select", block), 6, shape)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1).flatten(), draw(1, (4,)).flatten())
    training = law.sample(TrainingSource(torch.device("cpu")), 1000, (3, 2))
    assert training.dtype == torch.float32
    assert training.shape == (1000, 3, 2)
    assert training.isfinite().all()


class Uniforms:
    """A source that returns chosen uniforms."""

    def __init__(self, *values):
        self.values = torch.tensor(values, dtype=torch.float64)

    def uniform(self, *shape):
        return self.values.clone().reshape(shape)

    def exponential(self, *shape):
        return -torch.log1p(-self.uniform(*shape))


def test_extreme_uniforms():
    """The ends of [0, 1) give finite draws inside the span; Laplace's tails are reached on both sides."""
    last = 1 - 2**-53
    laplace = Laplace(0.4).sample(Uniforms(0.0, 0.5 - 2**-53, 0.5, last), 4, ())
    np.testing.assert_allclose(laplace, [0, -0.4 * 52 * math.log(2), 0, 0.4 * 52 * math.log(2)], rtol=1e-12, atol=1e-15)
    for law in (Rayleigh(2.0), Exponential(2.0), Uniform(0, 3), Laplace(0.4)):
        z = law.sample(Uniforms(0.0, last), 2, ())
        assert z.isfinite().all()
        assert law.span[0] <= float(z.min())
        assert float(z.max()) <= law.span[1]


def test_sources_draw_exponentials():
    """-ln(1 - u) of the addressed uniforms: existing draws do not move."""
    u = Stream(3, 1).at("estimate", 5).uniform(4, 2)
    exponential = Stream(3, 1).at("estimate", 5).exponential(4, 2)
    assert exponential.dtype == torch.float64
    np.testing.assert_allclose(exponential, -np.log1p(-u.numpy()), rtol=1e-14)
