"""Waveforms that clip when they are made louder: E as a curve over the size of the attack, and what uses it. And shifts
in time, with which such classifiers are trained."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import nn

import layouts
from conftest import QUIET, one_sentence, records, run_main, run_task
from gsmooth_lightning.certify import AdditiveCertifier, JointCertifier, NestedCertifier
from gsmooth_lightning.certify.rebound import rebound
from gsmooth_lightning.certify.transfer import largest_radius, law_transfer, required
from gsmooth_lightning.data import SpeechCommands, TimeShift
from gsmooth_lightning.error import Bound, Conditions, ImageBound, StoredBound
from gsmooth_lightning.error.rounding import TAIL, file_rounding, rounding_bound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.smoothed import SAMPLE_LEVELS, SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream, content_digest
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Brightness, Volume
from plans import Given, finish

LAW, SIGMA = 3.0, 0.05


def loud(low: float = -3.0, high: float = 3.0, saved: str = "16bit", **options) -> TransformationThreat:
    return TransformationThreat(Volume(), low, high, saved=saved, **options)


def clip(peak: float = -1.0, seed: int = 0, samples: int = 300) -> torch.Tensor:
    """16-bit samples whose peak lies so many dB below the largest: it clips from -peak dB on."""
    wave = np.random.default_rng(seed).uniform(-1, 1, (1, samples))
    wave = wave / np.abs(wave).max() * 10 ** (peak / 20)
    return loud().prepare(torch.from_numpy(wave)[None].float())[0]


def classifier(base: nn.Module | None = None, sigma: float = SIGMA) -> SmoothedClassifier:
    network = base or nn.Identity()
    parts = (Volume(), None, Gaussian(LAW), Gaussian(sigma), 32, SAMPLE_LEVELS)
    return SmoothedClassifier(network, 2, *parts).eval()


def curve_at(bound, size: float) -> float:
    """E of attacks of this size, read off the rows."""
    (*_, last) = [error for start, error in bound.curve if start <= size]
    return last


def without(bound):
    """The same bound by its largest E alone."""
    return replace(bound, curve=())


# ---------------------------------------------------------------- the rows


RANGES = {"both ways": (-3.0, 3.0), "mostly louder": (-0.5, 3.0), "mostly softer": (-6.0, 2.0), "far": (-20.0, 20.0)}


@pytest.mark.parametrize("name", RANGES)
def test_no_real_file_has_a_larger_defect_than_its_row_says(name):
    """||encode(psi(file, theta)) - encode(psi(x, gamma + theta))|| / sigma, theta over the allowed mass with both ends,
    anywhere between the points of its grid; gamma dense, and on both sides of the start of each row."""
    threat, smoothed, x = loud(*RANGES[name]), classifier(), clip()
    bound = rounding_bound(smoothed, threat, x)
    least, most = (float(end) for end in smoothed.law.within(TAIL, 1))
    step = smoothed.parameter_step
    theta = torch.linspace(least, most, 21, dtype=torch.float64)[:, None]
    theta = theta + step * torch.from_numpy(np.random.default_rng(1).uniform(-0.5, 0.5, theta.shape))
    theta[0], theta[-1] = least, most
    starts = np.array([start for start, _ in bound.curve])
    around = np.concatenate([starts, starts - 1e-9, starts + 1e-9, starts - 1e-4])
    gammas = np.concatenate([np.linspace(*RANGES[name], 101), around, -around])
    gammas = gammas[(gammas >= threat.low) & (gammas <= threat.high)]
    tight = 0.0
    for gamma in torch.from_numpy(gammas)[:, None, None]:
        file = threat.apply(x[None], gamma)
        turned = smoothed.encode(file.expand(len(theta), -1, -1), (theta / step).round() * step)
        straight = smoothed.encode(x.expand(len(theta), -1, -1), ((gamma + theta) / step).round() * step)
        defect = (turned - straight).double().flatten(1).norm(dim=1).max() / smoothed.levels / SIGMA
        allowed = curve_at(bound, abs(float(gamma)))
        assert defect <= allowed, float(gamma)
        tight = max(tight, float(defect) / allowed)
    assert tight > 0.98


@pytest.mark.parametrize("name", RANGES)
def test_rows_rise_to_the_value(name):
    """From radius 0 on; each row's E is that of the threat up to the next one's start, rounded up by a thousandth."""
    threat, smoothed, x = loud(*RANGES[name]), classifier(), clip()
    bound = rounding_bound(smoothed, threat, x)
    starts, errors = (np.array(column) for column in zip(*bound.curve, strict=True))
    assert starts[0] == 0
    assert (np.diff(starts) > 0).all()
    assert (np.diff(errors) > 0).all()
    assert errors[-1] == bound.value == bound.parts[0]
    assert len(bound.curve) > 5
    quiet = 1.0 - threat.reach / 30  # nothing is clipped before 1 dB
    assert curve_at(bound, quiet) < 1.01 * errors[0]
    assert curve_at(bound, 1.0 + threat.reach / 30) > 10 * errors[0]
    for end, error in zip([*starts[1:], threat.reach], errors, strict=True):
        own = file_rounding(smoothed, threat.within(end), x)
        assert own <= error < 1.002 * own
    assert (bound.rho, bound.alpha, bound.guarantee, bound.slope) == (TAIL, 0.0, "sound", 0.0)


def test_what_does_not_clip_has_no_curve():
    """A quiet clip, softer ones alone, and images: one E, that of the whole range."""
    smoothed = classifier()
    for threat, x in ((loud(), clip(-10)), (loud(-3, 0), clip()), (loud(saved="real"), clip())):
        bound = rounding_bound(smoothed, threat, x)
        assert bound.curve == ()
        assert file_rounding(smoothed, threat, x) <= bound.value < 1.002 * file_rounding(smoothed, threat, x)
    almost = rounding_bound(smoothed, loud(), clip(-3.1))  # the rounding of floats grows with the peak
    assert almost.value < 1.01 * min([almost.value, *(error for _, error in almost.curve)])
    bright = SmoothedClassifier(nn.Identity(), 2, Brightness(), None, Gaussian(0.3), Gaussian(0.1), 32)
    threat = TransformationThreat(Brightness(), -0.2, 0.2, saved="real")
    assert rounding_bound(bright, threat, torch.rand(1, 8, 8)).curve == ()


def test_the_range_within_a_radius():
    """Cut at both ends; the threat itself keeps its range."""
    threat = loud(-0.5, 3)
    for radius, ends in ((0.2, (-0.2, 0.2)), (1, (-0.5, 1)), (7, (-0.5, 3))):
        narrow = threat.within(radius)
        assert (narrow.low, narrow.high) == ends
        assert (narrow.saved, narrow.transform) == (threat.saved, threat.transform)
    assert (threat.low, threat.high) == (-0.5, 3)


# ---------------------------------------------------------------- what is left under an attack, and radii


def transfers(smoothed, threat, x):
    """T with the curve and without, as `certify=direct` makes it."""
    certifier, bound = AdditiveCertifier(FixedN(8, 64)), rounding_bound(smoothed, threat, x)
    slack = smoothed.slack(x)
    return [certifier.transfer(smoothed, threat, b, x.numel(), slack) for b in (bound, without(bound))], bound, slack


def test_what_is_left_is_the_theorem_with_the_row_s_own_error():
    """Phi(z(p - slack) - sqrt((r / sigma_theta)^2 + E(r)^2)) - rho; it never grows with the radius."""
    smoothed, x = classifier(), clip()
    (curved, flat), bound, slack = transfers(smoothed, loud(), x)
    radii, p = np.linspace(0.01, 3, 121), np.array([0.6, 0.99, 1 - 1e-9, 1.0])
    left = np.array([curved(p, float(r)) for r in radii])
    for r, row in zip(radii, left, strict=True):
        plain = law_transfer(Volume(), smoothed.law, (-r,), (r,), curve_at(bound, r))
        assert row == pytest.approx(np.maximum(plain(p - slack) - TAIL, 0), abs=1e-15)
        assert (row >= flat(p, float(r))).all()
    assert (np.diff(left, axis=0) <= 1e-15).all()
    assert (curved(p, 0.0) == p - slack).all()
    assert (curved(p, 3.0) == flat(p, 3.0)).all()


@pytest.mark.parametrize("peak", [-0.2, -1.0, -2.5])
def test_radii_with_the_curve_are_at_least_those_without(peak):
    """And some are larger; where T jumps at a row's start, the radius ends before it."""
    smoothed, x = classifier(), clip(peak)
    (curved, flat), bound, _ = transfers(smoothed, loud(), x)
    shares, pairs = [0.51, 0.6, 0.8, 0.95, 0.999, 1 - 1e-6, 1 - 1e-12], []
    for pa in shares:
        radii = [largest_radius(t, pa, 1 - pa, 3.0) for t in (curved, flat)]
        assert radii[0] is not None
        assert radii[0] >= radii[1]
        pairs.append(radii)
        if 0 < radii[0] < 3:
            assert 2 * float(curved(pa, radii[0])) > 1
            assert 2 * float(curved(pa, radii[0] * (1 + 1e-5))) <= 1
            assert required(curved, radii[0]) <= pa + 1e-9
            assert required(curved, radii[0] * (1 + 1e-5)) > pa
    assert max(own - other for own, other in pairs) > 0.15
    before = [r for r, _ in pairs for start, _ in bound.curve[1:] if start * (1 - 1e-5) < r < start]
    assert len(before) > 0


