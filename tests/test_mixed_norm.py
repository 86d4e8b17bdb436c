"""Mixed-norm laws: against closed forms, quadrature in the plane and in reduced coordinates, draws, and attacks."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.special import betainc, gammaln

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing import Gaussian, Laplace, Law, MixedL1, MixedL2, MixedLinf, mixed_norm
from gsmooth_lightning.smoothing.neyman_pearson import neyman_pearson
from gsmooth_lightning.stream import Stream, TrainingSource
from laws import required

P = np.array([1e-3, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
FEW = np.array([0.1, 0.5, 0.9, 0.99])
CLOSED = {MixedL1: Laplace, MixedL2: Gaussian}
both = pytest.mark.parametrize("family", [MixedL1, MixedL2])
every = pytest.mark.parametrize("family", [MixedL1, MixedL2, MixedLinf])


def of(family: type[Law], scale: float, k: int, shape: list[int]) -> Law:
    """A law of the family, its bound from fewer draws than usual."""
    return family(scale, k, shape, draws=20_000) if family is MixedLinf else family(scale, k, shape)


def draws(law: Law, n: int, block: int = 0) -> np.ndarray:
    """(n, D) draws of the law."""
    return law.sample(Stream(3, 1).at("estimate", block), n, law.shape).flatten(1).numpy()


def exponent(family: type[Law], k: int, z: np.ndarray) -> np.ndarray:
    """-ln of the density in units of the scale, without its constant: written out again, (..., D) -> (...)."""
    size = np.abs(z)
    norm = {MixedL1: size.sum(-1), MixedL2: np.sqrt((z**2).sum(-1)), MixedLinf: size.max(-1)}[family]
    decay = size.sum(-1) if family is MixedL1 else (z**2).sum(-1) / 2
    return k * np.log(norm) + decay


def worst(family: type[Law], size: float, dim: int) -> np.ndarray:
    return np.full(dim, size) if family is MixedLinf else size * np.eye(dim)[0]


# ---------------------------------------------------------------- transfer


@both
@pytest.mark.parametrize("dim", [2, 784, 150_528])
def test_without_the_power_it_is_the_closed_form(family, dim):
    """k = 0 is the normal law, or Laplace's: never above their transfer, and near it; so in radius and required."""
    law, closed = family(0.7, 0, [dim]), CLOSED[family](0.7)
    near = 1e-5 if dim > 100 else 1e-4
    for size in (0.05, 1.0, 4.0):
        loss = closed.transfer(FEW, size) - law.transfer(FEW, size)
        assert (loss >= 0).all()
        assert (loss < (2.5 if size > 2 else 1) * near).all()
    for size in (0.05, 1.0):
        assert 0 <= required(law, size) - required(closed, size) < near
    lost = closed.radius(0.99, 0.01) - law.radius(0.99, 0.01)
    assert 0 <= lost < 20 * near


def plane(family: type[Law], k: int, shift: tuple[float, float], tolerance: float, p: np.ndarray = FEW):
    """(T(p), error) in two coordinates by `neyman_pearson`, from log-densities normalised in polar coordinates."""
    angle, weight = np.polynomial.legendre.leggauss(40)
    angle = (angle + 1) * math.pi / 8  # an eighth of the plane; the density is symmetric
    along = np.stack([np.cos(angle), np.sin(angle)], -1)
    scale = {MixedL1: np.abs(along).sum(1), MixedLinf: along.max(1)}.get(family, np.ones(40))
    decay = scale if family is MixedL1 else np.ones(40)
    radial = [
        quad(lambda s, d=d: s ** (1 - k) * math.exp(-d * s if family is MixedL1 else -(s**2) / 2), 0, np.inf)[0]
        for d in decay
    ]
    mass = math.log(8 * (weight * math.pi / 8 * scale**-k * radial).sum())

    def log_density(move):
        return lambda z: torch.from_numpy(-exponent(family, k, z.numpy() - move)) - mass

    side = (30 if family is MixedL1 else 8) * np.linspace(0, 1, 25) ** 2
    near = np.geomspace(1e-7, 0.1, 30)
    half = np.concatenate([-side, side, near, -near])
    edges = [np.unique(np.concatenate([half, half + move])) for move in shift]
    return neyman_pearson(log_density(np.zeros(2)), log_density(np.array(shift)), p, edges, tolerance)


