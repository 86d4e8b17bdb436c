"""The common corruptions against Hendrycks and Dietterich's own recipes, and CIFAR-10-C files."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

import layouts
from gsmooth_lightning.data.cifar import read_corruption
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.transform.corruptions import CORRUPTIONS, SETTINGS, corruption

# ---------------------------------------------------------------- make_cifar_c.py and make_imagenet_c.py, (h, w, 3)


def their_zoom_blur(x, stop, step):
    factors, side = np.arange(1, stop, step), len(x)
    total = x.copy()
    for factor in factors:
        crop = int(np.ceil(side / factor))
        top = (side - crop) // 2
        large = ndimage.zoom(x[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
        trim = (len(large) - side) // 2
        total += large[trim : trim + side, trim : trim + side]
    return total / (len(factors) + 1)


def their_defocus_blur(x, radius, alias):
    reach, size = (8, 3) if radius <= 8 else (radius, 5)
    a, b = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
    disc = (a**2 + b**2 <= radius**2).astype(float)
    taps = np.exp(-0.5 * ((np.arange(size) - size // 2) / alias) ** 2)
    for axis in (0, 1):  # cv2.GaussianBlur, whose border is scipy's "mirror", as is that of cv2.filter2D
        disc = ndimage.correlate1d(disc / disc.sum() if axis == 0 else disc, taps / taps.sum(), axis, mode="mirror")
    return ndimage.correlate(x, disc[:, :, None], mode="mirror")


def their_glass_blur(x, sigma, distance, rounds):
    """Without the rounding to 8 bits, and with rows that are really swapped."""
    h, w, _ = x.shape
    x = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        for i in range(h - distance, distance, -1):
            for j in range(w - distance, distance, -1):
                down, right = generator.integers(-distance, distance, size=2)
                x[i, j], x[i + down, j + right] = x[i + down, j + right].copy(), x[i, j].copy()
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)


def their_motion_blur(x, radius, sigma, angle=0.0):
    """MotionBlurImage of ImageMagick: whole offsets, the edge repeated outside."""
    h, w, _ = x.shape
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    total = np.zeros_like(x)
    for k, weight in zip(steps, weights / weights.sum(), strict=True):
        right, down = (int(np.ceil(k * f(np.deg2rad(angle)) - 0.5)) for f in (np.cos, np.sin))
        rows, columns = np.clip(np.arange(h) + down, 0, h - 1), np.clip(np.arange(w) + right, 0, w - 1)
        total += weight * x[rows][:, columns]
    return total


def their_gaussian_blur(x, sigma):
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)


def their_brightness(x, amount):
    hsv = rgb_to_hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
    return hsv_to_rgb(hsv)


def their_contrast(x, left):
    mean = x.mean((0, 1), keepdims=True)
    return np.clip((x - mean) * left + mean, 0, 1)


def their_pixelate(x, left):
    def resized(channel, size):
        return np.array(Image.fromarray(channel.astype(np.float32)).resize((size, size), Image.Resampling.BOX))

    return np.stack([resized(resized(x[..., k], int(len(x) * left)), len(x)) for k in range(3)], -1)


def photograph(side):
    """A photograph that scikit-learn ships, (side, side, 3)."""
    return np.array(Image.fromarray(load_sample_image("china.jpg")[:, 100:527]).resize((side, side))) / 255.0


STRAIGHT = SimpleNamespace(uniform=lambda n: torch.full((n,), 0.5, dtype=torch.float64))
"""Draws that turn nothing."""


def ours(name, severity, x, source=STRAIGHT):
    image = torch.tensor(x.transpose(2, 0, 1), dtype=torch.float32)
    return corruption(name, severity, len(x))(image, source).clamp(0, 1).numpy().transpose(1, 2, 0)


def difference(name, severity, side):
    """(largest, mean) difference of our image and theirs, and how far theirs is from the clean one on average."""
    x, chosen = photograph(side), SETTINGS[side][name][severity - 1]
    theirs = globals()[f"their_{name}"](x.copy(), *(chosen if isinstance(chosen, tuple) else [chosen]))
    apart = np.abs(ours(name, severity, x) - theirs)
    return apart.max(), apart.mean(), np.abs(theirs - x).mean()


def test_every_corruption_has_five_severities_for_both_sizes():
    for settings in SETTINGS.values():
        assert settings.keys() == CORRUPTIONS.keys()
        assert all(len(levels) == 5 for levels in settings.values())
    assert len(corruption("zoom_blur", 5, 32).transform.times) == 26  # 1, 1.01, ..., 1.25
    assert len(corruption("zoom_blur", 1, 32).transform.times) == 7  # np.arange(1, 1.06, .01) ends with 1.06
    # the nearer size: 28 and 80 as CIFAR-10-C, 96 and 500 as ImageNet-C
    radii = [corruption("defocus_blur", 5, side).theta[0] for side in (8, 28, 80, 96, 500)]
    assert radii == pytest.approx([1.51, 1.51, 1.51, 10.01, 10.01])


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", ["defocus_blur", "pixelate", "motion_blur", "glass_blur", "contrast"])
def test_same_as_theirs(name, side):
    """Up to rounding to float32; motion at 0 degrees, glass with their swaps made right."""
    for severity in (1, 2) if side == 224 else (1, 2, 3, 4, 5):
        largest, _, moved = difference(name, severity, side)
        assert largest < 2e-5, severity
        assert moved > 0.004, severity


def test_wide_discs_lose_what_theirs_cut():
    """From radius 8 on their disc fills its square."""
    for severity in (4, 5):
        largest, mean, moved = difference("defocus_blur", severity, 224)
        assert largest < 0.015
        assert mean < 0.15 * moved


@pytest.mark.parametrize("side", [32, 224])
def test_gaussian_blur_is_near(side):
    """Another kernel of the same variance, and another border; a variance of sigma^2 would be wrong at .4."""
    for severity in range(1, 6):
        _, mean, moved = difference("gaussian_blur", severity, side)
        assert mean < 0.16 * moved, severity
    made = corruption("gaussian_blur", 1, 32)
    x = torch.zeros(1, 31, 31)
    x[0, 15, 15] = 1
    rows = made(x, STRAIGHT)[0].sum(1).double()
    spread = ndimage.gaussian_filter(x[0].numpy(), 0.4, mode="nearest", truncate=4).sum(1)
    variances = [float((np.asarray(k) * (np.arange(31) - 15) ** 2).sum()) for k in (rows, spread)]
    assert variances[0] == pytest.approx(variances[1], rel=1e-3)
    assert variances[0] == pytest.approx(0.081, abs=1e-3)


@pytest.mark.parametrize("side", [32, 224])
def test_zoom_blur(side):
    """The mean of the image and its enlargements about the centre, by scipy; theirs lies up to half a pixel lower."""
    x = photograph(side)
    centre = np.array([(side - 1) / 2, (side - 1) / 2, 0])
    for severity in (1, 5):
        factors = np.arange(1, *SETTINGS[side]["zoom_blur"][severity - 1])
        inverse = [np.array([1 / f, 1 / f, 1]) for f in factors]
        total = x + sum(ndimage.affine_transform(x, a, centre - a * centre, order=1) for a in inverse)
        assert np.abs(ours("zoom_blur", severity, x) - total / (len(factors) + 1)).max() < 2e-4
        offset = 0.5 if side == 32 else 0.25
        theirs = their_zoom_blur(x, *SETTINGS[side]["zoom_blur"][severity - 1])
        moved = ndimage.shift(ours("zoom_blur", severity, x), (offset, offset, 0), order=1)
        apart, inner = np.abs(moved - theirs), slice(side // 8, -(side // 8))
        assert apart[inner, inner].mean() < 0.45 * np.abs(theirs - x)[inner, inner].mean()


def test_brightness_is_theirs_on_grey_and_brighter_in_colour():
    grey = np.repeat(photograph(32).mean(2, keepdims=True), 3, 2)
    for severity, amount in enumerate(SETTINGS[32]["brightness"], 1):
        assert np.abs(ours("brightness", severity, grey) - their_brightness(grey, amount)).max() < 1e-6
    x = photograph(32)
    assert (ours("brightness", 5, x) >= their_brightness(x, 0.3) - 1e-6).all()


def test_motion_is_turned_another_way_for_each_image():
    """At the angle that was drawn it is near theirs, which moves by whole pixels; uniform within +-45 degrees."""
    x = photograph(224)
    turned = ours("motion_blur", 3, x, SimpleNamespace(uniform=lambda n: torch.full((n,), 5 / 6).double()))
    near, far = (np.abs(turned - their_motion_blur(x, 15, 8, angle)).mean() for angle in (30.0, -30.0))
    assert near < 0.1 * far
    dot = torch.zeros(1, 41, 41)
    dot[0, 20, 20] = 1
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    angles = []
    for i in range(200):
        smeared = corruption("motion_blur", 5, 32)(dot, Stream(0, i).at("select", 1))[0]
        angles.append(float(torch.rad2deg(torch.atan2((smeared * rows).sum(), (smeared * columns).sum()))))
    angles = np.sort((np.array(angles) + 360) % 360 - 180)
    assert np.abs((angles + 45) / 90 - (np.arange(200) + 0.5) / 200).max() < 0.12  # Kolmogorov-Smirnov at .5 %


def test_unknown_names_and_severities():
    with pytest.raises(RequestError, match="fog is not made here; choose corruptions from zoom_blur"):
        corruption("fog", 1, 32)
    for severity in (0, 6):
        with pytest.raises(RequestError, match=f"from 1 to 5, got {severity}"):
            corruption("contrast", severity, 32)
    with pytest.raises(RequestError, match="a corruption is for images"):
        corruption("brightness", 1, 32)(torch.zeros(1, 16000), STRAIGHT)


# ---------------------------------------------------------------- CIFAR-10-C's files


def test_files_are_mapped_and_ordered_by_severity(tmp_path):
    folder = layouts.cifar_c(tmp_path)
    pixels, labels = read_corruption(folder, "gaussian_blur")
    assert isinstance(pixels, np.memmap)
    assert pixels[:, 0, 0, 0].tolist() == [10 * s + 1 for s in range(1, 6) for _ in range(4)]
    assert labels.tolist() == [0, 1, 2, 3] * 5
