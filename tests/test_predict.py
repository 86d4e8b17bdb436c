"""Prediction with abstention: errors and power by exact dynamic programming, no simulation; the module that exports
against the same draws in a plain loop."""

import io
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, multinomial
from torch import Tensor, nn

from gsmooth_lightning.certify import ABSTAIN
from gsmooth_lightning.confidence import EARLY, betting_lower
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model import BlackBox
from gsmooth_lightning.predict import Exportable, Predictor, leads, leads_in_mean, saved, votes_needed
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, Gaussian, Uniform
from gsmooth_lightning.stream import Stream, TrainingSource, content_digest
from gsmooth_lightning.threat import PixelThreat
from gsmooth_lightning.transform import GaussianBlur, Pixelate, Rotation

FILES = PixelThreat("float")


class Bins(nn.Module):
    """Class k where the first pixel lies between the shares p_0 + ... + p_(k-1) and p_0 + ... + p_k of [0, 1]."""

    def __init__(self, *shares: float, soft: bool = False):
        super().__init__()
        self.soft = soft
        self.register_buffer("edges", torch.tensor(shares).cumsum(0)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        labels = torch.bucketize(x.flatten(1)[:, 0].contiguous(), self.edges, right=True)
        return labels if not self.soft else 3 * nn.functional.one_hot(labels, len(self.edges) + 1).float()


def bins(*shares: float, block: int = 16, votes: str = "hard") -> SmoothedClassifier:
    """A classifier whose classes have these probabilities at the image 1/2, by uniform noise between -1/2 and 1/2."""
    base = Bins(*shares, soft=votes == "soft")
    return SmoothedClassifier(base, len(shares), noise=Uniform(-0.5, 0.5), block=block, votes=votes).eval()


def images(*numbers: int) -> list[Tensor]:
    """Images whose first pixel is 1/2; the second tells them apart."""
    return [torch.tensor([0.5, k / 255]).view(1, 1, 2) for k in numbers]


# ---------------------------------------------------------------- one look


@pytest.mark.parametrize("level", [0.1, 0.05, 1e-3, 1e-6, 1e-12])
def test_votes_needed_against_whole_numbers(level):
    """The least a with 2 sum_{k >= a} C(s, k) <= level 2^s, in exact arithmetic; s + 1 where there is none."""
    for total in (*range(90), 500, 1000):
        room, a = Fraction(level) * 2**total / 2, total + 1
        while a > 0 and (room := room - math.comb(total, a - 1)) >= 0:
            a -= 1
        assert int(votes_needed(total, level)) == a, total


def every_count(n: int, classes: int) -> np.ndarray:
    """All counts of n draws: (k, classes)."""
    first = itertools.product(range(n + 1), repeat=classes - 1)
    return np.array([(*row, n - sum(row)) for row in first if sum(row) <= n])


LAWS = [
    (0.5, 0.5, 0.0),
    (0.4999, 0.5001, 0.0),
    (0.45, 0.55, 0.0),
    (0.4, 0.4, 0.2),
    (1 / 3, 1 / 3, 1 / 3),
    (0.34, 0.33, 0.33),
    (0.35, 0.35, 0.3),
    (0.48, 0.48, 0.04),
    (0.2, 0.41, 0.39),
    (0.1, 0.45, 0.45),
    (0.05, 0.05, 0.9),
]
"""Probabilities of classes, ties among them."""


def wrong(law: tuple[float, ...]) -> list[int]:
    """Classes that it is an error to return: all but the one with the largest probability; in a tie, all."""
    best = max(law)
    return [c for c, p in enumerate(law) if p < best or law.count(best) > 1]


@pytest.mark.parametrize("n", [7, 20, 41])
@pytest.mark.parametrize("level", [0.1, 0.01])
@pytest.mark.parametrize("law", [*LAWS, (0.25, 0.25, 0.25, 0.25), (0.3, 0.3, 0.2, 0.2)])
def test_a_look_errs_with_probability_at_most_its_level(n, level, law):
    """sum over all counts of P(counts) 1[the leader passes and is no unique largest class] <= level: no union over
    classes is needed (Hung & Fithian 2019). With two alike it is nearly reached."""
    counts = every_count(n if len(law) == 3 else min(n, 20), len(law))
    mass = multinomial.pmf(counts, counts[0].sum(), law)
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    passed = leads(counts, level) & np.isin(counts.argmax(1), wrong(law))
    assert mass[passed].sum() <= level
    if (n, level, law) == (41, 0.1, LAWS[0]):
        assert mass[passed].sum() >= level / 2


def test_the_test_is_the_binomial_one():
    """leads(counts) where the two-sided p-value of the two largest counts, SciPy's, is at most the level."""
    for counts in every_count(24, 3):
        second, first = np.sort(counts)[1:]
        assert bool(leads(counts, 0.03)) == (binomtest(int(first), int(first + second)).pvalue <= 0.03)


# ---------------------------------------------------------------- all looks


def outcomes(looks, levels, law) -> tuple[np.ndarray, float]:
    """(P(class c is returned), mean number of draws), exactly: the law of the counts (a, b, n - a - b), carried on draw
    by draw; what is decided at a look leaves."""
    size, returned, mean = looks[-1] + 1, np.zeros(3), 0.0
    a, b = np.indices((size, size))
    state = np.zeros((size, size))
    state[0, 0] = 1.0
    for n in range(1, looks[-1] + 1):
        mean += state.sum()
        new = law[2] * state
        new[1:] += law[0] * state[:-1]
        new[:, 1:] += law[1] * state[:, :-1]
        state = new
        if n in looks:
            counts = np.stack([a, b, np.maximum(n - a - b, 0)], -1)
            decided = leads(counts, levels[looks.index(n)]) & (state > 0)
            for c in range(3):
                returned[c] += state[decided & (counts.argmax(-1) == c)].sum()
            state = np.where(decided, 0.0, state)
    return returned, mean


def planned(n: int, alpha: float) -> Predictor:
    return Predictor(bins(0.5, 0.5), n, alpha)


@pytest.mark.parametrize("alpha", [0.1, 0.05, 1e-3])
@pytest.mark.parametrize("law", LAWS)
def test_another_class_is_returned_with_probability_at_most_alpha(alpha, law):
    """Of all looks together, over probabilities with ties: the guarantee."""
    predictor = planned(150, alpha)
    assert len(predictor.looks) > 4
    returned, _ = outcomes(predictor.looks, predictor.levels, law)
    assert returned[wrong(law)].sum() <= alpha


def test_levels_are_spent_once():
    """Levels add up to alpha; all but 2 % of it belong to the last look; a single look has all."""
    for n in (20, 100, 150, 1000, 10_000):
        predictor = planned(n, 0.01)
        assert sum(predictor.levels) == pytest.approx(0.01, rel=1e-12)
        assert len(predictor.levels) == len(predictor.looks)
        assert predictor.looks[-1] == n
        assert predictor.levels[-1] == pytest.approx(0.01 * (1 - EARLY if len(predictor.looks) > 1 else 1))


def test_looking_again_at_the_same_level_is_caught():
    """The canary: alpha at every look returns a class at a tie far more often than alpha."""
    predictor = planned(150, 0.05)
    naive, _ = outcomes(predictor.looks, [0.05] * len(predictor.looks), LAWS[0])
    assert naive.sum() > 0.1


def of_two(looks, levels, p) -> tuple[float, float]:
    """(P(A is returned), mean number of draws) for two classes, exactly: the law of A's count from look to look."""
    state, seen, returned, mean = np.ones(1), 0, 0.0, 0.0
    for look, level in zip(looks, levels, strict=True):
        mean += (look - seen) * state.sum()
        state, seen = np.convolve(state, binom.pmf(np.arange(look - seen + 1), look - seen, p)), look
        counts = np.arange(look + 1)
        decided = leads(np.stack([counts, look - counts], -1), level)
        returned += state[decided & (2 * counts > look)].sum()
        state = np.where(decided, 0.0, state)
    return returned, mean


@pytest.mark.parametrize(
    ("p", "most"),
    [(0.99, 64.1), (0.9, 65), (0.8, 99), (0.7, 188), (0.6, 689), (0.55, 2731), (0.52, 9634)],
)
def test_power_and_draws_against_the_test_of_n(p, most):
    """n = 10,000 at alpha = .001: P(A is returned) against the test of all n draws at (1 - EARLY) alpha, whose power it
    has but for what may be returned wrongly before; and the mean number of draws."""
    predictor = Predictor(bins(0.5, 0.5, block=64))
    returned, draws = of_two(predictor.looks, predictor.levels, p)
    assert draws <= most
    fixed, _ = of_two((10_000,), (1e-3 * (1 - EARLY),), p)
    assert returned >= fixed - 1e-3 * EARLY


def test_two_classes_by_either_recursion():
    predictor = planned(150, 0.05)
    returned, draws = outcomes(predictor.looks, predictor.levels, (0.6, 0.4, 0.0))
    of_a, mean = of_two(predictor.looks, predictor.levels, 0.6)
    assert (returned[0], draws) == (pytest.approx(of_a, rel=1e-9), pytest.approx(mean, rel=1e-9))


# ---------------------------------------------------------------- the procedure


def predicted(predictor: Predictor, inputs: list[Tensor], seed: int = 0, in_flight: int = 8) -> list:
    """Predictions on inputs, in their order."""
    procedures = ((k, predictor.procedure(x, predictor.stream(x, seed))) for k, x in enumerate(inputs))
    found = {k: result for k, result, _ in run_rounds(procedures, torch.device("cpu"), in_flight)}
    return [found[k] for k in range(len(inputs))]


def test_the_procedure_is_the_test_at_each_look():
    """Draws are those of the stage "predict", addressed by the image's content, and the textbook's test decides."""
    smoothed = bins(0.55, 0.3, 0.15)
    predictor = Predictor(smoothed, 500, 0.01)
    for x, found in zip(images(*range(12)), predicted(predictor, images(*range(12)), seed=5), strict=True):
        stream = Stream(5, int(content_digest(x), 16))
        blocks = [smoothed.labels(smoothed.draw(x, stream.at("predict", b), 16)) for b in range(32)]
        labels = torch.cat(blocks).numpy()[:500]
        for look, level in zip(predictor.looks, predictor.levels, strict=True):
            counts = np.bincount(labels[:look], minlength=3)
            second, first = sorted(counts.tolist())[1:]
            decided = binomtest(first, first + second).pvalue <= level
            if decided:
                break
        assert (found.n, found.counts) == (look, counts.tolist())
        assert found.prediction == (counts.argmax() if decided else ABSTAIN)
        assert (found.alpha, found.seed, found.input) == (0.01, 5, content_digest(x))
        assert found.evaluations == -(-look // 16) * 16
    assert {f.prediction for f in predicted(predictor, images(*range(12)), seed=5)} == {0}


def test_a_tie_abstains_after_n_draws():
    """No class of two alike is returned, with a probability of .999; all n draws are taken, in whole blocks."""
    (found,) = predicted(Predictor(bins(0.5, 0.5), 150, 1e-3), images(0))
    assert (found.prediction, found.n, found.evaluations) == (ABSTAIN, 150, 160)
    assert sum(found.counts) == 150


def test_an_image_gets_the_same_answer_in_any_company():
    """In any order, with any number in flight, twice in one batch; another seed draws other votes."""
    predictor = Predictor(bins(0.6, 0.4, block=8), 200, 0.05)
    whole = predicted(predictor, images(1, 2, 3, 4))
    assert predicted(predictor, images(4, 3, 2, 1), in_flight=1) == whole[::-1]
    assert predicted(predictor, images(2)) == whole[1:2]
    assert predicted(predictor, images(3, 3)) == [whole[2], whole[2]]
    assert len({tuple(found.counts) for found in whole}) > 1
    assert predicted(predictor, images(2), seed=1)[0].counts != whole[1].counts


@pytest.mark.parametrize(
    ("n", "alpha", "words"),
    [
        (0, 1e-3, "n must be a whole number"),
        (2.5, 1e-3, "n must be a whole number"),
        (True, 1e-3, "n must be a whole number"),
        (10, 1e-3, "n=10 votes for one class decide nothing at alpha=0.001; take n=11 or more"),
        (100, 0.5, "alpha must lie between 0 and 0.5"),
        (100, "x", "alpha must lie between 0 and 0.5"),
    ],
)
def test_numbers_that_decide_nothing_are_refused(n, alpha, words):
    with pytest.raises(RequestError, match=words):
        Predictor(bins(0.5, 0.5), n, alpha)
    with pytest.raises(RequestError, match=words):
        Exportable(bins(0.5, 0.5), FILES, images(0)[0], n, alpha)


def test_the_least_n_decides():
    """2 / 2^11 <= .001 (1 - EARLY) < 2 / 2^10: eleven votes for one class are enough."""
    (found,) = predicted(Predictor(bins(1.0, 0.0), 11, 1e-3), images(0))
    assert (found.prediction, found.n) == (0, 11)


# ---------------------------------------------------------------- soft votes


@pytest.mark.parametrize("level", [0.2, 0.05])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.75])
def test_soft_votes_err_with_probability_at_most_the_level(level, share):
    """Draws are one of two votes: sum over all 2^n orders of P(order) 1[a class below the largest mean is returned]."""
    n, options = 12, np.array([[0.9, 0.1, 0.0], [0.1, 0.5, 0.4]])
    means = share * options[0] + (1 - share) * options[1]
    error = 0.0
    for order in itertools.product((0, 1), repeat=n):
        votes = options[list(order)]
        top = votes.sum(0).argmax()
        if means[top] < means.max() and leads_in_mean(votes, level):
            error += share ** order.count(0) * (1 - share) ** order.count(1)
    assert error <= level


