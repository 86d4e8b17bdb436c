"""Attacks on parameters: weaknesses known in closed form, gradients, the threat's box, and certified regions of a
trained classifier."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from conftest import SMALL, compose, one_sentence, records, run_main, run_task, snapshot
from gsmooth_lightning.attack import eot, grid, worst_of_k
from gsmooth_lightning.attack.eot import losses
from gsmooth_lightning.attack.evaluation import permitted
from gsmooth_lightning.certify import JointCertifier
from gsmooth_lightning.error import ImageBound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.report.tables import contradictions
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.tasks.setup import prepare
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    BrightnessContrast,
    CyclicTranslation,
    GaussianBlur,
    Rotation,
)
from plans import finish

ATTACKS = {
    "worst_of_k": partial(worst_of_k, k=12),
    "grid": partial(grid, points=5),
    "eot": partial(eot, restarts=6, steps=4, draws=4),
}


class Moments(nn.Module):
    """Logits (h, -h) from the images' mean m and standard deviation s."""

    def __init__(self, h):
        super().__init__()
        self.h = h

    def forward(self, x):
        lead = self.h(x.mean((1, 2, 3)), x.std((1, 2, 3), unbiased=False))
        return torch.stack([lead, -lead], 1)


def checks() -> torch.Tensor:
    """A checkerboard of .4 and .6: mean .5, standard deviation .1."""
    rows = torch.arange(8)
    return 0.5 + 0.1 * (1 - 2.0 * ((rows[:, None] + rows) % 2))[None]


def blob(degrees: float, size: int = 28) -> torch.Tensor:
    """A Gaussian spot of width 2, eight pixels from the centre, counterclockwise from the right."""
    ys, xs = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")
    angle = math.radians(degrees)
    return torch.exp(-((xs - 8 * math.cos(angle)) ** 2 + (ys + 8 * math.sin(angle)) ** 2) / 8)[None]


class Detector(nn.Module):
    """Logits (h, -h), h how much of a spot at some angle is in the image."""

    def __init__(self, degrees: float):
        super().__init__()
        self.register_buffer("spot", blob(degrees))

    def forward(self, x):
        lead = 0.2 * (x * self.spot).sum((1, 2, 3)) - 1.5
        return torch.stack([lead, -lead], 1)


def smoothed_classifier(base, transform, sigma=None, noise=0.05, **options):
    law = None if sigma is None else Gaussian(sigma)
    made = SmoothedClassifier(base, 2, transform if law else None, law=law, noise=Gaussian(noise), block=16, **options)
    return made.eval()


# ---------------------------------------------------------------- which parameters are tried, and what they show


def test_the_grid_shows_where_the_class_flips():
    """e^k (m + b) > 1/2 on a grid of two parameters: known at each point, for the base and, since the noise of a mean
    is symmetric and small, for the smoothed classifier, except within four of its standard deviations."""
    threat = TransformationThreat(BrightnessContrast(), [-0.4, -0.2], [0.4, 0.1], saved="real")
    smoothed = smoothed_classifier(Moments(lambda m, s: 50 * (m - 0.5)), BrightnessContrast())
    found = finish(grid(smoothed, threat, checks() + 0.03, 0, Stream(0, 0), points=7, n=64))
    gammas = np.array(found.gammas)
    ks, bs = np.linspace(-0.4, 0.4, 7), np.linspace(-0.2, 0.1, 7)  # 0 is among both
    assert sorted(map(tuple, gammas.round(5) + 0.0)) == sorted(
        (k, b) for k in ks.round(5) + 0.0 for b in bs.round(5) + 0.0
    )
    assert found.gammas[0] == [0, 0]
    assert sorted(found.distances) == found.distances
    lead = np.exp(gammas[:, 0]) * (0.53 + gammas[:, 1]) - 0.5
    assert found.base == [int(value < 0) for value in lead]
    far = np.abs(lead) > 4 * 0.05 / 8
    assert far.sum() > 40
    assert (np.array(found.smoothed) == (lead < 0))[far].all()
    assert 10 < sum(found.base) < 40
    assert found.worst in found.gammas
    width = 64
    assert found.evaluations == 49 * width + 4 * 16


