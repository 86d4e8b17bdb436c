"""How far an attack moves an image from the middle of a slice of its parameters."""

import itertools
import math

import torch
from torch import Tensor

from gsmooth_lightning.error.chords import ROUNDED, clip_kinks
from gsmooth_lightning.preprocess import is_linear, lipschitz, visible
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import SAVED, TransformationThreat
from gsmooth_lightning.transform import Warp
from gsmooth_lightning.transform.interpolate import shifts

NODES = 5
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
    grid = torch.cartesian_prod(*[torch.arange(NODES, device=x.device)] * dim).view(-1, dim)
    between = grid[(grid < NODES - 1).all(1)]  # the lower corners of the boxes between nodes, (boxes, dim)
    parameters = low[:, None] + (high - low)[:, None] * grid / (NODES - 1)
    images = warp(x.expand(k * len(grid), *x.shape), parameters.flatten(0, 1).float()).view(k, len(grid), *x.shape)
    offsets = (torch.tensor(bits, device=x.device) for bits in itertools.product((0, 1), repeat=dim))
    corners = torch.stack([images[:, _place(between + offset)] for offset in offsets])
    first, last = (parameters[:, _place(between + offset)].flatten(0, 1) for offset in (0, 1))
    away = warp.departure(x, first, last).view(k, len(between), *x.shape) + clip_kinks(threat, corners)
    images, corners = threat.clip(images), threat.clip(corners)
    if is_linear(smoothed.preprocess):
        middles = middle_images(threat, warp, x, low, high)
        apart = smoothed.preprocess((images - middles[:, None]).flatten(0, 1))
        at_nodes = apart.double().flatten(1).norm(dim=1).view(k, -1).amax(1) * (1 + 1e-6)
        moved = at_nodes + scale * (away * seen).flatten(2).norm(dim=2).amax(1)
    else:
        moved = scale * shifts(warp, x, low, high, seen)
    rounding = saved_error(threat, corners.amin(0) - away, corners.amax(0) + away)
    rounded = (rounding * seen).flatten(2).norm(dim=2).amax(1)
    steps = ROUNDED * math.sqrt(math.prod(smoothed.encoded_shape(x))) / smoothed.levels  # of the noise grid
    return torch.stack([moved, scale * (threat.l2 + rounded) + steps], 1)


def middle_images(threat: TransformationThreat, warp: Warp, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """psi(x, middle) of slices, clipped but not rounded as files are: (k, c, h, w)."""
    return threat.clip(warp(x.expand(len(low), *x.shape), ((low + high) / 2).float()))


def _place(nodes: Tensor) -> Tensor:
    """Index of nodes of the grid, (n, dim) -> (n,)."""
    return (nodes * NODES ** torch.arange(nodes.shape[1] - 1, -1, -1, device=nodes.device)).sum(1)


def saved_error(threat: TransformationThreat, least: Tensor, most: Tensor) -> Tensor:
    """Bound of what rounding the attacked file changes in each pixel whose clipped value is between least and most."""
    levels = SAVED[threat.saved][2]
    if levels is None:
        return torch.zeros_like(least)
    low, high = least * levels, most * levels
    tied = (high - 0.5).floor() >= (low - 0.5).ceil()  # a value half way between two levels is possible
    nearest = torch.maximum((low - low.round()).abs(), (high - high.round()).abs())
    return torch.where(tied, 0.5, nearest) / levels + 2.0**-24  # k / levels is rounded to float32
