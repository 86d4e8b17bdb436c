"""The direct certificate: the attack shifts the smoothing law, and nothing else happens."""

import math
from collections.abc import Generator
from typing import Any

from torch import Tensor, nn

from gsmooth_lightning.certify.base import Certificate, Certifier, round_down
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.preprocess import Preprocess
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Laplace, Law, Uniform
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, Threat, TransformationThreat
from gsmooth_lightning.transform import Additive, Identity, same

REAL = "real arithmetic: that float32 rounds the transformation is not covered"
"""What a direct certificate of a transformation takes for granted."""

RADIAL: dict[str, tuple[type[Law], ...]] = {"l2": (Gaussian,), "l1": (Laplace, Uniform)}
"""Laws of pixel noise whose radius in a norm is proved in every dimension."""

ROUNDING = 1.1
"""Two half steps of the grid a pixel, and a tenth for the preprocessing's float32."""


class AdditiveCertifier(Certifier):
    """The prediction is kept by every shift delta of the law with transfer(pA) > 1 - transfer(1 - pB).

    Pixel noise: the law is the noise's, and the radius is in the norm it certifies: l2 for Gaussian noise, sigma_min
    (z(pA) - z(pB)) / 2 (Cohen et al. 2019, Theorem 1); l1 for Laplace and uniform noise. Inputs that are not on the
    noise grid (float files, or after preprocessing) are rounded to it first; both inputs of a pair move by at most half
    a step a pixel, so the radius shrinks by the norm of 1.1 / levels in every pixel.

    Exact additive transformations (brightness, contrast, gamma, blur, volume): the law is the parameters',
    psi(psi(x, gamma), theta) = psi(x, gamma + theta) in real arithmetic, and the radius is in their unit (Fischer et
    al. 2020, Theorem 4.2; TSS). Pixel noise beside it changes nothing. Files that round or clip what the attacker
    computed are refused. These certificates are labelled `heuristic`: in float32 the equation holds up to rounding, and
    a network made for it could tell apart what the theorem takes as equal (theory.md section 11).
    """

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if isinstance(threat, TransformationThreat):
            law = _law_of_parameters(smoothed, threat)
        else:
            law = _law_of_pixels(smoothed, threat)
        pa = self.plan.ceiling
        self.refuse_unreachable(float(law.reach(law.radius(pa, 1 - pa))), threat.unit)

    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        transformed = isinstance(threat, TransformationThreat)
        law = smoothed.law if transformed else smoothed.noise
        rounding = 0.0 if transformed else _rounding(smoothed, threat, x)
        assert law is not None
        slack, unit = smoothed.slack(x), float(law.reach(1.0))  # the gauge is linear along the worst direction

        def threshold(radius: float) -> float:
            size = 0.0 if radius == 0 else (radius + rounding) / unit
            return float(law.required(size)) + slack

        outcome = yield from self.plan.run(
            lambda stage, first, last: smoothed.sample(x, stream, stage, first, last), smoothed.block, threshold
        )
        radius = outcome.passed
        if outcome.pa is not None and outcome.pb is not None:
            pa, pb = outcome.pa - slack, outcome.pb + slack
            radius = round_down(float(law.reach(law.radius(pa, pb))) - rounding) if pa > pb else None
        if isinstance(threat, TransformationThreat) and radius is not None:
            radius = threat.clip(radius)
        return self.conclude(
            smoothed,
            outcome,
            radius,
            x,
            stream,
            unit=threat.unit,
            guarantee="heuristic" if transformed else "sound",
            alpha=self.plan.alpha,
            details={"rests_on": REAL} if transformed else {},
        )


def _law_of_parameters(smoothed: SmoothedClassifier, threat: TransformationThreat) -> Law:
    """The law that the attack shifts, after every hypothesis of the theorem has been checked."""
    mine, theirs = smoothed.transform, threat.transform
    if not (isinstance(theirs, Additive) and theirs.exact):
        how = getattr(theirs, "interpolation", "its")
        raise UncertifiableError(f"{theirs.name} is not exact under {how} interpolation; use certify=joint")
    if not same(mine, theirs):
        raise UncertifiableError(
            f"the classifier is smoothed over {mine.name}, the threat is {theirs.name}: smooth over the threat's "
            "transformation (transform and threat must name the same one, with the same settings)"
        )
    if threat.saved != "real":
        raise UncertifiableError(
            f"{theirs.name} is not exact in files {threat.file()}; use threat.saved=real, which certifies the values "
            "before that"
        )
    law = smoothed.law
    assert law is not None  # SmoothedClassifier demands it beside a transformation
    if law.one_sided and threat.low < 0:
        raise UncertifiableError(
            f"this law certifies no negative {threat.unit}; set threat.low=0, or choose a two-sided law"
        )
    if min(threat.low, law.span[0]) < theirs.lowest:
        raise UncertifiableError(
            f"{theirs.name} has no parameters below {theirs.lowest:g}; set threat.low to it and choose a one-sided law"
        )
    return law


def _law_of_pixels(smoothed: SmoothedClassifier, threat: Threat) -> Law:
    """The noise's law, after every hypothesis of the theorem has been checked."""
    if not isinstance(threat, PixelThreat):
        raise UncertifiableError("the direct certificate covers pixel noise and transformations; use threat=l2")
    noise, norm = smoothed.noise, threat.norm
    if not isinstance(noise, RADIAL[norm]) or getattr(noise, "cholesky", None) is not None:
        fitting = {"l2": "noise=gaussian", "l1": "noise=laplace or noise=uniform"}[norm]
        raise UncertifiableError(f"this pixel noise has no radius in {norm}; use {fitting}")
    if smoothed.law is not None:
        raise UncertifiableError(
            f"an {norm} attack before a random transformation is not covered; use transform=identity with threat={norm}"
        )
    if not isinstance(smoothed.transform, Identity):
        raise UncertifiableError("a fixed transformation before the noise is not covered; use transform=identity")
    if norm == "l1" and not _is_nothing(smoothed.preprocess):
        raise UncertifiableError("preprocessing is not known to keep l1 distances; use preprocess=none")
    if not _lipschitz(smoothed.preprocess) <= 1:
        raise UncertifiableError(
            "preprocessing must not stretch l2 distances, and say so: use steps with an attribute lipschitz <= 1"
        )
    return noise


def _rounding(smoothed: SmoothedClassifier, threat: Threat, x: Tensor) -> float:
    """How much nearer the noise grid brings two inputs, in the threat's norm."""
    on_grid = threat.levels is not None and smoothed.levels % threat.levels == 0 and _is_nothing(smoothed.preprocess)
    size = x.numel() if threat.unit == "l1" else math.sqrt(x.numel())
    return 0.0 if on_grid else ROUNDING * size / smoothed.levels


def _is_nothing(preprocess: nn.Module) -> bool:
    return isinstance(preprocess, nn.Identity) or (isinstance(preprocess, Preprocess) and len(preprocess) == 0)


def _lipschitz(preprocess: nn.Module) -> float:
    """What preprocessing states about itself; infinity when it states nothing."""
    return 1.0 if _is_nothing(preprocess) else float(getattr(preprocess, "lipschitz", math.inf))  # type: ignore[arg-type]
