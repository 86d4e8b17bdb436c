"""The Gaussian law against explicit inverses and numeric Neyman-Pearson quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream

COVARIANCE = [[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]]


def neyman_pearson(p, clean, attacked):
    """inf Q(A) over P(A) = p: cells of lowest likelihood ratio first, the last one in part.

    Args:
        clean, attacked: masses of the same cells under P and Q.
    """
    order = np.argsort(attacked / clean, kind="stable")
    return np.interp(p, np.cumsum(clean[order]), np.cumsum(attacked[order]))


def masses(sigma, delta, cells=40_001):
    """Cells of the line under N(0, sigma^2) and N(delta, sigma^2)."""
    edges = np.linspace(-9 * sigma, 9 * sigma + delta, cells + 1)
    clean = np.diff(norm.cdf(edges / sigma))
    attacked = np.diff(norm.cdf((edges - delta) / sigma))
    keep = clean > 1e-300
    return clean[keep], attacked[keep]


# ---------------------------------------------------------------- gauge


def test_gauge_isotropic_and_diagonal():
    """sqrt(delta' Sigma^-1 delta), here sqrt(sum (delta_i / sigma_i)^2), for shifts of any shape."""
    delta = torch.randn(5, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.sqrt((delta.numpy() ** 2).sum((1, 2, 3))) / 0.3
    np.testing.assert_allclose(Gaussian(0.3).gauge(delta), expected, rtol=1e-12)
    sigma = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    expected = np.sqrt(((delta / sigma).numpy() ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(Gaussian(sigma).gauge(delta), expected, rtol=1e-12)
    np.testing.assert_allclose(Gaussian(sigma).gauge(delta.float()), expected, rtol=1e-6)
    assert Gaussian(sigma).gauge(delta.float()).dtype == torch.float64


def test_gauge_full_covariance():
    """Against the explicit inverse."""
    delta = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inverse = np.linalg.inv(np.array(COVARIANCE))
    expected = [math.sqrt(d @ inverse @ d) for d in delta.numpy()]
    np.testing.assert_allclose(Gaussian(covariance=COVARIANCE).gauge(delta), expected, rtol=1e-12)


def test_the_three_forms_agree():
    """A diagonal covariance is the diagonal law, a multiple of the identity the isotropic one."""
    delta = torch.tensor([[1.0, -2.0, 0.5]])
    diagonal = Gaussian(covariance=torch.diag(torch.tensor([0.04, 1.0, 0.25])))
    assert float(diagonal.gauge(delta)) == pytest.approx(float(Gaussian([0.2, 1.0, 0.5]).gauge(delta)), rel=1e-6)
    assert float(Gaussian([0.2] * 3).gauge(delta)) == pytest.approx(float(Gaussian(0.2).gauge(delta)), rel=1e-12)


# ---------------------------------------------------------------- transfer and radius


@pytest.mark.parametrize("sigma", [0.25, 30.0])
@pytest.mark.parametrize("size", [0.1, 0.7, 2.0])
def test_transfer_is_the_neyman_pearson_infimum_in_1d(sigma, size):
    """T(p) = inf{Q(A): P(A) = p}, by sorting 40,001 cells by likelihood ratio."""
    law = Gaussian(sigma)
    assert float(law.gauge(torch.tensor([[size * sigma]], dtype=torch.float64))) == pytest.approx(size, rel=1e-12)
    clean, attacked = masses(sigma, size * sigma)
    for p in (0.05, 0.3, 0.5, 0.8, 0.99, 0.9999):
        # a cell is at most 1e-3 sigma wide, so interpolating in it moves T by far less than 1e-6
        assert float(law.transfer(p, size)) == pytest.approx(neyman_pearson(p, clean, attacked), abs=1e-6)


def test_transfer_is_the_neyman_pearson_infimum_in_2d():
    """The same over a grid of the plane with correlated coordinates: only the gauge of the shift matters."""
    covariance = np.array([[1.0, 0.7], [0.7, 2.0]])
    law, delta = Gaussian(covariance=torch.from_numpy(covariance)), np.array([0.9, -0.4])
    axis = np.linspace(-9.5, 9.5, 801)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    clean = multivariate_normal.pdf(points, [0, 0], covariance).ravel()
    attacked = multivariate_normal.pdf(points, delta, covariance).ravel()
    area = (axis[1] - axis[0]) ** 2
    keep = clean > 1e-30
    clean, attacked = clean[keep] * area, attacked[keep] * area
    assert clean.sum() == pytest.approx(1, abs=1e-8)
    assert attacked.sum() == pytest.approx(1, abs=1e-8)
    size = float(law.gauge(torch.from_numpy(delta)[None]))
    for p in (0.1, 0.5, 0.9, 0.99):
        assert float(law.transfer(p, size)) == pytest.approx(neyman_pearson(p, clean, attacked), abs=1e-4)
    isotropic = Gaussian(1.0).gauge(torch.from_numpy(delta)[None])
    assert abs(float(isotropic) - size) > 0.2  # so the covariance mattered


@pytest.mark.parametrize(("pa", "pb"), [(0.9, 0.1), (0.6, 0.05), (0.999, 0.0005), (0.4, 0.3)])
def test_radius_is_where_the_numeric_transfer_meets_the_runner_up(pa, pb):
    """At the radius T(pA) = U(pB) = 1 - T(1 - pB) by quadrature; inside it T(pA) is larger, outside smaller."""
    sigma = 0.5
    law = Gaussian(sigma)
    radius = float(law.radius(pa, pb))

    def surplus(size):
        clean, attacked = masses(sigma, size * sigma)
        return neyman_pearson(pa, clean, attacked) - (1 - neyman_pearson(1 - pb, clean, attacked))

    assert surplus(radius) == pytest.approx(0, abs=2e-6)
    assert surplus(radius - 0.01) > 1e-6
    assert surplus(radius + 0.01) < -1e-6


def test_radius_inverts_transfer():
    """transfer(pA, radius(pA, 1 - pA)) = 1/2; in z units (z(pA) - z(pB)) / 2; Cohen's sigma z(pA) with pB = 1 - pA."""
    law, pa = Gaussian(0.7), np.array([0.500001, 0.6, 0.9, 0.999, 1 - 1e-9])
    radius = law.radius(pa, 1 - pa)
    np.testing.assert_allclose(law.transfer(pa, radius), 0.5, atol=1e-12)
    np.testing.assert_allclose(radius, norm.ppf(pa), rtol=1e-6)
    for a, b in ((0.6, 0.05), (0.7, 0.2)):
        two = law.radius(a, b)
        assert float(law.transfer(a, two)) == pytest.approx(1 - float(law.transfer(1 - b, two)), abs=1e-12)
    assert float(law.radius(0.6, 0.05)) > 3 * float(law.radius(0.6, 0.4))  # two bounds pay at moderate pA


def test_radius_is_zero_without_a_lead():
    """pA <= pB certifies nothing (a peer squares z(p) without this check)."""
    np.testing.assert_array_equal(Gaussian(1.0).radius([0.5, 0.2, 0.0, 0.3], [0.5, 0.8, 1.0, 0.3]), 0)


def test_transfer_is_monotone():
    """Nonincreasing in the size of the shift, nondecreasing in p, the identity without a shift."""
    law, p = Gaussian(1.0), np.linspace(0.01, 0.99, 50)
    sizes = np.linspace(0, 4, 40)[:, None]
    table = law.transfer(p, sizes)
    assert (np.diff(table, axis=0) < 0).all()
    assert (np.diff(table, axis=1) > 0).all()
    np.testing.assert_allclose(table[0], p, rtol=1e-12)


# ---------------------------------------------------------------- sampling


def sample(law, shape, n=20_000):
    return law.sample(Stream(0, 0).at("estimate", 0), n, shape)


@pytest.mark.parametrize("form", ["isotropic", "diagonal", "full"])
def test_sampled_covariance(form):
    """Each entry within five standard errors, sqrt((S_ii S_jj + S_ij^2) / n); mean likewise."""
    covariance = {"isotropic": np.eye(3) * 0.49, "diagonal": np.diag([0.01, 1.0, 9.0]), "full": np.array(COVARIANCE)}
    expected = covariance[form]
    law = {
        "isotropic": Gaussian(0.7),
        "diagonal": Gaussian([0.1, 1.0, 3.0]),
        "full": Gaussian(covariance=COVARIANCE),
    }[form]
    z = sample(law, (3,)).numpy()
    assert z.dtype == np.float64
    n, variances = len(z), np.diag(expected)
    error = np.sqrt((np.outer(variances, variances) + expected**2) / n)
    assert (np.abs(np.cov(z.T) - expected) < 5 * error).all()
    assert (np.abs(z.mean(0)) < 5 * np.sqrt(variances / n)).all()


def test_sample_scales_the_addressed_normals():
    """sigma * z for one and for many sigmas, z L' with L L' = Sigma for a covariance; shapes of images."""
    z = Stream(4, 2).at("select", 1).normal(6, 1, 2, 2)

    def again(law, shape):
        return law.sample(Stream(4, 2).at("select", 1), 6, shape)

    np.testing.assert_array_equal(again(Gaussian(0.25), (1, 2, 2)), z * 0.25)
    sigma = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]], dtype=torch.float64)
    np.testing.assert_array_equal(again(Gaussian(sigma), (1, 2, 2)), z * sigma)
    flat = Stream(4, 2).at("select", 1).normal(6, 3).numpy()
    factor = np.linalg.cholesky(np.array(COVARIANCE))
    np.testing.assert_allclose(again(Gaussian(covariance=COVARIANCE), (3,)), flat @ factor.T, rtol=1e-12)
    assert np.allclose(factor @ factor.T, COVARIANCE)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, [1.0, 0.0], [1.0, math.nan]])