class Line(nn.Module):
    """Class 1 where w.y > b."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = w, b

    def share(self, x: torch.Tensor, sigma: float) -> float:
        """P(w.(10^(theta/20) x + eps) > b) = E Phi((10^(theta/20) w.x - b) / (sigma |w|)), by the trapezoidal rule."""
        theta = np.linspace(-9 * LAW, 9 * LAW, 6001)
        weights = np.exp(-((theta / LAW) ** 2) / 2)
        lead = 10 ** (theta / 20) * float((x.double() * self.w).sum()) - self.b
        return float((weights * ndtr(lead / (sigma * float(self.w.norm())))).sum() / weights.sum())


def lines(x: torch.Tensor):
    """Hyperplanes that clipping moves a file towards, by how loud a sample is, and others, at several distances."""
    shape = x.double()
    for power in (1, 3, 9):
        peaks = shape.sign() * shape.abs() ** power
        rest = shape.sign() * (shape.abs() < 0.6)
        for balance in (0.0, 0.5, 0.9):  # at 1 the picture lies on the hyperplane through 0
            w = peaks - balance * rest * float((peaks * shape).sum() / (rest * shape).sum())
            for quantile in (0.0, 1.0, 2.0):
                yield Line(w, float((w * shape).sum()) * 10 ** (-quantile * LAW / 20) * (quantile > 0))


def test_an_exact_linear_classifier_keeps_its_class_within_the_radius():
    """pA, and the share of votes on each file within the radius, are integrals; at this sigma the curve matters. With
    no E some are certified further than they hold."""
    x, sigma, falsified, between = clip(), 0.2, 0, 0
    smoothed, threat = classifier(sigma=sigma), loud()
    (curved, flat), _, _ = transfers(smoothed, threat, x)
    free = AdditiveCertifier(FixedN(8, 64)).transfer(
        smoothed, threat, Bound(0.0, 0.0, 0.0, "heuristic"), x.numel(), 0.0
    )
    for line in lines(x):
        pa = line.share(x, sigma)
        assert pa > 0.5
        radius, alone, wrong = (largest_radius(t, pa, 1 - pa, 3.0) or 0.0 for t in (curved, flat, free))
        gammas = np.concatenate([np.linspace(-3, 3, 241), [radius, -radius]])
        files = threat.apply(x.expand(len(gammas), -1, -1), torch.from_numpy(gammas)[:, None])
        shares = np.array([line.share(file, sigma) for file in files])
        assert (shares[np.abs(gammas) <= radius] > 0.5).all()
        falsified += bool((shares[np.abs(gammas) <= wrong] <= 0.5).any())
        between += alone + 0.1 < radius < 3
    assert falsified > 0
    assert between > 3


# ---------------------------------------------------------------- stores, other votes, nested smoothing


class Voted(SmoothedClassifier):
    """Draws nothing: returns the votes of a stage."""

    def sample(self, x, stream, stage, first, last):
        return np.array({"select": [30, 2, 0], "estimate": [990, 10, 0]}[stage])
        yield


def voted():
    return Voted(nn.Identity(), 2, Volume(), None, Gaussian(LAW), Gaussian(SIGMA), 32, SAMPLE_LEVELS).eval()


MAKERS = {
    "direct": lambda plan, error=None: AdditiveCertifier(plan),
    "joint": lambda plan, error=None: JointCertifier(plan, error or ImageBound()),
}


def certificate(name, plan, error=None):
    """As a store keeps it."""
    found = finish(MAKERS[name](plan, error).procedure(voted(), loud(), clip(), Stream(0, 0)))
    return json.loads(json.dumps({"index": 0, **asdict(found)}))


@pytest.mark.parametrize("name", MAKERS)
def test_votes_bounded_again_keep_the_curve(name):
    made = {alpha: certificate(name, FixedN(32, 1000, alpha)) for alpha in (1e-3, 0.05, 0.2)}
    bound = rounding_bound(voted(), loud(), clip())
    for record in made.values():
        assert record["details"]["curve"] == [list(row) for row in bound.curve]
        assert record["details"]["E"] == bound.value
        for alpha, wanted in made.items():
            again = rebound(record, MAKERS[name](FixedN(32, 1000, alpha)), voted(), loud())
            assert again == wanted
    assert 0.3 < made[1e-3]["radius"] < made[0.2]["radius"]
    flat = record | {"details": {k: v for k, v in record["details"].items() if k not in ("curve", "slope")}}
    older = rebound(flat, MAKERS[name](FixedN(32, 1000, 0.2)), voted(), loud())
    assert older["radius"] < made[0.2]["radius"]


def test_stored_bounds_keep_the_curve():
    """The certificate with the bounds of a store is that with the bound itself; of a narrower range too."""
    x, smoothed, threat = clip(), voted(), loud()
    bound = finish(ImageBound().procedure(smoothed, threat, x, Stream(0, 0)))
    assert bound == rounding_bound(smoothed, threat, x)
    record = json.loads(json.dumps({"index": 0, "input": content_digest(x), **asdict(bound)}))
    stored = StoredBound([record], Conditions(smoothed, threat), ImageBound())
    assert finish(stored.procedure(smoothed, threat, x, Stream(0, 0))) == bound
    plan = FixedN(32, 1000, 0.2)
    assert certificate("joint", plan, stored) == certificate("joint", plan)
    narrow = loud(-0.5, 1.5)
    found = finish(JointCertifier(plan, stored).procedure(smoothed, narrow, x, Stream(0, 0)))
    own = finish(JointCertifier(plan, ImageBound()).procedure(smoothed, narrow, x, Stream(0, 0)))
    assert 0.9 < found.radius <= own.radius + 1e-9


def test_nested_smoothing_takes_the_error_of_the_whole_range():
    """Its inner test is done before the attack's size is known: Phi(E) of the largest E, and T without a row."""
    x, smoothed, threat = clip(-2.99), classifier(sigma=0.2), loud()
    bound = rounding_bound(smoothed, threat, x)
    assert len(bound.curve) > 1
    certifier = NestedCertifier(FixedN(8, 64), FixedN(8, 64, 1e-3), Given(bound))
    (layer,) = certifier.layers(bound, torch.ones(1, *x.shape, dtype=torch.bool), 0.0)
    assert layer.threshold == pytest.approx(float(ndtr(bound.value)), rel=1e-12)
    assert layer.threshold > ndtr(bound.curve[0][1])
    with_curve, alone = (certifier.transfer(smoothed, threat, b, x.numel(), 0.0) for b in (bound, without(bound)))
    for radius in (0.0, 0.5, 1.5, 3.0):
        assert with_curve(0.99, radius) == alone(0.99, radius)


