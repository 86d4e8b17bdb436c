"""The cover certificate of transformations without a formula: classifiers whose flips are known, under attack."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from conftest import SMALL, one_sentence, records, run_main
from covers import Linear, digits, exact_after, exact_p, linear_case, visiting
from gsmooth_lightning.certify import (
    ABSTAIN,
    AdditiveCertifier,
    CoverCertifier,
    EnumerationCertifier,
    JointCertifier,
    cover,
)
from gsmooth_lightning.certify.cover import Cover
from gsmooth_lightning.error import ImageBound, slices
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.preprocess import DiscVignette, LowPass
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Product, Uniform
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    Composition,
    Contrast,
    Defocus,
    Function,
    GlassBlur,
    MotionBlur,
    Pixelate,
    Rotation,
    RotationalBlur,
    Translation,
    ZoomBlur,
)
from gsmooth_lightning.transform.function import jpeg
from plans import finish


def fade(image, theta):
    return image * (1 - theta[0])


def fade_moves(x, low, high):
    return (high - low)[:, 0] / 2 * x.double().norm() * (1 + 1e-6)


FADE = Function(fade, ["share"], "fading", fade_moves)
GLASS = GlassBlur([(0.2, 1, 1), (0.4, 1, 1), (0.7, 2, 1), (1.0, 2, 2), (1.5, 3, 2)])
CASES = {
    "rotational blur": (RotationalBlur(7), [0.0], [60.0], None),
    "zoom blur": (ZoomBlur(5), [0.0], [1.0], None),
    "motion blur": (MotionBlur(5), [0.0, -0.1], [1.0, 0.3], None),
    "defocus": (Defocus(), [0.0], [4.0], None),
    "defocus with a sharp edge": (Defocus(0.5), [0.0], [4.0], None),
    "pixelation": (Pixelate(), [0.0], [0.85], None),
    "glass blur": (GLASS, [0.0], [5.0], None),
    "function": (FADE, [0.0], [0.9], None),
    "JPEG": (Function(jpeg, ["100 - quality"]), [0.0], [99.0], 3.0),
    "rotation by steps": (Rotation(), [-40.0], [30.0], 7.0),
    "translation by steps": (Translation(), [-1.0, -1.0], [1.0, 1.0], 0.3),
    "fading by steps": (FADE, [0.0], [0.9], 0.1),
}
"""Transformation, range and step."""

KINKS = {
    "pixelation": [1 - m / 16 for m in range(3, 17)],
    "glass blur": [k + 0.5 for k in range(5)],
    "defocus": [math.hypot(i, j) + side for i in range(4) for j in range(3) for side in (-0.5, 0.5)],
}


def attacks(case, share=1.0):
    """Parameters within a share of the range as float32 numbers, dense, those next to kinks and ends among them."""
    psi, lows, highs, step = CASES[case]
    threat = TransformationThreat(psi, lows, highs, step=step)
    if step is not None:
        return threat.parameters(2)[0]
    low, high = torch.tensor(lows) * share, torch.tensor(highs) * share
    axes = [torch.linspace(float(a), float(b), 401 if psi.dim == 1 else 17) for a, b in zip(low, high, strict=True)]
    if case in KINKS:
        near = torch.tensor(KINKS[case])
        steps = [near, torch.nextafter(near, near - 1), torch.nextafter(near, near + 1)]
        axes[0] = torch.cat([axes[0], *(s[(s >= low[0]) & (s <= high[0])] for s in steps)])
    return torch.cartesian_prod(*axes).view(-1, psi.dim)


@pytest.mark.parametrize("l2", [0.0, 0.05])
@pytest.mark.parametrize("case", CASES)
def test_no_radius_reaches_the_first_flip(case, l2):
    """The classifier's probabilities are known exactly: a dense search over real files, each moved by the l2 ball's
    worst direction, finds where the prediction flips; no certificate reaches it, and some come to a third of it."""
    psi, lows, highs, step = CASES[case]
    gammas, shares, flips = attacks(case), [], 0
    for index, tilt, saved in ((0, 0.35, "8bit"), (3, 0.5, "float"), (11, 0.65, "8bit"))[: 2 if l2 else 3]:
        threat = TransformationThreat(psi, lows, highs, step=step, saved=saved, l2=l2)
        (x,) = threat.prepare(digits(index))
        farthest = [float(v) for v in gammas[threat.distance(gammas.double()).argmax()]]
        steps, sigma = [DiscVignette(), LowPass(6)], 0.2
        smoothed = linear_case(x, threat, steps, tilt, sigma, ([0.0] * psi.dim, farthest), block=64)
        files = threat.apply(x.expand(len(gammas), *x.shape), gammas)
        worst = smoothed.preprocess(smoothed.base.w.float().view(1, *x.shape))
        p = exact_p(smoothed, files - l2 * worst / worst.norm())
        lost = threat.distance(gammas.double())[torch.from_numpy(p <= 0.5)]
        flip = float(lost.min()) if len(lost) else math.inf
        found = CoverCertifier(64, 4000, 1e-3, (0.6, 0.3)).certify(smoothed, threat, [(index, x)])
        for certificate in dict(found).values():
            assert certificate.guarantee == "sound"
            if certificate.prediction != ABSTAIN:
                assert certificate.prediction == 1
                assert certificate.radius < flip
                shares.append(certificate.radius / min(flip, threat.reach))
        flips += flip <= threat.reach
    assert flips >= 1
    assert max(shares) > (0.33 if not l2 else 0.05)


@pytest.mark.parametrize(
    ("case", "rest"),
    [
        ("rotational blur", Brightness()),
        ("zoom blur", Contrast()),
        ("defocus", Brightness()),
        ("defocus", Contrast()),
        ("pixelation", Brightness()),
        ("glass blur", Contrast()),
        ("function", Contrast()),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_attacks_inside_a_composed_region_flip_nothing(case, rest):
    """What is visited, brightness or contrast after it and an l2 ball, within the certified share of the range."""
    own, lows, highs, _ = CASES[case]
    law, limit, l2 = (Gaussian(0.4), 0.2, 0.05) if isinstance(rest, Brightness) else (Gaussian(0.25), 0.1, 0.05)
    threat = TransformationThreat(Composition([own, rest]), [*lows, -limit], [*highs, limit], saved="real", l2=l2)
    certified = []
    for index in (0, 3):
        (x,) = threat.prepare(digits(index))
        smoothed = linear_case(x, threat, (), 0.45, 0.3, ([0.0, 0.0], [*highs, 0.0]), transform=rest, law=law, block=64)
        ((_, certificate),) = CoverCertifier(64, 3000, margins=(0.6, 0.3)).certify(smoothed, threat, [(index, x)])
        certified.append(certificate.radius)
        if certificate.prediction != ABSTAIN:
            assert certificate.prediction == 1
            assert certificate.unit == "share of the range"
            share = certificate.radius
            first = attacks(case, share)
            gammas = torch.cat([torch.cat([first, torch.full_like(first, share * b)], 1) for b in (-limit, 0.0, limit)])
            files = threat.apply(x.expand(len(gammas), *x.shape), gammas)
            files = files - l2 * (smoothed.base.w / smoothed.base.w.norm()).view(x.shape).float()
            assert (exact_after(smoothed, files, rest) > 0.5).all()
    assert max(certified) > 0.05


# ---------------------------------------------------------------- what is visited


def slices_of(psi, low, high, step=None, x=None, **options):
    """(ends, certificate) of a classifier that holds everywhere."""
    threat = TransformationThreat(psi, low, high, step=step, **options)
    network = visiting(base=Always())
    ((_, certificate),) = CoverCertifier(16, 200).certify(network, threat, [(0, digits(0)[0] if x is None else x)])
    return [(s[0], s[1]) for s in certificate.details["slices"]], certificate


class Always(torch.nn.Module):
    """Class 1."""

    def forward(self, y):
        return torch.tensor([[0.0, 1.0]]).expand(len(y), 2)


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0.0, 0.9, 0.1), (-0.45, 0.9, 0.2), (-1.0, 2.0, 0.7), (0.0, 1.0, 3.0)]
)
def test_a_step_lists_its_multiples(low, high, step):
    """All of them, 0 among them, also where the step does not meet the range's ends; none is visited twice."""
    psi = Rotation()
    visited, certificate = slices_of(psi, low, high, step)
    expected = [k * step for k in range(-20, 21) if low - 1e-9 <= k * step <= high + 1e-9]
    assert all(a == b for a, b in visited)
    np.testing.assert_allclose(sorted(a[0] for a, _ in visited), expected, atol=1e-6)
    assert certificate.radius == max(-low, high)
    assert certificate.guarantee == "sound"


