"""TRADES and SmoothMix against hand computations in NumPy's float64, and what their attacks reach."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from gsmooth_lightning.attack import pgd
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.train import NoiseAugmentation, SmoothMix, Trades
from objectives import CLASSES, PGD, ROWS, SHAPE, N, Seen, Shift, hand, known_noise, network, problem

__all__ = ["problem"]  # the fixture


def kept(attack):
    """The attack, and a list of what it was given and returned."""
    calls = []

    def spied(log_probabilities, x, y, **options):
        out = attack(log_probabilities, x, y, **options)
        calls.append({"log_p": log_probabilities, "x": x, "y": y, "options": options, "out": out})
        return out

    return spied, calls


# -------------------------------------------------- TRADES


def test_the_attack_of_trades_starts_near_the_input(problem, monkeypatch):
    """By a thousandth in the mean square, where the divergence has a gradient; p is of the input itself."""
    smoothed, x, y = problem
    (draw,), _ = known_noise(monkeypatch, smoothed, 1)
    seen = Seen(smoothed.base)
    torch.manual_seed(0)
    Trades(PGD, 0.5)(smoothed, x, y, 0)
    torch.testing.assert_close(seen[0][0], x + draw)
    assert 5e-4 < (seen[1][0] - x - draw).std() < 2e-3


def test_trades_is_the_divergence_at_the_attacked_point(problem, monkeypatch):
    smoothed, x, y = problem
    (draw,), asked = known_noise(monkeypatch, smoothed, 1)
    loss, logits = Trades(Shift(0.1), 0.5, weight=6.0)(smoothed, x, y, 0)
    probabilities, losses = hand(smoothed)
    p, q = probabilities(x + draw), probabilities(x + draw + 0.1)
    apart = rel_entr(p, q).sum(1)
    assert apart.mean() > 1e-3
    assert loss.item() == pytest.approx(losses(x + draw, y).mean() + 6 * apart.mean(), rel=1e-5)
    np.testing.assert_allclose(logits.detach().softmax(1), p, rtol=1e-4)
    assert len(asked) == 1
    loss.backward()
    at_p = p - np.eye(CLASSES)[y] + 6 * p * (np.log(p / q) - apart[:, None])
    at_q = 6 * (q - p)
    here, there = ((x + draw + a).double().flatten(1).numpy() for a in (0, 0.1))
    np.testing.assert_allclose(smoothed.base[1].weight.grad, (at_p.T @ here + at_q.T @ there) / N, atol=2e-5)


@pytest.mark.parametrize("box", [None, (0, 1)])
@pytest.mark.parametrize("norms", ["l2", "linf"])
def test_the_attack_of_trades_raises_the_divergence_within_the_ball(problem, monkeypatch, box, norms):
    """Of every image; far more than random points of the same ball do on average."""
    smoothed, x, y = problem
    (draw,), _ = known_noise(monkeypatch, smoothed, 1)
    attack, calls = kept(partial(PGD, norm=norms))
    torch.manual_seed(0)
    Trades(attack, 0.5, box=box)(smoothed, x, y, 0)
    assert calls[0]["options"] == {"epsilon": 0.5, "box": box}
    moved = calls[0]["out"] - x
    size = moved.flatten(1).norm(dim=1) if norms == "l2" else moved.flatten(1).abs().amax(1)
    assert (size <= 0.5 + 1e-5).all()
    assert (size > 0.2).all()
    if box:
        assert calls[0]["out"].min() >= 0
        assert calls[0]["out"].max() <= 1
    probabilities, _ = hand(smoothed)
    p = probabilities(x + draw)
    reached = rel_entr(p, probabilities(calls[0]["out"] + draw)).sum(1)
    random = torch.randn(200, *x.shape, generator=torch.Generator().manual_seed(5))
    random = torch.stack([r * (0.5 / r.flatten(1).norm(dim=1)).view(-1, 1, 1, 1) for r in random])
    usual = np.mean([rel_entr(p, probabilities(x + draw + r)).sum(1) for r in random], 0)
    assert (reached > 1e-3).all()
    if box is None:
        assert (reached > 2 * usual).all()


def test_the_attack_of_trades_is_nearly_the_worst_for_two_classes(monkeypatch):
    """Logits (0, <w, x>): the divergence is largest at one of x -+ epsilon w / ||w||; PGD finds one of the two."""
    generator = torch.Generator().manual_seed(2)
    base = network(torch.stack([torch.zeros(6), torch.randn(6, generator=generator)]))
    smoothed = SmoothedClassifier(base, 2, noise=Gaussian(0.5))
    x, y = torch.rand(N, *SHAPE, generator=generator), torch.tensor([0, 1, 0, 1, 1])
    (draw,), _ = known_noise(monkeypatch, smoothed, 1)
    loss, _ = Trades(PGD, 0.7, weight=1.0, box=None)(smoothed, x, y, 0)
    weight = base[1].weight.detach()[1].double().numpy()
    score = (x + draw).flatten(1).double().numpy() @ weight

    def bernoulli(s):
        return np.stack([1 / (1 + np.exp(s)), 1 / (1 + np.exp(-s))], 1)

    p = bernoulli(score)
    ends = [rel_entr(p, bernoulli(score + side * 0.7 * np.linalg.norm(weight))).sum(1) for side in (-1, 1)]
    found = loss.item() - -np.log(p[ROWS, y]).mean()
    assert np.minimum(*ends).mean() * 0.999 <= found <= np.maximum(*ends).mean() * 1.001


@pytest.mark.parametrize("options", [{"weight": 0.0, "epsilon": 0.5}, {"weight": 6.0, "epsilon": 0.0}])
def test_trades_without_weight_or_radius_is_noise_augmentation(problem, monkeypatch, options):
    smoothed, x, y = problem
    known_noise(monkeypatch, smoothed, 1)
    loss, _ = Trades(PGD, **options)(smoothed, x, y, 0)
    plain, _ = NoiseAugmentation()(smoothed, x, y, 0)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_radius_of_trades_warms_up(problem):
    smoothed, x, y = problem
    attack = Shift()
    for epoch in range(5):
        Trades(attack, 0.6, warmup=3)(smoothed, x, y, epoch)
    assert [call["epsilon"] for call in attack.calls] == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6])


# -------------------------------------------------- SmoothMix


def shares(monkeypatch, values):
    """Replaces torch.rand by known numbers."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.tensor(values))


