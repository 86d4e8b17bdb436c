"""Shared by the tests of attacks on pixels: a classifier whose distance from the boundary is known, and attacks of each
library."""

from functools import partial

import foolbox
import numpy as np
import torch
import torchattacks
from torch import nn

from gsmooth_lightning.attack import ddn, of_foolbox, of_torchattacks, ours, perturb, pgd
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from plans import finish


class Halfspace(nn.Module):
    """Logits (-s, s), s = 2 (w.x - b): the hyperplane w.x = b lies |w.x - b| / |w| from x, in l2 by |w|_2 and in linf
    by |w|_1. With labels, class numbers alone."""

    def __init__(self, w: torch.Tensor, b: float, labels: bool = False):
        super().__init__()
        self.w, self.b, self.labels = nn.Parameter(w), b, labels

    def forward(self, x):
        lead = 2 * ((x * self.w).flatten(1).sum(1) - self.b)
        out = torch.stack([-lead, lead], 1)
        return out.argmax(1) if self.labels else out


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normals."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def grey(seed: int = 1) -> torch.Tensor:
    """Bytes around 1/2, k/255, (1, 8, 8)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(90, 166, (1, 8, 8))).float() / 255


def smoothed_by(base: nn.Module, sigma: float = 0.05, **parts) -> SmoothedClassifier:
    """Two classes, by pixel noise."""
    return SmoothedClassifier(base, 2, noise=Gaussian(sigma), block=16, **parts).eval()


def attacked(smoothed, threat, x, craft, epsilons, label=1, seed=0, image=0, **options):
    """The outcome of an attack on one image, with fewer draws than by default."""
    options = {"draws": 4, "n": 64} | options
    return finish(perturb(smoothed, threat, x, label, Stream(seed, image), craft, epsilons, **options))


def dark():
    """A picture of mean .302; those beyond .45, 8 (.45 - .302) = 1.18 away in l2, are of another class."""
    return torch.full((1, 8, 8), 77 / 255), Halfspace(-torch.ones(1, 8, 8) / 64, -0.45, labels=True)


def in_training_mode(model, eps):
    """An attack of torchattacks that asks for training mode, batch statistics and dropout."""
    made = torchattacks.PGDL2(model, eps=eps, steps=3)
    made.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=True)
    return made


CRAFTS = {
    "pgd": ours(partial(pgd, steps=4)),
    "ddn of smallest norm": ours(partial(ddn, steps=10)),
    "torchattacks": of_torchattacks(partial(torchattacks.PGDL2, steps=4)),
    "torchattacks of smallest norm": of_torchattacks(partial(torchattacks.CW, steps=40, lr=0.02)),
    "torchattacks in training mode": of_torchattacks(in_training_mode),
    "foolbox": of_foolbox(foolbox.attacks.L2ProjectedGradientDescentAttack(steps=4, rel_stepsize=0.4)),
    "foolbox of smallest norm": of_foolbox(foolbox.attacks.DDNAttack(steps=20)),
}
