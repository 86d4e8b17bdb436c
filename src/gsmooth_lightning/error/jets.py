"""Taylor models of curves, "jets", and where a convolutional network takes them.

A curve v: [-h, h] -> R^D is known by a polynomial p(t) = v_0 + t v_1 + ... + t^n v_n with p(0) = v(0) and a bound, the
rest, of ||v'(t) - p'(t)||_2, so that ||v(t) - p(t)||_2 <= h rest. A layer F takes it to F(v), whose polynomial is the
Taylor polynomial T of F(p), and whose rest is a bound of

    F(v)' - T' = (F(p)' - T') + DF(v) (v' - p') + (DF(v) - DF(p)) p'.

This holds in real arithmetic. Bounds are enlarged by 1 + 1e-5, and nothing else is allowed for the rounding of floats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.model.norms import conv_norm
from gsmooth_lightning.model.unet import Skip

ORDERS = range(2, 5)
"""Orders n of the polynomials for which the constants below suffice."""

SILU = (math.inf, 1.0999, 0.2501, 0.0514, 0.0209, 0.0055, 0.0021)
"""Bounds of |phi^(j)(x)| / j! of SiLU, phi(x) = x sigmoid(x), over all x, for j = 0, 1, ...: from a fine grid, between
whose points they change by at most half a step times a bound of the next derivative."""

NORMALISED = (math.inf, 1.0, 0.5774, 0.5001, 0.4118, 0.3751)
"""For G(w) = w / sqrt(q), q = ||w||^2 / N + eps, w in R^N: ||D^j G(w)|| / j! <= NORMALISED[j] q^(-j/2) N^((1-j)/2).

G is the gradient of f(w) = N sqrt(q), so <D^j G, .> is a symmetric form of j + 1 vectors, whose norm is attained where
all are the same unit vector x (Banach). With b = <w, x> / sqrt(N q), which is in [-1, 1],
f(w + sqrt(N q) r x) = f(w) sqrt(1 + 2 b r + r^2), whose coefficient of r^i is, up to its sign,
(P_{i-2}(b) - P_i(b)) / (2i - 1), P Legendre's polynomials. NORMALISED[j] is i times its maximum over b for i = j + 1.
"""

Norms = dict[tuple[nn.Conv2d, int, int], float]


@dataclass(frozen=True)
class Jet:
    """k curves v: [-h, h] -> R^shape with v(0) = v_0 and ||v'(t) - v_1 - 2 t v_2 - ... - n t^(n-1) v_n||_2 <= rest.

    Args:
        terms: v_0, ..., v_n, (n + 1, k, *shape).
        half: h, (k,).
        rest: (k,).
    """

    terms: Tensor
    half: Tensor
    rest: Tensor

    def distance(self, point: Tensor) -> Tensor:
        """Bound of sup_t ||v(t) - point||_2, (k,), from a point (*shape) or one for each curve."""
        return _up(_farthest([self.terms[0] - point, *self.terms[1:]], self.half) + self.half * self.rest)

    def slope(self, direction: Tensor) -> Tensor:
        """Bound of sup_t ||v'(t) - direction||_2, (k,), from a direction (*shape) or one for each curve."""
        first, *others = [i * term for i, term in enumerate(self.terms[1:], 1)]
        return _up(_farthest([first - direction, *others], self.half) + self.rest)


def line(start: Tensor, direction: Tensor, half: Tensor, order: int = 4) -> Jet:
    """The lines start + t direction, |t| <= half: start and direction (k, *shape), half (k,).

    Args:
        order: n, of the polynomials. The rest of a network's jet falls as half^n.

    Raises:
        UncertifiableError: an order that is not between 2 and 4, or a half that is negative.
    """
    if order not in ORDERS or not (half >= 0).all():
        raise UncertifiableError(f"a jet has an order from 2 to 4 and reaches from -half to half, got {order}, {half}")
    terms = torch.stack([start, direction, *[torch.zeros_like(start)] * (order - 1)])
    return Jet(terms, half, torch.zeros_like(half))


