"""Certified regions: every closed form against a search that only asks `contains`, and `contains` against the laws."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.linalg import hilbert

from gsmooth_lightning.certify.region import certified_region, convert
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing import Exponential, FoldedNormal, Gaussian, Laplace, Rayleigh, Uniform
from gsmooth_lightning.smoothing.neyman_pearson import transfer_of

NORMS = ("l1", "l2", "linf")
ORDERS = {"l1": 1, "l2": 2, "linf": np.inf}
TILTED = [[1.0, 0.7], [0.7, 2.0]]
CHAIN = [[2.0, -0.9, 0.5], [-0.9, 1.0, -0.6], [0.5, -0.6, 1.5]]
MIXED = np.linalg.inv([[2.0, 0.8, 0.7], [0.8, 1.5, -0.6], [0.7, -0.6, 1.0]]).round(9)
MIXED = ((MIXED + MIXED.T) / 2).tolist()
"""Its inverse has an odd cycle: no signs s with s_i s_j = those of all its entries."""

PLANE = {
    "isotropic": Gaussian(0.7),
    "diagonal": Gaussian([0.5, 2.0]),
    "full": Gaussian(covariance=TILTED),
    "laplace": Laplace(0.4),
    "uniform": Uniform(-1.5, 1.5),
    "exponential": Exponential(2.0),
}
SPACE = {
    "isotropic": Gaussian(0.7),
    "diagonal": Gaussian([0.5, 2.0, 1.0]),
    "chain": Gaussian(covariance=CHAIN),
    "mixed": Gaussian(covariance=MIXED),
    "laplace": Laplace(0.4),
    "uniform": Uniform(0, 3),
    "exponential": Exponential(2.0),
}
LINE = {
    **{name: law for name, law in PLANE.items() if name not in ("diagonal", "full")},
    "folded normal": FoldedNormal(0.5),
    "rayleigh": Rayleigh(2.0),
}
BOUNDS = [(0.9, 0.1), (0.6, 0.05), (0.9999, 0.0001)]
bounds = pytest.mark.parametrize(("pa", "pb"), BOUNDS)


def tensor(points):
    return torch.from_numpy(np.ascontiguousarray(points, dtype=float))


def bisect(inside, n):
    low, high = np.zeros(n), np.full(n, 64.0)
    for _ in range(44):
        middle = (low + high) / 2
        found = inside(middle)
        low, high = np.where(found, middle, low), np.where(found, high, middle)
    return low


def least_nearby(function, start):
    """The least value of a function of rows found by random steps from a start, wide ones first."""
    rng, best, value = np.random.default_rng(0), start, function(start[None])[0]
    for width in 0.3 ** np.arange(12):
        rows = best + width * rng.normal(size=(60, len(start)))
        values = function(rows)
        if values.min() < value:
            best, value = rows[values.argmin()], values.min()
    return value


def distances(region, directions):
    """For each direction (n, d): the t at which t * direction leaves the region, by bisection. 0 if it never enters."""

    def inside(t):
        return region.contains(tensor(t[:, None] * directions).reshape(-1, *region.shape)).numpy()

    return bisect(inside, len(directions))


def circle(n, one_sided):
    angles = np.arange(n) * ((0.5 if one_sided else 2) * np.pi / n)
    angles = np.append(angles, angles[-1] + angles[1]) if one_sided else angles
    return np.stack([np.cos(angles), np.sin(angles)], 1).round(15) + 0.0


def sphere(n, one_sided):
    """Directions with the weights of an integral over the sphere, or over its part in the orthant: Gauss-Legendre in
    height, and in the angle of each octant."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    nodes, weights = (nodes + 1) / 2, weights / 2
    height, angle = np.meshgrid(nodes, nodes * np.pi / 2)
    flat = np.sqrt(1 - height**2)
    octant = np.stack([flat * np.cos(angle), flat * np.sin(angle), height], -1).reshape(-1, 3)
    measure = np.outer(weights * np.pi / 2, weights).ravel()
    if one_sided:
        return octant, measure
    signs = np.array(list(itertools.product((1, -1), repeat=3)))
    return (octant[None] * signs[:, None]).reshape(-1, 3), np.tile(measure, 8)


