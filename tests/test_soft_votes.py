"""Soft votes: bounds by enumeration, the classifier's arithmetic, the plan, certificates against quadrature."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binom, multinomial, norm
from torch import nn

from conftest import QUIET, compose, one_sentence, records, run_main
from gsmooth_lightning.attack import worst_of_k
from gsmooth_lightning.certify import ABSTAIN, AdditiveCertifier
from gsmooth_lightning.confidence import bernstein_lower, betting_lower, clopper_pearson_lower
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import ROUND, ConfidenceSequence, FixedN, GroupSequential, SoftVotes
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Brightness
from plans import finish

# ---------------------------------------------------------------- bounds of a mean in [0, 1]

PAIRS = [(0.0, 1.0), (0.0, 0.3), (0.6, 1.0), (0.9, 0.95)]
SHARES = (0.02, 0.2, 0.5, 0.8, 0.97)


@pytest.mark.parametrize("pair", PAIRS)
def test_bernstein_covers_two_values(pair):
    """P(bound > mean) <= alpha for 1, 2, 9 and 150 draws of two values: all numbers of the larger one, exactly."""
    for n, alpha in itertools.product((1, 2, 9, 150), (0.2, 0.01)):
        k = np.arange(n + 1)
        bounds = bernstein_lower(np.where(np.arange(n) < k[:, None], pair[1], pair[0]), alpha)
        for share in SHARES:
            assert binom.pmf(k, n, share)[bounds > share * pair[1] + (1 - share) * pair[0]].sum() <= alpha


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("alpha", [0.2, 0.02])
def test_betting_covers_two_values(pair, alpha):
    """P(bound > mean) <= alpha: all 2^11 sequences, as the bound depends on their order."""
    high = np.array(list(itertools.product((False, True), repeat=11)))
    bounds = betting_lower(np.where(high, pair[1], pair[0]), alpha)
    ones = high.sum(1)
    for share in SHARES:
        mass = share**ones * (1 - share) ** (11 - ones)
        assert mass[bounds > share * pair[1] + (1 - share) * pair[0]].sum() <= alpha


WEIGHTS = [(0.1, 0.2, 0.7), (0.01, 0.04, 0.95), (0.3, 0.6, 0.1), (0.05, 0.9, 0.05)]


@pytest.mark.parametrize("support", [(0.0, 0.7, 1.0), (0.0, 0.99, 1.0), (0.4, 0.5, 0.9)])
def test_bounds_cover_three_values(support):
    """Bernstein: all counts of 40 draws. Betting: all 3^7 sequences."""
    support = np.array(support)
    counts = np.array([(a, b, 40 - a - b) for a in range(41) for b in range(41 - a)])
    values = np.stack([np.repeat(support, row) for row in counts])
    index = np.array(list(itertools.product(range(3), repeat=7)))
    for alpha in (0.2, 0.02):
        bernstein, betting = bernstein_lower(values, alpha), betting_lower(support[index], alpha)
        for weights in WEIGHTS:
            mean = support @ weights
            assert multinomial.pmf(counts, 40, weights)[bernstein > mean].sum() <= alpha
            assert np.prod(np.array(weights)[index], 1)[betting > mean].sum() <= alpha


def test_bernstein_formula():
    """Maurer & Pontil 2009, Theorem 4, by hand: four values, and n = 1 says nothing."""
    values = np.array([0.9, 1.0, 0.8, 0.9] * 50)
    log = math.log(2 / 0.01)
    variance = (0.1**2 + 0.1**2) * 50 / 199
    expected = 0.9 - math.sqrt(2 * variance * log / 200) - 7 * log / (3 * 199)
    assert float(bernstein_lower(values, 0.01)) == pytest.approx(expected, rel=1e-9)
    assert float(bernstein_lower(values, 0.01)) < expected
    assert float(bernstein_lower(np.ones(1), 0.4)) == 0


def test_betting_formula():
    """The mean m at which prod(1 + l_i (X_i - m)) = 1/alpha, with bets from the values before, by plain loops."""
    rng = np.random.default_rng(0)
    for values in (rng.beta(9, 1, 60), rng.beta(0.5, 0.5, 60), np.ones(40), rng.integers(0, 2, 80) * 1.0):
        n, bets = len(values), []
        for i in range(n):
            past = 1 - values[:i]
            mean = (0.5 + past.sum()) / (i + 1)
            variance = max((0.25 + (past**2).sum()) / (i + 1) - mean**2, 1e-6)
            bets.append(min(0.9, math.sqrt(2 * math.log(20) / (variance * n))))

        def wealth(m, values=values, bets=bets):
            return sum(math.log1p(bet * (v - m)) for bet, v in zip(bets, values, strict=True)) - math.log(20)

        bound = float(betting_lower(values, 0.05))
        expected = brentq(wealth, 0, values.mean(), xtol=1e-15)
        assert bound <= expected
        assert bound == pytest.approx(expected, abs=1e-9)


def test_power():
    """Votes that vary little: betting beats Bernstein, and both Hoeffding. Votes 0 and 1: Clopper-Pearson wins."""
    rng = np.random.default_rng(1)
    hoeffding = math.sqrt(math.log(1000) / 2000)
    for a, b in ((9, 1), (99, 1), (30, 20)):
        values = rng.beta(a, b, 1000)
        loss = [values.mean() - float(bound(values, 1e-3)) for bound in (betting_lower, bernstein_lower)]
        assert loss[0] < loss[1] < hoeffding
        assert loss[0] < 0.5 * hoeffding
    hard = np.repeat([0.0, 1.0], [50, 950])
    rng.shuffle(hard)
    exact = float(clopper_pearson_lower(950, 1000, 1e-3))
    assert exact - 0.015 < float(betting_lower(hard, 1e-3)) < exact


@pytest.mark.parametrize("bound", [betting_lower, bernstein_lower])
def test_values_outside_are_refused(bound):
    for bad in (-1e-9, 1 + 1e-9, math.nan, math.inf):
        with pytest.raises(RequestError, match="between 0 and 1"):
            bound(np.array([0.5, bad]), 0.05)
    with pytest.raises(RequestError, match="alpha"):
        bound(np.array([0.5]), 0.6)


def test_canary_rounded_sums_are_no_counts():
    """Why Clopper-Pearson is refused: two votes of 0 or 3/4, their sum rounded to a count, fail at 1.78 alpha."""
    k, share, alpha = np.arange(3), 0.73, 0.3
    failed = clopper_pearson_lower(np.round(0.75 * k), 2, alpha) > 0.75 * share
    assert binom.pmf(k, 2, share)[failed].sum() > 1.7 * alpha
    values = np.array([[0.0, 0.0], [0.75, 0.0], [0.75, 0.75]])
    assert binom.pmf(k, 2, share)[betting_lower(values, alpha) > 0.75 * share].sum() <= alpha


# ---------------------------------------------------------------- the classifier

SIGMA, SHARPNESS = 0.25, 6.0


class Logits(nn.Module):
    """Returns its input's first values as logits."""

    def forward(self, x):
        return x.flatten(1)[:, :3]


