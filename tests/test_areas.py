"""Certified areas in reports: ellipsoids as radii, accuracy against area, and the line that no run covers."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.curves import AXIS, blanket, by_area, certified_accuracy, chosen, tradeoff
from gsmooth_lightning.report.figures import area_figure


def record(label=0, prediction=0, radius=0.2, area=-5.0, axis=0.4, votes=(9, 1, 0), **details):
    """A certificate with an ellipsoid, or without one where the radius is 0, as the certifiers leave it."""
    ellipsoid = {"region": {"area": area, "axis_mean": axis, "axis_least": radius, "axis_largest": 2 * axis}}
    return {
        "label": label,
        "prediction": prediction,
        "radius": radius,
        "unit": "l2",
        "selection": list(votes),
        "details": (ellipsoid if radius else {}) | details,
    }


# ---------------------------------------------------------------- by_area


def test_the_radius_becomes_the_mean_axis():
    records = [record(), record(prediction=-1, radius=0.0), record(label=1, axis=0.7), record(axis=0.3)]
    found = by_area(records)
    assert [r["radius"] for r in found] == [0.4, 0.0, 0.7, 0.3]
    assert {r["unit"] for r in found} == {AXIS}
    assert certified_accuracy(found, [0.0, 0.35, 0.5])[0].tolist() == [0.5, 0.25, 0.0]
    assert [r["radius"] for r in records] == [0.2, 0.0, 0.2, 0.2]  # the store's own are left alone


def test_a_radius_without_an_ellipsoid_is_refused():
    """Of other noise and threats; and of logs, which have no details."""
    bare = record()
    bare["details"] = {}
    for wrong in (bare, {"label": 0, "prediction": 0, "radius": 0.1, "unit": "l2"}):
        with pytest.raises(RequestError, match="area=true is for certificates of Gaussian pixel noise"):
            by_area([record(), wrong])


# ---------------------------------------------------------------- tradeoff


def test_the_area_is_of_what_is_right_and_certified_the_accuracy_of_all():
    """A wrong certificate, an abstention and an empty region count for the accuracy of the most votes alone."""
    records = [
        record(area=-5.0),
        record(area=-3.0, label=2, prediction=2, votes=(0, 1, 9)),
        record(area=100.0, label=1),  # certified for another class
        record(prediction=-1, radius=0.0, votes=(4, 3, 3)),  # abstains, most votes are right
        record(label=1, prediction=-1, radius=0.0, votes=(4, 3, 3)),
        record(radius=0.0, votes=(9, 1, 0)),  # right, and certified nowhere but at the input
    ]
    area, accuracy = tradeoff(records)
    assert area == -4.0
    assert accuracy == 4 / 6


def test_without_a_certificate_there_is_no_area():
    assert tradeoff([record(prediction=-1, radius=0.0, votes=(0, 0, 0))]) == (-math.inf, 0.0)


def test_a_remembered_region_chooses_its_class():
    assert chosen(record(prediction=2, votes=(0, 0, 0), recalled=True)) == 2
    assert chosen(record(prediction=2, votes=(5, 4, 0))) == 0
    assert chosen(record(prediction=-1, votes=(0, 0, 0))) == -1


# ---------------------------------------------------------------- blanket


def test_the_blanket_of_the_paper():
    """A point goes where others of larger accuracy lie to its left and right; the ends and the peak stay."""
    peak, left, right, covered, tail = (-3.0, 0.9), (-5.0, 0.8), (-1.0, 0.7), (-2.0, 0.6), (1.0, 0.2)
    points = [covered, tail, right, peak, left]
    assert blanket(points) == [left, peak, right, tail]
    assert blanket([]) == []
    assert blanket([peak]) == [peak]


def covers(points, point) -> bool:
    """Section B.1: more accurate points, not all on one side of this one's area."""
    better = [a for a, accuracy in points if accuracy > point[1]]
    return bool(better) and min(better) <= point[0] <= max(better)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-20, 20), st.integers(0, 1000)), min_size=1, max_size=12, unique_by=lambda p: p[1]
    ).flatmap(st.permutations)
)
def test_the_blanket_keeps_what_no_more_accurate_points_enclose(points):
    """Accuracies are different: the order of equals is a convention. The order of the points does not count."""
    kept = blanket([(float(a), float(b)) for a, b in points])
    assert kept == sorted((float(a), float(b)) for a, b in points if not covers(points, (a, b)))
    heights = [accuracy for _, accuracy in kept]  # up to the peak, and down
    top = heights.index(max(heights))
    assert all(a <= b for a, b in itertools.pairwise(heights[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(heights[top:]))


def test_equal_points_and_equal_accuracies():
    """Points of one accuracy cover none of each other; one that is there twice, or below another, is covered."""
    plateau = [(0.0, 0.5), (1.0, 0.5), (2.0, 0.5)]
    assert blanket(plateau[::-1]) == blanket(plateau) == plateau
    assert blanket([(0.0, 0.5), (0.0, 0.5)]) == [(0.0, 0.5)]
    assert blanket([(0.0, 0.5), (0.0, 0.9)]) == [(0.0, 0.9)]


# ---------------------------------------------------------------- the picture


def run(areas, axis_ratio):
    """A run of isotropic noise (ratio 1) or not."""
    records = []
    for area in areas:
        own = record(area=area)
        own["details"]["region"] |= {"axis_least": 0.2, "axis_largest": 0.2 * axis_ratio}
        records.append(own)
    return records


def test_the_picture_tells_isotropic_noise_from_the_rest():
    runs = {"a": run([-5, -4], 1.0), "b": run([-3], 1 + 1e-9), "c": run([-2, -1], 1.5), "d": run([-1], 2.0)}
    (axes,) = area_figure(runs).axes
    lines = {line.get_label(): line.get_xdata() for line in axes.lines if not line.get_label().startswith("_")}
    np.testing.assert_allclose(sorted(lines["isotropic"]), [-4.5, -3])
    np.testing.assert_allclose(sorted(lines["not isotropic"]), [-1.5, -1])
