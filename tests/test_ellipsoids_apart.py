"""Two certified ellipsoids: whether they meet, by how much one shrinks, and what is left of one around an input."""

import math

import numpy as np
import pytest
import torch

from ellipsoids import kept, meeting, scaled
from gsmooth_lightning.certify.per_input import ROUNDING, Kept, apart, shrinkage


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_apart_is_never_wrong_and_nearly_tight(dim):
    """Ellipsoids of sizes from 1/1000 to 1000 of each other, against a convex solver: where a common point is known,
    `apart` sees none of them disjoint; 1/700 before they meet, it proves that they do not."""
    rng = np.random.default_rng(dim)
    for _ in range(60):
        one, two = (kept(rng, dim, float(np.exp(rng.uniform(-3.5, 3.5)))) for _ in range(2))
        scale, y = meeting(one, two)
        one, two = scaled(one, scale * (1 + 1e-12)), scaled(two, scale * (1 + 1e-12))
        assert one.holds(y)
        assert two.holds(y)
        assert not apart(one, two, 1.0)
        assert not apart(two, one, 1.0)
        assert apart(scaled(one, 1 / (1 + 1 / 700)), scaled(two, 1 / (1 + 1 / 700)), 1.0)


def test_regions_with_a_common_point_are_never_apart():
    """A random point of one region's surface lies on the surface of another, of any centre: no solver is needed."""
    rng = np.random.default_rng(1)
    for _ in range(400):
        dim = int(rng.integers(1, 40))
        one, two = kept(rng, dim), kept(rng, dim)
        direction = torch.from_numpy(rng.normal(size=dim))
        y = one.x + one.sigma * direction / direction.norm()
        two = Kept(two.x, two.sigma, two.gauge(y), 1)
        assert not apart(one, two, 1.0 + 1e-12)


def test_shrinkage_is_the_largest_factor():
    """The region shrunk by it meets no other, and by 1/700 it would (by the solver)."""
    rng = np.random.default_rng(2)
    shrunk = 0
    for _ in range(40):
        new = kept(rng, 3, 2.0)
        others = [one for one in (kept(rng, 3, 1.0, 1) for _ in range(6)) if not one.holds(new.x)]
        factor = shrinkage(new, others)
        assert 0 <= factor <= 1
        least = min((meeting(scaled(new, factor), other)[0] for other in others), default=2)
        assert least > 1
        if factor < 1:
            shrunk += 1
            assert least < 1 + 1 / 700
    assert shrunk > 20


@pytest.mark.parametrize("radius", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("gap", [1e-3, 0.1, 1.0])
def test_shrinkage_of_balls(radius, gap):
    """Of balls it is gap / radius, gap = distance - other radius, however small the gap or the other ball; rounded
    down."""
    zero = torch.zeros(4, dtype=torch.float64)
    new = Kept(zero, torch.ones(4, dtype=torch.float64), 2 * gap, 0)
    away = torch.tensor([radius + gap, 0, 0, 0], dtype=torch.float64)
    other = Kept(away, torch.full((4,), 0.5, dtype=torch.float64), 2 * radius, 1)
    found = shrinkage(new, [other])
    assert found <= 0.5
    assert found >= 0.5 - min(0.5, (radius + gap) / gap / 700)
    assert found * 2 * gap + radius <= radius + gap


def test_regions_of_single_points():
    """Regions of size 0 are kept out of others, and shrink no further."""
    one = torch.ones(3, dtype=torch.float64)
    point, new = Kept(0 * one, one, 0.0, 0), Kept(2 * one, one, 10.0, 1)
    factor = shrinkage(new, [point])
    assert 0.99 < factor * 10 / math.sqrt(12) < 1
    assert shrinkage(point, [scaled(new, factor / 1.01)]) == 1
    assert point.holds(point.x)
    assert not point.holds(point.x + 1e-12)
    assert shrinkage(new, []) == 1


def test_what_was_certified_is_remembered():
    """The boundary of what a record claims is inside for the memory, in spite of rounding; what `apart` keeps clear
    is more than the memory takes."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        one = kept(rng, 20, float(np.exp(rng.normal())))
        axis = int(one.sigma.argmin())
        y = one.x.clone()
        y[axis] += one.size * float(one.sigma[axis])
        assert one.holds(y)
        assert one.left(y) == 0
        assert not one.holds(one.x + (y - one.x) * (1 + 3 * ROUNDING))


def test_what_is_left_around_an_input_stays_inside():
    """The ball around a point of a region is attacked by gradient ascent, from many starts; it ends inside, and from
    a point on the shortest axis it touches the surface."""
    rng = np.random.default_rng(4)
    for aligned in [True, False] * 6:
        one = kept(rng, 5, 1.5)
        direction = torch.from_numpy(rng.normal(size=5))
        direction = (one.sigma == one.sigma.min()).double() if aligned else direction / direction.norm()
        x = one.x + one.sigma * direction * one.size * float(rng.uniform(0, 1))
        left = one.left(x)
        steps = torch.from_numpy(rng.normal(size=(64, 5)))
        for _ in range(300):  # to the farthest point in the direction of the gauge's gradient
            steps = left * steps / steps.norm(dim=1, keepdim=True)
            steps = (x + steps - one.x) / one.sigma.square()
        attacked = x + left * steps / steps.norm(dim=1, keepdim=True)
        worst = max(map(one.gauge, attacked))
        assert worst <= one.size
        if aligned:
            assert worst >= one.size * (1 - 1e-8)
