"""Transformations against slow references, and the contract that every transform of conf/ satisfies."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import ndimage

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform import Additive, Resolvable, Rotation, Transform

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
        assert transform(x, torch.ones(4, transform.dim)).shape == x.shape
        assert transform.name

    def test_exact_transforms_compose_and_others_demonstrably_do_not(self, option):
        transform, x = self.parts(option)
        assert isinstance(transform, Resolvable)
        alpha, beta = torch.full((4, transform.dim), 13.0), torch.full((4, transform.dim), 21.0)
        defect = transform(transform(x, alpha), beta) - transform(x, transform.resolve(alpha, beta))
        if isinstance(transform, Additive):
            torch.testing.assert_close(transform.resolve(alpha, beta), alpha + beta)
        assert (defect.abs().max() < 1e-5) == transform.exact

    def test_gradient_reaches_the_image(self, option):
        transform, x = self.parts(option)
        x.requires_grad_(True)
        transform(x, torch.full((4, transform.dim), 10.0)).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