@both
def test_transfer_is_the_infimum_in_the_plane(family, monkeypatch):
    """D = 2, k = 1 by quadrature: never above it by more than its error, and near it; nearer with more cells."""
    law = family(1.0, 1, [2])
    value, error = plane(family, 1, (1.5, 0.0), 1e-4)
    ours = law.transfer(FEW, 1.5)
    monkeypatch.setattr(mixed_norm, "FINE", 65_536)
    finer = law.transfer(FEW, 1.5)
    assert (error < 1e-4).all()
    assert (ours <= value + error).all()
    assert (finer <= value + error).all()
    np.testing.assert_allclose(ours, value, atol=1.5e-3)
    np.testing.assert_allclose(finer, value, atol=2e-4)


@both
@pytest.mark.parametrize("shift", [(0.2, 0.3), (0.5, -0.9)])
def test_other_shifts_of_the_plane_leave_more(family, shift):
    """Theorem 2: every direction, and every smaller shift, is covered by the bound of the axis."""
    p = np.array([0.5, 0.9])
    value, error = plane(family, 1, shift, 4e-4, p)
    law = family(1.0, 1, [2])
    size = float(law.gauge(torch.tensor([shift], dtype=torch.float64)))
    for larger in (size, 1.3 * size):
        assert (law.transfer(p, larger) <= value + error).all()
    if family is MixedL2:
        np.testing.assert_allclose(law.transfer(p, size), value, atol=1.5e-3)  # any direction is an axis


@pytest.mark.parametrize(("dim", "k"), [(20, 7), (784, 40)])
@both
def test_transfer_is_the_infimum_in_reduced_coordinates(family, dim, k):
    """Quadrature over (z_1, norm of the others), a sufficient statistic of a shift along z_1."""
    law, size = family(1.0, k, [dim]), 1.2
    others = dim - 1
    if family is MixedL1:
        norm = math.log(2) + gammaln(dim - 1) + gammaln(dim - k) - gammaln(dim)
        top, middle, width = 40.0, dim - k, 9 * math.sqrt(dim)
    else:
        norm = (dim - k) / 2 * math.log(2) - math.log(2) + gammaln((dim - k) / 2) - gammaln(dim / 2)
        norm += math.log(math.pi) / 2 + gammaln(others / 2)
        top, middle, width = 9.0, math.sqrt(dim - k), 9.0

    def log_density(move):
        def of(z):
            x, t = z.T.numpy()
            x = x - move
            s = np.abs(x) + t if family is MixedL1 else np.hypot(x, t)
            decay = s if family is MixedL1 else s**2 / 2
            return torch.from_numpy((others - 1) * np.log(t) - k * np.log(s) - decay - norm)

        return of

    x = top * np.linspace(-1, 1, 41)
    side = np.unique(np.concatenate([x, x + size, [0.0, size]]))
    low = max(middle - width, 0.0)
    t = low + (middle + width + 20 - low) * np.linspace(0, 1, 61) ** (1 if low else 2)
    value, error = neyman_pearson(log_density(0.0), log_density(size), FEW, [side, t], 1e-4)
    ours = law.transfer(FEW, size)
    assert (error < 1e-4).all()
    assert (ours <= value + error).all()
    np.testing.assert_allclose(ours, value, atol=2e-4)


@both
@pytest.mark.parametrize(("dim", "k"), [(2, 1), (9, 0), (9, 5), (784, 300)])
def test_cells_are_bounded_at_every_point(family, dim, k):
    """What the sum takes from a cell is at least the conditional probability at 50 points of it, written out again."""
    law, size = family(1.0, k, [dim]), 1.3
    power, y = law.power, law.edges[::8]
    low, high = y[:-1], y[1:]
    inside = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 50)
    for level in (-2.0, -0.7, -0.1, 0.2, 0.9, 3.0):
        # s* with s*^e / e + k ln s* = s^e / e + k ln s - level, by bisection on ln s*; below all for k = 0 it is none
        goal = inside / power + k * np.log(inside) / power - level
        if k:
            least, most = np.full_like(inside, -200.0), np.full_like(inside, 20.0)
            for _ in range(80):
                half = (least + most) / 2
                over = np.exp(power * half) / power + k * half > goal
                least, most = np.where(over, least, half), np.where(over, half, most)
            star = np.exp(power * least)
        else:
            star = inside - power * level
        if family is MixedL1:
            share = (inside - star + size) / 2
            beyond = np.clip(1 - share / inside, 0, 1) ** (dim - 1) / 2
            point = np.where(share >= size, 1.0, np.where(share >= 0, 1 - beyond, 0.0))
        else:
            cosine = np.clip((inside + size**2 - star) / (2 * size * np.sqrt(inside)), -1, 1)
            point = stats.beta((dim - 1) / 2, (dim - 1) / 2).cdf((1 + cosine) / 2)
        bound = law._most(low, high, level, size)
        smooth = np.abs(np.abs((inside - star) / size) - 1).min(1) > 1e-9 if family is MixedL1 else slice(None)
        assert (bound[:, None] >= point - 1e-12)[smooth].all()
        assert np.median(bound - point.max(1)) < 0.05


