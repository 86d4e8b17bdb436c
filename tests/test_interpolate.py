"""Bounds of how interpolated images move: bends, shifts, positions, operator norms, against dense sampling."""

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from torch.nn import functional

from gsmooth_lightning.data import Digits
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.preprocess import DiscVignette, LowPass, Preprocess, RectangleVignette, is_linear, visible
from gsmooth_lightning.transform import Rotation, Scaling, Shear, Similarity, Translation
from gsmooth_lightning.transform import interpolate as bounds
from gsmooth_lightning.transform.geometric import INTERPOLATIONS
from gsmooth_lightning.transform.interpolate import bends, rounding_shift, shifts
from pictures import hostile

CASES = {Rotation: 25.0, Scaling: 0.4, Shear: 0.5, Translation: 2.5}
WIDTHS = (1e-6, 0.01, 0.1, 0.7)
"""Widths of boxes, as shares of the range in CASES: from a hundred-thousandth of a pixel to several pixels."""

FUZZ = 1e-12
"""Of the tests' own interpolation in float64."""

ALL_SEEN = torch.ones(8, 8, dtype=torch.bool)


def boxes(psi, k=6, at=0.0):
    """Boxes of every width, (n, dim) each: anywhere, through 0, and beginning and ending at whole numbers."""
    limit, random = CASES[type(psi)], np.random.default_rng(zlib.crc32(psi.name.encode()))
    low, high = [], []
    for width in WIDTHS:
        begin = at + random.uniform(-limit, limit, (k, psi.dim))
        begin[0] = -random.random(psi.dim) * width * limit
        begin[1] = np.rint(begin[1])
        begin[2] = np.rint(begin[2]) - width * limit
        low.append(begin)
        high.append(begin + width * limit * random.uniform(0.5, 1, (k, psi.dim)))
        high[-1][1:3] = begin[1:3] + width * limit
    return torch.tensor(np.concatenate(low)), torch.tensor(np.concatenate(high))


@torch.inference_mode()
def warp(psi, x, theta):
    """psi(x, .) as votes and files compute it, (n, c, h, w)."""
    return psi(x.expand(len(theta), *x.shape), theta.float()).double()


def deviations(psi, x, low, high, seen, fractions=21):
    """(k,) largest ||psi(x, theta) - I(theta)|| found in each box, I from the corners, and largest movement."""
    dim, k = psi.dim, len(low)
    steps = torch.linspace(0, 1, fractions if dim == 1 else 7, dtype=torch.float64)
    shares = torch.cartesian_prod(*[steps] * dim).reshape(-1, dim)  # (m, dim)
    theta = low[:, None] + shares * (high - low)[:, None]
    values = warp(psi, x, theta.reshape(-1, dim)).view(k, len(shares), *x.shape) * seen
    straight = torch.zeros_like(values)
    for bits in itertools.product((0, 1), repeat=dim):
        corner = torch.where(torch.tensor(bits).bool(), high, low)
        weight = torch.where(torch.tensor(bits).bool(), shares, 1 - shares).prod(1)
        straight += weight.view(1, -1, 1, 1, 1) * (warp(psi, x, corner) * seen)[:, None]
    flat = values.flatten(2)
    return (values - straight).flatten(2).norm(dim=2).amax(1), torch.cdist(
        flat, flat, compute_mode="donot_use_mm_for_euclid_dist"
    ).flatten(1).amax(1)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("transform", CASES)
def test_bends_and_shifts_bound_what_a_box_does(transform, interpolation):
    """Over boxes and boxes inside them: the distance from the corners' interpolation, and every movement."""
    psi = transform(interpolation)
    low, high = boxes(psi)
    random = np.random.default_rng(2)
    for h, w, channels in ((9, 9, 1), (6, 11, 2), (1, 1, 1), (1, 5, 1), (2, 2, 1)):
        seen = visible(Preprocess([DiscVignette()] if h == w > 2 else []), torch.zeros(1, h, w))
        for x in hostile(h, w, channels)[: 4 if h == 9 else 2]:
            bend, shift = (bound(psi, x, low, high, seen) for bound in (bends, shifts))
            a, b = (torch.tensor(np.sort(random.random((2, *low.shape)), 0))) * (high - low) + low
            for ends in ((low, high), (a, b)):
                bent, moved = deviations(psi, x, *ends, seen)
                assert (bent <= bend + FUZZ).all()
                assert (moved <= shift + FUZZ).all()