def test_soft_votes_are_predicted():
    """softmax(3, 0, 0) is (.91, .045, .045): the mean vote of A is .045 + .864 p. Each other class has its own bound at
    level / 2; a look decides when both exceed 1/2."""
    smoothed = bins(0.7, 0.2, 0.1, votes="soft")
    predictor = Predictor(smoothed, 400, 0.01)
    (found,) = predicted(predictor, images(7))
    assert found.prediction == 0
    assert found.n < 400
    assert sum(found.counts) == pytest.approx(found.n, rel=1e-6)
    stream = predictor.stream(images(7)[0], 0)
    blocks = [smoothed.soft_votes(smoothed.draw(images(7)[0], stream.at("predict", b), 16)) for b in range(25)]
    votes = torch.cat(blocks).numpy()
    for look, level in zip(predictor.looks, predictor.levels, strict=True):
        lower = [betting_lower((1 + votes[:look, 0] - votes[:look, k]) / 2, level / 2) for k in (1, 2)]
        if min(lower) > 0.5:
            break
    assert found.n == look
    assert predicted(Predictor(bins(0.5, 0.5, votes="soft"), 200, 1e-3), images(0))[0].prediction == ABSTAIN


# ---------------------------------------------------------------- the module that exports


def linear(bias: float) -> nn.Module:
    """A network with random weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    network[1].bias.data[0] += bias
    return network.eval().requires_grad_(False)


def turned(bias: float = 0.0, **options) -> SmoothedClassifier:
    """A classifier of small pictures; a large bias makes it class 0 for certain."""
    made = {"transform": Rotation(), "law": Gaussian(20.0), "noise": Gaussian(0.5), "block": 16} | options
    return SmoothedClassifier(linear(bias), 3, **made).eval()


def reloaded(module: Exportable, x: Tensor) -> nn.Module:
    return torch.export.load(io.BytesIO(saved(module, x, "{}"))).module()


PICTURE = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("changes", "n"),
    [
        ({}, 12),
        ({"noise": Uniform(-1.0, 1.0)}, 100),
        ({"noise": None}, 64),
        ({"transform": GaussianBlur(), "law": Exponential(1.0)}, 40),
    ],
)
def test_an_exported_module_counts_the_draws_of_torchs_generator(changes, n):
    """Under one torch.manual_seed: the same n votes as a loop over blocks in float64, from the module and from the file
    that torch.export makes of it."""
    smoothed = turned(**changes)
    module = Exportable(smoothed, FILES, PICTURE, n)
    source = TrainingSource(PICTURE.device, torch.float64)
    torch.manual_seed(3)
    labels = [smoothed.labels(smoothed.draw(PICTURE, source, 16)) for _ in range(-(-n // 16))]
    counts = torch.cat(labels)[:n].bincount(minlength=3)
    expected = int(counts.argmax()) if leads(counts.numpy(), 1e-3) else ABSTAIN
    for run in (module, reloaded(module, PICTURE)):
        torch.manual_seed(3)
        prediction, votes = run(PICTURE)
        assert votes.tolist() == counts.tolist()
        assert (int(prediction), prediction.dtype, votes.dtype) == (expected, torch.int64, torch.int64)
        assert int(run(PICTURE)[1].sum()) == n


def test_calls_draw_anew():
    """Votes of two calls differ; with a seed they come again. Inputs have one shape, and there is no training mode."""
    run = reloaded(module := Exportable(turned(), FILES, PICTURE, 500), PICTURE)
    torch.manual_seed(0)
    first, second = run(PICTURE)[1], run(PICTURE)[1]
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(run(PICTURE)[1], first)
    with pytest.raises(AssertionError, match="size"):
        run(torch.zeros(1, 6, 7))
    assert not module.train().training


def test_an_exported_module_abstains_at_a_tie_and_decides_elsewhere():
    """Bins with known probabilities: (.5, .5) is undecided, (.2, .8) is class 1, whichever the draws are."""
    (x,) = images(0)
    torch.manual_seed(0)
    for shares, prediction in (((0.5, 0.5), ABSTAIN), ((0.2, 0.8), 1)):
        assert int(Exportable(bins(*shares), FILES, x, 1000)(x)[0]) == prediction


def test_an_exported_module_abstains_where_the_input_is_no_image():
    """One value that is NaN, infinite or out of the format's range, the range's ends are not."""
    run = reloaded(Exportable(turned(bias=100.0), FILES, PICTURE, 64), PICTURE)
    for value in (math.nan, math.inf, -math.inf, -0.01, 1.01, 200.0, 0.0, 1.0):
        x = PICTURE.clone()
        x[0, 2, 3] = value
        assert int(run(x)[0]) == (0 if value in (0.0, 1.0) else ABSTAIN), value


def test_an_exported_module_abstains_where_the_network_fails():
    """NaN for half of the draws: they are no votes, and what is left decides nothing."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.tensor([5.0, 0.0]).expand(len(x), 2)
            return torch.where(x.flatten(1)[:, :1] > 0.5, logits, math.nan)

    (x,) = images(0)
    smoothed = SmoothedClassifier(Half(), 2, noise=Uniform(-0.5, 0.5), block=16).eval()
    prediction, votes = Exportable(smoothed, FILES, x, 200)(x)
    assert int(prediction) == ABSTAIN
    assert 0 < int(votes[0]) < 200
    assert int(votes[1]) == 0