def corners(half_widths, one_sided):
    """All corners of boxes, (n, d) half widths -> (n, k, d)."""
    d = half_widths.shape[-1]
    places = np.array(list(itertools.product((0, 1) if one_sided else (-1, 1), repeat=d)))
    return half_widths[:, None] * places


def box_fits(region, half_widths):
    points = corners(half_widths, region.law.one_sided)
    return region.contains(tensor(points.reshape(-1, points.shape[-1]))).numpy().reshape(points.shape[:2]).all(1)


def largest_box_along(region, ratios):
    """The factor up to which boxes of these shapes (n, d) fit; the region is convex, so its corners decide."""
    return bisect(lambda t: box_fits(region, t[:, None] * ratios), len(ratios))


# ---------------------------------------------------------------- membership


@bounds
@pytest.mark.parametrize("name", LINE)
def test_membership_on_the_line_is_the_neyman_pearson_condition(name, pa, pb):
    """T(pA) > 1 - T(1 - pB) by quadrature: holds just inside either end and fails just outside."""
    region = certified_region(LINE[name], pa, pb)
    ends = [float(distances(region, np.array([[sign]]))[0]) * sign for sign in (1.0, -1.0)]
    assert ends[0] > 0
    assert ends[1] == 0 if region.law.one_sided else ends[1] < 0
    for end in ends:
        for factor, certified in ((0.999, True), (1.001, False)) if end else ():
            assert bool(region.contains(tensor([[end * factor]]))) == certified
            (left_a, left_b), error = transfer_of(region.law, [end * factor], [pa, 1 - pb])
            margin = left_a - (1 - left_b)
            assert (margin > error.sum()) == certified
            assert abs(margin) > error.sum(), "the quadrature cannot tell"


@pytest.mark.parametrize("name", PLANE)
def test_membership_in_the_plane_is_the_neyman_pearson_condition(name):
    """In several directions; Laplace's l1 ball is exact on the axes and a part of what is true elsewhere."""
    pa, pb = 0.8, 0.1
    region = certified_region(PLANE[name], pa, pb, shape=(2,))
    directions = np.array([[1.0, 0.0], [0.6, 0.8], [0.3, 0.9]] + [[-0.6, 0.8]] * (not region.law.one_sided))
    for direction, distance in zip(directions, distances(region, directions), strict=True):
        for factor in (0.97, 1.03):
            shift = (direction * distance * factor).tolist()
            (left_a, left_b), error = transfer_of(region.law, shift, [pa, 1 - pb], tolerance=1e-3, cells=32)
            margin = left_a - (1 - left_b)
            assert abs(margin) > error.sum()
            if factor < 1 or name != "laplace" or direction[1] == 0:
                assert (margin > 0) == (factor < 1)


def test_membership_rests_on_the_transfer_function():
    """Random shifts in 48 coordinates, (1, 4, 12): `contains` is transfer(pA) > 1/2 at their gauge, for every law."""
    rng = np.random.default_rng(0)
    for law in (Gaussian(0.7), Gaussian(torch.rand(1, 4, 12) + 0.5), Laplace(0.4), Uniform(-1, 1), Exponential(2.0)):
        region = certified_region(law, 0.9, shape=(1, 4, 12))
        directions = np.abs(rng.normal(size=(50, 48)))
        directions *= (rng.random(50) * 2 * distances(region, directions))[:, None]
        shifts = tensor(directions).reshape(50, 1, 4, 12)
        inside = region.contains(shifts).numpy()
        np.testing.assert_array_equal(inside, law.transfer(0.9, law.gauge(shifts).numpy()) > 0.5)
        assert 10 < inside.sum() < 40


def test_one_sided_regions_hold_no_negative_shift():
    for law in (Exponential(2.0), FoldedNormal(0.5)):
        region = certified_region(law, 0.99)
        assert region.contains(tensor([[0.0], [1e-9], [-1e-9]])).tolist() == [True, True, False]
    region = certified_region(Exponential(2.0), 0.99, shape=(2,))
    assert not region.contains(tensor([[0.1, -1e-9]])).any()


# ---------------------------------------------------------------- radii, boxes, volumes


