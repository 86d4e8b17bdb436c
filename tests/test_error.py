"""Error bounds: defects against a slow reference, coverage, and what each bound may claim."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.stats import binom, norm

from gsmooth_lightning.certify import JointCertifier
from gsmooth_lightning.confidence import clopper_pearson_lower, clopper_pearson_upper
from gsmooth_lightning.data import Digits
from gsmooth_lightning.error import (
    AssumedBound,
    Bound,
    Conditions,
    DistributionBound,
    ImageBound,
    PooledBound,
    StoredBound,
    sampled,
)
from gsmooth_lightning.error.base import defect_norms
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.preprocess import DiscVignette, LowPass, Preprocess
from gsmooth_lightning.smoothed import LEVELS, SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, partition_masks
from gsmooth_lightning.stream import Stream, content_digest
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Rotation
from plans import finish

# ---------------------------------------------------------------- defects of rotations, against a slow reference

BANDWIDTH, NOISE, ANGLE = 3, 0.25, 15.0


def rotate(x, degrees):
    """Counterclockwise rotations of one (h, w) image, bilinear, black outside: (n,) angles -> (n, h, w)."""
    h, w = x.shape
    rows, columns = np.mgrid[:h, :w]
    y, u = rows - (h - 1) / 2, columns - (w - 1) / 2
    angle = np.radians(np.asarray(degrees, dtype=float))[:, None, None]
    source = np.stack([np.sin(angle) * u + np.cos(angle) * y, np.cos(angle) * u - np.sin(angle) * y])
    source += np.array([(h - 1) / 2, (w - 1) / 2]).reshape(2, 1, 1, 1)
    return map_coordinates(x, source, order=1, mode="grid-constant", cval=0.0)


def seen(images):
    """Disc, low-pass by FFT with integer frequencies, rounding to the grid: what the noise is added to."""
    h, w = images.shape[-2:]
    rows, columns = np.mgrid[:h, :w]
    disc = (rows - (h - 1) / 2) ** 2 + (columns - (w - 1) / 2) ** 2 <= ((min(h, w) - 1) / 2) ** 2
    frequency = [((np.arange(n) + n // 2) % n - n // 2) for n in (h, w)]
    mask = frequency[0][:, None] ** 2 + frequency[1][None, :] ** 2 <= BANDWIDTH**2
    smooth = np.fft.ifft2(np.fft.fft2(images * disc) * mask).real
    return np.rint(smooth * LEVELS) / LEVELS


def reference_defects(x, gammas, theta):
    """max over gamma of ||seen(psi(file, theta)) - seen(psi(x, theta + gamma))|| / sigma, the file saved in 8 bits."""
    worst = np.zeros(len(theta))
    for gamma in gammas:
        file = np.rint(rotate(x, [gamma])[0].clip(0, 1) * 255) / 255
        difference = seen(rotate(file, theta)) - seen(rotate(x, theta + gamma))
        worst = np.maximum(worst, np.sqrt((difference**2).sum((1, 2))) / NOISE)
    return worst


def digits(images, step=10.0, high=20.0):
    """A smoothed classifier of digits, its rotation threat, and prepared images."""
    base = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    preprocess = Preprocess([DiscVignette(), LowPass(BANDWIDTH)])
    smoothed = SmoothedClassifier(base, 10, Rotation(), preprocess, Gaussian(ANGLE), Gaussian(NOISE), block=64)
    threat = TransformationThreat(Rotation(), -high, high, step=step)
    data = Digits().split("test", 10)
    return smoothed.eval(), threat, [threat.prepare(data[i][0][None])[0] for i in images]


WHOLE = torch.ones(1, 1, 8, 8, dtype=torch.bool)
ATTACKS = (-20.0, -10.0, 0.0, 10.0, 20.0)


def test_the_reference_turns_counterclockwise():
    """90 degrees is numpy's rot90, for the reference and for the transformation; 0 is the identity."""
    x = np.random.default_rng(0).random((8, 8))
    np.testing.assert_allclose(rotate(x, [90.0, 0.0]), [np.rot90(x), x], atol=1e-12)
    image = torch.from_numpy(x).float()[None, None]
    np.testing.assert_allclose(Rotation()(image, torch.tensor([[90.0]]))[0, 0], np.rot90(x), atol=1e-5)
    np.testing.assert_allclose(seen(np.ones((1, 8, 8)))[0, 4, 4], seen(np.ones((8, 8)))[4, 4])


