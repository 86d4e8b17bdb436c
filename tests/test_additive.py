"""The direct l2 certificate: linear classifiers, the sampler's arithmetic, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import nn

from gsmooth_lightning.certify import ABSTAIN, AdditiveCertifier
from gsmooth_lightning.confidence import clopper_pearson_lower
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN, GroupSequential
from gsmooth_lightning.preprocess import DiscVignette, LowPass, Preprocess
from gsmooth_lightning.smoothed import LEVELS, SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.smoothing.base import round_down
from gsmooth_lightning.stream import Stream, sampling_slack
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Identity, Rotation, Transform
from plans import Known, finish

SIGMA = 0.25


class Linear(nn.Module):
    """Class 0 where w.x < b, class 1 beyond the hyperplane; class 2 never."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = w.double(), float(b)

    def forward(self, x):
        value = (x.double() * self.w).flatten(1).sum(1)
        return torch.stack([self.b - value, value - self.b, torch.full_like(value, -1e9)], 1)


class Constant(nn.Module):
    """Always class 1: infinitely robust."""

    def forward(self, x):
        return nn.functional.one_hot(torch.ones(len(x), dtype=torch.long), 3).float()


class Voted(SmoothedClassifier):
    """Draws nothing: returns the given votes of a stage."""

    def sample(self, x, stream, stage, first, last):
        return np.array(self.votes[stage])
        yield


def image(seed=0, shape=(1, 4, 4)):
    """An 8-bit image, k/255."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape)).float() / 255


def linear(x, distance, seed=1, noise=None, **arguments):
    """A smoothed half-space at the given l2 distance from x."""
    w = torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(x.shape)))
    b = (w * x.double()).sum() + distance * w.norm()
    return SmoothedClassifier(Linear(w, b), 3, noise=noise or Gaussian(SIGMA), block=32, **arguments).eval()


def radius_of(smoothed, x, pa, pb=None, threat=None):
    certificate = finish(
        AdditiveCertifier(Known(pa, pb, classes=3)).procedure(smoothed, threat or PixelThreat(), x, Stream(0, 0))
    )
    return None if certificate.prediction == ABSTAIN else certificate.radius


# ---------------------------------------------------------------- the linear oracle


@pytest.mark.parametrize("distance", [0.05, 0.25, 0.6, 1.0])
def test_radius_of_a_linear_classifier_is_the_distance(distance):
    """pA = Phi(d / sigma) exactly, so sigma z(pA) = d, less the sampler's slack; the file is on the grid."""
    x = image()
    smoothed = linear(x, distance)
    pa = norm.cdf(distance / SIGMA)
    radius = radius_of(smoothed, x, pa)
    assert radius < distance
    slack = smoothed.slack(x)
    assert slack == sampling_slack(16, SIGMA * LEVELS)
    assert radius == pytest.approx(SIGMA * norm.ppf(pa - slack), rel=1e-9)
    assert radius == pytest.approx(distance, rel=2e-5)


def test_radius_of_a_linear_classifier_with_different_sigmas():
    """Diagonal noise: sigma_min z(pA); the l2 ball lies in the ellipsoid, and touches it along the smallest sigma."""
    x = image()
    sigma = torch.full((1, 4, 4), 0.5, dtype=torch.float64)
    sigma[0, 1, 2] = 0.2
    w = torch.zeros(1, 4, 4)
    w[0, 1, 2] = 1.0  # the hyperplane that the smallest sigma faces
    smoothed = SmoothedClassifier(Linear(w, float(x[0, 1, 2]) + 0.3), 3, noise=Gaussian(sigma), block=32).eval()
    assert radius_of(smoothed, x, norm.cdf(0.3 / 0.2)) == pytest.approx(0.3, rel=1e-5)
    oblique = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 4, 4)))
    distance = 0.3
    pa = norm.cdf(distance * float(oblique.norm() / (oblique * sigma).norm()))
    assert radius_of(smoothed, x, pa) < distance


