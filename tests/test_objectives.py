"""Training objectives against hand computations, and one training step of each through Lightning."""

import math
from functools import cache, partial
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import QUIET, compose, one_sentence, run_main
from gsmooth_lightning.attack import ddn, pgd
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model import load_weights
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.tasks.setup import seeded_network
from gsmooth_lightning.train import AdversarialTraining, NoiseAugmentation, SmoothAdv
from gsmooth_lightning.transform import Rotation
from objectives import (
    CLASSES,
    PGD,
    SHAPE,
    N,
    Seen,
    Shift,
    configured,
    hand,
    known_noise,
    network_with_statistics,
    problem,
    trained,
)

__all__ = ["problem"]  # the fixture

LINF, DDN = partial(pgd, steps=4, norm="linf"), partial(ddn, steps=8, initial=0.5)


# -------------------------------------------------- values


def test_noise_augmentation_is_the_cross_entropy_at_one_draw(problem, monkeypatch):
    smoothed, x, y = problem
    draws, asked = known_noise(monkeypatch, smoothed, 1)
    loss, logits = NoiseAugmentation()(smoothed, x, y, 0)
    probabilities, losses = hand(smoothed)
    assert loss.item() == pytest.approx(losses(x + draws[0], y).mean(), rel=1e-5)
    np.testing.assert_allclose(logits.detach().softmax(1), probabilities(x + draws[0]), rtol=1e-4)
    assert len(asked) == 1


@pytest.mark.parametrize("m", [1, 2, 5])
def test_smoothadv_attacks_the_mean_vote_and_learns_at_the_same_draws(problem, monkeypatch, m):
    """The attack gets log 1/m sum softmax f(x + eps_i); the loss is the mean over draws at x' + eps_i."""
    smoothed, x, y = problem
    draws, asked = known_noise(monkeypatch, smoothed, m)
    seen, attack = Seen(smoothed.base), Shift(0.1)
    loss, logits = SmoothAdv(attack, 0.5, m=m, warmup=0)(smoothed, x, y, 0)
    probabilities, losses = hand(smoothed)
    soft = np.mean([probabilities(x + draw) for draw in draws], 0)
    np.testing.assert_allclose(attack.calls[0]["log_p"], np.log(soft), atol=1e-5)
    assert loss.item() == pytest.approx(np.mean([losses(x + 0.1 + draw, y) for draw in draws]), rel=1e-5)
    np.testing.assert_allclose(logits.detach().softmax(1), probabilities(x + 0.1 + draws[0]), rtol=1e-4)
    assert len(asked) == m
    (in_attack, *_), (in_loss, *_) = seen  # a pass of all draws each, draw by draw
    torch.testing.assert_close(in_attack.unflatten(0, (m, N)) - x, draws, atol=1e-6, rtol=0)
    torch.testing.assert_close(in_loss.unflatten(0, (m, N)) - x - 0.1, draws, atol=1e-6, rtol=0)


def test_adversarial_training_has_no_noise(problem, monkeypatch):
    smoothed, x, y = problem
    _, asked = known_noise(monkeypatch, smoothed, 1)
    attack = Shift(0.1)
    loss, logits = AdversarialTraining(attack, 0.5)(smoothed, x, y, 0)
    probabilities, losses = hand(smoothed)
    np.testing.assert_allclose(attack.calls[0]["log_p"], np.log(probabilities(x)), atol=1e-5)
    assert loss.item() == pytest.approx(losses(x + 0.1, y).mean(), rel=1e-5)
    np.testing.assert_allclose(logits.detach().softmax(1), probabilities(x + 0.1), rtol=1e-4)
    assert not asked


@pytest.mark.parametrize("attack", [PGD, LINF, DDN], ids=["pgd", "linf", "ddn"])
def test_radius_zero_gives_the_mean_of_the_noise_losses(problem, monkeypatch, attack):
    smoothed, x, y = problem
    draws, _ = known_noise(monkeypatch, smoothed, 3)
    loss, _ = SmoothAdv(attack, 0.0, m=3)(smoothed, x, y, 0)
    known_noise(monkeypatch, smoothed, 3)
    single = [NoiseAugmentation()(smoothed, x, y, 0)[0].item() for _ in draws]
    assert loss.item() == pytest.approx(np.mean(single), rel=1e-6)
    loss, _ = AdversarialTraining(attack, 0.0)(smoothed, x, y, 0)
    assert loss.item() == pytest.approx(hand(smoothed)[1](x, y).mean(), rel=1e-5)