def test_defects_are_those_of_the_reference():
    """Files, encodings and norms against scipy and numpy.fft, on digits and fresh angles; tolerance 1e-3."""
    smoothed, threat, images = digits((0, 17, 203))
    gammas = threat.parameters(99)[0]
    np.testing.assert_array_equal(gammas[:, 0], ATTACKS)
    theta = torch.from_numpy(np.random.default_rng(2).normal(0, ANGLE, (150, 1))).float()
    for x in images:
        pixels = x[0].double().numpy()
        files = threat.apply(x.expand(5, *x.shape), gammas)
        expected = np.stack([np.rint(rotate(pixels, [g])[0] * 255) for g in ATTACKS])
        np.testing.assert_allclose(files[:, 0].double() * 255, expected, atol=1e-3)
        encoded = smoothed.encode(x.expand(150, *x.shape), theta)[:, 0].double().numpy() / LEVELS
        turned = seen(rotate(pixels, theta[:, 0].double().numpy()))
        np.testing.assert_allclose(encoded, turned, atol=2 / LEVELS)
        ours = defect_norms(smoothed, x, files, gammas, theta, WHOLE).numpy()[:, 0]
        reference = reference_defects(pixels, ATTACKS, theta[:, 0].double().numpy())
        np.testing.assert_allclose(ours, reference, atol=1e-3)
        assert (ours >= reference).all()  # a step of the grid a pixel pays for float32
        assert reference.max() > 0.3  # there is something to bound


@pytest.fixture(scope="module")
def fresh_defects():
    """Reference defects of five digits for 4,000 angles at the midpoints of equally likely strata: a quadrature."""
    n = 4000
    theta = ANGLE * norm.ppf((np.arange(n) + 0.5) / n)
    smoothed, threat, images = digits((3, 50, 111, 222, 333))
    return smoothed, threat, images, [reference_defects(x[0].double().numpy(), ATTACKS, theta) for x in images]


def test_hard_image_bound_covers_fresh_defects(fresh_defects):
    """P(defect > E) <= rho: by quadrature over theta, and on fresh draws with an exact binomial tolerance of 1e-6."""
    smoothed, threat, images, strata = fresh_defects
    error = ImageBound(draws=512, choose=128, quantile=0.95, alpha=1e-4, soft=False)
    rng = np.random.default_rng(99)
    for i, (x, defects) in enumerate(zip(images, strata, strict=True)):
        bound = finish(error.procedure(smoothed, threat, x, Stream(0, i)))
        assert bound.guarantee == "sound"
        assert bound.alpha == 1e-4
        assert (defects > bound.value).mean() <= bound.rho
        theta = rng.normal(0, ANGLE, 1000)
        beyond = (reference_defects(x[0].double().numpy(), ATTACKS, theta) > bound.value).sum()
        assert beyond <= binom.isf(1e-6, 1000, bound.rho)
        assert bound.rho < 0.2
        assert bound.value < np.quantile(defects, 0.995)  # a bound, not a blanket