class Half(nn.Module):
    """Logits (0, SHARPNESS * w.(x - 1/2), far below), |w| = 1: the vote for class 1 is a logistic function of w.x."""

    def forward(self, x):
        value = SHARPNESS * (x.double() - 0.5).flatten(1).sum(1) / 4
        return torch.stack([0 * value, value, torch.full_like(value, -1e9)], 1)


class Labels(nn.Module):
    def forward(self, x):
        return x.flatten(1).argmax(1)


def classifier(base, votes="soft", **arguments):
    return SmoothedClassifier(base, 3, noise=Gaussian(SIGMA), block=32, votes=votes, **arguments).eval()


def picture(level=0.75):
    return torch.full((1, 4, 4), round(level * 255) / 255)


def test_soft_votes_are_softmax_rounded_down():
    """Multiples of 2^-24 within 2^-24 below softmax; a draw's votes add up to at most 1, exactly; sums are exact."""
    torch.manual_seed(0)
    logits = torch.cat(
        [torch.randn(500, 3) * 10, torch.zeros(1, 3), torch.tensor([[1e30, -1e30, 0.0], [88.0, 88.0, 88.0]])]
    )
    votes = classifier(Logits()).soft_votes(logits[:, None, None])
    exact = torch.softmax(logits.double(), 1)
    assert votes.dtype == torch.float64
    assert (votes[:, :3] <= exact).all()
    assert (votes[:, :3] > exact - 2**-24).all()
    assert (votes * 2**24 == (votes * 2**24).round()).all()
    assert (votes.sum(1) <= 1).all()
    assert (votes[:, 3] == 0).all()
    assert math.fsum(votes[:, 1].tolist()) == votes[:, 1].flip(0).sum().item()