@pytest.mark.parametrize("objective", [SmoothAdv, AdversarialTraining])
def test_two_classes_reach_the_closed_form(monkeypatch, objective):
    """Logits (0, <w, x>): the worst x' is x -+ epsilon w / ||w|| for one draw, or none."""
    generator = torch.Generator().manual_seed(2)
    base = nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        base[1].weight.copy_(torch.stack([torch.zeros(6), torch.randn(6, generator=generator)]))
    smoothed = SmoothedClassifier(base, 2, noise=Gaussian(0.5))
    x, y = torch.rand(N, *SHAPE, generator=generator), torch.tensor([0, 1, 0, 1, 1])
    draws, _ = known_noise(monkeypatch, smoothed, 1)
    options = {"m": 1, "warmup": 0} if objective is SmoothAdv else {}
    loss, _ = objective(PGD, 0.7, box=None, **options)(smoothed, x, y, 0)
    noisy = x + draws[0] if objective is SmoothAdv else x
    weight = base[1].weight.detach()[1].double()
    score = noisy.flatten(1).double() @ weight * (1 - 2 * y)
    expected = np.log1p(np.exp(score + 0.7 * weight.norm())).mean()
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("attack", [PGD, LINF, DDN], ids=["pgd", "linf", "ddn"])
@pytest.mark.parametrize("m", [1, 3])
def test_the_weights_get_the_gradient_at_the_fixed_adversarial_input(problem, monkeypatch, attack, m):
    """dL/dW = mean of (p - onehot) (x' + eps_i)^T: the attack is not differentiated."""
    smoothed, x, y = problem
    draws, _ = known_noise(monkeypatch, smoothed, m)
    kept = []

    def spied(*args, **options):
        kept.append(attack(*args, **options))
        return kept[-1]

    loss, _ = SmoothAdv(spied, 0.6, m=m, warmup=0)(smoothed, x, y, 0)
    assert not kept[0].requires_grad
    assert (kept[0] - x).abs().max() > 0.01
    loss.backward()
    probabilities, losses = hand(smoothed)
    inputs = [kept[0] + draw for draw in draws]
    assert loss.item() == pytest.approx(np.mean([losses(at, y) for at in inputs]), rel=1e-5)
    wrong = [probabilities(at) - np.eye(CLASSES)[y] for at in inputs]
    expected = np.mean([p.T @ at.double().flatten(1).numpy() / N for p, at in zip(wrong, inputs, strict=True)], 0)
    np.testing.assert_allclose(smoothed.base[1].weight.grad, expected, atol=1e-5)
    np.testing.assert_allclose(smoothed.base[1].bias.grad, np.mean(wrong, (0, 1)), atol=1e-5)
    assert x.grad is None


def test_the_attack_finds_a_larger_loss_than_the_clean_input(problem, monkeypatch):
    """For the objective that it is meant to raise, the soft smoothed classifier's."""
    smoothed, x, y = problem
    draws, _ = known_noise(monkeypatch, smoothed, 4)
    probabilities, _ = hand(smoothed)

    def soft_loss(at):
        return -np.log(np.mean([probabilities(at + draw) for draw in draws], 0)[np.arange(N), y])

    found = []
    SmoothAdv(lambda *a, **o: found.append(PGD(*a, **o)) or found[0], 0.5, m=4, warmup=0)(smoothed, x, y, 0)
    assert (soft_loss(found[0]) > soft_loss(x) + 0.05).all()


# -------------------------------------------------- what the attack is given


@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
def test_warmup_grows_like_salmans(problem, warmup):
    """min(epsilon, (epoch + 1) epsilon / warmup), epochs from 0."""
    smoothed, x, y = problem
    for make in (partial(SmoothAdv, m=1), AdversarialTraining):
        attack = Shift()
        objective = make(attack, 0.5, warmup=warmup)
        for epoch in range(12):
            objective(smoothed, x, y, epoch)
        expected = [min(0.5, (epoch + 1) * 0.5 / warmup) if warmup else 0.5 for epoch in range(12)]
        assert [call["epsilon"] for call in attack.calls] == pytest.approx(expected)


