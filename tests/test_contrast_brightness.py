"""Brightness and contrast together: the values of theory.md section 4, the two-step bounds, and attacks on them."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn

from gsmooth_lightning.certify import AdditiveCertifier
from gsmooth_lightning.certify.transfer import law_transfer
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, Gaussian, Laplace
from gsmooth_lightning.smoothing.contrast_brightness import (
    contrast_brightness_contains,
    contrast_brightness_point,
    contrast_brightness_transfer,
)
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Brightness, BrightnessContrast
from plans import Known, finish

SIGMA = (0.2, 0.2)


def two_step(p, k, b, sigma=SIGMA):
    return float(contrast_brightness_transfer(p, (min(k, 0), -abs(b)), (max(k, 0), abs(b)), sigma))


def exact(p, k, b, sigma=SIGMA):
    value, error = contrast_brightness_point(p, k, b, sigma, tolerance=1e-5)
    return float(value), float(error)


@pytest.mark.parametrize(("factor", "brightness", "by_steps"), [(1.2, 0.428, 0.387), (0.8, 0.408, 0.349)])
def test_radii_of_theory(factor, brightness, by_steps):
    """p = .99, sigma = .2: brightness radius at a contrast, by Neyman-Pearson and by the better of the two orders."""
    k = math.log(factor)
    radius = brentq(lambda b: exact(0.99, k, b)[0] - 0.5, 0.1, 0.6, xtol=1e-4)
    assert radius == pytest.approx(brightness, abs=6e-4)
    assert brentq(lambda b: two_step(0.99, k, b) - 0.5, 0.1, 0.6) == pytest.approx(by_steps, abs=6e-4)


def test_largest_decrease_of_contrast():
    assert brentq(lambda k: exact(0.99, -k, 0)[0] - 0.5, 0.1, 0.6, xtol=1e-4) == pytest.approx(0.444, abs=6e-4)


@pytest.mark.parametrize("k", [-0.4, -0.1, 0.0, 0.15, 0.35])
@pytest.mark.parametrize("b", [0.0, 0.1, 0.3])
def test_two_steps_stay_below_the_exact_value_over_the_whole_box(k, b):
    """The bound for a box is below Neyman-Pearson at every attack in it; without contrast it is the shift's own."""
    for p in (0.7, 0.99):
        bound = two_step(p, k, b)
        for share_k, share_b in itertools.product((0.0, 0.4, 1.0), (-1.0, 0.5, 1.0)):
            value, error = exact(p, share_k * k, share_b * b)
            assert bound <= value + error
        if k == 0:
            assert bound == pytest.approx(norm.cdf(norm.ppf(p) - b / 0.2), abs=1e-12)


def test_the_exact_region_contains_the_two_step_region():
    """On a grid of attacks at pA = .95: nothing certified by steps is outside, and more is inside."""
    grid = torch.cartesian_prod(torch.linspace(-0.35, 0.35, 8), torch.linspace(0, 0.35, 5)).double()
    inside = contrast_brightness_contains(0.95, grid, SIGMA)
    by_steps = torch.tensor([two_step(0.95, float(k), float(b)) > 0.5 for k, b in grid])
    assert (inside | ~by_steps).all()
    assert inside.sum() > by_steps.sum() > 5
    assert not inside.all()


def test_sampled_events_keep_what_is_promised():
    """Half-planes and discs in (K, B), whose mass is counted before and after the attack (the same draws, moved)."""
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(200_000, 2)) * SIGMA
    for k, b in ((-0.3, 0.2), (0.3, -0.2), (0.2, 0.3)):
        moved = np.stack([draws[:, 0] + k, b + np.exp(-k) * draws[:, 1]], 1)
        for _ in range(20):
            w, centre = generator.normal(size=2), generator.normal(size=2) * 0.1
            for measure in (lambda z, w=w: z @ w, lambda z, c=centre: -np.linalg.norm(z - c, axis=1)):
                limit = np.quantile(measure(draws), generator.uniform(0.05, 0.4))
                p, left = (measure(draws) >= limit).mean(), (measure(moved) >= limit).mean()
                assert left >= two_step(p, k, b) - 0.005


class Half(nn.Module):
    """Class 0 where the mean of the image lies below a limit."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        lead = self.limit - x.double().flatten(1).mean(1)
        return torch.stack([lead, -lead], 1)


X = torch.from_numpy(np.random.default_rng(0).integers(40, 200, (1, 6, 6))).float() / 255
THREAT = TransformationThreat(BrightnessContrast(), [-0.3, -0.2], [0.2, 0.2], saved="real")


def smoothed(limit=0.9, law=None, noise=None):
    law = Gaussian([0.2, 0.3]) if law is None else law
    return SmoothedClassifier(Half(limit), 2, BrightnessContrast(), None, law, noise or Gaussian(0.01), block=64).eval()


def test_no_attack_in_the_certified_share_of_the_range_flips():
    """Votes of attacked files, drawn anew at the corners and inside the certified box."""
    classifier = smoothed()
    certifier = AdditiveCertifier(FixedN(100, 4000))
    ((_, certificate),) = certifier.certify(classifier, THREAT, [(0, X)])
    assert (certificate.prediction, certificate.guarantee, certificate.unit) == (0, "sound", "share of the range")
    assert 0.3 < certificate.radius <= 1
    low, high = THREAT.box(certificate.radius)
    for gamma in [*itertools.product(*zip(low, high, strict=True)), (low[0] / 2, high[1])]:
        file = THREAT.apply(X[None], torch.tensor([gamma]))[0]
        votes = finish(classifier.sample(file, Stream(3, 7), "attack", 0, 8000))
        assert votes[0] > votes[1]


def test_the_radius_is_where_the_two_step_bound_meets_one_half():
    classifier = smoothed()
    certificate = finish(AdditiveCertifier(Known(0.95)).procedure(classifier, THREAT, X, Stream(0, 0)))
    share, e = certificate.radius, certificate.details["E"]
    left = law_transfer(BrightnessContrast(), classifier.law, *THREAT.box(share))(0.95 - certificate.details["slack"])
    assert 0 < share < 1
    assert norm.cdf(norm.ppf(left) - e) - 1e-4 == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("law", [Laplace(0.2), Gaussian(covariance=torch.eye(2))])
def test_laws_without_the_theorem_are_refused(law):
    classifier = SmoothedClassifier(Half(0.9), 2, BrightnessContrast(), None, law, Gaussian(0.01))
    with pytest.raises(UncertifiableError, match=r"law\.sigma=\[CONTRAST,BRIGHTNESS\]"):
        AdditiveCertifier(FixedN()).check(classifier.eval(), THREAT)


def test_other_laws_of_one_parameter_do_not_fit_either():
    with pytest.raises(UncertifiableError, match="law=gaussian"):
        AdditiveCertifier(FixedN()).check(smoothed(law=Exponential(2.0)), THREAT)
    one = SmoothedClassifier(Half(0.9), 2, Brightness(), None, Gaussian(0.3), Gaussian(0.01)).eval()
    with pytest.raises(UncertifiableError, match="smoothed over brightness, the threat is brightness and contrast"):
        AdditiveCertifier(FixedN()).check(one, THREAT)
