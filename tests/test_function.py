"""A user's own function: what it may return, its movement bound, and what its certificate says."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from covers import Linear, digits, farness, no_file_moves_farther, visiting
from gsmooth_lightning.certify import CoverCertifier
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Function
from gsmooth_lightning.transform.function import jpeg


def fade(image, theta):
    """Darker by a factor, and a ramp added: linear in both parameters."""
    ramp = torch.linspace(0, 1, image.shape[-1]) * torch.ones_like(image)
    return image * (1 - theta[0]) + (theta[1] * ramp if len(theta) > 1 else 0.0)


def fade_moves(x, low, high):
    """Half the widths times the norms of what the parameters multiply; clamping brings images nearer."""
    ramp = torch.linspace(0, 1, x.shape[-1]) * torch.ones_like(x)
    norms = torch.stack([x.double().norm(), ramp.double().norm()])[: low.shape[1]]
    return ((high - low) / 2 * norms).sum(1) * (1 + 1e-6)


def blank(certifier, threat, x=None, **options):
    """The certificate of a classifier that always says 1."""
    smoothed = visiting(base=Linear(torch.zeros(256), -1.0), **options)
    ((_, certificate),) = certifier.certify(smoothed, threat, [(0, digits(0)[0] if x is None else x)])
    return certificate


# ---------------------------------------------------------------- the function


def test_a_function_of_each_image_and_its_parameters():
    """Image by image, in the image's precision whatever the function returns, clamped to [0, 1]."""
    psi = Function(fade, ["share", "ramp"])
    x = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.2, 0.9], [1.5, 0.1]])
    expected = torch.stack([fade(image, t).clamp(0, 1) for image, t in zip(x, theta, strict=True)])
    assert torch.equal(psi(x, theta), expected)
    assert psi(x.double(), theta).dtype == torch.float64
    wide = Function(lambda image, t: fade(image.double(), t), ["share", "ramp"])
    assert wide(x, theta).dtype == torch.float32
    torch.testing.assert_close(wide(x, theta), expected)
    assert (psi.dim, psi.name) == (2, "your function")


WRONG = {
    "another shape": lambda image, theta: image[:, 1:],
    "no tensor": lambda image, theta: image.numpy(),
    "nothing": lambda image, theta: None,
    "NaN": lambda image, theta: image * np.nan,
    "infinity": lambda image, theta: image + np.inf,
    "not the identity at 0": lambda image, theta: 1 - image,
    "bytes": lambda image, theta: (image * 255).byte(),
}


@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_functions_that_are_refused(function):
    """In one sentence that names the function, by itself and in a certificate."""
    psi = Function(function, ["units"], "mine")
    with pytest.raises(RequestError, match="mine must") as failure:
        psi(torch.rand(2, 1, 6, 6), torch.zeros(2, 1))
    assert "\n" not in str(failure.value)
    with pytest.raises(RequestError, match="mine must"):
        blank(CoverCertifier(16, 400), TransformationThreat(psi, 0, 1, step=0.5))


def test_only_later_parameters_fail():
    """NaN at theta = .5 alone is found when that one is visited."""
    psi = Function(lambda image, theta: image / (theta[0] != 0.5), ["units"], "mine")
    with pytest.raises(RequestError, match=r"at theta = \[0\.5\]"):
        blank(CoverCertifier(16, 400), TransformationThreat(psi, 0, 1, step=0.5))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 0)])
def test_functions_that_give_two_results_are_refused(low, high):
    """Noise that theta scales, and a counter; at theta = 0 neither shows."""
    count = itertools.count()
    for function in (
        lambda image, theta: image + theta * torch.rand_like(image) / 10,
        lambda image, theta: image * (1 - theta.abs() / (2 + next(count))),
    ):
        psi = Function(function, ["units"], "mine")
        with pytest.raises(RequestError, match="mine must be deterministic") as failure:
            blank(CoverCertifier(16, 400), TransformationThreat(psi, low, high, step=0.5))
        assert "\n" not in str(failure.value)


def test_arguments_that_are_refused():
    for function, units, movement in (
        ("fade", ["share"], None),
        (fade, ["share"], "bound"),
        (None, ["share"], None),
    ):
        with pytest.raises(RequestError, match="must be Python functions"):
            Function(function, units, movement=movement)
    for units in ("share", [], ["a", "b", "c", "d"]):
        with pytest.raises(RequestError, match=r"transform\.units"):
            Function(fade, units)
    with pytest.raises(RequestError, match="images"):
        Function(fade, ["share"])(torch.rand(2, 1, 16), torch.zeros(2, 1))
    for cells in (0, -3, 1.5):
        with pytest.raises(RequestError, match="cells"):
            CoverCertifier(16, 400, cells=cells)