@pytest.mark.parametrize("box", [None, (0, 1), [-1.0, 1.0]])
def test_the_box_reaches_the_attack(problem, box):
    smoothed, x, y = problem
    for make in (SmoothAdv, AdversarialTraining):
        attack = Shift()
        make(attack, 0.5, box=box)(smoothed, x, y, 0)
        assert attack.calls[0]["box"] == (None if box is None else tuple(box))


def test_without_a_box_inputs_leave_the_unit_interval(problem):
    smoothed, x, y = problem
    for make in (partial(SmoothAdv, warmup=0), AdversarialTraining):
        for box, leaves in (((0, 1), False), (None, True)):
            seen = []
            make(lambda *a, seen=seen, **o: seen.append(PGD(*a, **o)) or seen[0], 3.0, box=box)(smoothed, x, y, 0)
            assert bool(((seen[0] < 0) | (seen[0] > 1)).any()) is leaves


@pytest.mark.parametrize("data", ["speech_commands", "speech_commands_ten"])
def test_the_configured_box_is_the_datas_range(data):
    for name in ("adversarial", "smoothadv", "smoothadv_ddn"):
        assert list(compose("train", f"objective={name}", f"data={data}").objective.box) == [-1, 1]


# -------------------------------------------------- the network during the attack


MAKERS = [partial(SmoothAdv, m=2, warmup=0), AdversarialTraining]


@pytest.mark.parametrize("make", MAKERS, ids=["smoothadv", "adversarial"])
@pytest.mark.parametrize("attack", [PGD, DDN], ids=["pgd", "ddn"])
def test_statistics_move_in_the_loss_only(make, attack):
    """The attack sees evaluation mode without gradients of the weights; the loss sees training mode, once: the running
    mean becomes .9 of itself and .1 of that of all draws together."""
    base = network_with_statistics().train()
    seen, statistics = Seen(base), base[1]
    inputs = []
    statistics.register_forward_hook(lambda module, given, output: inputs.append(given[0].detach()))
    smoothed = SmoothedClassifier(base, CLASSES, noise=Gaussian(0.5)).train()
    x, y = torch.rand(N, *SHAPE), torch.tensor([0, 1, 2, 0, 1])
    loss, _ = make(attack, 0.5)(smoothed, x, y, 0)
    steps = attack.keywords["steps"]
    assert [found[1:] for found in seen] == [(False, False)] * steps + [(True, True)]
    assert statistics.num_batches_tracked == 1
    assert len(inputs[-1]) == N * (2 if make is MAKERS[0] else 1)
    last = inputs[-1].transpose(0, 1).flatten(1)
    torch.testing.assert_close(statistics.running_mean, 0.1 * last.mean(1))
    torch.testing.assert_close(statistics.running_var, 0.9 + 0.1 * last.var(1))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in base.parameters())