def test_a_multiple_that_float32_rounds_up_is_not_certified():
    """.3 is .30000001 as float32: when it fails, .3 is no radius, though .2999 may be."""
    threat, (x,) = TransformationThreat(FADE, 0, 0.9, step=0.1), digits(0)
    assert float(torch.tensor(0.3, dtype=torch.float64).float()) > 0.3
    smoothed = linear_case(x, threat, (), 0.5, 0.1, ([0.2], [0.3]), block=64)
    ((_, certificate),) = CoverCertifier(64, 4000).certify(smoothed, threat, [(0, x)])
    p = exact_p(smoothed, threat.apply(x.expand(2, *x.shape), torch.tensor([[0.2], [0.3]])))
    assert p[0] > 0.9 > 0.1 > p[1]
    assert certificate.radius < 0.3
    assert certificate.radius == pytest.approx(0.3, abs=1e-6)


def test_finitely_many_outcomes_are_visited_once():
    """Pixelation of 16 x 16 pixels to a half, of oblong images, and glass blur, from 0 outward."""
    visited, certificate = slices_of(Pixelate(), 0, 0.5)
    left = [math.floor((1 - np.float32(a[0])) * 16) for a, _ in visited]
    assert left == list(range(16, 7, -1)) or sorted(left) == list(range(8, 17))
    assert (certificate.radius, certificate.guarantee) == (0.5, "sound")
    oblong = torch.rand(1, 12, 8, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    visited, _ = slices_of(Pixelate(), 0, 0.5, x=oblong)
    pairs = {tuple(math.floor(np.float32(1 - np.float32(a[0])) * np.float32(s)) for s in (12, 8)) for a, _ in visited}
    assert {(12, 8), (11, 7), (10, 7), (10, 6), (9, 6), (8, 5), (7, 5), (7, 4), (6, 4)} <= pairs
    visited, certificate = slices_of(GlassBlur(), 0, 2.4)
    assert sorted(a[0] for a, _ in visited) == [0.0, 1.0, 2.0]
    assert certificate.radius == 2.4


@pytest.mark.parametrize(
    ("psi", "high", "step", "flips"),
    [(GLASS, 5.0, None, 2.5), (FADE, 0.9, 0.1, 0.3), (Function(fade, ["share"]), 0.9, None, 0.27)],
    ids=["outcomes", "steps", "grid"],
)
def test_what_failed_is_not_retested(psi, high, step, flips, monkeypatch):
    """A listed parameter has no parts: one test each, however hopeful, and none after the first failure."""
    monkeypatch.setattr(Cover, "hopeful", lambda *_: True)
    threat = TransformationThreat(psi, 0, high, step=step)
    (x,) = threat.prepare(digits(3))
    turned = ([2.0], [3.0]) if psi is GLASS else ([0.2], [0.3])
    smoothed = linear_case(x, threat, (), 0.5, 0.1, turned, block=64)
    ((_, certificate),) = CoverCertifier(64, 2000).certify(smoothed, threat, [(0, x)])
    visited = [(s[0][0], s[1][0]) for s in certificate.details["slices"]]
    assert len(set(visited)) == len(visited)
    assert {s[3] for s in certificate.details["slices"]} == {0}
    assert not all(s[7] for s in certificate.details["slices"])
    assert 0 < certificate.radius <= flips


def test_a_threat_beyond_what_there_is_stops_in_one_sentence():
    """A disc larger than the image, no pixel left, no such severity or quality: at once, not after hours."""
    for psi, high, step in (
        (Defocus(), 40.0, None),
        (Pixelate(), 0.97, None),
        (Pixelate(), 1.0, None),
        (GlassBlur(), 5.5, None),
        (Function(jpeg, ["100 - quality"]), 100.0, 1.0),
    ):
        with pytest.raises(RequestError) as failure:
            slices_of(psi, 0, high, step)
        assert "\n" not in str(failure.value)


# ---------------------------------------------------------------- refusals


def refused(certifier, smoothed, threat, *words):
    with pytest.raises(UncertifiableError) as failure:
        certifier.check(smoothed, threat)
    assert "\n" not in str(failure.value)
    for word in words:
        assert word in str(failure.value)


VISITED = [RotationalBlur(), ZoomBlur(), MotionBlur(), Defocus(), Pixelate(), GlassBlur(), FADE]


@pytest.mark.parametrize("psi", VISITED, ids=lambda psi: psi.name)
def test_what_is_refused(psi):
    """Parameters that do not exist, laws of what is visited, other certificates: one sentence each."""
    plan, cover = FixedN(16, 1000), CoverCertifier(16, 1000)
    threat = TransformationThreat(psi, 0, 0.5)
    cover.check(visiting(), threat)
    if psi.lowest == 0:
        with pytest.raises(RequestError, match=r"no parameters below 0; set threat\.low"):
            TransformationThreat(psi, -0.1, 0.5)
    drawn = SmoothedClassifier(torch.nn.Flatten(), 2, psi, law=Uniform(0, 1), noise=Gaussian(0.5))
    refused(cover, drawn, threat, "law=none", psi.name)
    for certifier, smoothed in itertools.product(
        (
            AdditiveCertifier(plan),
            EnumerationCertifier(),
            JointCertifier(plan, ImageBound(64, 32)),
            JointCertifier(plan, ImageBound(64, 32, search="intervals")),
        ),
        (drawn, visiting()),
    ):
        refused(certifier, smoothed, threat)
    both = Composition([psi, Brightness()])
    bytes_ = TransformationThreat(both, [0.0] * psi.dim + [-0.1], [0.5] * psi.dim + [0.1])
    brighter = visiting(transform=Brightness(), law=Gaussian(0.2))
    refused(cover, brighter, bytes_, "threat.saved=real")
    real = TransformationThreat(both, bytes_.lows, bytes_.highs, saved="real")
    cover.check(brighter, real)
    law = Product([Uniform(0, 1), Gaussian(0.2)], [psi.dim, 1])
    joined = SmoothedClassifier(torch.nn.Flatten(), 2, both, law=law, noise=Gaussian(0.5))
    for certifier in (AdditiveCertifier(plan), JointCertifier(plan, ImageBound(64, 32)), cover):
        refused(certifier, joined, real)


def test_what_may_follow_what_is_visited():
    for parts in ([Brightness(), Defocus()], [Defocus(), Pixelate()], [Rotation(), Defocus()], [FADE, FADE]):
        with pytest.raises(RequestError, match="do not commute") as failure:
            Composition(parts)
        assert "\n" not in str(failure.value)


# ---------------------------------------------------------------- with the command

VISITS = (
    *(o for o in SMALL if not o.startswith(("law", "error", "threat", "images"))),
    "certify=cover",
    "law=none",
    "images.first=2",
    "noise.sigma=0.5",
)


@pytest.mark.parametrize(
    ("name", "change", "guarantee"),
    [
        ("defocus", "threat.high=1", "sound"),
        ("pixelate", "threat.high=0.4", "sound"),
        ("function", "threat.step=null", "heuristic"),
    ],
)
def test_the_command_certifies(name, change, guarantee, checkpoint, here):
    """By the shipped configurations; the table says what the certificate is."""
    command = (*VISITS, f"transform={name}", f"threat={name}", change, f"checkpoint={checkpoint}", "store=visited")
    ended = run_main("certify", *command)
    assert (ended.code, ended.error) == (0, None), ended.err
    stored = records(here / "visited")
    assert [r["guarantee"] for r in stored] == [guarantee] * 2
    assert all(r["details"]["slices"] for r in stored)
    if guarantee == "heuristic":
        shown = run_main("report", "stores=[visited]", "radii=[0,0.1]")
        assert (shown.code, shown.error) == (0, None), shown.err
        assert "heuristic" in shown.out


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("defocus", ("threat.low=-1",), ("threat.low",)),
        ("defocus", ("threat.high=60",), ("lower threat.high",)),
        ("pixelate", ("threat.high=0.99",), ("pixelation",)),
        ("zoom_blur", ("certify=direct",), ("zoom blur",)),
        ("glass_blur", ("certify=joint", "error=image"), ("glass blur",)),
        ("function", ("transform.units=[]",), ("transform.units",)),
    ],
)
def test_the_command_refuses_in_one_sentence(name, change, words, checkpoint, here):
    ended = run_main(
        "certify", *VISITS, f"transform={name}", f"threat={name}", *change, f"checkpoint={checkpoint}", "store=no"
    )
    one_sentence(ended, *words)


