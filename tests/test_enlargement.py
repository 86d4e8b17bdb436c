"""Images enlarged before the attack, transformed there and resized back: votes, defects, training, natural sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from conftest import QUIET, SMALL, compose, one_sentence, records, run_main, run_task, timeless
from gsmooth_lightning.certify import AdditiveCertifier
from gsmooth_lightning.data import GTSRB, ImageFolder, ImageNet
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import CertificationModule, ClassifierModule, ImageDataModule
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.preprocess import CenterCrop, DiscVignette, LowPass, Preprocess, Resize
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream, TrainingSource, content_digest, sampling_slack
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.train import NoiseAugmentation
from gsmooth_lightning.transform import Rotation
from plans import finish
from test_preprocess import lowpass_by_fft

SIGMA = 0.25


class Brighter(nn.Module):
    """Class 1 where the mean is above a threshold."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1).mean(1) > self.threshold).long()


def digits(n: int, side: int) -> torch.Tensor:
    """Scans of digits as clean files of side x side pixels, with some grain: (n, 1, side, side)."""
    images = torch.tensor(load_digits().images[:n, None] / 16, dtype=torch.float32)
    grain = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0))
    return PixelThreat(size=side).prepare(images).lerp(grain, 0.1)


def picture(h: int, w: int, seed: int = 0) -> torch.Tensor:
    """A colour image, (3, h, w), with values k/255."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, h, w)) / 255).float()


def resizing(size: int = 18, crop: int = 12, threshold: float = 0.3, block: int = 8) -> SmoothedClassifier:
    steps = Preprocess([Resize(size), CenterCrop(crop), DiscVignette(), LowPass(4)])
    parts = {"law": Gaussian(20.0), "noise": Gaussian(SIGMA), "block": block}
    return SmoothedClassifier(Brighter(threshold), 2, Rotation(), steps, **parts).eval()


# ---------------------------------------------------------------- the threat


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((8, 8), 28, (28, 28)), ((20, 30), 50, (50, 75)), ((31, 17), 40, (72, 40)), ((50, 60), 20, (20, 24))],
)
def test_the_shorter_side_gets_the_size(shape, size, expected):
    """Bicubic, aspect ratio kept; an enlarged image is its own enlargement; each image of a batch as if alone."""
    threat = TransformationThreat(Rotation(), -30, 30, size=size)
    x = torch.stack([picture(*shape, seed) for seed in range(3)])
    enlarged = threat.prepare(x)
    assert enlarged.shape == (3, 3, *expected)
    plain = functional.interpolate(x, size=expected, mode="bicubic", align_corners=False)
    assert torch.equal(enlarged, (plain.clamp(0, 1) * 255).round() / 255)
    assert torch.equal(threat.prepare(enlarged), enlarged)
    assert torch.equal(torch.cat([threat.prepare(image[None]) for image in x]), enlarged)
    assert f"shorter side of {size} pixels" in threat.describe()


def test_enlarged_images_keep_their_shape_in_the_world():
    """A circle stays round: its second moments along both sides are alike, in an image twice as wide as high."""
    ys, xs = torch.meshgrid(torch.arange(20.0) - 9.5, torch.arange(40.0) - 19.5, indexing="ij")
    disc = (ys**2 + xs**2 <= 64).float()
    large = PixelThreat(size=60).prepare(disc[None, None])[0, 0]
    (height, width), total = large.shape, large.sum()
    spread = [
        (large.sum(1 - axis) * (torch.arange(side) - (side - 1) / 2) ** 2).sum() / total
        for axis, side in enumerate((height, width))
    ]
    assert (height, width) == (60, 120)
    assert float(spread[0] / spread[1]) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- against a slow computation


def turned(x: np.ndarray, degrees: float) -> np.ndarray:
    """Bilinear rotation about the centre, counterclockwise, black outside, channel by channel: (c, h, w)."""
    angle = np.deg2rad(degrees)
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = (np.array(x.shape[1:]) - 1) / 2
    offset = centre - back @ centre
    return np.stack([ndimage.affine_transform(c, back, offset, order=1, mode="grid-constant") for c in x])


def slow_encoding(x: np.ndarray, degrees: float, size: int = 18, crop: int = 12, bandwidth: float = 4) -> np.ndarray:
    """Rotation at full size by scipy, resizing by PIL, crop and disc by hand, low-pass by FFT."""
    x = turned(x, degrees)
    h, w = x.shape[1:]
    ratio = size / min(h, w)
    shape = (int(w * ratio), int(h * ratio))
    small = [np.asarray(Image.fromarray(c.astype(np.float32)).resize(shape, Image.Resampling.BILINEAR)) for c in x]
    top, left = (round((side - crop) / 2) for side in small[0].shape)
    cut = np.stack(small)[:, top : top + crop, left : left + crop].astype(float)
    ys, xs = np.mgrid[:crop, :crop] - (crop - 1) / 2
    return lowpass_by_fft(cut * (ys**2 + xs**2 <= ((crop - 1) / 2) ** 2), bandwidth)


@pytest.mark.parametrize("shape", [(36, 36), (45, 36), (36, 54)])
def test_votes_and_defects_agree_with_scipy_and_pil(shape):
    """Files, encodings, defects and each vote of non-square enlarged images."""
    smoothed = resizing()
    threat = TransformationThreat(Rotation(), -30, 30, size=36)
    x = threat.prepare(picture(shape[0] // 3, shape[1] // 3)[None])[0]
    assert x.shape[1:] == shape
    assert smoothed.encoded_shape(x) == (3, 12, 12)
    source = Stream(0, 5).at("estimate", 0)
    theta = smoothed.draw_parameters(source, 8)
    noise = smoothed.noise.sample(source, 8, (3, 12, 12)).numpy()

    slow = np.stack([slow_encoding(x.numpy(), float(t)) for t in theta])
    fast = smoothed.encode(x.expand(8, *x.shape), theta).double().numpy() / smoothed.levels
    np.testing.assert_allclose(fast, slow, atol=2e-4)
    means = np.sort((slow + noise).mean((1, 2, 3)))
    for k in (2, 3, 5):
        assert means[k] - means[k - 1] > 2e-4, "too near to each other to compare"
        smoothed.base.threshold = (means[k] + means[k - 1]) / 2
        assert finish(smoothed.sample(x, Stream(0, 5), "estimate", 0, 8)).tolist() == [k, 8 - k, 0]

    gamma = -17.0
    file = threat.apply(x[None], torch.tensor([[gamma]]))[0]
    saved = np.round(turned(x.numpy().astype(float), gamma).clip(0, 1) * 255) / 255
    assert np.mean(np.abs(file.numpy() - saved) > 1e-6) < 1e-3  # halves may round to either side
    straight = np.stack([slow_encoding(x.numpy(), float(t) + gamma) for t in theta])
    attacked = np.stack([slow_encoding(saved, float(t)) for t in theta])
    found = smoothed.encode(file.expand(8, *x.shape), theta) - smoothed.encode(x.expand(8, *x.shape), theta + gamma)
    np.testing.assert_allclose(
        found.div(smoothed.levels).flatten(1).norm(dim=1),
        np.linalg.norm((attacked - straight).reshape(8, -1), axis=1),
        rtol=0.02,
    )


def test_enlargement_makes_the_defect_smaller():
    """Rotation at 64 pixels and back to 32 against rotation at 32, with the same disc and low-pass."""
    theta = torch.linspace(-25, 25, 6)[:, None]
    gamma = torch.tensor([[13.0]])
    worst = []
    for size, steps in ((32, []), (64, [Resize(32)])):
        preprocess = Preprocess([*steps, DiscVignette(), LowPass(12)])
        smoothed = SmoothedClassifier(Brighter(0.3), 2, Rotation(), preprocess, Gaussian(20.0), Gaussian(SIGMA))
        threat = TransformationThreat(Rotation(), -30, 30, size=size)
        defects = []
        for x in threat.prepare(digits(20, 32)):
            file = threat.apply(x[None], gamma)
            assert file.shape[2:] == (size, size)
            attacked = smoothed.encode(file.expand(6, *x.shape), theta)
            straight = smoothed.encode(x.expand(6, *x.shape), theta + gamma)
            assert attacked.shape == (6, 1, 32, 32)
            defects.append(float((attacked - straight).flatten(1).norm(dim=1).max()))
        worst.append(np.array(defects))
    plain, enlarged = worst
    assert (enlarged < plain).mean() > 0.9
    assert np.median(enlarged) < 0.7 * np.median(plain)


# ---------------------------------------------------------------- what hangs on the encoded shape


def between(means: list[float]) -> float:
    """A threshold with as many means above as below, not near to any."""
    low, high = sorted(means)[len(means) // 2 - 1 :][:2]
    assert high - low > 1e-4
    return (low + high) / 2


def test_slack_and_noise_count_what_the_noise_is_added_to():
    """432 values at 12x12, not the 3 * 36 * 54 of the image."""
    smoothed, x = resizing(), picture(36, 54)
    parameters = sampling_slack(1, 2.0**25)
    assert smoothed.slack(x) == sampling_slack(432, SIGMA * smoothed.levels) + parameters
    assert smoothed.draw(x, Stream(0, 0).at("estimate", 0), 8).shape == (8, 3, 12, 12)
    smoothed.check_function(x)


def test_base_classes_do_not_depend_on_how_many_there_are():
    images = torch.stack([picture(36, 54, seed) for seed in range(11)])
    means = [slow_encoding(x.numpy(), 0.0).mean() for x in images]
    smoothed = resizing(threshold=between(means), block=4)
    slow = [int(mean > smoothed.base.threshold) for mean in means]
    assert smoothed.classify_base(images).tolist() == slow
    assert [int(smoothed.classify_base(x[None])) for x in images] == slow


def test_preprocessing_that_merges_images_is_refused():
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(0, keepdim=True)

    smoothed = SmoothedClassifier(Brighter(0.3), 2, preprocess=Mean(), noise=Gaussian(SIGMA))
    with pytest.raises(RequestError, match="one for each"):
        smoothed.encode(torch.rand(4, 1, 8, 8), torch.zeros(4, 0))


def test_pixel_threats_before_resizing_are_refused_and_before_a_crop_are_right():
    """Resizing may stretch distances. Behind a crop, a linear classifier flips no sooner than the radius says."""
    plan, threat, x = FixedN(n0=64, n=4096), PixelThreat(), picture(16, 20)
    stretched = SmoothedClassifier(Brighter(0.4), 2, preprocess=Preprocess([Resize(32)]), noise=Gaussian(SIGMA)).eval()
    with pytest.raises(RequestError, match="must not stretch"):
        next(AdditiveCertifier(plan).certify(stretched, threat, [(0, x)]))
    crop = Preprocess([CenterCrop(8)])
    cropped = SmoothedClassifier(Brighter(0.485), 2, preprocess=crop, noise=Gaussian(SIGMA)).eval()
    ((_, certificate),) = AdditiveCertifier(plan).certify(cropped, threat, [(0, x)])
    assert certificate.prediction == 1
    distance = float(x[:, 4:12, 6:14].mean() - 0.485) * np.sqrt(3 * 64)  # of the smoothed classifier's boundary
    assert 0.7 * distance < certificate.radius < distance


# ---------------------------------------------------------------- training


class Seen(nn.Module):
    """A network that keeps its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs = x
        return torch.zeros(len(x), 2, requires_grad=True)


