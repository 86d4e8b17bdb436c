"""A small problem, its hand computation, spies, and a few steps of training, for tests of training objectives."""

from functools import cache, partial
from itertools import cycle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from conftest import QUIET, compose
from gsmooth_lightning.attack import pgd
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.tasks.train import train

SHAPE, CLASSES, N = (1, 2, 3), 3, 5
ROWS = np.arange(N)
PGD = partial(pgd, steps=4)
STEP = (
    *QUIET,
    "train.epochs=1",
    "train.batch_size=32",
    "data.size=8",
    "data.enlarge=null",
    "model.widths=[4]",
    "model.hidden=8",
    "noise.sigma=0.25",
    "train.limit_train_batches=4",
    "+trainer.limit_val_batches=1",
)
"""Four steps on digits of 8x8 pixels."""

THREATS = {
    "rotation": ("law.sigma=20",),
    "pixels": ("threat=l2", "transform=identity", "law=none", "preprocess=none", "error=none", "certify=direct"),
}


@pytest.fixture
def problem():
    """A linear softmax network, a batch, and its weights for the hand computation."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES))
    with torch.no_grad():
        base[1].weight.copy_(torch.randn(CLASSES, 6, generator=generator))
        base[1].bias.copy_(torch.randn(CLASSES, generator=generator))
    smoothed = SmoothedClassifier(base, CLASSES, noise=Gaussian(0.5))
    return smoothed, torch.rand(N, *SHAPE, generator=generator), torch.tensor([0, 1, 2, 0, 1])


def known_noise(monkeypatch, smoothed, m):
    """Replaces the noise by known draws in turn, for one batch or for several at once; returns them, and the list of
    what was asked for."""
    draws = torch.randn(m, N, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.5
    supply, asked = cycle(draws), []

    def training_noise(x):
        asked.append(x)
        return torch.cat([next(supply) for _ in range(len(x) // N)])

    monkeypatch.setattr(smoothed, "training_noise", training_noise)
    return draws, asked


def hand(smoothed):
    """(probabilities, cross-entropies) of the linear network in NumPy's float64."""
    weight = smoothed.base[1].weight.detach().double().numpy()
    bias = smoothed.base[1].bias.detach().double().numpy()

    def probabilities(x):
        logits = x.detach().double().flatten(1).numpy() @ weight.T + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def losses(x, y):
        return -np.log(probabilities(x)[np.arange(len(x)), y.numpy()])

    return probabilities, losses


class Shift:
    """An attack that moves every input by a fixed amount, and keeps what it was given."""

    def __init__(self, amount=0.1, fails=False):
        self.amount, self.fails = amount, fails
        self.calls = []

    def __call__(self, log_probabilities, x, y, epsilon, box):
        self.calls.append({"log_p": log_probabilities(x).detach(), "x": x, "y": y, "epsilon": epsilon, "box": box})
        if self.fails:
            raise RuntimeError("out of memory")
        return x + self.amount


class Seen(list):
    """Inputs of the base network, with its mode and whether its weights want gradients."""

    def __init__(self, base):
        super().__init__()
        weights = list(base.parameters())
        base.register_forward_hook(
            lambda module, inputs, output: self.append(
                (inputs[0].detach().clone(), module.training, any(p.requires_grad for p in weights))
            )
        )


def network(weight):
    """A linear softmax network with these weights, without bias."""
    base = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        base[1].weight.copy_(weight)
    return base


def network_with_statistics():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(24, CLASSES))


@cache
def composed(objective, threat):
    return compose("train", *STEP, *THREATS[threat], f"objective={objective}")


def configured(objective, *options, threat="rotation"):
    """Of a training by an objective, composed once, with options of single values."""
    return OmegaConf.merge(composed(objective, threat), OmegaConf.from_dotlist(list(options)))


def trained(cfg, store):
    """Path of the checkpoint, and its content."""
    path = train(OmegaConf.merge(cfg, {"store": str(store)}))
    return path, torch.load(path, map_location="cpu", weights_only=True)