def test_the_grid_with_a_step_is_all_there_is():
    """-.3, -.2, ..., .2 although .3 / .1 is below 3 in floats; 0 first; the mean falls below 1/2 from -.1 on."""
    threat = TransformationThreat(Brightness(), -0.3, 0.25, step=0.1, saved="real")
    smoothed = smoothed_classifier(Moments(lambda m, s: 50 * (m - 0.5)), Brightness(), sigma=0.02)
    found = finish(grid(smoothed, threat, checks() + 0.05, 0, Stream(0, 0), points=2, n=64))
    assert [round(g, 4) for (g,) in found.gammas] == [0, -0.1, 0.1, -0.2, 0.2, -0.3]
    assert found.base == found.smoothed == [0, 1, 0, 1, 0, 1]
    assert found.worst[0] < -0.05
    every = threat.parameters(2)[0]
    assert sorted(found.gammas) == sorted(every.tolist())


def test_zero_is_tried_where_the_even_grid_misses_it():
    threat = TransformationThreat(Rotation(), -10, 20)
    smoothed = smoothed_classifier(Detector(0), Rotation(), sigma=5.0)
    found = finish(grid(smoothed, threat, threat.prepare(blob(0)[None])[0], 0, Stream(0, 0), points=3, n=16))
    assert found.gammas == [[0], [5], [-10], [20]]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("step", [None, 0.1])
def test_attacks_keep_to_the_box_and_to_its_steps(name, step):
    """Two parameters, ends that are and are not multiples of the step; the first parameters are 0, the clean image."""
    threat = TransformationThreat(BrightnessContrast(), [-0.25, -0.3], [0.3, 0.05], step=step, saved="real")
    smoothed = smoothed_classifier(Moments(lambda m, s: 3 * (m - 0.5) + s), BrightnessContrast())
    found = finish(ATTACKS[name](smoothed, threat, checks(), 0, Stream(0, 0), n=16))
    gammas = np.array(found.gammas)
    assert (gammas >= np.array(threat.lows) - 1e-7).all()
    assert (gammas <= np.array(threat.highs) + 1e-7).all()
    assert (gammas[0] == 0).all()
    assert len(gammas) == len(found.base) == len(found.smoothed) == len(found.distances) >= 12
    if step is not None:
        assert np.abs(gammas / step - np.round(gammas / step)).max() < 1e-5
    if name != "eot":  # gradients lead wherever they lead
        low, high = ([-0.25, -0.3], [0.3, 0.05]) if step is None else ([-0.2, -0.3], [0.3, 0.0])
        assert gammas.min(0) == pytest.approx(low)
        assert gammas.max(0) == pytest.approx(high)


def test_permitted_parameters_move_least():
    """The nearest point of the box, or of its steps."""
    threat = TransformationThreat(Rotation(), -7, 12)
    assert permitted(threat, np.array([[-9.0], [3.25], [40.0]])).tolist() == [[-7], [3.25], [12]]
    threat = TransformationThreat(Rotation(), -7, 12, step=5)
    assert permitted(threat, np.array([[-9.0], [3.2], [40.0]])).tolist() == [[-5], [5], [10]]


def test_draws_of_the_worst_of_k_have_not_moved():
    """Parameters and votes of a seed, as they were before other attacks existed."""
    smoothed = smoothed_classifier(Detector(40), Rotation(), sigma=15.0, noise=0.5)
    threat = TransformationThreat(Rotation(), -60, 60)
    x = threat.prepare(blob(0)[None])[0]
    found = finish(worst_of_k(smoothed, threat, x, 1, Stream(3, 4), k=8, n=40))
    source = Stream(3, 4).at("attack", 2**31)
    uniform = -60 + 120 * source.uniform(5, 1)
    assert found.gammas == [[0], [-60], [60], *uniform.float().tolist()]
    files = threat.apply(x.expand(8, *x.shape), torch.tensor(found.gammas))
    votes = [finish(smoothed.sample(f, Stream(3, 4), "attack", j * 48, j * 48 + 40)) for j, f in enumerate(files)]
    assert found.smoothed == [int(v.argmax()) for v in votes]
    assert found.worst == found.gammas[int(np.argmin([v[1] - v[0] for v in votes]))]
    assert found.evaluations == 8 * 48 + 16


# ---------------------------------------------------------------- gradient ascent


