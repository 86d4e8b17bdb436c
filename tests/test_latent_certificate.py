"""The latent certificate: exact classifiers under attack, its transfer function by brute force, and its bounds."""

import copy
import itertools
import json
import math
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtr, ndtri
from torch import nn

from covers import Linear
from gsmooth_lightning.certify import ABSTAIN, AdditiveCertifier, CoverCertifier, JointCertifier, LatentCertifier
from gsmooth_lightning.certify.rebound import rebound
from gsmooth_lightning.error import (
    Bound,
    Conditions,
    CorollaryBound,
    ImageBound,
    RealDisplacement,
    StoredBound,
    SurrogateDisplacement,
    imitation,
    latent,
)
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, FoldedNormal, Gaussian, Laplace, Latent, Uniform
from gsmooth_lightning.stream import Stream, content_digest
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    Composition,
    Function,
    Pixelate,
    Rotation,
    Translation,
    ZoomBlur,
)
from gsmooth_lightning.transform.surrogate import Decoded
from plans import Given, Known, finish
from steps import Gain, SoftClip
from surrogates import (
    Drift,
    dense,
    half_space,
    latents,
    linear,
    mahalanobis,
    one_row,
    shifting,
    smoothed_by,
    surrogate,
)

P = np.array([0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])


class Displaced(Given):
    """A displacement that is known."""

    latent = True

    def check(self, smoothed, threat):
        return threat


def picture(size=8, channels=1, seed=0):
    """Noise in [.2, .8], on the 8-bit grid, (c, h, w)."""
    random = torch.Generator().manual_seed(seed)
    return (255 * (0.2 + 0.6 * torch.rand(channels, size, size, generator=random))).round() / 255


def bounded(error, smoothed, threat, x):
    """The bound of one image."""
    return finish(error.procedure(smoothed, error.check(smoothed, threat), x, Stream(0, 0)))


def certified(smoothed, threat, x, error, pa, pb=None):
    """The certificate of one image whose pA is known."""
    ((_, found),) = LatentCertifier(Known(pa, pb), error).certify(smoothed, threat, [(0, x)])
    return found


def left(smoothed, threat, bound, p, radius):
    """T at a radius, without a slack."""
    certifier = LatentCertifier(Known(0.9), Given(bound))
    return certifier.transfer(smoothed, threat, bound, 1, 0.0)(p, radius)


def against(smoothed, code, shift, pa):
    """The base classifier becomes the half-space that a shift of latents loses first; P(class 1) at the code is pA."""
    c = dense(smoothed.noise)
    w = -np.linalg.solve(c, shift)
    b = w @ code.double().flatten().numpy() - ndtri(pa) * math.sqrt(w @ c @ w)
    smoothed.base = Linear(torch.from_numpy(w), b).eval()
    return w, b


# ---------------------------------------------------------------- radii in closed form


@pytest.mark.parametrize("saved", ["float", "8bit"])
@pytest.mark.parametrize("pa", [0.6, 0.9, 0.9999])
def test_the_radius_is_that_of_the_worst_half_space(pa, saved):
    """F2 is linear, an attack adds theta v: the half-space against C^-1 F2(v) flips where theta times the norm of F2(v)
    is z(pA). No multiple of the step within the radius flips; the first one beyond does, but for what a file rounds."""
    x, v = picture(6), 0.4 * torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(5)).clamp(-0.45, 0.45)
    of, step = shifting(v), 0.004
    found = linear(of, [-0.4], [0.4], seed=1)
    smoothed = smoothed_by(found, Gaussian(0.1), 0.3)
    threat = TransformationThreat(of, -0.4, 0.4, step=step, saved=saved)
    code, moved = found.encoder(x[None]), (found.encoder(v[None]) - found.encoder(0 * v[None])).double().flatten()
    w, b = against(smoothed, code, moved.numpy(), pa)
    flip = float(ndtri(pa)) / mahalanobis(dense(smoothed.noise), moved[None].numpy())[0]
    certificate = certified(smoothed, threat, x, RealDisplacement(), pa)
    assert certificate.guarantee == "sound"
    if flip > 0.4:
        assert certificate.radius == 0.4
    else:
        assert certificate.radius < math.ceil(flip / step) * step + (0.02 if saved == "8bit" else 0)
        assert certificate.radius > flip - (1.01 * step if saved == "float" else 0.1)
    xi, _ = threat.parameters(2)
    files = threat.apply(x.expand(len(xi), *x.shape), xi)
    p = half_space(smoothed.noise, latents(smoothed, files), w, b)
    assert (p[np.abs(xi[:, 0].numpy()) <= certificate.radius] > 0.5).all()
    if flip < 0.39:
        assert (p < 0.5).any()


def test_any_half_space_is_held_as_far_as_certified():
    """Borders in the worst and in random directions, the votes known exactly: no file loses more than T says at its
    radius. The slices of any real parameter, of files as floats and bytes."""
    x, random = picture(6), torch.Generator().manual_seed(0)
    v = 0.3 * torch.randn(1, 6, 6, generator=random).clamp(-1, 1)
    found = linear(shifting(v), [-0.3], [0.3], seed=2)
    smoothed, xi = smoothed_by(found, Gaussian(0.2), 0.4), torch.linspace(-0.3, 0.3, 301)[:, None]
    for saved in ("float", "8bit"):
        threat = TransformationThreat(shifting(v), -0.3, 0.3, saved=saved)
        codes = latents(smoothed, threat.apply(x.expand(len(xi), *x.shape), xi))
        bound, far = bounded(RealDisplacement(), smoothed, threat, x), (codes[-1] - codes[0]).flatten()
        for pa, along in itertools.product(
            (0.55, 0.9), (far, -far, *torch.randn(3, 36, generator=random, dtype=torch.float64))
        ):
            w, b = against(smoothed, latents(smoothed, x[None]), along.numpy(), pa)
            p = half_space(smoothed.noise, codes, w, b)
            for gamma, own in zip(xi[:, 0].abs().tolist(), p, strict=True):
                assert own >= float(left(smoothed, threat, bound, pa, gamma)) - 1e-9


