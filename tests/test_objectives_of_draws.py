"""Consistency, stability training and MACER against hand computations in NumPy's float64."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import entropy, norm
from torch import nn

from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.train import Consistency, Macer, SmoothAdv, StabilityTraining
from objectives import CLASSES, ROWS, SHAPE, N, Shift, hand, known_noise, network, problem

__all__ = ["problem"]  # the fixture


# -------------------------------------------------- consistency


@pytest.mark.parametrize("m", [1, 2, 3])
def test_consistency_is_cross_entropy_divergence_and_entropy(problem, monkeypatch, m):
    smoothed, x, y = problem
    draws, _ = known_noise(monkeypatch, smoothed, m)
    probabilities, losses = hand(smoothed)
    each = np.stack([probabilities(x + draw) for draw in draws])
    mean = each.mean(0)
    terms = [
        np.mean([losses(x + draw, y) for draw in draws]),
        np.mean([rel_entr(mean, p).sum(1).mean() for p in each]),
        entropy(mean, axis=1).mean(),
    ]
    assert terms[1] == pytest.approx(0, abs=1e-12) if m == 1 else terms[1] > 0.01
    for weight, eta in ((0.0, 0.0), (10.0, 0.0), (0.0, 0.5), (20.0, 1.5)):
        loss, logits = Consistency(weight, eta, m)(smoothed, x, y, 0)
        assert loss.item() == pytest.approx(terms[0] + weight * terms[1] + eta * terms[2], rel=1e-5)
        np.testing.assert_allclose(logits.detach().softmax(1), each[0], rtol=1e-4)


def test_consistency_differentiates_the_mean_too(problem, monkeypatch):
    """Against central differences of the hand computation, along one direction of the weights."""
    smoothed, x, y = problem
    draws, _ = known_noise(monkeypatch, smoothed, 2)
    weight = smoothed.base[1].weight
    along = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    loss, _ = Consistency(10.0, 0.5)(smoothed, x, y, 0)
    loss.backward()

    def by_hand():
        probabilities, losses = hand(smoothed)
        each = np.stack([probabilities(x + draw) for draw in draws])
        apart = np.mean([rel_entr(each.mean(0), p).sum(1).mean() for p in each])
        return np.mean([losses(x + d, y) for d in draws]) + 10 * apart + 0.5 * entropy(each.mean(0), axis=1).mean()

    assert float((weight.grad * along).sum()) == pytest.approx(slope(weight, along, by_hand), rel=1e-3)


def slope(weight, along, value, step=1e-3):
    """Central difference of value() when the weight moves along a direction."""
    values = []
    for move in (step, -2 * step):
        with torch.no_grad():
            weight += move * along
        values.append(value())
    with torch.no_grad():
        weight += step * along
    return (values[0] - values[1]) / (2 * step)


def test_draws_are_normalised_together(monkeypatch):
    """Batch statistics of the images of all draws, (u - mean u) / sqrt(var u + 1e-5), not of a draw by itself; of one
    pass, which moves the running mean once."""
    generator = torch.Generator().manual_seed(2)
    base = nn.Sequential(nn.BatchNorm2d(1), *network(torch.randn(CLASSES, 6, generator=generator))).train()
    smoothed = SmoothedClassifier(base, CLASSES, noise=Gaussian(0.5))
    draws, _ = known_noise(monkeypatch, smoothed, 3)
    draws += torch.tensor([0.0, 3.0, -5.0]).view(3, 1, 1, 1, 1)  # which together would have another mean
    x, y = torch.rand(N, *SHAPE, generator=generator), torch.tensor([0, 1, 2, 0, 1])
    weight = base[2].weight.detach().double().numpy()
    u = (x + draws).double().flatten(2).numpy()
    each = softmax((u - u.mean()) / np.sqrt(u.var() + 1e-5) @ weight.T, 2)
    mean = each.mean(0)
    loss, logits = Consistency(10.0, 0.5, 3)(smoothed, x, y, 0)
    apart = np.mean([rel_entr(mean, p).sum(1).mean() for p in each])
    right = np.mean([-np.log(p[ROWS, y]) for p in each])
    assert loss.item() == pytest.approx(right + 10 * apart + 0.5 * entropy(mean, axis=1).mean(), rel=1e-4)
    np.testing.assert_allclose(logits.detach().softmax(1), each[0], rtol=1e-3)
    assert base[0].running_mean.item() == pytest.approx(0.1 * u.mean(), rel=1e-5)
    loss, _ = Macer(0.0, m=3)(smoothed, x, y, 0)
    assert loss.item() == pytest.approx(-np.log(mean[ROWS, y]).mean(), rel=1e-4)
    loss, _ = SmoothAdv(Shift(0.0), 0.5, m=3)(smoothed, x, y, 0)
    assert loss.item() == pytest.approx(right, rel=1e-4)


# -------------------------------------------------- stability training


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_stability_is_two_cross_entropies(problem, monkeypatch, weight):
    """And its gradient that of the clean and of the noisy logits, in closed form."""
    smoothed, x, y = problem
    (draw,), asked = known_noise(monkeypatch, smoothed, 1)
    loss, logits = StabilityTraining(weight)(smoothed, x, y, 0)
    probabilities, losses = hand(smoothed)
    clean, noisy = probabilities(x), probabilities(x + draw)
    stability = -(clean * np.log(noisy)).sum(1)
    assert loss.item() == pytest.approx(losses(x, y).mean() + weight * stability.mean(), rel=1e-5)
    np.testing.assert_allclose(logits.detach().softmax(1), noisy, rtol=1e-4)
    assert len(asked) == 1
    loss.backward()
    at_noisy = weight * (noisy - clean)  # d/d logits of -sum_j q_j log p_j
    at_clean = clean - np.eye(CLASSES)[y] + weight * clean * (-np.log(noisy) - stability[:, None])
    if weight:
        assert np.abs(weight * clean * (-np.log(noisy) - stability[:, None])).max() > 0.01
    flat, moved = x.double().flatten(1).numpy(), (x + draw).double().flatten(1).numpy()
    np.testing.assert_allclose(smoothed.base[1].weight.grad, (at_clean.T @ flat + at_noisy.T @ moved) / N, atol=1e-5)


# -------------------------------------------------- MACER


@pytest.mark.parametrize("gamma", [0.7, 2.0, 8.0])
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_macer_is_a_hinge_on_the_margin_of_the_correct(problem, monkeypatch, gamma, beta):
    """m = 3 draws; divided by the batch, not by the images inside the hinge."""
    smoothed, x, y = problem
    draws, _ = known_noise(monkeypatch, smoothed, 3)
    probabilities, _ = hand(smoothed)
    soft = np.mean([probabilities(x + draw) for draw in draws], 0)
    y = torch.as_tensor(soft.argmax(1)).where(torch.tensor([True, True, False, True, True]), torch.tensor(0))
    heated = np.stack([probabilities(x + draw) ** beta for draw in draws])
    p = (heated / heated.sum(2, keepdims=True)).mean(0)
    ordered = np.sort(p, 1)
    margin = norm.ppf(ordered[:, -1]) - norm.ppf(ordered[:, -2])
    hinged = (p.argmax(1) == y.numpy()) & (margin <= gamma)
    assert (p.argmax(1) != y.numpy()).any()
    assert hinged.sum() < N
    if gamma > 2:
        assert hinged.any()
    expected = -np.log(soft[ROWS, y]).mean() + 3.0 / 2 * (gamma - margin)[hinged].sum() / N
    loss, logits = Macer(3.0, gamma, beta, 3)(smoothed, x, y, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(logits.detach().softmax(1), probabilities(x + draws[0]), rtol=1e-4)


def test_the_hinge_of_macer_takes_some_of_the_correct_and_leaves_others():
    """Two classes at m = 1, beta = 1 without noise: z(p) - z(1 - p) = 2 z(p), of four known p."""
    p = np.array([0.9, 0.6, 0.3, 0.999])
    base = network(torch.tensor([[0.0], [1.0]]))
    x = torch.tensor(np.log(p / (1 - p))).float().view(4, 1)
    y = torch.ones(4, dtype=torch.long)
    margins = 2 * norm.ppf(p)
    assert list(margins <= 3.0) == [True, True, True, False]
    loss, _ = Macer(5.0, gamma=3.0, beta=1.0, m=1)(SmoothedClassifier(base, 2), x, y, 0)
    expected = -np.log(p).mean() + 5.0 / 2 * (3.0 - margins[:2]).sum() / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    density = norm.pdf(norm.ppf(p))
    slopes = -(1 - p) / 4 - 5.0 / 2 / 4 * np.array([1, 1, 0, 0]) * 2 * p * (1 - p) / density  # d/d logit of class 1
    assert base[1].weight.grad[1].item() == pytest.approx((slopes * x.numpy()[:, 0]).sum(), rel=1e-4)


@pytest.mark.parametrize("gamma", [8.0, 100.0])
@pytest.mark.parametrize("gap", [1.0, 2.2, 5.0, 23.0, 44.2, 44.4, 46.3, 46.5, 60.0, 1e4])
def test_macer_stays_finite_where_probabilities_saturate(gap, gamma):
    """beta = 16 takes p of the other classes through subnormal numbers to 0, and p of the class to 1."""
    base = network(torch.eye(3) * gap)
    smoothed = SmoothedClassifier(base, 3)
    x = torch.eye(3)[[0, 0, 1, 2, 2]]
    loss, _ = Macer(6.0, gamma, m=2)(smoothed, x, torch.tensor([0, 1, 1, 2, 0]), 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(base[1].weight.grad).all()


def test_macer_waits_with_its_hinge(problem, monkeypatch):
    """start = 2: epochs 0 and 1 have -log( 1/m sum_i p_i(y) ) alone, and its gradient; the hinge comes with epoch 2."""
    smoothed, x, _ = problem
    draws, _ = known_noise(monkeypatch, smoothed, 3)
    probabilities, _ = hand(smoothed)
    each = np.stack([probabilities(x + draw) for draw in draws])
    soft = each.mean(0)
    ordered, y = np.sort(soft, 1), torch.as_tensor(soft.argmax(1))
    likelihood = -np.log(ordered[:, -1]).mean()
    hinge = 3.0 / 2 * np.maximum(8.0 - norm.ppf(ordered[:, -1]) + norm.ppf(ordered[:, -2]), 0).mean()
    assert hinge > 1
    objective, gradients = Macer(3.0, 8.0, 1.0, 3, start=2), []
    for epoch in range(4):
        loss, logits = objective(smoothed, x, y, epoch)
        assert loss.item() == pytest.approx(likelihood + hinge * (epoch >= 2), rel=1e-5)
        np.testing.assert_allclose(logits.detach().softmax(1), each[0], rtol=1e-4)
        gradients += torch.autograd.grad(loss, smoothed.base[1].weight)
    expected = 0.0
    for p, draw in zip(each, draws, strict=True):  # d/d logits of -log( 1/m sum_i p_i(y) )
        share = (p / each.sum(0))[ROWS, y][:, None]
        expected = expected + (share * (p - np.eye(CLASSES)[y])).T @ (x + draw).double().flatten(1).numpy() / N
    np.testing.assert_allclose(gradients[0], expected, atol=1e-5)
    assert torch.equal(gradients[1], gradients[0])
    assert (gradients[2] - gradients[0]).abs().max() > 0.1


def test_macer_widens_the_margin(problem):
    """A step down its gradient raises z(p_1) - z(p_2) of a correct image; cross-entropy's weight is none here."""
    base = network(torch.tensor([[0.0], [1.0]]))
    smoothed = SmoothedClassifier(base, 2)
    x, y = torch.ones(1, 1), torch.ones(1, dtype=torch.long)
    terms = [Macer(w, beta=1.0, m=1)(smoothed, x, y, 0)[0] for w in (4.0, 0.0)]
    (gradient,) = torch.autograd.grad(terms[0] - terms[1], base[1].weight)
    assert gradient[1].item() < -0.1 < 0.1 < gradient[0].item()