def test_ascent_turns_a_spot_into_the_detector():
    """The spot at 0 degrees is most of the detector's at 50: the smoothed classifier, whose law is symmetric, agrees.

    Turned there the spot is class 0; the worst parameter for label 1.
    """
    smoothed = smoothed_classifier(Detector(50), Rotation(), sigma=8.0)
    threat = TransformationThreat(Rotation(), -90, 90)
    x = threat.prepare(blob(0)[None])[0]
    found = finish(eot(smoothed, threat, x, 1, Stream(0, 0), restarts=6, steps=25, draws=32, n=64))
    gammas = np.array(found.gammas)[:, 0]
    against_smoothed, against_base = gammas[1:7], gammas[7:]
    assert len(gammas) == 13
    assert (np.abs(against_base - 50) < 1.5).sum() >= 5
    assert (np.abs(against_smoothed - 50) < 6).sum() >= 5
    assert found.base[0] == found.smoothed[0] == 1
    assert found.worst[0] == pytest.approx(50, abs=6)
    assert 0 in found.smoothed[1:7]
    assert 0 in found.base[7:]
    assert found.evaluations == 25 * 6 * 33 + 13 * 64 + 16


def test_ascent_finds_what_as_many_random_tries_miss():
    """A peak of the loss of width .02 by .04 in a box of 1 by 1 (k, b), label 1: class 0 on .003 of the box.

    m = e^k (.5 + b) and s = .1 e^k have one parameter with m = m*, s = s*.
    """
    k_star, b_star = 0.31, -0.22
    m_star, s_star = math.exp(k_star) * (0.5 + b_star), 0.1 * math.exp(k_star)

    def peak(m, s):
        return 40 * torch.exp(-(((m - m_star) / 0.4) ** 2) - ((s - s_star) / 0.04) ** 2) - 39.7

    smoothed = smoothed_classifier(Moments(peak), BrightnessContrast(), noise=1e-3)
    threat = TransformationThreat(BrightnessContrast(), -0.5, 0.5, saved="real")
    flips = {eot: 0, worst_of_k: 0}
    for seed in range(6):
        climbed = finish(eot(smoothed, threat, checks(), 1, Stream(seed, 0), restarts=4, steps=30, draws=2, n=16))
        k = climbed.evaluations // 16 - 1
        tried = finish(worst_of_k(smoothed, threat, checks(), 1, Stream(seed, 0), k=k, n=16))
        assert 0.9 < tried.evaluations / climbed.evaluations < 1.1
        for attack, found in ((eot, climbed), (worst_of_k, tried)):
            flips[attack] += 0 in found.smoothed and 0 in found.base
        assert np.linalg.norm(np.array(climbed.worst) - [k_star, b_star]) < 0.03
    assert flips[eot] == 6
    assert flips[worst_of_k] <= 3