@pytest.mark.parametrize("gain", [1.0, 0.9, 1.3])
@pytest.mark.parametrize("pa", [0.7, 0.99])
def test_an_exactly_linear_surrogate_meets_its_closed_form(gain, pa):
    """F2(tau(xi, x)) = gain (F2(x) + A1 xi). M* = sqrt(1 / s^2 + (gain - 1)^2 |A1|^2 / sigma^2), tau(0, x) is
    (gain - 1) F2(x) away, and the surrogate's displacement is known at each xi."""
    x, s, sigma, of = picture(6), 0.3, 0.8, Drift()
    found = linear(of, [-1.0], [1.0], gain=gain)
    smoothed, threat = smoothed_by(found, Gaussian(s), sigma), TransformationThreat(of, -1.0, 1.0, saved="float")
    code, direction = found.encoder(x[None]).double(), found.directions.double()
    slope = math.hypot(1 / s, (gain - 1) * float(direction.norm()) / sigma)
    offset = mahalanobis(dense(smoothed.noise), (gain - 1) * code.flatten(1).numpy())[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        published = bounded(CorollaryBound(found, 9), smoothed, threat, x)
        proved = bounded(CorollaryBound(found, proved=True), smoothed, threat, x)
    assert published.slope == pytest.approx(slope, rel=1e-5)
    assert slope <= proved.slope <= 1.001 * slope
    assert published.curve[0][-1] == 0
    assert offset <= proved.curve[0][-1] <= offset * 1.001 + 1e-3  # what the noise's grid rounds
    z = float(ndtri(pa))
    radius = {e: certified(smoothed, threat, x, Displaced(b), pa).radius for e, b in (("p", published), ("q", proved))}
    assert radius["p"] == pytest.approx(min(z / slope, 1.0), rel=2e-4)
    assert radius["p"] < z / slope
    assert radius["q"] == pytest.approx(min(max(z - offset, 0) / slope, 1.0), rel=2e-3, abs=2e-4)

    xi = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    moved = (gain - 1) * code.flatten(1) + gain * xi[:, None] * direction.flatten(1)
    size = mahalanobis(dense(smoothed.noise), moved.numpy())
    lost = xi.abs()[torch.from_numpy(size >= z)]
    flip = float(lost.min()) if len(lost) else math.inf
    own = certified(smoothed, threat, x, SurrogateDisplacement(found, 0.02), pa)
    assert own.guarantee == "surrogate"
    assert own.radius < flip
    assert own.radius >= radius["q"] - 0.01
    assert own.radius > min(flip, 1.0) - 0.03 * math.hypot(1, flip if flip < 2 else 0) or own.prediction == ABSTAIN


# ---------------------------------------------------------------- T by brute force

SIGMA = 0.4
LAWS = {
    "uniform": (Uniform(-1.0, 1.0), stats.uniform(-1, 2), (0.1, -0.7)),
    "uniform from 0": (Uniform(0, 1.5), stats.uniform(0, 1.5), (0.2, -0.2)),
    "exponential": (Exponential(2.0), stats.expon(scale=0.5), (0.1, 0.6)),
    "folded normal": (FoldedNormal(0.5), stats.halfnorm(scale=0.5), (0.1, 0.6)),
    "laplace": (Laplace(0.4), stats.laplace(scale=0.4), (0.2, -0.5)),
    "gaussian": (Gaussian(0.5), stats.norm(scale=0.5), (0.2, -0.6)),
}
LATENT_THREAT = TransformationThreat(Drift(), -1.0, 1.0, saved="float")


def parameter_and_noise(law):
    """A classifier of theta and epsilon themselves, as far as its noise goes."""
    noise = Latent(torch.tensor([[1.0, 0.0]]), law, SIGMA)
    return SmoothedClassifier(Linear(torch.ones(2), 0.0), 2, preprocess=Gain(1.0), noise=noise, block=2)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("error", [0.0, 0.15, 1.2])
def test_no_classifier_of_theta_and_epsilon_loses_more_than_t(name, error):
    """Exact masses of all cells of a grid of (theta, epsilon), before and after a shift by (a, E sigma): half-spaces of
    every angle, sets of least likelihood ratio, random sets. What is left of each is at least T(p; a, E)."""
    law, distribution, shifts = LAWS[name]
    smoothed, random = parameter_and_noise(law), np.random.default_rng(0)
    for a in shifts:
        low, high = (max(end, -6.0) if end < 0 else min(end, 6.0) for end in law.span)
        edges = np.unique([*np.linspace(low + min(a, 0), high + max(a, 0), 181), low, high, low + a, high + a, 0, a])
        noise = np.linspace(-8 * SIGMA, (8 + error) * SIGMA, 161)
        clean = np.outer(np.diff(distribution.cdf(edges)), np.diff(stats.norm.cdf(noise / SIGMA)))
        moved = np.outer(np.diff(distribution.cdf(edges - a)), np.diff(stats.norm.cdf(noise / SIGMA - error)))
        assert min(clean.sum(), moved.sum()) > 1 - 1e-4  # what is missing counts for neither
        theta, epsilon = (edges[1:] + edges[:-1]) / 2, (noise[1:] + noise[:-1]) / 2
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        scores = [np.cos(t) * theta[:, None] + np.sin(t) * epsilon for t in angles]
        with np.errstate(divide="ignore", invalid="ignore"):
            scores.append(np.where(clean > 0, moved / clean, np.inf))
        scores += [random.random(clean.shape), random.random((len(theta), 1)) + 0 * clean]
        tightest = np.inf
        for score in scores:
            order = np.argsort(score, axis=None, kind="stable")
            p, q = clean.ravel()[order].cumsum()[::50], moved.ravel()[order].cumsum()[::50]
            bound = left(smoothed, LATENT_THREAT, one_row(0.0, a, error), p.clip(0, 1), 0.0)
            assert (q >= bound - 1e-4).all()  # the mass beyond the grid
            tightest = min(tightest, float(np.abs(q - bound)[(p > 0.6) & (p < 0.99)].min()))
        assert tightest < 0.06  # and it is of use


@pytest.mark.parametrize("name", LAWS)
def test_without_a_rest_t_is_the_laws_and_without_parameters_the_noises(name):
    law, _, shifts = LAWS[name]
    smoothed = parameter_and_noise(law)
    for a in shifts:
        size = law.gauge(torch.tensor([[a]], dtype=torch.float64)).numpy()
        found = left(smoothed, LATENT_THREAT, one_row(0.0, a, 0.0), P, 0.0)
        np.testing.assert_allclose(found, law.transfer(P, size), atol=1e-12)
    found = left(smoothed, LATENT_THREAT, one_row(0.0, 0.0, 0.7), P, 0.0)
    np.testing.assert_allclose(found, ndtr(ndtri(P) - 0.7), atol=1e-12)


def test_of_gaussian_parameters_shift_and_rest_add_as_squares():
    smoothed = parameter_and_noise(Gaussian(0.5))
    found = left(smoothed, LATENT_THREAT, one_row(0.0, 0.3, 0.8), P, 0.0)
    np.testing.assert_allclose(found, ndtr(ndtri(P) - 1.0), atol=1e-12)


@pytest.mark.parametrize("law", [Uniform(-1, 1), Exponential(3.0), FoldedNormal(0.4), Gaussian(0.4)], ids=repr)
def test_the_radius_stays_below_the_flip_of_a_classifier_of_the_sum(law):
    """What the network sees is one number, A1 theta + epsilon, here; a half-line of it is computed by quadrature over
    theta. Random displacements that no split explains exactly; the flip of every threshold is beyond the radius."""
    noise = Latent(torch.tensor([[1.3]]), law, 0.25)
    smoothed = SmoothedClassifier(Linear(torch.ones(1), 0.0), 2, preprocess=Gain(1.0), noise=noise, block=2)
    quantiles = (np.arange(4000) + 0.5) / 4000
    own = {
        Uniform: stats.uniform(-1, 2),
        Exponential: stats.expon(scale=1 / 3),
        FoldedNormal: stats.halfnorm(scale=0.4),
    }
    theta = own.get(type(law), stats.norm(scale=0.4)).ppf(quantiles)
    xi = np.linspace(0, 1, 201)
    shift = 1.3 * 0.8 * xi + 0.1 * np.sin(5 * xi)  # of the latent, at each parameter
    a, rest = noise.split(torch.from_numpy(shift)[:, None])
    rows = [(r, float(s), abs(float(e)) / noise.sigma) for r, s, e in zip(xi, a[:, 0], rest[:, 0], strict=True)]
    bound = Bound(1.0, 0.0, 0.0, "sound", curve=latent.frontier(noise, rows))
    threat = TransformationThreat(Drift(), 0.0, 1.0, saved="float")
    shares = []
    for t, sign in itertools.product(np.linspace(-1, 3, 15), (1, -1)):
        p = ndtr(sign * (t - shift[:, None] - 1.3 * theta) / noise.sigma).mean(1)
        found = left(smoothed, threat, bound, p[0], 1.0)
        assert (p >= found - 3e-3).all()
        for k in range(0, 201, 10):
            assert p[: k + 1].min() >= left(smoothed, threat, bound, p[0], xi[k]) - 3e-3
        if p[0] > 0.55 and (p < 0.5).any():
            certificate = LatentCertifier(Known(p[0]), None)
            transfer = certificate.transfer(smoothed, threat, bound, 1, 0.0)
            held = max((r for r in xi if transfer(p[0], r) > 0.5), default=0.0)
            flip = xi[p < 0.5][0]
            assert held < flip + 0.006
            shares.append(held / flip)
    assert max(shares) > 0.5


# ---------------------------------------------------------------- Theorem L and Corollary 1


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_l_is_never_behind_corollary_1(seed, gain):
    """The same surrogate, proved: the straight distance is at most the way along the curve."""
    x, of = picture(), Drift()
    found = surrogate(of, [-1.0], [1.0], seed=seed, gain=gain)
    smoothed = smoothed_by(found, Gaussian(1.5), 3.0 * gain**3)
    threat = TransformationThreat(of, -1.0, 1.0, saved="float")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corollary = bounded(CorollaryBound(found, proved=True), smoothed, threat, x)
    theorem = bounded(SurrogateDisplacement(found, 0.005), smoothed, threat, x)
    certain = 0
    for pa, pb in ((0.7, None), (0.9, None), (0.9, 0.02), (0.999, None), (0.45, 0.05)):
        ours, theirs = (certified(smoothed, threat, x, Displaced(own), pa, pb) for own in (theorem, corollary))
        assert ours.radius >= theirs.radius - 0.01
        certain += theirs.radius > 0.05
    assert certain >= 2


# ---------------------------------------------------------------- M*


def jacobian(found, x, xi):
    """dF2(tau(xi, x)) / dxi by reverse differentiation, (d, dim)."""

    def code(parameters):
        return found.encoder(found(x[None], parameters[None])).flatten()

    return torch.autograd.functional.jacobian(code, xi).double()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_slopes_are_the_singular_values_of_the_jacobian(dim):
    """sqrt(lambda_max) of the Jacobian's residual beside 1 / s, as one matrix's largest singular value."""
    of, s = Drift(dim), [0.3, 0.9, 2.0][:dim]
    found = surrogate(of, [-1.0] * dim, [2.0] * dim, seed=dim)
    smoothed, x = smoothed_by(found, Gaussian(s), 0.4), picture()
    xi = -1 + 3 * torch.rand(5, dim, generator=torch.Generator().manual_seed(0))
    own = CorollaryBound(found).slopes(smoothed.noise, x, xi)
    assert own.dtype == torch.float64
    a1 = found.directions.double().flatten(1).T
    for slope, point in zip(own.tolist(), xi, strict=True):
        stacked = torch.cat([(jacobian(found, x, point) - a1) / 0.4, torch.diag(1 / torch.tensor(s).double())])
        assert slope == pytest.approx(float(torch.linalg.svdvals(stacked)[0]), rel=1e-5)
    with torch.inference_mode():
        assert torch.equal(CorollaryBound(found).slopes(smoothed.noise, x, xi), own)


@pytest.mark.parametrize("seed", range(4))
def test_the_proved_m_star_is_above_every_slope(seed):
    """And above the published one; dense points, and those at which a search found most. It is no loose bound."""
    x, of = picture(seed=seed), Drift()
    found = surrogate(of, [-1.0], [2.0], seed=seed, gain=1.5)
    smoothed = smoothed_by(found, Gaussian(0.5), 0.7)
    threat = TransformationThreat(of, -1.0, 2.0, saved="float")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proved = bounded(CorollaryBound(found, proved=True), smoothed, threat, x)
        published = bounded(CorollaryBound(found, 17), smoothed, threat, x)
    dense_points = torch.linspace(-1, 2, 501)[:, None]
    slopes = CorollaryBound(found).slopes(smoothed.noise, x, dense_points)
    assert proved.slope >= float(slopes.max())
    assert proved.slope <= 1.3 * float(slopes.max())
    assert published.slope <= proved.slope
    assert published.slope >= 0.8 * float(slopes.max())
    assert (proved.guarantee, published.guarantee) == ("surrogate", "heuristic")
    assert "published" in published.details["rests_on"]

    y = found(x.expand(501, *x.shape), dense_points)
    moved = (found.encoder(y) - found.encoder(x[None])).double()
    size = smoothed.noise.gauge(moved)
    assert (size <= proved.curve[0][-1] + proved.slope * dense_points[:, 0].abs()).all()


def test_of_several_parameters_m_star_holds_in_every_direction():
    """A radius bounds each parameter, so |xi| is up to sqrt(dim) times as large: at the corners it is needed."""
    of, x = Drift(2), picture(6)
    found = linear(of, [-1.0] * 2, [1.0] * 2, seed=4)
    smoothed, threat = smoothed_by(found, Gaussian(0.5), 0.01), TransformationThreat(of, -1.0, 1.0, saved="float")
    published = bounded(CorollaryBound(found, 9), smoothed, threat, x)
    xi = torch.cat([torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 2), 2 * torch.rand(50, 2) - 1])
    moved = (found.encoder(found(x.expand(len(xi), *x.shape), xi)) - found.encoder(x[None])).double()
    size = smoothed.noise.gauge(moved)
    assert (size <= published.slope * xi.abs().amax(1)).all()
    assert float(size.max()) > 0.99 * published.slope