def test_an_exported_module_brings_values_to_the_saved_format():
    """Under 8 bits, values between two steps are rounded first: a class that depends on it says so."""
    smoothed = SmoothedClassifier(Bins(0.5 / 255, 1 - 0.5 / 255), 2, noise=Uniform(-1e-4, 1e-4), block=16).eval()
    below, above = (torch.full((1, 1, 2), share / 255) for share in (0.4, 0.6))
    run = Exportable(smoothed, PixelThreat("8bit"), below, 32)
    assert [int(run(x)[0]) for x in (below, above)] == [0, 1]
    near = torch.full((1, 1, 2), 0.499 / 255)
    assert run(near)[1].tolist() == [32, 0]
    assert Exportable(smoothed, FILES, below, 32)(near)[1][1] > 0


def test_draws_of_a_graph_have_53_bits():
    """float64, where float32 normals end at 5.8 standard deviations: bits below float32's are there."""
    source = TrainingSource(torch.device("cpu"), torch.float64)
    for draws in (source.normal(1000), source.uniform(1000), source.exponential(1000)):
        assert draws.dtype == torch.float64
        assert (draws != draws.float().double()).double().mean() > 0.99


@pytest.mark.parametrize(
    ("smoothed", "words"),
    [
        (lambda: bins(0.5, 0.5, votes="soft"), "counts hard votes"),
        (lambda: SmoothedClassifier(BlackBox(lambda x: [0] * len(x)), 2), "nothing to export"),
        (lambda: turned().train(), "training mode"),
        (lambda: turned(transform=Pixelate(), law=Uniform(0, 0.5)), "torch.export does not take this classifier"),
    ],
)
def test_what_does_not_export_is_refused_in_one_sentence(smoothed, words):
    with pytest.raises(RequestError, match=words) as refused:
        Exportable(smoothed(), FILES, PICTURE, 32)
    assert len(str(refused.value).splitlines()) == 1
