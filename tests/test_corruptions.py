"""The common corruptions against Hendrycks and Dietterich's own recipes, CIFAR-10-C files, and the command."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image
from torchvision import datasets

import layouts
from conftest import QUIET, one_sentence, records, run_main, run_task, snapshot, timeless
from gsmooth_lightning.data import Digits
from gsmooth_lightning.data.cifar import read_corruption
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat
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


# ---------------------------------------------------------------- the command


class Steps(torch.nn.Module):
    """The class is the image's mean, in steps of 25 / 255."""

    def __init__(self):
        super().__init__()
        self.centres = torch.nn.Parameter(torch.arange(10) * 25.0)

    def forward(self, x):
        return -((x.mean((1, 2, 3))[:, None] * 255 - self.centres) ** 2)


def class_of(pixels: np.ndarray) -> np.ndarray:
    """What Steps says of bytes (..., h, w, c)."""
    return np.abs(pixels.mean((-1, -2, -3))[..., None] - np.arange(10) * 25).argmin(-1)


STEPS = (
    *QUIET,
    f"model._target_={__name__}.Steps",
    "model=custom",
    "preprocess=none",
    "transform=identity",
    "threat=l2",
    "law=none",
    "noise.sigma=0.01",
    "n=16",
    "block=16",
    "checkpoint=steps.ckpt",
)


@pytest.fixture
def steps(here: Path) -> Path:
    torch.save(Steps().state_dict(), here / "steps.ckpt")
    return here


def cifar_c(root: Path, size: int = 12) -> Path:
    """A folder for the images of `layouts.cifar`: at severity s the last 2 s of 12 images look like another class."""
    folder = root / "CIFAR-10-C"
    folder.mkdir()
    labels = 9 - np.arange(size) % 10
    looks = np.stack([np.where(np.arange(size) < size - 2 * s, labels, (labels + 1) % 10) for s in range(1, 6)])
    np.save(folder / "labels.npy", np.tile(labels, 5))
    for name in ("zoom_blur", "fog"):
        np.save(
            folder / f"{name}.npy", np.broadcast_to((looks * 25).reshape(-1, 1, 1, 1), (60, 32, 32, 3)).astype("u1")
        )
    return folder


def cells(path: Path) -> dict[str, dict[str, str]]:
    """The second table of a report: row -> column -> cell."""
    lines = (path / "report.md").read_text().split("\n\n")[1].strip().splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_accuracy_on_a_folder(steps, monkeypatch):
    """Known labels, known accuracies; beside them what GSmooth printed; another file is another run."""
    layouts.cifar(steps / "data", datasets.CIFAR10, monkeypatch)
    folder = cifar_c(steps)
    overrides = (*STEPS, "data=cifar10", f"folder={folder}", "corruptions=[zoom_blur,fog]", "store=run")
    ended = run_main("corrupt", *overrides, "severities=[1,2,5]")
    assert (ended.code, ended.error) == (0, None), ended.err
    table = cells(steps / "run")
    accuracies = {"severity 1": "83.3%", "severity 2": "66.7%", "severity 5": "16.7%", "mean": "55.6%"}
    assert list(table)[:2] == ["clean, base", "clean, smoothed"]
    for name in ("zoom_blur", "fog"):
        for classifier in ("base", "smoothed"):
            row = table[f"{name}, {classifier}"]
            assert {key: row[key] for key in accuracies} == accuracies
    assert (table["zoom_blur, smoothed"]["GSmooth (published)"], table["fog, smoothed"]["TSS (published)"]) == (
        "77.1%",
        "",
    )
    clean = layouts.cifar_pixels(5032)[5020:].transpose(0, 2, 3, 1)
    expected = np.mean(class_of(clean) == 9 - np.arange(12) % 10)
    assert table["clean, base"]["mean"] == f"{expected:.1%}"
    found = records(steps / "run")
    assert [r["corruption"][0] for r in found] == ["clean"] * 12
    assert found[11]["votes"][1] == np.eye(10)[(found[11]["label"] + 1) % 10].astype(int).dot(16).tolist()
    pixels = np.load(folder / "fog.npy")
    np.save(folder / "fog.npy", 255 - pixels)
    one_sentence(run_main("corrupt", *overrides, "severities=[1,2,5]"), "another run", "files differ")


