"""Compositions of exact transformations: which exist, how their laws join, and attacks inside their boxes."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import expon, norm
from torch import nn

from gsmooth_lightning.certify import AdditiveCertifier
from gsmooth_lightning.certify.transfer import law_transfer
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, Gaussian, Product
from gsmooth_lightning.smoothing.neyman_pearson import neyman_pearson
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    BrightnessContrast,
    Composition,
    Contrast,
    CyclicTranslation,
    Gamma,
    GaussianBlur,
    Rotation,
    Volume,
)
from gsmooth_lightning.transform.compose import COMMUTE
from plans import finish

LARGE = {GaussianBlur: 9.0, CyclicTranslation: 4.0}
ALL = (Brightness, BrightnessContrast, Contrast, CyclicTranslation, Gamma, GaussianBlur, Volume)


def apart(a, b):
    """Largest difference between the two orders of two transformations, over parameters of both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 9, 7, generator=generator, dtype=torch.float64)
    theta, other = (
        torch.rand(40, t.dim, generator=generator, dtype=torch.float64) * LARGE.get(type(t), 0.7) for t in (a, b)
    )
    return float((b(a(x, theta), other) - a(b(x, other), theta)).abs().max())


@pytest.mark.parametrize(("first", "second"), itertools.combinations(ALL, 2))
def test_pairs_that_compose_commute_and_pairs_that_do_not_are_refused(first, second):
    """Measured, not believed: every allowed pair commutes to 1e-12. Volume is for waveforms, which have no other."""
    parts = [first(), second()]
    if frozenset((first, second)) in COMMUTE:
        assert apart(*parts) < 1e-12
        Composition(parts)
        return
    assert apart(*parts) > 0.01 or second is Volume or {first, second} == {CyclicTranslation, Gamma}
    for order in (parts, parts[::-1]):
        with pytest.raises(RequestError, match="do not commute"):
            Composition(order)


def test_other_compositions_are_refused():
    for parts, words in (
        ([GaussianBlur()], "two parts or more"),
        ([GaussianBlur(), GaussianBlur()], "do not commute"),
        ([Brightness(), Rotation()], "put brightness or contrast after"),
        ([Rotation(), Rotation()], "do not commute"),
        ([GaussianBlur(), Brightness(), Contrast()], "brightness and contrast do not commute"),
        ([GaussianBlur(), CyclicTranslation(), Brightness()], "do not commute"),
    ):
        with pytest.raises(RequestError, match=words):
            Composition(parts)


