"""Every smoothing law: closed forms against quadrature, brute force, classifiers with a known flip, and attacks."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing import Exponential, FoldedNormal, Gaussian, Laplace, Law, Rayleigh, Uniform
from gsmooth_lightning.smoothing.neyman_pearson import transfer_of
from laws import IN_BOXES, LAWS, every_law, law_of, required

P = np.array([1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1 - 1e-4])
BOUNDS = [(0.9, 0.1), (0.6, 0.05), (0.999, 0.0005), (0.4, 0.3), (0.51, 0.49), (0.99, 0.001)]


def sizes_of(name):
    return (0.05, 0.3, 0.8) if name.startswith("uniform") else (0.05, 0.3, 0.8, 2.0)


def shifts_of(name, size):
    """Every shift of one parameter with this gauge."""
    reach = float(law_of(name).reach(size))
    return (reach,) if law_of(name).one_sided else (reach, -reach)


def left(law, p, shift, size):
    """The closed form for one direction."""
    if isinstance(law, Rayleigh):
        return (law.transfer_up if shift > 0 else law.transfer_down)(p, size)
    return law.transfer(p, size)


# ---------------------------------------------------------------- transfer


@every_law
def test_transfer_is_the_neyman_pearson_infimum(name):
    """To 1e-6, and never above the quadrature by more than the error it states; for shifts of both signs."""
    law = law_of(name)
    for size in sizes_of(name):
        for shift in shifts_of(name, size):
            assert float(law.gauge(torch.tensor([[shift]], dtype=torch.float64))) == pytest.approx(size, rel=1e-12)
            value, error = transfer_of(law, [shift], P)
            closed = left(law, P, shift, size)
            np.testing.assert_allclose(closed, value, atol=1e-6)
            assert (closed <= value + error).all()
            assert (error < 1e-6).all()
            assert (law.transfer(P, size) <= closed).all()


@pytest.mark.parametrize(
    ("law", "shift", "equal"),
    [
        (Gaussian(0.7), (0.3, -0.2), True),
        (Gaussian([0.5, 2.0]), (0.3, 1.0), True),
        (Gaussian(covariance=[[1.0, 0.7], [0.7, 2.0]]), (0.9, 0.4), True),
        (Laplace(0.4), (0.5, 0.0), True),
        (Laplace(0.4), (0.0, -0.9), True),
        (Laplace(0.4), (0.3, 0.2), False),
        (Laplace(0.4), (-0.8, 0.7), False),
        (Uniform(-1, 1), (0.3, -0.2), True),
        (Uniform(0, 3), (1.1, 0.7), True),
        (Exponential(2.0), (0.3, 0.2), True),
        (Exponential(2.0), (0.0, 0.7), True),
    ],
)
def test_transfer_in_two_coordinates(law, shift, equal):
    """To 1e-4 where the gauge is exact; the l1 gauge of Laplace is attained on an axis and a bound elsewhere."""
    size = float(law.gauge(torch.tensor([shift], dtype=torch.float64)))
    value, error = transfer_of(law, shift, P, tolerance=1e-5)
    closed = law.transfer(P, size)
    assert (closed <= value + error).all()
    assert (error < 1e-4).all()
    assert np.allclose(closed, value, rtol=0, atol=1e-4) == equal


def product_masses(distribution, shift, edges):
    """Masses of all cells of a product grid under the law and under the shifted law."""
    clean, attacked = np.ones(1), np.ones(1)
    for move, side in zip(shift, edges, strict=True):
        clean = np.outer(clean, np.diff(distribution.cdf(side))).ravel()
        attacked = np.outer(attacked, np.diff(distribution.cdf(side - move))).ravel()
    keep = clean > 1e-300
    return clean[keep], attacked[keep]


def brute_force(p, clean, attacked):
    order = np.argsort(np.round(attacked / clean, 9), kind="stable")
    return np.interp(p, [0, *np.cumsum(clean[order])], [0, *np.cumsum(attacked[order])])


@every_law
def test_transfer_against_sorted_cells(name):
    """No quadrature: exact masses of 40,000 cells from SciPy, sorted by likelihood ratio."""
    law, distribution = LAWS[name]
    low, high = law.span
    for shift, size in itertools.product((1, -1), (0.1, 0.7)):
        move = shift * float(law.reach(size))
        if move < 0 and law.one_sided:
            continue
        side = np.unique(np.concatenate([np.linspace(low, high, 40_001), np.add(law.kinks, move)]))
        brute = brute_force(P, *product_masses(distribution, [move], [side]))
        np.testing.assert_allclose(left(law, P, move, size), brute, atol=2e-6)


def sides(law, shift, cells):
    low, high = law.span
    for move, count in zip(shift, cells, strict=True):
        even = np.linspace(low + min(move, 0), high + max(move, 0), count)
        yield np.unique(np.concatenate([even, np.array(law.kinks), np.array(law.kinks) + move]))


@pytest.mark.parametrize("dim", [2, 3])
def test_laplace_is_worst_along_an_axis(dim):
    """Brute force in D coordinates: the bound is met when one coordinate takes the whole shift, and only bounds others.

    Sorted cells are one test, so they never fall below T.
    """
    law, distribution = LAWS["laplace"]
    axis = [0.6] + [0.0] * (dim - 1)
    size = float(law.gauge(torch.tensor([axis], dtype=torch.float64)))
    edges = list(sides(law, axis, [8001] + [6] * (dim - 1)))
    brute = brute_force(P, *product_masses(distribution, axis, edges))
    np.testing.assert_allclose(law.transfer(P, size), brute, atol=1e-4)
    spread = [0.6 / dim] * dim
    edges = list(sides(law, spread, [300 if dim == 2 else 60] * dim))
    brute = brute_force(P, *product_masses(distribution, spread, edges))
    assert (law.transfer(P, size) <= brute + 1e-12).all()
    assert (brute - law.transfer(P, size)).max() > 0.02


@pytest.mark.parametrize("shift", [(0.3, -0.2), (1.0, 0.0), (0.3, -0.2, 0.9), (2.9, 0.1, 0.1), (3.5, 0.0, 0.0)])
@pytest.mark.parametrize("name", ["uniform", "exponential"])
def test_constant_likelihood_ratios_are_exact_by_brute_force(name, shift):
    """Box and exponential in D = 2, 3: with cells along the faces of both supports the sorted cells are exact."""
    law, distribution = LAWS[name]
    shift = np.abs(shift) if law.one_sided else np.array(shift)
    size = float(law.gauge(torch.from_numpy(shift)[None]))
    brute = brute_force(P, *product_masses(distribution, shift, list(sides(law, shift, [12] * len(shift)))))
    np.testing.assert_allclose(law.transfer(P, size), brute, atol=1e-9)


# ---------------------------------------------------------------- radius


@every_law
@pytest.mark.parametrize(("pa", "pb"), BOUNDS)
def test_radius_is_where_the_transfers_meet(name, pa, pb):
    """At the radius T(pA) = 1 - T(1 - pB); inside it is larger, outside smaller; the general bisection agrees."""
    law = law_of(name)
    radius = float(law.radius(pa, pb))

    def surplus(size):
        return float(law.transfer(pa, size) - (1 - law.transfer(1 - pb, size)))

    if isinstance(law, Rayleigh):
        up, down = (lambda s, f=f: float(f(pa, s) - 1 + f(1 - pb, s)) for f in (law.transfer_up, law.transfer_down))
        low, high = law.interval(pa, pb)
        assert radius == min(-low, high)
        assert up(high) == pytest.approx(0, abs=1e-12)
        assert down(-low) == pytest.approx(0, abs=1e-12)
        assert up(high * 0.99) > 0 > up(high * 1.01)
        assert down(-low * 0.99) > 0 > down(-low * 1.01)
        assert min(up(radius * 0.999), down(radius * 0.999)) > 0
    else:
        assert surplus(radius) == pytest.approx(0, abs=1e-12)
        assert surplus(radius * 1.01) < 0
        assert float(Law.radius(law, pa, pb)) == pytest.approx(radius, rel=1e-9)
        reach = float(law.reach(radius))
        assert law.interval(pa, pb) == (0.0 if law.one_sided else -reach, reach)
        assert surplus(radius * 0.99) > 0


@every_law
def test_radius_with_one_bound(name):
    """The column pB = 1 - pA of theory.md's table."""
    law = law_of(name)
    p = np.array([0.5001, 0.6, 0.9, 0.999])
    z = stats.norm.ppf
    expected = {
        "gaussian": 0.7 * z(p),
        "laplace": -0.4 * np.log(2 * (1 - p)),
        "uniform": 3 * (p - 0.5),
        "uniform from 0": 3 * (p - 0.5),
        "exponential": -np.log(2 - 2 * p) / 2.0,
        "folded normal": 0.5 * (z((1 + p) / 2) - z(0.75)),
        "rayleigh": np.minimum(np.log(-np.log2(1 - p)) / 2, -np.log(-np.log2(p)) / 2),
    }[name]
    np.testing.assert_allclose(law.reach(law.radius(p, 1 - p)), expected, rtol=1e-9)
    if isinstance(law, Rayleigh):
        for q in p:
            ends = np.exp(law.interval(q, 1 - q))
            np.testing.assert_allclose(ends, np.sqrt([-math.log2(q), -math.log2(1 - q)]), rtol=1e-9)


