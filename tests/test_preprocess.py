"""Preprocessing: projections, and the Lipschitz constants that certificates rely on."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.preprocess import DiscVignette, LowPass, Preprocess
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


def test_every_step_is_one_lipschitz_and_says_so():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(50, 1, 28, 28, generator=generator), torch.rand(50, 1, 28, 28, generator=generator)
    steps = Preprocess([DiscVignette(), LowPass(5)])
    assert steps.lipschitz == 1
    assert ((steps(x) - steps(y)).flatten(1).norm(dim=1) <= (x - y).flatten(1).norm(dim=1) * (1 + 1e-6)).all()
    assert Preprocess([DiscVignette(), nn.ReLU()]).lipschitz == math.inf


def test_vignette_hides_everything_that_a_rotation_brings_in_from_outside():
    """Inside the disc, a rotated image of ones stays one."""
    ones = torch.ones(36, 1, 28, 28)
    turned = DiscVignette()(Rotation()(ones, torch.arange(0.0, 360, 10)[:, None]))
    torch.testing.assert_close(turned, DiscVignette()(ones), atol=2e-5, rtol=0)


def test_negative_bandwidth_is_refused():
    with pytest.raises(RequestError, match="bandwidth"):
        LowPass(-1)