DIGITS = (*QUIET, "data.size=8", "data.enlarge=null", "model.widths=[4]", "model.hidden=16", "preprocess=none")
DIGITS = (*DIGITS, "threat=volume", "transform=volume", "threat.saved=16bit", "law.sigma=3", "noise.sigma=0.2")
DIGITS = (*DIGITS, "images.first=4", "sampling.n0=32", "sampling.n=400")


def test_the_commands_keep_the_curve(here):
    """Digits, whose white pixels clip at once: direct, joint with its own bounds, with a store's, and bounded again."""
    network = run_task("train", *DIGITS, "train.epochs=2", "train.batch_size=32", "store=network")
    certify = (*DIGITS, f"checkpoint={network}")
    run_task("certify", *certify, "error=none", "certify=direct", "store=direct")
    run_task("certify", *certify, "store=joint")
    run_task("bound", *DIGITS, "store=bounds")
    run_task("certify", *certify, "bounds=bounds", "store=stored")
    direct, joint, stored, bounds = (records(here / name) for name in ("direct", "joint", "stored", "bounds"))
    for a, b, c, bound in zip(direct, joint, stored, bounds, strict=True):
        assert len(bound["curve"]) == 30
        assert a["details"]["curve"] == b["details"]["curve"] == c["details"]["curve"] == bound["curve"]
        assert a["radius"] == b["radius"] == c["radius"]
    assert max(r["radius"] for r in direct) > 0.01
    ended = run_main("report", "stores=[direct]", "alpha=0.2", "radii=[0,0.01]", "out=again")
    assert (ended.code, ended.error) == (0, None), ended.err
    run_task("certify", *certify, "error=none", "certify=direct", "sampling.alpha=0.2", "store=wide")
    fresh = run_main("report", "stores=[wide]", "radii=[0,0.01]", "out=fresh")
    for row in ("certified at 0.01 dB", "median certified radius"):
        own, other = ([line for line in out.splitlines() if line.startswith(row)] for out in (ended.out, fresh.out))
        assert own[0].split() == other[0].split()
    ended = run_main("report", "stores=[bounds]", "out=bound")
    assert (ended.code, ended.error) == (0, None), ended.err
    assert "E in l2, sigma 0.2" in ended.out


