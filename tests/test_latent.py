"""Noise in a latent space, against dense matrices; how far encoders stretch distances, against their Jacobians."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import kstest, multivariate_normal
from torch import nn

from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.model.norms import conv_norm, lipschitz_constant
from gsmooth_lightning.smoothed import LEVELS
from gsmooth_lightning.smoothing import Exponential, FoldedNormal, Gaussian, Laplace, Latent, Rayleigh, Uniform
from gsmooth_lightning.stream import Stream, TrainingSource, sampling_slack
from surrogates import Drift, dense, mahalanobis, surrogate

SHAPE = (1, 2, 3)


def noise(dim=2, law=None, sigma=0.3, seed=0, size=1.0, shape=SHAPE):
    directions = size * torch.randn(dim, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Latent(directions, law or Gaussian([0.7, 1.9, 0.2][:dim]), sigma)


CASES = {
    "one": noise(1),
    "two": noise(2),
    "three": noise(3, sigma=1.7),
    "one sigma for two": noise(2, Gaussian(0.5)),
    "little epsilon": noise(2, sigma=1e-3),
    "many values": noise(2, shape=(4, 7, 7), sigma=0.1),
}
ONE_SIDED = (Exponential(2.0), FoldedNormal(0.5))
OTHERS = (Uniform(-1.5, 1.5), Uniform(0, 3), Laplace(0.4), Rayleigh(0.5), *ONE_SIDED)
every_case = pytest.mark.parametrize("case", CASES)
every_other = pytest.mark.parametrize("law", OTHERS, ids=repr)


def deltas(case, n=40):
    """Shifts of all kinds: along the directions, across them, both, and none, (n, *shape)."""
    law, random = CASES[case], torch.Generator().manual_seed(3)
    across = torch.randn(n, *law.directions.shape[1:], generator=random, dtype=torch.float64)
    along = torch.tensordot(torch.randn(n, law.dim, generator=random, dtype=torch.float64), law.directions, 1)
    share = torch.linspace(0, 1, n, dtype=torch.float64).view(-1, 1, 1, 1)
    return torch.cat([share * along + (1 - share) * across * law.sigma, torch.zeros_like(across[:1])])


class Unit:
    """In place of random numbers: the unit vectors, one in each draw: draws are the columns of the map."""

    def __init__(self, dim, values):
        self.parts = [*torch.eye(dim + values, dtype=torch.float64).split([dim, values], 1)]

    def normal(self, n, *shape):
        return self.parts.pop(0).clone().view(n, *shape)


# ---------------------------------------------------------------- the law


@every_case
def test_draws_have_the_stated_covariance(case):
    """Exactly: a draw is a linear map of normal numbers, theta's first, and that map's square is C."""
    law = CASES[case]
    shape = law.directions.shape[1:]
    columns = law.sample(Unit(law.dim, shape.numel()), law.dim + shape.numel(), tuple(shape)).flatten(1).numpy()
    np.testing.assert_allclose(columns.T @ columns, dense(law), rtol=1e-12, atol=1e-15)


def test_draws_of_a_stream_have_it_too():
    """200,000 draws: the mean and every entry of the covariance within six standard errors; they depend on their
    address alone."""
    law, n = CASES["two"], 200_000
    draws = law.sample(Stream(0, 0).at("estimate", 0), n, SHAPE)
    assert draws.dtype == torch.float64
    assert draws.shape == (n, *SHAPE)
    z, c = draws.flatten(1).numpy(), dense(law)
    assert (np.abs(z.mean(0)) < 6 * np.sqrt(np.diag(c) / n)).all()
    spread = np.sqrt((c**2 + np.outer(np.diag(c), np.diag(c))) / n)
    assert (np.abs(np.cov(z.T) - c) < 6 * spread).all()
    assert torch.equal(law.sample(Stream(0, 0).at("estimate", 0), n, SHAPE), draws)
    assert law.sample(TrainingSource(torch.device("cpu")), 3, SHAPE).dtype == torch.float32


@every_other
def test_draws_of_other_laws_are_their_parameters_times_a1_and_a_normal(law):
    """With a tiny epsilon the coordinates are A1 theta; across A1 they are normal."""
    own, n = Latent(torch.tensor([[3.0, -4.0]]), law, 1e-6), 20_000
    z = own.sample(Stream(1, 0).at("estimate", 0), n, (2,)).numpy()
    again = law.sample(Stream(1, 0).at("estimate", 0), n, (1,)).numpy()
    np.testing.assert_allclose(z, again * [[3.0, -4.0]], atol=1e-5)
    assert kstest((z @ [0.8, 0.6]) / 1e-6, "norm").pvalue > 1e-3


@every_other
def test_the_span_holds_every_coordinate(law):
    """A1 theta at both ends of theta's span, and 8.2 sigma more: all but 2^-52 of a normal's mass."""
    own = Latent(torch.tensor([[3.0, -4.0, 0.0]]), law, 0.3)
    ends = np.outer(law.span, own.directions[0].numpy())
    assert own.span[0] <= ends.min() - 8.2 * own.sigma
    assert own.span[1] >= ends.max() + 8.2 * own.sigma


@every_case
def test_the_span_of_gaussian_parameters_is_beyond_every_standard_deviation(case):
    law = CASES[case]
    farthest = 8.2 * math.sqrt(dense(law).diagonal().max())
    assert law.span[0] <= -farthest
    assert law.span[1] >= farthest


@every_case
def test_split_is_the_minimiser(case):
    """Against least squares of the stacked system [A1 / sigma; 1 / s] a = [delta / sigma; 0]; and delta is the sum."""
    law, delta = CASES[case], deltas(case)
    a, rest = law.split(delta)
    assert a.dtype == rest.dtype == torch.float64
    assert torch.allclose(torch.tensordot(a, law.directions, 1) + rest, delta, atol=1e-12)
    rows = law.directions.flatten(1).numpy()
    matrix = np.vstack([rows.T / law.sigma, np.diag(1 / law.spread.numpy())])
    right = np.vstack([delta.flatten(1).numpy().T / law.sigma, np.zeros((law.dim, len(delta)))])
    np.testing.assert_allclose(a.numpy(), np.linalg.lstsq(matrix, right, rcond=None)[0].T, rtol=1e-8, atol=1e-9)


@every_case
def test_gauge_is_the_norm_of_the_inverse_covariance(case):
    law, delta = CASES[case], deltas(case)
    found = law.gauge(delta).numpy()
    np.testing.assert_allclose(found, mahalanobis(dense(law), delta.flatten(1).numpy()), rtol=1e-7, atol=1e-12)
    assert found[-1] == 0
    assert law.gauge(delta.float()).dtype == torch.float64


@pytest.mark.parametrize("sigma", [0.3, 1e-3, 1e-5])
@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6, 0.0])
def test_directions_that_nearly_coincide(sigma, apart):
    """The pair spans a plane, in which C is 2 x 2, and its determinant a sum without cancellation."""
    s = (0.7, 1.9)
    law = Latent(torch.tensor([[1.0, 0.0, 0.0], [1.0, apart, 0.0]], dtype=torch.float64), Gaussian(list(s)), sigma)
    delta = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, -0.2, 0.1], [5, 5 * apart, 0]], dtype=torch.float64)
    x, y, z = delta.numpy().T.astype(np.longdouble)
    xx, xy = s[0] ** 2 + s[1] ** 2 + sigma**2, s[1] ** 2 * apart
    yy = s[1] ** 2 * np.longdouble(apart) ** 2 + np.longdouble(sigma) ** 2
    flat = (s[0] * s[1] * np.longdouble(apart)) ** 2 + (s[0] ** 2 + s[1] ** 2) * np.longdouble(sigma) ** 2
    determinant = flat + np.longdouble(sigma) ** 2 * (yy)  # what xx yy - xy^2 is, without its cancellation
    square = (yy * x**2 - 2 * xy * x * y + xx * y**2) / determinant + z**2 / sigma**2
    np.testing.assert_allclose(law.gauge(delta).numpy(), np.sqrt(square).astype(float), rtol=1e-5)
    assert (law.gauge(delta).numpy() >= np.sqrt(square).astype(float) * (1 - 1e-5)).all()


def test_gauge_is_of_any_split_the_least():
    """Any a gives a bound, so whatever else is tried is no smaller."""
    law, delta = CASES["three"], deltas("three")
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        a = law.split(delta)[0] + 0.1 * torch.randn(len(delta), 3, generator=random, dtype=torch.float64)
        rest = (delta - torch.tensordot(a, law.directions, 1)).flatten(1).norm(dim=1)
        assert (torch.hypot((a / law.spread).norm(dim=1), rest / law.sigma) >= law.gauge(delta)).all()


@every_case
def test_density_is_that_of_the_normal_law(case):
    law, z = CASES[case], deltas(case)
    wanted = multivariate_normal(cov=dense(law), allow_singular=False).logpdf(z.flatten(1).numpy())
    np.testing.assert_allclose(law.log_density(z).numpy(), wanted, rtol=1e-7, atol=1e-7)


@every_case
def test_a_half_space_loses_what_transfer_says(case):
    """{z: w.z > t} with w = -C^-1 delta is the worst set: both sides in closed form."""
    law, delta, c = CASES[case], deltas(case)[:10], dense(CASES[case])
    for one, size in zip(delta.flatten(1).numpy(), law.gauge(delta).numpy(), strict=True):
        w = -np.linalg.solve(c, one)
        deviation = math.sqrt(w @ c @ w)
        for p in (0.1, 0.5, 0.9, 0.999):
            t = -ndtri(p) * deviation
            left = ndtr((w @ one - t) / deviation)
            np.testing.assert_allclose(law.transfer(p, size), left, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("law", [Gaussian(0.7), *OTHERS], ids=repr)
def test_gauge_is_a_bound_for_every_law(law):
    """Of other laws epsilon alone carries the shift."""
    own, delta = noise(1, law), deltas("one")
    size = own.gauge(delta)
    away = delta.flatten(1).norm(dim=1) / own.sigma
    assert (size <= away * (1 + 1e-12)).all()
    if not isinstance(law, Gaussian):
        assert torch.allclose(size, away)
    assert float(own.reach(2.0)) == 2 * own.sigma


@pytest.mark.parametrize("law", ONE_SIDED, ids=repr)
def test_one_sided_laws_split_off_no_negative_parameters(law):
    own = noise(1, law)
    steps = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    delta = torch.tensordot(steps, own.directions, 1)
    a, rest = own.split(delta)
    assert (a >= 0).all()
    assert (a[steps > 0.5] > 0).all()
    assert (rest[steps[:, 0] <= 0] == delta[steps[:, 0] <= 0]).all()
    assert torch.isfinite(law.gauge(a)).all()
    assert torch.allclose(torch.tensordot(a, own.directions, 1) + rest, delta, atol=1e-12)


# ---------------------------------------------------------------- what sampling misses


@every_case
def test_slack_is_at_least_that_of_its_parts(case):
    law = CASES[case]
    values = law.directions[0].numel()
    own = law.slack(values, LEVELS)
    assert own >= Gaussian(law.sigma).slack(values, LEVELS) + sampling_slack(law.dim, 2.0**28)
    assert own >= Gaussian(math.sqrt(dense(law).diagonal().max())).slack(values, LEVELS)
    assert own < 1e-4 or case == "little epsilon"


@given(
    values=st.integers(1, 4000),
    levels=st.integers(1, 2**17),
    size=st.floats(0.01, 10),
    s=st.floats(0.01, 10),
    sigma=st.floats(0.01, 3),
)
@settings(max_examples=50, deadline=None)
def test_slack_grows_with_whatever_makes_cells(values, levels, size, s, sigma):
    law = noise(2, Gaussian(s), sigma, size=size)
    own = law.slack(values, levels)
    assert own <= law.slack(values + 1, levels)
    assert own <= law.slack(values, levels + 1)
    assert own <= noise(2, Gaussian(s), sigma, size=1.1 * size).slack(values, levels)
    assert own <= noise(2, Gaussian(1.1 * s), sigma, size=size).slack(values, levels)


def test_slack_counts_what_a_cell_of_theta_moves_epsilon_by():
    """Two normal laws that are d apart differ by 2 Phi(d / 2 sigma) - 1, d a cell of theta's grid times |A1|."""
    for size, sigma in ((1.0, 0.3), (1e4, 1e-3)):
        law = noise(1, Gaussian(0.7), sigma, size=size)
        cell = 18 * 0.7 * 2.0**-28 * float(law.directions.norm())
        assert law.slack(6, 256) >= 2 * ndtr(cell / 2 / sigma) - 1 + sampling_slack(1, 2.0**28)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("directions", "law", "sigma", "words"),
    [
        (torch.ones(6), Gaussian(0.5), 0.1, "directions"),
        (torch.tensor([[1.0, math.nan]]), Gaussian(0.5), 0.1, "directions"),
        (torch.tensor([[1.0, math.inf]]), Gaussian(0.5), 0.1, "directions"),
        (torch.ones(1, 6), Gaussian(0.5), 0.0, "noise.sigma"),
        (torch.ones(1, 6), Gaussian(0.5), -1.0, "noise.sigma"),
        (torch.ones(1, 6), Gaussian(0.5), math.nan, "noise.sigma"),
        (torch.ones(1, 6), Gaussian(0.5), math.inf, "noise.sigma"),
        (torch.ones(2, 6), Uniform(0, 1), 0.1, "use a Gaussian law"),
        (torch.ones(2, 6), Exponential(1.0), 0.1, "use a Gaussian law"),
        (torch.ones(2, 6), Gaussian([1.0, 2.0, 3.0]), 0.1, "one for each"),
        (torch.ones(1, 6), Gaussian([1.0, 2.0]), 0.1, "one sigma"),
        (torch.ones(2, 6), Gaussian(covariance=[[1.0, 0.5], [0.5, 1.0]]), 0.1, "one sigma"),
    ],
)
def test_what_is_no_latent_noise_is_refused(directions, law, sigma, words):
    with pytest.raises(RequestError, match=words):
        Latent(directions, law, sigma)


