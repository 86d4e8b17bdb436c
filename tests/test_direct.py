"""The direct certificate of exact transformations: classifiers whose flip is known, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import laplace, norm
from torch import nn

from conftest import QUIET, records, run_task
from gsmooth_lightning.certify import ABSTAIN, AdditiveCertifier
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN, GroupSequential
from gsmooth_lightning.preprocess import LowPass, Preprocess
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, Gaussian, Laplace, MixedLinf, Uniform
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Brightness, Contrast, CyclicTranslation, Gamma, GaussianBlur, Rotation, Volume
from plans import Known, finish


class Threshold(nn.Module):
    """Class 0 where a number made of the image exceeds `limit`, class 1 elsewhere."""

    def __init__(self, measure, limit):
        super().__init__()
        self.measure, self.limit = measure, limit

    def forward(self, x):
        lead = self.measure(x.double().flatten(1)) - self.limit
        return torch.stack([lead, -lead], 1)


def rms(x):
    return x.square().mean(1).sqrt()


def mean(x):
    return x.mean(1)


X = torch.from_numpy(np.random.default_rng(0).integers(40, 200, (1, 6, 6))).float() / 255
M, RMS = float(X.double().mean()), float(rms(X.double().flatten()[None]))
GREY = torch.full((1, 6, 6), 0.5)


class Steps(Brightness):
    """Brightness in steps of a size: another size is another transformation."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x, theta):
        return super().forward(x, theta * self.size)


FLIPS = {
    # transform, image, sigma, measure, limit, the parameter at which the base classifier flips (below 0)
    "brightness": (Brightness(), X, 0.3, mean, M - 0.2, -0.2),
    "contrast": (Contrast(), X, 0.4, mean, M * 0.7, math.log(0.7)),
    "volume": (Volume(), X, 3.0, rms, RMS * 0.6, 20 * math.log10(0.6)),
    "gamma, darker": (Gamma(), GREY, 0.5, mean, 0.3, -math.log(math.log(0.3) / math.log(0.5))),
}
"""theory.md section 12: the smoothed classifier flips where the base classifier does, R = distance to it."""


def smoothed_for(name):
    transform, x, sigma, measure, limit, flip = FLIPS[name]
    classifier = SmoothedClassifier(Threshold(measure, limit), 2, transform, law=Gaussian(sigma), block=32).eval()
    return classifier, TransformationThreat(transform, -9, 9, saved="real"), x, sigma, abs(flip)


@pytest.mark.parametrize("name", FLIPS)
def test_radius_of_a_threshold_classifier_is_the_distance_to_its_flip(name):
    """pA = Phi(R / sigma) exactly, so the certified radius is R, less the sampler's slack, and never above."""
    classifier, threat, x, sigma, flip = smoothed_for(name)
    certifier = AdditiveCertifier(Known(float(norm.cdf(flip / sigma))))
    certifier.check(classifier, threat)
    certificate = finish(certifier.procedure(classifier, threat, x, Stream(0, 0)))
    assert certificate.radius <= flip
    assert certificate.radius == pytest.approx(flip, rel=1e-4)
    assert certificate.guarantee == "heuristic"
    assert "real arithmetic" in certificate.details["rests_on"]
    assert (certificate.unit,) == threat.transform.units


@pytest.mark.parametrize("name", FLIPS)
def test_an_attack_within_the_sampled_radius_never_flips(name):
    """Votes really drawn; the attacked image's votes, drawn anew, keep the class up to the radius and flip past R."""
    classifier, threat, x, _, flip = smoothed_for(name)
    ((_, certificate),) = AdditiveCertifier(FixedN(100, 4000, 1e-3)).certify(classifier, threat, [(7, x)])
    assert certificate.prediction == 0
    assert 0.5 * flip < certificate.radius < flip
    sign = -1 if name != "gamma, darker" else 1
    for fraction, expected in ((1.0, 0), (-1.0, 0), (1.15 * flip / certificate.radius, 1)):
        gamma = torch.tensor([[sign * fraction * certificate.radius]], dtype=torch.float32)
        attacked = threat.apply(x[None], gamma)[0]
        votes = finish(classifier.sample(attacked, Stream(3, 7), "attack", 0, 20_000))
        assert votes[:-1].argmax() == expected, f"{fraction} of the radius"