def test_certificates_on_counts_fail_with_probability_at_most_alpha():
    """n draws at distance d: sum over all counts k of P(K = k) 1[radius(k) > d] <= alpha, and the slack is small."""
    x, n, alpha = image(), 120, 0.05
    smoothed = Voted(Constant(), 3, noise=Gaussian(SIGMA), block=32)
    certifier = AdditiveCertifier(FixedN(10, n, alpha))
    radii = []
    for k in range(n + 1):
        smoothed.votes = {"select": [10, 0, 0, 0], "estimate": [k, n - k, 0, 0]}
        certificate = finish(certifier.procedure(smoothed, PixelThreat(), x, Stream(0, 0)))
        radii.append(certificate.radius if certificate.prediction == 0 else -1.0)
        pa = float(clopper_pearson_lower(k, n, alpha))
        assert (certificate.prediction == ABSTAIN) == (pa - smoothed.slack(x) <= 0.5)
        assert certificate.radius <= max(0.0, SIGMA * norm.ppf(pa))
        assert (certificate.counts, certificate.selection) == ([k, n - k, 0], [10, 0, 0])
    assert all(a <= b for a, b in itertools.pairwise(radii))
    errors = []
    for distance in np.linspace(0, 0.7, 141):
        mass = binom.pmf(np.arange(n + 1), n, norm.cdf(distance / SIGMA))
        errors.append(mass[np.array(radii) > distance].sum())
    assert max(errors) <= alpha
    assert max(errors) > 0.9 * alpha
    wrong = binom.pmf(np.arange(n + 1), n, 0.5 - 1e-9)  # the other class is the smoothed one: certifying 0 is false
    assert wrong[np.array(radii) >= 0].sum() <= alpha


@pytest.mark.parametrize(
    "plan", [FixedN(64, 4000), FixedN(64, 4000, bounds="two"), GroupSequential([0.1, 0.2, 0.3, 0.4, 0.5], 64, 4000)]
)
def test_monte_carlo_radius_stays_below_the_distance(plan):
    """The whole certifier, real draws: radius <= d, near it for a fixed n, the last target below it when sequential."""
    distance = 0.45
    images = [(i, image(i)) for i in range(6)]
    certifier = AdditiveCertifier(plan)
    for i, x in images:
        ((index, certificate),) = certifier.certify(linear(x, distance, seed=i), PixelThreat(), [(i, x)], seed=3)
        assert (index, certificate.prediction, certificate.unit, certificate.guarantee) == (i, 0, "l2", "sound")
        assert certificate.alpha == 1e-3
        assert certificate.radius <= distance
        if isinstance(plan, FixedN):
            assert certificate.radius > 0.85 * distance
            assert sum(certificate.counts) == certificate.n == 4000
        else:
            assert certificate.radius == 0.4
            assert certificate.pa is None


def test_batch_of_images_agrees_with_single_images():
    """The index addresses the draws: order, company and number in flight do not matter."""
    w = torch.from_numpy(np.random.default_rng(5).normal(size=(1, 4, 4)))
    smoothed = SmoothedClassifier(Linear(w, 0.3), 3, noise=Gaussian(SIGMA), block=32).eval()
    images = [(i, image(i)) for i in (4, 9, 2)]
    certifier = AdditiveCertifier(FixedN(32, 500))
    together = dict(certifier.certify(smoothed, PixelThreat(), images, seed=8, in_flight=3))
    for i, x in reversed(images):
        ((_, alone),) = certifier.certify(smoothed, PixelThreat(), [(i, x)], seed=8, in_flight=1)
        assert (alone.counts, alone.selection, alone.radius) == (
            together[i].counts,
            together[i].selection,
            together[i].radius,
        )


# ---------------------------------------------------------------- rounding, ceilings, abstention


def test_round_down():
    """Strictly below, by a relative 1e-12; never negative."""
    for radius in (1e-9, 0.1, 1.2397, 30.0, 1e6):
        assert radius * (1 - 2e-12) < round_down(radius) < radius
    for radius in (0.0, -1e-9, -3.0):
        assert round_down(radius) == 0.0