# ---------------------------------------------------------------- curves against what attacks do


def every_row(monkeypatch):
    """Rows that others outdo are kept as well."""
    monkeypatch.setattr(latent, "frontier", lambda noise, rows: tuple(sorted(rows)))


def explained(noise, curve, radii, moved):
    """Whether each displacement (n, *latent) is A1 a and at most E sigma more, by a row at its radius or before."""
    rows = np.array(curve)
    a, error = torch.from_numpy(rows[:, 1:-1]), rows[:, -1]
    shifts = torch.tensordot(a, noise.directions, 1).flatten(1)
    away = torch.cdist(moved.flatten(1), shifts).numpy() / noise.sigma
    return ((away <= error) & (rows[:, 0] <= radii[:, None])).any(1)


def outdone(smoothed, threat, bound, radii, moved):
    """Whether T at each radius is at most what is left after each displacement, split at will (Gaussian: exactly)."""
    noise = smoothed.noise
    a, rest = noise.split(moved)
    own = ndtri(noise.law.transfer(P[:, None], noise.law.gauge(a).numpy())) - (
        rest.flatten(1).norm(dim=1).numpy() / noise.sigma
    )
    own = ndtr(own)
    if isinstance(noise.law, Gaussian):
        own = ndtr(ndtri(P)[:, None] - noise.gauge(moved).numpy())
    found = np.stack([left(smoothed, threat, bound, P, float(r)) for r in radii], 1)
    return found, own