def test_thresholds_of_a_sequential_plan_are_the_fixed_plans_radii():
    """pA just above threshold(r) certifies r and just below does not."""
    classifier, threat, x, sigma, _ = smoothed_for("brightness")
    plan = Known(0.9)
    finish(AdditiveCertifier(plan).procedure(classifier, threat, x, Stream(0, 0)))
    for radius in (0.05, 0.3, 0.8):
        needed = plan.threshold(radius)
        assert needed == pytest.approx(norm.cdf(radius / sigma) + classifier.slack(x), abs=1e-10)
        for change, reached in ((1e-8, True), (-1e-8, False)):
            known = AdditiveCertifier(Known(needed + change))
            certificate = finish(known.procedure(classifier, threat, x, Stream(0, 0)))
            assert (certificate.radius >= radius) == reached


def test_a_sequential_plan_decides_brightness_radii():
    classifier, threat, x, _, _ = smoothed_for("brightness")
    plan = GroupSequential([0.05, 0.15, 0.3], n=4000)
    ((_, certificate),) = AdditiveCertifier(plan).certify(classifier, threat, [(0, x)])
    assert certificate.radius == 0.15


def test_a_radius_ends_where_the_threat_does():
    """At the farther end; nearer ends are ends of the range, not of the radius."""
    classifier, _, x, _, _ = smoothed_for("brightness")
    threat = TransformationThreat(Brightness(), -0.07, 0.05, saved="real")
    certificate = finish(AdditiveCertifier(Known(0.99)).procedure(classifier, threat, x, Stream(0, 0)))
    assert certificate.radius == 0.07


def noisy_brightness(sigma):
    classifier, _, x, _, flip = smoothed_for("brightness")
    laws = {"law": Gaussian(0.3), "noise": Gaussian(sigma)}
    return SmoothedClassifier(classifier.base, 2, Brightness(), block=32, **laws).eval(), x, flip


@pytest.mark.parametrize("sigma", [0.003, 0.1])
def test_gaussian_noise_beside_the_law_makes_the_certificate_sound(sigma):
    """Rounding to the grids and to float32 costs 1e-4 to 1e-2 of sigma: next to nothing of the radius."""
    noisy, x, flip = noisy_brightness(sigma)
    threat = TransformationThreat(Brightness(), -0.5, 0.5, saved="real")
    certifier = AdditiveCertifier(Known(float(norm.cdf(flip / 0.3))))
    certifier.check(noisy, threat)
    certificate = finish(certifier.procedure(noisy, threat, x, Stream(0, 0)))
    assert certificate.guarantee == "sound"
    assert certificate.radius <= flip
    assert certificate.radius == pytest.approx(flip, rel=2e-3)
    assert 0 < certificate.details["E"] < 2e-3
    assert certificate.details["rho"] == 1e-4
    size = math.sqrt(
        (norm.ppf(norm.cdf(flip / 0.3) - noisy.slack(x)) - norm.ppf(0.5 + 1e-4)) ** 2 - certificate.details["E"] ** 2
    )
    assert certificate.radius == pytest.approx(0.3 * size, rel=1e-9)