@pytest.mark.parametrize(("bounds", "share"), [("binary", 1), ("two", 2)])
def test_infinitely_robust_classifier_has_a_finite_radius(bounds, share):
    """All n votes for one class: sigma z(alpha^(1/n)), less the slack, and no more."""
    x, n, alpha = image(), 1000, 1e-3
    smoothed = SmoothedClassifier(Constant(), 3, noise=Gaussian(SIGMA), block=50).eval()
    certifier = AdditiveCertifier(FixedN(10, n, alpha, bounds=bounds))
    ((_, certificate),) = certifier.certify(smoothed, PixelThreat(), [(0, x)])
    limit = SIGMA * norm.ppf((alpha / share) ** (1 / n))
    assert certificate.prediction == 1
    assert certificate.counts == [0, n, 0]
    assert certificate.radius < limit
    assert certificate.radius == pytest.approx(limit, rel=1e-4)


def test_a_class_that_is_not_predicted_gets_no_certificate():
    """pA_low <= 1/2 abstains (a peer that squares z(p) certifies such classes), whatever the selection said."""
    x = image()
    for pa in (0.0, 1e-9, 0.01, 0.3, 0.4999, 0.5):
        assert radius_of(linear(x, 0.3), x, pa) is None
    smoothed = Voted(Constant(), 3, noise=Gaussian(SIGMA), block=32)
    for estimate in ([0, 1000, 0, 0], [30, 500, 470, 0], [500, 500, 0, 0]):
        smoothed.votes = {"select": [9, 1, 0, 0], "estimate": estimate}
        for plan in (FixedN(10, 1000), FixedN(10, 1000, bounds="two")):
            certificate = finish(AdditiveCertifier(plan).procedure(smoothed, PixelThreat(), x, Stream(0, 0)))
            assert (certificate.prediction, certificate.radius) == (ABSTAIN, 0.0)
    on_the_plane = linear(x, 0.0)
    sequential = AdditiveCertifier(GroupSequential([0.0, 0.1], 10, 1000))
    certificate = finish(sequential.procedure(on_the_plane, PixelThreat(), x, Stream(0, 1)))
    assert (certificate.prediction, certificate.radius) == (ABSTAIN, 0.0)


def test_two_bounds_certify_where_one_abstains():
    """pA = .45 against pB = .2: sigma (z(pA) - z(pB)) / 2 although pA < 1/2; pA <= pB abstains."""
    x = image()
    smoothed = linear(x, 0.3)
    assert radius_of(smoothed, x, 0.45, 0.2) == pytest.approx(SIGMA * (norm.ppf(0.45) - norm.ppf(0.2)) / 2, rel=1e-4)
    assert radius_of(smoothed, x, 0.3, 0.3) is None
    assert radius_of(smoothed, x, 0.3, 0.31) is None
    slack = smoothed.slack(x)
    assert radius_of(smoothed, x, 0.3 + 1.9 * slack, 0.3) is None  # the slack is taken from pA and added to pB
    assert radius_of(smoothed, x, 0.3 + 2.1 * slack, 0.3) is not None


# ---------------------------------------------------------------- files that are not on the grid


@pytest.mark.parametrize("pa", [0.8, 0.999])
def test_float_files_shrink_the_radius(pa):
    """Both images of a pair are rounded to the grid: sqrt(D) / LEVELS is taken from the radius, at least."""
    x = image()
    smoothed = linear(x, 0.3)
    exact, rounded = radius_of(smoothed, x, pa), radius_of(smoothed, x, pa, threat=PixelThreat("float"))
    assert exact - rounded == pytest.approx(math.sqrt(16) / LEVELS, rel=0.5)
    assert exact - rounded >= math.sqrt(16) / LEVELS * (1 - 1e-9)
    tiny = norm.cdf(math.sqrt(16) / LEVELS / SIGMA / 2)  # within the rounding: the prediction alone
    assert radius_of(smoothed, x, tiny, threat=PixelThreat("float")) == 0.0