@bounds
@pytest.mark.parametrize(("laws", "d"), [(PLANE, 2), (SPACE, 3)])
def test_axis_radii_are_where_the_axes_leave(laws, d, pa, pb):
    for law in laws.values():
        region = certified_region(law, pa, pb, shape=(d,))
        found = distances(region, np.eye(d))
        np.testing.assert_allclose(region.axis_radii(), found, rtol=1e-9)
        assert region.contains(torch.diag(region.axis_radii())).all()
        assert not region.contains(torch.diag(region.axis_radii() * (1 + 1e-9))).any()


@bounds
@pytest.mark.parametrize("name", PLANE)
def test_inscribed_balls_touch_the_boundary_in_the_plane(name, pa, pb):
    """The least ||boundary point|| over 3,600 directions, axes and diagonals among them."""
    region = certified_region(PLANE[name], pa, pb, shape=(2,))
    directions = circle(3_600, region.law.one_sided)
    boundary = distances(region, directions)[:, None] * directions
    for norm in NORMS:
        least = np.linalg.norm(boundary, ORDERS[norm], axis=1).min()
        assert region.inscribed(norm) <= least * (1 + 1e-9)
        assert region.inscribed(norm) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("name", SPACE)
def test_inscribed_balls_touch_the_boundary_in_space(name):
    """The least over a grid of directions, then polished by a local search, axes and cube corners added."""
    region = certified_region(SPACE[name], 0.9, 0.06, shape=(3,))
    grid, _ = sphere(24, region.law.one_sided)
    signs = np.array(list(itertools.product((1, -1), repeat=3)))
    special = np.concatenate([np.eye(3), signs[:1] if region.law.one_sided else signs])
    grid = np.concatenate([grid, special])
    for norm in NORMS:

        def size(directions, order=ORDERS[norm]):
            directions = np.abs(directions) if region.law.one_sided else directions
            return distances(region, directions) * np.linalg.norm(directions, order, axis=1)

        sizes = size(grid)
        start = grid[sizes.argmin()]
        least = least_nearby(size, start)
        assert region.inscribed(norm) <= least * (1 + 1e-9)
        assert region.inscribed(norm) == pytest.approx(least, rel=1e-4)


