"""What files and grids round: the bound E holds for every attack and every draw, for all exact transformations."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gsmooth_lightning.error.rounding import TAIL, file_rounding
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, Gaussian, Laplace, Product, Uniform
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    BrightnessContrast,
    Composition,
    Contrast,
    CyclicTranslation,
    Gamma,
    GaussianBlur,
    Volume,
)

BLURRED = Composition([GaussianBlur(), BrightnessContrast()])
CASES = {
    "brightness": (Brightness(), -0.5, 0.5, Gaussian(0.3)),
    "contrast": (Contrast(), -0.5, 0.5, Laplace(0.1)),
    "gamma": (Gamma(), -0.5, 0.5, Gaussian(0.3)),
    "blur": (GaussianBlur(), 0, 36, Exponential(0.05)),
    "volume": (Volume(), -3, 3, Uniform(-6, 6)),
    "brightness_contrast": (BrightnessContrast(), [-0.69, -0.5], [0.4, 0.5], Gaussian([0.4, 0.3])),
    "composition": (BLURRED, [0, -0.3, -0.2], [9, 0.3, 0.2], Product([Exponential(0.1), Gaussian([0.3, 0.2])], [1, 2])),
    "shifted brightness": (
        Composition([CyclicTranslation(), Brightness()]),
        [-3, -3, -0.4],
        0.4,
        Product([Gaussian(2.0), Gaussian(0.3)], [2, 1]),
    ),
}
SIGMA = 0.1


def image():
    """Noise with black and white corners, k/255."""
    x = (torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 8, 8))) / 255).float()
    x[0, 0, :3], x[0, 1, :3] = 0, 1
    return x


@pytest.mark.parametrize("saved", ["real", "float", "8bit", "16bit"])
@pytest.mark.parametrize("name", CASES)
def test_no_defect_exceeds_its_bound(name, saved):
    """encode(psi(x', theta)) against encode(psi(x, gamma + theta)), theta and the sum each rounded to their grid."""
    transform, low, high, law = CASES[name]
    threat = TransformationThreat(transform, low, high, saved=saved)
    smoothed = SmoothedClassifier(nn.Identity(), 2, transform, None, law, Gaussian(SIGMA), block=32)
    x, n, generator = threat.prepare(image()[None])[0], 1500, np.random.default_rng(1)
    bound = file_rounding(smoothed, threat, x)
    step = smoothed.parameter_step
    least, most = law.within(TAIL, transform.dim)
    drawn = smoothed.draw_parameters(Stream(1, 0).at("attack", 0), n).clamp(least, most)
    theta = drawn + step * torch.from_numpy(generator.uniform(-0.5, 0.5, drawn.shape))
    share = torch.from_numpy(generator.uniform(size=(n, transform.dim)))
    gamma = torch.lerp(share.new_tensor(threat.lows), share.new_tensor(threat.highs), share)
    ends = share.new_tensor(list(itertools.product(*zip(threat.lows, threat.highs, strict=True))))
    gamma[: len(ends)] = ends
    if name == "shifted brightness":
        gamma[:, :2] = gamma[:, :2].round()
    clean = x.expand(n, *x.shape)
    attacked = smoothed.encode(threat.apply(clean, gamma), (theta / step).round() * step)
    sums = (transform.resolve(gamma, theta) / step).round() * step
    defect = (attacked - smoothed.encode(clean, sums)).double().flatten(1).norm(dim=1) / smoothed.levels / SIGMA
    assert defect.max() <= bound
    assert defect.max() > 0
    if saved == "real":
        assert bound < 5e-3


def test_drift_bounds_what_a_step_of_the_parameters_moves():
    x = image().double()
    for transform, low, high, _ in CASES.values():
        threat = TransformationThreat(transform, low, high)
        ends = torch.tensor([threat.lows, threat.highs], dtype=torch.float64)
        step = torch.full((transform.dim,), 1e-3, dtype=torch.float64)
        whole = [isinstance(transform, Composition) and transform.units[j] == "pixels" for j in range(transform.dim)]
        step[torch.tensor(whole)] = 0.0
        theta = torch.lerp(*ends, torch.from_numpy(np.random.default_rng(2).uniform(size=(300, transform.dim))))
        theta = torch.where(torch.tensor(whole), theta.round(), theta).minimum(ends[1] - step)
        images = x.expand(300, *x.shape)
        moved = (transform(images, theta + step) - transform(images, theta)).flatten(1).norm(dim=1).max()
        bound = transform.drift(x, *ends, step)
        assert moved <= bound * (1 + 1e-9)
        assert bound < 40 * moved, transform.name


def test_clamped_values_come_nearer_and_stay_whole():
    """Contrast far beyond the range: sums with the noise are exact all the same."""
    smoothed = SmoothedClassifier(nn.Identity(), 2, Contrast(), None, Gaussian(0.3), Gaussian(SIGMA), block=4)
    steps = smoothed.encode(image().expand(4, 1, 8, 8), torch.tensor([[0.0], [3.0], [9.0], [40.0]]))
    assert torch.equal(steps, steps.round())
    assert steps.abs().max() == smoothed.largest
    assert smoothed.largest + 9 * SIGMA * smoothed.levels <= 2**24
