"""Intervals: warped images against dense sampling, and bounds of defects against attackers who search gamma."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import nn

import attackers
from attackers import TIGHT, intervals_are_tight, step_norms, whole
from gsmooth_lightning.data import Digits
from gsmooth_lightning.error import interval as bounds
from gsmooth_lightning.error.interval import interval_defects
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.interval import outward_norm, warp_range
from gsmooth_lightning.preprocess import (
    CenterCrop,
    DiscVignette,
    GaussianLowPass,
    LowPass,
    RectangleVignette,
    Resize,
)
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import CyclicTranslation, Rotation, Scaling, Shear, Similarity, Translation
from pictures import real_digits

LIMITS = {Rotation: 20.0, Scaling: 0.25, Shear: 0.3, Translation: 1.5}
FILTERS = {
    "blur": [DiscVignette(), GaussianLowPass(1.0)],
    "low-pass": [DiscVignette(), LowPass(3)],
    "frame and crop": [RectangleVignette(1), CenterCrop(8)],
    "nothing": [],
}


def case(transform, steps=(), interpolation="bilinear", saved="8bit", sigma=0.5, limit=None):
    """A case of `attackers`, with the range in LIMITS unless there is another."""
    return attackers.case(transform, limit or LIMITS[transform], interpolation, steps, saved, sigma)


def images(h, w, channels=1):
    """Noise, a checkerboard, sparse black and white, and a grey image, as saved with 8 bits."""
    random = np.random.default_rng(h * w)
    noise = random.integers(0, 256, (channels, h, w)) / 255
    board = np.broadcast_to(np.indices((h, w)).sum(0) % 2, (channels, h, w))
    sparse = (random.random((channels, h, w)) < 0.2).astype(float)
    return torch.tensor(np.stack([noise, board, sparse, np.full((channels, h, w), 128 / 255)])).float()


def blob(size=16):
    """A smooth bright spot off the centre, black at the edges."""
    y, x = np.indices((size, size)) - (size - 1) / 2
    spot = np.exp(-((x - 2) ** 2 + (y + 1.5) ** 2) / 8)
    return torch.tensor(np.rint(255 * spot) / 255)[None].float()


def step_norm(smoothed, x):
    return float(step_norms(smoothed, whole(smoothed, x)))


def defects(smoothed, threat, x, theta, gammas):
    """Of all pixels together, (theta, gamma)."""
    return attackers.defects(smoothed, threat, x, theta, gammas)[..., 0]


def attack(smoothed, threat, x, theta, tries=60):
    """The largest defect found for each theta: random gammas and the corners, then nearer and nearer to the best."""
    random = torch.Generator().manual_seed(7)
    lows, highs = torch.tensor(threat.lows).double(), torch.tensor(threat.highs).double()
    gammas = lows + (highs - lows) * torch.rand(tries, len(lows), generator=random, dtype=torch.float64)
    gammas = torch.cat([gammas, lows[None], highs[None]])
    best = torch.zeros(len(theta), dtype=torch.float64)
    for reach in (0.1, 0.01):
        found = defects(smoothed, threat, x, theta, gammas)
        best = torch.maximum(best, found.amax(1))
        near = gammas[found.max(0).values.topk(8).indices].repeat(5, 1)
        moved = near + reach * (highs - lows) * torch.randn(near.shape, generator=random, dtype=torch.float64)
        gammas = torch.minimum(torch.maximum(moved, lows), highs)
    return torch.maximum(best, defects(smoothed, threat, x, theta, gammas).amax(1))


# ---------------------------------------------------------------- intervals of warped images


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("width", [1e-5, 0.3, 1.0, 2.6, 9.0])
def test_a_warped_image_stays_in_its_interval(interpolation, width):
    """Positions in every box, by scipy's interpolation; boxes narrow and wider than two cells, inside and outside."""
    h, w, k, random = 7, 9, 6, np.random.default_rng(3)
    low = torch.tensor(random.random((k, 2, h, w)) - 0.3)
    high = low + torch.tensor(random.random((k, 2, h, w)) * (random.random((k, 2, h, w)) < 0.5))
    x0, y0 = (torch.tensor(random.uniform(-3, size + 2, (k, h * w))) for size in (w, h))
    x0[:, ::5] = x0[:, ::5].round()  # at pixel centres and halfway between them
    y0[:, ::7] = y0[:, ::7].round() + 0.5
    dx, dy = (torch.tensor(random.uniform(width / 2, width, (k, h * w))) for _ in range(2))
    least, most = warp_range(low, high, (x0, x0 + dx, y0, y0 + dy), interpolation)
    tightest = [torch.full_like(least, np.inf), torch.full_like(most, -np.inf)]
    for a in np.linspace(0, 1, 9):
        for b in np.linspace(0, 1, 9):
            at = torch.stack([y0 + b * dy, x0 + a * dx]).numpy()
            for i, image in enumerate((low, high)):
                values = [
                    map_coordinates(
                        image[j, c].numpy(),
                        at[:, j],
                        order=1 if interpolation == "bilinear" else 0,
                        mode="grid-constant",
                    )
                    for j in range(k)
                    for c in range(2)
                ]
                values = torch.tensor(np.stack(values)).view(k, 2, h, w)
                assert (values >= least - 1e-12).all()
                assert (values <= most + 1e-12).all()
                tightest[i] = (torch.minimum, torch.maximum)[i](tightest[i], values)
    if width < 1 and interpolation == "bilinear":  # the extremes are attained, up to the sampling
        assert (tightest[0] - least).max() < width
        assert (tightest[0] - least).mean() < width / 40
        assert (most - tightest[1]).mean() < width / 40