@bounds
@pytest.mark.parametrize("name", PLANE)
def test_largest_box_in_the_plane(name, pa, pb):
    """Against 1,000 ratios of the sides, each enlarged until a corner leaves."""
    region = certified_region(PLANE[name], pa, pb, shape=(2,))
    angles = np.linspace(0.001, np.pi / 2 - 0.001, 1001)
    ratios = np.stack([np.cos(angles), np.sin(angles)], 1)
    best = (largest_box_along(region, ratios)[:, None] * ratios).prod(1).max()
    box = region.largest_box()
    assert box_fits(region, box.numpy()[None]).all()
    assert not box_fits(region, box.numpy()[None] * (1 + 1e-8)).any()
    assert float(box.prod()) >= best * (1 - 1e-9)
    assert float(box.prod()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", SPACE)
def test_largest_box_in_space(name):
    """Against an optimiser over the sides' ratios; with an odd cycle of signs the box fits, but a larger one exists."""
    region = certified_region(SPACE[name], 0.9, 0.06, shape=(3,))
    box = region.largest_box()
    assert box_fits(region, box.numpy()[None]).all()
    assert not box_fits(region, box.numpy()[None] * (1 + 1e-8)).any()

    def smallness(logs):
        return -3 * np.log(largest_box_along(region, np.exp(logs))) - logs.sum(1)

    best, own = -least_nearby(smallness, np.zeros(3)), float(box.log().sum())
    if name == "mixed":
        assert own + 0.001 < best
    else:
        assert best == pytest.approx(own, abs=1e-4)
        assert best < own + 1e-9


@bounds
@pytest.mark.parametrize("name", PLANE)
def test_area_in_the_plane(name, pa, pb):
    """int r(phi)^2 / 2 dphi over the boundary; the trapezoidal rule, a quarter circle at a time."""
    region = certified_region(PLANE[name], pa, pb, shape=(2,))
    quarter = circle(4000, True)
    signs = [(1, 1)] if region.law.one_sided else list(itertools.product((1, -1), repeat=2))
    area = sum(
        np.trapezoid(distances(region, quarter * np.array(sign)) ** 2 / 2, dx=np.pi / 2 / 4000) for sign in signs
    )
    assert region.log_volume() == pytest.approx(math.log(area), abs=1e-5)


@pytest.mark.parametrize("name", SPACE)
def test_volume_in_space(name):
    """int r^3 / 3 over the sphere."""
    region = certified_region(SPACE[name], 0.97, 0.02, shape=(3,))
    directions, weights = sphere(40, region.law.one_sided)
    volume = (distances(region, directions) ** 3 / 3 * weights).sum()
    assert region.log_volume() == pytest.approx(math.log(volume), abs=1e-4)


@pytest.mark.parametrize("name", LINE)
def test_volume_on_the_line_is_the_length(name):
    region = certified_region(LINE[name], 0.9, 0.06)
    ends = distances(region, np.array([[1.0]])) + distances(region, np.array([[-1.0]]))
    assert region.log_volume() == pytest.approx(math.log(ends[0]), abs=1e-9)
    radius = float(region.axis_radii())
    for norm in NORMS:
        assert region.inscribed(norm) == pytest.approx(radius, rel=1e-12)
    np.testing.assert_allclose(region.largest_box(), [radius], rtol=1e-12)
    inside = [radius] if region.law.one_sided else [radius, -radius]
    assert region.contains(tensor(inside)[:, None]).all()


def test_rayleigh_has_two_ends():
    """sqrt(-log2 p) < c < sqrt(-log2(1 - p)) (theory.md section 2)."""
    region = certified_region(Rayleigh(2.0), 0.9)
    low, high = math.log(-math.log2(0.9)) / 2, math.log(-math.log2(0.1)) / 2
    assert (region.low, region.high) == pytest.approx((low, high), rel=1e-9)
    assert low <= region.low < 0 < region.high <= high
    assert region.inscribed("l2") == region.high < -region.low


@pytest.mark.parametrize("d", [1, 5, 784, 150_528])
def test_log_volumes_in_many_dimensions(d):
    """Against 30-digit arithmetic, and never above it; Tecot's area is sum log s_i + d log R."""
    pa = 0.9
    laws = [Gaussian(torch.linspace(0.5, 2, d).double()), Laplace(0.4), Exponential(2.0), Uniform(-1, 1)]
    with mpmath.workdps(30):
        z = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(pa) - 1)
        logs = mpmath.fsum(mpmath.log(mpmath.mpf(s)) for s in laws[0].sigma.tolist())
        t = -mpmath.log(1 - (mpmath.mpf(pa) - mpmath.mpf(1 - pa)) / 2)
        series = mpmath.nsum(lambda k: t**k / mpmath.rf(d + 1, k), [0, 60])
        factorial = mpmath.loggamma(d + 1)
        l1 = -mpmath.log(2 * (1 - mpmath.mpf(pa)))
        exact = [
            logs
            + d * mpmath.log(z)
            + mpmath.mpf(d) / 2 * mpmath.log(mpmath.pi)
            - mpmath.loggamma(mpmath.mpf(d) / 2 + 1),
            d * mpmath.log(2 * mpmath.mpf(0.4) * l1) - factorial,
            d * mpmath.log(l1 / 2) - factorial,
            d * mpmath.log(4) + d * mpmath.log(t) - t - factorial + mpmath.log(series),
        ]
        if d < 1000:
            probability = mpmath.gammainc(d, 0, t, regularized=True)
            assert exact[3] == pytest.approx(d * mpmath.log(4) + mpmath.log(probability), rel=1e-20)
        for law, expected in zip(laws, exact, strict=True):
            found = certified_region(law, pa, shape=(d,)).log_volume()
            assert found <= expected
            assert found == pytest.approx(float(expected), abs=2e-11 * d)


def test_more_coordinates_than_signs_are_tried():
    """20 coordinates: the bound of the cube's corners is sound, and exact where one corner has all signs right."""
    rng = np.random.default_rng(1)
    factor = rng.normal(size=(20, 30))
    for covariance, exact in ((factor @ factor.T / 20, False), (np.linalg.inv(0.5 * np.eye(20) + 0.5), True)):
        covariance = (covariance + covariance.T) / 2
        region = certified_region(Gaussian(covariance=tensor(covariance)), 0.99, shape=(20,))
        signs = np.concatenate([np.ones((1, 20)), rng.choice([-1.0, 1.0], (2000, 20))])
        least = distances(region, signs).min()
        assert region.inscribed("linf") <= least * (1 + 1e-9)
        assert (region.inscribed("linf") == pytest.approx(least, rel=1e-6)) == exact
        assert region.contains(tensor(region.largest_box().numpy() * signs)).all()
        assert region.inscribed("linf") ** 20 <= float(region.largest_box().prod()) * (1 + 1e-9)


