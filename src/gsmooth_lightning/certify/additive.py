"""The direct certificate: the attack moves the smoothing law, and nothing else happens but rounding."""

import math
from collections.abc import Generator
from typing import Any

from torch import Tensor

from gsmooth_lightning.certify.base import TransferCertifier
from gsmooth_lightning.certify.region import Ellipsoid, LowRankEllipsoid
from gsmooth_lightning.certify.transfer import Transfer, parameter_transfer, pixel_transfer
from gsmooth_lightning.error import Bound
from gsmooth_lightning.error.base import check_resolvable
from gsmooth_lightning.error.rounding import GRID, rounding_bound
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.preprocess import is_nothing, lipschitz
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Law, LowRankGaussian, Product
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, Threat, TransformationThreat
from gsmooth_lightning.transform import BrightnessContrast, Composition, Identity, Transform, is_exact, same

REAL = "real arithmetic: that floats round the transformation is not covered (Gaussian pixel noise would pay for it)"
"""What a direct certificate of a transformation without pixel noise takes for granted."""


class AdditiveCertifier(TransferCertifier):
    """The prediction is kept by every shift delta of the law with transfer(pA) > 1 - transfer(1 - pB).

    Pixel noise: the law is the noise's, and the radius is in the norm it certifies: l2 for Gaussian noise, sigma_min
    (z(pA) - z(pB)) / 2 (Cohen et al. 2019, Theorem 1); l1 for Laplace and uniform noise; converted to the threat's norm
    (l_inf from l2: divided by sqrt(D)). Inputs that are not on the noise grid (float files, or after preprocessing) are
    rounded to it first; both inputs of a pair move by at most half a step a pixel, so the radius shrinks by the norm of
    1.1 / levels in every pixel.

    Exact transformations (brightness, contrast, gamma, blur, volume, cyclic translation, and compositions): the law is
    the parameters', psi(psi(x, gamma), theta) = psi(x, gamma + theta) in real arithmetic, and the radius is in their
    unit (Fischer et al. 2020, Theorem 4.2; TSS). Files round and clip, parameters and images lie on grids: with
    Gaussian pixel noise of sigma beside the law all this is a defect of at most E sigma in the l2 norm, which the noise
    pays for (Theorem J), and the certificate is sound. Without noise a network made for it could tell apart what the
    theorem takes as equal (theory.md section 11): then the certificate is labelled `heuristic`, and files that round or
    clip are refused. Cyclic translation has no defect.
    """

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if isinstance(threat, TransformationThreat):
            _check_parameters(smoothed, threat)
        else:
            _check_pixels(smoothed, threat)
        self.check_plan(smoothed, threat)

    def bound(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        if isinstance(threat, PixelThreat):
            assert smoothed.noise is not None
            return Bound(pixel_rounding(smoothed, threat, x), 0.0, smoothed.noise.alpha, "sound")
        assert isinstance(threat, TransformationThreat)
        if is_exact(smoothed.transform) and smoothed.transform.permutes:
            return Bound(0.0, 0.0, 0.0, "sound")
        if smoothed.noise is None:
            return Bound(0.0, 0.0, 0.0, "heuristic", {"rests_on": REAL})
        return rounding_bound(smoothed, threat, x)
        yield  # a procedure without jobs

    def transfer(self, smoothed: SmoothedClassifier, threat: Threat, bound: Bound, dim: int, slack: float) -> Transfer:
        if isinstance(threat, TransformationThreat):
            assert smoothed.law is not None
            return parameter_transfer(smoothed.transform, smoothed.law, threat, bound, slack)
        assert isinstance(threat, PixelThreat)
        assert smoothed.noise is not None
        return pixel_transfer(smoothed.noise, threat, dim, bound, slack)

    def region(
        self, smoothed: SmoothedClassifier, threat: Threat, dim: int, radius: float | list[float]
    ) -> dict[str, dict[str, float]]:
        """Of Gaussian pixel noise the ellipsoid {gauge <= radius / reach(1)}: the radius is that of its inscribed ball.

        `area` is ln det(Sigma) / 2 + D ln R (Tecot et al. 2021), `log_volume` adds that of the unit ball, `linf` is the
        half width of the inscribed cube, `axis_least`, `axis_mean` (geometric, of Sigma) and `axis_largest` are lengths
        of the ellipsoid along the pixels' axes.
        """
        noise = smoothed.noise
        if not isinstance(threat, PixelThreat) or threat.norm != "l2" or not is_nothing(smoothed.preprocess):
            return {}
        if not isinstance(noise, Gaussian | LowRankGaussian) or isinstance(radius, list) or not radius:
            return {}
        size, sigma = radius / float(noise.reach(1.0)), noise.sigma
        if isinstance(noise, Gaussian):  # a sigma that is broadcast is that of as many values as the others
            found = Ellipsoid(Gaussian(sigma.flatten().repeat(dim // sigma.numel())), size, (dim,))
        else:
            found = LowRankEllipsoid(noise, size, tuple(sigma.shape))
        axes = found.axis_radii()
        numbers = {
            "area": found.area(),
            "log_volume": found.log_volume(),
            "linf": found.inscribed("linf"),
            "axis_least": float(axes.min()),
            "axis_mean": math.exp(found.area() / found.dim),
            "axis_largest": float(axes.max()),
        }
        return {"region": {name: value - 1e-12 * abs(value) for name, value in numbers.items()}}


# ---------------------------------------------------------------- hypotheses


def _check_parameters(smoothed: SmoothedClassifier, threat: TransformationThreat) -> None:
    mine, theirs, law = smoothed.transform, threat.transform, smoothed.law
    check_resolvable(theirs)
    if not is_exact(theirs):
        how = getattr(theirs, "interpolation", "its")
        raise UncertifiableError(f"{theirs.name} is not exact under {how} interpolation; use certify=joint")
    if not same(mine, theirs):
        raise UncertifiableError(
            f"the classifier is smoothed over {mine.name}, the threat is {theirs.name}: smooth over the threat's "
            "transformation (transform and threat must name the same one, with the same settings)"
        )
    if threat.l2:
        raise UncertifiableError("changes by threat.l2 beside an exact transformation are not covered; set threat.l2=0")
    assert law is not None  # SmoothedClassifier demands it beside a transformation
    check_law(theirs, law, threat.lows)
    if theirs.permutes:
        return
    if threat.clips():
        raise UncertifiableError(
            f"{theirs.name} is clipped in files {threat.file()}, and what is lost does not come back; use "
            "threat.saved=real, which certifies the values before that"
        )
    if smoothed.noise is None and threat.saved != "real":
        raise UncertifiableError(
            f"{theirs.name} is rounded in files {threat.file()}; use noise=gaussian, which pays for it, or "
            "threat.saved=real, which certifies the values before that"
        )
    if smoothed.noise is not None:
        if not isinstance(smoothed.noise, Gaussian) or smoothed.noise.cholesky is not None:
            raise UncertifiableError("only Gaussian pixel noise pays for the rounding of a file; use noise=gaussian")
        check_stretch(smoothed)


def check_stretch(smoothed: SmoothedClassifier) -> None:
    """Refuses preprocessing of which no Lipschitz constant is known."""
    if not math.isfinite(lipschitz(smoothed.preprocess)):
        raise UncertifiableError(
            "preprocessing must say how much it stretches l2 distances: use steps with an attribute lipschitz"
        )


def check_law(transform: Transform, law: Law, lows: tuple[float, ...]) -> None:
    """Refuses laws that do not cover an attack on the transformation's parameters down to `lows`."""
    if isinstance(transform, Composition):
        if not isinstance(law, Product) or [part.dim for part in transform.parts] != law.dims:
            raise UncertifiableError(
                f"{transform.name} needs a law for each part; use law=product with parts and dims in the same order"
            )
        first = 0
        for part, own in zip(transform.parts, law.parts, strict=True):
            check_law(part, own, lows[first : first + part.dim])
            first += part.dim
        return
    if isinstance(law, Product):
        raise UncertifiableError(f"{transform.name} is no composition; use one law for its parameters")
    if law.alpha:
        raise UncertifiableError("this law's transfer is estimated, for pixel noise alone; use law=gaussian")
    if isinstance(transform, BrightnessContrast):
        if not isinstance(law, Gaussian) or law.cholesky is not None or law.sigma.numel() > 2:
            raise UncertifiableError(
                "brightness and contrast together are certified for independent Gaussian parameters; use law=gaussian "
                "with law.sigma=[CONTRAST,BRIGHTNESS]"
            )
    elif transform.dim > 1 and not law.any_dimension:
        raise UncertifiableError(f"this law is for one parameter, {transform.name} has {transform.dim}; use gaussian")
    if law.one_sided and min(lows) < 0:
        raise UncertifiableError(
            f"this law certifies no negative {', '.join(transform.units)}; set threat.low=0, or choose a two-sided law"
        )


def _check_pixels(smoothed: SmoothedClassifier, threat: Threat) -> None:
    if not isinstance(threat, PixelThreat):
        raise UncertifiableError("the direct certificate covers pixel noise and transformations; use threat=l2")
    noise, norm = smoothed.noise, threat.norm
    if noise is None or noise.one_sided or not noise.any_dimension:
        fitting = {"l1": "laplace or noise=uniform", "l2": "gaussian", "linf": "gaussian"}[norm]
        raise UncertifiableError(f"this pixel noise has no radius in {norm}; use noise={fitting}")
    if getattr(noise, "cholesky", None) is not None:
        raise UncertifiableError("pixel noise with a full covariance has no radius; use noise=gaussian")
    if smoothed.law is not None:
        raise UncertifiableError(
            f"an {norm} attack before a random transformation is not covered; use transform=identity with threat={norm}"
        )
    if not isinstance(smoothed.transform, Identity):
        raise UncertifiableError("a fixed transformation before the noise is not covered; use transform=identity")
    if norm != "l2" and not is_nothing(smoothed.preprocess):
        raise UncertifiableError(f"preprocessing is not known to keep {norm} distances; use preprocess=none")
    if not lipschitz(smoothed.preprocess) <= 1:
        raise UncertifiableError(
            "preprocessing must not stretch l2 distances, and say so: use steps with an attribute lipschitz <= 1"
        )


# ---------------------------------------------------------------- rounding


def pixel_rounding(smoothed: SmoothedClassifier, threat: PixelThreat, x: Tensor) -> float:
    """How much nearer the noise grid brings two inputs, in the law's own units."""
    if threat.levels is not None and smoothed.levels % threat.levels == 0 and is_nothing(smoothed.preprocess):
        return 0.0
    assert smoothed.noise is not None
    dim = math.prod(smoothed.encoded_shape(x))
    size = {"l1": dim, "l2": math.sqrt(dim), "linf": 1.0}[smoothed.noise.norm]
    return GRID * size / smoothed.levels / float(smoothed.noise.reach(1.0))
