"""The maximum over gamma by chords: bounds against attackers who search gamma on real files, and against intervals."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import attackers
from attackers import attack, bound, chords_are_near, defects, draws, whole
from covers import images
from gsmooth_lightning.data import Digits
from gsmooth_lightning.error import DistributionBound, ImageBound, chords, sampled
from gsmooth_lightning.error.base import pair_norms
from gsmooth_lightning.error.interval import interval_defects
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.preprocess import DiscVignette, GaussianLowPass, LowPass, Preprocess, RectangleVignette, Resize
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, partition_masks
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    Composition,
    Rotation,
    Scaling,
    Shear,
    Similarity,
    Translation,
    Volume,
)
from gsmooth_lightning.transform.geometric import INTERPOLATIONS
from pictures import real_images
from plans import finish
from steps import SoftClip

REAL = real_images()
LIMITS = {Rotation: 6.0, Scaling: 0.1, Shear: 0.1, Translation: 0.6}


class Glare(nn.Module):
    """What is brighter than 0.9: a 1-Lipschitz step that is not linear, and blind to darker images."""

    lipschitz = 1.0

    def forward(self, x):
        return (x - 0.9).relu()


FILTERS = {
    "nothing": [],
    "disc and low-pass": [DiscVignette(), LowPass(3)],
    "blur": [GaussianLowPass(0.8)],
    "frame": [RectangleVignette(1)],
    "soft clip": [DiscVignette(), SoftClip()],
}


def case(transform, *options, limit=None, **more):
    """A case of `attackers`, with the range in LIMITS unless there is another."""
    return attackers.case(transform, limit or LIMITS[transform], *options, **more)


# ---------------------------------------------------------------- attacked


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("transform", LIMITS)
def test_no_gamma_exceeds_the_bound(transform, interpolation, filters):
    """Files of every format, on noise, checkerboards and a smooth disc, against a search of gamma."""
    formats = ("8bit", "float", "real") if filters in ("nothing", "soft clip") else ("8bit",)
    for saved in formats:
        smoothed, threat = case(transform, interpolation, FILTERS[filters], saved)
        for x in images(6, 6)[: 2 if transform is Translation else 3]:
            x = 2 * x - 1 if saved == "real" else x
            x = threat.prepare(x[None])[0]
            theta = draws(smoothed, 2 if transform is Translation else 3)
            proved = bound(smoothed, threat, x, theta)
            assert torch.isfinite(proved).all()
            assert (attack(smoothed, threat, x, theta) <= proved).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 5), (2, 7, 4), (3, 5, 5)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_other_shapes(interpolation, shape):
    """One pixel, images that are not square, several channels."""
    channels, h, w = shape
    for transform in (Rotation, Scaling):
        smoothed, threat = case(transform, interpolation)
        for x in images(h, w, channels)[:2]:
            x, theta = threat.prepare(x[None])[0], draws(smoothed)
            assert (attack(smoothed, threat, x, theta) <= bound(smoothed, threat, x, theta)).all()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_clipped_files_and_large_parameters(interpolation):
    """Black and white stripes, where bicubic files are clipped; angles of several turns."""
    x = (torch.arange(7) % 3 == 0).float().expand(1, 7, 7).clone()
    for saved in ("8bit", "float"):
        smoothed, threat = case(Rotation, interpolation, [DiscVignette()], saved)
        theta = torch.tensor([[0.0], [700.0], [-361.5], [90.0]], dtype=torch.float64)
        assert (attack(smoothed, threat, x, theta) <= bound(smoothed, threat, x, theta)).all()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("partition", [None, "halves", "quadrants", "channels"])
def test_parts_and_a_sigma_for_each_value(partition, interpolation):
    """Each part of a partition has its own bound, in units of a sigma that differs from pixel to pixel."""
    sigma = 0.1 + torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1))
    for steps in ([], [LowPass(2)]):
        smoothed, threat = case(Rotation, interpolation, steps, sigma=sigma)
        x, theta = threat.prepare(images(6, 6, 2)[:1])[0], draws(smoothed)
        masks = partition_masks(partition, (2, 6, 6))
        proved = bound(smoothed, threat, x, theta, masks)
        assert proved.shape == (len(theta), len(masks))
        assert (attack(smoothed, threat, x, theta, masks) <= proved).all()
        in_one = bound(smoothed, threat, x, theta)[:, 0]
        assert (proved <= in_one[:, None] * 1.2).all()


def test_ranges_on_one_side_and_without_width():
    """gamma from 0 up, and one axis that does not move."""
    for interpolation in ("bilinear", "nearest"):
        for low, high in (((0, 0), (0.7, 0)), ((-0.5, 0), (0, 0.5))):
            smoothed, _ = case(Translation, interpolation)
            threat = TransformationThreat(Translation(interpolation), low, high)
            x, theta = threat.prepare(images(5, 5)[:1])[0], draws(smoothed)
            assert (attack(smoothed, threat, x, theta) <= bound(smoothed, threat, x, theta)).all()


MIXED = [pair for pair in itertools.product(INTERPOLATIONS, repeat=2) if pair[0] != pair[1]]


@pytest.mark.parametrize(("mine", "theirs"), MIXED)
def test_an_attacker_who_interpolates_otherwise_is_refused(mine, theirs):
    """The file by the threat's interpolation, the rest by the classifier's: the bend is of one of them."""
    smoothed, _ = case(Rotation, mine, [DiscVignette()])
    with pytest.raises(UncertifiableError, match="same interpolation"):
        ImageBound().check(smoothed, TransformationThreat(Rotation(theirs), -6.0, 6.0))


@pytest.mark.parametrize("steps", [[], [DiscVignette(), LowPass(3)]])
def test_brightness_after_a_rotation(steps):
    """Brightness that the edge cuts off counts, and dark images become bright."""
    psi = Composition([Rotation(), Brightness()])
    smoothed = SmoothedClassifier(nn.Flatten(), 10, psi, Preprocess(steps), Gaussian([6.0, 0.3]), Gaussian(0.5)).eval()
    threat = TransformationThreat(psi, [-5, -0.8], [5, 0.8], saved="real")
    ImageBound().check(smoothed, threat)
    for x in images(7, 7):
        x, theta = threat.prepare(x[None])[0], draws(smoothed)
        angles, levels = torch.linspace(-5, 5, 41), torch.tensor([-0.8, 0.0, 0.8])
        found = defects(smoothed, threat, x, theta, torch.cartesian_prod(angles, levels).double())
        assert (found.amax(1) <= bound(smoothed, threat, x, theta)).all()


def test_brightness_before_a_step_that_is_not_linear_is_refused():
    """It sees other images than without brightness."""
    psi = Composition([Rotation(), Brightness()])
    smoothed = SmoothedClassifier(nn.Flatten(), 10, psi, Glare(), Gaussian([6.0, 0.3]), Gaussian(0.5)).eval()
    with pytest.raises(UncertifiableError, match="linear preprocessing alone"):
        ImageBound().check(smoothed, TransformationThreat(psi, [-5, -0.8], [5, 0.8], saved="real"))


def test_files_that_are_changed_by_more():
    """threat.l2: the worst change of a file is along the largest singular vector of psi(., theta)."""
    smoothed, plain = case(Scaling, saved="real")
    threat = TransformationThreat(Scaling(), plain.lows, plain.highs, saved="real", l2=0.7)
    x, theta = images(6, 6)[0], draws(smoothed)
    proved, gammas = bound(smoothed, threat, x, theta), torch.linspace(-0.1, 0.1, 11, dtype=torch.float64)[:, None]
    files = plain.apply(x.expand(11, *x.shape), gammas.float())
    for row, e in zip(theta, proved[:, 0], strict=True):
        rows = row.expand(36, 1)
        matrix = smoothed.transform(torch.eye(36).view(36, 1, 6, 6), rows.float()).flatten(1).T
        _, _, right = torch.linalg.svd(matrix)
        worst = 0.7 * right[0].view(1, 6, 6)
        for sign in (-1, 1):
            found = pair_norms(
                smoothed, x, files + sign * worst, gammas.float().double(), row.expand(11, 1), whole(smoothed, x)
            )
            assert found.max() <= e + 1e-3  # of the batch
    assert (proved > bound(smoothed, plain, x, theta)).all()


# ---------------------------------------------------------------- near the truth


def smooth(size=14):
    """A bright disc off the centre, black at the edges."""
    return (images(size, size)[2] * DiscVignette()(torch.ones(1, size, size)) * 255).round() / 255


@pytest.mark.parametrize("transform", [Rotation, Scaling, Shear])
def test_chords_and_intervals_agree(transform):
    """Each upper bound lies above the largest defect found, both near it: the two proofs share no code."""
    smoothed, threat = case(transform, steps=[DiscVignette(), GaussianLowPass(1.0)])
    x, theta = smooth(), draws(smoothed, 4)
    found = attack(smoothed, threat, x, theta)[:, 0]
    by_chords, by_intervals = bound(smoothed, threat, x, theta)[:, 0], interval_defects(smoothed, threat, x, theta)
    slack = 1.2 * x.shape[1] / 255  # the worst rounding of a file: half a step a pixel, over sigma
    for proved in (by_chords, by_intervals):
        assert (proved >= found).all()
        assert (proved <= 1.2 * found + slack).all()


def test_a_ceiling_saves_evaluations_and_stays_a_bound(monkeypatch):
    """Bounds below the ceiling may be loose, those above it are as good as without; nothing falls below a defect."""
    smoothed, threat = case(Rotation, steps=[DiscVignette(), LowPass(3)], limit=10.0)
    x, theta, count = smooth(10), draws(smoothed, 6), [0]
    keep = chords._Search._defects

    def counted(self, owner, gammas):
        count[0] += len(owner)
        return keep(self, owner, gammas)

    monkeypatch.setattr(chords._Search, "_defects", counted)
    plain, spent = bound(smoothed, threat, x, theta), count[0]
    found = attack(smoothed, threat, x, theta)
    ceiling = float(plain.median())
    count[0] = 0
    cheap = bound(smoothed, threat, x, theta, ceiling=[ceiling])
    assert count[0] <= spent
    assert (cheap >= found).all()
    assert (cheap <= torch.maximum(plain * 1.2, torch.tensor(ceiling))).all()
    count[0] = 0
    assert (bound(smoothed, threat, x, theta, ceiling=[100.0]) >= found).all()
    assert count[0] < spent


@pytest.mark.parametrize("name", REAL)
def test_near_the_largest_defect_of_real_images(name):
    chords_are_near(REAL[name])


# ---------------------------------------------------------------- the option


def digit(transform=Rotation, saved="8bit"):
    smoothed, threat = case(transform, steps=[DiscVignette(), LowPass(3)], saved=saved)
    return smoothed, threat, threat.prepare(Digits().split("test", 10)[3][0][None])[0]


@pytest.mark.parametrize("search", sampled.SEARCHES)
def test_numbers_do_not_depend_on_workers_or_images_in_flight(search):
    """Bounds of three images, one at a time and together, on one thread and on two."""
    smoothed, threat, _ = digit()
    data = Digits().split("test", 10)
    prepared = [threat.prepare(data[i][0][None])[0] for i in range(3)]
    error, results = ImageBound(16, 16, search), []
    threads = torch.get_num_threads()
    try:
        for workers, in_flight in ((1, 1), (2, 3)):
            torch.set_num_threads(workers)
            procedures = ((i, error.procedure(smoothed, threat, x, Stream(0, i))) for i, x in enumerate(prepared))
            results.append({i: made for i, made, _ in run_rounds(procedures, torch.device("cpu"), in_flight)})
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_what_is_refused():
    """Unknown searches, partitions by intervals, and what no proof is known of: one sentence that names the way out."""
    with pytest.raises(RequestError, match=r"error\.search must be one of chords, intervals, grid"):
        ImageBound(search="all")
    with pytest.raises(RequestError, match=r"error\.search=chords"):
        ImageBound(search="intervals", soft=False, partition="halves")
    smoothed, threat, _ = digit()
    unknown = Preprocess([nn.ReLU()])
    for preprocess in (unknown, Preprocess([Resize(4)])):
        other = SmoothedClassifier(smoothed.base, 10, Rotation(), preprocess, Gaussian(6.0), Gaussian(0.5)).eval()
        with pytest.raises(UncertifiableError, match=r"attribute lipschitz, or error\.search=grid"):
            ImageBound().check(other, threat)
        ImageBound(search="grid").check(other, threat)
    psi = Similarity()
    law = Gaussian([9.0, 0.2, 2.0, 2.0])
    turned = SmoothedClassifier(smoothed.base, 10, psi, None, law, Gaussian(0.5)).eval()
    both = TransformationThreat(psi, [-5, -0.1, -1, -1], [5, 0.1, 1, 1])
    for error in (ImageBound(), DistributionBound(4)):
        with pytest.raises(UncertifiableError, match=r"error\.search=grid"):
            error.check(turned, both)
    ImageBound(search="grid").check(turned, both)
    mirrored = Translation("bilinear", "reflection")
    moved = SmoothedClassifier(smoothed.base, 10, mirrored, None, Gaussian(2.0), Gaussian(0.5)).eval()
    with pytest.raises(UncertifiableError, match=r"mirrored borders.*error\.search=grid"):
        ImageBound().check(moved, TransformationThreat(mirrored, -1, 1))
    steps = TransformationThreat(psi, [-5, -0.1, -1, -1], [5, 0.1, 1, 1], step=0.5)
    ImageBound().check(turned, steps)  # finitely many are tried


def test_a_borders_mismatch_is_not_taken_for_black():
    """A classifier that mirrors its borders under an attacker who leaves black."""
    mine = Translation("bilinear", "reflection")
    smoothed = SmoothedClassifier(nn.Flatten(), 10, mine, None, Gaussian(2.0), Gaussian(0.5)).eval()
    with pytest.raises(UncertifiableError, match="same interpolation and padding"):
        ImageBound().check(smoothed, TransformationThreat(Translation(), -1, 1))


def test_more_changes_of_finitely_many_files_are_refused():
    """threat.l2 with threat.step: the files that are tried are not all there are."""
    smoothed, _, _ = digit()
    with pytest.raises(UncertifiableError, match="lists all attacks"):
        ImageBound().check(smoothed, TransformationThreat(Rotation(), -6, 6, step=3.0, l2=0.5))


def test_volume_in_16_bits_has_the_rounding_bound():
    """Exact: no draws, one bound of what 16-bit files round, which no sampled defect exceeds."""
    smoothed = SmoothedClassifier(nn.Flatten(), 4, Volume(), None, Gaussian(3.0), Gaussian(0.05), block=16).eval()
    threat = TransformationThreat(Volume(), -3, 3, saved="16bit")
    random = np.random.default_rng(0)
    for x in (random.uniform(-0.4, 0.4, (1, 300)), np.sign(random.normal(size=(1, 200))) * 0.3):
        x = threat.prepare(torch.tensor(x)[None].float())[0]
        made = finish(ImageBound().procedure(smoothed, threat, x, Stream(0, 0)))
        assert (made.guarantee, made.alpha, made.rho) == ("sound", 0.0, 1e-4)
        assert made == finish(ImageBound(search="intervals").procedure(smoothed, threat, x, Stream(0, 0)))
        grid = ImageBound(search="grid", points=25)
        found = finish(grid.sample(smoothed, threat, x, Stream(0, 0), "error-bound", 256))
        assert found.mean() < made.value
        assert (found > made.value).mean() <= 1 / 256  # but for the law's far tail
        tried = finish(ImageBound(64, 16, "grid").procedure(smoothed, threat, x, Stream(0, 0)))
        assert tried.guarantee == "heuristic"
