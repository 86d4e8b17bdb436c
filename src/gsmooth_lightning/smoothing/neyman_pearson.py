"""The transfer function between any two laws by quadrature: fallback without a closed form, oracle with one.

T(p) = inf Q(A) over [0,1]-valued tests A of P-mass p is a linear program (Neyman-Pearson). On a mesh of cells, filling
them in order of their likelihood ratio q/p, the last in part, is one test: it bounds T from above. Every lambda >= 0
bounds it from below, T(p) >= lambda p - int (lambda P - Q)_+, where a cell's integral is at most that of the chord over
the range of its likelihood ratio. The bounds differ in the cells that the level lambda crosses; those are split until
the bounds meet. Plateaus of the ratio (atoms) cost nothing: a randomised test fills them in part.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing.base import Law

NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)

WIDEN = 0.05
"""A cell's ratios range a little beyond those at its nodes, which reach 96 % of the way to its sides."""

ROUNDING = 1e-12
"""Of the sums over the cells, relative to the masses."""

MOST_CELLS = 200_000

LogDensity = Callable[[Tensor], Tensor]


@dataclass
class Mesh:
    """Boxes with their masses under P and Q, and the least and most of the likelihood ratio in each."""

    low: np.ndarray  # (n, d)
    high: np.ndarray  # (n, d)
    clean: np.ndarray  # (n,)
    attacked: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        return self.attacked / np.maximum(self.clean, 1e-300)

    def __getitem__(self, which: np.ndarray) -> "Mesh":
        return Mesh(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def __add__(self, other: "Mesh") -> "Mesh":
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Mesh(*(np.concatenate(pair) for pair in pairs))


def neyman_pearson(
    clean: LogDensity, attacked: LogDensity, p: ArrayLike, edges: Sequence[np.ndarray], tolerance: float = 1e-8
) -> tuple[np.ndarray, np.ndarray]:
    """(T(p), error): |value - T(p)| <= error, between two laws P and Q of one or two coordinates.

    The error adds half the gap between the two bounds and what is missing of the two masses. It is computed in floating
    point, and takes the likelihood ratio to be smooth inside the first cells. A certificate uses value - error.

    Args:
        clean, attacked: log-densities of P and Q, (n, d) float64 -> (n,), constants included.
        p: probabilities under P, of any shape.
        edges: for each coordinate, the edges of the first cells: they cover both laws and contain every kink of both.
        tolerance: at which gap between the bounds to stop.

    Raises:
        RequestError: not one or two coordinates, or p outside [0, 1].
    """
    probabilities = np.asarray(p, dtype=float)
    if len(edges) not in (1, 2):
        raise RequestError(f"the quadrature takes one or two coordinates, got {len(edges)}; use a closed form for more")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise RequestError(f"probabilities must lie between 0 and 1, got {probabilities}")
    corners = [list(itertools.product(*(side[ends] for side in edges))) for ends in (slice(0, -1), slice(1, None))]
    mesh = _measure(clean, attacked, *(np.array(corner, dtype=float) for corner in corners))
    values, errors = np.empty(probabilities.size), np.empty(probabilities.size)
    for i, probability in enumerate(probabilities.flat):
        while True:
            below, above, level, gaps = _bounds(mesh, probability)
            open_cells = gaps > tolerance / 2 / max(1, int((gaps > 0).sum()))
            if above - below <= tolerance or len(mesh.clean) > MOST_CELLS or not open_cells.any():
                break
            mesh = mesh[~open_cells] + _split(clean, attacked, mesh[open_cells])
        missing = level * abs(1 - mesh.clean.sum()) + abs(1 - mesh.attacked.sum())
        values[i] = (below + above) / 2
        errors[i] = abs(above - below) / 2 + missing + ROUNDING * (1 + level)
    return values.reshape(probabilities.shape), errors.reshape(probabilities.shape)


def transfer_of(
    law: Law, shift: Sequence[float], p: ArrayLike, tolerance: float = 1e-8, cells: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """`neyman_pearson` between a law and its shift, (d,) numbers; `cells` first cells a coordinate, split at kinks."""
    low, high = law.span
    edges = []
    for move in shift:
        even = np.linspace(low + min(move, 0), high + max(move, 0), cells + 1)
        kinks = np.array(law.kinks)
        edges.append(np.unique(np.concatenate([even, kinks, kinks + move])))
    delta = torch.tensor(shift, dtype=torch.float64)
    return neyman_pearson(law.log_density, lambda z: law.log_density(z - delta), p, edges, tolerance)


def _measure(clean: LogDensity, attacked: LogDensity, low: np.ndarray, high: np.ndarray) -> Mesh:
    """Masses and ranges of boxes by the Gauss-Legendre product rule."""
    dim = low.shape[1]
    nodes = np.array(list(itertools.product(NODES, repeat=dim)))  # (k, d)
    weights = np.prod(list(itertools.product(WEIGHTS / 2, repeat=dim)), axis=1)
    points = torch.from_numpy(((low + high)[:, None] + (high - low)[:, None] * nodes) / 2).reshape(-1, dim)
    log_p, log_q = (law(points).numpy().reshape(len(low), -1) for law in (clean, attacked))  # (n, k)
    volume = (high - low).prod(1)
    inside = log_p > -np.inf
    ratio = np.exp(np.clip(log_q - np.where(inside, log_p, 0.0), None, 700.0))
    least = np.where(inside, ratio, np.inf).min(1)
    most = np.where(inside, ratio, -np.inf).max(1)
    empty = ~inside.any(1)
    least[empty] = most[empty] = 0.0
    margin = WIDEN * (most - least)
    return Mesh(
        low,
        high,
        volume * (np.exp(log_p) @ weights),
        volume * (np.exp(log_q) @ weights),
        np.maximum(least - margin, 0.0),
        most + margin,
    )


def _split(clean: LogDensity, attacked: LogDensity, mesh: Mesh) -> Mesh:
    """Every box halved along every coordinate."""
    half = (mesh.high - mesh.low) / 2
    places = np.array(list(itertools.product((0.0, 1.0), repeat=half.shape[1])))[:, None]
    low = (mesh.low + half * places).reshape(-1, half.shape[1])
    high = np.where(places == 1, mesh.high, mesh.low + half).reshape(low.shape)
    return _measure(clean, attacked, low, high)


def _bounds(mesh: Mesh, p: float) -> tuple[float, float, float, np.ndarray]:
    """(lower, upper, lambda, what each cell adds to their difference)."""
    ratio = np.where(mesh.clean > 0, mesh.ratio, np.inf)
    order = np.argsort(ratio, kind="stable")
    filled = np.concatenate([[0.0], np.cumsum(mesh.clean[order])])
    above = float(np.interp(p, filled, np.concatenate([[0.0], np.cumsum(mesh.attacked[order])])))
    last = int((mesh.clean > 0).sum()) - 1
    level = float(ratio[order[min(max(int(np.searchsorted(filled, p)) - 1, 0), last)]])

    width = mesh.most - mesh.least
    at = np.clip((mesh.ratio - mesh.least) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    chord = (1 - at) * np.maximum(level - mesh.least, 0) + at * np.maximum(level - mesh.most, 0)
    loss = np.maximum(level - mesh.ratio, 0)
    gaps = np.where(width > 0, mesh.clean * np.maximum(chord - loss, 0), 0.0)
    return max(level * p - float((mesh.clean * loss).sum() + gaps.sum()), 0.0), above, level, gaps
