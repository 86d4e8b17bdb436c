"""How far an attack moves an image from the middle of a slice of its parameters."""

import itertools
import math

import torch
from torch import Tensor

from gsmooth_lightning.error.chords import ROUNDED, clip_kinks
from gsmooth_lightning.preprocess import is_linear, lipschitz, visible
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Function, Mover, Transform

REPEATED = 2.0**-20
"""By how much a pixel between 0 and 1 may differ between two batches."""

NODES = 5
"""Points of a slice along each axis at which the movement is computed."""


@torch.inference_mode()
def movements(
    smoothed: SmoothedClassifier, threat: TransformationThreat, first: Transform, x: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """||P(file(psi(x, gamma))) - P(psi(x, middle))||_2 <= moved + fixed over gamma in slices low, high, (k, dim):
    (k, 2) float64, the second being what files and floats round, and threat.l2.

    P is the classifier's preprocessing and rounding, psi the transformation `first` that is covered. The norm is
    bounded, and from the slice's middle (theory.md section 8).
    """
    seen, scale = visible(smoothed.preprocess, x), lipschitz(smoothed.preprocess)
    steps = ROUNDED * math.sqrt(math.prod(smoothed.encoded_shape(x))) / smoothed.levels  # of the noise grid
    moved = rounded = torch.zeros(len(low), dtype=torch.float64, device=x.device)
    if torch.equal(low, high):
        if first is not threat.transform:  # otherwise the files themselves are in the middle
            rounded = rounded + REPEATED * math.sqrt(x.numel())
    elif isinstance(first, Function):
        middle = ((low + high) / 2).float().double()  # which psi is given
        half = torch.maximum(high - middle, middle - low)
        moved = scale * first.movement(x, middle - half, middle + half)
        rounded = (saved_error(threat, torch.zeros_like(x), torch.ones_like(x)) * seen).norm().expand_as(moved)
    else:
        assert isinstance(first, Mover)
        moved, least, most = between_nodes(smoothed, threat, first, x, low, high, seen)
        rounded = (saved_error(threat, least, most) * seen).flatten(2).norm(dim=2).amax(1)
    return torch.stack([moved, scale * (threat.l2 + rounded) + steps], 1)


def between_nodes(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    mover: Mover,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    seen: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(bound of ||P(clip(psi(x, gamma))) - P(psi(x, middle))||_2, (k,); least and largest value of each pixel of
    clip(psi(x, gamma)) next to each node, (k, boxes, c, h, w)).

    Between the nodes of a grid psi(x, gamma) lies between its corners' images up to its departure. Where P is linear,
    the norm is largest at a node; otherwise each pixel counts by itself.
    """
    k, dim = low.shape
    scale, middles = lipschitz(smoothed.preprocess), middle_images(threat, mover, x, low, high)
    grid = torch.cartesian_prod(*[torch.arange(NODES, device=x.device)] * dim).view(-1, dim)
    between = grid[(grid < NODES - 1).all(1)]  # the lower corners of the boxes between nodes, (boxes, dim)
    parameters = low[:, None] + (high - low)[:, None] * grid / (NODES - 1)
    images = mover(x.expand(k * len(grid), *x.shape), parameters.flatten(0, 1).float()).view(k, len(grid), *x.shape)
    offsets = (torch.tensor(bits, device=x.device) for bits in itertools.product((0, 1), repeat=dim))
    corners = torch.stack([images[:, _place(between + offset)] for offset in offsets])
    first, last = (parameters[:, _place(between + offset)].flatten(0, 1) for offset in (0, 1))
    away = mover.departure(x, first, last).view(k, len(between), *x.shape) + clip_kinks(threat, corners)
    images, corners = threat.clip(images), threat.clip(corners)
    least, most = corners.amin(0) - away, corners.amax(0) + away
    if is_linear(smoothed.preprocess):
        apart = smoothed.preprocess((images - middles[:, None]).flatten(0, 1))
        at_nodes = apart.double().flatten(1).norm(dim=1).view(k, -1).amax(1) * (1 + 1e-6)
        moved = at_nodes + scale * (away * seen).flatten(2).norm(dim=2).amax(1)
    else:
        apart = torch.maximum(most - middles[:, None], middles[:, None] - least)
        moved = scale * (apart * seen).flatten(2).norm(dim=2).amax(1) * (1 + 1e-6)
    return moved, least, most


def middle_images(threat: TransformationThreat, first: Transform, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """psi(x, middle) of slices, clipped but not rounded as files are: (k, c, h, w). Of parameters that are listed, the
    files themselves."""
    images, middle = x.expand(len(low), *x.shape), ((low + high) / 2).float()
    if torch.equal(low, high) and first is threat.transform:
        return threat.apply(images, middle)
    return threat.clip(first(images, middle))


def _place(nodes: Tensor) -> Tensor:
    """Index of nodes of the grid, (n, dim) -> (n,)."""
    return (nodes * NODES ** torch.arange(nodes.shape[1] - 1, -1, -1, device=nodes.device)).sum(1)


def saved_error(threat: TransformationThreat, least: Tensor, most: Tensor) -> Tensor:
    """Bound of what rounding the attacked file changes in each pixel whose clipped value is between least and most."""
    if threat.levels is None:
        return torch.zeros_like(least)
    low, high = least * threat.levels, most * threat.levels
    tied = (high - 0.5).floor() >= (low - 0.5).ceil()  # a value half way between two levels is possible
    nearest = torch.maximum((low - low.round()).abs(), (high - high.round()).abs())
    return torch.where(tied, 0.5, nearest) / threat.levels + 2.0**-24  # k / levels is rounded to float32