OWN = """
def faded(image, theta):
    return image * (1 - {share} * theta)

def moved(image, low, high):
    return image.double().norm() * (high - low)[:, 0] / 2 * (1 + 1e-6)
"""


def test_a_changed_function_does_not_go_on_with_the_old_store(checkpoint, here, monkeypatch):
    """The movement bound may be false for the new one, and finished images would not be done again."""
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    path = "transform.function.path=faded_for_a_test.faded"
    bound = ("+transform.movement._target_=hydra.utils.get_method", "+transform.movement.path=faded_for_a_test.moved")
    command = (*VISITS, "transform=function", "threat=function", "threat.step=null", "threat.high=0.3", path, *bound)
    for share, code in ((1, 0), (3, 2)):
        (here / "faded_for_a_test.py").write_text(OWN.format(share=share))
        sys.modules.pop("faded_for_a_test", None)
        ended = run_main("certify", *command, f"checkpoint={checkpoint}", "store=own")
        assert (ended.code, ended.error) == (code, None), ended.err
    assert "own code" in ended.err
    sys.modules.pop("faded_for_a_test")


@pytest.mark.parametrize(
    "psi",
    [Function(lambda image, theta: image * 0 + 0.5, ["share"]), Defocus(alias=0.5)],
    ids=["grey", "blurred"],
)
def test_what_does_not_begin_with_the_image_is_refused(psi):
    """The middles of slices would be certified, and the image itself, at which the class was chosen, would not."""
    (x,) = digits(3)
    threat = TransformationThreat(psi, 0, 0.3, step=0.1)
    with pytest.raises((UncertifiableError, RequestError), match="0"):
        finish(CoverCertifier(16, 64).procedure(visiting(), threat, x, Stream(0, 0)))


