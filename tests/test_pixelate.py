"""Pixelation and glass blur: against PIL and a plain loop of swaps, and the outcomes that are visited."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from covers import digits
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform import GlassBlur, Pixelate

STRONG = ((0.3, 1, 1), (0.5, 2, 2), (1.2, 3, 1))
"""Severities that show in small images."""


def noise(*shape):
    return torch.tensor(np.random.default_rng(sum(shape)).random(shape)).float()


def float32_around(points, low, high, steps=40):
    """All float32 numbers within so many steps of the points, and the ends of a range as float32 rounds them; those
    outside are dropped."""
    centre = np.array([*points, low, high], dtype=np.float32)
    found, up, down = [centre], centre, centre
    for _ in range(steps):
        up, down = np.nextafter(up, np.float32(2)), np.nextafter(down, np.float32(-2))
        found += [up, down]
    every = np.unique(np.concatenate(found))
    return every[(every >= np.float32(low)) & (every <= np.float32(high))]


# ---------------------------------------------------------------- pixelation


def by_pil(image, rows, columns):
    """Reduced to so many rows and columns and blown up again, channel by channel."""
    h, w = image.shape[1:]
    small = [Image.fromarray(c.numpy()).resize((columns, rows), Image.Resampling.BOX) for c in image]
    return np.stack([np.asarray(c.resize((w, h), Image.Resampling.BOX)) for c in small])


@pytest.mark.parametrize(
    ("h", "w", "channels"), [(n, n, 1) for n in range(1, 41)] + [(30, 20, 1), (7, 13, 3), (64, 50, 1)]
)
def test_pixelation_is_that_of_pil(h, w, channels):
    """All sizes that are left, its ties included; in a batch each image has its own."""
    psi, x = Pixelate(), noise(channels, h, w)
    for side in {h, w}:
        left = np.arange(-(-side // min(h, w)), side + 1)
        theta = torch.tensor(1 - (left + 0.5) / side).clamp_min(0)[:, None]
        found = psi(x.expand(len(theta), *x.shape), theta.float())
        for t, own in zip(theta[:, 0].tolist(), found, strict=True):
            expected = by_pil(x, *(int(np.float32(1 - np.float32(t)) * np.float32(size)) for size in (h, w)))
            np.testing.assert_allclose(own, expected, atol=2e-6)
        exact = psi(x.double().expand(len(theta), *x.shape), theta)
        assert exact.dtype == torch.float64
        np.testing.assert_allclose(exact, found, atol=1e-6)
    assert torch.equal(psi(x[None], torch.zeros(1, 1))[0], x)


def left_of(theta, size):
    """floor((1 - theta) size) in float32, as numpy computes it."""
    return np.floor((np.float32(1) - theta) * np.float32(size)).astype(int)


RANGES = [
    (0.0, 0.5),
    (0.0, 0.25),
    (0.0, 0.35),
    (0.1, 0.3),
    (0.0, 1e-9),
    (0.0, 3e-8),
    (0.0, 6e-8),
    *((0.0, high) for high in (1 / 3, 3 / 7, 0.4, 4 / 7, 0.6, 5 / 7, 0.1, 0.7, 0.8, 6 / 7)),
    *((0.0, 1 - m / 13) for m in (3, 7, 11, 12)),
    (1 - 20 / 28, 1 - 9 / 28),
]


@pytest.mark.parametrize("shape", [(28, 28), (13, 13), (10, 10), (30, 20), (21, 14), (9, 32), (8, 7)])
def test_every_outcome_of_pixelation_is_visited(shape):
    """All float32 next to where a side loses a pixel, and those in between: what is left is listed with a `nearest`
    that is no larger, and nothing else is."""
    psi, sides = Pixelate(), np.array(shape)
    kinks = np.unique(np.concatenate([1 - np.arange(1, size + 1) / size for size in shape]))
    between = np.linspace(0, 1, 997)
    for low, high in RANGES:
        if left_of(np.float32(high), min(shape)) < 1:
            continue
        nearest, at = (ends[:, 0].numpy() for ends in psi.outcomes(low, high, (1, *shape)))
        theta = float32_around(np.concatenate([kinks, between[(between > low) & (between < high)]]), low, high)
        found = np.stack([left_of(theta, size) for size in sides], 1)
        listed = np.stack([left_of(at.astype(np.float32), size) for size in sides], 1)
        assert len(np.unique(listed, axis=0)) == len(listed)
        assert ((at >= low) & (at <= high) & (nearest >= low) & (nearest <= at)).all()
        assert (at - nearest <= 1.1e-6).all()
        which = (found[:, None] == listed[None]).all(2)
        assert which.any(1).all(), (low, high)
        assert which.any(0).all()
        first = nearest[which.argmax(1)]
        real = np.clip(theta - np.spacing(theta).astype(float) / 2, low, high)  # the least that float32 rounds to theta
        assert (first <= real).all()


def test_the_images_of_the_outcomes_are_those_of_all_parameters():
    """Of an image of 10 x 6 pixels: files of random parameters equal, bit by bit, the one that is listed."""
    psi, x = Pixelate(), noise(1, 1, 10, 6)
    nearest, at = psi.outcomes(0.0, 0.8, x.shape[1:])
    listed = torch.cat([psi(x, t[None].float()) for t in at])
    for theta in torch.rand(300, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.8:
        same = (listed == psi(x, theta)).flatten(1).all(1)
        assert same.sum() == 1
        assert float(nearest[same]) <= float(theta)


@pytest.mark.parametrize("theta", [-0.1, 0.91, 1.0, 1.5])
def test_no_pixel_left_is_refused(theta):
    for call in (
        lambda: Pixelate()(noise(1, 1, 10, 12), torch.tensor([[theta]])),
        lambda: Pixelate().outcomes(min(theta, 0.0), max(theta, 0.0), (1, 10, 12)),
    ):
        with pytest.raises(RequestError, match=r"which must be 1 to 10") as failure:
            call()
        assert "\n" not in str(failure.value)
    with pytest.raises(RequestError, match="images"):
        Pixelate()(noise(2, 1, 16), torch.zeros(2, 1))


# ---------------------------------------------------------------- glass blur


def glass(x, sigma, distance, rounds, seed):
    """The common corruptions' loop, pixel by pixel: blur, swap, blur; without rounding to 8 bits in between."""

    def blur(y):
        return np.stack([ndimage.gaussian_filter(c, sigma, mode="nearest", truncate=4.0) for c in y])

    y, random = blur(x), np.random.default_rng(seed)
    h, w = x.shape[1:]
    for _ in range(rounds):
        for i in range(h - distance, distance, -1):
            for j in range(w - distance, distance, -1):
                di, dj = random.integers(-distance, distance, size=2)
                here, there = y[:, i, j].copy(), y[:, i + di, j + dj].copy()
                y[:, i, j], y[:, i + di, j + dj] = there, here
    return blur(y)


