"""Threats: what the attacked file looks like, and which parameters exist."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    BrightnessContrast,
    Contrast,
    CyclicTranslation,
    Gamma,
    GaussianBlur,
    Identity,
    Rotation,
    Similarity,
)


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


@pytest.mark.parametrize(("low", "high", "reach"), [(-30, 30, 30), (-30, 10, 30), (0, 20, 20), (-20, 0, 20)])
def test_within_a_radius_lies_what_the_range_holds(low, high, reach):
    threat = TransformationThreat(Rotation(), low, high)
    assert threat.reach == reach
    assert threat.box(12) == ((max(low, -12),), (min(high, 12),))
    assert threat.box(45) == ((low,), (high,))
    assert threat.distance(torch.tensor([[-12.0], [7.0]])).tolist() == [12, 7]


def test_radii_over_parameters_with_different_units_are_shares_of_the_range():
    """Contrast and brightness: within t lies t times the box, asymmetric as it is."""
    threat = TransformationThreat(BrightnessContrast(), [-0.6, -0.5], [0.4, 0.3], saved="real")
    assert (threat.unit, threat.reach) == ("share of the range", 1)
    assert threat.box(0.5) == ((-0.3, -0.25), (0.2, 0.15))
    assert threat.box(3) == ((-0.6, -0.5), (0.4, 0.3))
    sizes = threat.distance(torch.tensor([[0.2, 0.0], [-0.3, 0.3], [0.0, 0.0], [0.4, -0.5]]))
    torch.testing.assert_close(sizes, torch.tensor([0.5, 1.0, 0.0, 1.0]))
    for word in ("-0.6 to 0.4 log contrast", "-0.5 to 0.3 brightness"):
        assert word in threat.describe()


def test_radii_over_parameters_with_one_unit_are_in_it():
    threat = TransformationThreat(CyclicTranslation(), -8, [8, 5])
    assert (threat.unit, threat.reach) == ("pixels", 8)
    assert threat.box(6) == ((-6, -6), (6, 5))
    assert threat.distance(torch.tensor([[3.0, -7.0]])).tolist() == [7]


def test_errors_of_files_hold_for_every_attack():
    """psi(x, gamma) lies in the range given, and its file as near as stated, at every pixel, for all formats."""
    x = (torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 5, 5))) / 255).float()
    x[0, 0, 0], x[0, 0, 1] = 0, 1
    cases = [(Brightness(), -0.3, 0.4), (Contrast(), -0.5, 0.5), (Gamma(), -1, 1), (GaussianBlur(), 0, 9)]
    cases += [(BrightnessContrast(), [-0.6, -0.5], [0.4, 0.3])]
    for (transform, low, high), saved in itertools.product(cases, ("real", "float", "8bit", "16bit")):
        threat = TransformationThreat(transform, low, high, saved=saved)
        clean = threat.prepare(x[None])
        least, most, error = threat.file_error(clean[0])
        share = torch.from_numpy(np.random.default_rng(1).uniform(size=(400, transform.dim)))
        share[:4] = share[:4].round()
        gamma = share.new_tensor(threat.lows) * share + share.new_tensor(threat.highs) * (1 - share)
        clean = clean.expand(400, 1, 5, 5)
        exact = transform(clean.double(), gamma.double())
        assert ((exact >= least - 1e-12) & (exact <= most + 1e-12)).all()
        assert ((threat.apply(clean, gamma).double() - exact).abs() <= error + 1e-12).all(), (transform.name, saved)
        assert error.max() > 0
        clipped = transform.name in ("brightness", "contrast", "brightness and contrast") and saved != "real"
        assert (error.max() > 0.1) == clipped


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": 5, "high": 30}, "contain 0"),
        ({"low": 0, "high": 0}, "contain 0"),
        ({"low": -1, "high": 1, "step": 0}, "step"),
        ({"low": -1, "high": 1, "step": float("inf")}, "step"),
        ({"low": -1, "high": 1, "saved": "jpeg"}, "8bit"),
        ({"low": -1, "high": 1, "size": 0}, "size"),
    ],
)
def test_impossible_threats_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        TransformationThreat(Rotation(), **arguments)


def test_a_threat_needs_a_parameter():
    with pytest.raises(RequestError, match="with a parameter"):
        TransformationThreat(Identity(), -1, 1)


@pytest.mark.parametrize(
    ("low", "high", "step", "words"),
    [
        ([-1, -1, -1], 1, None, "one for each of 2 parameters"),
        (-1, ["a", 1], None, "threat.high"),
        (-1, [1, -0.5], None, "contain 0"),
        (-1, 1, -1, "threat.step"),
    ],
)
def test_impossible_threats_of_several_parameters_are_refused(low, high, step, words):
    with pytest.raises(RequestError, match=words):
        TransformationThreat(CyclicTranslation(), low, high, step)


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.1, float("inf")])
def test_pixels_outside_the_unit_interval_are_refused(bad):
    x = digits(2)
    x[1, 0, 3, 3] = bad
    with pytest.raises(RequestError, match="between 0 and 1"):
        PixelThreat().prepare(x)


def test_description_states_range_interpolation_enlargement_and_format():
    words = TransformationThreat(Rotation("bicubic"), -10, 20, step=1, size=28).describe()
    for word in ("rotation", "-10 to 20 degrees", "multiples of 1", "bicubic", "shorter side of 28 pixels", "8 bits"):
        assert word in words


def test_a_file_does_not_depend_on_its_batch():
    """A matrix product's last bits depend on the batch, and decide what a pixel is rounded to: files are made alone."""
    images = torch.rand(24, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    threat = TransformationThreat(Rotation(), -30, 30)
    clean, gammas = threat.prepare(images), torch.linspace(-30, 30, 24)[:, None]
    together = threat.apply(clean, gammas)
    for k in (0, 7, 23):
        assert torch.equal(threat.apply(clean[k : k + 1], gammas[k : k + 1])[0], together[k])


def test_a_parameter_without_width_is_searched_once():
    threat = TransformationThreat(Similarity(), [-10, 0, 0, -1], [10, 0, 0, 1])
    gammas, _ = threat.parameters(9)
    assert len(gammas) == len(gammas.unique(dim=0)) == 9
    assert gammas[:, 1:3].abs().max() == 0
    with pytest.raises(RequestError, match="contain 0 and more"):
        TransformationThreat(Similarity(), 0, 0)
