"""Transformations against slow references, and the contract that every transform of conf/ satisfies."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import ndimage
from scipy.linalg import expm
from torchvision.transforms.v2.functional import gaussian_blur

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform import (
    Additive,
    Brightness,
    BrightnessContrast,
    Composition,
    Contrast,
    CyclicTranslation,
    Function,
    Gamma,
    GaussianBlur,
    Resolvable,
    Rotation,
    Transform,
    Volume,
)
from gsmooth_lightning.transform.compose import VISITED

CONF = Path(__file__).parent.parent / "conf"


def rotated_by_scipy(image: np.ndarray, degrees: float, order: int) -> np.ndarray:
    """Counterclockwise rotation about the centre, black outside: the value at a pixel comes from its position turned
    back (clockwise on the screen, where the row axis points down)."""
    h, w = image.shape
    a = np.deg2rad(degrees)
    rows, columns = np.mgrid[:h, :w].astype(float)
    y, x = rows - (h - 1) / 2, columns - (w - 1) / 2
    source = [np.sin(a) * x + np.cos(a) * y + (h - 1) / 2, np.cos(a) * x - np.sin(a) * y + (w - 1) / 2]
    padded = np.pad(image, 2)
    return ndimage.map_coordinates(padded, [s + 2 for s in source], order=order, mode="constant")


@pytest.mark.parametrize("shape", [(28, 28), (20, 60), (31, 17)])
@pytest.mark.parametrize("angle", [0.0, 7.5, -30.0, 90.0, 135.0, 400.0])
def test_bilinear_rotation_agrees_with_scipy(shape, angle):
    image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    ours = Rotation("bilinear")(image, torch.tensor([[angle]]))[0, 0].numpy()
    np.testing.assert_allclose(ours, rotated_by_scipy(image[0, 0].numpy(), angle, 1), atol=2e-4)


def test_nearest_rotation_agrees_with_scipy_away_from_ties():
    image = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    ours = Rotation("nearest")(image, torch.tensor([[23.4]]))[0, 0].numpy()
    assert (ours != rotated_by_scipy(image[0, 0].numpy(), 23.4, 0)).mean() < 0.01


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_quarter_turns_are_exact_permutations_and_counterclockwise(interpolation):
    image = torch.rand(1, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    turned = Rotation(interpolation)(image, torch.tensor([[90.0]]))
    torch.testing.assert_close(turned, torch.rot90(image, 1, (2, 3)), atol=1e-4, rtol=0)


def test_interior_of_a_linear_ramp_has_no_interpolation_error():
    """Bilinear interpolation reproduces linear functions, so two rotations equal their sum inside the disc."""
    ramp = (torch.arange(29.0)[None, None, None, :] * 0.02 + torch.arange(29.0)[None, None, :, None] * 0.01).clone()
    turn = Rotation()
    twice = turn(turn(ramp, torch.tensor([[11.0]])), torch.tensor([[23.0]]))
    once = turn(ramp, torch.tensor([[34.0]]))
    inside = (torch.arange(29.0)[:, None] - 14) ** 2 + (torch.arange(29.0)[None, :] - 14) ** 2 <= 12**2
    torch.testing.assert_close(twice[0, 0][inside], once[0, 0][inside], atol=1e-4, rtol=0)


def test_analytic_blob_moves_to_its_known_angle():
    """A blob at polar angle 20 degrees, turned by 50, has its centre of mass at 70."""
    y, x = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    blob = torch.exp(-((x - 10 * np.cos(np.deg2rad(20))) ** 2 + (y + 10 * np.sin(np.deg2rad(20))) ** 2) / 8)
    turned = Rotation()(blob[None, None], torch.tensor([[50.0]]))[0, 0]
    angle = torch.atan2(-(turned * y).sum(), (turned * x).sum()).rad2deg()
    assert abs(float(angle) - 70) < 0.05


def test_each_image_of_a_batch_has_its_own_angle():
    image = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    angles = torch.tensor([[5.0], [-40.0], [170.0]])
    together = Rotation()(image, angles)
    alone = torch.cat([Rotation()(image[i : i + 1], angles[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_unknown_interpolation_is_refused():
    with pytest.raises(RequestError, match="nearest, bilinear, bicubic"):
        Rotation("lanczos")


SIZE = {"rotation": 100, "blur": 100, "cyclic_translation": 100, "volume": 10}
"""What counts as a large parameter, by option; 1 for the others."""


@pytest.mark.parametrize("option", sorted((CONF / "transform").glob("*.yaml")), ids=lambda p: p.stem)
class TestContract:
    """What every transform under conf/transform promises."""

    @staticmethod
    def parts(option: Path) -> tuple[Transform, torch.Tensor]:
        transform = instantiate(OmegaConf.load(option))
        return transform, torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(3))

    def test_zero_is_the_identity(self, option):
        transform, x = self.parts(option)
        torch.testing.assert_close(transform(x, torch.zeros(4, transform.dim)), x, atol=2e-5, rtol=0)

    def test_shapes_and_names(self, option):
        transform, x = self.parts(option)
        assert transform(x, torch.full((4, transform.dim), 0.5)).shape == x.shape
        assert transform.name
        assert len(transform.units) == transform.dim
        assert all(transform.units)

    def test_exact_transforms_compose_and_others_demonstrably_do_not(self, option):
        transform, x = self.parts(option)
        parts = transform.parts if isinstance(transform, Composition) else (transform,)
        if not all(isinstance(part, Resolvable) for part in parts):
            assert isinstance(parts[0], VISITED)  # by certify=cover, which asks no equation
            return
        size = SIZE.get(option.stem, 1)
        alpha = torch.tensor([0.13, 0.01, 0.4, 0.02])[:, None].repeat(1, transform.dim) * size
        beta = torch.tensor([0.21, 0.37, 0.05, 0.01])[:, None].repeat(1, transform.dim) * size
        defect = transform(transform(x, alpha), beta) - transform(x, transform.resolve(alpha, beta))
        if isinstance(transform, Additive):
            torch.testing.assert_close(transform.resolve(alpha, beta), alpha + beta)
        assert (defect.abs().max() < 1e-5) == transform.exact

    def test_rows_have_parameters_of_their_own(self, option):
        transform, x = self.parts(option)
        theta = torch.linspace(0.05, 0.4, 4)[:, None].repeat(1, transform.dim) * SIZE.get(option.stem, 1)
        alone = torch.cat([transform(x[i : i + 1], theta[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(transform(x, theta), alone, atol=1e-5, rtol=1e-5)

    def test_gradient_reaches_the_image(self, option):
        transform, x = self.parts(option)
        x[0, 0, 0] = 0  # black pixels too
        x.requires_grad_(True)
        out = transform(x, torch.full((4, transform.dim), 0.3 * SIZE.get(option.stem, 1)))
        if isinstance(transform, Function):  # JPEG, which has none
            assert not out.requires_grad
            return
        out.sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() > 0


class ClippedBrightness(Brightness):
    """What a viewer shows: values cut to [0, 1]."""

    def forward(self, x, theta):
        return super().forward(x, theta).clamp(0, 1)


class TruncatedBlur(GaussianBlur):
    """A Gaussian kernel of 7x7 pixels, as image libraries have it."""

    def forward(self, x, theta):
        rows = [gaussian_blur(row[None], [7, 7], float(v) ** 0.5) for row, v in zip(x, theta[:, 0], strict=True)]
        return torch.cat(rows)


@pytest.mark.parametrize(
    ("transform", "alpha", "beta", "least"),
    [(ClippedBrightness(), 0.3, -0.3, 0.2), (TruncatedBlur(), 0.25, 0.25, 0.01), (Rotation(), 13.0, 21.0, 0.1)],
)
def test_the_contract_catches_what_does_not_compose(transform, alpha, beta, least):
    """Clipping and truncated kernels claim to be exact and are not: the defect that the contract measures is large."""
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    a, b = torch.full((2, 1), alpha), torch.full((2, 1), beta)
    defect = transform(transform(x, a), b) - transform(x, transform.resolve(a, b))
    assert defect.abs().max() > least


@pytest.mark.parametrize("shape", [(28, 28), (20, 33)])
@pytest.mark.parametrize("variance", [0.0, 0.5, 4.0, 36.0])
def test_blur_agrees_with_the_heat_equation(shape, variance):
    """The kernel is exp(-v L / 2) for the grid's Laplacian with reflecting borders: by scipy's matrix exponential."""
    x = torch.rand(1, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    kernels = []
    for length in shape:
        laplacian = 2 * np.eye(length) - np.eye(length, k=1) - np.eye(length, k=-1)
        laplacian[0, 0] = laplacian[-1, -1] = 1
        kernels.append(expm(-variance * laplacian / 2))
    expected = kernels[0] @ x.numpy() @ kernels[1]
    blurred = GaussianBlur()(x, torch.tensor([[variance]])).numpy()
    np.testing.assert_allclose(blurred, expected, atol=1e-12)
    assert blurred.min() >= x.min() - 1e-12
    assert blurred.max() <= x.max() + 1e-12
    np.testing.assert_allclose(blurred.mean(), x.mean(), atol=1e-12)


def test_blur_composes_to_rounding():
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    a, b = torch.tensor([[0.25], [4.0], [30.0]]), torch.tensor([[0.25], [9.0], [6.0]])
    defect = GaussianBlur()(GaussianBlur()(x, a), b) - GaussianBlur()(x, a + b)
    assert defect.abs().max() < 1e-13


def test_blur_of_one_mode_decays_at_its_known_rate():
    """theory.md section 12: one DCT mode of amplitude A has amplitude A exp(-v lambda / 2)."""
    mode = torch.cos(torch.pi / 28 * 3 * (torch.arange(28.0, dtype=torch.float64) + 0.5))
    x = mode.expand(1, 1, 28, 28)
    rate = 2 - 2 * np.cos(np.pi * 3 / 28)
    blurred = GaussianBlur()(x, torch.tensor([[5.0]]))
    torch.testing.assert_close(blurred, x * np.exp(-5 * rate / 2))


def test_intensities_by_hand():
    x = torch.tensor([[[[0.0, 0.25, 1.0]]]])
    one = torch.tensor([[np.log(2.0)]], dtype=torch.float32)
    torch.testing.assert_close(Brightness()(x, one * 0 + 0.5), x + 0.5)
    torch.testing.assert_close(Contrast()(x, one), 2 * x)
    torch.testing.assert_close(Gamma()(x, one), x**2)
    torch.testing.assert_close(Volume()(x, one * 0 + 20), 10 * x)
    both = torch.tensor([[np.log(2.0), 0.5]], dtype=torch.float32)
    torch.testing.assert_close(BrightnessContrast()(x, both), 2 * (x + 0.5))


def test_cyclic_translation_is_a_roll():
    x = torch.rand(2, 3, 7, 5, generator=torch.Generator().manual_seed(8))
    moved = CyclicTranslation()(x, torch.tensor([[2.0, -1.0], [-9.0, 5.0]]))
    assert torch.equal(moved[0], torch.roll(x[0], (2, -1), (1, 2)))
    assert torch.equal(moved[1], torch.roll(x[1], (-9, 5), (1, 2)))
