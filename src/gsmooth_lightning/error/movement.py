"""How far an attack moves an image from the middle of a slice of its parameters."""

import itertools
import math

import torch
from torch import Tensor

from gsmooth_lightning.error.chords import ROUNDED
from gsmooth_lightning.preprocess import is_linear, lipschitz, visible
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import SAVED, TransformationThreat
from gsmooth_lightning.transform import Warp

NODES = 3
"""Points of a slice along each axis at which the movement is computed."""


@torch.inference_mode()
def movements(
    smoothed: SmoothedClassifier, threat: TransformationThreat, warp: Warp, x: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """||P(file(psi(x, gamma))) - P(psi(x, middle))||_2 <= moved + fixed over gamma in slices low, high, (k, dim):
    (k, 2) float64, the second being what files and floats round, and threat.l2.

    P is the classifier's preprocessing and rounding. Where it is linear, psi(x, gamma) lies between the nodes of a grid
    up to its bend, and the norm is largest at a node; otherwise the slice's shift bounds it. The norm is bounded, and
    from the slice's middle (theory.md section 8).
    """
    k, dim = low.shape
    seen, scale = visible(smoothed.preprocess, x), lipschitz(smoothed.preprocess)
    steps = torch.linspace(0, 1, NODES, dtype=torch.float64, device=x.device)
    grid = torch.cartesian_prod(*[steps] * dim).view(-1, dim)  # (nodes, dim)
    if is_linear(smoothed.preprocess):
        nodes = low[:, None] + (high - low)[:, None] * grid
        parameters = torch.cat([nodes, ((low + high) / 2)[:, None]], 1).flatten(0, 1)
        images = warp(x.expand(len(parameters), *x.shape), parameters.float())
        images = images.view(k, len(grid) + 1, *x.shape)
        apart = smoothed.preprocess((images[:, :-1] - images[:, -1:]).flatten(0, 1))
        moved = apart.double().flatten(1).norm(dim=1).view(k, -1).amax(1) * (1 + 1e-6)
        corners = torch.tensor(list(itertools.product(range(NODES - 1), repeat=dim)), device=x.device)
        first = low[:, None] + (high - low)[:, None] * steps[corners]
        last = low[:, None] + (high - low)[:, None] * steps[corners + 1]
        moved = moved + scale * warp.bend(x, first.flatten(0, 1), last.flatten(0, 1), seen).view(k, -1).amax(1)
    else:
        moved = scale * warp.shift(x, low, high, seen)
    fixed = scale * (threat.l2 + _saved(threat, warp, x, low, high, seen)) + _grid(smoothed, x)
    return torch.stack([moved, fixed], 1)


def _saved(threat: TransformationThreat, warp: Warp, x: Tensor, low: Tensor, high: Tensor, seen: Tensor) -> Tensor:
    """What saving a file may change in the seen pixels: half a step in each, but not in black ones. (k,)"""
    levels = SAVED[threat.saved][2]
    changed = (0.5 / levels if levels else 0.0) + 2.0**-22
    return warp.not_black(x, low, high, seen).sqrt() * changed


def _grid(smoothed: SmoothedClassifier, x: Tensor) -> float:
    """The noise grid's half steps, and float32 in the preprocessing."""
    return ROUNDED * math.sqrt(math.prod(smoothed.encoded_shape(x))) / smoothed.levels