class Magnified(torch.nn.Module):
    """Differences from an image, a hundredfold."""

    lipschitz = 100.0

    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, x):
        return (x - self.image) * self.lipschitz


@pytest.mark.parametrize(("step", "movement"), [(0.5, None), (None, lambda x, low, high: torch.zeros(len(low)))])
def test_what_differs_at_0_is_charged(step, movement):
    """Float files differ from the image by 9e-6 a pixel, 2.9 sigma once preprocessing has magnified it; their class 1
    is that much surer. An image of class 0, which one draw may take for class 1, has no certificate, however sure the
    files are; an image of class 1 has one."""
    psi = Function(lambda image, theta: image + 9e-6 * (1 - 2 * image.round()), ["units"], movement=movement)
    (x,), sigma, right = digits(3), 0.005, 0
    threat, network = TransformationThreat(psi, 0, 1, step=step, saved="float"), Linear(torch.ones(1), 0.0)
    file = threat.apply(x[None], torch.zeros(1, 1))
    smoothed = visiting([Magnified(x)], network, sigma, block=64)
    network.w = (smoothed.encode(file, torch.zeros(1, 1)) / smoothed.levels).double().flatten()
    assert network.w.norm() / sigma == pytest.approx(2.88, abs=0.05)
    for z, own in ((-0.1, 0), (2.0, 1)):
        network.b = -z * sigma * float(network.w.norm())
        (p,) = exact_p(smoothed, x[None])
        assert p == pytest.approx(ndtr(z), abs=1e-3)
        for i in range(12):
            found = finish(CoverCertifier(1, 6000).procedure(smoothed, threat, x, Stream(0, i)))
            assert found.prediction in (own, ABSTAIN)
            right += found.prediction == 1
    assert right > 9


def test_a_range_with_too_many_slices_says_so(monkeypatch):
    monkeypatch.setattr(slices, "MOST_SLICES", 3)
    (x,) = digits(3)
    smoothed, threat = visiting(base=Always()), TransformationThreat(RotationalBlur(), 0, 60)
    found = finish(CoverCertifier(16, 64).procedure(smoothed, threat, x, Stream(0, 0)))
    assert (found.prediction, found.details["left"]) == (ABSTAIN, cover.LEFT)