def fade(image, theta):
    return image * (1 - theta[0]) + theta[0] * image.flip(-1) * image


def fade_moves(x, low, high):
    return (high - low)[:, 0] / 2 * (x - x.flip(-1) * x).double().norm() * (1 + 1e-5)


REAL = {
    "zoom blur": (ZoomBlur(5), [0.0], [0.4], None),
    "rotation": (Rotation(), [-8.0], [12.0], None),
    "translation": (Translation(), [-0.2, 0.0], [0.2, 0.1], None),
    "pixelation": (Pixelate(), [0.0], [0.7], None),
    "rotation by steps": (Rotation(), [-40.0], [30.0], 2.5),
    "translation by steps": (Translation(), [-0.6, -0.5], [0.5, 0.5], 0.25),
    "function": (Function(fade, ["share"], "fading", fade_moves), [0.0], [0.5], None),
    "function by steps": (Function(fade, ["share"], "fading"), [0.0], [0.5], 0.05),
}


def attacked(threat, n=201):
    """Parameters of a threat, dense, the ends among them, (k, dim)."""
    if threat.step is not None:
        return threat.parameters(2)[0]
    dim = len(threat.lows)
    sides = [torch.linspace(a, b, n if dim == 1 else 9) for a, b in zip(threat.lows, threat.highs, strict=True)]
    return torch.cartesian_prod(*sides).view(-1, dim)