@pytest.mark.parametrize("at", [-2.0, 30.0])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_positions_far_outside_the_image(interpolation, at):
    """Strong scaling and shifts by more than the image: all but the middle, or everything, is black."""
    for psi in (Scaling(interpolation), Translation(interpolation)):
        low, high = boxes(psi, at=at if psi.dim == 2 else min(at, 0.5))
        for x in hostile(8, 8)[:2]:
            bent, moved = deviations(psi, x, low, high, ALL_SEEN)
            assert (bent <= bends(psi, x, low, high, ALL_SEEN) + FUZZ).all()
            assert (moved <= shifts(psi, x, low, high, ALL_SEEN) + FUZZ).all()


@pytest.mark.parametrize(("interpolation", "factor"), [("bilinear", 4.0), ("bicubic", 10.0)])
def test_bends_are_not_vacuous(interpolation, factor):
    """On digits turned by two degrees: within a factor of the deviations, on average, and far below the movement."""
    low = torch.linspace(-20, 18, 40, dtype=torch.float64)[:, None]
    seen = visible(Preprocess([DiscVignette()]), torch.zeros(1, 8, 8))
    psi, data = Rotation(interpolation), Digits().split("test", 10)
    for i in (1, 5, 9):
        bent, moved = deviations(psi, data[i][0], low, low + 2, seen)
        bend = bends(psi, data[i][0], low, low + 2, seen)
        assert bend.mean() < factor * bent.mean()
        assert bend.mean() < moved.mean() / 5


def test_a_bilinear_translation_is_bilinear_between_whole_numbers():
    """Nothing but rounding is left between grid lines; across one there is a kink."""
    psi, x = Translation(), hostile(8, 8)[1]
    low = torch.tensor([[0.0, -1.0], [1.25, 0.5], [-2.0, 1.0], [0.5, 0.0]], dtype=torch.float64)
    high = torch.tensor([[1.0, 0.0], [2.0, 0.75], [-1.0, 2.0], [1.5, 0.5]], dtype=torch.float64)
    bend = bends(psi, x, low, high, ALL_SEEN)
    bent, _ = deviations(psi, x, low, high, ALL_SEEN)
    assert (bend[:3] < 1e-3).all()
    assert (bent <= bend + FUZZ).all()
    assert bent[3] > 1


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_rounding_where_an_image_is_flat(interpolation):
    """No position matters there, but values are computed in float32: bicubic weights cancel, and sum to 1 roughly."""
    seen = visible(Preprocess([RectangleVignette(3)]), torch.zeros(1, 12, 12))
    low = torch.zeros(6, 2, dtype=torch.float64)
    high = torch.tensor(np.random.default_rng(0).uniform(0, 0.4, (6, 2)))
    for value in (1.0, 0.7, -1.0):
        x, psi = torch.full((1, 12, 12), value), Translation(interpolation)
        bent, moved = deviations(psi, x, low, high, seen)
        assert (bent <= bends(psi, x, low, high, seen) + FUZZ).all()
        assert (moved <= shifts(psi, x, low, high, seen) + FUZZ).all()


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("transform", CASES)
def test_slopes_are_derivatives(transform):
    """Against central differences of `source`, also under inference_mode, where automatic derivatives are zero."""
    psi, limit, step = transform(), CASES[transform], 1e-5
    theta = torch.tensor(np.random.default_rng(0).uniform(-limit, limit, (20, psi.dim)))
    with torch.inference_mode():
        slopes = psi.slopes(theta)
        speeds = psi.speeds(theta, 5, 8)
    for a in range(psi.dim):
        more = step * torch.eye(psi.dim, dtype=torch.float64)[a]
        for slope, up, down in zip(slopes[a], psi.source(theta + more), psi.source(theta - more), strict=True):
            torch.testing.assert_close(slope, (up - down) / (2 * step), atol=1e-9, rtol=1e-7)
        up, down = psi.positions(theta + more, 5, 8), psi.positions(theta - more, 5, 8)
        for speed, there, here in zip(speeds[a], up, down, strict=True):
            torch.testing.assert_close(speed, (there - here) / (2 * step), atol=1e-8, rtol=1e-6)
        assert sum(float(speed.abs().max()) for speed in speeds[a]) > 1e-2


