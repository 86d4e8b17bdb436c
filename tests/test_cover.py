"""The cover certificate: slices, exact levels, known classifiers under attack."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import binom
from torch import nn

from covers import Linear, digits, exact_p, linear_case, visiting
from gsmooth_lightning.certify import ABSTAIN, CoverCertifier
from gsmooth_lightning.certify import cover as module
from gsmooth_lightning.certify.cover import Cover, Slice
from gsmooth_lightning.confidence import group_sequential
from gsmooth_lightning.error import slices as slicing
from gsmooth_lightning.error.movement import movements
from gsmooth_lightning.error.slices import parts
from gsmooth_lightning.preprocess import DiscVignette, LowPass
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    Composition,
    Rotation,
    Scaling,
    Shear,
    Translation,
)
from plans import finish

# ---------------------------------------------------------------- slices


def cutting(threat, sigma=0.5, certifier=None, **options):
    """The state of a certificate of a digit, before its first slice."""
    smoothed = visiting([DiscVignette(), LowPass(5)], sigma=sigma, **options)
    return Cover(certifier or CoverCertifier(), smoothed, threat, threat.prepare(digits(3))[0], Stream(0, 0), 0, 0.0)


@pytest.mark.parametrize(("low", "high"), [(-20.0, 20.0), (0.0, 12.5), (-3.3, 17.1), (-7.0, 0.0)])
def test_slices_of_one_parameter_leave_no_gap(low, high):
    """In order of gamma each begins where the last one ended, exactly; so do the parts of one that failed."""
    state = cutting(TransformationThreat(Rotation(), low, high), sigma=0.1)
    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    for a, b, depth in ((*ends, 0), (torch.tensor([1.1]).double(), torch.tensor([4.7]).double(), 1)):
        pieces = finish(state.cut(a, b, depth))
        assert [s.near for s in pieces] == sorted(s.near for s in pieces)
        line = sorted((s.low.item(), s.high.item()) for s in pieces)
        assert (line[0][0], line[-1][1]) == (a.item(), b.item())
        assert all(left[1] == right[0] and left[0] < left[1] for left, right in itertools.pairwise(line))
        assert len(line) > 5
        for s in pieces:  # whoever is in a slice is at least so far from 0, and someone is no farther
            assert s.near <= torch.linspace(s.low.item(), s.high.item(), 101).abs().min() + 1e-6
            assert s.near >= (0.0 if s.low <= 0 <= s.high else min(abs(s.low), abs(s.high))) * (1 - 1e-9)
            moves, fixed = movements(state.smoothed, state.threat, Rotation(), state.x, s.low[None], s.high[None])[0]
            assert moves <= state.certifier.margins[depth] * 0.1
            assert (moves + fixed) / 0.1 <= s.error <= (moves + fixed) / 0.1 + module.ERROR_STEP


@pytest.mark.parametrize(("low", "high"), [([-1.0, -1.0], [1.0, 1.0]), ([0.0, -2.0], [0.3, 0.5])])
def test_slices_of_two_parameters_leave_no_gap(low, high):
    """Their areas add up to the box's, and every point lies in one; distances are those of the nearest corner."""
    threat = TransformationThreat(Translation(), low, high)
    state = cutting(threat, sigma=1.0)
    box = [torch.tensor(ends, dtype=torch.float64) for ends in (low, high)]
    pieces = finish(state.cut(*box, 0))
    a, b = torch.stack([s.low for s in pieces]), torch.stack([s.high for s in pieces])
    assert (b - a).prod(1).sum().item() == pytest.approx((box[1] - box[0]).prod().item(), rel=1e-12)
    points = box[0] + (box[1] - box[0]) * torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)).double()
    within = ((points[:, None] >= a) & (points[:, None] <= b)).all(2)
    assert within.any(1).all()
    near = torch.tensor([s.near for s in pieces], dtype=torch.float64)
    assert (threat.distance(points)[:, None] >= near)[within].all()
    assert near.numpy() == pytest.approx(threat.distance(torch.zeros_like(a).clamp(a, b)).numpy(), rel=1e-9, abs=0)


def test_a_range_without_width_is_cut_along_the_others():
    state = cutting(TransformationThreat(Translation(), [0.0, -1.0], [0.0, 1.0]), sigma=1.0)
    pieces = finish(state.cut(torch.tensor([0.0, -1.0]).double(), torch.tensor([0.0, 1.0]).double(), 0))
    line = sorted((s.low[1].item(), s.high[1].item()) for s in pieces)
    assert all(s.low[0] == s.high[0] == 0 for s in pieces)
    assert line[0][0] == -1
    assert line[-1][1] == 1
    assert all(left[1] == right[0] for left, right in itertools.pairwise(line))


