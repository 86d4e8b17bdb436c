"""Jets: bounds of curves through networks, against the curves."""

import math

import pytest
import torch
from torch import Tensor, nn

from gsmooth_lightning.error.jets import NORMALISED, SILU, Jet, _compose, _silu_terms, _sizes, line, through
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.model.norms import conv_norm
from gsmooth_lightning.model.unet import Skip, unet

ORDERS = (2, 3, 4)
LINEAR = ("conv", "stride", "beside")
NETWORKS = {
    "conv": lambda: nn.Conv2d(4, 5, 3, padding=1),
    "stride": lambda: nn.Conv2d(4, 6, 4, stride=2, padding=1, bias=False),
    "beside": lambda: Skip(nn.Identity()),
    "norm": lambda: nn.GroupNorm(2, 4),
    "silu": nn.SiLU,
    "pool": lambda: nn.Sequential(nn.AvgPool2d(2), nn.SiLU()),
    "upsample": lambda: nn.Sequential(nn.SiLU(), nn.Upsample(scale_factor=2), nn.GroupNorm(4, 4)),
    "shuffle": lambda: nn.Sequential(nn.GroupNorm(1, 4), nn.PixelShuffle(2), nn.Identity(), nn.SiLU()),
    "skip": lambda: nn.Sequential(nn.SiLU(), Skip(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()), nn.GroupNorm(2, 8)),
    "unet": lambda: nn.Sequential(unet(4, 4, (4, 8)), nn.PixelShuffle(2), nn.Conv2d(1, 3, 4, stride=2, padding=1)),
}


def network(name: str, scale: float = 1.0) -> nn.Module:
    """One of the networks with random parameters, its weights `scale` times as large."""
    torch.manual_seed(len(name))
    found = NETWORKS[name]().double().requires_grad_(False)
    for module in found.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.copy_(scale * torch.randn(module.num_channels))
            module.bias.copy_(torch.randn(module.num_channels))
        elif isinstance(module, nn.Conv2d):
            module.weight *= scale
    return found


def starts(k: int = 4, spread: float = 1.0, speed: float = 3.0) -> tuple[Tensor, Tensor]:
    """Starts and directions, (k, 4, 6, 6); the last direction is zero."""
    start = 1 + spread * torch.randn(k, 4, 6, 6, dtype=torch.float64)
    direction = speed * torch.randn_like(start)
    direction[-1] = 0
    return start, direction