@pytest.mark.parametrize("k", [1, 40, 5000])
def test_drop_solves_its_equation_from_above(k):
    """To 1e-12 of the level, which may be tiny beside y."""
    y = np.geomspace(1.0, 2e5, 60)
    for level in (-3.0, -1e-8, 1e-8, 0.5):
        d = mixed_norm._drop(y, level, k)
        excess = d - k * np.log1p(-d / y) - level
        assert (excess >= 0).all()
        assert (excess <= 1e-12 * abs(level) * (1 + k / (y - d))).all()


@every
@pytest.mark.parametrize("k", [1, 60])
def test_transfer_bounds_the_best_test_on_draws(family, k):
    """D = 784: the set {L < 1 / lambda} has probability p and p' under draws and shifted draws: T(p) <= p', and near
    it; for a shift of the same size in another direction T is no more than p' either."""
    dim, n = 784, 4000
    size = 1.5 / math.sqrt(dim) if family is MixedLinf else 1.5
    law = of(family, 0.25, k, [1, 28, 28])
    z = draws(law, n) / 0.25
    sign = np.where(np.arange(dim) % 2, 1.0, -1.0)
    spread = {MixedL1: sign / dim, MixedL2: sign / math.sqrt(dim), MixedLinf: sign * (np.arange(dim) % 3 > 0)}[family]
    for delta, exact in ((worst(family, size, dim), True), (size * spread, False)):
        ratio = exponent(family, k, z) - exponent(family, k, z - delta)  # ln L under the law
        attacked = exponent(family, k, z + delta) - exponent(family, k, z)  # and under its shift
        for level in np.quantile(ratio, [0.2, 0.6, 0.9]):
            p, left = (ratio < level).mean(), (attacked < level).mean()
            error = 5 * (math.exp(-level) + 1) / math.sqrt(n) / 2
            ours = float(law.transfer(p, size))
            assert ours <= left + error
            if exact:
                assert ours >= left - error - (0.04 if family is MixedLinf else 0)


# ---------------------------------------------------------------- radius and required


@both
@pytest.mark.parametrize(("pa", "pb"), [(0.6, 0.05), (0.999, 0.0005)])
def test_radius_is_where_the_transfers_meet(family, pa, pb):
    law = family(0.5, 30, [3, 16, 16])
    radius = float(law.radius(pa, pb))
    assert law.transfer(pa, radius) > 1 - law.transfer(1 - pb, radius)
    beyond = radius + 2e-4
    assert law.transfer(pa, beyond) < 1 - law.transfer(1 - pb, beyond)
    assert law.interval(pa, pb) == (-0.5 * radius, 0.5 * radius)


@both
def test_required_is_the_inverse_of_transfer_at_one_half(family):
    law, sizes = family(0.5, 9, [50]), np.array([0.0, 0.1, 2.0])
    needed = np.array([required(law, size) for size in sizes])
    assert needed[0] == pytest.approx(0.5, abs=1e-11)
    assert (np.diff(needed) > 0).all()
    np.testing.assert_allclose(law.transfer(needed, sizes), 0.5, atol=1e-4)
    assert float(law.radius(needed[2], 1 - needed[2])) == pytest.approx(2, abs=5e-4)


@every
def test_nothing_is_certified_without_a_lead_or_at_infinity(family):
    law = of(family, 0.5, 3, [10])
    np.testing.assert_array_equal(law.radius([0.5, 0.2, 0.0, 0.3], [0.5, 0.8, 1.0, 0.3]), 0)
    assert (law.transfer(FEW, np.inf) == 0).all()
    assert required(law, np.inf) == 1.0
    np.testing.assert_array_equal(law.transfer(P, 0.0), P)
    assert law.radius(np.full((2, 1), 0.9), np.array([0.05])).shape == (2, 1)
    assert 0 < float(law.radius(1.0, 0.0)) < 1e3