@every_law
def test_required_is_the_inverse_of_transfer_at_one_half(name):
    """T(required) = 1/2, rounded up, and a binary radius is the size that pA is required for."""
    law, sizes = law_of(name), np.array([0.0, 0.01, 0.1, 0.3, 0.45])
    needed = np.array([required(law, size) for size in sizes])
    left_over = law.transfer(needed, sizes) - 0.5
    assert ((left_over > 0) & (left_over < 1e-11)).all()
    np.testing.assert_allclose(law.radius(needed, 1 - needed), sizes, atol=1e-9)


def test_required_is_not_one_minus_transfer():
    """1 - T(1/2) inverts T only for symmetric laws: for one direction of the Rayleigh law it claims too much."""
    size = math.log(2) / 2  # c^2 = 2
    claimed = 1 - float(Rayleigh(1.0).transfer_up(0.5, size))
    assert claimed == pytest.approx(2**-0.5)
    assert float(Rayleigh(1.0).transfer_up(claimed, size)) < 0.46
    assert required(Rayleigh(1.0), size) == pytest.approx(0.75)
    assert required(Uniform(0, 1), 0.7) == 1.0  # nothing suffices


@every_law
def test_no_lead_no_radius(name):
    """pA <= pB certifies nothing; numbers, lists and arrays are taken."""
    law = law_of(name)
    np.testing.assert_array_equal(law.radius([0.5, 0.2, 0.0, 0.3], [0.5, 0.8, 1.0, 0.3]), 0)
    assert law.interval(0.4, 0.6) == (0.0, 0.0)
    assert np.shape(law.radius(0.9, 0.1)) == ()
    assert law.radius(np.full((2, 1), 0.9), np.full(3, 0.05)).shape == (2, 3)


