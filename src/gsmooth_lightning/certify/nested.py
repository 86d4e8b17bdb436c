"""The nested certificate: a smoothed classifier of parameters over smoothed classifiers of pixels (Fischer et al. 2020,
section 6.2; theory.md section 6)."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr
from torch import Tensor

from gsmooth_lightning.certify.base import InterpolatedCertifier, Limits, most_evaluations
from gsmooth_lightning.certify.transfer import Transfer, parameter_transfer
from gsmooth_lightning.confidence import Counts
from gsmooth_lightning.error import Bound, ErrorBound
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN, GroupSequential, Outcome, Sampler, SamplingPlan
from gsmooth_lightning.rounds import together
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import partition_masks
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Additive

FORMS = ("clean", "published")

AT_ONCE = 64
"""Outer draws that are decided side by side; those of inner layers come one after the other, which bounds memory."""


@dataclass(frozen=True)
class Layer:
    """One layer of pixel noise.

    Attributes:
        mask: the part of the image that it covers, (c, h, w).
        plan: how its votes are tested.
        threshold: what the vote share of a class must exceed, so that the class withstands the part's defect.
    """

    mask: Tensor
    plan: SamplingPlan
    threshold: float


class NestedCertifier(InterpolatedCertifier):
    """h(y) = argmax_c P_eps( f(y + eps) = c ), g(x) = argmax_c P_theta( h(preprocess(psi(x, theta))) = c ).

    An outer draw theta votes for the class that a test at level alpha_eps finds robust within E around the transformed
    image, P_eps > Phi(E), or for none. With p' the Clopper-Pearson bound of the votes, and a defect beyond E for a mass
    rho_E of the parameters at most,

        "clean":     Phi( z((p' - alpha_eps) / (1 - alpha_eps)) - |gamma| / sigma ) - rho_E > 1/2
        "published": Phi( z(p' - alpha_eps - rho_E) - |gamma| / sigma ) > 1/2

    The first holds because a theta that is not robust passes its test with probability alpha_eps at most, and because
    votes are counted at the clean image, where rho_E acts after the shift (theory.md section 6). Only pB = 1 - pA is
    sound: under attack each theta that is not robust may vote for B.

    With a partition of the defect (error.partition) each part has a layer of its own noise, one inside the other
    (k-smoothing: Fischer et al., section 6.3): an outer layer tests the decisions of the next one.

    Args:
        plan: of the outer draws.
        inner: of the pixel noise: FixedN, or GroupSequential with radii=[1] (all of E); or a list, one for each part,
            the outermost first.
        error: bound on the defect, not a soft one.
        form: "clean" or "published".

    Raises:
        RequestError: another form, or an inner plan of another kind.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        inner: SamplingPlan | Sequence[SamplingPlan],
        error: ErrorBound | None,
        form: str = "clean",
    ):
        super().__init__(plan, error)
        if form not in FORMS:
            raise RequestError(f"certify.form must be one of {', '.join(FORMS)}, got {form!r}")
        self.inner = [inner] if isinstance(inner, SamplingPlan) else list(inner)
        for layer in self.inner:
            if not (isinstance(layer, FixedN) or (isinstance(layer, GroupSequential) and layer.radii == (1.0,))):
                raise RequestError("certify.inner must be a FixedN plan, or a GroupSequential one with radii=[1]")
        self.form = form

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if smoothed.votes == "soft" or self.plan.soft:
            raise UncertifiableError("nested votes are for a class or none; use votes=hard and sampling=fixed")
        super().check(smoothed, threat)
        assert self.error is not None
        if self.error.soft:
            raise UncertifiableError(
                "a soft rho belongs to the joint certificate; nested needs the mass beyond E: use error=image_hard, or "
                "error.soft=false"
            )
        if self.form == "published" and not isinstance(smoothed.transform, Additive):
            raise UncertifiableError(
                f"the published form is for parameters that add, and those of {smoothed.transform.name} do not; use "
                "certify.form=clean"
            )
        if smoothed.noise is None:
            raise UncertifiableError("the nested certificate smooths over pixels too; use noise=gaussian")
        for plan in [self.plan, *self.inner]:
            if getattr(plan, "bounds", "binary") != "binary":
                raise UncertifiableError(
                    "under attack every draw that is not robust may vote for another class, so that a bound on the "
                    "votes for it says nothing; use sampling.bounds=binary"
                )

    def bound(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        bound = yield from super().bound(smoothed, threat, x, stream)
        return replace(bound, details=bound.details | {"E_parts": bound.parts, "form": self.form})

    def limits(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Limits]:
        assert self.error is not None
        found = yield from super().limits(smoothed, threat, x, stream)
        *outer, last = self.inner_plans(len(partition_masks(self.error.partition, smoothed.encoded_shape(x))))
        decisions = math.prod(plan.n0 + plan.n for plan in (self.plan, *outer))
        return replace(found, evaluations=decisions * most_evaluations(smoothed, last))

    def transfer(self, smoothed: SmoothedClassifier, threat: Threat, bound: Bound, dim: int, slack: float) -> Transfer:
        assert isinstance(threat, TransformationThreat)
        assert smoothed.law is not None
        alpha, published = self.inner[0].alpha, self.form == "published"
        rho = 0.0 if published else bound.rho
        left = parameter_transfer(smoothed.transform, smoothed.law, threat, Bound(0.0, rho, 0.0, "heuristic"), slack)

        def transfer(p: ArrayLike, radius: float) -> np.ndarray:
            robust = np.asarray(p, dtype=float) - alpha
            robust = robust - bound.rho if published else robust / (1 - alpha)
            return left(np.maximum(robust, 0.0), radius)

        return transfer

    def verdict(
        self, outcome: Outcome, transfer: Transfer, reach: float
    ) -> tuple[int | list[int], float | list[float]]:
        if self.top_k != 1 or getattr(self.plan, "bounds", "binary") != "binary":
            raise UncertifiableError("nested votes bound no other class than the first; use bounds=binary and top_k=1")
        return super().verdict(outcome, transfer, reach)

    # -------------------------------------------------- votes

    def sampler(
        self,
        smoothed: SmoothedClassifier,
        x: Tensor,
        bound: Bound,
        stream: Stream,
        slack: float,
        spend: Callable[[int], None],
    ) -> Sampler:
        assert self.error is not None
        masks = partition_masks(self.error.partition, smoothed.encoded_shape(x)).to(x.device)
        layers = self.layers(bound, masks, slack)

        def sample(stage: str, first: int, last: int) -> Generator[Any, Any, Counts]:
            @torch.inference_mode()
            def turned(block: int) -> Tensor:
                theta = smoothed.draw_parameters(stream.at(stage, block, x.device), smoothed.block)
                return smoothed.encode(x.expand(smoothed.block, *x.shape), theta)

            return _votes(smoothed, turned, layers, stream, stage, first, last, spend)

        return sample

    def layers(self, bound: Bound, masks: Tensor, slack: float) -> list[Layer]:
        """The layers of pixel noise, the outermost first.

        A class with vote share q among the robust decisions of the next layer withstands a defect of E sigma if
        q > Phi(E); decisions that are not robust pass at most alpha_next of the time, so that the share of all must
        exceed alpha_next + (1 - alpha_next) Phi(E).
        """
        plans = self.inner_plans(len(masks))
        false = [*(plan.alpha for plan in plans[1:]), 0.0]
        return [
            Layer(mask, plan, float(a + (1 - a) * ndtr(e)) + slack)
            for mask, plan, a, e in zip(masks, plans, false, bound.parts, strict=True)
        ]

    def inner_plans(self, parts: int) -> list[SamplingPlan]:
        """The inner plans of that many parts of the defect, the outermost first.

        Raises:
            RequestError: there are several, and not that many.
        """
        plans = self.inner * parts if len(self.inner) == 1 else self.inner
        if len(plans) != parts:
            raise RequestError(
                f"the defect has {parts} parts, certify.inner {len(plans)} plans; give one plan, or one for each"
            )
        return plans


def _votes(
    smoothed: SmoothedClassifier,
    images: Callable[[int], Tensor],
    layers: Sequence[Layer],
    stream: Stream,
    stage: str,
    first: int,
    last: int,
    spend: Callable[[int], None],
) -> Generator[Any, Any, Counts]:
    """Votes of the draws first..last-1 of a stage, (classes + 1,), as a procedure. Each draw votes for what `_decide`
    finds in the layers, or without any for the network's class.

    images(b): block b of what the draws show, in steps of the grid.
    """
    if not layers:
        spend(smoothed.evaluations(first, last))
        return (yield from smoothed.count(lambda b: images(b) * (1 / smoothed.levels), stream, first, last))
    size = smoothed.block
    start = first // size
    blocks = yield [lambda b=b: images(b) for b in range(start, -(-last // size))]
    shown = torch.cat(blocks)[first - start * size : last - start * size]
    decisions = (_decide(smoothed, y, layers, stream.within(stage, draw), spend) for draw, y in enumerate(shown, first))
    found = yield from together(decisions, AT_ONCE if not stream.path else 1)
    return np.bincount(found, minlength=smoothed.classes + 1)


def _decide(
    smoothed: SmoothedClassifier, y: Tensor, layers: Sequence[Layer], stream: Stream, spend: Callable[[int], None]
) -> Generator[Any, Any, int]:
    """The class that withstands the defect of the first layer's part around y, or `classes` for none."""
    layer, noise, size = layers[0], smoothed.noise, smoothed.block
    assert noise is not None
    if layer.plan.ceiling <= layer.threshold:  # no votes could show it
        return smoothed.classes

    def sample(stage: str, first: int, last: int) -> Generator[Any, Any, Counts]:
        @torch.inference_mode()
        def noisy(block: int) -> Tensor:
            eps = noise.sample(stream.at(stage, block, y.device), size, tuple(y.shape))
            return (eps.mul_(smoothed.levels).round_() * layer.mask).to(y.dtype).add_(y)  # exact: whole and below 2^24

        return _votes(smoothed, noisy, layers[1:], stream, stage, first, last, spend)

    outcome = yield from layer.plan.run(sample, size, lambda _: layer.threshold)
    held = outcome.passed is not None if outcome.pa is None else outcome.pa > layer.threshold
    return outcome.top if held else smoothed.classes
