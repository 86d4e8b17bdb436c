"""The defect of a transformation, and the interface of its bounds."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.smoothing.similarity import similarity_sigma
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Additive, Composition, Resolvable, Similarity, Transform, same

SEARCHED = "the interpolation error was searched on sampled parameters, not maximised over all of them"
"""What a bound by sampling takes for granted, unless it tries every parameter there is."""


@dataclass(frozen=True)
class Bound:
    """For every gamma of the threat: P_theta( ||defect(x, theta, gamma)|| > E ) <= rho, or its soft form.

    Attributes:
        value: E, in units of the pixel noise (the norm of Sigma_eps^-1).
        rho: mass of parameters beyond E (Theorem J), or the soft rho of Theorem J'.
        alpha: probability that the statement itself is false.
        guarantee: "sound", "distributional" or "heuristic" (theory.md section 5).
        details: how it was made.
        parts: bounds that hold for the parts of a partition at once, whose norm is `value`; without one, E alone.
        curve: rows (radius, E): attacks from that radius on have defects up to E; value is the largest E. Of a bound in
            latent space, rows (radius, a_1, ..., a_m, E): they move the latent by A1 a and at most E sigma more. An
            attack that leaves no fewer votes than one at a smaller radius has no row of its own.
        slope: what E grows by a unit of radius, beside the curve (Corollary 1's M*).
    """

    value: float
    rho: float
    alpha: float
    guarantee: str
    details: dict[str, Any] = field(default_factory=dict)
    parts: tuple[float, ...] = ()
    curve: tuple[tuple[float, ...], ...] = ()
    slope: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts) or (self.value,))
        object.__setattr__(self, "curve", tuple(map(tuple, self.curve)))


def norm_of(parts: tuple[float, ...]) -> float:
    """The norm of a vector whose parts have these norms, rounded up."""
    return parts[0] if len(parts) == 1 else math.hypot(*parts) * (1 + 1e-12)


def check_resolvable(transform: Transform) -> None:
    """Refuses what is no other parameter of itself when it is done twice.

    Raises:
        UncertifiableError: such a transformation, or a composition with one.
    """
    parts = transform.parts if isinstance(transform, Composition) else (transform,)
    if not all(isinstance(part, Resolvable) for part in parts):
        raise UncertifiableError(
            f"{transform.name} twice is no {transform.name}, so that drawing its parameters certifies nothing; use "
            "certify=cover with law=none"
        )


class ErrorBound(ABC):
    """Bounds the defect of one image.

    Attributes:
        partition: into what parts the defect is split (see `smoothing.partition_masks`), None: one.
        soft: rho is that of Theorem J', which the joint certificate alone may use.
        free: E is 0, and nothing has to be paid for with pixel noise.
        covers_l2: E holds for files that are changed by threat.l2 as well.
        reverse: the bound is for a received file, whatever clean image it was made from (IndivSPT).
        latent: the bound is a displacement in latent space, for certify=latent.
    """

    partition: str | None = None
    soft: bool = False
    free: bool = False
    covers_l2: bool = False
    reverse: bool = False
    latent: bool = False

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        """Refuses a threat or classifier for which the defect has no meaning.

        Raises:
            UncertifiableError: pixel threats, non-Gaussian laws, transformations that are not resolvable.
        """
        if not isinstance(threat, TransformationThreat):
            raise UncertifiableError("error bounds belong to a transformation; certify pixel noise with certify=direct")
        mine, theirs = smoothed.transform, threat.transform
        if smoothed.law is None:
            raise UncertifiableError(
                f"without a law nothing is drawn of {theirs.name}; give its parameters one, such as law=gaussian, or "
                "use certify=cover"
            )
        check_resolvable(theirs)
        if not isinstance(mine, Resolvable) or _kinds(mine) != _kinds(theirs):
            raise UncertifiableError(
                f"the classifier is smoothed over {mine.name}, the threat is {theirs.name}: smooth over the threat's "
                "transformation (transform and threat must name the same one)"
            )
        law, noise = smoothed.law, smoothed.noise
        if not isinstance(law, Gaussian) or not (isinstance(noise, Gaussian) or (noise is None and self.free)):
            raise UncertifiableError(
                "an interpolation error needs a Gaussian law and Gaussian pixel noise (Theorem J); use law=gaussian "
                "and noise=gaussian"
            )
        if law.sigma.numel() != mine.dim and (law.sigma.numel() > 1 or len(set(mine.units)) > 1):
            raise UncertifiableError(
                f"{mine.name} has {mine.dim} parameters ({', '.join(mine.units)}): law.sigma needs one number for each"
            )
        if isinstance(mine, Composition) and not all(isinstance(part, Additive) for part in mine.parts):
            raise UncertifiableError(
                f"the parameters of {mine.name} do not add, as one Gaussian law of all needs; use brightness or "
                "contrast alone after an interpolation, or certify=cover"
            )
        if threat.l2 and not self.covers_l2:
            raise UncertifiableError(
                "changes of the file by threat.l2 beside the transformation are covered by error.search=chords and by "
                "certify=cover; use one of them, or threat.l2=0"
            )
        if isinstance(mine, Similarity):
            similarity_sigma(law)  # refuses laws that a rotation changes
        if noise is not None and noise.cholesky is not None:
            raise UncertifiableError("the defect is measured with one sigma a pixel or one for all; use noise=gaussian")
        return threat

    @abstractmethod
    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        """The bound for the clean image x, (c, h, w), as a procedure (see `rounds`)."""


def _kinds(transform: Transform) -> list[type[Transform]]:
    """The class of a transformation, or those of a composition's parts."""
    return [type(part) for part in (transform.parts if isinstance(transform, Composition) else (transform,))]


class Conditions:
    """What a bound was made for: the classifier but for its network, and the threat."""

    def __init__(self, smoothed: SmoothedClassifier, threat: TransformationThreat):
        self.levels = smoothed.levels
        self.parts, self.threat = copy.deepcopy(self.parts_of(smoothed)), copy.deepcopy(threat)

    @staticmethod
    def parts_of(smoothed: SmoothedClassifier) -> dict[str, nn.Module | None]:
        return {name: getattr(smoothed, name) for name in ("transform", "preprocess", "law", "noise")}

    def check(self, smoothed: SmoothedClassifier, threat: TransformationThreat) -> None:
        """Refuses to use the bound for anything else; a smaller range of parameters is covered.

        Raises:
            UncertifiableError: another transformation, preprocessing, sigma or file format, or a wider range.
        """
        now = self.parts_of(smoothed)
        for name, made in self.parts.items():
            other = now[name]
            if not (made is other is None) and (made is None or other is None or not same(made, other)):
                raise UncertifiableError(
                    f"the error bound was made for another {name}: {made}, not {other}; bound the error again"
                )
        old = self.threat
        if not same(old.transform, threat.transform) or self.levels != smoothed.levels:
            raise UncertifiableError("the error bound was made for another attack or grid; bound the error again")
        if (old.saved, old.size, old.step, old.l2) != (threat.saved, threat.size, threat.step, threat.l2):
            raise UncertifiableError(f"the error bound was made for files {old.file()}; bound the error again")
        ends = zip(old.lows, threat.lows, threat.highs, old.highs, strict=True)
        if any(low < least or high > most for least, low, high, most in ends):
            raise UncertifiableError(
                f"the error bound was made for {old.describe()}, which does not hold the threat's range; lower the "
                "threat's range, or bound the error again"
            )


@torch.inference_mode()
def defect_norms(
    smoothed: SmoothedClassifier, clean: Tensor, attacked: Tensor, gammas: Tensor, theta: Tensor, masks: Tensor
) -> Tensor:
    """max over gamma of ||psi(psi(x, gamma), theta) - psi(x, resolve(gamma, theta))|| on each part, (n, k), in units of
    the noise.

    Through the classifier's own preprocessing and rounding. One step of the grid at every pixel is added: the last bits
    of a row depend on its place in the batch, which moves a few pixels in a thousand by a step.

    Args:
        clean: x, (c, h, w).
        attacked: the files psi(x, gamma) as saved, (m, c, h, w).
        gammas: (m, dim).
        theta: (n, dim) float64, rounded to float32 by the classifier only after it is resolved.
        masks: (k, c, h, w) parts of what the noise is added to.
    """
    worst = torch.zeros(len(theta), len(masks), dtype=torch.float64, device=theta.device)
    for file, gamma in zip(attacked, gammas, strict=True):
        files, same_gamma = file.expand(len(theta), *file.shape), gamma.double().expand_as(theta)
        worst = torch.maximum(worst, pair_norms(smoothed, clean, files, same_gamma, theta, masks))
    return worst


@torch.inference_mode()
def pair_norms(
    smoothed: SmoothedClassifier, clean: Tensor, attacked: Tensor, gammas: Tensor, theta: Tensor, masks: Tensor
) -> Tensor:
    """The same for one gamma, (n, dim), and its file, (n, c, h, w), for each theta."""
    defect = defects(smoothed, clean.expand(len(theta), *clean.shape), attacked, gammas, theta)
    assert smoothed.noise is not None
    step = torch.ones_like(defect[:1]) / smoothed.levels
    gauge = smoothed.noise.gauge
    return torch.stack([gauge(defect * mask) + gauge(step * mask) for mask in masks], 1)


def defects(smoothed: SmoothedClassifier, clean: Tensor, attacked: Tensor, gammas: Tensor, theta: Tensor) -> Tensor:
    """psi(psi(x, gamma), theta) - psi(x, resolve(gamma, theta)), encoded and rounded by the classifier: (n, *e), of
    clean images and attacked files, (n, c, h, w), and float64 parameters, (n, dim)."""
    assert isinstance(smoothed.transform, Resolvable)
    turned = smoothed.encode(attacked, theta)
    straight = smoothed.encode(clean, smoothed.transform.resolve(gammas, theta))
    return (turned - straight).mul_(1 / smoothed.levels)
