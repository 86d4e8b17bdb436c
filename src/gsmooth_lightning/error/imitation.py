"""Displacements of a surrogate's images in place of the transformation's (GSmooth; theory.md section 9)."""

import math
import warnings
from collections.abc import Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gsmooth_lightning.error.base import Bound
from gsmooth_lightning.error.jets import Jet, Norms, line, through
from gsmooth_lightning.error.latent import DisplacementBound, curve_along, halved, rounded
from gsmooth_lightning.error.slices import AT_ONCE
from gsmooth_lightning.errors import UncertifiableError, check_whole, positive
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Latent
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Surrogate, same

CLOSE = 1.1
"""How far a proved M* may be above the largest slope seen."""

SETTLED = 0.05
"""By how much M* may grow when its grid is refined once more."""

REFINEMENTS = 6
"""How often the grid of M* is refined."""

FAR_START = 0.5
"""Distance of tau(0, x) from x in latent space, in units of the noise, from which on Corollary 1 is warned about."""

PUBLISHED = "Corollary 1 as published: M* from a grid, and the imitation at 0 taken for the image itself"
"""What GSmooth's own certificate takes for granted."""


class ImitationBound(DisplacementBound):
    """Of the surrogate in place of the transformation.

    Args:
        surrogate: tau, whose encoder and directions the classifier is smoothed with.
        proved: by Taylor polynomials along the line of one parameter (see `jets`).
    """

    def __init__(self, surrogate: Surrogate, proved: bool = True):
        self.surrogate, self.proved = surrogate, proved
        self.norms: Norms = {}

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        """Refuses another surrogate than the classifier's, and a threat that it does not imitate.

        Raises:
            UncertifiableError: and as in `DisplacementBound`.
        """
        own = super().check(smoothed, threat)
        assert isinstance(smoothed.noise, Latent)
        surrogate, trained = self.surrogate, self.surrogate.trained_on
        if type(surrogate.shift) is not nn.Linear:
            raise UncertifiableError(
                "F1 of this surrogate is not linear, so that parameters do not add in latent space; use a linear one"
            )
        alike = same(surrogate.encoder, smoothed.preprocess)
        if not alike or not torch.equal(surrogate.directions.double().cpu(), smoothed.noise.directions.cpu()):
            raise UncertifiableError("the classifier is smoothed in the latent space of another surrogate; use its own")
        if own.transform.name != trained["of"]:
            raise UncertifiableError(
                f"the surrogate imitates {trained['of']}, the threat is {own.transform.name}; train one for it"
            )
        ends = zip(trained["lows"], own.lows, own.highs, trained["highs"], strict=True)
        if any(low < least or high > most for least, low, high, most in ends):
            raise UncertifiableError(
                f"the surrogate was trained on {trained['lows']} to {trained['highs']}, and the threat goes beyond; "
                "narrow the threat, or train a surrogate for it"
            )
        if self.proved and own.transform.dim > 1:
            raise UncertifiableError(
                f"{own.transform.name} has {own.transform.dim} parameters, and a surrogate's displacement is proved "
                "along one; use error=latent, of the transformation itself"
            )
        return own

    def along(self, x: Tensor, low: Tensor, high: Tensor) -> Jet:
        """F2(tau(xi, x)) over pieces low, high, (k,), of the one parameter, as a jet in the parameter's unit."""
        return self.jet(x, (low + high)[:, None] / 2, 0, (high - low) / 2, 4)

    def jet(self, x: Tensor, xi: Tensor, axis: int, half: Tensor, order: int) -> Jet:
        """F2(tau(xi + t e_axis, x)), |t| <= half, as a jet around parameters xi, (k, dim)."""
        surrogate, kind = self.surrogate.to(x.device), torch.float64 if x.is_cuda else torch.float32  # no TF32
        code = surrogate.encoder(x[None]) + surrogate.parameters_code(xi)
        direction = surrogate.directions[axis].expand_as(code)
        network = nn.Sequential(surrogate.decoder, nn.Sequential(*surrogate.encoder))
        return through(network, line(code.to(kind), direction.to(kind), half.to(kind), order), self.norms)