@every_law
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_monotone(name, data):
    """radius rises with pA and falls with pB; transfer falls with the size, rises with p, and is p without a shift."""
    law = law_of(name)
    share = st.floats(0.0005, 0.9995)
    size = st.floats(0, 0.99 if name.startswith("uniform") else 4)
    (a, b), (c, d) = (sorted((data.draw(share), data.draw(share))) for _ in range(2))
    small, big = sorted((data.draw(size), data.draw(size)))
    assert law.radius(a, c) <= law.radius(b, c) + 1e-12
    assert law.radius(a, d) <= law.radius(a, c) + 1e-12
    assert law.transfer(a, big) <= law.transfer(a, small) + 1e-12
    assert law.transfer(a, small) <= law.transfer(b, small) + 1e-12
    assert float(law.transfer(a, 0.0)) == pytest.approx(a, abs=1e-12)
    assert 0 <= law.transfer(a, big) <= a + 1e-12
    assert required(law, small) <= required(law, big) + 1e-12


@every_law
def test_infinite_size(name):
    """What a law cannot certify has gauge inf, and leaves nothing."""
    assert (law_of(name).transfer(P, np.inf) == 0).all()


def test_laplace_is_never_below_the_published_radius():
    """max{(b/2) ln(pA/pB), -b ln(1 - pA + pB)} (Teng et al. 2019) is never larger, and equal with pB = 1 - pA."""
    share = np.linspace(1e-4, 1 - 1e-4, 400)
    pa, pb = np.meshgrid(share, share)
    valid = (pa > pb) & (pa + pb <= 1 + 1e-12)
    pa, pb, law = pa[valid], pb[valid], Laplace(0.4)
    published = np.maximum(0.2 * np.log(pa / pb), -0.4 * np.log(1 - pa + pb))
    ours = law.reach(law.radius(pa, pb))
    assert (published <= ours + 1e-12).all()
    assert (ours - published).max() > 0.1
    p = share[share > 0.5]
    binary = np.maximum(0.2 * np.log(p / (1 - p)), -0.4 * np.log(2 - 2 * p))
    np.testing.assert_allclose(law.reach(law.radius(p, 1 - p)), binary, rtol=1e-9)


# ---------------------------------------------------------------- classifiers with a known flip, and attacks


