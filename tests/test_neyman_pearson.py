"""The quadrature of the transfer function against exact values, brute force, and laws without a closed form."""

import numpy as np
import pytest
import torch
from scipy.stats import cauchy, logistic, multivariate_normal, norm

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing import Gaussian, Uniform
from gsmooth_lightning.smoothing.neyman_pearson import neyman_pearson, transfer_of

P = np.array([1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1 - 1e-4])


def density(law, shift=0.0):
    """log_density of a shifted scipy law of one coordinate."""
    return lambda z: torch.from_numpy(law.logpdf(z[:, 0].numpy() - shift))


def sorted_cells(p, clean, attacked):
    """Brute force: cells of lowest likelihood ratio first, the last one in part."""
    order = np.argsort(attacked / clean, kind="stable")
    return np.interp(p, [0, *np.cumsum(clean[order])], [0, *np.cumsum(attacked[order])])


def check(value, error, truth, within):
    assert (np.abs(value - truth) <= error + 1e-15).all(), (value - truth, error)
    assert (error < within).all(), error


@pytest.mark.parametrize("shift", [0.05, 0.7, -2.0, 5.0])
def test_gaussian_in_one_coordinate(shift):
    """Phi(z(p) - |shift|), within the error that the quadrature states, itself below 1e-7."""
    value, error = transfer_of(Gaussian(1.0), [shift], P)
    check(value, error, norm.cdf(norm.ppf(P) - abs(shift)), 1e-7)


@pytest.mark.parametrize("shift", [(0.9, -0.4), (0.0, 1.5)])
def test_gaussian_in_two_correlated_coordinates(shift):
    """The same with Mahalanobis' size of the shift."""
    covariance = np.array([[1.0, 0.7], [0.7, 2.0]])
    law = Gaussian(covariance=covariance)
    size = float(law.gauge(torch.tensor([shift], dtype=torch.float64)))
    value, error = transfer_of(law, shift, P, tolerance=1e-5)
    check(value, error, norm.cdf(norm.ppf(P) - size), 2e-5)


def test_logistic_law():
    """A log-concave law that the library does not have: half-lines are worst, F(F^-1(p) - shift)."""
    for shift in (0.2, 1.0, 4.0):
        value, error = neyman_pearson(density(logistic), density(logistic, shift), P, [np.linspace(-37, 41, 200)])
        check(value, error, logistic.cdf(logistic.ppf(P) - shift), 1e-7)


def test_cauchy_law():
    """Its likelihood ratio rises and falls, so the worst set is no half-line: against 400,000 sorted cells.

    A mesh that misses 1.6e-4 of the tails says so.
    """
    fine = np.tan(np.linspace(-np.pi / 2, np.pi / 2, 400_001))
    brute = sorted_cells(P, np.diff(cauchy.cdf(fine)), np.diff(cauchy.cdf(fine - 1)))
    assert (brute - cauchy.cdf(cauchy.ppf(P) - 1) < -1e-6).any()
    value, error = neyman_pearson(density(cauchy), density(cauchy, 1.0), P, [np.sinh(np.linspace(-9, 9, 301))])
    check(value, error, brute, 2e-3)
    assert (error > 1.5e-4).all()
    value, error = neyman_pearson(density(cauchy), density(cauchy, 1.0), P, [np.sinh(np.linspace(-16, 16, 301))])
    check(value, error, brute, 2e-6)


def test_atoms_are_filled_in_part():
    """Likelihood ratios of 0, 1 and 2 with masses .25, .5, .25: T is linear between .25, .75 and 1."""

    def steps(*masses):
        return lambda z: torch.tensor(masses, dtype=torch.float64)[z[:, 0].long()].log()

    p = np.array([0.0, 0.1, 0.25, 0.4, 0.75, 0.9, 1.0])
    value, error = neyman_pearson(steps(0.25, 0.5, 0.25), steps(0, 0.5, 0.5), p, [np.arange(4.0)])
    check(value, error, np.interp(p, [0, 0.25, 0.75, 1], [0, 0, 0.5, 1]), 1e-11)


@pytest.mark.parametrize(("factor", "radius"), [(1.2, 0.428), (1 / 1.25, 0.408)])
def test_contrast_and_brightness(factor, radius):
    """theory.md section 4: brightness radius at p = .99, both laws N(0, .2^2), contrast e^k, is .428 and .408.

    The attack moves the law of (K, B) from N(0, s^2 I) to N((k, b), diag(s^2, e^-2k s^2)).
    """
    s, k = 0.2, np.log(factor)

    def normal(mean, scale):
        mean, scale = torch.tensor(mean), torch.tensor(scale)
        return lambda z: -((z - mean) / scale).square().sum(1) / 2 - (scale.log() + np.log(2 * np.pi) / 2).sum()

    def left(b):
        edges = [np.linspace(-9.5 * s, 9.5 * s + abs(k), 65), np.linspace(-14 * s, 14 * s + b, 65)]
        attacked = normal([k, b], [s, s / factor])
        return float(neyman_pearson(normal([0.0, 0.0], [s, s]), attacked, 0.99, edges, 1e-5)[0])

    assert left(radius - 0.001) > 0.5 > left(radius + 0.001)


def test_no_shift_and_disjoint_supports():
    """T(p) = p without a shift, 0 when the laws do not meet."""
    for law in (Gaussian(1.0), Uniform(-1, 1)):
        value, error = transfer_of(law, [0.0], P)
        check(value, error, P, 1e-8)
    value, error = transfer_of(Uniform(-1, 1), [2.5], P)
    check(value, error, 0, 1e-11)


def test_brute_force_in_two_coordinates():
    """801 x 801 sorted cells are one test, so never below T; and close to it."""
    covariance = np.array([[1.0, 0.7], [0.7, 2.0]])
    axis = np.linspace(-9.5, 9.5, 801)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    area = (axis[1] - axis[0]) ** 2
    clean = multivariate_normal.pdf(points, [0, 0], covariance).ravel() * area
    attacked = multivariate_normal.pdf(points, [0.9, -0.4], covariance).ravel() * area
    keep = clean > 1e-30
    p = np.array([0.1, 0.5, 0.9, 0.99])
    value, error = transfer_of(Gaussian(covariance=covariance), [0.9, -0.4], p, tolerance=1e-5)
    np.testing.assert_allclose(value, sorted_cells(p, clean[keep], attacked[keep]), atol=1e-4)
    assert (error < 1e-4).all()


def test_shapes_of_p():
    """One number, or an array of any shape."""
    law = Gaussian(1.0)
    assert transfer_of(law, [1.0], 0.9)[0].shape == ()
    value, error = transfer_of(law, [1.0], P[:6].reshape(2, 3))
    assert value.shape == error.shape == (2, 3)
    assert float(value[1, 2]) == pytest.approx(float(transfer_of(law, [1.0], P[5])[0]), abs=1e-7)


def test_refusals():
    """Three coordinates, and numbers that are no probabilities."""
    with pytest.raises(RequestError, match="one or two coordinates, got 3"):
        transfer_of(Gaussian(1.0), [1.0, 0.0, 0.0], 0.5)
    for p in (-0.1, 1.1, np.nan):
        with pytest.raises(RequestError, match="between 0 and 1"):
            transfer_of(Gaussian(1.0), [1.0], p)