def test_soft_image_bound_covers_fresh_defects(fresh_defects):
    """rho~ >= E_theta[2 Phi((d - E0)_+ / 2) - 1] by quadrature, and smaller than the hard rho at the same E."""
    smoothed, threat, images, strata = fresh_defects
    for i, (x, defects) in enumerate(zip(images, strata, strict=True)):
        error = ImageBound(draws=512, choose=128, quantile=0.9, alpha=1e-4, soft=True)
        bound = finish(error.procedure(smoothed, threat, x, Stream(0, i)))
        mean = (2 * norm.cdf(np.maximum(defects - bound.value, 0) / 2) - 1).mean()
        assert 0 < mean <= bound.rho
        hard = finish(ImageBound(512, 128, quantile=0.9, soft=False).procedure(smoothed, threat, x, Stream(0, i)))
        assert hard.value == bound.value
        assert bound.rho < hard.rho
        assert bound.details["soft"]
        assert bound.details["largest"] <= defects.max() + 0.05


def calibrated(error, smoothed, threat, images, seed=0):
    """Fits a bound to images, as `gsmooth bound` does."""
    norms = {i: finish(error.measure(smoothed, threat, x, Stream(seed, i))) for i, x in enumerate(images)}
    return error.fit(norms, smoothed, threat)


def test_distribution_bound_covers_fresh_defects():
    """E holds with mass 1 - rho on at least a fraction q_E of images: counted on 40 others by quadrature over theta,
    with an exact binomial tolerance of 1e-6 for the choice of the images."""
    smoothed, threat, calibration = digits(range(0, 400, 5))
    error = DistributionBound(80, draws=256, quantile=0.95, rho=0.08, alpha=1e-3, alpha_inner=1e-3)
    bound = calibrated(error, smoothed, threat, calibration, seed=5)
    assert bound.guarantee == "distributional"
    _, _, others = digits(range(2, 400, 10))
    assert finish(error.procedure(smoothed, threat, others[0], Stream(0, 0))) is bound
    theta = ANGLE * norm.ppf((np.arange(500) + 0.5) / 500)
    defects = np.stack([reference_defects(x[0].double().numpy(), ATTACKS, theta) for x in others])
    held = int(((defects > bound.value).mean(1) <= bound.rho).sum())
    assert bound.details["q_E"] > 0.5
    assert binom.cdf(held, len(others), bound.details["q_E"]) > 1e-6
    assert bound.value < np.quantile(defects, 0.9999)


def test_draws_that_choose_are_not_those_that_bound(fresh_defects):
    """E is chosen on the stage error-choose, rho on error-bound; votes come from other stages."""
    smoothed, threat, images, _ = fresh_defects
    source = Stream(3, 4)
    kept = {}
    for stage in ("error-choose", "error-bound"):
        kept[stage] = finish(ImageBound().sample(smoothed, threat, images[0], source, stage, 128))
    assert not np.isin(kept["error-choose"], kept["error-bound"]).any()
    error = ImageBound(draws=128, choose=128, quantile=0.8, soft=False)
    bound = finish(error.procedure(smoothed, threat, images[0], source))
    chosen = np.sort(kept["error-choose"][:, 0])
    assert bound.value == chosen[102]  # the .8 quantile of 128, taken upwards
    beyond = int((kept["error-bound"] > bound.value).sum())
    assert bound.rho == float(clopper_pearson_upper(beyond, 128, 1e-4))


# ---------------------------------------------------------------- what kind of statement it is


@pytest.mark.parametrize(
    ("search", "step", "guarantee"),
    [
        ("grid", None, "heuristic"),
        ("grid", 10.0, "sound"),
        ("grid", 7.0, "sound"),
        ("chords", None, "sound"),
        ("chords", 10.0, "sound"),
        ("intervals", None, "sound"),
    ],
)
def test_guarantee_of_an_image_bound(search, step, guarantee):
    """Sound when the maximum over gamma is proved, or all gammas are tried: a finite set of attacks. A grid of a
    continuum is heuristic."""
    smoothed, threat, images = digits((3,), step=step)
    error = ImageBound(draws=64, choose=16, search=search, points=5)
    bound = finish(error.procedure(smoothed, threat, images[0], Stream(0, 0)))
    assert bound.guarantee == guarantee
    plan = FixedN(64, 64)
    certificate = finish(JointCertifier(plan, error).procedure(smoothed, threat, images[0], Stream(0, 0)))
    assert certificate.guarantee == guarantee
    assert ("rests_on" in bound.details) == (guarantee == "heuristic")