@pytest.mark.parametrize(
    "preprocess", [Preprocess([DiscVignette(), LowPass(1.5)]), Preprocess([LowPass(2)]), LowPass(2)], ids=str
)
def test_preprocessed_images_shrink_the_radius(preprocess):
    """What a low-pass returns is not on the grid, so it is rounded: sqrt(D) / LEVELS less, also for 8-bit files."""
    x = image(shape=(1, 5, 5))
    plain, filtered = linear(x, 0.3), linear(x, 0.3, preprocess=preprocess)
    steps = filtered.preprocess(x[None]).double() * LEVELS
    assert (steps - torch.round(steps)).abs().max() > 0.1
    difference = radius_of(plain, x, 0.9) - radius_of(filtered, x, 0.9)
    assert difference >= math.sqrt(25) / LEVELS * (1 - 1e-9)


def test_rounding_moves_a_pair_by_no_more_than_the_radius_pays():
    """||round(x) - round(x')|| <= ||x - x'|| + what a float file's radius gives up, for the worst float32 pixels.

    Near half a step the float32 product x LEVELS is itself rounded, by up to 2^-9 of a step, before torch.round.
    """
    smoothed = SmoothedClassifier(Constant(), 3, noise=Gaussian(SIGMA), block=32).eval()
    half = (torch.arange(LEVELS // 2, LEVELS - 1, 61, dtype=torch.float64) + 0.5) / LEVELS
    spread = torch.arange(-3, 4, dtype=torch.int32)  # float32 neighbours of every half step
    near = (half.float().view(torch.int32)[:, None] + spread).view(torch.float32).flatten()
    off = smoothed.encode(near, torch.zeros(1, 0)).double() - near.double() * LEVELS
    middle = len(near) // 2  # a pair far apart, the darker one rounded down and the brighter one up
    below, above = near[:middle][off[:middle].argmin()], near[middle:][off[middle:].argmax()]
    pair = [torch.full((1, 8, 8), float(value)) for value in (below, above)]
    moved = torch.sub(*(smoothed.encode(p, torch.zeros(1, 0)).double() for p in pair)).norm() / LEVELS
    stretched = moved - torch.sub(*(p.double() for p in pair)).norm()
    model = linear(pair[0], 0.3)
    paid = radius_of(model, pair[0], 0.9) - radius_of(model, pair[0], 0.9, threat=PixelThreat("float"))
    assert stretched >= 0.99 * 8 / LEVELS  # the pair is a bad one
    assert stretched <= paid


@pytest.mark.parametrize("saved", ["8bit", "float"])
@pytest.mark.parametrize("radius", [0.1, 0.5, 0.9])
def test_sequential_threshold_is_consistent_with_the_fixed_radius(saved, radius):
    """pA just above threshold(r) certifies r, just below does not; threshold(0) = 1/2 + slack, rounded up."""
    x, threat, plan = image(), PixelThreat(saved), Known(0.9, classes=3)
    smoothed = linear(x, 0.3)
    finish(AdditiveCertifier(plan).procedure(smoothed, threat, x, Stream(0, 0)))
    threshold, slack = plan.threshold(radius), smoothed.slack(x)
    rounding = radius_of(smoothed, x, 0.9) - radius_of(smoothed, x, 0.9, threat=threat)
    assert (rounding > 0) == (saved == "float")
    assert threshold == pytest.approx(norm.cdf((radius + rounding) / SIGMA) + slack, abs=1e-11)
    step = 1e-6 * (1 - threshold)
    assert radius_of(smoothed, x, threshold + step, threat=threat) >= radius
    assert radius_of(smoothed, x, threshold - step, threat=threat) < radius
    assert 0.5 + slack < plan.threshold(0.0) <= 0.5 + slack + 2e-12


# ---------------------------------------------------------------- arithmetic on the grid


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0, 20.0])
def test_draws_are_exact_sums_of_integers(sigma):
    """draw() = (round(x LEVELS) + round(eps LEVELS)) / LEVELS with the sum exact: no low bit of x leaks through."""
    x = image(3, (3, 5, 4))
    smoothed = SmoothedClassifier(Constant(), 3, noise=Gaussian(sigma), block=8)
    drawn = smoothed.draw(x, Stream(1, 2).at("estimate", 3), 8)
    k = torch.round(x.double() * 255).long() * 256
    eps = Stream(1, 2).at("estimate", 3).normal(8, 3, 5, 4).numpy() * sigma
    expected = k.numpy() + np.rint(eps * LEVELS).astype(np.int64)
    assert np.abs(expected).max() < 2**24
    assert drawn.dtype == torch.float32
    np.testing.assert_array_equal(drawn, expected.astype(np.float32) * np.float32(1 / LEVELS))
    if np.abs(expected).max() < 2**22:
        np.testing.assert_array_equal(np.rint(drawn.double().numpy() * LEVELS).astype(np.int64), expected)