def test_other_laws_have_no_density():
    with pytest.raises(RequestError, match="no closed form"):
        noise(1, Uniform(0, 1)).log_density(torch.zeros(1, *SHAPE))


def test_directions_are_no_longer_those_of_a_network_in_training():
    """The law keeps a copy, and nothing is trained through it."""
    directions = nn.Parameter(torch.ones(1, 6))
    law = Latent(directions, Gaussian(0.5), 0.1)
    assert not law.directions.requires_grad
    directions.data.mul_(2)
    assert (law.directions == 1).all()


# ---------------------------------------------------------------- Lipschitz constants


def matrix(layer, channels, h, w):
    """The linear part of a layer as a matrix."""
    basis = torch.eye(channels * h * w, dtype=torch.float64).view(-1, channels, h, w)
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis[:1]))).flatten(1).T


CONVOLUTIONS = [
    (nn.Conv2d(1, 3, 3, padding=1), 5, 5),
    (nn.Conv2d(2, 3, 4, stride=2, padding=1), 8, 6),
    (nn.Conv2d(2, 2, (3, 1), padding=(1, 0)), 4, 7),
    (nn.Conv2d(3, 1, 5, padding=0), 6, 7),
    (nn.Conv2d(2, 4, 2, stride=3, padding=4), 5, 4),
    (nn.Conv2d(4, 4, 1), 3, 3),
    (nn.Conv2d(2, 2, 7, padding=3), 3, 2),
]