@pytest.mark.parametrize("m", [1, 2, 3])
def test_smoothmix_mixes_inputs_and_targets(problem, monkeypatch, m):
    """lambda = rand / 2; the second term is zero for images that the mean vote gets wrong."""
    smoothed, x, y = problem
    draws, asked = known_noise(monkeypatch, smoothed, m)
    rand = [0.0, 0.2, 0.5, 0.9, 1.0]
    shares(monkeypatch, rand)
    attack, calls = kept(lambda log_probabilities, x, y, **options: x + 0.3)
    probabilities, losses = hand(smoothed)
    soft = np.mean([probabilities(x + draw) for draw in draws], 0)
    y = torch.as_tensor(soft.argmax(1)).where(torch.arange(N) != 2, (torch.as_tensor(soft.argmax(1)) + 1) % CLASSES)
    loss, logits = SmoothMix(attack, 0.4, steps=3, weight=5.0, m=m)(smoothed, x, y, 0)
    share = np.array(rand) / 2
    mixed = x + torch.tensor(share).float().view(-1, 1, 1, 1) * 0.3
    target = (1 - share)[:, None] * soft + share[:, None] / CLASSES
    each = np.mean([-(target * np.log(probabilities(mixed + draw))).sum(1) for draw in draws], 0)
    expected = np.mean([losses(x + draw, y) for draw in draws]) + 5 * (each * (np.arange(N) != 2)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(logits.detach().softmax(1), probabilities(x + draws[0]), rtol=1e-4)
    np.testing.assert_allclose(calls[0]["log_p"](x).detach(), np.log(soft), atol=1e-5)
    assert torch.equal(calls[0]["y"], y)
    assert calls[0]["options"] == {"epsilon": pytest.approx(1.2), "steps": 3, "step_size": 0.4, "box": (0, 1)}
    assert len(asked) == m


def test_the_gradient_of_smoothmix_is_that_of_the_logits_at_a_fixed_target(problem, monkeypatch):
    """It flows neither through the target nor through the attack."""
    smoothed, x, y = problem
    draws, _ = known_noise(monkeypatch, smoothed, 2)
    shares(monkeypatch, [0.8] * N)
    attack, calls = kept(pgd)
    loss, _ = SmoothMix(attack, 0.4, steps=3, weight=5.0)(smoothed, x, y, 0)
    loss.backward()
    adversarial = calls[0]["out"]
    assert not adversarial.requires_grad
    probabilities, _ = hand(smoothed)
    soft = np.mean([probabilities(x + draw) for draw in draws], 0)
    right = (soft.argmax(1) == y.numpy())[:, None]
    assert right.any()
    target = 0.6 * soft + 0.4 / CLASSES
    expected = 0.0
    for draw in draws:
        mixed = x + 0.4 * (adversarial - x)
        for at, wrong in (
            (x + draw, probabilities(x + draw) - np.eye(CLASSES)[y]),
            (mixed + draw, 5 * right * (probabilities(mixed + draw) - target)),
        ):
            expected = expected + wrong.T @ at.double().flatten(1).numpy() / (2 * N)
    np.testing.assert_allclose(smoothed.base[1].weight.grad, expected, atol=2e-5)


def test_the_mixing_share_is_uniform_up_to_a_half():
    """By a batch of one image at 0, whose adversarial version is at 1: the mixture is the share itself."""
    base = network(torch.randn(2, 1, generator=torch.Generator().manual_seed(0)))
    seen = Seen(base)
    torch.manual_seed(0)
    SmoothMix(lambda log_p, x, y, **options: x + 1, 0.5, m=1)(
        SmoothedClassifier(base, 2), torch.zeros(4000, 1), torch.zeros(4000, dtype=torch.long), 0
    )
    share = seen[-1][0][:, 0].sort().values
    assert share[0] >= 0
    assert share[-1] <= 0.5
    uniform = (torch.arange(4000) + 0.5) / 8000
    assert (share - uniform).abs().max() < 0.5 * 0.043  # Kolmogorov: exceeded with probability 1e-6


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("box", [None, (0, 1)])
def test_the_path_of_smoothmix_is_at_most_its_steps(problem, steps, box):
    """On a linear model with two classes it is straight: all of it outside a box."""
    smoothed, x, y = problem
    attack, calls = kept(pgd)
    SmoothMix(attack, 0.3, steps=steps, box=box)(smoothed, x, y, 0)
    moved = calls[0]["out"] - x
    length = moved.flatten(1).norm(dim=1)
    assert (length <= 0.3 * steps + 1e-5).all()
    if box:
        assert calls[0]["out"].min() >= 0
        assert calls[0]["out"].max() <= 1
    else:
        assert (length > 0.25 * steps).all()
    log_p = calls[0]["log_p"]
    raised = log_p(x)[ROWS, y] - log_p(calls[0]["out"])[ROWS, y]
    assert (raised > 0.01).all()
