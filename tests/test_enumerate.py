"""Cyclic translations enumerated: brute force agrees, nothing is sampled, near ties count against the class."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gsmooth_lightning.certify import ABSTAIN, EnumerationCertifier
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.model.fused import InDtype
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Uniform
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Brightness, CyclicTranslation
from plans import finish

SIZE = 7


class Where(nn.Module):
    """Reads the bright pixel's place in a table of classes."""

    def __init__(self, table, logits=True):
        super().__init__()
        self.table, self.logits = torch.as_tensor(table), logits

    def forward(self, x):
        labels = self.table.flatten()[x.flatten(1).argmax(1)]
        return nn.functional.one_hot(labels, 3).float() if self.logits else labels


def one_pixel(row=3, column=2, height=SIZE, width=SIZE):
    x = torch.zeros(1, height, width)
    x[0, row, column] = 1
    return x


def certified(table, law, low=-3, high=3, x=None, logits=True):
    x = one_pixel() if x is None else x
    smoothed = SmoothedClassifier(Where(table, logits), 3, CyclicTranslation(), law=law, block=16).eval()
    threat = TransformationThreat(CyclicTranslation(), low, high, step=1)
    certifier = EnumerationCertifier()
    certifier.check(smoothed, threat)
    return finish(certifier.procedure(smoothed, threat, x, Stream(0, 0)))


def classes_after(table, half, gamma):
    """Brute force: votes of the bright pixel at (3, 2) + gamma + theta, theta in the window."""
    window = range(-half, half + 1)
    places = itertools.product(window, window)
    found = [table[(3 + gamma[0] + a) % SIZE, (2 + gamma[1] + b) % SIZE] for a, b in places]
    return np.bincount(found, minlength=3)