@torch.inference_mode()
def through(network: nn.Module, jet: Jet, norms: Norms | None = None) -> Jet:
    """The jet of network(v(t)), computed in the dtype of the given one, whose shape is (channels, h, w).

    Args:
        network: of the layers nn.Conv2d, nn.GroupNorm, nn.SiLU, nn.AvgPool2d(k), nn.Upsample(scale_factor=2),
            nn.PixelShuffle and nn.Identity in nn.Sequential and Skip.
        norms: norms of its convolutions from an earlier call, for images of given sizes. New ones are added.

    Raises:
        UncertifiableError: other layers, or settings of these whose norm is not known.
    """
    norms = {} if norms is None else norms
    kind = type(network)  # a subclass may compute something else
    if kind in (nn.Sequential, Skip):
        inner = jet
        for module in network.children():
            inner = through(module, inner, norms)
        if kind is nn.Sequential:
            return inner
        return Jet(torch.cat([jet.terms, inner.terms], 2), jet.half, _up(torch.hypot(jet.rest, inner.rest)))
    if kind not in LAYERS:
        raise UncertifiableError(f"a displacement is not known behind {kind.__name__}; use the layers of `unet`")
    return LAYERS[kind](network, jet, norms)


# ---------------------------------------------------------------- layers


def _identity(identity: nn.Identity, jet: Jet, norms: Norms) -> Jet:
    return jet


def _conv(conv: nn.Conv2d, jet: Jet, norms: Norms) -> Jet:
    h, w = jet.terms.shape[-2:]
    if (conv, h, w) not in norms:
        norms[conv, h, w] = conv_norm(conv, h, w)
    weight = conv.weight.to(jet.terms)
    found = _linear(lambda x: conv2d(x, weight, None, conv.stride, conv.padding), norms[conv, h, w], jet)
    if conv.bias is not None:
        found.terms[0] += conv.bias.to(weight).view(-1, 1, 1)
    return found


def _pool(pool: nn.AvgPool2d, jet: Jet, norms: Norms) -> Jet:
    k, options = pool.kernel_size, (pool.stride, pool.padding, pool.ceil_mode, pool.divisor_override)
    if not isinstance(k, int) or options != (k, 0, False, None):
        raise UncertifiableError(f"the norm of {pool} is not known; use nn.AvgPool2d(k) without options")
    return _linear(pool, 1 / k, jet)


def _upsample(upsample: nn.Upsample, jet: Jet, norms: Norms) -> Jet:
    if (upsample.mode, upsample.scale_factor) != ("nearest", 2):
        raise UncertifiableError(f"the norm of {upsample} is not known; use nn.Upsample(scale_factor=2)")
    return _linear(upsample, 2.0, jet)


def _shuffle(shuffle: nn.PixelShuffle, jet: Jet, norms: Norms) -> Jet:
    return _linear(shuffle, 1.0, jet)


def _linear(layer: Callable[[Tensor], Tensor], norm: float, jet: Jet) -> Jet:
    terms = layer(jet.terms.flatten(0, 1)).unflatten(0, jet.terms.shape[:2])
    return Jet(terms, jet.half, _up(norm * jet.rest))


def _silu(silu: nn.SiLU, jet: Jet, norms: Norms) -> Jet:
    """phi(v), each entry by itself: phi^(j) changes by at most the distance from v_0 times a bound of phi^(j+1)."""
    start, half, rest = jet.terms[0], _beside(jet.half, jet.terms[0]), _beside(jet.rest, jet.terms[0])
    sizes = _sizes(jet.terms.abs(), half)
    away = sizes[0] - start.abs() + half * rest
    at = _silu_terms(start, len(jet.terms))
    near = [(part.abs() + (j + 1) * SILU[j + 1] * away).clamp_max(SILU[j]) for j, part in enumerate(at)]
    return Jet(torch.stack(_compose(at[:-1], jet.terms)), jet.half, _rest(near, sizes, jet))


def _silu_terms(x: Tensor, n: int) -> list[Tensor]:
    """phi^(j)(x) / j!, j = 0, ..., n: of phi = x s from those of the sigmoid s, and these from s' = s - s^2."""
    s = [x.sigmoid()]
    for j in range(n):
        s.append((s[j] - _coefficient(s, s, j)) / (j + 1))
    return [x * s[0], *(x * s[j] + s[j - 1] for j in range(1, n + 1))]