@every
def test_monotone(family):
    """transfer falls with the size and rises with p, and leaves at most p."""
    law = of(family, 1.0, 2, [12])
    table = np.array([law.transfer(P, size) for size in np.linspace(0.02, 1.4, 6)])
    assert (np.diff(table, axis=0) < 1e-5).all()
    assert (np.diff(table, axis=1) > -1e-12).all()
    assert (table <= P).all()


@both
@pytest.mark.parametrize("k", [0, 1, 6])
def test_half_spaces_are_certified_no_further_than_their_flip(family, k):
    """{z_1 < t} flips at t; p = P(z_1 < t) by an integral over the norm. Near it for small k, exact for k = 0."""
    dim, t = 30, 1.8
    if family is MixedL1:
        p = quad(lambda y: stats.gamma(dim - k).pdf(y) * (1 - max(1 - t / y, 0) ** (dim - 1) / 2), 0, 200, points=[t])[
            0
        ]
    else:
        half = (dim - 1) / 2
        p = quad(lambda s: stats.chi(dim - k).pdf(s) * betainc(half, half, (1 + min(t / s, 1)) / 2), 0, 30, points=[t])[
            0
        ]
    radius = float(family(1.0, k, [dim]).radius(p, 1 - p))
    assert radius <= t
    assert radius > t - (1e-3 if k == 0 else 0.05)


@every
def test_no_certified_shift_flips_a_classifier_on_draws(family):
    """Ball, slab and half-space in D = 12 at 95 % of their certified size: the class stays, five errors wide."""
    law, n = of(family, 1.0, 4, [12]), 40_000
    z = draws(law, n)
    direction = worst(family, 1.0, 12)
    radius_2 = np.sqrt((z**2).sum(1))
    for region in (
        lambda x: np.sqrt((x**2).sum(1)) < np.quantile(radius_2, 0.8),
        lambda x: np.abs(x[:, 0]) < np.quantile(np.abs(z[:, 0]), 0.9),
        lambda x: x @ direction < np.quantile(z @ direction, 0.95),
    ):
        p = region(z).mean() - 5 * 0.5 / math.sqrt(n)
        size = 0.95 * float(law.radius(p, 1 - p))
        assert size > 0
        for delta in (direction, -direction, np.roll(direction, 3)):
            assert region(z + size * delta).mean() > 0.5 - 5 * 0.5 / math.sqrt(n)


# ---------------------------------------------------------------- the bound from draws


@pytest.mark.parametrize("shift", [(0.6, 0.6), (0.6, -0.2), (0.0, 0.6)])
def test_linf_transfer_in_the_plane(shift):
    """D = 2, k = 1: below the quadrature in every direction (Theorem 3), near the corner's."""
    law = MixedLinf(1.0, 1, [2], draws=40_000)
    value, error = plane(MixedLinf, 1, shift, 3e-4)
    ours = law.transfer(FEW, 0.6)
    assert (ours <= value + error).all()
    if shift == (0.6, 0.6):
        assert (ours >= np.maximum(value - 2 * law.error - 0.015, 0)).all()


def test_linf_without_the_power_is_the_normal_law():
    """k = 0: Phi(z(p) - r sqrt(D)); less the error stated, the draws' own, and a step of the sizes."""
    law = MixedLinf(2.0, 0, [50], draws=40_000)
    for size in (0.3, 1.0, 2.0):
        lost = Gaussian(1.0).transfer(P, size) - law.transfer(P, size / math.sqrt(50))
        assert (lost > 0).all()
        assert (lost < 2 * law.error + 0.01).all()
        needed = required(law, size / math.sqrt(50))
        assert 0 < needed - float(stats.norm.cdf(size)) < 2 * law.error + 0.01
        assert float(law.transfer(needed, size / math.sqrt(50))) == pytest.approx(0.5, abs=1e-6)
    radius = float(law.radius(0.99, 0.01))
    assert radius in law.sizes
    assert stats.norm.ppf(0.99) - 0.1 < radius * math.sqrt(50) < stats.norm.ppf(0.99)