def test_two_images_with_the_same_sum_give_the_same_input():
    """f is a function of the integer sum: x + 1 step with noise - 1 step is x, bit by bit."""
    smoothed = SmoothedClassifier(Constant(), 3, noise=Gaussian(0.5), block=4)
    a, b = image(1), image(2)
    steps_a, steps_b = (smoothed.encode(v[None], torch.zeros(1, 0)) for v in (a, b))
    noise = torch.round(torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 30_000)
    assert torch.equal((steps_a + (noise - steps_a + steps_b)) * (1 / LEVELS), (steps_b + noise) * (1 / LEVELS))
    every = torch.arange(256).float() / 255
    torch.testing.assert_close(smoothed.encode(every, torch.zeros(1, 0)), torch.arange(256) * 256.0, rtol=0, atol=0)


def test_noise_beyond_exact_sums_is_refused():
    """9 sigma LEVELS must stay below 2^24, where float32 still holds every integer."""
    limit = 2**24 / LEVELS / 9
    SmoothedClassifier(Constant(), 3, noise=Gaussian(limit * 0.99))
    with pytest.raises(RequestError, match="sigma must be below"):
        SmoothedClassifier(Constant(), 3, noise=Gaussian(limit * 1.01))
    with pytest.raises(RequestError, match="sigma must be below"):
        SmoothedClassifier(Constant(), 3, noise=Gaussian([0.1, limit * 1.01]))


# ---------------------------------------------------------------- refusals


def test_rotation_threats_belong_to_the_joint_certificate():
    with pytest.raises(UncertifiableError, match="certify=joint"):
        AdditiveCertifier(FixedN()).check(linear(image(), 0.3), TransformationThreat(Rotation(), -30, 30))


def test_random_transformations_before_an_l2_attack_are_refused():
    smoothed = SmoothedClassifier(Constant(), 3, Rotation(), None, Gaussian(30.0), Gaussian(SIGMA))
    with pytest.raises(UncertifiableError, match="transform=identity"):
        AdditiveCertifier(FixedN()).check(smoothed, PixelThreat())
    with pytest.raises(RequestError, match="go together"):
        SmoothedClassifier(Constant(), 3, Rotation(), None, None, Gaussian(SIGMA))
    with pytest.raises(RequestError, match="go together"):
        SmoothedClassifier(Constant(), 3, Identity(), None, Gaussian(3.0), Gaussian(SIGMA))


def test_fixed_transformations_are_refused():
    """One without parameters, applied always: it may stretch l2 distances."""

    class Brighten(Transform):
        units, name = (), "brighten"

        def forward(self, x, theta):
            return 3 * x

    with pytest.raises(UncertifiableError, match="transform=identity"):
        AdditiveCertifier(FixedN()).check(linear(image(), 0.3, transform=Brighten()), PixelThreat())