def test_distance_is_a_share_where_units_differ():
    """Rotation by -10 to 30 degrees, brightness +-.2: a slice of 15 to 20 degrees begins at half of the range."""
    psi = Composition([Rotation(), Brightness()])
    state = cutting(
        TransformationThreat(psi, [-10, -0.2], [30, 0.2], saved="real"), transform=Brightness(), law=Gaussian(0.3)
    )
    for low, high, share in ((15.0, 20.0, 0.5), (-6.0, -5.0, 0.5), (-1.0, 2.0, 0.0)):
        near = state.pieces.near(torch.tensor([low]).double(), torch.tensor([high]).double())
        assert near <= share
        assert near == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("margins", [1.0001, 1.7, 3.0, 8.0, 8.1, 1e6])
def test_parts_are_at_least_two_and_share_edges(margins):
    low, high = torch.tensor([-0.1, 2.0]).double(), torch.tensor([0.7, 2.3]).double()
    pieces = parts(low, high, int((high - low).argmax()), margins)
    assert len(pieces) >= 2
    assert pieces[0][0][0] == low[0]
    assert pieces[-1][1][0] == high[0]
    assert all(torch.equal(left[1][:1], right[0][:1]) for left, right in itertools.pairwise(pieces))
    assert all(a[1] == 2.0 and b[1] == high[1] for a, b in pieces)


def test_too_many_slices_end_the_certificate(monkeypatch):
    """At depth 0 nothing is certified; a slice that would need too many parts fails where it begins."""
    monkeypatch.setattr(slicing, "MOST_SLICES", 5)
    threat = TransformationThreat(Rotation(), -20, 20)
    certifier, smoothed = CoverCertifier(16, 128), visiting(base=Linear(torch.ones(256), 0.0))
    (_, certificate) = next(iter(certifier.certify(smoothed, threat, [(0, digits(3)[0])])))
    assert (certificate.prediction, certificate.radius, certificate.n) == (ABSTAIN, 0.0, 0)
    state = cutting(threat)
    assert finish(state.cut(torch.tensor([3.0]).double(), torch.tensor([19.0]).double(), 1)) == []
    assert state.limit == pytest.approx(3.0)
    assert state.limit <= 3.0


# ---------------------------------------------------------------- levels, by exact computation


class Scripted:
    """A sampler whose votes are chosen from outside: a path of counts, and the probability of that path.

    `paths` walks through all of them, so that probabilities of what follows are sums and not estimates.
    """

    def __init__(self, p):
        self.p, self.choices, self.weight, self.options = p, [], 1.0, []
        self.tests: list[int] = []

    def sample(self, image, stream, stage, first, last):
        if first == 0:
            self.tests.append(stream.path)
        place, n = len(self.options), last - first
        self.options.append(n + 1)
        k = self.choices[place] if place < len(self.choices) else 0
        self.weight *= math.comb(n, k) * self.p**k * (1 - self.p) ** (n - k)
        return np.array([k, n - k, 0])
        yield

    def paths(self):
        """Every path once; the caller runs the procedure with this sampler between two steps."""
        while True:
            self.weight, self.options, self.tests = 1.0, [], []
            yield
            taken = (self.choices + [0] * len(self.options))[: len(self.options)]
            while taken and taken[-1] == self.options[len(taken) - 1] - 1:
                taken.pop()
            if not taken:
                return
            taken[-1] += 1
            self.choices = taken


def nested_slices(certifier, threat, smoothed, script, p=None):
    """A state in which each slice has one part that matters, and each needs exactly `script.p`."""
    state = Cover(certifier, smoothed, threat, digits(3)[0], Stream(0, 0), 0, 0.0)
    state.sample = script.sample  # type: ignore[method-assign]

    def cut(low, high, depth):
        return [Slice(low, high, certifier.margins[depth], 1.0, depth)]
        yield

    state.cut = cut  # type: ignore[method-assign]
    return state