@pytest.mark.parametrize("transform", CASES)
def test_boxes_contain_positions(transform):
    """All parameters of a box, its corners among them."""
    psi = transform()
    low, high = boxes(psi)
    left, right, upper, lower = psi.boxes(low, high, 7, 12)
    shares = torch.cartesian_prod(*[torch.linspace(0, 1, 9, dtype=torch.float64)] * psi.dim).reshape(-1, psi.dim)
    for share in shares:
        columns, rows = psi.positions(low + share * (high - low), 7, 12)
        assert ((left < columns) & (columns < right)).all()
        assert ((upper < rows) & (rows < lower)).all()
    widest = torch.maximum(right - left, lower - upper).amax(1)
    tiny = slice(0, len(low) // len(WIDTHS))
    assert widest[tiny].max() < 1e-3


REACH = {Rotation: 700.0, Scaling: 6.0, Shear: 15.0, Translation: None}
"""Largest parameters whose positions are compared, to images shrunk 400 times; None: the image's longer side."""


@pytest.mark.parametrize("transform", CASES)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7), (28, 28), (100, 40), (255, 31), (256, 256)])
def test_float32_positions_are_within_their_error(monkeypatch, transform, size):
    """grid_sample's own coordinates, ((g + 1) size - 1) / 2 in float32, against float64, near the image."""
    (h, w), psi, grids = size, transform(), []
    reach = REACH[transform] or max(size)
    theta = torch.tensor(np.random.default_rng(h * w).uniform(-reach, reach, (200 if h < 100 else 20, psi.dim)))
    keep = functional.grid_sample

    def sample(x, grid, **options):
        grids.append(grid)
        return keep(x, grid, **options)

    monkeypatch.setattr(functional, "grid_sample", sample)
    warp(psi, torch.zeros(1, h, w), theta)
    columns, rows = psi.positions(theta, h, w)
    near = (columns > -2) & (columns < w + 1) & (rows > -2) & (rows < h + 1)
    left, right, upper, lower = psi.boxes(theta, theta, h, w)  # points, but for the rounding
    for axis, length, least, most in ((0, w, left, right), (1, h, upper, lower)):
        single = (((grids[0][..., axis] + 1) * length - 1) / 2).flatten(1)
        assert single.dtype == torch.float32
        assert (((least <= single) & (single <= most)) | ~near).all()


@pytest.mark.parametrize("transform", [Rotation, Translation, Shear])
def test_warped_coordinates_are_their_positions(transform):
    """Coordinate images, warped bilinearly in float32, inside the image."""
    psi, size = transform(), 64
    limit = 700.0 if transform is Rotation else CASES[transform]
    theta = torch.tensor(np.random.default_rng(1).uniform(-limit, limit, (40, psi.dim)))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    values = warp(psi, torch.stack([x, y]).float(), theta).flatten(2)
    positions = torch.stack(psi.positions(theta, size, size), 1)
    inside = ((positions > 0) & (positions < size - 1)).all(1, keepdim=True)
    assert inside.any()
    left, right, upper, lower = psi.boxes(theta, theta, size, size)
    least, most, value = torch.stack([left, upper], 1), torch.stack([right, lower], 1), size * 2.0**-22
    assert (((least - value <= values) & (values <= most + value)) | ~inside).all()


# ---------------------------------------------------------------- the operator norm


def matrix_of(psi, theta, seen):
    """psi(., theta) as a dense matrix, (seen pixels, pixels), float64."""
    h, w = seen.shape
    unit = torch.eye(h * w).view(h * w, 1, h, w)
    moved = psi(unit, theta.float().expand(h * w, -1))
    return moved.flatten(1)[:, seen.flatten().bool()].T.double()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("transform", CASES)
def test_stretch_is_at_least_the_spectral_norm(transform, interpolation):
    """Against a dense SVD; column sums against those of the dense matrix."""
    psi, random = transform(interpolation), np.random.default_rng(4)
    limit = CASES[transform]
    for h, w, steps in ((7, 7, [DiscVignette()]), (5, 8, []), (6, 6, [RectangleVignette(1)]), (1, 1, [])):
        seen = visible(Preprocess(steps), torch.zeros(1, h, w))
        theta = torch.tensor(random.uniform(-limit, limit, (8, psi.dim)))
        norms, sums = psi.stretch(theta, seen)
        for row, norm, of_row in zip(theta, norms, sums, strict=True):
            dense = matrix_of(psi, row[None], seen)
            exact = float(torch.linalg.matrix_norm(dense, 2))
            assert norm >= exact * (1 - 1e-6)
            assert norm <= 2.2 * max(exact, 1.0)
            np.testing.assert_allclose(of_row.flatten(), dense.abs().sum(0), atol=1e-4)
            assert dense.abs().sum(1).max() <= psi.gain * (1 + 1e-5)


def test_near_a_tie_both_pixels_count():
    """Half a pixel: `nearest` may take either neighbour, and the column sums hold for both."""
    sums = Translation("nearest").stretch(torch.tensor([[0.5, 0.0]], dtype=torch.float64), torch.ones(4, 4))[1]
    assert sums[0, 1:3].min() == 2


# ---------------------------------------------------------------- bicubic interpolation


