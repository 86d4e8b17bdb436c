"""Attacks on pixels without gradients, and what is refused in one sentence: requests, and attacks that fail."""

import sys

import foolbox
import pytest
import torch

from gsmooth_lightning.attack import of_foolbox, of_torchattacks, perturb
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Rotation
from pixel_attacks import CRAFTS, Halfspace, attacked, dark, grey, normals, smoothed_by

# ---------------------------------------------------------------- black boxes


@pytest.mark.parametrize("name", ["pgd", "ddn of smallest norm", "torchattacks", "foolbox"])
def test_attacks_that_need_gradients_refuse_a_black_box(name):
    x, network = dark()
    with pytest.raises(RequestError, match="image 0") as failure:
        attacked(smoothed_by(network), PixelThreat(), x, CRAFTS[name], [0.5])
    assert "\n" not in str(failure.value)


def test_attacks_on_decisions_need_no_gradients():
    """Nothing flips at 1.1, and at 1.4 both classifiers do: noise of sigma .05 moves a mean by .006."""
    x, network = dark()
    start = foolbox.attacks.LinearSearchContrastReductionAttack(steps=2)
    search = of_foolbox(foolbox.attacks.BoundaryAttack(init_attack=start, steps=40))
    found = attacked(smoothed_by(network), PixelThreat("float"), x, search, [1.1, 1.4])
    assert found.base[:3] == found.smoothed[:3] == [1, 1, 1]
    assert found.base[4] == 0
    assert 1.18 < found.distances[4] <= 1.4
    towards_grey = of_foolbox(foolbox.attacks.L2ContrastReductionAttack())
    found = attacked(smoothed_by(network), PixelThreat(), x, towards_grey, [1.1, 1.4])
    assert found.base == found.smoothed == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", ["BoundaryAttack", "HopSkipJumpAttack"])
def test_a_search_that_finds_no_start_is_no_mistake(name):
    """The classifier is drawn anew in each call, so that a start may not fool it twice; or there is none: here only
    pictures beyond .99 are of another class. The image keeps its class, and the run goes on."""
    x, network = dark()
    search = of_foolbox(getattr(foolbox.attacks, name)(steps=2))
    network.b = {"BoundaryAttack": -0.99, "HopSkipJumpAttack": -0.45}[name]
    found = attacked(smoothed_by(network), PixelThreat("float"), x, search, [1.1])
    assert found.base == found.smoothed == [1, 1, 1]


# ---------------------------------------------------------------- mistakes


def raising(kind):
    def craft(model, x, y, epsilon, box):
        raise kind("first line\nsecond line")

    return craft


FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    KeyError,
    IndexError,
    AttributeError,
    ImportError,
    OSError,
)
RETURNED = {
    "nothing": lambda x: None,
    "NaN": lambda x: x * torch.nan,
    "an array": lambda x: x.numpy(),
    "a tuple": lambda x: (x, x),
    "another size": lambda x: x[..., 1:],
    "no images": lambda x: x[:0],
    "one number an image": lambda x: x.mean((1, 2, 3)),
    "one row an image": lambda x: x[:, :, :1],
}
WRONG = {
    **{kind.__name__: raising(kind) for kind in FAILURES},
    **{name: lambda model, x, y, epsilon, box, made=made: made(x) for name, made in RETURNED.items()},
    "a function of two": lambda model, x: x,
    "as torchattacks, by foolbox": of_foolbox(lambda model: None),
    "as foolbox, by torchattacks": of_torchattacks(lambda model, x, y, epsilons: None),
    "images alone, by foolbox": of_foolbox(lambda model, x, y, epsilons: x),
}


@pytest.mark.parametrize("name", WRONG)
def test_attacks_that_fail_are_one_sentence(name):
    """That names the image and what went wrong."""
    with pytest.raises(RequestError, match="image 3") as failure:
        attacked(smoothed_by(Halfspace(normals(1, 8, 8), 0.0)), PixelThreat(), grey(), WRONG[name], [0.5], image=3)
    assert "\n" not in str(failure.value)


def test_an_attack_called_as_those_of_foolbox_without_foolbox_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    craft = of_foolbox(lambda model, x, y, epsilons: (x, x, None))
    with pytest.raises(RequestError, match="foolbox"):
        attacked(smoothed_by(Halfspace(normals(1, 8, 8), 0.0)), PixelThreat(), grey(), craft, [0.5])


@pytest.mark.parametrize("epsilons", [[], [-1], [0], [0.5, -0.1], "0.5", None, [float("nan")], ["a"], 0.5, True])
def test_epsilons_that_are_none(epsilons):
    """Refused at once, before an attack runs."""
    smoothed = smoothed_by(Halfspace(normals(1, 8, 8), 0.0))
    with pytest.raises(RequestError, match=r"attack\.epsilons must list norms above 0"):
        next(perturb(smoothed, PixelThreat(), grey(), 1, Stream(0, 0), CRAFTS["pgd"], epsilons))


def test_other_requests_that_are_refused_at_once():
    smoothed, craft = smoothed_by(Halfspace(normals(1, 8, 8), 0.0)), CRAFTS["pgd"]
    for option in ({"draws": 0}, {"n": 0}, {"n": 1.5}, {"draws": True}):
        with pytest.raises(RequestError, match=rf"attack\.{next(iter(option))} must be a whole number"):
            next(perturb(smoothed, PixelThreat(), grey(), 1, Stream(0, 0), craft, [0.5], **option))
    turned = TransformationThreat(Rotation(), -9, 9)
    with pytest.raises(RequestError, match="this attack changes pixels; use threat=l2"):
        next(perturb(smoothed, turned, grey(), 1, Stream(0, 0), craft, [0.5]))