def passing(certifier, monkeypatch, p=0.6):
    """Probability that a gamma whose slices at every depth have pA = p, just what they need, is certified; and those of
    passing at each depth."""
    monkeypatch.setattr(CoverCertifier, "threshold", lambda *_, **__: p)
    threat, smoothed = TransformationThreat(Rotation(), -20, 20), visiting(block=4)
    script, total, seen = Scripted(p), 0.0, 0.0
    at = np.zeros(len(certifier.margins))
    for _ in script.paths():
        state = nested_slices(certifier, threat, smoothed, script)
        first = Slice(torch.zeros(1), torch.ones(1), certifier.margins[0], 1.0, 0)
        finish(state.hold(first))
        seen += script.weight
        assert len(set(script.tests)) == len(script.tests)  # draws of their own for every test
        if state.limit == math.inf:
            total += script.weight
            at[len(script.tests) - 1] += script.weight
    assert seen == pytest.approx(1.0, abs=1e-9)  # every path was walked
    return total, at


def test_a_false_certificate_has_at_most_the_probability_alpha(monkeypatch):
    """All paths of the votes are walked through `hold` and `plan.test`, at the worst pA there is: the null's edge."""
    certifier = CoverCertifier(4, 8, 0.4, (0.7, 0.35))
    total, at = passing(certifier, monkeypatch)
    assert 0.05 < total <= 0.4
    assert (at <= [0.2, 0.1]).all()
    assert (at > 0.01).all()


def test_canary_retests_at_the_full_alpha_are_caught(monkeypatch):
    """The same walk shows a level above alpha when every depth has all of it: the test would see the mistake."""
    certifier = CoverCertifier(4, 8, 0.4, (0.7, 0.35))
    certifier.plans = [replace_alpha(plan, 0.4) for plan in certifier.plans]
    total, _ = passing(certifier, monkeypatch)
    assert total > 0.4


def replace_alpha(plan, alpha):
    return type(plan)(plan.radii, plan.n0, plan.n, alpha)


def rejected(threshold, looks, alpha):
    """P(count ever reaches the boundary) under p = threshold, by dynamic programming; giving up is not credited."""
    rule = group_sequential(threshold, looks, alpha)
    law, seen, total = np.ones(1), 0, 0.0
    for look, boundary in zip(looks, rule.reject, strict=True):
        law = np.convolve(law, binom.pmf(np.arange(look - seen + 1), look - seen, threshold))
        total += law[boundary:].sum()
        law, seen = law[:boundary], look
    return total


def test_levels_of_the_tests_that_are_used():
    """The shipped margins and numbers of draws: 2^-(k + 1) alpha at depth k, and alpha in all, at every threshold."""
    certifier = CoverCertifier(100, 1000, 1e-3)
    assert [plan.alpha for plan in certifier.plans] == [5e-4, 2.5e-4, 1.25e-4]
    looks = module.looks_up_to(1000, 16, first=16)
    for error in (0.1, 0.5, 0.9, 1.5, 2.3):
        levels = [rejected(float(ndtr(error)), looks, plan.alpha) for plan in certifier.plans]
        assert all(level <= plan.alpha for level, plan in zip(levels, certifier.plans, strict=True))
        assert sum(levels) <= certifier.alpha


# ---------------------------------------------------------------- a classifier whose probabilities are known


CASES = [
    (Rotation("bilinear"), 25.0, "8bit"),
    (Rotation("bicubic"), 25.0, "8bit"),
    (Scaling("bilinear"), 0.3, "float"),
    (Shear("bilinear"), 0.3, "real"),
]


@pytest.mark.parametrize(("psi", "limit", "saved"), CASES, ids=[f"{c[0].name} {c[0].interpolation}" for c in CASES])
def test_no_radius_reaches_the_first_flip(psi, limit, saved):
    """The classifier's probabilities are known exactly: a dense search over real files finds where the prediction
    flips, and no certificate of 24 reaches it; some come to a third of it."""
    threat = TransformationThreat(psi, -limit, limit, saved=saved)
    gammas = torch.linspace(-limit, limit, 401)[:, None]
    shares, flips = [], 0
    for index, (tilt, seed) in zip((0, 3, 7, 11), itertools.product((0.4, 0.6), (0, 1)), strict=True):
        (x,) = threat.prepare(digits(index))
        smoothed = linear_case(x, threat, [DiscVignette(), LowPass(5)], tilt, 0.5, ([0.0], [limit]), block=64)
        p = exact_p(smoothed, threat.apply(x.expand(len(gammas), *x.shape), gammas))
        lost = gammas[torch.from_numpy(p <= 0.5)].abs()
        flip = float(lost.min()) if len(lost) else math.inf
        certifier = CoverCertifier(64, 4000, 1e-3, (0.5, 0.25, 0.12))
        found = certifier.certify(smoothed, threat, [(index, x), (100 + index, x)], seed)
        for certificate in dict(found).values():
            assert certificate.guarantee == "sound"
            if certificate.prediction != ABSTAIN:
                assert certificate.prediction == 1
                assert certificate.radius < flip
                shares.append(certificate.radius / min(flip, limit))
        flips += flip < limit
    assert flips >= 3
    assert max(shares) > 0.33