@pytest.mark.parametrize("half", [0, 1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_brute_force_agrees(half, seed):
    """Random tables with a cluster around the pixel: the largest radius whose attacks all keep the class."""
    table = np.random.default_rng(seed).integers(0, 3, (SIZE, SIZE))
    table[1:6, 0:5] = np.where(np.random.default_rng(seed + 9).random((5, 5)) < 0.8, 1, table[1:6, 0:5])
    certificate = certified(table, Uniform(-half - 0.5, half + 0.5))
    clean = classes_after(table, half, (0, 0))
    order = np.sort(clean)
    if order[-1] == order[-2]:
        assert certificate.prediction == ABSTAIN
        return
    top = int(clean.argmax())
    assert certificate.prediction == top
    radius = 0
    for r in range(4):
        attacks = itertools.product(range(-r, r + 1), repeat=2)
        votes = np.array([classes_after(table, half, gamma) for gamma in attacks])
        if not (votes[:, top] > np.delete(votes, top, 1).max(1)).all():
            break
        radius = r
    assert certificate.radius == radius
    assert (certificate.alpha, certificate.guarantee, certificate.unit) == (0.0, "sound", "pixels")


def test_a_law_over_the_whole_torus_is_moved_by_no_attack():
    """Every shift alike, on images that are not square: the vote decides, and the whole range is certified."""
    table = np.random.default_rng(0).integers(0, 3, (5, 8))
    table[:4] = 2
    x = one_pixel(1, 1, 5, 8)
    smoothed = SmoothedClassifier(Where(table), 3, CyclicTranslation(), law=Uniform(-20, 20), block=16).eval()
    threat = TransformationThreat(CyclicTranslation(), -30, 30, step=1)
    certificate = finish(EnumerationCertifier().procedure(smoothed, threat, x, Stream(0, 0)))
    assert (certificate.prediction, certificate.radius) == (2, 30)
    assert certificate.counts == np.bincount(table.flatten(), minlength=3).tolist()
    assert (certificate.n, certificate.evaluations) == (40, 48)


def test_asymmetric_ranges_and_labels_alone():
    table = np.full((SIZE, SIZE), 1)
    table[0] = 2  # three up from the pixel
    whole = certified(table, Uniform(-0.5, 0.5), low=[-2, -3], high=3, logits=False)
    assert whole.radius == 3
    assert certified(table, Uniform(-0.5, 0.5)).radius == 2


class Tied(Where):
    """Two classes nearly tie wherever the table says 2."""

    def forward(self, x):
        labels = super().forward(x).argmax(1)
        logits = nn.functional.one_hot(labels, 3).float()
        logits[labels == 2] = torch.tensor([0.0, 1.0, 1.0 + 1e-6])
        return logits


def test_near_ties_count_against_the_class():
    table = np.full((SIZE, SIZE), 1)
    table[:, 4:] = 2
    smoothed = SmoothedClassifier(Tied(table), 3, CyclicTranslation(), law=Uniform(-3.5, 3.5), block=16).eval()
    threat = TransformationThreat(CyclicTranslation(), -3, 3, step=1)
    certificate = finish(EnumerationCertifier().procedure(smoothed, threat, one_pixel(), Stream(0, 0)))
    assert certificate.details["near_ties"] == 21
    assert certificate.counts == [0, 28, 0]
    assert (certificate.prediction, certificate.radius) == (1, 3)
    table[:, 3:] = 2  # now the ties could outvote it
    smoothed.base.table = torch.as_tensor(table)
    assert finish(EnumerationCertifier().procedure(smoothed, threat, one_pixel(), Stream(0, 0))).prediction == ABSTAIN


def test_what_is_not_enumerated_is_refused():
    table = np.ones((SIZE, SIZE), dtype=int)
    law, threat = Uniform(-0.5, 0.5), TransformationThreat(CyclicTranslation(), -3, 3)
    for arguments, attack, words in (
        ({"transform": CyclicTranslation(), "law": Gaussian(2.0)}, threat, "law=uniform"),
        ({"transform": CyclicTranslation(), "law": law, "noise": Gaussian(0.1)}, threat, "noise=none"),
        ({"transform": Brightness(), "law": law}, threat, "cyclic translations"),
        ({"transform": CyclicTranslation(), "law": law}, PixelThreat(), "cyclic translations"),
        ({"transform": CyclicTranslation(), "law": law, "votes": "soft"}, threat, "votes=hard"),
    ):
        smoothed = SmoothedClassifier(Where(table), 3, **arguments).eval()
        with pytest.raises(UncertifiableError, match=words):
            EnumerationCertifier().check(smoothed, attack)
    half = InDtype(nn.Linear(2, 3), torch.bfloat16)
    with pytest.raises(UncertifiableError, match="dtype=float32"):
        EnumerationCertifier().check(SmoothedClassifier(half, 3, CyclicTranslation(), law=law).eval(), threat)


def test_waveforms_are_refused_before_any_work():
    smoothed = SmoothedClassifier(Where(np.ones(40)), 3, CyclicTranslation(), law=Uniform(-0.5, 0.5), block=16).eval()
    threat = TransformationThreat(CyclicTranslation(), -3, 3, saved="16bit")
    with pytest.raises(RequestError, match="cyclic translation is for images"):
        list(EnumerationCertifier().certify(smoothed, threat, [(0, torch.zeros(1, 40))]))


def test_parts_of_a_pixel_move_by_whole_ones():
    """An attack by 2.6 moves by 3, one by -0.6 by 1: ends of ranges count as what they do."""
    table = np.full((SIZE, SIZE), 1)
    table[0] = 2  # three up from the pixel
    assert certified(table, Uniform(-0.5, 0.5), low=[-2.4, -3], high=3).radius == 3
    assert certified(table, Uniform(-0.5, 0.5), low=[-2.6, -3], high=3).radius == 2
    table[2] = 0  # one up
    assert certified(table, Uniform(-0.5, 0.5), low=[-0.6, -3], high=3).radius == 0
    assert certified(table, Uniform(-0.5, 0.5), low=[-0.4, -3], high=3).radius == 3


class Broken(nn.Module):
    def forward(self, x):
        return torch.full((len(x), 3), float("nan"))


def test_a_broken_network_is_refused():
    smoothed = SmoothedClassifier(Broken(), 3, CyclicTranslation(), law=Uniform(-0.5, 0.5), block=16).eval()
    threat = TransformationThreat(CyclicTranslation(), -3, 3, step=1)
    with pytest.raises(RequestError, match="NaN or infinity"):
        finish(EnumerationCertifier().procedure(smoothed, threat, one_pixel(), Stream(0, 0)))
