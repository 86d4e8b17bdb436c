"""What the latent certificate and its bounds refuse, in one sentence each."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from gsmooth_lightning.certify import AdditiveCertifier, CoverCertifier, JointCertifier, LatentCertifier
from gsmooth_lightning.error import (
    CorollaryBound,
    ImageBound,
    RealDisplacement,
    SurrogateDisplacement,
    imitation,
)
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Uniform
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    Composition,
    Rotation,
)
from plans import Known
from surrogates import (
    IMITATION,
    IMITATIONS,
    THREAT,
    ZOOM,
    Drift,
    bounded,
    every_imitation,
    linear,
    picture,
    refused,
    smoothed_by,
    surrogate,
)


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