def test_a_badly_conditioned_covariance_is_rounded_down():
    """Scaled Hilbert matrix, cond(L) = 1e8: the axes stay below those of 50-digit arithmetic, in spite of errors that
    exceed 1e-10 (seed 2)."""
    d = 12
    scale = np.random.default_rng(2).uniform(0.5, 2, d)
    law = Gaussian(covariance=tensor(hilbert(d) * np.outer(scale, scale)))
    region = certified_region(law, 0.9, shape=(d,))
    with mpmath.workdps(50):
        inverse = mpmath.matrix(law.cholesky.tolist()) ** -1  # the law is that of the factor
        size = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(0.9) - 1)
        for i, radius in enumerate(region.axis_radii().tolist()):
            exact = size / mpmath.norm(inverse[:, i])
            assert exact * (1 - 1e-5) < radius <= exact


# ---------------------------------------------------------------- conversions


@pytest.mark.parametrize("d", [1, 2, 3, 7])
@pytest.mark.parametrize(("source", "target"), itertools.product(("l1", "l2", "l4", "linf"), repeat=2))
def test_converted_balls_fit_and_touch(d, source, target):
    """Of the target ball's boundary, random points and the extreme ones lie in the source ball, one on its boundary."""
    outer, inner = (float(name[1:]) for name in (source, target))
    radius = convert(0.7, source, target, d)
    points = np.concatenate([np.random.default_rng(0).normal(size=(2000, d)), np.eye(d), np.ones((1, d))])
    points *= radius / np.linalg.norm(points, inner, axis=1)[:, None]
    sizes = np.linalg.norm(points, outer, axis=1)
    assert sizes.max() <= 0.7 * (1 + 1e-12)
    assert sizes.max() == pytest.approx(0.7, rel=1e-9)


def test_conversions_of_theory():
    """l_inf from l2: r / sqrt(D); l_p with p > 2: r / D^(1/2 - 1/p); never rounded up."""
    assert convert(1.0, "l2", "linf", 784) == pytest.approx(1 / 28, rel=1e-11)
    assert convert(1.0, "l2", "linf", 784) < 1 / 28
    assert convert(1.0, "l2", "l4", 10_000) == pytest.approx(0.1, rel=1e-11)
    assert convert(1.0, "l2", "l1", 784) == 1.0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: certified_region(Gaussian(1.0), 0.4), "abstention"),
        (lambda: certified_region(Gaussian(1.0), 0.4, 0.4), "abstention"),
        (lambda: certified_region(Gaussian(1.0), 1.0), "between 0 and 1"),
        (lambda: certified_region(Gaussian(1.0), 0.9, float("nan")), "between 0 and 1"),
        (lambda: certified_region(Gaussian([1.0, 2.0]), 0.9, shape=(3,)), "does not fit"),
        (lambda: certified_region(Gaussian(covariance=TILTED), 0.9, shape=(3,)), "does not fit"),
        (lambda: certified_region(Rayleigh(1.0), 0.9, shape=(2,)), "one parameter"),
        (lambda: certified_region(FoldedNormal(1.0), 0.9, shape=(2,)), "one parameter"),
        (lambda: certified_region(Gaussian(1.0), 0.9, shape=(2,)).inscribed("l3"), "convert"),
        (lambda: certified_region(Gaussian(1.0), 0.9, shape=(2,)).contains(torch.zeros(4, 3)), "shape"),
        (lambda: convert(1.0, "l2", "max", 3), "norm"),
        (lambda: convert(1.0, "l0", "l2", 3), "norm"),
        (lambda: convert(-1.0, "l1", "l2", 3), "radius"),
        (lambda: convert(1.0, "l1", "l2", 0), "radius"),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises(RequestError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