@pytest.mark.parametrize(
    ("search", "step", "guarantee"),
    [
        ("grid", None, "heuristic"),
        ("grid", 10.0, "distributional"),
        ("chords", None, "distributional"),
        ("chords", 10.0, "distributional"),
    ],
)
def test_guarantee_of_a_distribution_bound(search, step, guarantee):
    smoothed, threat, images = digits(range(4), step=step)
    error = DistributionBound(4, draws=512, search=search, points=3, rho=0.05)
    bound = calibrated(error, smoothed, threat, images)
    assert bound.guarantee == guarantee
    assert ("rests_on" in bound.details) == (guarantee == "heuristic")


def test_a_proved_bound_is_no_smaller_than_what_a_grid_finds():
    """The same draws of theta, gamma maximised in three ways: the proved maxima lie above the grid's, and near it."""
    smoothed, threat, (x,) = digits((3,), step=None)
    found = {
        search: finish(
            ImageBound(search=search, points=81).sample(smoothed, threat, x, Stream(0, 0), "error-bound", 64)
        )
        for search in sampled.SEARCHES
    }
    one_step = float(smoothed.noise.gauge(torch.ones(1, 1, 8, 8) / LEVELS))  # what the grid's defects are raised by
    for search in ("chords", "intervals"):
        assert (found[search] >= found["grid"] - one_step * (1 + 1e-3)).all()
        assert found[search].mean() < 1.5 * found["grid"].mean()


def test_every_multiple_of_the_step_is_tried():
    """step = s: all the multiples of s in [low, high], the ends included when they are multiples, whatever `points`."""
    for low, high, step in ((-30, 30, 1), (-0.3, 0.3, 0.1), (-5, 20, 7), (0, 2, 0.5), (-1, 0, 0.25)):
        gammas, exhaustive = TransformationThreat(Rotation(), low, high, step=step).parameters(2)
        expected = [k * step for k in range(-500, 501) if low - 1e-9 <= k * step <= high + 1e-9]
        assert exhaustive
        np.testing.assert_allclose(gammas[:, 0], expected, rtol=1e-6, atol=1e-12)
    gammas, exhaustive = TransformationThreat(Rotation(), -30, 10).parameters(5)
    assert not exhaustive
    np.testing.assert_allclose(gammas[:, 0], [-30, -20, -10, 0, 10])


# ---------------------------------------------------------------- the distribution bound's q_E


def fit_on(rows, **arguments):
    """DistributionBound fitted on given defects, one row an image: even rows choose E, odd rows test it (laid where the
    bound's own random halves look for them)."""
    rows = np.asarray(rows, dtype=float)
    choose, test = sampled.halves(np.arange(len(rows)))
    placed = np.empty_like(rows)
    placed[choose], placed[test] = rows[::2], rows[1::2]
    smoothed, threat, _ = digits(())
    error = DistributionBound(len(rows), draws=rows.shape[1], **arguments)
    return error.fit(dict(enumerate(placed[..., None])), smoothed, threat)


def test_halves_are_random_and_disjoint():
    choose, test = sampled.halves(np.arange(101))
    assert sorted([*choose, *test]) == list(range(101))
    assert (len(choose), len(test)) == (50, 51)
    assert 15 < (choose % 2).sum() < 35  # not every other one


@pytest.mark.parametrize("passing", [0, 1, 20, 37, 40])
def test_q_e_formula(passing):
    """E on the even images; on the odd ones q_E = (CP(passing, m, alpha) - alpha_inner) / (1 - alpha_inner), >= 0."""
    m, draws, rho, inner = 40, 300, 0.05, 1e-3
    rows = np.full((2 * m, draws), 0.2)
    rows[::2] = 1.0  # the images that choose: E = 1
    rows[1::2][passing:] = 3.0
    bound = fit_on(rows, rho=rho, alpha=1e-3, alpha_inner=inner, quantile=0.5)
    assert bound.value == pytest.approx(1.0, rel=2e-6)
    assert bound.rho == rho
    expected = (clopper_pearson_lower(passing, m, 1e-3) - inner) / (1 - inner)
    assert bound.details["q_E"] == pytest.approx(max(0.0, float(expected)), abs=1e-12)