def test_sigma_must_be_positive_and_finite(sigma):
    with pytest.raises(RequestError, match="sigma must be positive and finite"):
        Gaussian(sigma)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        ([[1.0, 0.5], [0.4, 1.0]], "symmetric"),
        ([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0]], "symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], "positive definite"),
        ([[1.0, 1.0], [1.0, 1.0]], "positive definite"),
        ([[math.nan, 0.0], [0.0, 1.0]], "symmetric|positive definite"),
        ([[math.inf, 0.0], [0.0, 1.0]], "finite|positive definite"),
    ],
)
def test_covariance_must_be_symmetric_positive_definite(covariance, message):
    with pytest.raises(RequestError, match=message):
        Gaussian(covariance=covariance)


def test_sigma_or_covariance():
    with pytest.raises(RequestError, match="either sigma or covariance"):
        Gaussian()
    with pytest.raises(RequestError, match="either sigma or covariance"):
        Gaussian(1.0, covariance=[[1.0]])


def test_scale_and_largest_sigma():
    """`scale` is the sigma of an isotropic law; other laws certify an ellipsoid, not a radius."""
    assert Gaussian(30.0).scale == 30.0
    assert Gaussian([0.2, 0.9, 0.4]).largest_sigma == pytest.approx(0.9)
    assert Gaussian(covariance=COVARIANCE).largest_sigma == pytest.approx(math.sqrt(2))
    for law in (Gaussian([0.2, 0.9]), Gaussian(covariance=COVARIANCE)):
        with pytest.raises(RequestError, match="more than one sigma"):
            _ = law.scale