# ---------------------------------------------------------------- JPEG


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_another_library(channels):
    """PIL decodes and encodes with the same quality: equal up to the rounding of two decoders."""
    psi = Function(jpeg, ["100 - quality"])
    x = torch.nn.functional.interpolate(torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(3)), 24)
    x = (x * 255).round() / 255
    assert torch.equal(psi(x, torch.zeros(1, 1)), x)
    for theta in (1, 10, 50, 90, 99):
        pixels = (x[0] * 255).byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=100 - theta)
        expected = np.asarray(Image.open(file)).reshape(pixels.shape)
        found = psi(x, torch.tensor([[float(theta)]]))[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(found - expected).max() <= 3
        assert np.abs(found - pixels).max() > (0 if theta < 50 else 3)


def test_what_jpeg_refuses():
    psi = Function(jpeg, ["100 - quality"])
    for channels, theta in ((1, 100.0), (1, -1.0), (2, 10.0), (4, 10.0)):
        with pytest.raises(RequestError, match="JPEG") as failure:
            psi(torch.rand(1, channels, 8, 8), torch.tensor([[theta]]))
        assert "\n" not in str(failure.value)


def test_jpeg_is_covered():
    """Grey and colour: all qualities are visited, each once."""
    for channels in (1, 3):
        threat = TransformationThreat(Function(jpeg, ["100 - quality"]), 0, 12, step=1)
        smoothed = visiting(base=Linear(torch.zeros(256 * channels), -1.0))
        x = digits(4)[0].expand(channels, -1, -1)
        ((_, certificate),) = CoverCertifier(16, 400).certify(smoothed, threat, [(0, x)])
        assert (certificate.guarantee, certificate.radius, certificate.prediction) == ("sound", 12.0, 1)
        assert sorted(s[0][0] for s in certificate.details["slices"]) == list(range(13))
        assert all(s[0] == s[1] for s in certificate.details["slices"])


# ---------------------------------------------------------------- guarantees


def test_what_the_certificate_says():
    """sound: with a movement bound, or with finitely many parameters; else heuristic, which it explains."""
    plain, bounded = Function(fade, ["share"]), Function(fade, ["share"], movement=fade_moves)
    certifier = CoverCertifier(16, 400, cells=7)
    for psi, step in ((plain, 0.25), (bounded, None), (bounded, 0.25)):
        certificate = blank(certifier, TransformationThreat(psi, 0, 0.75, step=step))
        assert certificate.guarantee == "sound"
        assert "rests_on" not in certificate.details
        assert certificate.radius == 0.75
    certificate = blank(certifier, TransformationThreat(plain, 0, 0.7))
    assert (certificate.guarantee, certificate.radius) == ("heuristic", 0.7)
    assert "grid" in certificate.details["rests_on"]
    tried = sorted((s[0][0], s[1][0]) for s in certificate.details["slices"])
    np.testing.assert_allclose(tried, [(0.1 * k, 0.1 * k + 0.1) for k in range(7)], atol=1e-12)
    two = blank(CoverCertifier(16, 400, cells=4), TransformationThreat(Function(fade, ["a", "b"]), [0, -1], [1, 1]))
    assert (two.guarantee, len(two.details["slices"])) == ("heuristic", 16)


@pytest.mark.parametrize(
    "movement",
    [
        lambda x, low, high: -torch.ones(len(low)),
        lambda x, low, high: torch.full((len(low),), torch.nan),
        lambda x, low, high: torch.ones(len(low) + 1),
        lambda x, low, high: torch.ones(len(low), 1),
        lambda x, low, high: torch.tensor(1.0),
        lambda x, low, high: None,
    ],
    ids=["negative", "NaN", "too many", "a column", "a number", "nothing"],
)
def test_movement_bounds_that_are_refused(movement):
    psi = Function(fade, ["share"], "mine", movement)
    with pytest.raises(RequestError, match="movement bound of mine") as failure:
        blank(CoverCertifier(16, 400), TransformationThreat(psi, 0, 1))
    assert "\n" not in str(failure.value)


def test_a_movement_bound_without_end_certifies_nothing(monkeypatch):
    """Infinity is no mistake: no slice is narrow enough."""
    monkeypatch.setattr("gsmooth_lightning.certify.cover.MOST_SLICES", 50)
    psi = Function(fade, ["share"], movement=lambda x, low, high: torch.full((len(low),), torch.inf))
    certificate = blank(CoverCertifier(16, 400), TransformationThreat(psi, 0, 1))
    assert (certificate.prediction, certificate.radius) == (-1, 0.0)


@pytest.mark.parametrize("saved", ["8bit", "float", "real"])
def test_no_real_file_moves_farther_than_a_function_says(saved):
    """The user's bound, stretched by preprocessing, and what files round."""
    psi = Function(fade, ["share", "ramp"], movement=fade_moves)
    threat = TransformationThreat(psi, [0, -0.5], [1, 0.5], saved=saved)
    random = torch.Generator().manual_seed(0)
    low = torch.rand(5, 2, generator=random, dtype=torch.float64) * torch.tensor([0.8, 0.8]) - torch.tensor([0.0, 0.5])
    high = low + torch.rand(5, 2, generator=random, dtype=torch.float64) * 0.2
    high[0] = low[0] + 1e-4  # where files round farther than parameters move
    assert no_file_moves_farther(threat, digits(0, 5), low, high, 20) > 1000
    for x in threat.prepare(digits(0, 5)) if saved != "8bit" else ():
        bounds, found = farness(visiting(), threat, x, low, high, 20)
        assert (bounds < 2 * found.amax(1))[1:].all()