@pytest.mark.parametrize("saved", ["float", "8bit"])
@pytest.mark.parametrize("case", REAL)
def test_no_file_goes_beyond_the_curve_of_the_real_transformation(case, saved, monkeypatch):
    """Files as the attacker saves them, encoded and on the grid as the network sees them: each is A1 a and at most E
    sigma away by a row of its radius; T at that radius is at most what is left after this displacement."""
    of, lows, highs, step = REAL[case]
    found = surrogate(of, lows, highs, seed=2, latent=2, hidden=4)
    for l2 in (0.0, 0.1):
        threat = TransformationThreat(of, lows, highs, step=step, saved=saved, l2=l2)
        smoothed = smoothed_by(found, Gaussian([0.3 * b for b in highs]), 0.4)
        x = picture()
        kept = bounded(RealDisplacement(0.5), smoothed, threat, x)
        assert kept.guarantee == "sound"
        with monkeypatch.context() as patch:
            every_row(patch)
            whole = bounded(RealDisplacement(0.5), smoothed, threat, x)
        xi = attacked(threat)
        files = threat.apply(x.expand(len(xi), *x.shape), xi)
        if l2:
            push = torch.randn(files.shape, generator=torch.Generator().manual_seed(1))
            files = files + l2 * (1 - 1e-6) * push / push.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = latents(smoothed, files) - latents(smoothed, x[None])
        radii = threat.distance(xi.double()).numpy()
        assert explained(smoothed.noise, whole.curve, radii, moved).all()
        some = slice(None, None, max(1, len(xi) // 40))
        bound, own = outdone(smoothed, threat, kept, radii[some], moved[some])
        assert (bound <= own + 1e-12).all()
        assert kept.value == max(row[-1] for row in whole.curve)


def test_what_departs_from_the_line_between_two_ends_is_counted(monkeypatch):
    """An image that looks alike after each quarter of a turn, and pieces of a quarter: all their ends are it."""
    every_row(monkeypatch)
    quarter = picture(6)
    x = torch.stack([quarter.rot90(k, (1, 2)) for k in range(4)]).mean(0)
    found = linear(Rotation(), [-720.0], [720.0], small=0.01)
    smoothed = smoothed_by(found, Gaussian(1e-6), 0.4)
    threat = TransformationThreat(Rotation(), -720.0, 720.0, saved="float")
    bound = bounded(RealDisplacement(1e6), smoothed, threat, x)
    assert len(bound.curve) == latent.PIECES
    xi = attacked(threat, 1441)
    moved = latents(smoothed, threat.apply(x.expand(len(xi), *x.shape), xi)) - latents(smoothed, x[None])
    assert float(moved[::90].abs().max()) < 1e-3  # the ends
    assert float(moved.flatten(1).norm(dim=1).max()) > 0.3
    assert explained(smoothed.noise, bound.curve, threat.distance(xi.double()).numpy(), moved).all()


@pytest.mark.parametrize(("saved", "l2"), [("8bit", 0.0), ("float", 0.1), ("8bit", 0.1)])
def test_what_a_file_rounds_and_what_it_is_changed_by_is_counted(saved, l2, monkeypatch):
    """A faint image moves by less than its file rounds, and nearly along A1."""
    every_row(monkeypatch)
    random = torch.Generator().manual_seed(0)
    x = (255 * (0.5 + 0.01 * torch.randn(1, 6, 6, generator=random))).round() / 255
    found, turned = linear(Rotation(), [0.0], [8.0], small=0.01), Rotation()(x[None], torch.tensor([[8.0]]))
    noise = Latent((found.encoder(turned) - found.encoder(x[None])) / 8, Gaussian(300.0), 0.05)
    smoothed = SmoothedClassifier(nn.Flatten(), 2, preprocess=found.encoder, noise=noise).eval()
    threat = TransformationThreat(Rotation(), 0.0, 8.0, saved=saved, l2=l2)
    bound = bounded(RealDisplacement(1e6), smoothed, threat, x)
    xi = attacked(threat)
    files = threat.apply(x.expand(len(xi), *x.shape), xi)
    push = torch.randn(files.shape, generator=random)
    files = files + l2 * (1 - 1e-6) * push / push.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = latents(smoothed, files) - latents(smoothed, x[None])
    assert explained(smoothed.noise, bound.curve, xi[:, 0].numpy(), moved).all()
    assert bound.value < 6 * float(noise.split(moved)[1].flatten(1).norm(dim=1).max()) / noise.sigma


@pytest.mark.parametrize("law", [Uniform(-0.2, 0.2), Exponential(8.0), FoldedNormal(0.15), Laplace(0.1)], ids=repr)
def test_no_file_goes_beyond_the_curve_under_other_laws(law, monkeypatch):
    """And half-spaces of the latents, computed by quadrature over theta, lose at most what T says."""
    of, x = ZoomBlur(5), picture()
    found = surrogate(of, [0.0], [0.4], seed=3)
    smoothed, threat = smoothed_by(found, law, 0.3), TransformationThreat(of, 0.0, 0.4, saved="float")
    kept = bounded(RealDisplacement(0.1), smoothed, threat, x)
    with monkeypatch.context() as patch:
        every_row(patch)
        whole = bounded(RealDisplacement(0.1), smoothed, threat, x)
    xi = attacked(threat, 101)
    moved = latents(smoothed, threat.apply(x.expand(101, *x.shape), xi)) - latents(smoothed, x[None])
    radii = xi[:, 0].double().numpy()
    assert explained(smoothed.noise, whole.curve, radii, moved).all()
    theta = law.sample(Stream(0, 0).at("estimate", 0), 4001, (1,))[:, 0].numpy()  # as any law of theta would do
    if isinstance(law, Uniform):
        theta = np.linspace(-0.2, 0.2, 4001)
    random, rows = np.random.default_rng(0), moved.flatten(1).numpy()
    direction = smoothed.noise.directions.flatten(1).numpy()[0]
    for w in (*random.standard_normal((4, len(direction))), -rows[-1], -rows[50], -direction, direction):
        deviation = smoothed.noise.sigma * np.linalg.norm(w)
        for t in np.quantile(w @ direction * theta, (0.2, 0.8)) + np.array([-2, 0]) * deviation:
            p = ndtr(((w @ direction * theta - t) + (rows @ w)[:, None]) / deviation).mean(1)
            for k in (0, 10, 40, 100):
                assert p[k] >= float(left(smoothed, threat, kept, p[0], radii[k])) - 0.02


@pytest.mark.parametrize("law", [Gaussian(0.8), Uniform(-1, 1), Laplace(0.5)], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_no_imitation_goes_beyond_the_curve_of_the_surrogate(seed, law, monkeypatch):
    """Densely, for every radius."""
    of, x = Drift(), picture(seed=seed)
    found = surrogate(of, [-1.0], [1.5], seed=seed, gain=1.5)
    smoothed, threat = smoothed_by(found, law, 9.0), TransformationThreat(of, -1.0, 1.5, saved="float")
    kept = bounded(SurrogateDisplacement(found), smoothed, threat, x)
    assert kept.guarantee == "surrogate"
    with monkeypatch.context() as patch:
        every_row(patch)
        whole = bounded(SurrogateDisplacement(found), smoothed, threat, x)
    xi = torch.linspace(-1, 1.5, 501)[:, None]
    moved = latents(smoothed, found(x.expand(501, *x.shape), xi)) - latents(smoothed, x[None])
    radii = xi[:, 0].abs().double().numpy()
    assert explained(smoothed.noise, whole.curve, radii, moved).all()
    assert len(whole.curve) >= 16
    bound, own = outdone(smoothed, threat, kept, radii[::10], moved[::10])
    if isinstance(law, Gaussian):
        assert (bound <= own + 1e-12).all()
        assert (bound[:, -1] >= ndtr(ndtri(P) - float(smoothed.noise.gauge(moved).max()) - 0.35)).all()  # of use


def test_a_function_without_a_bound_is_tried_on_a_grid():
    of, x = Function(fade, ["share"], "fading"), picture()
    found = surrogate(of, [0.0], [0.5])
    smoothed, threat = smoothed_by(found, Gaussian(0.2), 0.4), TransformationThreat(of, 0.0, 0.5, saved="float")
    bound = bounded(RealDisplacement(), smoothed, threat, x)
    assert bound.guarantee == "heuristic"
    assert "without a bound" in bound.details["rests_on"]
    assert bounded(RealDisplacement(), smoothed, replace_threat(threat, step=0.1), x).guarantee == "sound"


def replace_threat(threat, **changes):
    other = copy.copy(threat)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def test_a_range_of_too_many_slices_certifies_nothing(monkeypatch):
    """What is not bounded is not certified, by the votes or by the store."""
    monkeypatch.setattr("gsmooth_lightning.error.slices.MOST_SLICES", 3)
    of, x = REAL["function"][0], picture()
    found = surrogate(of, [0.0], [0.5])
    smoothed = smoothed_by(found, Gaussian(0.2), 0.01)
    threat = TransformationThreat(of, 0.0, 0.5, saved="float")
    bound = bounded(RealDisplacement(), smoothed, threat, x)
    assert bound.value == math.inf
    ((_, certificate),) = LatentCertifier(FixedN(16, 64), RealDisplacement()).certify(smoothed, threat, [(0, x)])
    assert (certificate.prediction, certificate.radius) == (ABSTAIN, 0.0)
    record = {"index": 0, **asdict(certificate)}
    again = rebound(record, LatentCertifier(FixedN(16, 64), RealDisplacement()), smoothed, threat)
    assert (again["prediction"], again["radius"]) == (ABSTAIN, 0.0)


def test_a_bound_without_a_curve_is_one_distance():
    smoothed = parameter_and_noise(Gaussian(0.5))
    for value in (0.0, 0.4, math.inf):
        found = left(smoothed, LATENT_THREAT, Bound(value, 0.0, 0.0, "sound"), P, 0.5)
        np.testing.assert_allclose(found, ndtr(ndtri(P) - value))


# ---------------------------------------------------------------- frontier

ROW = st.tuples(st.floats(0, 2), st.floats(0, 1), st.one_of(st.floats(0, 3), st.sampled_from([0.0, 1.0, math.inf])))


@given(rows=st.lists(ROW, min_size=1, max_size=25), law=st.sampled_from(sorted(LAWS)))
@settings(max_examples=60, deadline=None)
def test_the_frontier_keeps_what_decides_at_every_radius(rows, law):
    """T of what is kept equals the least over all rows, at every radius where one begins, and in between."""
    smoothed = parameter_and_noise(LAWS[law][0])
    noise = smoothed.noise
    kept = latent.frontier(noise, rows)
    assert set(kept) <= set(rows)
    bound = Bound(1.0, 0.0, 0.0, "sound", curve=kept)
    single = [left(smoothed, LATENT_THREAT, one_row(*row), P, 9.0) for row in rows]
    for radius in {r for r, *_ in rows} | {(a[0] + b[0]) / 2 for a, b in itertools.pairwise(rows)}:
        met = [own for own, row in zip(single, rows, strict=True) if row[0] <= radius]
        if met:
            found = left(smoothed, LATENT_THREAT, bound, P, radius)
            np.testing.assert_array_equal(found, np.min(met, axis=0))


def test_the_frontier_of_an_ordinary_curve_is_short_and_quick():
    noise = parameter_and_noise(Gaussian(0.5)).noise
    rising = [(r, r, 0.0) for r in np.linspace(0, 1, 3000)]
    assert len(latent.frontier(noise, rising)) == 3000
    assert latent.frontier(noise, [(0.0, 1.0, 1.0), *((r, 0.5 * r, 0.0) for r, *_ in rising[1:])]) == ((0.0, 1.0, 1.0),)


# ---------------------------------------------------------------- refusals

ZOOM = ZoomBlur(5)
IMITATION = surrogate(ZOOM, [0.0], [0.4])
THREAT = TransformationThreat(ZOOM, 0.0, 0.4, saved="float")
IMITATIONS = [SurrogateDisplacement, CorollaryBound, lambda s: CorollaryBound(s, proved=True)]
every_imitation = pytest.mark.parametrize("make", IMITATIONS, ids=["surrogate", "corollary", "proved"])


def refused(error, smoothed, threat, words):
    with pytest.raises(UncertifiableError, match=words):
        LatentCertifier(Known(0.9), error).check(smoothed, threat)


@every_imitation
def test_imitations_ask_for_their_own_surrogate_and_range(make):
    own = smoothed_by(IMITATION, Gaussian(0.2), 0.4)
    LatentCertifier(Known(0.9), make(IMITATION)).check(own, THREAT)
    refused(make(surrogate(ZOOM, [0.0], [0.4], seed=1)), own, THREAT, "another surrogate")
    wider = TransformationThreat(ZOOM, 0.0, 0.41, saved="float")
    refused(make(IMITATION), own, wider, "goes beyond")
    refused(make(IMITATION), own, TransformationThreat(Rotation(), 0.0, 0.4, saved="float"), "imitates zoom blur")
    other = copy.deepcopy(IMITATION)
    other.shift.weight.mul_(1 + 1e-6)  # the same encoder, other directions
    refused(make(other), own, THREAT, "another surrogate")
    bent = copy.deepcopy(IMITATION)
    bent.shift = nn.Sequential(bent.shift, nn.Tanh())
    refused(make(bent), own, THREAT, "not linear")


@every_imitation
def test_imitations_do_not_cover_a_change_of_the_file(make):
    """The l2 ball comes after tau: it is refused, or the bound grows by it."""
    own = smoothed_by(IMITATION, Gaussian(0.2), 0.4)
    threat = TransformationThreat(ZOOM, 0.0, 0.4, saved="float", l2=0.5)
    x = picture()
    error = make(IMITATION)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            changed, plain = bounded(error, own, threat, x), bounded(error, own, THREAT, x)
        except UncertifiableError:
            return
    assert max(r[-1] for r in changed.curve) >= max(r[-1] for r in plain.curve) + 0.5 * 0.3


@pytest.mark.parametrize("make", [lambda s: RealDisplacement(), *IMITATIONS])
def test_what_has_no_latent_space_is_refused(make):
    error, own = make(IMITATION), smoothed_by(IMITATION, Gaussian(0.2), 0.4)
    refused(error, own, PixelThreat(), "certify=direct")
    pixels = SmoothedClassifier(nn.Flatten(), 2, preprocess=IMITATION.encoder, noise=Gaussian(0.2))
    refused(error, pixels, THREAT, "noise=latent")
    parts = {"preprocess": IMITATION.encoder, "noise": own.noise}
    drawn = SmoothedClassifier(nn.Flatten(), 2, transform=Rotation(), law=Gaussian(3.0), **parts)
    refused(error, drawn, THREAT, "law=none")
    silent = SmoothedClassifier(nn.Flatten(), 2, preprocess=nn.Tanh(), noise=own.noise)
    refused(error, silent, THREAT, "preprocess=latent")


def test_what_is_proved_of_one_parameter_is_refused_for_two():
    of = Drift(2)
    found = surrogate(of, [-1.0] * 2, [1.0] * 2)
    own, threat = smoothed_by(found, Gaussian(0.5), 0.5), TransformationThreat(of, -1.0, 1.0, saved="float")
    refused(SurrogateDisplacement(found), own, threat, "proved along one")
    refused(CorollaryBound(found, proved=True), own, threat, "proved along one")
    LatentCertifier(Known(0.9), CorollaryBound(found)).check(own, threat)


def test_corollary_1_asks_for_gaussian_parameters_of_one_unit():
    refused(CorollaryBound(IMITATION), smoothed_by(IMITATION, Uniform(0, 1), 0.4), THREAT, "Gaussian parameters")
    of = Drift(units=("steps", "degrees"))
    found = surrogate(of, [-1.0] * 2, [1.0] * 2)
    threat = TransformationThreat(of, -1.0, 1.0, saved="float")
    refused(CorollaryBound(found), smoothed_by(found, Gaussian(0.5), 0.4), threat, "one unit")


def test_an_m_star_that_does_not_settle_is_refused(monkeypatch):
    own, grid = smoothed_by(IMITATION, Gaussian(0.2), 0.4), []

    def growing(self, noise, x, xi):
        grid.append(len(xi))
        return torch.full((len(xi),), 1.1 ** len(grid))

    monkeypatch.setattr(CorollaryBound, "slopes", growing)
    monkeypatch.setattr(imitation, "AT_ONCE", 10**6)
    with pytest.raises(UncertifiableError, match="grows with every refinement"):
        bounded(CorollaryBound(IMITATION, 5), own, THREAT, picture())
    assert grid == [5, 9, 17, 33, 65, 129]


def test_an_m_star_between_points_of_a_grid_is_found_by_refining_it(monkeypatch):
    """A narrow peak: the first grid of five points misses it, and the second sees it."""
    own = smoothed_by(IMITATION, Gaussian(0.2), 0.4)
    monkeypatch.setattr(
        CorollaryBound, "slopes", lambda self, noise, x, xi: 1 + 4 * (-(((xi[:, 0] - 0.15) / 0.02) ** 2)).exp()
    )
    bound = bounded(CorollaryBound(IMITATION, 5), own, THREAT, picture())
    assert bound.slope == pytest.approx(5.0, rel=0.05)


def test_a_start_that_is_far_from_the_image_is_warned_about():
    with pytest.warns(UserWarning, match="far from x"):
        found = bounded(CorollaryBound(IMITATION, 5), smoothed_by(IMITATION, Gaussian(0.2), 0.01), THREAT, picture())
    assert found.details["start"] > 0.5
    of = Drift()
    near = linear(of, [-1.0], [1.0])
    threat = TransformationThreat(of, -1.0, 1.0, saved="float")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bounded(CorollaryBound(near, 5), smoothed_by(near, Gaussian(0.2), 0.1), threat, picture(6))
    assert found.details["start"] < 1e-6


def test_what_comes_after_the_transformation_is_refused():
    of = Composition([ZOOM, Brightness()])
    threat = TransformationThreat(of, [0.0, -0.1], [0.4, 0.1], saved="real")
    refused(RealDisplacement(), smoothed_by(IMITATION, Gaussian(0.2), 0.4), threat, "brightness after zoom blur")
    below = TransformationThreat(ZOOM, -0.1, 0.4, saved="float")
    refused(RealDisplacement(), smoothed_by(IMITATION, Gaussian(0.2), 0.4), below, "no parameters below 0")


@pytest.mark.parametrize("tolerance", [0, -0.1, math.nan, math.inf, "wide", True])
def test_tolerances_are_positive_numbers(tolerance):
    for make in (RealDisplacement, lambda t: SurrogateDisplacement(IMITATION, t)):
        with pytest.raises(RequestError, match="tolerance"):
            make(tolerance)


def test_a_grid_has_two_points():
    for points in (1, 0, 2.5, "all"):
        with pytest.raises(RequestError, match="points"):
            CorollaryBound(IMITATION, points)


def test_latent_bounds_and_other_theorems_do_not_go_together():
    own = smoothed_by(IMITATION, Gaussian(0.2), 0.4)
    with pytest.raises(UncertifiableError, match="go together"):
        JointCertifier(Known(0.9), RealDisplacement()).check(own, THREAT)
    with pytest.raises(UncertifiableError, match="go together"):
        LatentCertifier(Known(0.9), ImageBound()).check(own, THREAT)
    with pytest.raises(UncertifiableError, match="error=latent"):
        LatentCertifier(Known(0.9), None).check(own, THREAT)
    with pytest.raises(UncertifiableError, match="noise=gaussian"):
        CoverCertifier().check(own, THREAT)
    with pytest.raises(UncertifiableError, match="stretch"):
        AdditiveCertifier(Known(0.9)).check(own, PixelThreat())


def test_latents_that_the_noise_grid_cannot_hold_are_not_certified():
    """Beyond what sums with the noise can hold, latents are clamped: their displacement is no longer A1 a, and a
    half-space sees it. Here theta adds to two values of the latent alike, one of which is at its end already."""
    v, x = torch.full((1, 1, 2), 1.0), torch.tensor([[[0.05, 0.45]]])
    of, gain = shifting(v), Gain(120.0)
    noise = Latent(2 * torch.tensor([[[[60.0, 60.0]]]]), Gaussian(0.16), 0.05)
    smoothed = SmoothedClassifier(nn.Flatten(), 2, preprocess=gain, noise=noise, block=16).eval()
    threat = TransformationThreat(of, 0.0, 0.5, step=0.05, saved="float")
    xi, _ = threat.parameters(2)
    moved = latents(smoothed, threat.apply(x.expand(len(xi), *x.shape), xi)) - latents(smoothed, x[None])
    assert (moved[-1].diff().abs() > 1).all()  # clamped
    try:
        bound = bounded(RealDisplacement(), smoothed, threat, x)
    except UncertifiableError:
        return
    found, own = outdone(smoothed, threat, bound, xi[:, 0].double().numpy() * (1 + 1e-6), moved)
    assert (found <= own + 1e-12).all()


# ---------------------------------------------------------------- stores


def stored(bound, smoothed, threat, x, made_by):
    """The bound as a store keeps it."""
    record = json.loads(json.dumps({"index": 0, "input": content_digest(x), **asdict(bound)}))
    return StoredBound([record], Conditions(smoothed, threat), made_by)


@pytest.mark.parametrize(
    "make",
    [lambda s: RealDisplacement(0.5), *IMITATIONS],
    ids=["real", "surrogate", "corollary", "proved"],
)
@pytest.mark.filterwarnings("ignore:tau")
def test_a_stored_bound_certifies_as_the_one_it_was(make):
    """Curve and slope come back from JSON, and with them every radius."""
    own, x = smoothed_by(IMITATION, Gaussian(0.5), 3.0), picture()
    error = make(IMITATION)
    bound = bounded(error, own, THREAT, x)
    again = stored(bound, own, THREAT, x, error)
    assert again.latent
    back = finish(again.procedure(own, THREAT, x, Stream(0, 0)))
    assert (back.curve, back.slope, back.value) == (bound.curve, bound.slope, bound.value)
    radii = [certified(own, THREAT, x, e, 0.99).radius for e in (error, again)]
    assert radii[0] == radii[1]
    other = smoothed_by(surrogate(ZOOM, [0.0], [0.4], seed=1), Gaussian(0.5), 3.0)
    with pytest.raises(UncertifiableError, match="another preprocess"):
        finish(again.procedure(other, THREAT, x, Stream(0, 0)))
    quieter = smoothed_by(IMITATION, Gaussian(0.5), 2.9)
    with pytest.raises(UncertifiableError, match="another noise"):
        finish(again.procedure(quieter, THREAT, x, Stream(0, 0)))
    steeper = smoothed_by(IMITATION, Gaussian(0.6), 3.0)
    with pytest.raises(UncertifiableError, match="another noise"):
        finish(again.procedure(steeper, THREAT, x, Stream(0, 0)))


@pytest.mark.parametrize("make", [lambda s: RealDisplacement(0.5), *IMITATIONS])
@pytest.mark.filterwarnings("ignore:tau")
def test_votes_bounded_again_keep_curve_and_slope(make):
    """A record bounded again under its own plan is itself; under a looser alpha it is what that plan certifies."""
    own, x = smoothed_by(IMITATION, Gaussian(0.5), 3.0), picture()
    against(own, IMITATION.encoder(x[None]), IMITATION.directions.flatten().double().numpy(), 0.95)
    made = {}
    for alpha in (1e-3, 0.1):
        certifier = LatentCertifier(FixedN(32, 256, alpha), make(IMITATION))
        ((_, certificate),) = certifier.certify(own, THREAT, [(0, x)])
        made[alpha] = (json.loads(json.dumps({"index": 0, **asdict(replace(certificate, seconds=0.0))})), certifier)
    for (record, _), (wanted, certifier) in itertools.product(made.values(), made.values()):
        assert rebound(record, certifier, own, THREAT) == wanted
    assert made[0.1][0]["radius"] >= made[1e-3][0]["radius"]
    assert made[0.1][0]["details"]["curve"]


# ---------------------------------------------------------------- draws


def test_the_sampler_adds_whole_steps_of_latents_and_noise():
    """Draws equal round(levels F2(x)) + round(levels Z), with Z the law's own draw of the same address; and lie on the
    grid. The network is H and f behind b1."""
    x, classifier = picture(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    base = Decoded(IMITATION, classifier).eval()
    own = smoothed_by(IMITATION, Gaussian(0.2), 0.4, base, 3)
    stream = Stream(7, 3)
    inputs = own.draw(x, stream.at("estimate", 5), own.block)
    z = own.noise.sample(stream.at("estimate", 5), own.block, IMITATION.shape)
    steps = (IMITATION.encoder(x[None]).double() * own.levels).round() + (z * own.levels).round()
    assert torch.equal((inputs.double() * own.levels).round(), steps)
    assert torch.equal(inputs, steps.float() * (1 / own.levels))
    with torch.no_grad():
        wanted = classifier(IMITATION.decoder(inputs + IMITATION.shift.bias.view(1, *IMITATION.shape)))
        assert torch.equal(own.outputs(inputs), wanted)
        theta = torch.tensor([[0.3]])
        shifted = classifier(IMITATION(x[None], theta))
        assert torch.allclose(base(IMITATION.encoder(x[None]) + IMITATION.directions * 0.3), shifted, atol=1e-5)


def test_votes_are_those_of_the_exact_law():
    """A half-space of known probability: the counts of 4,000 draws are within five standard errors."""
    x = picture()
    own = smoothed_by(IMITATION, Gaussian(0.5), 0.4)
    against(own, IMITATION.encoder(x[None]), IMITATION.directions.flatten().double().numpy(), 0.8)
    votes = finish(own.sample(x, Stream(0, 0), "estimate", 0, 4000))
    assert abs(votes[1] / 4000 - 0.8) < 5 * math.sqrt(0.16 / 4000)


def test_the_encoder_does_not_follow_autocast():
    """Bounds are computed outside of `encode`, and must see the same latents under a trainer of lower precision."""
    x, random = picture(), torch.Generator().manual_seed(0)
    plain = IMITATION.encoder(x[None])
    exact = copy.deepcopy(nn.Sequential(*IMITATION.encoder)).double()(x[None].double())
    assert plain.dtype == torch.float32
    assert torch.equal(plain, exact.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(IMITATION.encoder(x[None]), plain)
    others = torch.cat([x[None], torch.rand(7, *x.shape, generator=random)])
    assert torch.allclose(IMITATION.encoder(others)[:1], plain, atol=1e-6)


def test_an_encoder_of_steps_that_are_not_layers_is_sliced():
    """Anything that states its Lipschitz constant may stand before latent noise."""
    x = picture()
    noise = Latent(torch.ones(1, 1, 8, 8), Gaussian(0.2), 0.3)
    own = SmoothedClassifier(nn.Flatten(), 2, preprocess=SoftClip(), noise=noise, block=16).eval()
    bound = bounded(RealDisplacement(0.5), own, THREAT, x)
    xi = attacked(THREAT)
    moved = latents(own, THREAT.apply(x.expand(len(xi), *x.shape), xi)) - latents(own, x[None])
    found, left_over = outdone(own, THREAT, bound, xi[:, 0].double().numpy(), moved)
    assert (found <= left_over + 1e-12).all()