@pytest.mark.parametrize("k", range(len(CONVOLUTIONS)))
@pytest.mark.parametrize("kind", ["random", "ones"])
def test_the_norm_of_a_convolution_is_a_bound_and_no_loose_one(k, kind):
    """Against the singular values of its matrix; all weights 1 are the worst for what lies at the border."""
    convolution, h, w = CONVOLUTIONS[k]
    layer = copy.deepcopy(convolution).double()
    if kind == "ones":
        nn.init.ones_(layer.weight)
    found = conv_norm(layer, h, w)
    exact = float(torch.linalg.matrix_norm(matrix(layer, layer.in_channels, h, w), 2))
    assert found >= exact
    if max(layer.kernel_size) < min(h, w) + 2:
        assert found <= 2.5 * exact


def test_the_norm_of_a_known_convolution():
    """An average of 3x3 pixels nearly keeps a constant image: at most 1, and near it for a large one."""
    mean = nn.Conv2d(1, 1, 3, padding=1)
    nn.init.constant_(mean.weight, 1 / 9)
    assert conv_norm(mean, 9, 9) == pytest.approx(1.0, rel=1e-4)
    nn.init.zeros_(mean.weight)
    mean.weight.data[0, 0, 0, 2] = -2.0  # a shift
    assert conv_norm(mean, 9, 9) == pytest.approx(2.0, rel=1e-4)
    assert conv_norm(mean, 9, 9) >= 2.0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, dilation=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_convolutions_of_unknown_norm_are_refused(layer):
    with pytest.raises(UncertifiableError, match="groups=1"):
        conv_norm(layer, 8, 8)


