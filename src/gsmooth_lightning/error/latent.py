"""How far an attack moves an image in the latent space of a surrogate (GSmooth; theory.md section 9)."""

import math
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsmooth_lightning.error.base import Bound, ErrorBound
from gsmooth_lightning.error.chords import clip_kinks
from gsmooth_lightning.error.jets import Norms, line, through
from gsmooth_lightning.error.movement import saved_error
from gsmooth_lightning.error.slices import AT_ONCE, GRIDDED, MOST_SLICES, Slices, covered, start_error
from gsmooth_lightning.errors import UncertifiableError, positive
from gsmooth_lightning.preprocess import lipschitz
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Latent
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Mover
from gsmooth_lightning.transform.surrogate import Encoder

Between = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Numbers about pieces low, high, (k,) each, of a parameter's range: tensors of k rows."""

Curve = tuple[tuple[float, ...], ...]
"""See `Bound.curve`."""

PIECES = 16
"""Pieces of a range at first."""

MOST = 8192
"""Pieces whose bounds are computed for an image, at most."""

HOPELESS = 4.0
"""Displacement in sigma beyond which no bound is made closer: hardly any votes outweigh it."""

CELLS = 20
"""Cells along each axis of the grid on which a function without a movement bound is tried."""

LEFT = f"the range needs more than {MOST_SLICES:,} slices; raise error.tolerance or noise.sigma, or narrow the threat"
"""What a certificate says that was left for it."""

FLOATS = 2.0**-18
"""Rounding errors of an encoder in float32, for each value, over one more than the largest of them."""


class DisplacementBound(ErrorBound):
    """Bounds F2(x') - F2(x) over the threat's attacked images x', in parts: A1 a, which is a shift of theta by a, and a
    rest of at most E sigma.

    The smoothed classifier of an image z is a function of F2(z) + A1 theta + epsilon. What a file's latent is moved by
    moves the law of this sum (Theorem L): see `smoothing.Latent` for what it leaves of the votes.
    """

    latent = True

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        """Refuses what has no latent space.

        Raises:
            UncertifiableError: pixel threats, other noise, draws before the encoder, or an encoder whose Lipschitz
                constant is not known.
        """
        if not isinstance(threat, TransformationThreat):
            raise UncertifiableError("pixel threats do not go through a surrogate; use certify=direct")
        if not isinstance(smoothed.noise, Latent):
            raise UncertifiableError(
                "a displacement in latent space is held against noise there; use model=latent, preprocess=latent and "
                "noise=latent"
            )
        if smoothed.law is not None:
            raise UncertifiableError(f"{smoothed.transform.name} is drawn before the encoder; use law=none")
        if threat.l2 and not self.covers_l2:
            raise UncertifiableError("changes by threat.l2 after a surrogate are not covered; set threat.l2=0")
        if not math.isfinite(lipschitz(smoothed.preprocess)):
            raise UncertifiableError("the encoder must state how far it stretches l2 distances; use preprocess=latent")
        return threat