@pytest.mark.parametrize("transform", [BrightnessContrast(), Rotation()])
def test_gradient_against_finite_differences(transform):
    """Through both transformations, the preprocessing, and a network that is not linear; draws held."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    size = torch.tensor([0.1, 0.1]) if transform.dim == 2 else torch.tensor([10.0])
    smoothed = SmoothedClassifier(base, 2, transform, nn.AvgPool2d(3, 1, 1), Gaussian(1.0), Gaussian(0.1)).eval()
    threat = TransformationThreat(transform, -90, 90, saved="real")
    x = (blob(20) + blob(130)).double()
    gammas = torch.tensor([[0.3, -0.7], [-0.9, 0.4]])[:, : transform.dim].double() * size * 3
    theta, noise = size * torch.randn(5, transform.dim), 0.1 * torch.randn(5, 1, 28, 28)

    def value(at):
        return losses(smoothed, threat, x, 1, at, theta, noise)

    at = gammas.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(at).sum(), at)
    assert value(gammas).shape == (2,)
    assert gradient.abs().min() > 1e-4
    h = 1e-3 * size
    for p in range(transform.dim):
        move = h * torch.eye(transform.dim)[p]
        slope = (value(gammas + move) - value(gammas - move)) / (2 * h[p])
        torch.testing.assert_close(gradient[:, p], slope, rtol=2e-2 if transform.dim == 1 else 1e-5, atol=1e-6)
    by_hand = [  # the mean over draws, one at a time
        nn.functional.cross_entropy(
            base(smoothed.preprocess(transform(transform(x[None], g), t)) + e), torch.tensor([1])
        )
        for g, t, e in zip(gammas[:1].float().expand(5, -1)[:, None], theta[:, None], noise[:, None], strict=True)
    ]
    assert value(gammas)[0].item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_gradients_pass_the_rounding_of_the_file_but_not_its_clipping():
    smoothed = smoothed_classifier(Moments(lambda m, s: 3 * m), Brightness(), sigma=0.1)
    slopes = []
    for saved, at in (("8bit", 0.1), ("float", 0.1), ("8bit", 0.9)):
        threat = TransformationThreat(Brightness(), -1, 1, saved=saved)
        gamma = torch.tensor([[at]], requires_grad=True)
        value = losses(smoothed, threat, checks(), 1, gamma, torch.zeros(1, 1), torch.zeros(1, 1, 8, 8))
        slopes.append(float(torch.autograd.grad(value.sum(), gamma)[0]))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-2)
    assert slopes[0] > 0.1
    assert slopes[2] == 0  # every pixel is white


def test_a_flat_loss_leaves_the_restarts_where_they_were():
    smoothed = smoothed_classifier(Moments(lambda m, s: 0 * m + 1), Brightness(), sigma=0.1)
    threat = TransformationThreat(Brightness(), -1, 1, saved="real")
    found = finish(eot(smoothed, threat, checks(), 0, Stream(0, 0), restarts=5, steps=3, draws=2, n=16))
    spread = finish(worst_of_k(smoothed, threat, checks(), 0, Stream(0, 0), k=5, n=16)).gammas
    assert found.gammas == [[0], *spread, *spread]


# ---------------------------------------------------------------- certified regions


@pytest.fixture(scope="module")
def certified_digits(checkpoint):
    """(smoothed, threat, [(index, prepared image, certificate)]) of digits turned by multiples of 5 degrees up to 30:
    finitely many attacks, so the sampled error bound is sound."""
    options = ("threat.low=-30", "threat.high=30", "threat.step=5", "images.first=12")
    run = prepare(compose("certify", *SMALL, f"checkpoint={checkpoint}", *options), "certify", ())
    certifier = JointCertifier(FixedN(64, 1000), ImageBound(draws=512, choose=64))
    images = {index: x for x, _, index in run.data.visited}
    found = certifier.certify(run.smoothed, run.threat, images.items(), seed=0)
    return run.smoothed, run.threat, [(i, run.threat.prepare(images[i][None])[0], made) for i, made in found]


def over(threat: TransformationThreat, low: float, high: float, step: float) -> TransformationThreat:
    return TransformationThreat(threat.transform, low, high, step, threat.saved, threat.size)


def test_no_certified_image_flips_under_the_grid_attack(certified_digits):
    """Every attack there is within the certified radius, 2,048 votes each from draws of another seed; beyond it, on the
    whole circle, the same search flips the same images."""
    smoothed, threat, certified = certified_digits
    tried = flipped_outside = 0
    for index, x, certificate in certified:
        if certificate.prediction < 0 or certificate.radius < threat.step:
            continue
        assert certificate.guarantee == "sound"
        (low,), (high,) = threat.box(certificate.radius)
        inside = over(threat, low, high, threat.step)
        found = finish(grid(smoothed, inside, x, certificate.prediction, Stream(1, index), n=2048))
        assert set(found.smoothed) == {certificate.prediction}
        assert len(found.gammas) == 2 * int(certificate.radius / threat.step) + 1
        assert contradictions(vars(found), vars(certificate)) == 0
        tried += len(found.gammas)
        wide = finish(grid(smoothed, over(threat, -180, 180, 30), x, certificate.prediction, Stream(1, index), n=64))
        flipped_outside += any(
            predicted != certificate.prediction and distance > certificate.radius
            for predicted, distance in zip(wide.smoothed, wide.distances, strict=True)
        )
    assert tried >= 20
    assert flipped_outside >= 3


# ---------------------------------------------------------------- what is refused


def start(attack, transform, **options):
    """The first round of an attack."""
    smoothed = SmoothedClassifier(Moments(lambda m, s: m), 2, noise=Gaussian(0.1)).eval()
    return next(attack(smoothed, TransformationThreat(transform, 0, 3), checks(), 0, Stream(0, 0), **options))


@pytest.mark.parametrize("transform", [Rotation("nearest"), CyclicTranslation()])
def test_transformations_without_gradients_are_refused(transform):
    with pytest.raises(RequestError, match=f"{transform.name} .*attack=grid or attack=worst_of_k"):
        start(eot, transform)
    for other in (grid, worst_of_k):
        assert start(other, transform)


@pytest.mark.parametrize("transform", [Rotation(), Rotation("bicubic"), Brightness(), GaussianBlur()])
def test_smooth_transformations_are_not(transform):
    assert start(eot, transform)


class Sealed(Moments):
    """As a compiled network: inference mode whatever surrounds it."""

    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


class Labels(nn.Module):
    def forward(self, x):
        return (x.mean((1, 2, 3)) > 0.5).long()


def test_networks_without_gradients_are_refused():
    """A compiled network, and one that returns labels; the plain form of the same network is taken instead."""
    threat = TransformationThreat(Brightness(), -0.3, 0.3, saved="real")
    plain = Moments(lambda m, s: 9 * (m - 0.5))
    for base in (Sealed(plain.h), Labels()):
        smoothed = smoothed_classifier(base, Brightness(), sigma=0.02)
        with pytest.raises(RequestError, match=r"gradients.*attack=grid"):
            finish(eot(smoothed, threat, checks(), 0, Stream(0, 0), steps=2, draws=2))
    smoothed = smoothed_classifier(Sealed(plain.h), Brightness(), sigma=0.02)
    efforts = {"restarts": 4, "steps": 8, "draws": 4, "n": 16}
    found = finish(eot(smoothed, threat, checks(), 0, Stream(0, 0), **efforts, network=plain))
    same = finish(
        eot(smoothed_classifier(plain, Brightness(), sigma=0.02), threat, checks(), 0, Stream(0, 0), **efforts)
    )
    assert found == same
    assert min(found.gammas) == pytest.approx([-0.3])


@pytest.mark.parametrize(
    ("attack", "options", "words"),
    [
        (worst_of_k, {"k": 3}, r"attack\.k .*at least 4, got 3"),
        (worst_of_k, {"n": 0}, r"attack\.n .*got 0"),
        (worst_of_k, {"k": 4.5}, r"attack\.k .*got 4\.5"),
        (grid, {"points": 1}, r"attack\.points .*got 1"),
        (grid, {"n": True}, r"attack\.n .*got True"),
        (eot, {"restarts": 3}, r"attack\.restarts"),
        (eot, {"steps": 0}, r"attack\.steps"),
        (eot, {"draws": "many"}, r"attack\.draws .*'many'"),
        (eot, {"step_size": 0}, r"attack\.step_size .*at most 1, got 0"),
        (eot, {"step_size": "big"}, r"attack\.step_size .*big"),
        (eot, {"step_size": 1.5}, r"attack\.step_size .*got 1\.5"),
        (eot, {"n": -1}, r"attack\.n"),
    ],
)
def test_efforts_are_refused_before_any_work(attack, options, words):
    with pytest.raises(RequestError, match=words):
        start(attack, Rotation(), **options)


def test_grids_beyond_all_means_are_refused():
    with pytest.raises(RequestError, match="160,000 parameters are too many"):
        start(grid, BrightnessContrast(), points=400)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("attack=eot", "transform.interpolation=nearest"), ("rotation", "attack=grid")),
        (("attack=eot", "attack.step_size=2"), ("attack.step_size", "got 2")),
        (("attack=grid", "attack.points=1"), ("attack.points", "got 1")),
        (("attack=grid", "attack.k=4"), ("attack.k",)),
    ],
)
def test_commands_that_cannot_be_end_in_one_sentence(options, words, network, here):
    one_sentence(run_main("attack", *SMALL, f"checkpoint={network()}", *options, "store=run"), *words)
    assert snapshot(here) == {}


@pytest.mark.parametrize("options", [("attack=grid", "attack.points=3"), ("attack=eot", "attack.steps=2")])
def test_the_command_writes_what_the_attack_found(options, network, here):
    """Under Lightning's inference mode, with the fused network for votes and the plain one for gradients."""
    overrides = (*SMALL, f"checkpoint={network()}", *options, "attack.n=32", "images.first=2", "store=run")
    found = records(run_task("attack", *overrides))
    assert [r["index"] for r in found] == [0, 1]
    for record in found:
        assert record["gammas"][0] == [0]
        assert len(record["gammas"]) == len(record["smoothed"]) == (3 if "attack=grid" in options else 17)
        assert np.abs(record["gammas"]).max() <= 10
    again = records(run_task("attack", *overrides[:-1], "store=again", "images.in_flight=1"))
    assert [r | {"seconds": 0} for r in again] == [r | {"seconds": 0} for r in found]
