"""What contrast and brightness together do to a Gaussian law of their parameters (TSS; theory.md section 4).

psi(x, (k, b)) = e^k (x + b). An attack (k, b) moves (K, B) ~ N(0, diag(s_k^2, s_b^2)) to (K + k, b + e^-k B): to
N((k, b), diag(s_k^2, e^-2k s_b^2)), which is no shift. `neyman_pearson` bounds what is left at one point as exactly as
wanted; `contrast_brightness_transfer` has closed forms that hold for boxes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from torch import Tensor

from gsmooth_lightning.smoothing.neyman_pearson import neyman_pearson


def contrast_brightness_transfer(
    p: ArrayLike, low: Sequence[float], high: Sequence[float], sigma: tuple[float, float]
) -> np.ndarray:
    """A lower bound of Q(A) over all attacks (k, b) between low and high, for events of probability p.

    Two steps, change of variance and shift, in both orders; each order is a valid bound, so the larger counts. The
    change of variance costs most at the ends of the range of k, on either side of 0. The shift costs
    hypot(k / s_k, b / (e^-k s_b)) when it comes second, which on k <= 0 is largest at the end in k / s_k and at 0 in
    e^k, and hypot(k / s_k, b / s_b) when it comes first.

    Args:
        p: probabilities.
        low, high: (k, b) ends of the range; 0 lies between them.
        sigma: (s_k, s_b).
    """
    b = max(-low[1], high[1])
    sides = []
    for k in (low[0], high[0]):
        variance_first = _shifted(_rescaled(p, k), np.hypot(k / sigma[0], b * np.exp(max(k, 0.0)) / sigma[1]))
        shift_first = _rescaled(_shifted(p, np.hypot(k / sigma[0], b / sigma[1])), k)
        sides.append(np.maximum(variance_first, shift_first))
    return np.minimum(*sides)


def _shifted(p: ArrayLike, size: float) -> np.ndarray:
    """Phi(z(p) - size)."""
    return ndtr(ndtri(p) - size)


def _rescaled(p: ArrayLike, k: float) -> np.ndarray:
    """What a change of B's standard deviation from s_b to e^-k s_b leaves: 2 Phi(e^k z((1+p)/2)) - 1 for k <= 0, where
    the middle becomes rare, and 2 - 2 Phi(e^k z(1 - p/2)) for k >= 0, where the tails do."""
    if k <= 0:
        return 1 - 2 * ndtr(np.exp(k) * ndtri((1 - np.asarray(p)) / 2))
    return 2 * ndtr(np.exp(k) * ndtri(np.asarray(p) / 2))


def contrast_brightness_point(
    p: ArrayLike, k: float, b: float, sigma: tuple[float, float], tolerance: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """(T(p), error) at one attack (k, b): the exact Neyman-Pearson value by quadrature (see `neyman_pearson`)."""
    scale = torch.tensor(sigma, dtype=torch.float64)
    centre, moved = torch.tensor([k, b], dtype=torch.float64), scale * torch.tensor([1.0, np.exp(-k)])

    def normal(z: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        return -((z - mean) / sd).square().sum(1) / 2 - torch.log(sd * np.sqrt(2 * np.pi)).sum()

    edges = [
        np.linspace(min(-9 * s, m - 9 * t), max(9 * s, m + 9 * t), 65)
        for s, t, m in zip(scale.tolist(), moved.tolist(), centre.tolist(), strict=True)
    ]
    return neyman_pearson(
        lambda z: normal(z, centre * 0, scale), lambda z: normal(z, centre, moved), p, edges, tolerance
    )


def contrast_brightness_contains(pa: float, shifts: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Which attacks (k, b), (n, 2), lie in the exact Neyman-Pearson region T(pA) > 1/2, (n,) bool; rounded inwards.

    It contains what `contrast_brightness_transfer` certifies: at pA = .99 and sigma = .2 brightness by .428 instead of
    .387 at contrast 1.2, by .408 instead of .349 at contrast .8 (theory.md section 4).
    """
    points = (contrast_brightness_point(pa, float(k), float(b), sigma) for k, b in shifts)
    return torch.tensor([bool(value - error > 0.5) for value, error in points])