def test_images_must_be_float32():
    """The grid is exact in float32; half precision would round 8-bit values off it."""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(RequestError, match="float32"):
            linear(image(), 0.3).encode(image()[None].to(dtype), torch.zeros(1, 0))


def test_noise_must_be_gaussian_with_independent_pixels():
    for noise, words in (
        (None, "no radius in l2"),
        (Gaussian(covariance=torch.eye(16)), "a full covariance has no radius"),
    ):
        smoothed = SmoothedClassifier(Constant(), 3, noise=noise)
        with pytest.raises(UncertifiableError, match=f"{words}; use noise=gaussian"):
            AdditiveCertifier(FixedN()).check(smoothed, PixelThreat())


class Double(nn.Module):
    """Stretches l2 distances; says so only if told to."""

    def forward(self, x):
        return 2 * x


class Stated(Double):
    lipschitz = 2.0


@pytest.mark.parametrize(
    "preprocess",
    [Preprocess([Double()]), Preprocess([Stated()]), Preprocess([LowPass(2), Double()]), Stated(), Double()],
    ids=["unstated step", "stated step", "one of two", "stated module", "unstated module"],
)
def test_preprocessing_that_may_stretch_is_refused(preprocess):
    """No stated Lipschitz constant is an infinite one: x -> 2x would double every radius."""
    with pytest.raises(UncertifiableError, match="stretch"):
        AdditiveCertifier(FixedN()).check(linear(image(), 0.3, preprocess=preprocess), PixelThreat())


def test_preprocessing_that_does_not_stretch_is_accepted():
    assert Preprocess([]).lipschitz == 1
    assert Preprocess([Double(), LowPass(2)]).lipschitz == math.inf
    for preprocess in (None, nn.Identity(), Preprocess(), Preprocess([DiscVignette(), LowPass(3)])):
        AdditiveCertifier(FixedN()).check(linear(image(), 0.3, preprocess=preprocess), PixelThreat())


@pytest.mark.parametrize("step", [DiscVignette(), LowPass(0), LowPass(1.5), LowPass(3)], ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (6, 9)])
def test_steps_have_the_lipschitz_constant_they_state(step, shape):
    """The largest singular value of the step's matrix is at most `lipschitz`; a projection is applied once."""
    basis = torch.eye(shape[0] * shape[1], dtype=torch.float64).view(-1, 1, *shape)
    matrix = step(basis).flatten(1)
    assert torch.linalg.matrix_norm(matrix, 2) <= step.lipschitz + 1e-9
    torch.testing.assert_close(matrix @ matrix, matrix, rtol=0, atol=1e-9)


def test_low_pass_keeps_integer_frequencies_in_the_disc():
    """Against numpy's FFT with the mask f1^2 + f2^2 <= r^2: radius 5 keeps 81 modes of 28 x 28."""
    x = torch.from_numpy(np.random.default_rng(0).random((2, 1, 28, 28)))
    frequency = np.rint(np.fft.fftfreq(28) * 28)
    mask = frequency[:, None] ** 2 + frequency[None, :] ** 2 <= 25
    assert mask.sum() == 81
    np.testing.assert_allclose(LowPass(5)(x), np.fft.ifft2(np.fft.fft2(x.numpy()) * mask).real, atol=1e-12)
    with pytest.raises(RequestError, match="bandwidth"):
        LowPass(-1.0)


def test_targets_out_of_reach_are_refused():
    """sigma z((.98 alpha)^(1/n)) is the most that n votes can show; one per cent below it is accepted."""
    smoothed = linear(image(), 0.3)
    limit = SIGMA * norm.ppf((0.98e-3) ** (1 / 1000))
    AdditiveCertifier(GroupSequential([0.1, 0.99 * limit], n=1000)).check(smoothed, PixelThreat())
    with pytest.raises(UncertifiableError, match="out of reach"):
        AdditiveCertifier(GroupSequential([0.1, 1.01 * limit], n=1000)).check(smoothed, PixelThreat())
    AdditiveCertifier(FixedN(n=1000)).check(smoothed, PixelThreat())