def test_linf_bound_holds_as_often_as_it_says():
    """With alpha = .45 and 1,000 draws the mean of min(lambda L, 1) less its error exceeds the truth in none of 40
    worlds: for k = 0, where ln L is N(-R^2/2, R^2), and at one size, for which the error of all 250 is generous.
    """
    law = MixedLinf(1.0, 0, [4], draws=1000, alpha=0.45)
    step = 49  # R = 1
    false = 0
    for world in range(40):
        z = draws(law, 1000, world)
        law.__dict__["_extremes"] = np.stack([z.sum(1), z.min(1), z.max(1)])
        levels, kept = law._bounds(law.sizes[step])
        log = np.log(levels)
        truth = levels * stats.norm.cdf(-log - 0.5) + stats.norm.cdf(log - 0.5)  # E min(lambda L, 1)
        false += bool((kept > truth).any())
    assert false == 0
    assert law.error == pytest.approx(math.sqrt(math.log(250 / 0.45) / 2000))


def test_linf_sizes_are_rounded_up():
    """A size between two of the grid leaves what the next one does; nothing beyond the last."""
    law = MixedLinf(1.0, 1, [4], draws=1000)
    assert law.transfer(0.9, 0.0149) == law.transfer(0.9, 0.02)
    assert law.transfer(0.9, 0.0201) == law.transfer(0.9, 0.03)
    assert law.transfer(0.9, law.sizes[-1] * 1.001) == 0
    assert required(law, law.sizes[-1] * 1.001) == 1


# ---------------------------------------------------------------- draws and densities