@pytest.mark.parametrize("classes", [2, 1000])
def test_equal_logits_of_many_classes(classes):
    """Equal shares do not add up to more than 1."""
    smoothed = SmoothedClassifier(nn.Flatten(), classes, noise=Gaussian(SIGMA), votes="soft")
    votes = smoothed.soft_votes(torch.zeros(4, 1, 1, classes))
    assert (votes.sum(1) <= 1).all()
    assert votes[0, 0] == pytest.approx(1 / classes, abs=2**-24)


def test_failed_outputs_are_counted_apart():
    """A row with a NaN or an infinity is one vote for no class, and none for any other; `sample` refuses it."""
    rows = torch.tensor([[0.0, 1.0, 2.0], [math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0], [0.0, -math.inf, 0.0]])
    votes = classifier(Logits()).soft_votes(rows[:, None, None])
    assert votes[:, 3].tolist() == [0, 1, 1, 1]
    assert (votes[1:, :3] == 0).all()

    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), math.nan)

    with pytest.raises(RequestError, match="NaN or infinity on 40 of 40 draws of image 7"):
        finish(classifier(Broken()).sample(picture(), Stream(0, 7), "estimate", 0, 40))


def test_sample_returns_the_votes_of_each_draw():
    """In the order of the draws, whatever the ranges; the same draws as hard votes take."""
    smoothed, hard = classifier(Half()), classifier(Half(), "hard")
    stream = Stream(3, 5)
    whole = finish(smoothed.sample(picture(), stream, "estimate", 0, 100))
    assert whole.shape == (100, 4)
    parts = [finish(smoothed.sample(picture(), stream, "estimate", a, b)) for a, b in ((0, 3), (3, 64), (64, 100))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    inputs = smoothed.draw(picture(), stream.at("estimate", 1, torch.device("cpu")), 32)
    np.testing.assert_array_equal(whole[32:64], smoothed.soft_votes(inputs).numpy())
    counts = finish(hard.sample(picture(), stream, "estimate", 0, 100))
    np.testing.assert_array_equal(np.bincount(whole.argmax(1), minlength=4), counts)


def test_labels_cannot_vote_softly():
    with pytest.raises(RequestError, match="votes=hard"):
        finish(classifier(Labels()).sample(picture(), Stream(0, 0), "select", 0, 8))
    with pytest.raises(RequestError, match='votes must be "hard" or "soft", got \'fuzzy\''):
        classifier(Labels(), "fuzzy")


# ---------------------------------------------------------------- the plan


def drawn(values):
    """A sampler of soft votes without jobs: class 1 gets the given values, class 0 half of the rest."""
    asked = []

    def sample(stage, first, last):
        asked.append((stage, first, last))
        mine = values[first:last] if stage == "estimate" else np.full(last - first, 0.75)
        return np.stack([(1 - mine) / 2, mine, (1 - mine) / 4, 0 * mine], 1)
        yield

    return sample, asked


@pytest.mark.parametrize("bound", ["betting", "bernstein"])
def test_the_plan_bounds_the_chosen_class(bound):
    """All n draws in order, a limited number at a time; sums of votes; pB = 1 - pA."""
    values = np.random.default_rng(2).beta(8, 2, 700)
    sample, asked = drawn(values)
    outcome = finish(SoftVotes(20, 700, 0.01, bound).run(sample, 2, lambda radius: 0.5))
    expected = {"betting": betting_lower, "bernstein": bernstein_lower}[bound](values, 0.01)
    assert (outcome.top, outcome.n, outcome.passed) == (1, 700, None)
    assert outcome.pa == float(expected)
    assert outcome.pb == 1 - outcome.pa
    assert outcome.selection.tolist() == [2.5, 15.0, 1.25, 0.0]
    np.testing.assert_allclose(outcome.counts, [(1 - values).sum() / 2, values.sum(), (1 - values).sum() / 4, 0])
    assert asked[0] == ("select", 0, 20)
    assert [first for _, first, _ in asked[1:]] == list(range(0, 700, 2 * ROUND))
    assert asked[-1][2] == 700


def test_the_plans_level():
    """P(pA_low > mean) <= alpha through the plan itself: all 2^11 sequences of two values, the class being chosen."""
    pattern = np.array(list(itertools.product((0.55, 1.0), repeat=11)))
    plan = SoftVotes(2, 11, 0.3)
    pa = np.array([finish(plan.run(drawn(values)[0], 2, None)).pa for values in pattern])
    high = (pattern == 1).sum(1)
    for share in SHARES:
        assert (share**high * (1 - share) ** (11 - high))[pa > 0.55 + 0.45 * share].sum() <= 0.3


@pytest.mark.parametrize(("bound", "least"), [("betting", 19), ("bernstein", 37)])
def test_the_number_of_draws_that_is_named_suffices(bound, least):
    with pytest.raises(RequestError, match=f"take n={least} or more"):
        SoftVotes(n=5, bound=bound)
    assert SoftVotes(n=least, bound=bound).ceiling > 0.5
    with pytest.raises(RequestError, match=f"take n={least} or more"):
        SoftVotes(n=least - 1, bound=bound)
    with pytest.raises(RequestError, match=r'sampling\.bound must be "betting" or "bernstein"'):
        SoftVotes(bound="hoeffding")


# ---------------------------------------------------------------- certificates


def certify(smoothed, plan, x=None):
    x = picture() if x is None else x
    ((_, certificate),) = AdditiveCertifier(plan).certify(smoothed, PixelThreat(), [(0, x)])
    return certificate


@pytest.mark.parametrize(
    "plan", [FixedN(32, 64), FixedN(32, 64, bounds="two"), GroupSequential([0.1], 32, 640), ConfidenceSequence(32, 640)]
)
def test_binomial_bounds_refuse_soft_votes(plan):
    """Each in one sentence that names the remedy."""
    with pytest.raises(RequestError, match="use sampling=soft") as refused:
        certify(classifier(Half()), plan)
    assert "\n" not in str(refused.value)


def test_soft_bounds_refuse_hard_votes():
    with pytest.raises(RequestError, match="sampling=fixed has the tighter bound"):
        certify(classifier(Half(), "hard"), SoftVotes(32, 64))


def mean_vote(value):
    """E of the logistic vote for class 1 where w.x = value, under the noise: one-dimensional quadrature."""
    density = lambda t: expit(SHARPNESS * (value + SIGMA * t)) * norm.pdf(t)  # noqa: E731
    return quad(density, -9, 9, epsabs=1e-12)[0]


@pytest.mark.parametrize("bound", ["betting", "bernstein"])
@pytest.mark.parametrize("level", [0.58, 0.75, 0.95])
def test_certificates_of_a_logistic_classifier(bound, level):
    """pA_low <= E F_1, and at the certified distance along w, the worst direction, class 1 still leads."""
    x = picture(level)
    certificate = certify(classifier(Half()), SoftVotes(32, 4000, 1e-6, bound), x)
    value = 4 * (round(level * 255) / 255 - 0.5)
    mean = mean_vote(value)
    assert certificate.prediction == 1
    assert 0.75 * mean < certificate.pa <= mean
    assert certificate.pb == 1 - certificate.pa
    assert 0 < certificate.radius < value  # the mean vote is 1/2 where w.x is
    assert mean_vote(value - certificate.radius) > 0.5
    assert certificate.radius == pytest.approx(SIGMA * norm.ppf(certificate.pa), rel=1e-4)


def test_what_a_record_holds():
    """Sums of votes as numbers that survive JSON exactly and add up to at most n."""
    certificate = certify(classifier(Half()), SoftVotes(32, 500))
    record = asdict(certificate)
    assert json.loads(json.dumps(record)) == record
    assert len(certificate.counts) == len(certificate.selection) == 3
    assert 500 - 500 * 3 * 2**-24 <= sum(certificate.counts) <= 500
    assert 32 - 32 * 3 * 2**-24 <= sum(certificate.selection) <= 32
    assert (certificate.n, certificate.evaluations) == (500, 32 + 512)


def test_the_attack_adds_up_soft_votes():
    """Class 1 leads in mean votes where w.x is positive (theirs is a symmetric law): from a brightness of -.15 on."""
    threat = TransformationThreat(Brightness(), -0.3, 0.3, saved="real")
    x = torch.full((1, 4, 4), 0.65)
    attacked = finish(worst_of_k(classifier(Half()), threat, x, 1, Stream(0, 0), k=12, n=500))
    assert attacked.smoothed == [int(gamma > -0.15) for (gamma,) in attacked.gammas]
    assert 0 < sum(attacked.smoothed) < 12
    assert attacked.worst == pytest.approx([-0.3])


def test_the_sampling_option():
    cfg = compose("certify", "sampling=soft", "sampling.bound=bernstein")
    assert cfg.sampling._target_.endswith("plans.SoftVotes")
    assert cfg.sampling.bound == "bernstein"


# ---------------------------------------------------------------- the commands


L2 = (*QUIET, "threat=l2", "transform=identity", "law=none", "error=none", "certify=direct", "noise.sigma=0.25")


def test_certified_through_the_commands(checkpoint, here):
    """Sums of votes that are no whole numbers, bounded from below; the kind of votes is part of the identity."""
    soft = ("votes=soft", "sampling=soft", "sampling.n=500", "images.first=8", "store=run")
    ended = run_main("certify", *L2, f"checkpoint={checkpoint}", *soft)
    assert (ended.code, ended.error) == (0, None)
    assert "certified at" in ended.out
    found = records(here / "run")
    assert len(found) == 8
    assert sum(r["prediction"] == r["label"] for r in found) >= 4
    for record in found:
        counts, top = np.array(record["counts"]), np.argmax(record["selection"])
        assert (counts != counts.round()).any()
        assert 500 - 500 * 10 * 2**-24 <= counts.sum() <= 500
        assert 0 < record["pa"] < counts[top] / 500
        if record["pa"] > 0.501:
            assert record["prediction"] == top
            assert 0 < record["radius"] < 0.25 * norm.ppf(record["pa"])
            assert record["radius"] == pytest.approx(0.25 * norm.ppf(record["pa"]), abs=1e-3)
        else:
            assert (record["prediction"], record["radius"]) == (ABSTAIN, 0)
    assert json.loads((here / "run" / "fingerprint.json").read_text())["votes"] == "soft"
    one_sentence(run_main("certify", *L2, f"checkpoint={checkpoint}", *soft[2:]), "votes")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("votes=soft",), "use sampling=soft"),
        (("sampling=soft",), "sampling=fixed has the tighter bound"),
        (("votes=fuzzy",), 'votes must be "hard" or "soft"'),
    ],
)
def test_commands_refuse_votes_that_the_plan_does_not_count(checkpoint, here, options, words):
    """In one sentence, and nothing is written."""
    one_sentence(run_main("certify", *L2, f"checkpoint={checkpoint}", *options, "store=run"), words)
    assert not (here / "run").exists()