def test_compositions_resolve():
    both = Composition([GaussianBlur(), BrightnessContrast()])
    assert both.units == ("variance, pixels^2", "log contrast", "brightness")
    assert both.name == "Gaussian blur, then brightness and contrast"
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(9, 3, 8, 8, generator=generator, dtype=torch.float64)
    alpha, beta = (torch.rand(9, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(both(both(x, alpha), beta), both(x, both.resolve(alpha, beta)), atol=1e-12, rtol=0)
    torch.testing.assert_close(both(x, 0 * alpha), x, atol=1e-12, rtol=0)


def test_exponential_and_gaussian_parts_meet_the_quadrature():
    """theory.md section 4: T_2(T_1(p)) for Exp, then Gaussian, is exactly the joint Neyman-Pearson value."""
    rate, sigma, shift = 0.5, 0.3, (0.6, 0.25)
    law = Product([Exponential(rate), Gaussian(sigma)])
    both = Composition([GaussianBlur(), Brightness()])

    def log_density(z, by=(0.0, 0.0)):
        a = torch.from_numpy(expon.logpdf(z[:, 0].numpy() - by[0], scale=1 / rate))
        return a + torch.from_numpy(norm.logpdf(z[:, 1].numpy() - by[1], scale=sigma))

    kinks = np.unique(np.concatenate([np.linspace(0, 70, 60), [shift[0]], np.linspace(0, 6, 40)]))
    edges = [kinks, np.linspace(-3, 3.3, 80)]
    for p in (0.7, 0.95):
        value, error = neyman_pearson(log_density, lambda z: log_density(z, shift), p, edges, 1e-5)
        ours = float(law_transfer(both, law, (0.0, -0.1), shift)(p))
        assert ours == pytest.approx(float(value), abs=2e-4)
        assert ours <= float(value) + float(error)


def test_gaussian_parts_add_as_squares():
    law = Product([Gaussian(2.0), Gaussian(0.3)], dims=[2, 1])
    both = Composition([CyclicTranslation(), Brightness()])
    size = math.hypot(math.hypot(3, 1) / 2, 0.2 / 0.3)
    left = law_transfer(both, law, (-3.0, 0.0, -0.2), (1.0, 1.0, 0.1))(0.99)
    assert left == pytest.approx(norm.cdf(norm.ppf(0.99) - size), abs=1e-12)


def test_products_sample_their_parts_and_state_their_ends():
    law = Product([Exponential(0.5), Gaussian([0.2, 0.3])], dims=[1, 2])
    draws = law.sample(Stream(0, 0).at("estimate", 0), 40_000, (3,))
    assert draws.shape == (40_000, 3)
    torch.testing.assert_close(draws.mean(0), draws.new_tensor([2.0, 0, 0]), atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(0), draws.new_tensor([2.0, 0.2, 0.3]), atol=0.05, rtol=0)
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.02
    low, high = law.within(0.01, 3)
    assert ((draws < low) | (draws > high)).any(1).double().mean() < 0.01
    z = torch.tensor([[1.0, 0.1, -0.2], [-1.0, 0, 0]])
    expected = expon.logpdf(1.0, scale=2) + norm.logpdf(0.1, scale=0.2) + norm.logpdf(-0.2, scale=0.3)
    assert float(law.log_density(z)[0]) == pytest.approx(expected, rel=1e-6)
    assert law.log_density(z)[1] == -math.inf
    with pytest.raises(RequestError, match=r"law\.dims"):
        law.sample(Stream(0, 0).at("estimate", 0), 2, (2,))
    with pytest.raises(RequestError, match="two laws or more"):
        Product([Gaussian(1.0)])
    for refused in (law.reach, lambda s: law.transfer(0.9, s), law.gauge):
        with pytest.raises(RequestError, match="product of laws"):
            refused(1.0)


class Mean(nn.Module):
    """Class 0 where the mean of the left half exceeds that of the right by a limit."""

    def forward(self, x):
        left, right = x.double().flatten(1, 2).tensor_split(2, -1)
        lead = left.mean((1, 2)) - right.mean((1, 2)) - 0.1
        return torch.stack([lead, -lead], 1)


def test_no_attack_in_the_certified_share_flips():
    both = Composition([GaussianBlur(), Contrast()])
    law = Product([Exponential(0.2), Gaussian(0.4)])
    classifier = SmoothedClassifier(Mean(), 2, both, None, law, Gaussian(0.02), block=64).eval()
    threat = TransformationThreat(both, [0, -0.9], [9, 0.9], saved="real")
    x = torch.full((1, 8, 8), 0.2)
    x[..., :4] = 0.8
    ((_, certificate),) = AdditiveCertifier(FixedN(100, 4000)).certify(classifier, threat, [(0, x)])
    assert (certificate.prediction, certificate.guarantee) == (0, "sound")
    assert 0.2 < certificate.radius < 1
    low, high = threat.box(certificate.radius)
    for gamma in itertools.product(*zip(low, high, strict=True)):
        file = threat.apply(x[None], torch.tensor([gamma]))[0]
        votes = finish(classifier.sample(file, Stream(5, 1), "attack", 0, 8000))
        assert votes[0] > votes[1]


@pytest.mark.parametrize(
    ("parts", "law", "low", "words"),
    [
        ([CyclicTranslation(), Brightness()], Gaussian(0.3), 0, "a law for each part"),
        ([GaussianBlur(), Brightness()], Product([Exponential(1.0), Exponential(3.0)]), [0, -1], "no negative"),
    ],
)
def test_laws_that_do_not_fit_the_parts_are_refused(parts, law, low, words):
    both = Composition(parts)
    classifier = SmoothedClassifier(Mean(), 2, both, None, law, Gaussian(0.02)).eval()
    with pytest.raises(UncertifiableError, match=words):
        AdditiveCertifier(FixedN()).check(classifier, TransformationThreat(both, low, 1, saved="real"))


def test_parts_without_negative_parameters_keep_that():
    both = Composition([Brightness(), GaussianBlur()])
    for law in (Product([Gaussian(0.3), Gaussian(3.0)]), Gaussian(0.3)):
        with pytest.raises(RequestError, match="no parameters below 0; choose a one-sided law"):
            SmoothedClassifier(Mean(), 2, both, None, law)
    SmoothedClassifier(Mean(), 2, both, None, Product([Gaussian(0.3), Exponential(3.0)]))
    with pytest.raises(RequestError, match=r"no parameters below 0; set threat\.low"):
        TransformationThreat(both, [-1, -0.5], 1, saved="real")
    TransformationThreat(both, [-1, 0], 1, saved="real")


def test_laws_for_another_number_of_parameters_are_refused():
    both = Composition([GaussianBlur(), BrightnessContrast()])
    with pytest.raises(RequestError, match=r"for 2 parameters, not 3; set law\.dims"):
        SmoothedClassifier(Mean(), 2, both, None, Product([Exponential(1.0), Gaussian(0.3)]))
    with pytest.raises(RequestError, match="2 sigmas for 1 parameters"):
        SmoothedClassifier(Mean(), 2, Brightness(), None, Gaussian([0.1, 0.2]))


def test_a_product_is_for_compositions():
    law = Product([Gaussian(0.3), Gaussian(0.3)])
    classifier = SmoothedClassifier(Mean(), 2, BrightnessContrast(), None, law, Gaussian(0.02)).eval()
    with pytest.raises(UncertifiableError, match="one law"):
        AdditiveCertifier(FixedN()).check(classifier, TransformationThreat(BrightnessContrast(), -1, 1, saved="real"))