# ---------------------------------------------------------------- shifts in time


def test_shifts_are_by_at_most_so_many_samples_and_leave_silence():
    """Each of -3, ..., 3 about as often as the others; earlier ones end, later ones begin in silence."""
    x = torch.arange(1.0, 9)[None]
    later = {by: torch.tensor([[0.0] * by + list(range(1, 9 - by))]) for by in range(4)}
    earlier = {-by: torch.tensor([[*range(1 + by, 9)] + [0.0] * by]).float() for by in range(1, 4)}
    shift, seen = TimeShift(3), Counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(700):
            y = shift(x)
            assert y.shape == x.shape
            assert y.dtype == x.dtype
            (by,) = [by for by, wanted in (later | earlier).items() if torch.equal(y, wanted)]
            seen[by] += 1
        assert torch.equal(TimeShift(0)(x), x)
    assert set(seen) == set(range(-3, 4))
    assert all(abs(count - 100) < 4 * math.sqrt(700 / 7 * 6 / 7) for count in seen.values())
    assert torch.equal(x, torch.arange(1.0, 9)[None])


@pytest.mark.parametrize("most", [-1, 1.5, True, "9", None, math.nan])
def test_shifts_by_no_number_of_samples(most):
    with pytest.raises(RequestError, match=r"data\.augment\.most must be a whole number, at least 0"):
        TimeShift(most)