def test_files_that_round_cost_what_they_move():
    """8-bit files of a blurred image: half a step a pixel, over sigma."""
    classifier = SmoothedClassifier(Threshold(mean, 0.5), 2, GaussianBlur(), law=Exponential(0.1), noise=Gaussian(0.2))
    radii = {}
    for saved in ("real", "8bit"):
        threat = TransformationThreat(GaussianBlur(), 0, 9, saved=saved)
        AdditiveCertifier(FixedN()).check(classifier.eval(), threat)
        known = AdditiveCertifier(Known(0.7))
        certificate = finish(known.procedure(classifier, threat, X, Stream(0, 0)))
        radii[saved], e = certificate.radius, certificate.details["E"]
        left = norm.cdf(norm.ppf(1 - (0.3 + classifier.slack(X)) * math.exp(0.1 * certificate.radius)) - e) - 1e-4
        assert left == pytest.approx(0.5, abs=1e-6)
    assert e == pytest.approx(6 * 0.5 / 255 / 0.2, rel=0.01)
    assert radii["8bit"] < 0.99 * radii["real"]


def test_blur_of_one_mode_flips_where_it_must():
    """theory.md section 12: amplitude A exp(-v lambda / 2) above c until v = t; under Exp(L) the smoothed classifier
    flips at t - ln 2 / L, and that is what is certified."""
    mode = torch.cos(torch.pi / 12 * 2 * (torch.arange(12.0) + 0.5)).expand(1, 12, 12)
    rate, level, tail = 2 - 2 * math.cos(math.pi * 2 / 12), 0.5, 0.2
    x = 0.5 + 0.4 * mode

    def amplitude(rows):
        return ((rows.view(-1, 12, 12) - 0.5) * mode[0].double()).sum((1, 2)) / float(mode.square().sum())

    flip = 2 * math.log(0.4 / (level * 0.4)) / rate
    classifier = SmoothedClassifier(Threshold(amplitude, level * 0.4), 2, GaussianBlur(), law=Exponential(tail)).eval()
    threat = TransformationThreat(GaussianBlur(), 0, 50, saved="real")
    certifier = AdditiveCertifier(Known(1 - math.exp(-tail * flip)))  # P(v < t)
    certifier.check(classifier, threat)
    radius = finish(certifier.procedure(classifier, threat, x, Stream(0, 0))).radius
    assert flip - math.log(2) / tail > 1
    assert radius <= flip - math.log(2) / tail
    assert radius == pytest.approx(flip - math.log(2) / tail, rel=1e-4)
    for v, expected in ((0.97 * radius, 0), (1.05 * radius, 1)):
        votes = finish(
            classifier.sample(threat.apply(x[None], torch.tensor([[v]]))[0], Stream(1, 0), "attack", 0, 20_000)
        )
        assert votes[:-1].argmax() == expected


