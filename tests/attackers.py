"""Defects of real files, an attacker who searches gamma, and how near to what is found the bounds come."""

import numpy as np
import torch
from torch import nn

from gsmooth_lightning.error import InverseBound, chords
from gsmooth_lightning.error.base import defect_norms, pair_norms
from gsmooth_lightning.error.interval import interval_defects
from gsmooth_lightning.error.inverse import inverse_norms, sources
from gsmooth_lightning.preprocess import DiscVignette, GaussianLowPass, LowPass, Preprocess
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Rotation
from plans import finish

TIGHT = {
    "low-pass": [DiscVignette(), LowPass(5)],
    "blur": [DiscVignette(), GaussianLowPass(1.5)],
}
"""Filters with which intervals are tight."""


def case(transform, limit, interpolation="bilinear", steps=(), saved="8bit", sigma=0.5, law=None):
    """A smoothed classifier without a network worth the name, and the threat of its transformation."""
    psi, noise = transform(interpolation), Gaussian(sigma)
    smoothed = SmoothedClassifier(
        nn.Flatten(), 10, psi, Preprocess(list(steps)), Gaussian(law or limit), noise, block=8
    )
    return smoothed.eval(), TransformationThreat(transform(interpolation), -limit, limit, saved=saved)


def whole(smoothed, x):
    return torch.ones(1, *smoothed.encoded_shape(x), dtype=torch.bool)


def bound(smoothed, threat, x, theta, masks=None, **options):
    """`chord_norms` to its end, (n, parts)."""
    masks = whole(smoothed, x) if masks is None else masks
    return finish(chords.chord_norms(smoothed, threat, x, theta, masks, **options))


def draws(smoothed, n=3, seed=0):
    """Angles of the law, and one far in its tail."""
    random = np.random.default_rng(seed).normal(size=(n, smoothed.transform.dim))
    random[-1] *= 4
    return torch.tensor(random) * smoothed.law.sigma


def step_norms(smoothed, masks):
    """The step of the grid that `pair_norms` adds for the place of a row in its batch, (parts,)."""
    return torch.cat([smoothed.noise.gauge(mask[None] / smoothed.levels) for mask in masks])


def defects(smoothed, threat, x, theta, gammas, masks=None):
    """Defects of real files, (theta, gamma, parts), without the step that `pair_norms` adds for the batch."""
    masks = whole(smoothed, x) if masks is None else masks
    files = threat.apply(x.expand(len(gammas), *x.shape), gammas.float())
    pairs = files.repeat(len(theta), 1, 1, 1), gammas.float().double().repeat(len(theta), 1)
    norms = pair_norms(smoothed, x, *pairs, theta.repeat_interleave(len(gammas), 0), masks)
    return norms.view(len(theta), len(gammas), len(masks)) - step_norms(smoothed, masks)


def attack(smoothed, threat, x, theta, masks=None, points=41):
    """The largest defects found, (n, parts): a grid with the ends, whole numbers and halves of gamma and theta + gamma
    and their neighbours, then nearer and nearer to the worst."""
    dim = theta.shape[1]
    low, high = (torch.tensor(ends, dtype=torch.float64) for ends in (threat.lows, threat.highs))
    side = points if dim == 1 else max(3, round(points ** (1 / dim)))
    axes = [torch.linspace(0, 1, side, dtype=torch.float64)] * dim
    gammas = low + (high - low) * torch.cartesian_prod(*axes).reshape(-1, dim)
    lines = torch.cat([torch.arange(-2, 2.5, 0.5, dtype=torch.float64)[:, None] - t for t in (0 * theta[:1], *theta)])
    lines = torch.cat([lines - 1e-6, lines, lines + 1e-6])
    gammas = torch.cat([gammas, lines.clamp(low, high).unique(dim=0)])
    best, random = torch.zeros(len(theta), 1, dtype=torch.float64), torch.Generator().manual_seed(7)
    for reach in (0.05, 0.005, 0.0005):
        found = defects(smoothed, threat, x, theta, gammas, masks)
        best = torch.maximum(best, found.amax(1))
        near = gammas[found.amax((0, 2)).topk(6).indices].repeat(6, 1)
        moved = near + reach * (high - low) * torch.randn(near.shape, generator=random, dtype=torch.float64)
        gammas = torch.minimum(torch.maximum(moved, low), high)
    return torch.maximum(best, defects(smoothed, threat, x, theta, gammas, masks).amax(1))


# ---------------------------------------------------------------- how near bounds come


def chords_are_near(x):
    """Within 1.5 of what a dense search finds, with the low-pass that is used for real images."""
    smoothed, threat = case(Rotation, 5.0, steps=[DiscVignette(), LowPass(5)], law=15.0)
    theta = draws(smoothed, 4)
    found, proved = attack(smoothed, threat, x, theta), bound(smoothed, threat, x, theta)
    assert (proved >= found).all()
    slack = 1.25 * len(x) ** 0.5 * x.shape[1] / 255  # the worst rounding of a file: half a step a pixel, over sigma
    assert (proved <= 1.2 * found + slack).all()
    assert proved.max() <= 1.5 * found.max()


def intervals_are_tight(x, steps):
    """Every gamma in +-30 degrees, within a tenth of a search, in some hundred pieces."""
    smoothed, threat = case(Rotation, 30.0, steps=steps, sigma=1.0)
    theta = torch.tensor([[23.7], [-7.3]]).double()
    dense = defects(smoothed, threat, x, theta, threat.parameters(301)[0].double()).amax((1, 2))
    proved = interval_defects(smoothed, threat, x, theta, pieces=2000)
    assert (dense <= proved).all()
    assert (proved <= 1.15 * dense).all()


def inverse_is_tight(x, gamma):
    """Rotations by up to 30 degrees, disc and low-pass, 8 bits: the bound's quantiles are at most 1.5 times those of
    the true image's largest defect over gamma, for which one must know it; all but a degree is excluded."""
    smoothed, threat = case(Rotation, 30.0, steps=[DiscVignette(), LowPass(5)])
    theta = torch.from_numpy(np.random.default_rng(0).normal(0, 30, (64, 1)))
    searched, default = torch.linspace(-30, 30, 25)[:, None], InverseBound()
    file = threat.apply(x[None], torch.tensor([[gamma]]))[0]
    found = sources(threat, file, default.pieces, default.splits, default.refinements)
    assert (found.high - found.low).sum() < 1
    proved = inverse_norms(smoothed, file, found, theta).numpy()
    files = threat.apply(x.expand(25, *x.shape), searched)
    dense = defect_norms(smoothed, x, files, searched, theta, whole(smoothed, x)).numpy()[:, 0]
    own = defect_norms(smoothed, x, file[None], torch.tensor([[gamma]]), theta, whole(smoothed, x)).numpy()[:, 0]
    assert (own <= proved).all()
    for q in (0.5, 0.9, 1.0):
        assert np.quantile(proved, q) < 1.5 * np.quantile(dense, q)