@pytest.mark.parametrize("severities", [None, STRONG])
@pytest.mark.parametrize(("h", "w", "channels"), [(12, 12, 1), (9, 14, 3), (2, 1, 1)])
def test_glass_blur_is_a_loop_of_swaps(severities, h, w, channels):
    """Each severity against the loop; a batch of several severities, theta rounded, halves up; 0 is no change."""
    for seed in (0, 7):
        psi = GlassBlur(severities, seed) if severities else GlassBlur(seed=seed)
        x = noise(6, channels, h, w)
        theta = torch.tensor([[0.0], [0.49], [0.5], [1.6], [2.5], [3.0]])
        levels = (0, 0, 1, 2, 3, 3)
        for images, tolerance in ((x, 3e-6), (x.double(), 1e-12)):
            found = psi(images, theta)
            assert found.dtype == images.dtype
            for image, k, own in zip(images, levels, found, strict=True):
                plain = image.double().numpy()
                expected = glass(plain, *psi.severities[k - 1], seed) if k else plain
                np.testing.assert_allclose(own, expected, atol=tolerance)
        assert torch.equal(psi(x, theta)[:2], x[:2])
    if h > 2:
        assert not torch.equal(GlassBlur(STRONG, 0)(x, theta), GlassBlur(STRONG, 1)(x, theta))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 5.0), (0.0, 0.4), (0.0, 0.5), (0.0, 0.49999999), (0.0, 1.5), (0.6, 3.2), (0.0, 4.49999999)]
)
def test_every_severity_is_visited(low, high):
    """Of all float32 next to halves: the severity they are rounded to is listed, and no later than they are."""
    psi, (x,) = GlassBlur([(0.3 + 0.2 * k, 1 + k, 1) for k in range(5)]), digits(3)
    nearest, at = (ends[:, 0].numpy() for ends in psi.outcomes(low, high, x.shape))
    assert ((at >= low) & (at <= high) & (nearest >= low) & (nearest <= at)).all()
    theta = float32_around([*np.arange(0, 5.6, 0.5), 0.2, 1.7], low, high, steps=3)
    images, listed = (psi(x.expand(len(t), *x.shape), torch.tensor(t).float()[:, None]) for t in (theta, at))
    same = (images[:, None] == listed[None]).flatten(2).all(2).numpy()
    assert (same.sum(1) == 1).all()
    assert same.any(0).all()
    real = np.clip(theta - np.spacing(theta).astype(float) / 2, low, high)
    assert (nearest[same.argmax(1)] <= real).all()


def test_what_glass_blur_refuses():
    for severities in ([], [[0.0, 1, 1]], [[0.5, 0, 1]], [[0.5, 1, 0]]):
        with pytest.raises(RequestError, match=r"transform\.severities"):
            GlassBlur(severities)
    for theta in (-0.6, 5.5, 100.0):
        with pytest.raises(RequestError, match="between 0 and 5"):
            GlassBlur()(noise(1, 1, 8, 8), torch.tensor([[theta]]))
    with pytest.raises(RequestError, match="images"):
        GlassBlur()(noise(2, 1, 16), torch.zeros(2, 1))