@pytest.mark.parametrize("layer", [nn.GroupNorm(1, 2), nn.GELU(), nn.Linear(3, 3), nn.BatchNorm2d(2), nn.ReLU()])
def test_layers_of_unknown_norm_are_refused(layer):
    with pytest.raises(UncertifiableError, match=type(layer).__name__):
        lipschitz_constant(nn.Sequential(nn.Conv2d(1, 2, 3), layer), 8, 8)


@pytest.mark.parametrize(("gain", "seed"), [(1.0, 0), (4.0, 1), (0.3, 2)])
def test_no_slope_of_an_encoder_is_steeper_than_its_constant(gain, seed):
    """Jacobians at many images, the steepest of which random steps do not find, and pairs of images."""
    encoder = copy.deepcopy(surrogate(Drift(), [-1.0], [1.0], seed=seed, channels=2, gain=gain).encoder).double()
    random = torch.Generator().manual_seed(seed)
    images = 3 * torch.randn(6, 2, 8, 8, generator=random, dtype=torch.float64)
    steep = 0.0
    for x in images:
        jacobian = torch.autograd.functional.jacobian(lambda v: encoder(v[None])[0].flatten(), x).flatten(1)
        steep = max(steep, float(torch.linalg.matrix_norm(jacobian, 2)))
    assert steep <= encoder.lipschitz
    assert steep >= 0.1 * encoder.lipschitz  # it is of use
    for far in (1e-4, 0.1, 10.0):
        others = images + far * torch.randn(images.shape, generator=random, dtype=torch.float64)
        apart = (encoder(others) - encoder(images)).flatten(1).norm(dim=1)
        assert (apart <= encoder.lipschitz * (others - images).flatten(1).norm(dim=1)).all()


