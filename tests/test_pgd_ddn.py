"""Gradient attacks as functions, against closed forms on linear networks."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from gsmooth_lightning.attack import ddn, pgd
from gsmooth_lightning.errors import RequestError


def binary(w, b=0.0):
    """Log-probabilities of the two classes with logits 0 and <w, x> + b."""

    def log_probabilities(x):
        score = x.flatten(1) @ w.flatten() + b
        return torch.stack([torch.zeros_like(score), score], 1).log_softmax(1)

    return log_probabilities


def sizes(delta):
    return delta.flatten(1).norm(dim=1)


def loss_of(log_probabilities, x, y):
    return functional.nll_loss(log_probabilities(x), y, reduction="none")


def bisect(excess, low, high):
    """The zero of an increasing function of a tensor of rows."""
    for _ in range(100):
        middle = (low + high) / 2
        above = excess(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def best_in_box(x, w, epsilon):
    """argmax <w, delta> with ||delta|| <= epsilon and 0 <= x + delta <= 1: clip(t w), t from bisection."""

    def at(t):
        return (t[:, None] * w).clamp(-x, 1 - x)

    zero = torch.zeros(len(x), dtype=x.dtype)
    return at(bisect(lambda t: sizes(at(t)) - epsilon, zero, zero + 1e6))


def shortest_in_box(x, w, score):
    """argmin ||delta|| with <w, x + delta> = score and 0 <= x + delta <= 1: clip(t w), t from bisection."""

    def at(t):
        return (t[:, None] * w).clamp(-x, 1 - x)

    zero = torch.zeros(len(x), dtype=x.dtype)
    return at(bisect(lambda t: (x + at(t)) @ w - score, zero, zero + 1e6))


def points(n=6, shape=(1, 3, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, generator=generator), torch.randn(shape, generator=generator)


SHAPES = [(7,), (1, 3, 4), (3, 2, 2), (1, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_pgd_reaches_the_closed_form_in_l2(shape, steps):
    """x -+ epsilon w / ||w||, and the loss softplus(epsilon ||w|| -+ score)."""
    x, w = points(shape=shape)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    found = pgd(binary(w, 0.3), x, y, 0.7, steps=steps)
    sign = torch.where(y == 0, 1.0, -1.0)
    expected = x + 0.7 * sign.view(-1, *[1] * len(shape)) * w / w.norm()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    score = x.flatten(1) @ w.flatten() + 0.3
    closed = functional.softplus(0.7 * w.norm() + sign * score)
    torch.testing.assert_close(loss_of(binary(w, 0.3), found, y), closed, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 10])
def test_pgd_reaches_the_closed_form_in_linf(shape, steps):
    x, w = points(shape=shape)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    found = pgd(binary(w), x, y, 0.05, steps=steps, norm="linf")
    sign = torch.where(y == 0, 1.0, -1.0)
    expected = x + 0.05 * sign.view(-1, *[1] * len(shape)) * w.sign()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    closed = functional.softplus(0.05 * w.abs().sum() + sign * (x.flatten(1) @ w.flatten()))
    torch.testing.assert_close(loss_of(binary(w), found, y), closed, atol=1e-4, rtol=1e-5)


def test_linf_clipped_to_the_box_is_exact():
    """Coordinates are independent: clip(x + epsilon sign w)."""
    x, w = points()
    found = pgd(binary(w), x, torch.zeros(6, dtype=torch.long), 0.4, norm="linf", box=(0, 1))
    torch.testing.assert_close(found, (x + 0.4 * w.sign()).clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("given_step", "expected"), [(None, 0.4), (0.15, 0.15), (5.0, 5.0)])
def test_steps_are_twice_the_radius_over_their_number_by_default(given_step, expected):
    """The points at which a linear network is asked lie `step` apart until the sphere is reached."""
    x, w = points(n=1)
    asked = []

    def recorded(inputs):
        asked.append(float(sizes(inputs.detach() - x)))
        return binary(w)(inputs)

    pgd(recorded, x, torch.tensor([0]), 1.0, steps=5, step_size=given_step)
    assert asked == pytest.approx([min(1.0, k * expected) for k in range(5)], abs=1e-5)


@pytest.mark.parametrize(("steps", "step_size", "missing"), [(10, None, 0.04), (40, None, 0.012), (800, 0.005, 0.004)])
@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_pgd_in_an_active_box_is_near_the_exact_optimum(steps, step_size, missing, epsilon):
    """Against the exact solution; the share that is missing falls with the step."""
    x, w = points(n=40, shape=(30,), seed=1)
    x[:, ::3] = x[:, ::3].round()  # many coordinates start on the boundary
    best = best_in_box(x.double(), w.double(), epsilon)
    assert ((best == -x) | (best == 1 - x)).any(1).all(), "the box is active"
    found = pgd(binary(w), x, torch.zeros(40, dtype=torch.long), epsilon, steps, step_size, box=(0, 1))
    share = ((found - x).double() @ w.double()) / (best @ w.double())
    assert share.max() <= 1 + 1e-5
    assert share.min() >= 1 - missing


def test_default_steps_go_no_further_than_twice_the_radius():
    """In a box that blocks half of the coordinates the ball's rim takes more: larger steps reach it."""
    x, w = points(n=40, shape=(30,), seed=1)
    x[:, ::3] = x[:, ::3].round()
    y, best = torch.zeros(40, dtype=torch.long), best_in_box(x.double(), w.double(), 2.0)
    found = pgd(binary(w), x, y, 2.0, steps=100, box=(0, 1))
    cut_short = sizes(found - x) < 1.99
    assert 0 < cut_short.sum() < 40
    path = (4.0 * w / w.norm()).expand_as(x).clamp(-x, 1 - x)
    torch.testing.assert_close((found - x)[cut_short], path[cut_short], atol=1e-4, rtol=0)
    further = pgd(binary(w), x, y, 2.0, steps=1000, step_size=0.02, box=(0, 1))
    assert (((further - x).double() @ w.double()) / (best @ w.double())).min() > 0.985