@pytest.fixture(scope="module")
def one():
    """A linear classifier, its threat and image: cheap, with slices that fail and are retested."""
    threat = TransformationThreat(Rotation(), -25, 25)
    (x,) = threat.prepare(digits(3))
    return linear_case(x, threat, [DiscVignette(), LowPass(5)], 0.5, 0.5, ([0.0], [25.0]), block=32), threat, x


def test_every_test_has_draws_of_its_own(one, monkeypatch):
    """Addresses of the draws: the class is chosen once, on n0; each slice and each retest begins at its own address,
    and takes its draws one after the other; all of them are in the counts."""
    smoothed, threat, x = one
    taken, original = {}, SmoothedClassifier.sample

    def sample(self, image, stream, stage, first, last):
        taken.setdefault((stage, stream.path), []).append((first, last))
        return original(self, image, stream, stage, first, last)

    monkeypatch.setattr(SmoothedClassifier, "sample", sample)
    ((_, certificate),) = CoverCertifier(64, 2000, margins=(1.2, 0.3)).certify(smoothed, threat, [(5, x)])
    assert taken.pop(("select", ())) == [(0, 64)]
    tested = certificate.details["slices"]
    drawn = [s for s in tested if s[6]]
    assert {stage for stage, _ in taken} == {"estimate"}
    assert len({path for _, path in taken}) == len(taken) == len(drawn)
    assert () not in {path for _, path in taken}
    for ranges in taken.values():
        assert ranges[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert sorted(ranges[-1][1] for ranges in taken.values()) == sorted(s[6] for s in drawn)
    assert sum(certificate.counts) == certificate.n == sum(s[6] for s in drawn)
    assert {s[3] for s in drawn} > {0}  # some were retested


def test_what_passes_had_the_votes_and_what_is_claimed_was_tested(one):
    """Every gamma within the radius lies in a slice that passed; a fixed test of as many draws would agree."""
    smoothed, threat, x = one
    ((_, certificate),) = CoverCertifier(64, 2000).certify(smoothed, threat, [(5, x)])
    passed = [s for s in certificate.details["slices"] if s[7]]
    assert 0 < certificate.radius < 25
    assert sum(s[5] for s in certificate.details["slices"]) == certificate.counts[1]
    for gamma in np.linspace(-certificate.radius, certificate.radius, 501):
        assert any(s[0][0] <= gamma <= s[1][0] for s in passed)
    for _, _, error, depth, needed, votes, draws, _ in passed:
        assert needed >= ndtr(error)
        assert binom.sf(votes - 1, draws, needed) <= 1e-3 / 2 ** (depth + 1)


def test_workers_and_images_in_flight_change_nothing(one):
    """The same certificates with one or two threads, one image at a time or three."""
    smoothed, threat, x = one
    threads, found = torch.get_num_threads(), []
    try:
        for workers, in_flight in ((1, 1), (2, 3), (1, 3)):
            torch.set_num_threads(workers)
            work = [(i, x) for i in range(3)]
            some = dict(CoverCertifier(32, 600).certify(smoothed, threat, work, in_flight=in_flight))
            found.append({i: replace(c, seconds=0.0) for i, c in some.items()})
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert len({tuple(c.counts) for c in found[0].values()}) == 3  # an image's draws are its own


class Thirds(nn.Module):
    """Each of three classes with probability 1/3, whatever the image: decided by the noise's last digits."""

    def forward(self, y):
        steps = (y.flatten(1)[:, 0] * 65280).round().long()
        return nn.functional.one_hot(steps % 3, 3).float()


def test_a_guess_has_no_certificate():
    """Three classes at 1/3 each: the class that led on n0 draws passes nothing."""
    threat = TransformationThreat(Rotation(), -1, 1)
    found = dict(CoverCertifier(16, 400).certify(visiting((), Thirds(), 0.5, 3), threat, [(0, digits(0)[0])]))
    assert (found[0].prediction, found[0].radius) == (ABSTAIN, 0.0)
