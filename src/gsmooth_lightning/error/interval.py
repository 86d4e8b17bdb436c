"""The largest defect over all gamma by interval analysis: the threat's box is split, each piece is bounded, and the
worst are refined (Balunovic et al. 2019; Fischer et al. 2020, section 5; the SPT slides' second variant)."""

import math

import torch
from torch import Tensor, nn

from gsmooth_lightning.error.base import pair_norms
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.interval import check_interpolation, outward_norm, warp_range
from gsmooth_lightning.preprocess import CenterCrop, DiscVignette, GaussianLowPass, RectangleVignette, lipschitz
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Additive
from gsmooth_lightning.transform.geometric import Warp

POSITIVE = (DiscVignette, RectangleVignette, CenterCrop, GaussianLowPass)
"""Steps that are linear without negative weights: the interval of their output is that of the interval's ends."""

FLOAT = 2.0**-21
"""Rounding of a value that grid_sample computes in float32 at an exactly known position, over the largest pixel: four
weights, each a product of two, and three sums, come to four units of 2^-24 of it."""

NUMBERS = 2**17
"""Pixels of the images that are bounded at once."""

PARTS = 8
"""Into how many a piece is split at most."""


@torch.inference_mode()
def interval_defects(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    x: Tensor,
    theta: Tensor,
    ceiling: float | None = None,
    tolerance: float = 0.1,
    pieces: int = 4096,
) -> Tensor:
    """Upper bounds of max over gamma of ||P psi(file(psi(x, gamma)), theta) - P psi(x, gamma + theta)||, (n,) float64,
    in units of the noise: for every real gamma in the threat's box, P the classifier's preprocessing and rounding.

    For a piece of the box each pixel comes from a box of positions, so that psi(x, gamma), its file, what theta makes
    of it, and psi(x, gamma + theta) are intervals. Their difference passes through the steps of P that have no negative
    weights as an interval; through other linear steps, such as a low-pass, goes its centre, and of its half width only
    the norm times the step's Lipschitz constant; through any other step the norm of the whole. One step of the grid is
    added at every pixel for the rounding.

    The worst pieces are split until a theta's bound is at most `ceiling`, or within `tolerance` of the largest defect
    found in the middle of a piece, or `pieces` were tried; the bound holds in any case. A theta with a defect beyond
    `ceiling` is given up at once.

    Args:
        x: clean image as prepared by the threat, (c, h, w).
        theta: (n, dim) float64, rounded to float32 by the classifier only after it is resolved.
        ceiling: what a bound should not exceed, in units of the noise; None: as small as `tolerance` asks.
        tolerance: relative; with 0 and a ceiling, each theta is refined down to the ceiling.
        pieces: tried for each theta, roughly.

    Raises:
        UncertifiableError: a transformation, interpolation or preprocessing that intervals do not pass through.
    """
    check_intervals(smoothed, threat)
    rows = max(1, NUMBERS // x.numel())
    n, dim = theta.shape
    theta, images = theta.double(), x[None].double()
    owner = torch.arange(n, device=x.device)
    low, high = (theta.new_tensor(ends).expand(n, dim) for ends in (threat.lows, threat.highs))
    pool = tuple(part[:0] for part in (owner, low, high, theta[:, 0], theta[:, 0]))
    least, tried = theta.new_zeros(n), theta.new_zeros(n)
    while True:
        parts = zip(owner.split(rows), low.split(rows), high.split(rows), strict=True)
        bounded = [_piece_bounds(smoothed, threat, images, theta[o], a, b) for o, a, b in parts]
        new = owner, low, high, *map(torch.cat, zip(*bounded, strict=True))
        least = least.scatter_reduce(0, owner, new[4], "amax")
        tried = tried.scatter_add(0, owner, torch.ones_like(new[4]))
        pool = tuple(torch.cat(both) for both in zip(pool, new, strict=True))
        owner, low, high, bound, found = pool
        worst = least.new_zeros(n).scatter_reduce(0, owner, bound, "amax")
        goal = (least * (1 + tolerance)).clamp_min(ceiling or 0.0)
        open_ = (worst > goal) & (tried < pieces) & (least <= (math.inf if ceiling is None else ceiling))
        if not open_.any():
            return worst
        excess = torch.where(open_[owner], bound / goal[owner], 0.0)
        most, chosen = excess.topk(min(max(1, rows // 4), len(excess)))
        chosen = chosen[most > 1]
        want = (bound - found)[chosen] / (goal[owner[chosen]] - found[chosen])
        owner, low, high = _split(owner[chosen], low[chosen], high[chosen], want.ceil().clamp(2, PARTS).long())
        kept = torch.ones_like(excess, dtype=torch.bool).index_fill(0, chosen, False)
        pool = tuple(part[kept] for part in pool)


def check_intervals(smoothed: SmoothedClassifier, threat: TransformationThreat) -> None:
    """Refuses transformations and preprocessing through which intervals do not pass.

    Raises:
        UncertifiableError: see `interval_defects`.
    """
    for transform in (smoothed.transform, threat.transform):
        if not (isinstance(transform, Warp) and isinstance(transform, Additive)):
            raise UncertifiableError(
                f"no intervals are known of {transform.name}; use rotation, translation, scaling or shear, or search "
                "the defect at sampled parameters"
            )
        check_interpolation(transform.interpolation, transform.padding)
    if not isinstance(smoothed.noise, Gaussian) or smoothed.noise.cholesky is not None:
        raise UncertifiableError(
            "the defect is measured in units of Gaussian noise, with one sigma a pixel or one for all; use "
            "noise=gaussian"
        )
    for step in steps_of(smoothed):
        if type(step) not in POSITIVE and not math.isfinite(lipschitz(step)):
            raise UncertifiableError(
                f"the preprocessing step {type(step).__name__} states no Lipschitz constant, and intervals do not pass "
                "through it; leave it out, or search the defect at sampled parameters"
            )


def steps_of(smoothed: SmoothedClassifier) -> list[nn.Module]:
    steps = smoothed.preprocess
    return [s for s in (steps if isinstance(steps, nn.Sequential) else [steps]) if type(s) is not nn.Identity]


def _piece_bounds(
    smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, theta: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """A bound for each piece of gammas between low and high, (k, dim), and the defect in its middle, (k,) each."""
    mine, theirs = smoothed.transform, threat.transform
    assert isinstance(mine, Warp)
    assert isinstance(theirs, Warp)
    h, w = x.shape[-2:]
    peak = float(x.abs().max())
    attacked = warp_range(x, x, theirs.boxes(low, high, h, w), theirs.interpolation)
    least, most = (threat.save(v) for v in widen(*attacked, FLOAT * peak))  # saving is monotone
    turned = warp_range(least, most, mine.boxes(theta, theta, h, w), mine.interpolation)
    straight = warp_range(x, x, mine.boxes(low + theta, high + theta, h, w), mine.interpolation)
    sums = (h + w + 6) * 2.0**-23 * len(steps_of(smoothed))  # a step may sum over a row and a column in float32
    a, b = (widen(*ends, (FLOAT + sums) * peak) for ends in (turned, straight))
    bound = encoded_norm(smoothed, a[0] - b[1], a[1] - b[0])
    middle = ((low + high) / 2).float().double()
    one = x[0].float()
    files = threat.save(theirs(one.expand(len(theta), *one.shape), middle.float()))
    whole = torch.ones(1, *smoothed.encoded_shape(one), device=x.device)
    return bound, pair_norms(smoothed, one, files, middle, theta, whole)[:, 0]


def widen(low: Tensor, high: Tensor, by: float) -> tuple[Tensor, Tensor]:
    """Wider by so much on both sides, except where only 0 lies between: black is computed exactly."""
    by_pixel = by * ((low != 0) | (high != 0))
    return low - by_pixel, high + by_pixel


def encoded_norm(smoothed: SmoothedClassifier, low: Tensor, high: Tensor) -> Tensor:
    """Largest norm, in units of the noise, of what preprocessing and rounding make of defects between low and high."""
    noise, steps = smoothed.noise, steps_of(smoothed)
    assert isinstance(noise, Gaussian)
    most = 1 / float(noise.sigma.min())  # a norm in units of the noise, over the norm
    one_step = noise.gauge(torch.ones(1, *smoothed.encoded_shape(low[0].float()), device=low.device) / smoothed.levels)
    middle, half, apart = (low + high) / 2, (high - low) / 2, low.new_zeros(len(low))
    for i, step in enumerate(steps):
        if type(step) in POSITIVE:
            middle, half = step(middle), step(half)
        elif getattr(step, "linear", False):
            apart = (apart + outward_norm(half, half)) * lipschitz(step)
            middle = step(middle)
            half = torch.zeros_like(middle)
        else:
            rest = math.prod(map(lipschitz, steps[i:]))
            reach = middle.abs() + half
            return (outward_norm(reach, reach) + apart) * (rest * most) + one_step
    return noise.gauge(middle.abs() + half) * (1 + 1e-12) + apart * most + one_step


def _split(owner: Tensor, low: Tensor, high: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces cut into so many equal parts, (k,) each, along their longest side."""
    which = torch.arange(len(parts), device=parts.device).repeat_interleave(parts)
    place = torch.arange(len(which), device=parts.device) - (parts.cumsum(0) - parts)[which]
    owner, low, high, total = owner[which], low[which], high[which], parts[which].to(low.dtype)
    longest = nn.functional.one_hot((high - low).argmax(1), low.shape[1]).bool()
    begin, end = (low.lerp(high, (p / total)[:, None]) for p in (place, place + 1))
    return owner, torch.where(longest, begin, low), torch.where(longest, end, high)
