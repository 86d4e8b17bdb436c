"""Attacks on pixels, ours and those of torchattacks and foolbox: what they climb, the files they leave within epsilon,
and classifiers whose distance to the boundary is known."""

from functools import partial

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from torch import nn

from gsmooth_lightning.attack import SoftVotes, of_foolbox, of_torchattacks, ours, perturb, pgd
from gsmooth_lightning.attack.pixels import within
from gsmooth_lightning.preprocess import DiscVignette, LowPass, Preprocess
from gsmooth_lightning.report.curves import survivors
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import SAVED, PixelThreat
from gsmooth_lightning.transform import Brightness, Rotation
from pixel_attacks import CRAFTS, Halfspace, attacked, grey, normals, smoothed_by

# ---------------------------------------------------------------- the mean vote


class Table(nn.Module):
    """Logits that are given, row by row."""

    def __init__(self, odds):
        super().__init__()
        self.logits = torch.tensor(odds, dtype=torch.float32).log()

    def forward(self, x):
        return self.logits[: len(x)]


def test_the_mean_vote_by_hand():
    """Two draws each: (1/4, 3/4) and (3/4, 1/4) have the mean (1/2, 1/2), (1/2, 1/2) and (1/8, 7/8) (5/16, 11/16)."""
    table = Table([[1, 3], [3, 1], [1, 1], [1, 7]])
    model = SoftVotes(smoothed_by(nn.Identity()), table, 2)
    votes = model(torch.zeros(2, 1, 2, 2)).softmax(1)
    torch.testing.assert_close(votes, torch.tensor([[1 / 2, 1 / 2], [5 / 16, 11 / 16]]))
    assert model.evaluations == 4
    base = SoftVotes(smoothed_by(nn.Identity()), table, 0)
    torch.testing.assert_close(base(torch.zeros(2, 1, 2, 2)).softmax(1), torch.tensor([[1 / 4, 3 / 4], [3 / 4, 1 / 4]]))
    assert base.evaluations == 2


