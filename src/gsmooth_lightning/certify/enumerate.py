"""The certificate of a finite group of attacks: every one of them is evaluated, nothing is sampled."""

import math
from collections.abc import Generator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsmooth_lightning.certify.base import ABSTAIN, Certificate, Certifier, Limits
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Uniform
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import CyclicTranslation, is_exact

NEAR = 1e-4
"""Logits that lie nearer than this share of the largest: another order of the same sums may swap them."""

LEAD = 1e-9
"""By which a class must lead in probability: more than the rounding of the sums."""


class EnumerationCertifier(Certifier):
    """g(x) = argmax_c P(f(psi(x, theta)) = c) exactly, for cyclic translations and a uniform law of the shift.

    The network is evaluated on all h * w shifts of the image. After an attack by gamma the votes are those of the
    shifts gamma + theta, so each attack's class probabilities are known, and gamma is certified when the class leads.
    A law that covers every shift of the torus alike is moved by no attack: then the prediction alone decides.
    Deterministic: alpha = 0, and there are no draws. Where two logits nearly tie, the vote counts for neither class and
    may go to any.
    """

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if not (
            isinstance(threat, TransformationThreat)
            and isinstance(threat.transform, CyclicTranslation)
            and isinstance(smoothed.transform, CyclicTranslation)
        ):
            raise UncertifiableError(
                "only cyclic translations are enumerated; use transform=cyclic_translation with "
                "threat=cyclic_translation, or certify=direct"
            )
        if threat.l2:
            raise UncertifiableError("changes by threat.l2 beside cyclic translations are not covered; set threat.l2=0")
        if smoothed.votes != "hard":
            raise UncertifiableError("shifts are enumerated for hard votes; use votes=hard")
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in smoothed.base.parameters()):
            raise UncertifiableError("near ties are told apart in single precision alone; use dtype=float32")
        if not isinstance(smoothed.law, Uniform) or smoothed.noise is not None:
            raise UncertifiableError("shifts are enumerated for a uniform law alone; use law=uniform with noise=none")

    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        assert isinstance(threat, TransformationThreat)
        assert isinstance(smoothed.law, Uniform)
        height, width = x.shape[1:]
        jobs = [partial(_votes, smoothed, x, first) for first in range(0, height * width, smoothed.block)]
        votes = torch.cat((yield jobs))[: height * width].cpu().numpy().reshape(height, width)
        rows, columns = (_windows(smoothed.law, size) for size in (height, width))
        # probabilities after each attack, (classes + 1, h, w); the last are the votes near a tie
        share = np.stack([rows @ (votes == c) @ columns.T for c in range(smoothed.classes + 1)])
        top = int(share[:-1, 0, 0].argmax())
        held = share[top] > np.delete(share[:-1], top, 0).max(0) + share[-1] + LEAD
        radius = _held_radius(held, threat)
        counts: list[float] = [int((votes == c).sum()) for c in range(smoothed.classes)]
        return Certificate(
            prediction=top if held[0, 0] else ABSTAIN,
            radius=radius if held[0, 0] else 0.0,
            unit=threat.unit,
            guarantee="sound",
            alpha=0.0,
            selection=counts,
            counts=counts,
            n=height * width,
            seed=stream.seed,
            evaluations=len(jobs) * smoothed.block,
            details={"near_ties": int((votes == smoothed.classes).sum())},
        )

    def limits(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Limits]:
        return Limits(smoothed.evaluations(0, math.prod(x.shape[1:])), threat.reach, 0.0)
        yield  # a procedure without jobs


@torch.inference_mode()
def _votes(smoothed: SmoothedClassifier, x: Tensor, first: int) -> Tensor:
    """Classes of the shifts first..first+block-1 of x, row by row, (block,); `classes` stands for a near tie.

    Raises:
        RequestError: the network returned a NaN or infinity.
    """
    shifts = torch.arange(first, first + smoothed.block, device=x.device) % (x.shape[1] * x.shape[2])
    theta = torch.stack([shifts // x.shape[2], shifts % x.shape[2]], 1)
    inputs = smoothed.encode(x.expand(smoothed.block, *x.shape), theta) * (1 / smoothed.levels)
    labels = smoothed.labels(inputs)
    if bool((labels == smoothed.classes).any()):
        raise RequestError("the network returned NaN or infinity; check the checkpoint")
    logits = smoothed.base(inputs)
    if logits.ndim == 1:
        return labels
    best = logits.topk(2, 1).values
    return torch.where(best[:, 0] - best[:, 1] > NEAR * logits.abs().amax(1), labels, smoothed.classes)


def _windows(law: Uniform, size: int) -> np.ndarray:
    """Probability that gamma + theta is the shift s modulo the size, theta rounded, (gamma, s)."""
    whole = np.arange(np.floor(law.low + 0.5), np.floor(law.high + 0.5) + 1)
    mass = (np.minimum(whole + 0.5, law.high) - np.maximum(whole - 0.5, law.low)).clip(0) / law.width
    weights = np.bincount(whole.astype(int) % size, mass, size)
    gamma, s = np.indices((size, size))
    return weights[(s - gamma) % size]


def _held_radius(held: np.ndarray, threat: TransformationThreat) -> float:
    """Largest whole radius within which every attack of the threat is held, or the threat's reach."""
    assert is_exact(threat.transform)
    for radius in range(math.ceil(threat.reach) + 1):
        low, high = threat.transform.moves(*threat.box(radius))
        rows, columns = (np.arange(a, b + 1) for a, b in zip(low, high, strict=True))
        if not held[np.ix_(rows % held.shape[0], columns % held.shape[1])].all():
            return float(max(radius - 1, 0))
    return threat.reach