@both
@pytest.mark.parametrize(("dim", "k"), [(2, 1), (5, 0), (5, 2), (6, 5), (50, 7)])
def test_draws_have_the_laws_norm_and_direction(family, dim, k):
    """||Z|| is a Gamma or chi variable of D - k, one coordinate of the direction a Beta one, the two independent."""
    z = draws(family(0.3, k, [dim]), 20_000) / 0.3
    if family is MixedL1:
        norm = np.abs(z).sum(1)
        side = np.abs(z[:, -1]) / norm
        expected = stats.gamma(dim - k), stats.beta(1, dim - 1)
    else:
        norm = np.sqrt((z**2).sum(1))
        side = (1 + z[:, -1] / norm) / 2
        expected = stats.chi(dim - k), stats.beta((dim - 1) / 2, (dim - 1) / 2)
    assert stats.kstest(norm, expected[0].cdf).pvalue > 1e-3
    assert stats.kstest(side, expected[1].cdf).pvalue > 1e-3
    for half in (norm < np.median(norm), norm >= np.median(norm)):
        assert stats.kstest(side[half], expected[1].cdf).pvalue > 1e-3
    assert abs((z[:, 0] > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(len(z))


@pytest.mark.parametrize(("dim", "k"), [(2, 1), (6, 3), (50, 25), (3072, 1000)])
def test_draws_of_linf(dim, k):
    """max |z_i| has a density proportional to m^-k phi(m) (2 Phi(m) - 1)^(D - 1), here integrated and normalised; the
    squared l2 norm is chi-square with D - k degrees, as for every power of a norm."""
    z = draws(MixedLinf(0.3, k, [dim]), 4000) / 0.3
    m = np.linspace(1e-4, 9, 40_001)
    log = -k * np.log(m) - m**2 / 2 + (dim - 1) * np.log(2 * stats.norm.cdf(m) - 1)
    cdf = np.cumsum(np.exp(log - log.max()))
    assert stats.kstest(np.abs(z).max(1), lambda x: np.interp(x, m, cdf / cdf[-1])).pvalue > 1e-3
    assert stats.kstest((z**2).sum(1), stats.chi2(dim - k).cdf).pvalue > 1e-3
    place = np.abs(z).argmax(1)
    assert abs((place < dim // 2).mean() - (dim // 2) / dim) < 5 * 0.5 / math.sqrt(len(z))


@every
def test_draws_are_addressed_and_bounded(family):
    """By source alone; in its precision; finite; training draws have the same norm; float64 without a stated other."""
    law = family(0.5, 3, [2, 3, 4])
    first, again = (law.sample(Stream(4, 2).at("select", 1), 6, (2, 3, 4)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == torch.float64
    trained = law.sample(TrainingSource(torch.device("cpu")), 5000, (2, 3, 4))
    assert trained.dtype == torch.float32
    assert trained.isfinite().all()
    low, high = law.span
    assert ((trained > low) & (trained < high)).all()
    error = 5 * float(trained.flatten(1).square().sum(1).std()) / math.sqrt(5000)
    more = draws(law, 20_000)
    assert abs(float(trained.flatten(1).square().sum(1).mean()) - (more**2).sum(1).mean()) < 2 * error


class Zeros(TrainingSource):
    """The least draws there are."""

    def uniform(self, *shape):
        return torch.zeros(shape, dtype=torch.float64)


@every
def test_the_least_draws_are_finite(family):
    law = family(0.5, 3, [7])
    assert law.sample(Zeros(torch.device("cpu")), 3, (7,)).isfinite().all()


@every
@pytest.mark.parametrize("k", [0, 1])
def test_log_density_integrates_to_one(family, k):
    """In the plane, in polar coordinates, where the singularity is gone."""
    law = family(0.6, k, [2])
    s, a = np.meshgrid((np.arange(4000) + 0.5) / 4000 * 25, (np.arange(400) + 0.5) / 400 * 2 * math.pi, indexing="ij")
    points = torch.from_numpy(np.stack([s * np.cos(a), s * np.sin(a)], -1).reshape(-1, 2))
    mass = (law.log_density(points).exp().numpy() * s.ravel()).sum() * 25 / 4000 * 2 * math.pi / 400
    assert mass == pytest.approx(1, abs=1e-3)


@every
def test_log_density_in_many_coordinates(family):
    """Without the power the normal or Laplace law's; with it the mean ratio of the two densities is 1, on draws."""
    dim, n = 8, 40_000
    plain, law = family(0.6, 0, [dim]), family(0.6, 2, [dim])
    z = torch.from_numpy(draws(law, n))
    closed = Laplace(0.6) if family is MixedL1 else Gaussian(0.6)
    np.testing.assert_allclose(plain.log_density(z), closed.log_density(z), rtol=1e-9)
    ratio = (plain.log_density(z) - law.log_density(z)).exp().numpy()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(n)
    np.testing.assert_allclose(
        (law.log_density(z[:9]) - law.log_density(z[9:18])).numpy(),
        exponent(family, 2, z[9:18].numpy() / 0.6) - exponent(family, 2, z[:9].numpy() / 0.6),
        atol=1e-9,
    )


# ---------------------------------------------------------------- gauge, copies, refusals


@every
def test_gauge_and_reach(family):
    law = of(family, 0.5, 1, [1, 2, 2])
    delta = torch.tensor([[[[0.5, -1.0], [0.25, 0.0]]]])
    expected = {MixedL1: 3.5, MixedL2: math.sqrt(5.25), MixedLinf: 2.0}[family]
    assert law.gauge(delta).dtype == torch.float64
    assert float(law.gauge(delta)) == pytest.approx(expected)
    assert law.reach(2.0) == 1.0
    assert law.norm == {MixedL1: "l1", MixedL2: "l2", MixedLinf: "linf"}[family]
    assert float(copy.deepcopy(law).transfer(0.9, 0.1)) == float(law.transfer(0.9, 0.1))


@every
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 2.5}, "k must be a whole number from 0 to"),
        ({"k": True}, "k must be a whole number from 0 to"),
        ({"k": -1}, "k must be a whole number from 0 to"),
        ({"k": 4}, "k must be a whole number from 0 to"),
        ({"shape": 4}, "shape must list whole numbers"),
        ({"shape": [1]}, "shape must list whole numbers"),
        ({"shape": [2.0, 2]}, "shape must list whole numbers"),
        ({"shape": [0, 4]}, "shape must list whole numbers"),
    ],
)
def test_arguments_are_checked(family, change, message):
    with pytest.raises(RequestError, match=message):
        family(**({"b" if family is MixedL1 else "sigma": 1.0, "k": 1, "shape": [2, 2]} | change))


@pytest.mark.parametrize(("change", "message"), [({"draws": 10}, "draws must"), ({"alpha": 0.7}, "alpha must")])
def test_arguments_of_linf_are_checked(change, message):
    with pytest.raises(RequestError, match=message):
        MixedLinf(**({"sigma": 1.0, "k": 1, "shape": [2, 2]} | change))


@every
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scales_are_checked(family, scale):
    with pytest.raises(RequestError, match=r"(b|sigma) must be (positive and finite|a finite number)"):
        family(scale, 1, [2, 2])


@every
def test_other_shapes_are_refused(family):
    """Radii depend on D, so an image of another size must not be taken."""
    law = family(0.5, 1, [1, 4, 4])
    with pytest.raises(RequestError, match=r"shape \[1, 4, 4\], not \[3, 4, 4\]"):
        law.sample(Stream(0, 0).at("select", 0), 2, (3, 4, 4))
    with pytest.raises(RequestError, match=r"set noise\.shape"):
        law.log_density(torch.zeros(2, 9))