def test_one_cell_by_hand():
    """The saddle u v of a cell over [.25, .75]^2, and a tie between two pixels."""
    x = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]).double()
    box = tuple(torch.full((1, 4), v, dtype=torch.float64) for v in (0.25, 0.75, 0.25, 0.75))
    least, most = warp_range(x, x, box, "bilinear")
    assert least.flatten().tolist() == [0.0625] * 4
    assert most.flatten().tolist() == [0.5625] * 4
    tie = tuple(torch.full((1, 4), v, dtype=torch.float64) for v in (0.5, 0.5, 1.0, 1.0))
    least, most = warp_range(x, x, tie, "nearest")
    assert (float(least[0, 0, 0, 0]), float(most[0, 0, 0, 0])) == (0.0, 1.0)


def test_the_outward_norm_is_that_of_the_farthest_corner():
    low, high = torch.tensor([[-3.0, 1.0], [0.0, -4.0]]).double(), torch.tensor([[1.0, 4.0], [3.0, 2.0]]).double()
    corners = [torch.stack([a[:, 0], b[:, 1]], 1).norm(dim=1) for a in (low, high) for b in (low, high)]
    largest = torch.stack(corners).amax(0)
    assert (outward_norm(low, high) >= largest).all()
    torch.testing.assert_close(outward_norm(low, high), largest)


def test_the_parts_of_a_piece_cover_it():
    """Along its longest side, without a gap, and with its very ends."""
    low, high = torch.tensor([[-0.1, 0.3], [1 / 3, -7.0]]).double(), torch.tensor([[0.7, 0.4], [0.5, 1 / 7]]).double()
    owner, a, b = bounds._split(torch.tensor([5, 2]), low, high, torch.tensor([3, 7]))
    assert owner.tolist() == [5] * 3 + [2] * 7
    for piece, side, rows in ((0, 0, slice(0, 3)), (1, 1, slice(3, 10))):
        assert a[rows][0].tolist() == low[piece].tolist()
        assert b[rows][-1].tolist() == high[piece].tolist()
        assert a[rows][1:, side].tolist() == b[rows][:-1, side].tolist()
        assert (a[rows][:, 1 - side] == low[piece, 1 - side]).all()
        assert (b[rows][:, 1 - side] == high[piece, 1 - side]).all()


# ---------------------------------------------------------------- bounds of defects


