"""The defect of a transformation, and the interface of its bounds."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Additive


@dataclass(frozen=True)
class Bound:
    """For every gamma of the threat: P_theta( ||defect(x, theta, gamma)|| > E ) <= rho, or its soft form.

    Attributes:
        value: E, in units of the pixel noise (the norm of Sigma_eps^-1).
        rho: mass of parameters beyond E (Theorem J), or the soft rho of Theorem J'.
        alpha: probability that the statement itself is false.
        guarantee: "sound", "distributional" or "heuristic" (theory.md section 5).
        details: how it was made.
    """

    value: float
    rho: float
    alpha: float
    guarantee: str
    details: dict[str, Any] = field(default_factory=dict)


class ErrorBound(ABC):
    """Bounds the defect of one image."""

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        """Refuses a threat or classifier for which the defect has no meaning.

        Raises:
            UncertifiableError: pixel threats, non-Gaussian laws, transformations whose parameters do not add.
        """
        if not isinstance(threat, TransformationThreat):
            raise UncertifiableError("error bounds belong to a transformation; certify pixel noise with certify=direct")
        mine, theirs = smoothed.transform, threat.transform
        if not isinstance(mine, Additive) or type(mine) is not type(theirs):
            raise UncertifiableError(
                f"the classifier is smoothed over {mine.name}, the threat is {theirs.name}: smooth over the threat's "
                "transformation (transform and threat must name the same one)"
            )
        if mine.dim > 1:
            raise UncertifiableError(
                f"{mine.name} has {mine.dim} parameters; error bounds search one; use certify=direct"
            )
        if not isinstance(smoothed.law, Gaussian) or not isinstance(smoothed.noise, Gaussian):
            raise UncertifiableError("the joint certificate needs a Gaussian law and Gaussian noise (Theorem J)")
        if smoothed.noise.cholesky is not None:
            raise UncertifiableError("the joint certificate needs one sigma a pixel or one for all; use noise=gaussian")
        return threat

    @abstractmethod
    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        """The bound for the clean image x, (c, h, w), as a procedure (see `rounds`)."""


@torch.inference_mode()
def defect_norms(
    smoothed: SmoothedClassifier, clean: Tensor, attacked: Tensor, gammas: Tensor, theta: Tensor
) -> Tensor:
    """max over gamma of ||psi(psi(x, gamma), theta) - psi(x, theta + gamma)||, (n,), in units of the noise.

    Through the classifier's own preprocessing and rounding. One step of the grid at every pixel is added: the last bits
    of a row depend on its place in the batch, which moves a few pixels in a thousand by a step.

    Args:
        clean: x, (c, h, w).
        attacked: the files psi(x, gamma) as saved, (k, c, h, w).
        gammas: (k, 1).
        theta: (n, 1) float64, rounded to float32 by the classifier only after gamma is added.
    """
    n = len(theta)
    assert smoothed.noise is not None
    step = float(smoothed.noise.gauge(torch.ones_like(clean)[None] / smoothed.levels))
    worst = torch.zeros(n, dtype=torch.float64, device=theta.device)
    for file, gamma in zip(attacked, gammas, strict=True):
        turned = smoothed.encode(file.expand(n, *file.shape), theta)
        straight = smoothed.encode(clean.expand(n, *clean.shape), theta + gamma.double())
        worst = torch.maximum(worst, smoothed.noise.gauge((turned - straight).mul_(1 / smoothed.levels)))
    return worst + step
