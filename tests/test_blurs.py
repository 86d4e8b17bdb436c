"""Blurs by motion and defocus: against scipy, and bounds of how far they move images against real files."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from covers import FILTERS, digits, farness, moved, no_file_moves_farther, visiting
from gsmooth_lightning.certify import CoverCertifier
from gsmooth_lightning.certify.cover import Cover
from gsmooth_lightning.error.movement import middle_images, movements
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.preprocess import RectangleVignette
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Defocus, MotionBlur, RotationalBlur, ZoomBlur
from pictures import hostile
from plans import finish

MOVERS = {
    "rotational": (RotationalBlur(5), [0.0], [60.0]),
    "rotational, even": (RotationalBlur(4), [0.0], [400.0]),
    "zoom": (ZoomBlur(4), [0.0], [1.5]),
    "motion": (MotionBlur(5, 2.0), [-1.5, -1.5], [1.5, 1.5]),
    "defocus": (Defocus(), [0.0], [4.0]),
    "defocus, wide": (Defocus(2.0), [0.0], [4.0]),
    "defocus, steep": (Defocus(0.3, 0.5), [0.0], [4.0]),
    "defocus, steeper": (Defocus(0.02), [0.0], [4.0]),
}
"""Transformations, and ranges that images of 12 x 12 pixels allow."""


def images(h, w, channels=1):
    """Hostile images and a digit."""
    digit = digits(3)[:, :, 2 : 2 + h, 2 : 2 + w].expand(1, channels, -1, -1)
    return torch.cat([hostile(h, w, channels), digit])


# ---------------------------------------------------------------- against scipy


def about_centre(x, matrix):
    """Each channel with what is at p from the centre, (row, column), taken from matrix p; black outside."""
    centre = (np.array(x.shape[1:]) - 1) / 2
    offset = centre - matrix @ centre
    return np.stack([ndimage.affine_transform(c, matrix, offset, order=1, mode="grid-constant") for c in x])


def turned(x, degrees):
    """Counterclockwise as it is seen: what is on the right moves up, to a smaller row."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return about_centre(x, np.array([[cos, sin], [-sin, cos]]))


def rotational(x, theta, frames):
    return np.mean([turned(x, a) for a in np.linspace(-theta[0], theta[0], frames)], 0)


def zoom(x, theta, frames):
    return np.mean([about_centre(x, np.eye(2) / f) for f in np.linspace(1, 1 + theta[0], frames)], 0)


def motion(x, theta, frames, last=3.0):
    times = np.linspace(0, last, frames)
    shifted = [
        [ndimage.shift(c, (t * theta[0], t * theta[1]), order=1, mode="grid-constant") for c in x] for t in times
    ]
    return np.average(shifted, 0, np.exp(-(times**2) / 2))


def disc(theta, edge, alias, size=15):
    """The kernel of `Defocus`, tap by tap."""
    kernel = np.zeros((2 * size + 1, 2 * size + 1))
    for i, j in itertools.product(range(-size, size + 1), repeat=2):
        kernel[i + size, j + size] = min(1.0, max(0.0, (theta - math.sqrt(i * i + j * j)) / edge + 0.5))
    kernel /= kernel.sum()
    if alias:
        kernel = ndimage.gaussian_filter(kernel, alias, mode="constant", radius=1)
    return kernel


def defocus(x, theta, edge, alias):
    return np.stack([ndimage.correlate(c, disc(theta[0], edge, alias), mode="mirror") for c in x])


REFERENCES = [
    (RotationalBlur(), lambda x, t: rotational(x, t, 11), [[0.0], [3.0], [10.0], [77.0], [180.0]]),
    (RotationalBlur(2), lambda x, t: rotational(x, t, 2), [[10.0], [45.0]]),
    (ZoomBlur(), lambda x, t: zoom(x, t, 11), [[0.0], [0.1], [0.5], [3.0]]),
    (MotionBlur(), lambda x, t: motion(x, t, 13), [[0.0, 0.0], [1.0, 0.0], [0.0, -2.0], [0.3, 0.8], [-1.7, 9.0]]),
    (MotionBlur(2, 1.0), lambda x, t: motion(x, t, 2, 1.0), [[1.0, -2.0], [0.5, 0.25]]),
    (Defocus(), lambda x, t: defocus(x, t, 1.0, 0.0), [[0.0], [0.3], [0.5], [0.75], [2.0], [5.0], [6.6]]),
    (Defocus(2.0), lambda x, t: defocus(x, t, 2.0, 0.0), [[0.0], [0.01], [1.0], [3.3]]),
    (Defocus(0.1, 0.7), lambda x, t: defocus(x, t, 0.1, 0.7), [[0.0], [1.0], [2.2], [4.9]]),
]