@pytest.mark.parametrize(
    ("interpolation", "filters", "saved"),
    [
        ("bilinear", "blur", "8bit"),
        ("bilinear", "low-pass", "8bit"),
        ("bilinear", "low-pass", "float"),
        ("nearest", "blur", "8bit"),
        ("nearest", "low-pass", "float"),
    ],
)
@pytest.mark.parametrize("transform", LIMITS)
def test_no_attack_beats_the_bound(transform, interpolation, filters, saved):
    """Gammas searched where the defect is large (20,000 in all), on images without mercy and a digit."""
    smoothed, threat = case(transform, FILTERS[filters], interpolation, saved)
    theta = LIMITS[transform] * torch.tensor([[0.0], [0.37], [-1.3]]).double().expand(3, len(threat.lows)).clone()
    digit = Digits().split("test", 10)[3][0][None][0]
    for x in [*images(10, 10)[:3], digit]:
        found = attack(smoothed, threat, x, theta)
        bound = interval_defects(smoothed, threat, x, theta, tolerance=0.2, pieces=40)
        assert (found <= bound).all()


@pytest.mark.parametrize("filters", ["frame and crop", "nothing"])
def test_no_attack_beats_the_bound_on_oblong_colour_images(filters):
    """Also where the attacker interpolates in another way than the classifier."""
    smoothed, _ = case(Rotation, FILTERS[filters])
    threat = TransformationThreat(Rotation("nearest"), -20, 5)
    theta = torch.tensor([[11.0], [-40.0]]).double()
    for x in images(9, 14, 3)[:3]:
        bound = interval_defects(smoothed, threat, x, theta, tolerance=0.2, pieces=40)
        assert (attack(smoothed, threat, x, theta) <= bound).all()


class Squash(nn.Module):
    """Not linear."""

    lipschitz = 2.0

    def forward(self, x):
        return torch.sin(2 * x)


@pytest.mark.parametrize("filters", [[GaussianLowPass(1.0)], [LowPass(3)], [LowPass(3), DiscVignette(), Squash()]])
def test_no_attack_beats_the_bound_with_a_sigma_for_each_pixel(filters):
    sigma = torch.linspace(0.2, 2.0, 100).view(1, 10, 10)
    smoothed, threat = case(Rotation, filters, sigma=sigma)
    theta = torch.tensor([[0.0], [17.0]]).double()
    for x in images(10, 10)[:3]:
        bound = interval_defects(smoothed, threat, x, theta, tolerance=0.2, pieces=40)
        assert (attack(smoothed, threat, x, theta) <= bound).all()


@pytest.mark.parametrize("filters", [[], [DiscVignette(), GaussianLowPass(0.7)], [DiscVignette(), Squash()]])
def test_no_attack_beats_a_refined_bound_of_a_dark_image(filters):
    """Of values of a few steps of the file, which its rounding changes most, and a step that doubles them."""
    smoothed, threat = case(Rotation, filters, limit=3.0)
    theta = torch.tensor([[2.0], [-8.0]]).double()
    x = (images(10, 10)[0] * 3).round() / 255
    found, bound = attack(smoothed, threat, x, theta), interval_defects(smoothed, threat, x, theta, tolerance=0.05)
    assert (found <= bound).all()
    assert (bound <= 1.5 * found).all()


@pytest.mark.parametrize("filters", ["blur", "low-pass"])
@pytest.mark.parametrize("transform", [Rotation, Scaling])
def test_bounds_of_a_smooth_image_come_within_their_tolerance(transform, filters):
    """Of a dense search, which an upper bound cannot undercut."""
    smoothed, threat = case(transform, FILTERS[filters])
    theta = LIMITS[transform] * torch.tensor([[0.4], [-1.1]]).double()
    dense = defects(smoothed, threat, blob(), theta, threat.parameters(400)[0].double()).amax(1)
    loose, tight = (interval_defects(smoothed, threat, blob(), theta, tolerance=t, pieces=2000) for t in (1.0, 0.05))
    assert (dense <= tight).all()
    assert (tight <= loose).all()
    assert (tight <= 1.06 * dense).all()
    assert (loose <= 2.02 * dense).all()


def test_a_translated_ramp_has_no_error_inside_and_a_bound_that_shrinks_with_the_pieces():
    """The slope is 1/100: over a piece of width s both images move by s/100, the defect stays within +-s/100."""
    x = (torch.arange(14) / 100).expand(1, 14, 14).clone()
    smoothed, _ = case(Translation, [RectangleVignette(3)], sigma=1.0)
    threat = TransformationThreat(Translation(), [0, -1], [0, 1], saved="float")  # along the ramp
    theta, step = torch.tensor([[0.3, -0.8]]).double(), step_norm(smoothed, x)
    assert float(defects(smoothed, threat, x, theta, threat.parameters(201)[0].double()).max()) < 2 * step
    for pieces, width in ((9, 2 / 8), (64, 2 / 64), (512, 2 / 512)):
        bound = float(interval_defects(smoothed, threat, x, theta, tolerance=0.0, pieces=pieces))
        assert width / 100 * 8 <= bound <= width / 100 * 8 + 2 * step  # 8 x 8 pixels are kept