def test_training_sees_what_is_certified():
    """The enlarged file, transformed there and resized back: the encoding that certification adds noise to."""
    smoothed = resizing()
    smoothed.base, smoothed.noise = Seen(), None
    threat = TransformationThreat(Rotation(), -30, 30, size=36)
    module = ClassifierModule(smoothed, threat, NoiseAugmentation(), torch.optim.SGD)
    x, y = torch.stack([picture(9, 13, seed) for seed in range(4)]), torch.zeros(4, dtype=torch.long)
    torch.manual_seed(3)
    theta = smoothed.draw_parameters(TrainingSource(x.device), 4)
    assert theta.abs().max() > 5
    torch.manual_seed(3)
    module.log_dict = lambda *_, **__: None
    module.training_step((x, y, torch.arange(4)), 0)
    expected = smoothed.encode(threat.prepare(x), theta) / smoothed.levels
    assert smoothed.base.inputs.shape == (4, 3, 12, 12)
    torch.testing.assert_close(smoothed.base.inputs, expected, atol=1 / smoothed.levels, rtol=0)


@pytest.mark.parametrize(("name", "raw", "clean"), [("cifar10", 32, 32), ("gtsrb", 45, 64)])
def test_fischers_experiments_train_and_certify_at_64_pixels(name, raw, clean):
    """Augmented images arrive at the transformation with 64 pixels a side, clean ones too; the network sees 32."""
    cfg = compose("train", f"experiment=fischer_{name}")
    threat, steps = instantiate(cfg.threat), instantiate(cfg.preprocess)
    assert cfg.data.dataset.get("size", 32) == clean  # as the data set delivers images
    augmented = instantiate(cfg.data.augment)((picture(raw, raw) * 255).byte()).float() / 255
    assert augmented.shape == (3, 64, 64)
    for x in (augmented, picture(clean, clean)):
        enlarged = threat.prepare(x[None])
        assert enlarged.shape == (1, 3, 64, 64)
        assert steps(enlarged).shape == (1, 3, 32, 32)