class OnePixel(nn.Module):
    """Class 0 while one pixel stays below a limit: the worst case of an l1 attack."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        lead = self.limit - x[:, 0, 2, 3].double()
        return torch.stack([lead, -lead], 1)


@pytest.mark.parametrize(
    ("noise", "norm", "factor"),
    [
        (Gaussian(0.2), "l2", 1),
        (Gaussian(0.2), "l1", 1),
        (Gaussian(0.2), "linf", 1 / 4),
        (Laplace(0.2), "l1", 1),
        (Laplace(0.2), "l2", 1 / 4),
        (Laplace(0.2), "linf", 1 / 16),
    ],
)
def test_radii_in_other_norms_are_inscribed_balls(noise, norm, factor):
    """16 pixels: l_inf is l2 / 4 and l1 / 16; an l1 ball lies in the l2 ball of the same radius."""
    x = torch.full((1, 4, 4), 51 / 255)
    smoothed = SmoothedClassifier(OnePixel(0.5), 2, noise=noise, block=32).eval()
    certifier = AdditiveCertifier(Known(0.95))
    own, other = (
        finish(certifier.procedure(smoothed, PixelThreat(norm=n), x, Stream(0, 0))).radius for n in (noise.norm, norm)
    )
    certifier.check(smoothed, PixelThreat(norm=norm))
    assert other == pytest.approx(factor * own, rel=1e-9)
    assert other <= factor * own * (1 + 1e-13)


@pytest.mark.parametrize(("law", "pa"), [(Laplace(0.2), laplace.cdf(1.5)), (Uniform(-0.5, 0.5), 0.5 + 0.3)])
def test_l1_radius_is_the_distance_of_the_one_pixel(law, pa):
    """pA = F(d / b), and 1/2 + d for the box: the certified l1 radius is d."""
    x = torch.full((1, 4, 5), 51 / 255)
    d = 0.3
    smoothed = SmoothedClassifier(OnePixel(51 / 255 + d), 2, noise=law, block=32).eval()
    certifier = AdditiveCertifier(Known(float(pa)))
    certifier.check(smoothed, PixelThreat(norm="l1"))
    certificate = finish(certifier.procedure(smoothed, PixelThreat(norm="l1"), x, Stream(0, 0)))
    assert certificate.unit == "l1"
    assert certificate.radius == pytest.approx(d, rel=1e-4)
    assert certificate.radius <= d
    floats = finish(certifier.procedure(smoothed, PixelThreat("float", norm="l1"), x, Stream(0, 0))).radius
    assert certificate.radius - floats == pytest.approx(1.1 * 20 / smoothed.levels, rel=1e-3)
    ((_, sampled),) = AdditiveCertifier(FixedN(100, 4000)).certify(smoothed, PixelThreat(norm="l1"), [(0, x)])
    assert 0.7 * d < sampled.radius < d


@pytest.mark.parametrize(
    ("noise", "norm", "words"),
    [
        (Exponential(3.0), "l1", "no radius in l1; use noise=laplace"),
        (Exponential(3.0), "l2", "no radius in l2; use noise=gaussian"),
        (Gaussian(covariance=torch.eye(3)), "l2", "full covariance"),
        (None, "l1", "no radius in l1"),
    ],
)
def test_noise_without_a_radius_in_the_norm_is_refused(noise, norm, words):
    classifier = SmoothedClassifier(OnePixel(0.5), 2, noise=noise).eval()
    with pytest.raises(UncertifiableError, match=words):
        AdditiveCertifier(FixedN()).check(classifier, PixelThreat(norm=norm))


def test_blur_has_no_negative_variances():
    """Neither drawn nor attacked."""
    classifier = SmoothedClassifier(Threshold(mean, 0.5), 2, GaussianBlur(), law=Uniform(0, 4)).eval()
    AdditiveCertifier(FixedN()).check(classifier, TransformationThreat(GaussianBlur(), 0, 5, saved="real"))
    with pytest.raises(RequestError, match=r"no parameters below 0; set threat\.low"):
        TransformationThreat(GaussianBlur(), -1, 5, saved="real")
    with pytest.raises(RequestError, match="no parameters below 0; choose a one-sided law"):
        SmoothedClassifier(Threshold(mean, 0.5), 2, GaussianBlur(), law=Gaussian(0.3))
    with pytest.raises(RequestError, match="must be finite"):
        TransformationThreat(GaussianBlur(), 0, math.inf, saved="real")


def test_l1_through_preprocessing_is_refused():
    classifier = SmoothedClassifier(OnePixel(0.5), 2, noise=Laplace(0.3), preprocess=Preprocess([LowPass(3)])).eval()
    with pytest.raises(UncertifiableError, match="preprocess=none"):
        AdditiveCertifier(FixedN()).check(classifier, PixelThreat(norm="l1"))
    with pytest.raises(RequestError, match=r"threat\.norm must be l1, l2 or linf"):
        PixelThreat(norm="l7")


def test_a_one_sided_law_certifies_no_negative_shift():
    classifier = SmoothedClassifier(Threshold(mean, 0.5), 2, Brightness(), law=Exponential(3.0)).eval()
    with pytest.raises(UncertifiableError, match=r"set threat\.low=0"):
        AdditiveCertifier(FixedN()).check(classifier, TransformationThreat(Brightness(), -0.5, 0.5, saved="real"))
    AdditiveCertifier(FixedN()).check(classifier, TransformationThreat(Brightness(), 0, 0.5, saved="real"))


@pytest.mark.parametrize(
    ("transform", "threat", "words"),
    [
        (Brightness(), TransformationThreat(Brightness(), -0.5, 0.5), "clipped in files saved with 8 bits"),
        (Brightness(), TransformationThreat(Brightness(), -0.5, 0.5, saved="float"), "threat.saved=real"),
        (Contrast(), TransformationThreat(Brightness(), -0.5, 0.5, saved="real"), "smoothed over contrast"),
        (Steps(1.0), TransformationThreat(Steps(10.0), -0.5, 0.5, saved="real"), "same settings"),
        (Rotation(), TransformationThreat(Rotation(), -5, 5, saved="real"), "certify=joint"),
        (Brightness(), PixelThreat(saved="real"), "transform=identity"),
    ],
)
def test_what_is_not_exact_is_refused(transform, threat, words):
    classifier = SmoothedClassifier(Threshold(mean, 0.5), 2, transform, law=Gaussian(0.3), noise=Gaussian(0.1)).eval()
    with pytest.raises(UncertifiableError, match=words):
        AdditiveCertifier(FixedN()).check(classifier, threat)


def test_rounding_without_noise_is_refused():
    for transform, saved in ((Volume(), "16bit"), (Gamma(), "8bit"), (GaussianBlur(), "float")):
        law = Exponential(0.1) if transform.lowest == 0 else Gaussian(0.3)
        bare = SmoothedClassifier(Threshold(mean, 0.5), 2, transform, law=law).eval()
        threat = TransformationThreat(transform, 0, 3, saved=saved)
        with pytest.raises(UncertifiableError, match="use noise=gaussian"):
            AdditiveCertifier(FixedN()).check(bare, threat)
        for noise, words in ((Laplace(0.1), "only Gaussian pixel noise"), (Gaussian(0.1), None)):
            noisy = SmoothedClassifier(Threshold(mean, 0.5), 2, transform, law=law, noise=noise).eval()
            if words is None:
                AdditiveCertifier(FixedN()).check(noisy, threat)
                continue
            with pytest.raises(UncertifiableError, match=words):
                AdditiveCertifier(FixedN()).check(noisy, threat)


def test_real_values_are_not_clipped():
    threat = TransformationThreat(Brightness(), -2, 2, saved="real")
    x = torch.tensor([[[[0.1234567, 0.9]]]])
    torch.testing.assert_close(threat.apply(x, torch.tensor([[1.5]])), x + 1.5, atol=0, rtol=0)
    assert "float32 numbers, not clipped" in threat.describe()
    with pytest.raises(RequestError, match="between -1 and 1"):
        threat.prepare(x * 200)


def test_certified_through_the_commands(here):
    """Trained under random brightness, certified for it: the table is in its unit."""
    options = (*QUIET, "transform=brightness", "threat=brightness", "law.sigma=0.2", "noise=none", "error=none")
    options = (*options, "preprocess=none", "certify=direct")
    checkpoint = run_task("train", *options, "train.epochs=8", "store=trained")
    run_task("certify", *options, f"checkpoint={checkpoint}", "sampling.n=200", "images.first=12", "store=run")
    found = records(here / "run")
    assert {r["unit"] for r in found} == {"brightness"}
    assert sum(r["prediction"] == r["label"] for r in found) >= 9
    assert max(r["radius"] for r in found) > 0.3


def test_parts_of_a_pixel_cost_whole_ones():
    """Cyclic translation by .6 moves a pixel: below .5 nothing moves, from there on it costs 1 / sigma."""
    classifier = SmoothedClassifier(OnePixel(0.5), 2, CyclicTranslation(), law=Gaussian(2.0)).eval()
    threat = TransformationThreat(CyclicTranslation(), -3, 3)
    x = torch.zeros(1, 5, 5)
    for pa, radius in ((norm.cdf(0.6 / math.sqrt(2)), 0.5), (norm.cdf(math.sqrt(2) / 2) + 1e-4, 1.5)):
        certificate = finish(AdditiveCertifier(Known(float(pa))).procedure(classifier, threat, x, Stream(0, 0)))
        assert certificate.guarantee == "sound"
        assert certificate.radius == pytest.approx(radius, rel=1e-6)
        assert certificate.radius < radius


def test_cyclic_shifts_are_drawn_in_whole_pixels_however_wide_their_law():
    """A classifier by the parity of a bright pixel's row: a wide law makes both classes alike. Drawn in multiples of 16
    pixels, shifts leave the row of an image of 8 where it is, and an attack by one pixel flips what is certain then."""
    parity = Threshold(lambda x: (x.view(-1, 8, 8).sum(2).argmax(1) % 2).double(), 0.5)
    classifier = SmoothedClassifier(parity, 2, CyclicTranslation(), law=Gaussian(1e9)).eval()
    x = torch.zeros(1, 8, 8)
    x[0, 0, 0] = 1
    threat = TransformationThreat(CyclicTranslation(), -3, 3)
    ((_, found),) = AdditiveCertifier(FixedN(n=1000)).certify(classifier, threat, [(0, x)])
    assert (found.prediction, min(found.counts) > 400) == (ABSTAIN, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"law": Gaussian(300.0)}, "no finite bound"),
        ({"transform": CyclicTranslation(), "law": MixedLinf(2.0, 0, [2], draws=2000)}, "estimated"),
        ({"noise": Gaussian([0.3, 0.3])}, "does not fit"),
    ],
)
def test_laws_that_cannot_be_are_refused_in_one_sentence(change, words):
    parts = {"transform": Contrast(), "law": Gaussian(0.3), "noise": Gaussian(0.1), "block": 32} | change
    classifier = SmoothedClassifier(Threshold(mean, 0.5), 2, **parts).eval()
    threat = TransformationThreat(parts["transform"], -0.5, 0.5, saved="real")
    with pytest.raises(RequestError, match=words):
        list(AdditiveCertifier(FixedN()).certify(classifier, threat, [(0, X)]))


def test_images_only():
    for transform, law in ((GaussianBlur(), Exponential(0.1)), (CyclicTranslation(), Gaussian(1.0))):
        classifier = SmoothedClassifier(Threshold(mean, 0.5), 2, transform, law=law, noise=Gaussian(0.1)).eval()
        threat = TransformationThreat(transform, 0, 3, saved="16bit")
        with pytest.raises(RequestError, match="is for images"):
            list(AdditiveCertifier(FixedN()).certify(classifier, threat, [(0, torch.zeros(1, 40))]))
    with pytest.raises(RequestError, match=r"threat\.size enlarges images"):
        PixelThreat("16bit", size=9).prepare(torch.zeros(2, 1, 40))


class Copies(nn.Module):
    """16 x 16 copies of each pixel, a sixteenth each: l2 distances stay, l1 distances grow sixteenfold."""

    lipschitz = 1.0

    def forward(self, x):
        return x.repeat_interleave(16, 2).repeat_interleave(16, 3) / 16


def test_norms_are_converted_where_the_noise_is():
    """Laplace noise on the copies: an l2 change by r of the pixel is one of 16 r in l1 where the noise is added."""
    pa, b = 0.9, 0.05
    base = nn.Sequential(nn.Flatten(), nn.Linear(256, 2)).eval()
    smoothed = SmoothedClassifier(base, 2, preprocess=Preprocess([Copies()]), noise=Laplace(b)).eval()
    certifier = AdditiveCertifier(Known(pa))
    certifier.check(smoothed, PixelThreat(saved="float"))
    certificate = finish(
        certifier.procedure(smoothed, PixelThreat(saved="float"), torch.full((1, 1, 1), 0.5), Stream(0, 0))
    )
    assert 0 < certificate.radius <= -b * math.log(2 * (1 - pa)) / 16