def test_a_constant_image_has_no_error_inside():
    """Nothing is left but the step of the grid and the allowance for float32."""
    smoothed, threat = case(Translation, [RectangleVignette(3)], limit=1.0)
    x = torch.full((1, 12, 12), 200 / 255)
    bound = interval_defects(smoothed, threat, x, torch.tensor([[0.9, -0.4]]).double(), tolerance=2.0)
    assert step_norm(smoothed, x) <= float(bound) < 3 * step_norm(smoothed, x)


def test_a_ceiling_saves_work_and_is_reached_where_it_can_be(monkeypatch):
    """Bounds end at most at the ceiling; a theta with a larger defect is given up, and still bounded."""
    smoothed, threat = case(Rotation, FILTERS["low-pass"])
    x, theta = blob(), torch.tensor([[3.0], [-11.0], [26.0]]).double()
    dense = defects(smoothed, threat, x, theta, threat.parameters(400)[0].double()).amax(1)
    pieces, counted = [0], bounds._piece_bounds

    def count(*arguments):
        pieces[0] += len(arguments[3])
        return counted(*arguments)

    monkeypatch.setattr(bounds, "_piece_bounds", count)
    spent = []
    for ceiling in (1.5 * float(dense.max()), 0.5 * float(dense.min()), None):
        pieces[0] = 0
        bound = interval_defects(smoothed, threat, x, theta, ceiling, tolerance=0.02)
        spent.append(pieces[0])
        assert (dense <= bound).all()
        if spent[1:] == []:
            assert (bound <= ceiling).all()
    assert max(spent[:2]) < spent[2] / 2


def test_bounds_hold_however_many_are_made_at_once(monkeypatch):
    smoothed, threat = case(Rotation, FILTERS["low-pass"])
    x, theta = blob(), torch.tensor([[3.0], [-11.0]]).double()
    monkeypatch.setattr(bounds, "NUMBERS", 1500)
    dense = defects(smoothed, threat, x, theta, threat.parameters(200)[0].double()).amax(1)
    few = interval_defects(smoothed, threat, x, theta, tolerance=0.1)
    assert (dense <= few).all()
    assert (few <= 1.12 * dense).all()


@pytest.mark.parametrize("steps", TIGHT.values(), ids=TIGHT)
def test_bounds_of_real_digits_are_tight(steps):
    for x in real_digits():
        intervals_are_tight(x, steps)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("smoothed", "threat", "words"),
    [
        (*case(Rotation, interpolation="bicubic"), "bicubic.*error.search=chords"),
        (
            SmoothedClassifier(nn.Flatten(), 10, Translation(padding="reflection"), None, Gaussian(1.0), Gaussian(0.5)),
            TransformationThreat(Translation(padding="reflection"), -1, 1),
            "padding=black",
        ),
        (
            SmoothedClassifier(nn.Flatten(), 10, CyclicTranslation(), None, Gaussian(1.0), Gaussian(0.5)),
            TransformationThreat(CyclicTranslation(), -1, 1),
            "no intervals are known of cyclic translation",
        ),
        (
            SmoothedClassifier(nn.Flatten(), 10, Similarity(), None, Gaussian(1.0), Gaussian(0.5)),
            TransformationThreat(Similarity(), -0.1, 0.1),
            "no intervals are known of rotation, scaling",
        ),
        (*case(Rotation, [Resize(6)]), "Resize states no Lipschitz constant"),
        (
            SmoothedClassifier(nn.Flatten(), 10, Rotation(), None, Gaussian(1.0)),
            TransformationThreat(Rotation(), -1, 1),
            "noise=gaussian",
        ),
    ],
)
def test_refusals_say_what_to_change(smoothed, threat, words):
    with pytest.raises(UncertifiableError, match=words):
        interval_defects(smoothed, threat, blob(), torch.zeros(1, len(threat.lows)).double())