def test_inner_test_counts_defects_beyond_e():
    """An image passes when Clopper-Pearson's upper bound of its fraction beyond E is at most rho."""
    m, draws, rho, inner = 40, 300, 0.05, 1e-3
    largest = max(k for k in range(draws) if clopper_pearson_upper(k, draws, inner) <= rho)
    assert largest >= 1
    for beyond, passes in ((largest, m), (largest + 1, 0)):
        rows = np.full((2 * m, draws), 1.0)
        rows[1::2, :beyond] = 2.0
        bound = fit_on(rows, rho=rho, alpha=1e-3, alpha_inner=inner, quantile=0.5)
        expected = max(0.0, (float(clopper_pearson_lower(passes, m, 1e-3)) - inner) / (1 - inner))
        assert bound.details["q_E"] == pytest.approx(expected, abs=1e-12)


def test_q_e_covers_exactly():
    """An image is good with probability q; a bad one passes with probability alpha_inner, at worst. The number of
    passing images is Binomial(m, q + (1 - q) alpha_inner): P(q_E > q) <= alpha, all counts enumerated."""
    m, alpha, inner = 25, 0.05, 0.02
    stated = []
    for passing in range(m + 1):
        rows = np.full((2 * m, 200), 1.0)
        rows[1::2][passing:] = 2.0
        bound = fit_on(rows, rho=0.05, alpha=alpha, alpha_inner=inner, quantile=0.5)
        stated.append(bound.details["q_E"])
    for q in np.linspace(0, 1, 101):
        mass = binom.pmf(np.arange(m + 1), m, q + (1 - q) * inner)
        assert mass[np.array(stated) > q].sum() <= alpha
    assert stated[-1] > 0.85


def test_error_bounds_refuse():
    """Too few draws for the inner test, levels out of range, an unfitted distribution bound, too few images."""
    with pytest.raises(RequestError, match="no image can pass the inner test"):
        DistributionBound(draws=100, rho=0.02)
    for name in ("quantile", "rho", "alpha", "alpha_inner"):
        with pytest.raises(RequestError, match=rf"{name} must lie between"):
            DistributionBound(**{name: 0.0})
    for arguments in ({"draws": 1}, {"choose": 0}, {"points": 1}, {"draws": 100.5}, {"choose": 2.5}, {"points": True}):
        with pytest.raises(RequestError, match="must be a whole number, at least 2"):
            ImageBound(**arguments)
    for value in (-1, [0.3, float("inf")], "abc"):
        with pytest.raises(RequestError, match=r"error\.value must"):
            PooledBound(value=value)
    smoothed, threat, (x,) = digits((1,))
    with pytest.raises(RequestError, match="2 numbers for 1 parts"):
        finish(PooledBound(value=[1, 2]).measure(smoothed, threat, x, Stream(0, 0)))
    wrong = SmoothedClassifier(smoothed.base, 10, Rotation(), None, Gaussian(9.0), Gaussian(torch.ones(1, 3, 3))).eval()
    with pytest.raises(RequestError, match="does not fit draws of shape"):
        finish(ImageBound(2, 2, points=2).procedure(wrong, threat, x, Stream(0, 0)))
    with pytest.raises(RequestError, match=r"error\.quantile"):
        ImageBound(quantile=1.5)
    smoothed, threat, images = digits((1, 2))
    with pytest.raises(RequestError, match="fit the bound"):
        finish(DistributionBound().procedure(smoothed, threat, images[0], Stream(0, 0)))
    with pytest.raises(RequestError, match=r"error\.calibration must be a whole number, at least 4"):
        DistributionBound(calibration=3)