def failing(kind):
    def augment(raw):
        raise kind("first\nsecond")

    return augment


@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError])
def test_an_augmentation_that_fails_is_not_a_damaged_file(kind, tmp_path):
    """It is named with the file; what is wrong with a file is said of the file, augmented or not."""
    folder = layouts.speech(tmp_path, {"yes": layouts.SPEAKERS})
    train = SpeechCommands(str(tmp_path)).split("train", 1)
    path = folder / train.files[0][0]
    with pytest.raises(RequestError, match=r"data\.augment fails on .*wav \(first\); correct its options") as failure:
        train.augmented(0, failing(kind))
    assert str(path) in str(failure.value)
    assert not {"damaged", "restore"} & set(str(failure.value).split())
    assert train[0][0].shape == (1, 16000)
    layouts.cut(path)
    for read in (lambda: train[0], lambda: train.augmented(0, failing(kind))):
        with pytest.raises(RequestError, match=r"cannot be read .*restore it") as failure:
            read()
        assert "data.augment" not in str(failure.value)


def test_an_augmentation_that_fails_ends_training_in_one_sentence(here):
    """A crop that is larger than the pictures' files; a shift beyond the clip."""
    layouts.folders(here / "data", layouts.TREE)
    crop = ("+data.augment._target_=torchvision.transforms.v2.RandomCrop", "+data.augment.size=99")
    options = (*QUIET, *layouts.OF_TREE, "data.channels=3", "model.widths=[4]", "model.hidden=8", "train.epochs=1")
    ended = run_main("train", *options, *crop, "data.workers=0", "error=none", "store=run")
    one_sentence(ended, "data.augment fails on", "correct its options")