class SurrogateDisplacement(ImitationBound):
    """Of tau(xi, x) for every xi of the range, of one parameter (Theorem L on the surrogate): `surrogate`.

    Taylor polynomials along the line of the latents F2(x) + F1(xi) bound the displacement over pieces of the range (see
    `jets`), which are halved until their bound is at most `tolerance` above their middle's displacement. The network's
    own rounding is not counted.

    Args:
        surrogate: see `ImitationBound`.
        tolerance: in sigma.

    Raises:
        RequestError: a tolerance that is not positive.
    """

    def __init__(self, surrogate: Surrogate, tolerance: float = 0.1):
        super().__init__(surrogate)
        self.tolerance = positive("error.tolerance", tolerance)

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        assert isinstance(smoothed.noise, Latent)
        work = partial(self.between, smoothed, x)
        curve = yield from curve_along(smoothed.noise, threat, x.device, work, self.tolerance)
        return Bound(max(row[-1] for row in curve), 0.0, 0.0, "surrogate", curve=curve)

    @torch.inference_mode()
    def between(
        self, smoothed: SmoothedClassifier, x: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a, E of the middle, bound of E) over pieces low, high, (k,), in sigma (see `curve_along`)."""
        noise = smoothed.noise
        assert isinstance(noise, Latent)
        jet, code = self.along(x, low, high), smoothed.preprocess(x[None])
        a, rest = noise.split(jet.terms[0] - code)
        bound = jet.distance((code + torch.tensordot(a, noise.directions, 1)).to(jet.terms.dtype))
        bound = bound + rounded(smoothed, code, jet.terms[0], rest)
        return a, rest.flatten(1).norm(dim=1) / noise.sigma, bound / noise.sigma * (1 + 1e-6)


class CorollaryBound(ImitationBound):
    """M* of Corollary 1: tau(xi, x) is at most M* |xi| away in latent space, in units of the noise.

    M* = max_xi sqrt(lambda_max), lambda_max the largest eigenvalue of diag(1 / s1^2) + J'J / s2^2, with
    J = dF2(tau(xi, x)) / dxi - A1, which has a column for each parameter: exact, by forward differentiation.

    As published (`heuristic`) the maximum is taken over a grid, refined until it grows by less than SETTLED; and
    tau(0, x) counts as x. With `proved`, of one parameter, J is bounded over pieces of the range by Taylor polynomials,
    and the distance of tau(0, x) from x is added (`surrogate`).

    Args:
        surrogate: see `ImitationBound`.
        points: of the grid at first.
        proved: see above. Pieces are halved until their bound is at most a tenth above the largest of their middles.

    Raises:
        RequestError: fewer than two points.
    """

    def __init__(self, surrogate: Surrogate, points: int = 65, proved: bool = False):
        super().__init__(surrogate, proved)
        check_whole("error", points=(points, 2))
        self.points = points

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        own = super().check(smoothed, threat)
        assert isinstance(smoothed.noise, Latent)
        if not isinstance(smoothed.noise.law, Gaussian):
            raise UncertifiableError("Corollary 1 is for Gaussian parameters; use noise.law=gaussian, or error=latent")
        if not own.alike:
            raise UncertifiableError("Corollary 1 measures parameters of one unit; this transformation has several")
        return own

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        assert isinstance(smoothed.noise, Latent)
        noise = smoothed.noise
        (start,) = yield [partial(self.start, smoothed, x)]
        (distance, floats, largest), rest = start.tolist(), (0.0,) * noise.dim
        details: dict[str, Any] = {"start": distance}
        if distance > FAR_START:
            warnings.warn(
                "tau(0, x) is far from x in latent space, which Corollary 1 as published ignores; train the surrogate "
                "longer",
                stacklevel=2,
            )
        if self.proved:
            slope = yield from self.proved_slope(noise, threat, x)
            offset = distance + floats
            along = float((noise.directions.abs().flatten(1).amax(1) * noise.spread).sum())  # of theta's share in it
            if (largest + (offset + slope * threat.reach) * along) * smoothed.levels > smoothed.largest:
                offset = math.inf  # latents would be clamped, see `rounded`
            return Bound(slope, 0.0, 0.0, "surrogate", details, curve=((0.0, *rest, offset),), slope=slope)
        slope = (yield from self.grid_slope(noise, threat, x)) * math.sqrt(noise.dim)  # a radius bounds each parameter
        details["rests_on"] = PUBLISHED
        return Bound(slope, 0.0, 0.0, "heuristic", details, curve=((0.0, *rest, 0.0),), slope=slope)

    @torch.inference_mode()
    def start(self, smoothed: SmoothedClassifier, x: Tensor) -> Tensor:
        """(distance of tau(0, x) from x in latent space, and what rounding adds, in units of the noise; largest value
        of F2(x)), (3,)."""
        assert isinstance(smoothed.noise, Latent)
        zero = torch.zeros(1, self.surrogate.dim, device=x.device)
        code, other = smoothed.preprocess(x[None]), smoothed.preprocess(self.surrogate.to(x.device)(x[None], zero))
        distance = smoothed.noise.gauge(other - code) * (1 + 1e-4)
        floats = rounded(smoothed, code, other, other - code) / smoothed.noise.sigma
        return torch.cat([distance, floats.double(), code.abs().amax()[None].double()])

    def grid_slope(self, noise: Latent, threat: TransformationThreat, x: Tensor) -> Generator[Any, Any, float]:
        """M* on a grid that is refined until it settles.

        Raises:
            UncertifiableError: it does not.
        """
        side, before = max(3, math.ceil(self.points ** (1 / noise.dim))), 0.0
        for _ in range(REFINEMENTS):
            xi = threat.parameters(side**noise.dim)[0].to(x.device)
            found = yield [partial(self.slopes, noise, x, some) for some in xi.split(AT_ONCE)]
            largest = float(torch.cat(found).max())
            if largest <= before * (1 + SETTLED):
                return largest
            side, before = 2 * side - 1, largest
        raise UncertifiableError(
            "M* grows with every refinement of its grid; raise error.points, or train the surrogate again"
        )

    @torch.inference_mode()
    def slopes(self, noise: Latent, x: Tensor, xi: Tensor) -> Tensor:
        """sqrt(lambda_max) at each parameter, (k, dim) -> (k,); the columns of J are first terms of jets."""
        still = torch.zeros(len(xi), device=x.device)
        columns = [self.jet(x, xi, k, still, 2).terms[1].double() - noise.directions[k] for k in range(noise.dim)]
        residual = torch.stack(columns, 1).flatten(2)  # (k, dim, d)
        gram = residual @ residual.mT / noise.sigma**2 + torch.diag(noise.spread**-2)
        return torch.linalg.eigvalsh(gram)[:, -1].sqrt()

    def proved_slope(self, noise: Latent, threat: TransformationThreat, x: Tensor) -> Generator[Any, Any, float]:
        """A bound of M* of one parameter."""
        largest = 0.0

        @torch.inference_mode()
        def steepest(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
            jet = self.along(x, low, high)
            own = noise.directions[0].to(jet.terms.dtype)
            residuals = jet.slope(own).double(), (jet.terms[1] - own).flatten(1).norm(dim=1).double()
            bound, middle = (torch.hypot(residual / noise.sigma, 1 / noise.spread) for residual in residuals)
            return bound, middle

        def enough(bound: Tensor, middle: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, float(middle.max()))
            return bound <= CLOSE * largest

        _, bound, _ = yield from halved(threat, x.device, steepest, enough)
        return float(bound.max()) * (1 + 1e-6)