def test_our_files_are_judged_as_they_are_saved(steps):
    """Brightness of digits: the base class of the 8-bit file of each severity; votes do not depend on slots."""
    overrides = (*STEPS, "images.every=40", "corruptions=[brightness,motion_blur]", "severities=[5,1]")
    run_task("corrupt", *overrides, "store=run")
    prepare = PixelThreat("8bit", 28).prepare
    for record in records(steps / "run"):
        x = Digits().split("test", 10)[record["index"]][0]
        bytes_ = (prepare(x[None])[0].permute(1, 2, 0).double() * 255).numpy()
        saved = [np.clip(np.round(bytes_ + amount * 255), 0, 255) for amount in (0, 0.3, 0.05)]
        assert record["base"][:3] == [int(class_of(file)) for file in saved]
        assert list(zip(record["corruption"], record["severity"], strict=True))[1:4] == [
            ("brightness", 5),
            ("brightness", 1),
            ("motion_blur", 5),
        ]
        assert np.sum(record["votes"], 1).tolist() == [16] * 5
    assert "published" not in (steps / "run" / "report.md").read_text()
    run_task("corrupt", *overrides, "images.in_flight=3", "store=again")
    assert timeless(steps / "run")["records.jsonl"] == timeless(steps / "again")["records.jsonl"]


def test_interrupted_run_goes_on(checkpoint, here):
    """Finished images are kept, a torn line is made again, and the bytes are those of a whole run."""
    overrides = (*QUIET, "noise.sigma=0.25", "law.sigma=20", f"checkpoint={checkpoint}", "n=8", "severities=[2]")
    run_task("corrupt", *overrides, "images.first=4", "store=whole")
    lines = (here / "whole" / "records.jsonl").read_bytes().splitlines(keepends=True)
    run_task("corrupt", *overrides, "images.first=2", "store=run")
    (here / "run" / "rank-0.jsonl").write_bytes(lines[3] + lines[2][:99])
    kept = records(here / "run")
    ended = run_main("corrupt", *overrides, "images.first=4", "store=run")
    assert (ended.code, ended.err, ended.error) == (0, "", None)
    assert "gaussian_blur, smoothed" in ended.out
    assert records(here / "run")[:2] == kept  # seconds included: not made again
    for name in ("records.jsonl", "fingerprint.json"):
        assert timeless(here / "run")[name] == timeless(here / "whole")[name]
    assert (here / "run" / "report.md").read_text() == (here / "whole" / "report.md").read_text()
    before = snapshot(here / "run")
    run_task("corrupt", *overrides, "images.first=4", "store=run")
    assert snapshot(here / "run") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("corruptions=[fog]",), ("fog is not made here", "zoom_blur")),
        (("corruptions=zoom_blur",), ("corruptions must be a list",)),
        (("corruptions=[]",), ("corruptions must be a list",)),
        (("corruptions=[pixelate,pixelate]",), ("each once",)),
        (("severities=[0]",), ("from 1 to 5", "[0]")),
        (("severities=[1,6]",), ("from 1 to 5", "[1, 6]")),
        (("severities=[1.5]",), ("severities must be a list",)),
        (("n=0",), ("n must be a whole number",)),
        (("folder=nowhere",), ("nowhere/labels.npy is missing", "correct folder")),
        (("folder=CIFAR-10-C", "corruptions=[fog]"), ("not of the images that are visited", "data=cifar10")),
        (("folder=CIFAR-10-C",), ("defocus_blur.npy is missing", "choose corruptions from fog, zoom_blur")),
        (("checkpoint=null",), ("corrupt needs a trained network",)),
    ],
)
def test_bad_input_is_one_sentence(steps, change, words):
    cifar_c(steps)
    before = snapshot(steps)
    one_sentence(run_main("corrupt", *STEPS, "store=run", *change), *words)
    assert snapshot(steps) == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: layouts.cut(folder / "fog.npy"), ("fog.npy is damaged", "again")),
        (lambda folder: np.save(folder / "labels.npy", np.zeros(60, int)), ("not of the images that are visited",)),
        (lambda folder: np.save(folder / "fog.npy", np.zeros((60, 8, 8, 3), "u1")), ("fog.npy is damaged", "8x8x3")),
    ],
)
def test_a_damaged_folder_is_one_sentence(steps, monkeypatch, spoil, words):
    layouts.cifar(steps / "data", datasets.CIFAR10, monkeypatch)
    spoil(cifar_c(steps))
    overrides = ("data=cifar10", "folder=CIFAR-10-C", "corruptions=[fog]", "store=run")
    one_sentence(run_main("corrupt", *STEPS, *overrides), *words)
    assert not (steps / "run").exists()