class RealDisplacement(DisplacementBound):
    """Of the transformation itself: `sound`.

    Of one parameter and a known departure from linear (`Mover`): between two ends of a piece the image lies on the line
    between theirs up to its departure, which F2 stretches by its Lipschitz constant at most; the line's latents are
    bounded by Taylor polynomials (see `jets`). Pieces are halved until their bound is at most `tolerance` above their
    middle's displacement. Of other transformations the slices of certify=cover are taken, listed or cut, so that
    latents move by at most `tolerance` within one.

    Args:
        tolerance: in sigma.

    Raises:
        RequestError: a tolerance that is not positive.
    """

    covers_l2 = True

    def __init__(self, tolerance: float = 0.1):
        self.tolerance = positive("error.tolerance", tolerance)
        self.norms: Norms = {}

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        own = super().check(smoothed, threat)
        _, rest = covered(threat)
        if rest.dim:
            raise UncertifiableError(f"{rest.name} after {own.transform.name} is not covered in latent space")
        return own

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        assert isinstance(smoothed.noise, Latent)
        start_error(smoothed, threat, x)  # refuses a function of chance
        slices = Slices(smoothed, threat, x)
        along = isinstance(slices.first, Mover) and slices.first.dim == 1 and threat.step is None
        if along and isinstance(smoothed.preprocess, Encoder):
            work = partial(self.between, smoothed, threat, x)
            curve = yield from curve_along(smoothed.noise, threat, x.device, work, self.tolerance)
        else:
            curve = yield from self.visited(smoothed.noise, slices)
        guarantee, details = ("heuristic", {"rests_on": GRIDDED}) if slices.gridded else ("sound", {})
        largest = max(row[-1] for row in curve)
        if largest == math.inf:
            details["left"] = LEFT
        return Bound(largest, 0.0, 0.0, guarantee, details, curve=curve)

    @torch.inference_mode()
    def between(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a, E of the middle, bound of E) over pieces low, high, (k,), in sigma (see `curve_along`)."""
        mover, encoder, noise = threat.transform, smoothed.preprocess, smoothed.noise
        assert isinstance(mover, Mover)
        assert isinstance(encoder, Encoder)
        assert isinstance(noise, Latent)
        ends = torch.stack([mover(x.expand(len(low), *x.shape), at[:, None].float()) for at in (low, high)])
        away = mover.departure(x, low[:, None], high[:, None]) + clip_kinks(threat, ends)
        ends = threat.clip(ends).double()
        files = away + saved_error(threat, ends.amin(0) - away, ends.amax(0) + away)
        middle, direction = ends.mean(0), (ends[1] - ends[0]) / 2
        jet = through(nn.Sequential(*encoder), line(middle, direction, torch.ones_like(middle[:, 0, 0, 0])), self.norms)
        code = encoder(x[None])
        a, rest = noise.split(jet.terms[0] - code)
        bound = jet.distance(code + torch.tensordot(a, noise.directions, 1))
        beside = lipschitz(encoder) * (files.flatten(1).norm(dim=1) + threat.l2) + rounded(
            smoothed, code, jet.terms[0], rest
        )
        return a, rest.flatten(1).norm(dim=1) / noise.sigma, (bound + beside) / noise.sigma * (1 + 1e-6)

    def visited(self, noise: Latent, slices: Slices) -> Generator[Any, Any, Curve]:
        """The curve over the slices of certify=cover."""
        smoothed, x = slices.smoothed, slices.x
        pieces = yield from slices.whole(self.tolerance * noise.sigma, CELLS)
        if pieces is None:
            return ((0.0,) * (noise.dim + 1) + (math.inf,),)

        @torch.inference_mode()
        def displaced(first: int) -> tuple[Tensor, Tensor]:
            some = pieces[first : first + AT_ONCE]
            code, codes = smoothed.preprocess(x[None]), smoothed.preprocess(slices.middles(some))
            a, rest = noise.split(codes - code)
            return a, rest.flatten(1).norm(dim=1) + rounded(smoothed, code, codes, rest)

        found = yield [partial(displaced, first) for first in range(0, len(pieces), AT_ONCE)]
        a, rest = (torch.cat(part).tolist() for part in zip(*found, strict=True))
        rows = zip(pieces, a, rest, strict=True)
        return frontier(
            noise, ((p.near, *shift, (p.moved + p.fixed + r) / noise.sigma * (1 + 1e-6)) for p, shift, r in rows)
        )


def halved(
    threat: TransformationThreat, device: torch.device, work: Between, enough: Callable[..., Tensor]
) -> Generator[Any, Any, list[Tensor]]:
    """(nearest parameter to 0, *work) of pieces of the one parameter's range, which are halved until `enough(*work)`,
    or until there are MOST, as a procedure (see `rounds`)."""
    grid = torch.linspace(threat.low, threat.high, PIECES + 1, dtype=torch.float64, device=device)
    low, high, count = grid[:-1], grid[1:], 0
    kept: list[list[Tensor]] = []
    while len(low):
        count += len(low)
        parts = zip(low.split(AT_ONCE), high.split(AT_ONCE), strict=True)
        found = [torch.cat(part) for part in zip(*(yield [partial(work, *ends) for ends in parts]), strict=True)]
        done = enough(*found) if count < MOST else torch.ones_like(low, dtype=torch.bool)
        nearest = torch.zeros_like(low).clamp(low, high).abs()
        kept.append([part[done] for part in (nearest, *found)])
        middle = ((low + high) / 2)[~done]
        low, high = torch.cat([low[~done], middle]), torch.cat([middle, high[~done]])
    return [torch.cat(part) for part in zip(*kept, strict=True)]


def curve_along(
    noise: Latent, threat: TransformationThreat, device: torch.device, work: Between, tolerance: float
) -> Generator[Any, Any, Curve]:
    """The curve from (a, E of the middle, bound of E) of pieces: they are halved until the bound is at most `tolerance`
    above the middle's, unless that is beyond HOPELESS already."""

    def enough(a: Tensor, middle: Tensor, bound: Tensor) -> Tensor:
        return (bound <= middle + tolerance) | (middle > HOPELESS)

    near, a, _, bound = yield from halved(threat, device, work, enough)
    rows = torch.cat([near[:, None] * (1 - 1e-12), a, bound[:, None].double()], 1)
    return frontier(noise, map(tuple, rows.tolist()))


def rounded(smoothed: SmoothedClassifier, code: Tensor, codes: Tensor, rest: Tensor) -> Tensor:
    """Bound of what the noise's grid and float32 move the latents `code`, (1, *e), and `codes` = code + A1 a + rest,
    (k, *e), apart, in l2: half a step and FLOATS for each, (k,). inf where code or code + A1 a lies beyond what the
    grid holds: latents are clamped there, and that moves a latent no farther from one inside, but from no other."""
    largest = torch.maximum(codes.flatten(1).abs().amax(1), code.abs().amax())
    inside = torch.maximum((codes - rest).flatten(1).abs().amax(1), code.abs().amax()) * smoothed.levels
    moved = (1 / smoothed.levels + 2 * FLOATS * (1 + largest)) * math.sqrt(code[0].numel())
    return moved.masked_fill(inside > smoothed.largest, math.inf)


def sizes(noise: Latent, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(gauge, E) of rows (radius, a, E): the gauge of a under the law of theta; of a Gaussian law, with which epsilon
    is one Gaussian mechanism, 0 and sqrt(gauge^2 + E^2)."""
    gauge, error = noise.law.gauge(torch.from_numpy(rows[:, 1:-1])).cpu().numpy(), rows[:, -1]
    if isinstance(noise.law, Gaussian):
        return np.zeros_like(error), np.hypot(gauge, error)
    return gauge, error


def frontier(noise: Latent, rows: Iterable[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """The rows that no row at a smaller radius outdoes in gauge and E."""
    ordered = np.array(sorted(rows))
    gauge, error = sizes(noise, ordered)
    kept: list[int] = []
    for i in range(len(ordered)):
        if not any(gauge[j] >= gauge[i] and error[j] >= error[i] for j in kept):
            kept.append(i)
    return tuple(map(tuple, ordered[kept].tolist()))