@pytest.mark.parametrize("make", MAKERS, ids=["smoothadv", "adversarial"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_mode_and_flags_come_back(make, training, fails):
    """After a failed attack too; a weight that was frozen stays so."""
    base = network_with_statistics().train(training)
    base[0].weight.requires_grad_(False)
    smoothed = SmoothedClassifier(base, CLASSES, noise=Gaussian(0.5)).train(training)
    objective = make(Shift(fails=fails), 0.5)
    x, y = torch.rand(N, *SHAPE), torch.tensor([0, 1, 2, 0, 1])
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            objective(smoothed, x, y, 0)
    else:
        objective(smoothed, x, y, 0)
    assert all(module.training is training for module in base.modules())
    assert [name for name, p in base.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert int(base[1].num_batches_tracked) == int(training and not fails)


def test_parts_in_another_mode_come_back_in_theirs():
    """Fine-tuning with fixed statistics: batch normalisation in evaluation mode within a network in training."""
    base = network_with_statistics().train()
    base[1].eval()
    smoothed = SmoothedClassifier(base, CLASSES, noise=Gaussian(0.5))
    SmoothAdv(Shift(), 0.5)(smoothed, torch.rand(N, *SHAPE), torch.tensor([0, 1, 2, 0, 1]), 0)
    assert base.training
    assert not base[1].training


# -------------------------------------------------- the transformation

ALL = [NoiseAugmentation, partial(SmoothAdv, Shift(0.0), 0.5, m=3), partial(AdversarialTraining, Shift(0.0), 0.5)]


@pytest.mark.parametrize(
    ("make", "passes"), zip(ALL, ([4], [12, 12], [4, 4]), strict=True), ids=["noise", "smoothadv", "adversarial"]
)
@pytest.mark.parametrize("semantic", [True, False])
def test_one_angle_an_image_is_drawn_and_shared(monkeypatch, make, passes, semantic):
    """By all draws, and by attack and loss; semantic=False draws nothing and leaves the image as it is."""
    base = nn.Sequential(nn.Flatten(), nn.Linear(49, CLASSES))
    seen = Seen(base)
    smoothed = SmoothedClassifier(base, CLASSES, Rotation(), law=Gaussian(20.0))
    asked, angles = [], torch.tensor([[10.0], [-25.0], [0.0], [40.0]])

    def draw_parameters(source, n):
        asked.append(n)
        return angles

    monkeypatch.setattr(smoothed, "draw_parameters", draw_parameters)
    x = torch.rand(4, 1, 7, 7)
    make(semantic=semantic)(smoothed, x, torch.tensor([0, 1, 2, 0]), 0)
    assert asked == ([4] if semantic else [])
    expected = Rotation()(x, angles) if semantic else x
    for inputs, *_ in seen:  # there is no noise: all draws are alike
        torch.testing.assert_close(inputs, expected.repeat(len(inputs) // 4, 1, 1, 1), atol=1e-6, rtol=0)
    assert [len(inputs) for inputs, *_ in seen] == passes


def test_the_attack_starts_behind_the_preprocessing():
    """x' is near what the noise is added to."""
    smoothed = SmoothedClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES)), CLASSES, preprocess=nn.Threshold(0.5, 0.0)
    )
    x, y = torch.rand(N, *SHAPE), torch.tensor([0, 1, 2, 0, 1])
    for make in (SmoothAdv, AdversarialTraining):
        attack = Shift()
        make(attack, 0.5)(smoothed, x, y, 0)
        assert torch.equal(attack.calls[0]["x"], torch.where(x > 0.5, x, 0.0))


def test_draws_are_fresh_in_every_call(problem):
    """And independent between the m draws."""
    smoothed, x, y = problem
    seen = Seen(smoothed.base)
    objective = SmoothAdv(Shift(0.0), 0.5, m=2)
    for _ in range(2):
        objective(smoothed, x, y, 0)
    draws = torch.cat([inputs.unflatten(0, (2, N)) - x for inputs, *_ in seen[1::2]])
    assert len({round(float(draw.sum()), 4) for draw in draws}) == 4
    assert 0.3 < draws.std() < 0.7


# -------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [{"epsilon": -0.1}, {"epsilon": math.nan}, {"warmup": -1}, {"m": 0}, {"m": -2}],
)
def test_bad_numbers_are_refused(options):
    with pytest.raises(RequestError, match=r"objective\."):
        SmoothAdv(PGD, **{"epsilon": 0.5, **options})
    if "m" not in options:
        with pytest.raises(RequestError, match=r"objective\."):
            AdversarialTraining(PGD, **{"epsilon": 0.5, **options})


@pytest.mark.parametrize(
    "options", [{"epsilon": math.inf}, {"box": [1, 0]}, {"box": [0, 1, 2]}, {"box": [0]}, {"box": [0, math.nan]}]
)
@pytest.mark.parametrize("make", [SmoothAdv, AdversarialTraining])
def test_radii_and_boxes_that_make_no_attack_are_refused(make, options):
    with pytest.raises(RequestError):
        make(PGD, **{"epsilon": 0.5, **options})


def test_a_fraction_of_a_draw_is_refused():
    with pytest.raises(RequestError, match=r"objective\."):
        SmoothAdv(PGD, 0.5, m=1.5)


# -------------------------------------------------- training


def worst_loss(base, x, y, epsilon):
    """Of a linear network with two classes, in closed form: softplus(epsilon ||w|| - margin)."""
    weight = (base[1].weight[1] - base[1].weight[0]).detach()
    score = x.flatten(1) @ weight + (base[1].bias[1] - base[1].bias[0]).detach()
    return float(functional.softplus(epsilon * weight.norm() - score * (2 * y - 1)).mean())


def fragile_data():
    """Coordinate 0 tells the classes apart by a step of .2 and always, coordinate 1 by .8 and mostly."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    side = (2 * y - 1).float()
    right = torch.where(torch.rand(200, generator=generator) < 0.95, 1.0, -1.0)
    x = torch.stack([0.5 + 0.1 * side, 0.5 + 0.4 * side * right], 1)
    return x[:, None, None] + 0.01 * torch.randn(200, 1, 1, 2, generator=generator), y


@cache
def start_and_end(objective, sigma):
    """Worst losses before and after a training under noise of this sigma."""
    x, y = fragile_data()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    smoothed = SmoothedClassifier(base, 2, noise=Gaussian(sigma) if sigma else None)
    optimizer = torch.optim.Adam(base.parameters(), lr=0.2)
    start = worst_loss(base, x, y, 0.3)
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = objective(smoothed, x, y, 0)
        loss.backward()
        optimizer.step()
    return start, worst_loss(base, x, y, 0.3)


PLAIN = AdversarialTraining(PGD, 0.0)


@pytest.mark.parametrize(
    "objective",
    [AdversarialTraining(PGD, 0.3), SmoothAdv(PGD, 0.3, m=2, warmup=0), SmoothAdv(DDN, 0.3, m=2, warmup=0)],
    ids=["adversarial", "smoothadv", "smoothadv_ddn"],
)
def test_training_lowers_the_worst_loss_below_that_of_plain_training(objective):
    """On data where the feature that separates best is the one that an attack can undo."""
    _, plain = start_and_end(PLAIN, None)
    start, robust = start_and_end(objective, 0.05)
    assert robust < 0.75 * start
    assert robust < 0.6 * plain


NAMES = ("noise", "smoothadv", "smoothadv_ddn", "adversarial")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains by an objective with an option, once."""
    return cache(lambda name, option: trained(configured(name, option), tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "option", ["train.precision=32-true", "train.precision=bf16-mixed", "train.accumulate_grad_batches=2"]
)
def test_every_objective_trains_a_step(run, name, option):
    """The saved weights are finite, differ from the first ones, and load."""
    path, content = run(name, option)
    network = seeded_network(configured(name))
    first = {key: value.clone() for key, value in network.state_dict().items()}
    load_weights(network, path)
    for key, value in network.state_dict().items():
        assert value.dtype == first[key].dtype
        assert torch.isfinite(value.float()).all()
        assert not torch.equal(value, first[key]), key
    assert int(network.features[1].num_batches_tracked) == 4, "the attack moved the statistics"
    assert content["global_step"] == (2 if "accumulate" in option else 4)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_trains_with_averaged_weights(tmp_path, name):
    """The average starts at the weights after the first step: after two it is .9 w1 + .1 w2."""
    weights = {}
    for batches, ema in ((1, "null"), (2, "null"), (2, "0.9")):
        cfg = configured(name, f"train.limit_train_batches={batches}", "train.scheduler=null", f"train.ema={ema}")
        path, _ = trained(cfg, tmp_path / f"{batches}-{ema}")
        network = seeded_network(cfg)
        load_weights(network, path)
        weights[batches, ema] = network.state_dict()["head.1.weight"]
    first, second, average = weights.values()
    assert (second - first).abs().max() > 1e-3
    torch.testing.assert_close(average, 0.9 * first + 0.1 * second)


def test_objectives_give_different_weights(run, tmp_path):
    """The option is not ignored, and the same command gives the same weights."""
    runs = [run(name, "train.precision=32-true") for name in NAMES]
    again = trained(configured("smoothadv"), tmp_path)
    *found, repeated = (content["state_dict"]["smoothed.base.head.1.weight"] for _, content in (*runs, again))
    assert torch.equal(repeated, found[NAMES.index("smoothadv")])
    for one, two in combinations(found, 2):
        assert not torch.equal(one, two)


def test_an_objective_of_ones_own_that_returns_no_logits_is_refused(here, monkeypatch):
    """One class in a file of one's own; what it must return is said."""
    (here / "half.py").write_text("class Half:\n    def __call__(self, smoothed, x, y, epoch):\n        return x\n")
    monkeypatch.syspath_prepend(str(here))
    ended = run_main("train", *QUIET, "~objective.semantic", "objective._target_=half.Half", "store=run")
    one_sentence(ended, "a loss and the logits it was computed from, not Tensor")