def _group_norm(module: nn.GroupNorm, jet: Jet, norms: Norms) -> Jet:
    """gamma G(w) + beta in each group, G as for NORMALISED, w the entries less their mean, an orthogonal projection."""
    if not module.affine or module.eps <= 0:
        raise UncertifiableError(f"a jet does not pass through {module}; use affine=True and eps > 0")
    n, shape = len(jet.terms) - 1, jet.terms.shape
    gamma, beta = (part.to(jet.terms).view(-1, 1, 1) for part in (module.weight, module.bias))
    w = jet.terms.reshape(*shape[:2], module.num_groups, -1)
    w = w - w.mean(3, keepdim=True)
    squares = [part.mean(2, keepdim=True) for part in _product(w, w)]
    q = squares[0] + module.eps
    roots = [math.prod(0.5 / i - 1 for i in range(1, j + 1)) * q ** (-0.5 - j) for j in range(n + 1)]
    terms = gamma * torch.stack(_product(w, _compose(roots, squares))).view(shape)
    terms[0] += beta

    half, rest = jet.half[:, None], jet.rest[:, None]
    lengths, size = w.norm(dim=3), w.shape[3]
    sizes = _sizes(lengths, half)
    least = (2 * lengths[0] - sizes[0] - half * rest).clamp_min(0)  # of ||w||
    root = (least**2 / size + module.eps).rsqrt()
    largest = gamma.view(module.num_groups, -1).abs().amax(1)
    near = [NORMALISED[j] * largest * root**j * size ** ((1 - j) / 2) for j in range(n + 2)]
    return Jet(terms, jet.half, _rest(near, sizes, jet))


def _rest(near: Sequence[Tensor], sizes: Sequence[Tensor], jet: Jet) -> Tensor:
    """The rest of F's jet, (k,), F made of parts (k, ...): pixels or groups.

    F(p)' - T' is at most (n + 1) h^n times the Taylor coefficient of order n + 1 of F(p), at any t, and DF(v) - DF(p)
    at most h rest times the second derivative.

    Args:
        near: bounds of |D^j F| / j! of each part wherever v and p may be and between them, j = 0, ..., n + 1.
        sizes: bounds of |p^(j)| / j! of each part, j = 0, ..., n.
    """
    order = len(sizes)
    missed = order * jet.half ** (order - 1) * _norm(_compose(near, sizes)[order])
    grown = _most(near[1]) + jet.half * _most(2 * near[2] * sizes[1])
    return _up(missed + grown * jet.rest)


LAYERS: dict[type, Callable[..., Jet]] = {
    nn.Identity: _identity,
    nn.Conv2d: _conv,
    nn.AvgPool2d: _pool,
    nn.Upsample: _upsample,
    nn.PixelShuffle: _shuffle,
    nn.SiLU: _silu,
    nn.GroupNorm: _group_norm,
}


# ---------------------------------------------------------------- polynomials


def _product(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The first coefficients of the product of two polynomials in t, as many as each has."""
    return [_coefficient(a, b, j) for j in range(len(a))]


def _compose(outer: Sequence[Tensor], inner: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The first coefficients of sum_j outer_j (inner(t) - inner_0)^j, as many as outer has, by Horner's rule."""
    found = [outer[-1]]
    for part in reversed(outer[:-1]):
        found = [part, *(_coefficient(found, inner[1:], j) for j in range(len(found)))]
    return found


def _coefficient(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor, j: int) -> Tensor:
    """The coefficient of t^j of the product of two polynomials in t, of which a has one of t^j."""
    return sum((a[j - i] * b[i] for i in range(1, min(j + 1, len(b)))), a[j] * b[0])


def _sizes(sizes: Tensor, half: Tensor) -> list[Tensor]:
    """Bounds of the Taylor coefficients of a polynomial at any |t| <= half from their sizes at 0, (n + 1, ...)."""
    n = len(sizes) - 1
    return [
        sum((math.comb(i, j) * half ** (i - j) * sizes[i] for i in range(j + 1, n + 1)), sizes[j]) for j in range(n + 1)
    ]


def _farthest(terms: Sequence[Tensor], half: Tensor) -> Tensor:
    """Bound of ||p(t)||_2 over |t| <= half, (k,): of its linear part at the ends, where it is largest, and others."""
    start, slope, *others = terms
    step = _beside(half, start) * slope
    ends = torch.maximum(_norm(start - step), _norm(start + step))
    return sum((half**i * _norm(term) for i, term in enumerate(others, 2)), ends)


# ---------------------------------------------------------------- numbers


def _beside(numbers: Tensor, x: Tensor) -> Tensor:
    """Numbers (k,) as (k, 1, ..., 1), with as many dimensions as x."""
    return numbers.view(-1, *[1] * (x.dim() - 1))


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _most(x: Tensor) -> Tensor:
    return x.flatten(1).amax(1)


def _up(bound: Tensor) -> Tensor:
    """The bound, rounded up. One that is not a number is infinite."""
    return (bound * (1 + 1e-5)).nan_to_num(nan=math.inf, posinf=math.inf)