def weights(t, order):
    """Weights of the four taps at t in [0, 1] by cubic convolution with a = -.75, and their derivatives."""
    a, polynomial = -0.75, np.polynomial.Polynomial
    outer, inner = polynomial([-4 * a, 8 * a, -5 * a, a]), polynomial([1, 0, -(a + 3), a + 2])
    signs = (1, 1, -1, -1)
    taps = zip((outer, inner, inner, outer), (1 + t, t, 1 - t, 2 - t), signs, strict=True)
    return np.stack([(p.deriv(order) if order else p)(s) * sign**order for p, s, sign in taps])


def test_constants_of_bicubic_interpolation():
    """KERNEL and SLOPES are the largest absolute sums, by dense evaluation; bilinear's is 1."""
    t = np.linspace(0, 1, 100_001)
    for constant, order in ((bounds.KERNEL, 0), (bounds.SLOPES, 1)):
        largest = np.abs(weights(t, order)).sum(0).max()
        assert largest <= constant + 1e-12
        assert constant <= largest + 1e-6
    np.testing.assert_allclose(weights(t, 0).sum(0), 1, atol=1e-12)


def test_bicubic_derivatives_exceed_sampled_ones():
    """In every cell, for values, slopes and second derivatives of random images and checkerboards."""
    t = np.linspace(0, 1, 12)
    tables = [torch.tensor(weights(t, order)) for order in range(3)]  # (4, t)
    for x in hostile(6, 7)[:3]:
        framed = functional.pad(x.double(), [bounds.FRAME] * 4)
        found = bounds.bicubic_derivatives(framed)
        patches = framed.unfold(1, 4, 1).unfold(2, 4, 1)  # (c, H - 3, W - 3, 4, 4)
        for bound, (across, down) in zip(found, ((1, 0), (0, 1), (2, 0), (1, 1), (0, 2)), strict=True):
            sampled = torch.einsum("chwij,is,jt->chwst", patches, tables[down], tables[across]).abs().amax((-2, -1))
            cells = bound[:, 1 : 1 + sampled.shape[1], 1 : 1 + sampled.shape[2]]
            assert (cells >= sampled - 1e-12).all()
            assert cells.mean() < 4 * sampled.mean()


# ---------------------------------------------------------------- what is refused, and preprocessing


def test_transformations_without_a_bend_are_refused():
    with pytest.raises(UncertifiableError, match=r"error\.search=grid"):
        bends(Similarity(), hostile(4, 4)[0], *torch.zeros(2, 1, 4), torch.ones(4, 4))
    with pytest.raises(UncertifiableError, match="mirrored borders"):
        Translation("bilinear", "reflection").bending(*torch.zeros(2, 1, 2))


def test_visible_pixels_and_linear_steps():
    """Vignettes at the beginning count, later ones do not; a step without the attribute is not linear."""
    x = torch.rand(2, 8, 8)
    first = Preprocess([RectangleVignette(2), DiscVignette(), LowPass(2)])
    assert torch.equal(visible(first, x), (DiscVignette()(RectangleVignette(2)(torch.ones(1, 8, 8))) > 0)[0])
    assert int(visible(first, x).sum()) == 16
    assert visible(Preprocess([LowPass(2), DiscVignette()]), x).all()
    assert visible(DiscVignette(), x).all()
    assert visible(torch.nn.Identity(), x).all()
    assert is_linear(first)
    assert is_linear(torch.nn.Identity())
    assert not is_linear(Preprocess([DiscVignette(), torch.nn.ReLU()]))
    assert not is_linear(torch.nn.ReLU())


def test_rounding_bounds_what_another_rounding_of_positions_changes():
    """psi in float32 against float64, images that span 1; `nearest` jumps near ties alone."""
    x = hostile(16, 16)[1]
    theta = torch.tensor([[0.5, 0.5], [0.25, 1.0], [1.5, -0.5], [2.0, 0.3]], dtype=torch.float64)
    for psi in (Translation("bilinear"), Translation("bicubic")):
        with torch.inference_mode():
            exact = psi(x.double().expand(4, -1, -1, -1), theta.float().double())
        apart = (warp(psi, x, theta) - exact).flatten(1).norm(dim=1)
        assert (apart <= rounding_shift(psi, theta, torch.ones(16, 16).bool())).all()
    torn = rounding_shift(Translation("nearest"), theta, torch.ones(16, 16).bool())
    np.testing.assert_allclose(torn, [16.0, 0.0, 16.0, 0.0])
    assert math.isclose(float(rounding_shift(Translation("nearest"), theta[:1], torch.eye(16).bool())[0]), 4.0)
