"""Preprocessing: projections, and the Lipschitz constants that certificates rely on."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.preprocess import (
    CenterCrop,
    DiscVignette,
    GaussianLowPass,
    LowPass,
    Preprocess,
    RectangleVignette,
    Resize,
)
from gsmooth_lightning.transform import Rotation


def lowpass_by_fft(x: np.ndarray, bandwidth: float) -> np.ndarray:
    """The integer-frequency disc mask, applied with numpy's FFT."""
    h, w = x.shape[-2:]
    f1 = np.minimum(np.arange(h), h - np.arange(h))
    f2 = np.minimum(np.arange(w), w - np.arange(w))
    mask = f1[:, None] ** 2 + f2[None, :] ** 2 <= bandwidth**2
    return np.fft.ifft2(np.fft.fft2(x) * mask).real


@pytest.mark.parametrize("shape", [(28, 28), (27, 27), (12, 31), (8, 8)])
@pytest.mark.parametrize("bandwidth", [0, 1, 2.5, 4, 5, 14, 40])
def test_lowpass_is_the_integer_frequency_projection(shape, bandwidth):
    x = torch.rand(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(LowPass(bandwidth)(x).numpy(), lowpass_by_fft(x.numpy(), bandwidth), atol=1e-12)


def test_radius_five_keeps_81_modes_at_28_pixels():
    """Float frequencies would lose the modes on the circle: 73 (theory.md section 5)."""
    modes = LowPass(5)(torch.eye(784, dtype=torch.float64).view(784, 1, 28, 28)).view(784, 784)
    assert round(float(modes.trace())) == 81
    torch.testing.assert_close(modes @ modes, modes)
    torch.testing.assert_close(modes, modes.T)


def matrix_of(step: nn.Module, h: int, w: int, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """A linear step on h x w images as a matrix, in float64."""
    units = torch.eye(h * w, dtype=dtype).view(h * w, 1, h, w)
    return step(units).flatten(1).T.double().numpy()


LINEAR = [DiscVignette(), RectangleVignette(2), LowPass(4), GaussianLowPass(0.3), GaussianLowPass(1.5), CenterCrop(7)]


@pytest.mark.parametrize("step", [*LINEAR, GaussianLowPass(30)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_step_is_one_lipschitz_and_says_so(step, dtype):
    """The largest singular value on a non-square image."""
    assert step.lipschitz == 1
    assert np.linalg.svd(matrix_of(step, 9, 14, dtype), compute_uv=False)[0] <= 1 + 1e-6


def test_constants_multiply_and_are_infinite_when_one_is_missing():
    assert Preprocess(LINEAR).lipschitz == 1
    assert Preprocess([DiscVignette(), nn.ReLU()]).lipschitz == math.inf
    assert Preprocess([Resize(8), DiscVignette()]).lipschitz == math.inf
    assert np.linalg.svd(matrix_of(Resize(18), 9, 9), compute_uv=False)[0] == pytest.approx(2)


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.5, 6.0])
def test_gaussian_lowpass_is_scipys_filter_with_black_outside(sigma):
    x = torch.rand(2, 3, 12, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    slow = ndimage.gaussian_filter(x.numpy(), sigma, mode="constant", axes=(2, 3))
    np.testing.assert_allclose(GaussianLowPass(sigma)(x).numpy(), slow, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.3, 1.5, 6.0])
def test_gaussian_lowpass_has_what_its_proof_needs(sigma, dtype):
    """Symmetric, no negative weight, rows sum to at most 1: for the numbers as they are stored."""
    weights = matrix_of(GaussianLowPass(sigma), 9, 14, dtype)
    np.testing.assert_allclose(weights, weights.T, atol=1e-7 if dtype == torch.float32 else 1e-15)
    assert weights.min() >= 0
    assert weights.sum(1).max() <= 1 + 1e-7


@pytest.mark.parametrize("margin", [0, 2, 4])
def test_rectangle_vignette_is_a_black_frame(margin):
    x = torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(3))
    kept = torch.zeros_like(x)
    kept[..., margin : 9 - margin, margin : 14 - margin] = x[..., margin : 9 - margin, margin : 14 - margin]
    torch.testing.assert_close(RectangleVignette(margin)(x), kept, rtol=0, atol=0)


def shifted(x: np.ndarray, move: tuple[float, float]) -> np.ndarray:
    """A bilinear translation, black outside."""
    return ndimage.shift(x, move, order=1, mode="grid-constant")


@pytest.mark.parametrize("theta", [(3.0, -3.0), (-2.4, 1.7), (3.0, 0.3)])
def test_rectangle_vignette_hides_what_a_files_edge_cut_off(theta):
    """Inside a frame of 3, moves by up to 3 of the cut file and of the whole scene agree, whatever the attack gamma,
    and no black enters. A move by 5 shows the edge."""
    scene = np.random.default_rng(4).uniform(0.5, 1, (40, 50))
    inside, frame = np.s_[10:-10, 10:-10], RectangleVignette(3)

    def seen(image: np.ndarray) -> np.ndarray:
        return frame(torch.from_numpy(image)[None]).numpy()[0]

    for gamma in ((4.3, -2.0), (-5.0, 5.0)):
        attacked = shifted(scene, gamma)
        file, whole = shifted(attacked[inside], theta), shifted(attacked, theta)[inside]
        np.testing.assert_allclose(seen(file), seen(whole), atol=1e-12)
        far = (5.0, 0.0)
        assert np.abs(seen(shifted(attacked[inside], far)) - seen(shifted(attacked, far)[inside])).max() > 0.1
    ones = seen(np.ones((20, 30)))
    np.testing.assert_allclose(seen(shifted(np.ones((20, 30)), theta)), ones, atol=1e-12)
    assert np.abs(seen(shifted(np.ones((20, 30)), (3.5, 0))) - ones).max() > 0.4


@pytest.mark.parametrize(("shape", "size", "expected"), [((40, 30), 12, (16, 12)), ((9, 31), 20, (20, 68))])
def test_resize_is_pils_bilinear_filter_of_the_shorter_side(shape, size, expected):
    x = np.random.default_rng(5).uniform(size=shape).astype(np.float32)
    slow = np.asarray(Image.fromarray(x).resize(expected[::-1], Image.Resampling.BILINEAR))
    found = Resize(size)(torch.from_numpy(x)[None, None])
    assert found.shape[2:] == expected
    np.testing.assert_allclose(found[0, 0].numpy(), slow, atol=1e-5)
    torch.testing.assert_close(Resize(size)(found), found, rtol=0, atol=0)


def test_centre_crop_is_a_slice_in_the_middle():
    x = torch.rand(2, 3, 11, 17)
    torch.testing.assert_close(CenterCrop(7)(x), x[:, :, 2:9, 5:12], rtol=0, atol=0)
    torch.testing.assert_close(CenterCrop(11)(x), x[:, :, :, 3:14], rtol=0, atol=0)


def test_vignette_hides_everything_that_a_rotation_brings_in_from_outside():
    """Inside the disc, a rotated image of ones stays one."""
    ones = torch.ones(36, 1, 28, 28)
    turned = DiscVignette()(Rotation()(ones, torch.arange(0.0, 360, 10)[:, None]))
    torch.testing.assert_close(turned, DiscVignette()(ones), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("step", "argument", "words"),
    [
        (LowPass, -1, "bandwidth"),
        (RectangleVignette, -1, "margin"),
        (RectangleVignette, 1.5, "margin"),
        (Resize, 0, "size"),
        (Resize, [32, 32], "size"),
        (CenterCrop, None, "size"),
        (GaussianLowPass, 0, "sigma"),
        (GaussianLowPass, math.inf, "sigma"),
        (GaussianLowPass, math.nan, "sigma"),
    ],
)
def test_impossible_steps_are_refused(step, argument, words):
    with pytest.raises(RequestError, match=words):
        step(argument)


@pytest.mark.parametrize("step", [RectangleVignette(4), CenterCrop(9)])
def test_images_too_small_for_a_step_are_refused(step):
    with pytest.raises(RequestError, match="8x20"):
        step(torch.rand(1, 1, 8, 20))