# ---------------------------------------------------------------- networks that are no function of one input


class Labels(nn.Module):
    """A network that returns labels."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x).argmax(1)


class AlwaysDropout(nn.Module):
    """Dropout that eval() does not switch off."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


def network(*first):
    """A small network with the given first layers, weights from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*first, nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def certify_with(base):
    smoothed = SmoothedClassifier(base, 3, noise=Gaussian(SIGMA), block=32)
    smoothed.preprocess.eval()
    return list(AdditiveCertifier(FixedN(32, 64)).certify(smoothed, PixelThreat(), [(0, image())]))


def test_training_mode_is_refused():
    base = network(nn.Dropout(0.5))
    with pytest.raises(RequestError, match="training mode"):
        certify_with(base.train())
    assert certify_with(base.eval())
    base[1].train()  # one layer is enough
    with pytest.raises(RequestError, match="training mode"):
        certify_with(base)


def test_batch_statistics_are_refused():
    """BatchNorm without running statistics mixes the images of a batch; with them it is a function of one input."""
    with pytest.raises(RequestError, match="rest of its batch"):
        certify_with(network(nn.BatchNorm2d(1, track_running_stats=False)).eval())
    assert certify_with(network(nn.BatchNorm2d(1)).eval())


def test_batch_statistics_behind_labels_are_refused():
    """A network that returns labels instead of logits does not hide its batch statistics."""
    with pytest.raises(RequestError, match="rest of its batch"):
        certify_with(Labels(network(nn.BatchNorm2d(1, track_running_stats=False))).eval())


class Brighter(nn.Module):
    """Whether an image's mean exceeds 1/2, as a truth value."""

    def forward(self, x):
        return x.flatten(1).mean(1) > 0.5


class Masked(nn.Module):
    """Class 2 is masked by a huge negative logit; `centred` takes the batch's mean from each image."""

    def __init__(self, centred):
        super().__init__()
        self.centred = centred

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        lead = mean - mean.mean() if self.centred else mean - 0.5
        return torch.stack([lead, -lead, torch.full_like(lead, -1e9)], 1)


def test_a_masked_class_does_not_hide_batch_statistics():
    with pytest.raises(RequestError, match="rest of its batch"):
        certify_with(Masked(True).eval())
    assert certify_with(Masked(False).eval())


def test_labels_that_are_true_or_false_are_classes():
    (_, found) = certify_with(Labels(Masked(False)).eval())[0]
    (_, binary) = certify_with(Brighter().eval())[0]
    assert (binary.counts[0], binary.counts[1]) == (found.counts[1], found.counts[0])


def test_randomness_in_the_network_is_refused():
    with pytest.raises(RequestError, match="chance"):
        certify_with(network(AlwaysDropout()).eval())


def test_labels_and_logits_give_the_same_votes():
    (_, logits), (_, labels) = certify_with(network().eval()) + certify_with(Labels(network()).eval())
    assert logits.counts == labels.counts


class Broken(nn.Module):
    """NaN for bright inputs."""

    def forward(self, x):
        out = torch.zeros(len(x), 3)
        out[x.flatten(1).mean(1) > 0.5] = math.nan
        return out


def test_votes_that_are_not_numbers_are_refused():
    """NaN is no class and no vote: it stops the certificate instead of counting for class 0."""
    with pytest.raises(RequestError, match="NaN or infinity"):
        certify_with(Broken().eval())


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_images_outside_the_unit_interval_are_refused(bad):
    x = image()
    x[0, 0, 0] = bad
    certifier = AdditiveCertifier(FixedN(32, 64))
    with pytest.raises(RequestError, match="between 0 and 1"):
        list(certifier.certify(linear(image(), 0.3), PixelThreat(), [(0, x)]))


def test_no_images_no_certificates():
    assert list(AdditiveCertifier(FixedN()).certify(linear(image(), 0.3), PixelThreat(), [])) == []