def curve(module: nn.Module, start: Tensor, direction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """v(t) and v'(t) of v(t) = module(start + t direction), times (k, n): (k, n, *shape) each."""
    along = direction[:, None].expand(-1, times.shape[1], -1, -1, -1)
    points = start[:, None] + times[:, :, None, None, None] * along
    found = torch.func.jvp(module, (points.flatten(0, 1),), (along.flatten(0, 1),))
    return tuple(part.unflatten(0, times.shape) for part in found)


def missed(jet: Jet, values: Tensor, slopes: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """||v(t) - p(t)|| and ||v'(t) - p'(t)||, (k, n) each."""
    t = times[:, :, None, None, None]
    p = sum(term[:, None] * t**i for i, term in enumerate(jet.terms))
    slope = sum(i * term[:, None] * t ** (i - 1) for i, term in enumerate(jet.terms) if i)
    return (values - p).flatten(2).norm(dim=2), (slopes - slope).flatten(2).norm(dim=2)


def size_of(u: Tensor) -> Tensor:
    """Norms that u (k, c, h, w) can be divided by."""
    return u.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def check(module: nn.Module, start: Tensor, direction: Tensor, half: Tensor, jet: Jet) -> float:
    """That the jet's bounds hold for module(start + t direction); the largest part of the rest that was needed."""
    times = half[:, None] * torch.linspace(-1, 1, 21, dtype=half.dtype)
    values, slopes = curve(module, start, direction, times)
    away, off = missed(jet, values, slopes, times)
    rounded = 1e-13 * (1 + values.flatten(1).abs().amax(1) + slopes.flatten(1).abs().amax(1)) * values[0, 0].numel()
    assert (off <= (jet.rest + rounded)[:, None]).all()
    assert (away <= (half * jet.rest + rounded)[:, None]).all()
    for other in (torch.zeros_like(values[0, 0]), torch.randn_like(values[:, 0]), values[:, 7], slopes[:, 7]):
        far = (values - (other if other.dim() == 3 else other[:, None])).flatten(2).norm(dim=2)
        steep = (slopes - (other if other.dim() == 3 else other[:, None])).flatten(2).norm(dim=2)
        assert (far <= (jet.distance(other) + rounded)[:, None]).all()
        assert (steep <= (jet.slope(other) + rounded)[:, None]).all()
    needed = off.amax(1) / jet.rest
    return float(needed[jet.rest > 1e3 * rounded].max()) if (jet.rest > 1e3 * rounded).any() else math.nan


# ---------------------------------------------------------------- constants


def test_bounds_of_the_derivatives_of_silu():
    """On a grid, and between its points by half a step times a bound of the next derivative. s^(j) / j! of the sigmoid
    s is at most p = s (1 - s) for all j > 0, by induction over s' = s - s^2, so phi^(j) / j! is at most (|x| + 1) p,
    which is below 1 / 2, and below 1e-15 beyond 40; phi' is below 1 + (|x| + 1) p."""
    step = 1e-4
    x = torch.arange(-40, 40, step, dtype=torch.float64)
    found, following = _silu_terms(x, 7), 0.5
    for j in range(7, 0, -1):
        following = float(found[j].abs().max()) + step / 2 * (j + 1) * following
        if j < 7:
            assert 0.99 * SILU[j] <= following <= SILU[j]


def test_terms_of_silu_are_its_derivatives():
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    derivative = nn.functional.silu(x)
    for j, term in enumerate(_silu_terms(x.detach(), 5)):
        assert torch.allclose(term * math.factorial(j), derivative.detach(), atol=1e-12)
        (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)


def test_bounds_of_the_derivatives_of_normalisation():
    """i times the coefficient of r^i of sqrt(1 + 2 b r + r^2), a polynomial in b of degree i, over a grid, and between
    its points by Markov's inequality. It is 1 - b^2 for i = 2."""
    b = torch.linspace(-1, 1, 2_000_001, dtype=torch.float64)
    one = torch.ones_like(b)
    outer = [math.prod((0.5 - m) / (m + 1) for m in range(i)) * one for i in range(7)]
    found = _compose(outer, [one, 2 * b, one])
    for j in range(1, 6):
        most = (j + 1) * float(found[j + 1].abs().max())
        between = 1e-6 / 2 * (j + 1) ** 2 * most if j > 1 else 0.0
        assert 0.999 * NORMALISED[j] <= most + between <= NORMALISED[j]


def test_sizes_are_attained():
    """By a polynomial without negative coefficients, at the end."""
    terms, half = torch.tensor([0.3, 1.2, 0.0, 2.5, 0.7], dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    t = half.clone().requires_grad_()
    derivative = sum(term * t**i for i, term in enumerate(terms))
    for j, size in enumerate(_sizes(terms, half)):
        assert torch.allclose(size * math.factorial(j), derivative)
        if j < 4:
            (derivative,) = torch.autograd.grad(derivative, t, create_graph=True)


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_curve_leaves_its_bounds(name, order):
    """Lines through each network, short and long, slow and fast, with large weights too."""
    used = []
    for scale, speed in ((1.0, 3.0), (10.0, 3.0), (1.0, 30.0)):
        module, (start, direction) = network(name, scale), starts(k=10, speed=speed)
        halves = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4], dtype=torch.float64).repeat(2)
        jet = through(module, line(start, direction, halves, order))
        used.append(check(module, start, direction, halves, jet))
    assert name in (*LINEAR, "unet") or max(part for part in used if not math.isnan(part)) > 1e-3


@pytest.mark.parametrize("order", ORDERS)
def test_normalising_what_hardly_varies(order):
    """Variances from 1, down to and below eps, where the line passes by a constant image: bounds are large but hold."""
    module = network("norm")
    for spread in (1.0, 1e-2, 1e-3, 1e-5, 0.0):
        start, direction = starts(spread=spread)
        for half in (1e-1, 1e-2, 1e-3, 1e-4):
            halves = torch.full((len(start),), half, dtype=torch.float64)
            check(module, start, direction, halves, through(module, line(start, direction, halves, order)))
            ahead = start - half / 3 * direction  # the line meets the image that hardly varies
            check(module, ahead, direction, halves, through(module, line(ahead, direction, halves, order)))


@pytest.mark.parametrize("order", ORDERS)
def test_the_rest_of_silu_is_attained(order):
    """At an entry where the next derivative is largest."""
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    start = x[_silu_terms(x, order + 1)[order + 1].abs().argmax()].view(1, 1, 1, 1)
    half = torch.tensor([1e-2], dtype=torch.float64)
    jet = through(nn.SiLU(), line(start, torch.ones_like(start), half, order))
    assert check(nn.SiLU(), start, torch.ones_like(start), half, jet) > 0.95


@pytest.mark.parametrize("order", ORDERS)
def test_the_rest_of_a_normalisation_is_attained(order):
    """Along the direction in which the next derivative of a group is largest."""
    b = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    one = torch.ones_like(b)
    outer = [math.prod((0.5 - m) / (m + 1) for m in range(i)) * one for i in range(order + 3)]
    best = b[_compose(outer, [one, 2 * b, one])[order + 2].abs().argmax()]
    basis = torch.linalg.qr(torch.cat([torch.ones(36, 1), torch.randn(36, 2)], 1).double())[0]
    start, direction = basis[:, 1], best * basis[:, 1] + (1 - best**2).sqrt() * basis[:, 2]
    start, direction = (part.view(1, 1, 6, 6) for part in (start, direction))
    module, half = nn.GroupNorm(1, 1, eps=1e-9).double().requires_grad_(False), torch.tensor([1e-2]).double()
    jet = through(module, line(start, direction, half, order))
    assert check(module, start, direction, half, jet) > 0.9


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_jet_does_not_know(name, order):
    """Lines start + t (direction + u) where the jet knows `direction` alone and ||u|| = rest: u at random, and the one
    that a layer enlarges most."""
    module, (start, direction) = network(name), starts()

    def both(u: Tensor) -> Tensor:
        return torch.func.jvp(module, (start,), (u,))[1]

    worst, needed = torch.randn_like(start), {}
    for _ in range(20):
        (worst,) = torch.func.vjp(both, worst / size_of(worst))[1](both(worst / size_of(worst)))
    for half in (1.0, 1e-2, 1e-4):
        for rest in (10.0, 1.0, 1e-3):
            halves, rests = (torch.full((len(start),), part, dtype=torch.float64) for part in (half, rest))
            jet = through(module, Jet(line(start, direction, halves, order).terms, halves, rests))
            for u in (torch.randn_like(start), -worst, worst):
                needed[half, rest] = check(module, start, direction + rest * u / size_of(u), halves, jet)
    assert name in ("skip", "unet") or needed[1e-4, 1e-3] > (0.8 if name in (*LINEAR, "silu") else 0.2)


def unknown(module: nn.Module, start: Tensor, direction: Tensor, u: Tensor, half: float, order: int) -> float:
    """`check` of the line start + t (direction + u), of which the jet knows `direction`."""
    half = torch.tensor([half], dtype=torch.float64)
    start, direction, u = (part.view(1, 1, 1, -1) for part in (start, direction, u))
    known = Jet(line(start, direction, half, order).terms, half, u.norm().view(1))
    return check(module, start, direction + u, half, through(module, known))


@pytest.mark.parametrize("order", ORDERS)
def test_silu_bends_what_a_jet_does_not_know(order):
    """At 0, where phi'' is largest, an unknown slope counts twice: where it leads, and how it is enlarged there."""
    one = torch.ones(1, dtype=torch.float64)
    assert unknown(nn.SiLU(), 0 * one, one, 1e-3 * one, 1e-2, order) > 0.95


def test_a_normalisation_bends_what_a_jet_does_not_know():
    """Towards the constant image, where the normalisation enlarges more and more."""
    basis = torch.linalg.qr(torch.cat([torch.ones(8, 1), torch.randn(8, 2)], 1).double())[0].T
    module = nn.GroupNorm(1, 1, eps=1e-9).double().requires_grad_(False)
    assert unknown(module, basis[1], -3 * basis[1], 1e-2 * basis[2], 2e-2, 4) > 0.95
    for past in (1e-1, 1e-3, 0.0):  # an unknown line by the constant image, or through it
        unknown(module, basis[1], 0 * basis[1], 20 * (past * basis[2] - basis[1]), 1e-1, 4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["norm", "silu", "shuffle", "skip", "unet"])
def test_the_rest_falls_as_a_power_of_the_width(name, order):
    module, (start, direction) = network(name), starts()
    wide, narrow = (
        through(module, line(start, direction, torch.full((len(start),), half, dtype=torch.float64), order)).rest[:-1]
        for half in (1e-4, 1e-5)
    )
    assert (wide / narrow > 0.9 * 10**order).all()
    assert (wide / narrow < 1.2 * 10**order).all()


def test_a_line_that_stands_still():
    module, (start, direction) = network("unet"), starts()
    jet = through(module, line(start, direction, torch.ones(len(start), dtype=torch.float64)))
    assert jet.rest[-1] == 0
    assert (jet.terms[1:, -1] == 0).all()
    assert jet.slope(torch.zeros_like(jet.terms[0]))[-1] == 0


@pytest.mark.parametrize("order", ORDERS)
def test_a_linear_network_leaves_no_rest(order):
    module = nn.Sequential(network("stride"), nn.Upsample(scale_factor=2), Skip(nn.AvgPool2d(1), nn.Identity()))
    start, direction = starts()
    jet = through(module, line(start, direction, torch.ones(len(start), dtype=torch.float64), order))
    assert (jet.rest == 0).all()
    assert torch.allclose(jet.terms[0], module(start))
    assert torch.allclose(jet.terms[1], module(direction))
    assert (jet.terms[2:] == 0).all()


def test_terms_are_derivatives():
    """The first terms of a U-Net's jet by nested forward differentiation."""
    module, (start, direction) = network("unet"), starts()

    def slope(point: Tensor) -> Tensor:
        return torch.func.jvp(module, (point,), (direction,))[1]

    jet = through(module, line(start, direction, torch.ones(len(start), dtype=torch.float64)))
    first, second = torch.func.jvp(slope, (start,), (direction,))
    assert torch.allclose(jet.terms[0], module(start))
    assert torch.allclose(jet.terms[1], first)
    assert torch.allclose(2 * jet.terms[2], second)


def test_each_curve_by_itself():
    """Curves of different widths in one batch, and the norms of an earlier call, change nothing."""
    module, (start, direction) = network("unet"), starts()
    halves, norms = torch.tensor([1e-1, 1e-2, 1e-3, 1.0], dtype=torch.float64), {}
    jet = through(module, line(start, direction, halves), norms)
    assert len(norms) == sum(isinstance(part, nn.Conv2d) for part in module.modules())
    for i in range(len(start)):
        alone = through(module, line(start[i : i + 1], direction[i : i + 1], halves[i : i + 1]), norms)
        assert torch.allclose(alone.terms[:, 0], jet.terms[:, i], atol=1e-10)
        assert torch.allclose(alone.rest, jet.rest[i : i + 1])


def test_float32_finds_about_the_same():
    module, (start, direction) = network("unet"), starts()
    jets = []
    for dtype in (torch.float64, torch.float32):
        halves = torch.full((len(start),), 1e-2, dtype=dtype)
        jets.append(through(module, line(start.to(dtype), direction.to(dtype), halves)))
    assert jets[1].terms.dtype == jets[1].rest.dtype == torch.float32
    assert torch.allclose(jets[0].rest, jets[1].rest.double(), rtol=1e-3)


def test_bounds_that_overflow_are_infinite():
    module = network("unet")
    start, direction = starts(speed=1e200)
    jet = through(module, line(start, direction, torch.ones(len(start), dtype=torch.float64)))
    assert (jet.rest[:-1] == math.inf).all()
    assert (jet.slope(torch.zeros_like(jet.terms[0]))[:-1] == math.inf).all()
    assert (jet.distance(torch.zeros_like(jet.terms[0]))[:-1] == math.inf).all()


# ---------------------------------------------------------------- convolutions


@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (3, 0), (4, 1), (3, 3), ((2, 5), (0, 2))])
def test_the_norm_of_a_convolution(kernel, padding, stride):
    """At least that of its matrix, with equal singular values of 1 x 1 kernels."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, kernel, stride, padding).double().requires_grad_(False)
    for h, w in ((5, 6), (8, 7)):
        basis = torch.eye(3 * h * w, dtype=torch.float64).view(-1, 3, h, w)
        matrix = nn.functional.conv2d(basis, conv.weight, None, stride, padding).flatten(1)
        true, bound = float(torch.linalg.matrix_norm(matrix, 2)), conv_norm(conv, h, w)
        assert true <= bound <= 1.3 * true
        if kernel == 1 and stride == 1:
            assert bound <= 1.0001 * true


@pytest.mark.parametrize("stride", [1, 2])
def test_the_norm_of_a_convolution_is_close(stride):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 4, 3, stride, padding=1).double().requires_grad_(False)
    basis = torch.eye(4 * 14 * 14, dtype=torch.float64).view(-1, 4, 14, 14)
    matrix = nn.functional.conv2d(basis, conv.weight, None, stride, padding=1).flatten(1)
    true = float(torch.linalg.matrix_norm(matrix, 2))
    assert true <= conv_norm(conv, 14, 14) <= 1.1 * true


def test_the_norm_of_a_convolution_of_a_few_pixels():
    """Kernels wider than the image that let no constant image pass."""
    torch.manual_seed(2)
    for h, w in ((1, 1), (2, 1), (3, 2)):
        conv = nn.Conv2d(1, 1, 4, padding=3).double().requires_grad_(False)
        conv.weight -= conv.weight.mean()
        basis = torch.eye(h * w, dtype=torch.float64).view(-1, 1, h, w)
        matrix = nn.functional.conv2d(basis, conv.weight, None, padding=3).flatten(1)
        assert float(torch.linalg.matrix_norm(matrix, 2)) <= conv_norm(conv, h, w)


def test_same_padding():
    conv = nn.Conv2d(2, 2, (3, 5), padding="same").double().requires_grad_(False)
    basis = torch.eye(2 * 5 * 5, dtype=torch.float64).view(-1, 2, 5, 5)
    matrix = nn.functional.conv2d(basis, conv.weight, None, padding="same").flatten(1)
    assert float(torch.linalg.matrix_norm(matrix, 2)) <= conv_norm(conv, 5, 5)


# ---------------------------------------------------------------- what is refused


class Louder(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.BatchNorm2d(4),
        Louder(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.GroupNorm(2, 4, affine=False),
        nn.GroupNorm(2, 4, eps=0.0),
        nn.AvgPool2d(3, stride=1),
        nn.AvgPool2d(2, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=1),
        nn.AvgPool2d((2, 2)),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=3),
        nn.Upsample(size=8),
        nn.Sequential(nn.SiLU(), Skip(nn.Tanh())),
    ],
    ids=repr,
)
def test_other_layers_are_refused(module):
    start, direction = starts()
    with pytest.raises(UncertifiableError):
        through(module.double(), line(start, direction, torch.ones(len(start), dtype=torch.float64)))


@pytest.mark.parametrize(("order", "half"), [(1, 1.0), (5, 1.0), (3, -1.0), (3, math.nan)])
def test_other_orders_and_widths_are_refused(order, half):
    start, direction = starts()
    with pytest.raises(UncertifiableError, match="order from 2 to 4"):
        line(start, direction, torch.full((len(start),), half), order)