# ---------------------------------------------------------------- images of all sizes

SIZES = [(20, 30), (24, 24), (33, 20), (20, 30), (40, 50)]
STEPS = (
    "preprocess.steps=[{_target_: gsmooth_lightning.preprocess.Resize, size: 18}, "
    "{_target_: gsmooth_lightning.preprocess.CenterCrop, size: 12}, "
    "{_target_: gsmooth_lightning.preprocess.DiscVignette}]"
)
NATURAL = (
    "data=folder",
    "data.size=12",
    "data.classes=2",
    "data.dataset.root=data",
    "data.dataset.size=null",
    "data.enlarge=36",
    "images.first=null",
    "block=8",
    STEPS,
)


@pytest.fixture
def pictures(here: Path) -> Path:
    """Images of several sizes in two classes, for all splits."""
    for split in ("train", "test"):
        for k, (h, w) in enumerate(SIZES):
            path = here / "data" / split / "ab"[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((picture(h, w, k).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(path)
    return here / "data"


def test_images_come_as_they_are_in_their_files(pictures):
    """By name of class and file: 0, 2, 4 of class a, then 1, 3 of class b."""
    source = ImageFolder(str(pictures), None)
    module = ImageDataModule(source, 2, workers=0, in_flight=3)
    batches = list(module.predict_dataloader())
    found = [x for images, _, _ in batches for x in images]
    for k, x in zip((0, 2, 4, 1, 3), found, strict=True):
        assert torch.equal(x, picture(*SIZES[k], k))
    assert [y for _, labels, _ in batches for y in labels.tolist()] == [0, 0, 0, 1, 1]
    assert [i for _, _, indices in batches for i in indices.tolist()] == list(range(5))
    assert "natural size" in source.describe()
    assert "natural size" in GTSRB("data", None).describe()
    resized = ImageFolder(str(pictures), None, 12).split("test", 2)
    assert [min(resized[i][0].shape[1:]) for i in range(5)] == [12] * 5
    assert resized[0][0].shape == (3, 12, 18)
    for wrong in ({"size": 0}, {"size": None, "resize": 1.5}, {"size": 9, "resize": 8}):
        with pytest.raises(RequestError, match=r"data\.dataset|data\.size"):
            ImageFolder(str(pictures), **wrong)
    with pytest.raises(RequestError, match="size"):
        ImageNet(str(pictures), size=0)


@pytest.mark.parametrize("command", ["certify", "bound"])
def test_records_of_images_of_different_sizes(pictures, here, network, command):
    """In one batch or each alone, the same records; the input is the enlarged file, the label that of its folder."""
    overrides = (*SMALL, *NATURAL)
    checkpoint = f"checkpoint={network(*overrides)}"
    for k, in_flight in enumerate((5, 1)):
        run_task(command, *overrides, "error.search=grid", checkpoint, f"images.in_flight={in_flight}", f"store=run{k}")
    together, alone = (sorted(timeless(here / f"run{k}")["records.jsonl"].splitlines()) for k in range(2))
    assert together == alone
    found = {r["index"]: r for r in records(here / "run0")}
    threat = TransformationThreat(Rotation(), -10, 10, size=36)
    for index, k in enumerate((0, 2, 4, 1, 3)):
        x = threat.prepare(picture(*SIZES[k], k)[None])[0]
        assert min(x.shape[1:]) == 36
        assert found[index]["input"] == content_digest(x)
        assert found[index]["label"] == k % 2


def test_base_classes_belong_to_their_images():
    """Shapes mixed in one batch: each image gets the class that the slow computation gives it."""
    images = [(10 * k, picture(*SIZES[k % 5], k)) for k in range(12)]
    means = {index: slow_encoding(x.numpy(), 0.0).mean() for index, x in images}
    smoothed = resizing(threshold=between(list(means.values())))
    module = CertificationModule(AdditiveCertifier(FixedN()), smoothed, PixelThreat(), None)
    assert module.base_classes(images) == {i: int(mean > smoothed.base.threshold) for i, mean in means.items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_different_sizes_is_refused(pictures, workers):
    ended = run_main("train", *QUIET, *NATURAL[:6], "train.epochs=1", "store=run", f"data.workers={workers}")
    one_sentence(ended, "different shapes", "data.dataset.size", "data.augment")


# ---------------------------------------------------------------- bounds without a network


def test_bounds_need_no_checkpoint(here, network):
    """The same bounds as with one; certificates still ask for it."""
    run_task("bound", *SMALL, "images.first=2", "store=without")
    run_task("bound", *SMALL, "images.first=2", f"checkpoint={network(*SMALL)}", "store=with")
    assert timeless(here / "without")["records.jsonl"] == timeless(here / "with")["records.jsonl"]
    one_sentence(run_main("certify", *SMALL), "checkpoint=FILE")