def test_stored_bound_is_returned_by_image():
    smoothed, threat, (x, other) = digits([0, 1])
    made_for = content_digest(x)
    same = {"input": made_for, "rho": 0.01, "alpha": 1e-4, "guarantee": "sound", "details": {"draws": 7}}
    records = [{"index": i, "value": 0.1 * i, **same} for i in (4, 9)]
    stored = StoredBound(records, Conditions(smoothed, threat), ImageBound(soft=False))
    with pytest.raises(RequestError, match="image 9 was made for other pixels"):
        finish(stored.procedure(smoothed, threat, other, Stream(0, 9)))
    bound = finish(stored.procedure(smoothed, threat, x, Stream(0, 9)))
    assert bound == Bound(0.9, 0.01, 1e-4, "sound", {"draws": 7}, (0.9,))
    assert not stored.soft
    with pytest.raises(RequestError, match="have none for image 5"):
        finish(stored.procedure(smoothed, threat, x, Stream(0, 5)))


OTHERS = {
    "preprocess": {"preprocess": Preprocess([DiscVignette(), LowPass(4)])},
    "law": {"law": Gaussian(16.0)},
    "noise": {"noise": Gaussian(0.26)},
    "transform": {"transform": Rotation("bicubic")},
    "wider range": {"high": 21.0},
    "asymmetric range": {"low": -20.5},
    "another file": {"saved": "float"},
    "another step": {"step": None},
    "the attacker's interpolation": {"attacker": Rotation("nearest")},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_bound_is_refused_under_other_conditions(other):
    """What E was made for: transformation, preprocessing, both sigmas, the attack, its range and its files. A smaller
    range is covered."""
    smoothed, threat, images = digits(range(4))
    error = DistributionBound(4, draws=512, points=3, rho=0.05)
    calibrated(error, smoothed, threat, images)
    change = {"transform": Rotation(), "preprocess": smoothed.preprocess, "law": smoothed.law, "noise": smoothed.noise}
    change |= {"attacker": Rotation(), "low": -20.0, "high": 20.0, "step": 10.0, "saved": "8bit"} | OTHERS[other]
    transform, attacker = change["transform"], change["attacker"]
    now = SmoothedClassifier(smoothed.base, 10, transform, change["preprocess"], change["law"], change["noise"]).eval()
    attack = TransformationThreat(attacker, change["low"], change["high"], change["step"], change["saved"])
    with pytest.raises(UncertifiableError, match="the error bound was made for"):
        finish(error.procedure(now, attack, images[0], Stream(0, 0)))
    smaller = TransformationThreat(Rotation(), -10, 20, step=10.0)
    assert finish(error.procedure(smoothed, smaller, images[0], Stream(0, 0))) is error.fitted[0]


# ---------------------------------------------------------------- parts, pairs, and a bound without a measurement


@pytest.mark.parametrize("partition", ["halves", "quadrants"])
def test_parts_are_bounded_at_once(partition):
    """E of each part against the reference's difference on that part; rho counts a defect beyond in any part."""
    smoothed, threat, (x,) = digits((17,))
    error = ImageBound(draws=256, choose=64, quantile=0.9, alpha=1e-3, soft=False, partition=partition)
    bound = finish(error.procedure(smoothed, threat, x, Stream(0, 0)))
    theta = ANGLE * norm.ppf((np.arange(1000) + 0.5) / 1000)
    pixels = x[0].double().numpy()
    masks = partition_masks(partition, (1, 8, 8))[:, 0].numpy()
    beyond = np.zeros(len(theta), dtype=bool)
    for gamma in ATTACKS:
        file = np.rint(rotate(pixels, [gamma])[0].clip(0, 1) * 255) / 255
        difference = (seen(rotate(file, theta)) - seen(rotate(pixels, theta + gamma))) / NOISE
        for mask, e in zip(masks, bound.parts, strict=True):
            beyond |= np.sqrt(((difference * mask) ** 2).sum((1, 2))) > e
    assert beyond.mean() <= bound.rho < 0.8
    assert len(bound.parts) == len(masks)
    assert bound.value == pytest.approx(np.linalg.norm(bound.parts), rel=1e-9)
    whole = finish(ImageBound(256, 64, quantile=0.9, soft=False).procedure(smoothed, threat, x, Stream(0, 0)))
    assert all(part < whole.value for part in bound.parts)
    assert whole.parts == (whole.value,)


def test_pooled_bound_is_fischers_q_e():
    """q_E against the reference: gamma uniform, theta normal, over the images; a lower bound, and near it."""
    smoothed, threat, images = digits(range(0, 400, 10), step=None)
    error = PooledBound(len(images), draws=64, value=0.9, alpha=1e-3)
    bound = calibrated(error, smoothed, threat, images)
    rng = np.random.default_rng(8)
    inside = []
    for x in images:
        pixels = x[0].double().numpy()
        for _ in range(25):
            gamma = rng.uniform(-20, 20)
            inside.append(reference_defects(pixels, [gamma], rng.normal(0, ANGLE, 1))[0] <= 0.9)
    assert bound.details["q_E"] <= np.mean(inside) + 4 * np.std(inside) / np.sqrt(len(inside))
    assert bound.details["q_E"] > np.mean(inside) - 0.3
    assert (bound.guarantee, bound.value) == ("heuristic", 0.9)
    assert bound.rho == 1 - bound.details["q_E"]
    assert "at random" in bound.details["rests_on"]
    low, high = (
        calibrated(PooledBound(len(images), draws=64, quantile=level), smoothed, threat, images) for level in (0.2, 0.8)
    )
    assert low.value < high.value
    assert low.rho > high.rho


def test_pooled_bound_draws_every_multiple_of_a_step():
    """With a step gamma is one of its multiples, all alike: the pairs' files are files of the threat."""
    smoothed, threat, (x,) = digits((5,))
    pairs = finish(sampled.sample_pairs(smoothed, threat, x, Stream(0, 0), "error-bound", 640))
    quiet = TransformationThreat(Rotation(), -20, 20, step=50.0)  # 0 alone
    assert finish(sampled.sample_pairs(smoothed, quiet, x, Stream(0, 0), "error-bound", 64)).max() < 0.01
    assert 0.1 < (pairs < 0.01).mean() < 0.3  # one multiple in five is 0


def test_assumed_bound_is_heuristic_and_says_so():
    smoothed, threat, (x,) = digits((5,))
    bound = finish(AssumedBound().procedure(smoothed, threat, x, Stream(0, 0)))
    assert (bound.value, bound.rho, bound.guarantee) == (0.0, 0.0, "heuristic")
    assert "without a measurement" in bound.details["rests_on"]
    without = SmoothedClassifier(smoothed.base, 10, Rotation(), None, Gaussian(ANGLE)).eval()
    AssumedBound().check(without, threat)  # nothing to pay for
    with pytest.raises(UncertifiableError, match="noise=gaussian"):
        AssumedBound(0.3).check(without, threat)
    for value in (-1, float("nan"), "0"):
        with pytest.raises(RequestError, match=r"error\.value"):
            AssumedBound(value)


def test_soft_distribution_bound():
    """The inner test is a betting bound of the mean soft excess; q_E as before."""
    rows = np.full((40, 600), 1.0)
    rows[1::2, :60] = 1.5
    soft = fit_on(rows, rho=0.05, quantile=0.5, soft=True)
    cost = (2 * norm.cdf(0.25) - 1) * 0.1  # what a tenth of the draws, .5 beyond E, cost
    assert cost < 0.05
    assert soft.details["q_E"] > 0.5
    assert fit_on(rows, rho=0.05, quantile=0.5).details["q_E"] == 0  # a tenth beyond is too much for the hard form
    with pytest.raises(RequestError, match="soft rho is of one E"):
        DistributionBound(soft=True, partition="halves")
