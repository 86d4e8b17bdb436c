"""Movements of slices, against real files."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from covers import FILTERS, ROTATION, WIDTHS, digits, farness, images, moved, no_file_moves_farther, slices, visiting
from gsmooth_lightning.certify import CoverCertifier
from gsmooth_lightning.certify.cover import Cover
from gsmooth_lightning.error.movement import middle_images, movements, saved_error
from gsmooth_lightning.preprocess import DiscVignette, LowPass
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import (
    Additive,
    Mover,
    Rotation,
    Translation,
)
from gsmooth_lightning.transform.geometric import INTERPOLATIONS
from plans import finish
from steps import Gain


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("transform", WIDTHS)
def test_no_real_file_moves_farther(transform, interpolation):
    """Thousands of files in three formats through five filters: what is encoded is never farther from the middle than
    the bound."""
    psi, tried = transform(interpolation), 0
    for saved, width in (("8bit", 0.03), ("float", 0.3), ("real", 0.03)):
        threat = TransformationThreat(psi, -1.0, 1.0, saved=saved)
        low, high = slices(psi, 4, width)
        tried += no_file_moves_farther(threat, images(), low, high, 20)
    assert tried > 4000


@pytest.mark.parametrize("transform", [Rotation, Translation])
def test_colour_and_oblong_images(transform):
    """Three channels, 9x14 pixels."""
    psi = transform()
    threat, smoothed = TransformationThreat(psi, -1.0, 1.0), visiting(FILTERS["disc and low-pass"])
    low, high = slices(psi, 6, 0.05)
    for x in threat.prepare(images(9, 14, 3)):
        bounds, found = farness(smoothed, threat, x, low, high, 30)
        assert (found <= bounds[:, None]).all()


@pytest.mark.parametrize("transform", WIDTHS)
def test_movements_of_narrow_bilinear_slices_are_nearly_attained(transform):
    """Digits with a disc and a low-pass: at most 1.25 times the farthest file (2 of two parameters), as wide as the
    certificate cuts them."""
    psi = transform()
    threat = TransformationThreat(psi, -WIDTHS[transform], WIDTHS[transform], saved="real")
    smoothed = visiting([DiscVignette(), LowPass(5)], sigma=0.5)
    (x,) = threat.prepare(digits(0))
    certificate = Cover(CoverCertifier(), smoothed, threat, x, Stream(0, 0), 0, 0.0)
    pieces = finish(certificate.cut(torch.zeros(psi.dim).double(), torch.tensor(threat.highs).double(), 0))[::5]
    low, high = torch.stack([s.low for s in pieces]), torch.stack([s.high for s in pieces])
    bounds, files = farness(smoothed, threat, x, low, high, 20)
    found = files.amax(1)
    assert (found <= bounds).all()
    assert (bounds / found).median() < (1.25 if psi.dim == 1 else 2.0)
    assert found.median() > 0.1


def test_an_l2_ball_adds_what_preprocessing_makes_of_it():
    psi, (low, high) = Rotation(), slices(Rotation(), 3, 0.03)
    for gain in (1.0, 2.0):
        smoothed, x = visiting([Gain(gain)]), images()[0]
        plain, more = (
            movements(smoothed, TransformationThreat(psi, -1, 1, saved="real", l2=r), psi, x, low, high)
            for r in (0.0, 0.3)
        )
        assert torch.equal(plain[:, 0], more[:, 0])
        assert torch.allclose(more[:, 1] - plain[:, 1], torch.full((3,), 0.3 * gain, dtype=torch.float64))


class Rise(Additive, Mover):
    """Two pixels that rise evenly, 2 theta - .8 and .2 theta: the first is clipped but for theta from .4 to .9."""

    units = ("units",)
    name = "rise"
    exact = False

    def forward(self, x, theta):
        return x + theta[:, :, None, None] * torch.tensor([2.0, 0.2])

    def departure(self, x, low, high):
        return torch.zeros(len(low), *x.shape, dtype=torch.float64)


class Difference(nn.Module):
    """The first pixel less the second."""

    linear, lipschitz = True, math.sqrt(2)

    def forward(self, x):
        return x[..., :1] - x[..., 1:]


def test_where_clipping_begins_between_nodes_is_covered():
    """The difference of the pixels is farthest from the middle where clipping begins, at no node of the grid."""
    psi, x = Rise(), torch.tensor([[[-0.8, 0.0]]])
    threat, smoothed = TransformationThreat(psi, 0.0, 1.0, saved="float"), visiting([Difference()])
    ends = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    bound = movements(smoothed, threat, psi, x, *ends)[0]
    (middle,) = middle_images(threat, psi, x, *ends)
    found = [
        moved(smoothed, threat, x, torch.tensor(at)[:, None], middle).max() for at in ([0.0, 0.25, 0.75, 1.0], [0.9])
    ]
    assert found[0] + bound[1] < found[1] <= bound.sum()


@pytest.mark.parametrize("saved", ["float", "8bit"])
def test_what_files_round_of_values_between_two(saved):
    """Half a step where a value half way between two levels is possible, and less elsewhere."""
    random, threat = (
        np.random.default_rng(0),
        ROTATION if saved == "8bit" else TransformationThreat(Rotation(), -1, 1, saved=saved),
    )
    least = torch.tensor(random.random(500) * 0.99)
    most = least + torch.tensor(random.random(500) * 0.004)
    values = (least + (most - least) * torch.linspace(0, 1, 400)[:, None]).float()
    bound = saved_error(threat, least, most)
    changed = (threat.save(values.clone()).double() - values).abs().amax(0)
    assert (changed <= bound + 2.0**-24).all()
    assert (changed >= bound * 0.9 - 2.0**-23).all()