@every_law
@pytest.mark.parametrize("p", [0.55, 0.9, 0.999])
def test_half_lines_are_certified_to_their_flip(name, p):
    """{z < t} flips when the law's median passes t: R = t - median, with equality; c = t / median for Rayleigh."""
    law, distribution = LAWS[name]
    t = distribution.ppf(p)
    flip = t - distribution.ppf(0.5)
    low, high = law.interval(p, 1 - p)
    assert high == pytest.approx(flip, rel=1e-9)
    if not law.one_sided:  # the mirrored half-line
        assert low == pytest.approx(distribution.ppf(1 - p) - distribution.ppf(0.5), rel=1e-9)
    assert distribution.cdf(t - high * 0.999) > 0.5 > distribution.cdf(t - high * 1.001)


@every_law
def test_no_certified_shift_flips_a_region_classifier(name):
    """200 random classifiers of a line into 3 classes, probabilities by SciPy: the whole interval keeps the class."""
    law, distribution = LAWS[name]
    random = np.random.default_rng(7)
    tightest = np.inf
    for _ in range(200):
        cuts = np.sort(distribution.ppf(random.random(random.integers(1, 12))))
        edges = np.concatenate([[-np.inf], cuts, [np.inf]])
        label = random.integers(0, 3, len(edges) - 1)
        votes = np.eye(3)[label]

        def shares(shift, edges=edges, votes=votes):
            return np.diff(distribution.cdf(edges - np.asarray(shift)[:, None])) @ votes

        order = np.argsort(shares([0.0])[0])
        pa, pb = shares([0.0])[0][order[-1]], shares([0.0])[0][order[-2]]
        for second in (pb, 1 - pa):
            low, high = law.interval(pa, second)
            inside = np.linspace(max(low, -1e3), min(high, 1e3), 201)[1:-1] if high > 0 else np.zeros(0)
            under_attack = shares(inside)
            others = np.delete(under_attack, order[-1], axis=1)
            assert (under_attack[:, order[-1]] > others.max(1)).all()
        if 0 < high < 10 and low > -10:
            beyond = shares(np.array([low, high]) * 1.02)
            tightest = min(tightest, (beyond[:, order[-1]] - np.delete(beyond, order[-1], axis=1).max(1)).min())
    assert tightest < 0.0  # and some flip just outside


@pytest.mark.parametrize("name", IN_BOXES)
def test_no_certified_shift_flips_a_region_classifier_of_the_plane(name):
    """100 random 8 x 8 boards of two classes, 40 random directions, at 99.9 % of the certified size."""
    law, distribution = LAWS[name]
    random = np.random.default_rng(3)
    edges = np.concatenate([[-np.inf], distribution.ppf(np.arange(1, 8) / 8), [np.inf]])
    for _ in range(100):
        board = random.random((8, 8)) < random.choice([0.3, 0.8, 0.95])

        def share(shift, board=board):
            x, y = (np.diff(distribution.cdf(edges - move)) for move in shift)
            return x @ board @ y

        p = share((0.0, 0.0))
        if p < 0.5:
            board, p = ~board, 1 - p
        size = float(law.radius(p, 1 - p))
        directions = random.normal(size=(40, 2)) * (random.random((40, 2)) < 0.8)
        for direction in np.abs(directions) if law.one_sided else directions:
            if not direction.any() or size == 0:
                continue
            gauge = stretch = 0.0
            high = 50.0
            for _ in range(40):  # the gauge rises along a ray
                middle = (stretch + high) / 2
                gauge = float(law.gauge(torch.from_numpy(direction * middle)[None]))
                stretch, high = (middle, high) if gauge < 0.999 * size else (stretch, middle)
            assert share(direction * stretch, board) > 0.5


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "two", [1.0, 2.0], None, True])
@pytest.mark.parametrize(
    ("law", "parameter"), [(Laplace, "b"), (Exponential, "rate"), (FoldedNormal, "sigma"), (Rayleigh, "scale")]
)
def test_parameters_must_be_positive_and_finite(law, parameter, value):
    """One sentence that names the parameter."""
    with pytest.raises(RequestError, match=f"{parameter} must be"):
        law(value)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (0, math.inf), (math.nan, 1), ("a", 1), (-1e308, 1e308)])
def test_uniform_needs_an_interval(low, high):
    with pytest.raises(RequestError, match=r"(low|high) must be"):
        Uniform(low, high)


@pytest.mark.parametrize("law", [FoldedNormal(1.0), Rayleigh(1.0)])
def test_laws_of_one_parameter(law):
    """Their products have no closed form here."""
    with pytest.raises(RequestError, match="one parameter, not 2"):
        law.gauge(torch.zeros(3, 2))
    with pytest.raises(RequestError, match="one parameter, not 2"):
        law.log_density(torch.zeros(3, 2))


@every_law
def test_laws_describe_themselves(name):
    """Their parameters are in the text that records show."""
    assert any(character.isdigit() for character in law_of(name).extra_repr())