def drawn(x, network, m):
    """1/m sum_i softmax f(P(x + theta_i) + eps_i), a draw at a time."""
    theta, eps = torch.randn(len(x) * m, 1) * 0.2, torch.randn(len(x) * m, 1, 4, 4) * 0.3
    rows = [network(nn.functional.avg_pool2d(x[k // m] + theta[k], 2) + eps[k][None]) for k in range(len(x) * m)]
    return torch.cat(rows).softmax(1).view(len(x), m, -1).mean(1)


def whole() -> tuple[SmoothedClassifier, nn.Module]:
    """Random brightness, a preprocessing that halves the sides, pixel noise, and a network of three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    parts = (Brightness(), nn.AvgPool2d(2), Gaussian(0.2), Gaussian(0.3), 16)
    return SmoothedClassifier(network, 3, *parts).eval(), network


def test_the_mean_vote_is_that_of_the_draws():
    smoothed, network = whole()
    x = torch.stack([grey(k) for k in range(3)])
    model, state = SoftVotes(smoothed, network, 6, seed=5), torch.get_rng_state()
    votes = model(x)
    assert torch.equal(model(x), votes)  # the same draws in every call
    assert not torch.equal(SoftVotes(smoothed, network, 6, seed=6)(x), votes)
    assert torch.equal(torch.get_rng_state(), state)
    assert not votes.amin(1).any()  # logits from 0 on
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        torch.testing.assert_close(votes.softmax(1), drawn(x, network, 6), rtol=1e-5, atol=1e-6)
    clean = SoftVotes(smoothed, network, 0)(x).softmax(1)
    torch.testing.assert_close(clean, network(nn.functional.avg_pool2d(x, 2)).softmax(1))


def test_its_gradient_is_that_of_the_mean():
    """Finite differences in float64 with the draws held."""
    smoothed, network = whole()
    model, x = SoftVotes(smoothed, network.double(), 5), grey()[None].double().requires_grad_()

    def log_p(x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            return model(x).log_softmax(1)[0, 2]

    (gradient,) = torch.autograd.grad(log_p(x), x)
    for place in ((0, 0, 0, 0), (0, 0, 3, 5), (0, 0, 7, 7)):
        step = torch.zeros_like(x)
        step[place] = 1e-5
        with torch.no_grad():
            slope = (log_p(x + step) - log_p(x - step)) / 2e-5
        assert gradient[place] == pytest.approx(float(slope), rel=1e-5)


def test_a_network_of_labels_votes_for_them():
    """The share of class 1 is Phi((w.x - b) / (sigma |w|)), within four standard errors."""
    w, x, m = normals(1, 8, 8), grey(), 20_000
    margin, sigma = 0.4, 0.07
    network = Halfspace(w, float((w * x).sum()) - margin, labels=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        votes = SoftVotes(smoothed_by(network, sigma), network, m)(x[None]).softmax(1)
    p = float(ndtr(margin / (sigma * float(w.norm()))))
    assert 0.6 < p < 0.95
    assert float(votes[0, 1]) == pytest.approx(p, abs=4 * (p * (1 - p) / m) ** 0.5)
    assert float(votes.sum()) == pytest.approx(1, abs=1e-6)


def modes(module: nn.Module) -> set[bool]:
    return {part.training for part in module.modules()}


@pytest.mark.parametrize("name", CRAFTS)
def test_attacks_leave_the_network_as_it_was(name):
    """In evaluation mode after each, with its weights and batch statistics; a forward pass gives the same bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
        network = nn.Sequential(*layers).eval()
    network[1].running_mean += 0.3
    smoothed, x = smoothed_by(network), grey()
    before, logits = {key: value.clone() for key, value in network.state_dict().items()}, network(x[None])
    found = attacked(smoothed, PixelThreat(), x, CRAFTS[name], [0.5], label=int(logits.argmax()))
    assert len(found.base) == 3
    assert modes(smoothed) == modes(network) == {False}
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(network(x[None]), logits)
    model = SoftVotes(smoothed, network, 2)
    assert model.train() is model
    assert modes(model.train(True)) == {False}


# ---------------------------------------------------------------- files within epsilon

STEPS = st.builds(lambda k, levels: k / levels, st.integers(1, 40), st.sampled_from([255, 32768]))
CASES = st.fixed_dictionaries(
    {
        "saved": st.sampled_from(sorted(SAVED)),
        "norm": st.sampled_from(["l1", "l2", "linf"]),
        "epsilon": STEPS | st.floats(1e-3, 4),
        "seed": st.integers(0, 2**32 - 1),
        "scale": st.sampled_from([1e-3, 0.02, 0.3, 5.0]),
        "whole steps": st.booleans(),
    }
)


def wild(case, broken=False):
    """(threat, clean file, what an attack made, its file); some of what was made is whole steps away, or is nothing."""
    threat, random = PixelThreat(case["saved"], norm=case["norm"]), np.random.default_rng(case["seed"])
    low, high, levels = SAVED[case["saved"]]
    x = threat.prepare(torch.from_numpy(random.uniform(low, high, (1, 2, 5, 5))).float())[0]
    moved = random.normal(size=x.shape) * case["scale"]
    if case["whole steps"]:
        moved = np.round(moved * (levels or 255)) / (levels or 255)
    made = x + torch.from_numpy(moved).float()
    if broken:
        made[:, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return threat, x, made, within(threat, x, made, case["epsilon"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(CASES)
def test_every_file_is_one_of_its_format(case):
    """k/255 or k/32768 exactly, or in the range; a pixel moves half a step beyond what was asked at most."""
    threat, x, made, file = wild(case, broken=True)
    low, high, levels = SAVED[case["saved"]]
    assert file.dtype == torch.float32
    assert torch.equal(threat.save(file), file)
    assert bool(((file >= low) & (file <= high)).all())
    if levels is not None:
        steps = (file * levels).round()
        assert torch.equal(steps / levels, file)
        assert steps.max() <= (levels if low == 0 else levels - 1)
    assert torch.equal(file[:, 0, :3], x[:, 0, :3])
    moved, asked = (file - x)[:, 1:].double(), (made - x)[:, 1:].double()
    slack = 1e-6 + (0.501 / levels if levels else 0)
    assert bool((moved * asked >= -1e-12).all())
    assert bool((moved.abs() <= asked.abs() + slack).all())


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(CASES)
def test_every_file_lies_within_epsilon(case):
    """So that it counts there: up to the 1e-6 that `survivors` allows."""
    threat, x, _, file = wild(case)
    assert threat.distance((file - x)[None]).item() <= case["epsilon"] * (1 + 1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_files_that_are_k_steps_away_count_at_k_255(k):
    """The usual epsilons of linf: the whole of it is used, and the tries are among those up to it."""
    x, epsilon = grey(), k / 255
    away = x + 0.2 * normals(1, 8, 8).sign()
    smoothed = smoothed_by(Halfspace(normals(1, 8, 8), 0.0))
    found = attacked(smoothed, PixelThreat(norm="linf"), x, lambda *_: away[None], [epsilon])
    assert found.distances == pytest.approx([0, epsilon, epsilon], rel=1e-5)
    record = {"distances": found.distances, "label": 1, "base": [1, 0, 0]}
    assert survivors([record], "base", epsilon) == 0


def test_steps_that_are_nearly_whole_stay_within_epsilon():
    """784 pixels that move by .9991 steps each: a norm of .9991 sqrt(784) / 255, and not of sqrt(784) / 255."""
    x = torch.full((1, 28, 28), 100 / 255)
    made = x + 0.9991 / 255
    threat = PixelThreat()
    epsilon = threat.distance((made - x)[None]).item()
    assert threat.distance((within(threat, x, made, epsilon) - x)[None]).item() <= epsilon * (1 + 1e-6)


@pytest.mark.parametrize(
    ("norm", "epsilon", "distance"),
    [
        ("l1", 1.0, 6.0),
        ("l2", 1.0, 3 * 2**0.5),
        ("linf", 1.0, 3.0),
        ("l1", 5.1 / 255, 5.0),
        ("l2", 2.5 / 255 * 2**0.5, 2 * 2**0.5),
        ("linf", 1.5 / 255, 1.0),
    ],
)
def test_recorded_distances_are_those_of_the_files(norm, epsilon, distance):
    """Two pixels that move by 3.4 steps of 1/255: 3 in the file, or what epsilon leaves of them, in whole steps."""
    x, delta = grey(), torch.zeros(1, 8, 8)
    delta[0, 2, 3], delta[0, 5, 1] = 3.4 / 255, -3.4 / 255
    base = Halfspace(torch.zeros(1, 8, 8), 0.0)
    base.w.data[0, 2, 3], base.b = 1.0, float(x[0, 2, 3]) + 0.5 / 255  # a file that moved is of class 1
    found = attacked(smoothed_by(base), PixelThreat(norm=norm), x, lambda *_: (x + delta)[None], [epsilon], 0)
    assert found.distances == pytest.approx([0, distance / 255, distance / 255], rel=1e-5)
    assert found.base == [0, 1, 1]
    assert found.gammas == [[0], [epsilon], [epsilon]]
    assert found.worst in found.gammas
    assert found.evaluations == 3 * 64 + 16


# ---------------------------------------------------------------- a hyperplane at a known distance


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("saved", "beyond"), [("float", 1.01), ("real", 1.01), ("16bit", 1.02), ("8bit", 1.2)])
def test_pgd_reaches_the_boundary_and_nothing_crosses_it_before(norm, saved, beyond):
    """At .99 of the distance no try flips the base classifier, a little beyond the one against it does; of the smoothed
    classifier the mean vote is Phi(margin / sigma): at twice the distance .02 are left of .98."""
    threat, w, distance = PixelThreat(saved, norm=norm), normals(1, 8, 8), 0.3 if norm == "l2" else 0.045
    x = threat.prepare(grey()[None])[0]
    dual = float(w.norm() if norm == "l2" else w.abs().sum())
    base = Halfspace(w, float((w * x).sum()) - distance * dual)
    sigma = distance * dual / float(w.norm()) / 2
    epsilons = [0.5 * distance, 0.99 * distance, beyond * distance, 2.2 * distance]
    craft = ours(partial(pgd, steps=10, norm=norm))
    found = attacked(smoothed_by(base, sigma), threat, x, craft, epsilons, draws=16, n=128)
    assert found.base[:5] == [1, 1, 1, 1, 1]
    assert found.base[6] == found.base[8] == 0
    assert found.smoothed[:3] == [1, 1, 1]
    assert found.smoothed[7:] == [0, 0]
    assert found.worst == [epsilons[-1]]
    longest = {"float": 1e-5, "real": 1e-5, "16bit": 0.01, "8bit": 0.12}[saved]
    assert found.distances[6] == pytest.approx(epsilons[2], rel=longest)


@pytest.mark.parametrize("name", CRAFTS)
def test_other_attacks_find_it_as_well(name):
    """In l2, from their own starts. Those of fixed epsilon go on beyond the boundary, where the mean vote is .02."""
    w, x, distance = normals(1, 8, 8), grey(), 0.2
    base = Halfspace(w, float((w * x).sum()) - distance * float(w.norm()))
    found = attacked(smoothed_by(base, 0.1), PixelThreat("float"), x, CRAFTS[name], [0.98 * distance, 2 * distance])
    assert found.base[:3] == [1, 1, 1]
    assert found.base[4] == 0
    assert "smallest" in name or found.smoothed[3] == 0


def test_epsilon_is_given_where_the_attack_takes_one():
    """And the attack sees evaluation mode, one clean image, its label and the range of the file."""
    seen = []

    class Make:
        def __init__(self, model, eps=7.0):
            self.model, self.eps = model, eps

        def __call__(self, images, labels):
            seen.append((self.eps, images, labels.tolist(), self.model.training))
            return images

    x, smoothed = grey(), smoothed_by(Halfspace(normals(1, 8, 8), 0.0))
    attacked(smoothed, PixelThreat(), x, of_torchattacks(Make), [0.25, 0.5])
    assert [eps for eps, *_ in seen] == [0.25, 0.25, 0.5, 0.5]
    attacked(smoothed, PixelThreat(), x, of_torchattacks(lambda model: Make(model)), [0.25])
    assert [eps for eps, *_ in seen[4:]] == [7, 7]
    assert all(torch.equal(images[0], x) and labels == [1] and not mode for _, images, labels, mode in seen)
    bounds = []
    for saved in ("8bit", "16bit"):
        call = of_foolbox(lambda model, x, y, epsilons: (bounds.append((*model.bounds, epsilons)), x, None))
        attacked(smoothed, PixelThreat(saved), x, call, [0.25])
    assert bounds == [(0, 1, 0.25)] * 2 + [(-1, 1, 0.25)] * 2


@pytest.mark.parametrize("name", ["pgd", "ddn of smallest norm", "torchattacks", "foolbox"])
def test_an_attack_in_inference_mode_has_its_gradients(name):
    """As Lightning predicts, through a rotation that is drawn and a preprocessing; of an untrained network."""
    steps, shape = Preprocess([DiscVignette(), LowPass(3)]), (1, 8, 8)
    with torch.inference_mode():
        base = Halfspace(normals(*shape), 0.0)
        smoothed = SmoothedClassifier(base, 2, Rotation(), steps, Gaussian(5.0), Gaussian(0.1), 16).eval()
        base.b = float((base.w * smoothed.preprocess(grey()[None])).sum()) - 0.05
        x = PixelThreat().prepare(grey()[None])[0]
    network = Halfspace(normals(*shape), base.b)
    with torch.inference_mode():
        found = attacked(smoothed, PixelThreat("float"), x, CRAFTS[name], [1.0], network=network)
    assert found.base[0] == 1
    assert found.base[2] == 0


# ---------------------------------------------------------------- the same seed


def own_of_numpy(model, x, y, epsilon, box):
    return x + epsilon * torch.from_numpy(np.random.normal(size=tuple(x.shape))).float()  # noqa: NPY002


RANDOM = {name: craft for name, craft in CRAFTS.items() if name != "torchattacks of smallest norm"} | {
    "random": lambda model, x, y, epsilon, box: x + epsilon * torch.randn_like(x),
    "random, of NumPy": own_of_numpy,
    "pixels of torchattacks": of_torchattacks(partial(torchattacks.Pixle, max_iterations=2, restarts=2)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_seed_gives_the_same_files(name):
    """One image or eight in flight, on one thread or four, after whatever else was drawn; another seed gives others."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 2)).eval()
    smoothed, threat = smoothed_by(network, 0.5), PixelThreat()

    def run(in_flight, seed=0):
        images = ((i, grey(i), Stream(seed, i)) for i in range(5))
        work = ((i, perturb(smoothed, threat, x, 1, s, RANDOM[name], [0.2, 0.4], 4, 32)) for i, x, s in images)
        return {i: found for i, found, _ in run_rounds(work, torch.device("cpu"), in_flight)}

    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    alone = run(1)
    assert torch.equal(torch.get_rng_state(), state)
    try:
        torch.set_num_threads(4)
        torch.manual_seed(77)
        assert run(8) == alone
    finally:
        torch.set_num_threads(threads)
    assert [found.distances for found in run(1, seed=1).values()] != [found.distances for found in alone.values()]


def test_every_try_has_draws_of_its_own():
    """Of the same picture: another image's, another epsilon's, against the base classifier, of another seed."""
    smoothed, seen = smoothed_by(Halfspace(normals(1, 8, 8), 0.0)), []

    def craft(model, x, y, epsilon, box):
        seen.append(float(torch.rand(())))
        return x

    for image, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        attacked(smoothed, PixelThreat(), grey(), craft, [0.1, 0.2], image=image, seed=seed)
    assert len(set(seen)) == 12
    assert seen[:4] == seen[12:]
