"""Threats: what the attacked file looks like, and which parameters exist."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Identity, Rotation


def digits(n: int = 20) -> torch.Tensor:
    return torch.tensor(load_digits().images[:n, None] / 16, dtype=torch.float32)


def test_prepared_images_are_files():
    threat = TransformationThreat(Rotation(), -30, 30, size=28)
    x = threat.prepare(digits())
    assert x.shape == (20, 1, 28, 28)
    np.testing.assert_array_equal((x * 255).round() / 255, x)
    torch.testing.assert_close(threat.prepare(x), x, atol=0, rtol=0)


def test_no_attack_leaves_the_file_as_it_is():
    """gamma = 0 is the clean file bit by bit: the certificate at radius 0 needs no error bound."""
    threat = TransformationThreat(Rotation(), -30, 30, size=28)
    x = threat.prepare(digits(100))
    torch.testing.assert_close(threat.apply(x, torch.zeros(100, 1)), x, atol=0, rtol=0)


def test_parameters_with_a_step_are_all_multiples_in_the_range():
    values, complete = TransformationThreat(Rotation(), -7, 10, step=2.5).parameters(5)
    assert complete
    assert values[:, 0].tolist() == [-5, -2.5, 0, 2.5, 5, 7.5, 10]
    values, complete = TransformationThreat(Rotation(), -0.3, 0.3, step=0.1).parameters(5)
    assert len(values) == 7
    values, complete = TransformationThreat(Rotation(), -30, 30).parameters(5)
    assert not complete
    assert values[:, 0].tolist() == [-30, -15, 0, 15, 30]


@pytest.mark.parametrize(
    ("low", "high", "radius", "clipped"), [(-30, 30, 45, 30), (-30, 10, 45, 10), (0, 20, 45, 20), (-30, 30, 12, 12)]
)
def test_a_radius_counts_as_far_as_the_range_reaches(low, high, radius, clipped):
    assert TransformationThreat(Rotation(), low, high).clip(radius) == clipped


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": 5, "high": 30}, "contain 0"),
        ({"low": 0, "high": 0}, "contain 0"),
        ({"low": -1, "high": 1, "step": 0}, "step"),
        ({"low": -1, "high": 1, "saved": "jpeg"}, "8bit"),
        ({"low": -1, "high": 1, "size": 0}, "size"),
    ],
)
def test_impossible_threats_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        TransformationThreat(Rotation(), **arguments)


def test_a_threat_needs_a_parameter():
    with pytest.raises(RequestError, match="one parameter"):
        TransformationThreat(Identity(), -1, 1)


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.1, float("inf")])
def test_pixels_outside_the_unit_interval_are_refused(bad):
    x = digits(2)
    x[1, 0, 3, 3] = bad
    with pytest.raises(RequestError, match="between 0 and 1"):
        PixelThreat().prepare(x)


def test_description_states_range_interpolation_enlargement_and_format():
    words = TransformationThreat(Rotation("bicubic"), -10, 20, step=1, size=28).describe()
    for word in ("rotation", "-10 to 20 degrees", "multiples of 1", "bicubic", "28x28", "8 bits"):
        assert word in words