@pytest.mark.parametrize("seed", range(4))
def test_pgd_on_several_classes_ends_in_a_maximum_on_the_circle(seed):
    """The loss of a linear network is convex, so its maxima lie on the sphere with delta parallel to the gradient."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(4, 2, generator=generator), torch.randn(4, generator=generator)
    x, y = torch.randn(12, 2, generator=generator), torch.arange(12) % 4

    def log_probabilities(inputs):
        return (inputs @ weight.T + bias).log_softmax(1)

    found = pgd(log_probabilities, x, y, 0.8, steps=300, step_size=0.1)
    torch.testing.assert_close(sizes(found - x), torch.full((12,), 0.8), atol=1e-5, rtol=0)
    p = log_probabilities(found).exp()
    gradient = (p - functional.one_hot(y, 4)) @ weight
    cosine = functional.cosine_similarity(found - x, gradient)
    assert cosine.min() > 0.999
    angles = torch.linspace(0, 2 * math.pi, 2001)
    circle = x + 0.8 * torch.stack([angles.cos(), angles.sin()], 1)[:, None]  # (angles, n, 2)
    largest = torch.stack([loss_of(log_probabilities, at, y) for at in circle]).max(0).values
    reached = loss_of(log_probabilities, found, y)
    assert (reached <= largest + 1e-4).all()
    assert (reached >= largest - 1e-2).float().mean() >= 0.9  # the others ended in a local maximum


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    attack=st.sampled_from(["l2", "linf", "ddn"]),
    epsilon=st.floats(0, 5),
    steps=st.integers(1, 6),
    step=st.none() | st.floats(0.01, 10),
    box=st.sampled_from([None, (0.0, 1.0), (-1.0, 1.0), (0.25, 0.5)]),
    shape=st.sampled_from(SHAPES),
)
def test_attacks_stay_in_the_ball_and_in_the_box(seed, attack, epsilon, steps, step, box, shape):
    """For any network; inputs outside the box are moved further out in no coordinate."""
    generator = torch.Generator().manual_seed(seed)
    d = math.prod(shape)
    first, second = torch.randn(d, 8, generator=generator), torch.randn(8, 3, generator=generator)
    x = torch.rand(5, *shape, generator=generator) * 3 - 1
    y = torch.randint(0, 3, (5,), generator=generator)

    def log_probabilities(inputs):
        return ((inputs.flatten(1) @ first).tanh() @ second).log_softmax(1)

    if attack == "ddn":
        found = ddn(log_probabilities, x, y, epsilon, steps, initial=step or 1.0, box=box)
    else:
        found = pgd(log_probabilities, x, y, epsilon, steps, step, attack, box)
    assert torch.isfinite(found).all()
    delta = (found - x).flatten(1)
    size = delta.abs().amax(1) if attack == "linf" else delta.norm(dim=1)
    assert (size <= epsilon * (1 + 1e-5) + 1e-6).all()
    if box is not None:
        low, high = box
        assert (found <= x.clamp(min=high) + 1e-6).all()
        assert (found >= x.clamp(max=low) - 1e-6).all()


def test_nothing_leaves_zero_to_one_by_a_rounding_error():
    """Exactly: a pixel at 1.0000001 would be refused elsewhere."""
    x, w = points(n=500, shape=(60,), seed=3)
    y = torch.arange(500) % 2
    for found in (
        pgd(binary(w), x, y, 2.0, box=(0, 1)),
        pgd(binary(w), x, y, 0.3, norm="linf", box=(0, 1)),
        ddn(binary(w), x, y, 2.0, steps=20, box=(0, 1)),
    ):
        assert found.min() >= 0
        assert found.max() <= 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_coordinate_outside_the_box_moves_only_inwards(norm):
    """Pushed outwards it stays, not asked for it stays (nothing pulls it), pushed inwards it moves."""
    w = torch.tensor([1.0, -1.0, 0.0, 0.0, -1.0, 1.0, 1.0])
    x = torch.tensor([[1.5, -0.5, 1.5, -0.5, 1.5, -0.5, 0.5]])
    found = pgd(binary(w), x, torch.tensor([0]), 0.2, norm=norm, box=(0, 1))
    assert torch.equal(found[0, :4], x[0, :4])
    assert found[0, 4] < 1.5
    assert found[0, 5] > -0.5
    assert found[0, 6] > 0.5


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_vanishing_gradient_gives_a_random_direction(norm):
    """One row without a gradient; the others are attacked as ever."""
    x, w = points(n=4, shape=(6,))

    def half_dead(inputs):
        alive = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
        return binary(w)(inputs * alive)

    y = torch.zeros(4, dtype=torch.long)
    found = pgd(half_dead, x, y, 0.3, norm=norm)
    assert torch.isfinite(found).all()
    assert (sizes(found - x) > 0.1).all()
    direction = w.sign() if norm == "linf" else w / w.norm()
    torch.testing.assert_close(found[::2], x[::2] + 0.3 * direction, atol=1e-5, rtol=0)
    assert torch.isfinite(ddn(half_dead, x, y, 0.3)).all()


def test_an_infinite_gradient_gives_no_nan():
    """The square root at 0."""
    x = torch.zeros(3, 5)

    def roots(inputs):
        score = inputs.abs().sqrt().sum(1)
        return torch.stack([torch.zeros_like(score), score], 1).log_softmax(1)

    y = torch.zeros(3, dtype=torch.long)
    for found in (pgd(roots, x, y, 0.5), pgd(roots, x, y, 0.5, norm="linf"), ddn(roots, x, y, 0.5)):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16],  # in float16 gradients below 6e-8 vanish
)
def test_confident_networks_are_attacked_in_mixed_precision(dtype):
    """Logits 18 apart, as trained networks give: p_y differs from 1 by 1.5e-8."""
    network = nn.Linear(6, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[-1.5], [1.5]]).expand(2, 6))
        network.bias.zero_()
    x = torch.ones(3, 6)
    with torch.autocast("cpu", dtype=dtype):
        found = pgd(lambda inputs: network(inputs).log_softmax(1), x, torch.ones(3, dtype=torch.long), 1.0)
    torch.testing.assert_close(found, x - 1 / math.sqrt(6), atol=0.01, rtol=0)


def test_radius_zero_keeps_the_input():
    x, w = points()
    y = torch.zeros(6, dtype=torch.long)
    for found in (pgd(binary(w), x, y, 0.0), pgd(binary(w), x, y, 0, norm="linf"), ddn(binary(w), x, y, 0.0)):
        assert torch.equal(found, x)


# -------------------------------------------------- DDN


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("steps", "tolerance"), [(100, 0.03), (300, 0.005)])
def test_ddn_finds_the_distance_to_the_hyperplane(shape, steps, tolerance):
    """|<w, x> + b| / ||w||, from above."""
    x, w = points(n=10, shape=shape)
    score = x.flatten(1) @ w.flatten() - 0.2
    far = score.abs() > 0.1 * w.norm()  # from norm 1 a hundred steps lead down to .95^100
    x, score = x[far], score[far]
    y = (score > 0).long()
    found = ddn(binary(w, -0.2), x, y, steps=steps)
    assert (binary(w, -0.2)(found).argmax(1) != y).all()
    ratio = sizes(found - x) / (score.abs() / w.norm())
    assert ratio.min() >= 1 - 1e-4
    assert ratio.max() <= 1 + tolerance


@pytest.mark.parametrize(("steps", "tolerance"), [(100, 0.1), (300, 0.03)])
def test_ddn_in_an_active_box_is_near_the_shortest_change(steps, tolerance):
    x, w = points(n=20, shape=(30,), seed=1)
    x[:, ::3] = x[:, ::3].round()
    b = -float((x @ w).max()) - 1.0  # all lie on one side, some far from the other
    y = torch.zeros(20, dtype=torch.long)
    best = shortest_in_box(x.double(), w.double(), -b)
    assert (best != best.clamp(-0.999 * x, 0.999 * (1 - x))).any(1).all(), "the box is active"
    found = ddn(binary(w, b), x, y, steps=steps, box=(0, 1))
    assert (binary(w, b)(found).argmax(1) == 1).all()
    ratio = sizes(found - x) / sizes(best)
    assert ratio.min() >= 1 - 1e-4
    assert ratio.max() <= 1 + tolerance


def test_ddn_leaves_misclassified_inputs_alone():
    x, w = points()
    right = ((x.flatten(1) @ w.flatten()) > 0).long()
    y = torch.where(torch.arange(6) % 2 == 0, 1 - right, right)
    found = ddn(binary(w), x, y, steps=50)
    assert torch.equal(found[::2], x[::2])
    assert (sizes(found - x)[1::2] > 0).all()


def test_ddn_cuts_what_it_finds_to_epsilon():
    """In the direction found, whether or not that is far enough."""
    x, w = points(n=10, shape=(8,))
    score = x @ w + 1.5
    y = (score > 0).long()
    distance = score.abs() / w.norm()
    epsilon = float(distance.median())
    found = ddn(binary(w, 1.5), x, y, epsilon, steps=200)
    torch.testing.assert_close(sizes(found - x), distance.clamp(max=epsilon), atol=0, rtol=0.01)
    flipped = binary(w, 1.5)(found).argmax(1) != y
    assert torch.equal(flipped[distance < 0.99 * epsilon], torch.ones_like(flipped[distance < 0.99 * epsilon]))
    assert not flipped[distance > 1.01 * epsilon].any()


def test_ddn_keeps_the_input_where_it_finds_nothing():
    """A network with one answer, and too few steps to get far enough."""
    x, w = points(n=3, shape=(4,))
    y = torch.zeros(3, dtype=torch.long)
    assert torch.equal(ddn(binary(0 * w, -1.0), x, y, steps=20), x)
    assert torch.equal(ddn(binary(w, -1e3), x, y, steps=5), x)


@pytest.mark.parametrize("initial", [0.01, 1.0, 30.0])
def test_ddn_forgets_its_first_norm(initial):
    x, w = points(n=5, shape=(8,))
    score = x @ w + 0.5
    found = ddn(binary(w, 0.5), x, (score > 0).long(), steps=300, initial=initial)
    torch.testing.assert_close(sizes(found - x), score.abs() / w.norm(), atol=0, rtol=0.03)


# -------------------------------------------------- side effects, modes, refusals

ATTACKS = {
    "pgd": partial(pgd, epsilon=0.5, steps=3),
    "linf": partial(pgd, epsilon=0.1, steps=3, norm="linf"),
    "ddn": partial(ddn, epsilon=0.5, steps=3),
}


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 64)])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_change_nothing_but_their_result(name, shape):
    """Not the inputs, not the weights, and no gradient is left behind."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x, y = torch.rand(4, *shape), torch.tensor([0, 1, 2, 0])
    copies = x.clone(), y.clone()
    found = ATTACKS[name](lambda inputs: network(inputs).log_softmax(1), x, y, box=(0, 1))
    assert found.shape == x.shape
    assert not found.requires_grad
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    assert x.grad is None
    assert not x.requires_grad
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not torch.equal(found, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_need_no_gradient_mode(name, mode):
    """The same result with gradients off, for inputs made outside."""
    x, w = points()
    y = torch.zeros(6, dtype=torch.long)
    expected = ATTACKS[name](binary(w), x, y)
    with mode():
        found = ATTACKS[name](binary(w), x, y)
        assert torch.is_grad_enabled() is False
    torch.testing.assert_close(found.clone(), expected)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_take_inputs_made_in_inference_mode(name):
    """Labels too: gather must not save an inference tensor."""
    x, w = points()
    expected = ATTACKS[name](binary(w), x, torch.zeros(6, dtype=torch.long))
    with torch.inference_mode():
        found = ATTACKS[name](binary(w), x.clone(), torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(found.clone(), expected)


def test_rows_are_attacked_each_for_itself():
    """The result of a row does not depend on the rows beside it."""
    x, w = points(n=6, shape=(9,))
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    for attack in ATTACKS.values():
        together = attack(binary(w, 0.1), x, y)
        alone = torch.cat([attack(binary(w, 0.1), x[i : i + 1], y[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": -0.1},
        {"epsilon": math.nan},
        {"epsilon": 1.0, "steps": 0},
        {"epsilon": 1.0, "step_size": 0.0},
        {"epsilon": 1.0, "step_size": -1.0},
        {"epsilon": 1.0, "norm": "l1"},
    ],
)
def test_pgd_refuses_numbers_that_make_no_attack(options):
    x, w = points()
    with pytest.raises(RequestError, match=r"PGD needs|norm must be"):
        pgd(binary(w), x, torch.zeros(6, dtype=torch.long), **options)


@pytest.mark.parametrize(
    "options",
    [{"epsilon": -1.0}, {"steps": 0}, {"gamma": 0.0}, {"gamma": 1.0}, {"initial": 0.0}, {"epsilon": math.nan}],
)
def test_ddn_refuses_numbers_that_make_no_search(options):
    x, w = points()
    with pytest.raises(RequestError, match="DDN needs"):
        ddn(binary(w), x, torch.zeros(6, dtype=torch.long), **options)


@pytest.mark.parametrize("attack", [pgd, ddn])
@pytest.mark.parametrize("box", [(1, 0), (0, math.nan)])
def test_attacks_refuse_a_box_that_holds_nothing(attack, box):
    x, w = points()
    with pytest.raises(RequestError, match="box"):
        attack(binary(w), x, torch.zeros(6, dtype=torch.long), 0.5, box=box)


def test_pgd_refuses_an_infinite_radius():
    """It would step by infinity and return NaN."""
    x, w = points()
    with pytest.raises(RequestError, match="PGD needs"):
        pgd(binary(w), x, torch.zeros(6, dtype=torch.long), math.inf)