def test_the_steepest_encoder_meets_its_constant():
    """One pixel and one weight of each layer: |w1| |w2| times the slope of SiLU at its steepest point, 2.3994."""
    encoder = surrogate(Drift(), [-1.0], [1.0], size=2, latent=1, hidden=1).encoder.double()
    first, _, last = encoder
    first.weight.zero_(), first.bias.fill_(2.3994), last.weight.zero_(), last.bias.zero_()
    first.weight[0, 0, 1, 1], last.weight[0, 0, 1, 1] = 3.0, -0.5
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    y = x.clone()
    y[0, 0, 0, 0] = 1e-5
    slope = float((encoder(y) - encoder(x)).norm()) / 1e-5
    assert slope <= encoder.lipschitz
    assert slope == pytest.approx(encoder.lipschitz, rel=1e-3)


def test_the_constant_follows_weights_in_training():
    """It is remembered of frozen weights alone."""
    encoder = surrogate(Drift(), [-1.0], [1.0]).encoder
    before = encoder.lipschitz
    assert encoder.lipschitz == before
    encoder.requires_grad_(True)
    encoder[0].weight.data.mul_(3)
    assert encoder.lipschitz == pytest.approx(3 * before, rel=1e-3)


def test_the_constant_follows_weights_that_are_loaded():
    """A frozen encoder whose weights are replaced has another constant."""
    encoder, other = surrogate(Drift(), [-1.0], [1.0]).encoder, surrogate(Drift(), [-1.0], [1.0], gain=2.0).encoder
    assert encoder.lipschitz < other.lipschitz
    encoder.load_state_dict(other.state_dict())
    assert encoder.lipschitz == other.lipschitz