@pytest.mark.parametrize(("psi", "reference", "thetas"), REFERENCES, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize(("h", "w", "channels"), [(12, 12, 1), (9, 14, 3), (11, 8, 1)])
def test_blurs_are_those_of_scipy(psi, reference, thetas, h, w, channels):
    """Frame by frame, tap by tap, in float64; in float32 up to its rounding. In a batch each image has its own theta,
    and is what it is alone; theta = 0 changes nothing without a Gaussian blur after it."""
    x = images(h, w, channels)
    batch = torch.cat([x[i % len(x)][None] for i in range(len(thetas))]).double()
    theta = torch.tensor(thetas, dtype=torch.float64)
    expected = np.stack([reference(image.numpy(), t) for image, t in zip(batch, thetas, strict=True)])
    exact, single = psi(batch, theta), psi(batch.float(), theta.float())
    assert exact.dtype == torch.float64
    assert single.dtype == torch.float32
    np.testing.assert_allclose(exact, expected, atol=1e-10)
    np.testing.assert_allclose(single, expected, atol=3e-5)
    for i in range(len(theta)):
        alone = psi(batch[i : i + 1].float(), theta[i : i + 1].float())
        np.testing.assert_allclose(alone[0], single[i], atol=1e-6)  # one image more or less changes nothing
    if not getattr(psi, "alias", 0):
        np.testing.assert_allclose(psi(x, torch.zeros(len(x), psi.dim)), x, atol=3e-6)


@pytest.mark.parametrize("radius", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_a_hard_edge_is_the_defocus_of_the_common_corruptions(radius, sigma):
    """An aliased disc of 17 x 17 taps, normalised, blurred by 3 x 3 taps of a Gaussian; mirrored outside."""
    y, x = np.mgrid[-8:9, -8:9]
    aliased = (x**2 + y**2 <= radius**2).astype(float)
    taps = np.exp(-(np.array([-1.0, 0.0, 1.0]) ** 2) / (2 * sigma**2))
    kernel = ndimage.convolve(aliased / aliased.sum(), np.outer(taps, taps) / taps.sum() ** 2, mode="constant")
    for image in images(12, 13)[:2]:
        expected = ndimage.correlate(image[0].double().numpy(), kernel, mode="mirror")
        theta = torch.tensor([[radius + 5e-4]], dtype=torch.float64)
        found = Defocus(1e-3, sigma)(image[None].double(), theta)[0, 0]
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("case", ["rotational", "zoom", "motion", "defocus"])
def test_gradients_in_theta(case):
    """Automatic derivatives against central differences, where there is no kink."""
    psi, _, _ = MOVERS[case]
    x = images(9, 11, 2)[:1].double()
    theta = torch.full((1, psi.dim), 0.3137, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: psi(x, t), (theta,), eps=1e-7, atol=1e-5)


def test_what_blurs_refuse():
    x = images(8, 12)
    for make in (
        lambda: RotationalBlur(1),
        lambda: ZoomBlur(0),
        lambda: MotionBlur(1),
        lambda: MotionBlur(last=0.0),
        lambda: MotionBlur(last=math.inf),
        lambda: Defocus(edge=0.0),
        lambda: Defocus(edge=2.1),
        lambda: Defocus(edge=math.nan),
        lambda: Defocus(alias=-0.1),
        lambda: Defocus(alias=math.inf),
        lambda: Defocus()(x, torch.full((len(x), 1), -0.1)),
        lambda: Defocus()(x, torch.full((len(x), 1), 9.0)),
        lambda: RotationalBlur()(torch.zeros(2, 1, 16), torch.zeros(2, 1)),
        lambda: Defocus()(torch.zeros(2, 1, 16), torch.zeros(2, 1)),
    ):
        with pytest.raises(RequestError) as failure:
            make()
        assert "\n" not in str(failure.value)


# ---------------------------------------------------------------- departure


def boxes(case, number=4):
    """Boxes of every width within the range of a transformation, one from its lower end, one to its upper end."""
    psi, lows, highs = MOVERS[case]
    least, most = torch.tensor(lows, dtype=torch.float64), torch.tensor(highs, dtype=torch.float64)
    random, found = torch.Generator().manual_seed(len(case)), []
    for width in (1e-6, 1e-3, 0.02, 0.1, 0.5):
        share = torch.rand(number, psi.dim, generator=random, dtype=torch.float64)
        low = least + (most - least) * (1 - width) * share
        low[0], low[1] = least, most - width * (most - least)
        found.append(torch.stack([low, (low + width * (most - least)).clamp(least, most)]))
    return torch.cat(found, 1)


@torch.inference_mode()
def off_linear(psi, x, low, high, steps=21):
    """Largest |psi(x, theta) - I(theta)| of each pixel found in boxes low, high, I from their corners: (k, c, h, w)."""
    axis = torch.linspace(0, 1, steps if psi.dim == 1 else 7, dtype=torch.float64)
    share = torch.cartesian_prod(*[axis] * psi.dim).view(-1, psi.dim)
    theta = (low[:, None] + share * (high - low)[:, None]).clamp(low[:, None], high[:, None])
    k = len(low)

    def at(parameters):
        every = parameters.reshape(-1, psi.dim).float()
        return psi(x.expand(len(every), *x.shape), every).double().view(k, -1, *x.shape)

    straight = torch.zeros(k, len(share), *x.shape, dtype=torch.float64)
    for bits in itertools.product((False, True), repeat=psi.dim):
        upper = torch.tensor(bits)
        weight = torch.where(upper, share, 1 - share).prod(1).view(1, -1, 1, 1, 1)
        straight += weight * at(torch.where(upper, high, low))
    return (at(theta) - straight).abs().amax(1)


@pytest.mark.parametrize("case", MOVERS)
def test_no_pixel_departs_farther(case):
    """Pixel by pixel, for boxes from a millionth of the range to half of it, and boxes within them."""
    psi = MOVERS[case][0]
    low, high = boxes(case)
    a, b = torch.rand(2, *low.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(0).values
    for h, w, channels in ((12, 12, 1), (7, 11, 2)):
        for x in images(h, w, channels):
            bound = psi.departure(x, low, high)
            assert bound.shape == (len(low), *x.shape)
            assert bound.dtype == torch.float64
            for ends in ((low, high), (low + (high - low) * a, low + (high - low) * b)):
                assert (off_linear(psi, x, *ends) <= bound + 1e-12).all()


@pytest.mark.parametrize("edge", [2.0, 1.0, 0.3, 0.02, 1e-3, 1e-5])
def test_defocus_next_to_its_kinks(edge):
    """A ring of pixels enters the disc at d - edge / 2, and is in it at d + edge / 2: boxes that end there, or where
    float32 rounds their end across it."""
    psi, low, high = Defocus(edge), [], []
    for i, j, side in itertools.product(range(1, 4), range(3), (-0.5, 0.5)):
        kink = math.hypot(i, j) + side * edge
        near = np.float32(kink)
        others = [float(near), float(np.nextafter(near, np.float32(0))), float(np.nextafter(near, np.float32(9)))]
        ends = [
            kink,
            *others,
            *((a + b) / 2 + tiny for a, b in itertools.pairwise(sorted(others)) for tiny in (-1e-12, 1e-12)),
        ]
        for end, width in itertools.product(ends, (0.2, 1e-3)):
            low += [max(0.0, end - width), max(0.0, end)]
            high += [max(1e-9, end), max(0.0, end) + width]
    ends = torch.tensor(low, dtype=torch.float64)[:, None], torch.tensor(high, dtype=torch.float64)[:, None]
    for x in images(9, 9)[:3]:
        assert (off_linear(psi, x, *ends, steps=7) <= psi.departure(x, *ends) + 1e-12).all()


def test_departures_shrink_with_the_box():
    """Within a factor of what is found for narrow boxes that meet no kink, far below the movement otherwise."""
    for case, factor in (("rotational", 6.0), ("zoom", 6.0)):
        psi, (x,) = MOVERS[case][0], digits(0)
        low = torch.linspace(0.05, 0.9, 30, dtype=torch.float64)[:, None] * MOVERS[case][2][0]
        high = low + 0.01 * MOVERS[case][2][0]
        bound, found = psi.departure(x, low, high), off_linear(psi, x, low, high)
        with torch.inference_mode():
            apart = (psi(x.expand(30, *x.shape), high.float()) - psi(x.expand(30, *x.shape), low.float())).double()
        norms = [part.flatten(1).norm(dim=1) for part in (bound, found, apart)]
        assert (norms[0] / norms[1]).median() < factor, case
        assert (norms[0] < norms[2] / 3).float().mean() > 0.9, case


# ---------------------------------------------------------------- movement of slices


@pytest.mark.parametrize("case", MOVERS)
def test_no_real_file_moves_farther(case):
    """Files in three formats through five filters: never farther from the middle than the bound."""
    psi, lows, highs = MOVERS[case]
    low, high = (ends[::3] for ends in boxes(case))
    tried = 0
    for saved in ("8bit", "float", "real"):
        threat = TransformationThreat(psi, lows, highs, saved=saved)
        tried += no_file_moves_farther(threat, images(12, 12)[1:], low, high, 8)
    assert tried > 1000


class Relu(torch.nn.Module):
    """A step that is not linear, and leaves images as they are."""

    lipschitz = 1.0

    def forward(self, x):
        return x.relu()


@pytest.mark.parametrize("dark", [False, True])
def test_pixels_that_turn_back_in_the_middle(dark):
    """A spot is brightest, or darkest, in the middle of a slice: either side counts."""
    psi, spot = MotionBlur(2, 1.0), torch.zeros(1, 9, 9)
    spot[0, 4, 4] = 1.0
    x = (1 - spot) if dark else spot
    threat = TransformationThreat(psi, -0.2, 0.2, saved="real")
    low, high = torch.tensor([[-0.2, 0.0]], dtype=torch.float64), torch.tensor([[0.2, 0.0]], dtype=torch.float64)
    (middle,) = middle_images(threat, psi, x, low, high)
    for steps in ([RectangleVignette(2)], [RectangleVignette(2), Relu()]):
        smoothed = visiting(steps)
        bound = movements(smoothed, threat, psi, x, low, high).sum()
        found = moved(smoothed, threat, x, torch.cat([low, high, low / 2]), middle).max()
        assert found <= bound <= found * (1.01 if len(steps) == 1 else 1.5)


@pytest.mark.parametrize(
    ("psi", "lows", "highs", "factor"),
    [
        (RotationalBlur(), [0.0], [30.0], 1.25),
        (ZoomBlur(), [0.0], [0.5], 1.25),
        (MotionBlur(), [0.0, 0.0], [1.0, 1.0], 2.0),
        (Defocus(), [0.0], [4.0], 2.0),
        (Defocus(0.3, 0.5), [0.0], [4.0], 2.0),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_movements_of_the_certificates_slices_are_nearly_attained(psi, lows, highs, factor):
    """Digits through a disc and a low-pass, slices as the certificate cuts them: the bound is at most `factor` times
    the farthest file, in the median of those that move at all (where no ring enters the disc, nothing does)."""
    threat = TransformationThreat(psi, lows, highs, saved="real")
    smoothed = visiting(FILTERS["disc and low-pass"], sigma=0.5)
    (x,) = threat.prepare(digits(0))
    ends = [torch.tensor(e, dtype=torch.float64) for e in (lows, highs)]
    pieces = finish(Cover(CoverCertifier(margins=(0.3,)), smoothed, threat, x, Stream(0, 0), 0, 0.0).cut(*ends, 0))[::2]
    low, high = torch.stack([s.low for s in pieces]), torch.stack([s.high for s in pieces])
    bounds, files = farness(smoothed, threat, x, low, high, 20)
    found = files.amax(1)
    assert (found <= bounds).all()
    moving = found > 0.01
    assert moving.sum() >= 4
    assert (bounds / found)[moving].median() < factor
    assert found.max() > 0.05
    assert (bounds[~moving] < 0.15).all()
