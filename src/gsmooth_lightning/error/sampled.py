"""Error bounds by sampling: E and rho from draws of theta, gamma searched on a grid.

The theorems need the bound for *every* gamma of the threat. A grid is all there is when the threat's parameters are
finitely many (`threat.step`); otherwise the bound holds for the gammas tried, and says so: `heuristic`.
"""

from collections.abc import Generator, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from gsmooth_lightning.confidence import betting_upper, check_alpha, clopper_pearson_lower, clopper_pearson_upper
from gsmooth_lightning.error.base import Bound, ErrorBound, defect_norms
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.rounds import Job, run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat

UP = 1 + 1e-6
"""Allowance for float32 when a measured norm becomes a bound."""


def sample_defects(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    x: Tensor,
    stream: Stream,
    stage: str,
    draws: int,
    points: int,
) -> Generator[list[Job], list[Tensor], np.ndarray]:
    """Worst defect over the searched gammas for each of `draws` parameters theta ~ law, as a procedure: (draws,)."""
    gammas = threat.parameters(points)[0].to(x.device)
    with torch.inference_mode():
        attacked = threat.apply(x.expand(len(gammas), *x.shape), gammas)

    def block(b: int) -> Tensor:
        theta = smoothed.draw_parameters(stream.at(stage, b, x.device), smoothed.block)
        return defect_norms(smoothed, x, attacked, gammas, theta)

    blocks = yield [partial(block, b) for b in range(-(-draws // smoothed.block))]
    norms = torch.cat(blocks)[:draws].cpu().numpy()
    if not np.isfinite(norms).all():
        raise RequestError(f"image {stream.image} has a defect that is not a number; check the preprocessing steps")
    return norms


def soft_excess(norms: np.ndarray, value: float) -> np.ndarray:
    """2 Phi((d - E0)_+ / 2) - 1: what a defect beyond E0 costs in total variation (Theorem J')."""
    return 2 * norm.cdf(np.maximum(norms - value, 0) / 2) - 1


SEARCHED = "the interpolation error was searched on sampled parameters, not maximised over all of them"
"""What a bound by sampling takes for granted, unless it tries every parameter there is."""


class ImageBound(ErrorBound):
    """E and rho for this clean image (DistSPT^x; Theorem J, or J' with soft=True).

    E is a quantile of `choose` defects; rho is bounded at level alpha on `draws` other ones: by Clopper-Pearson on the
    fraction beyond E, or, soft, by a betting bound on the mean cost of the excess.

    Args:
        draws: parameters theta that bound rho.
        choose: parameters theta that choose E.
        points: gammas searched when the threat is continuous.
        quantile: of the defects, where E is put. With soft=True low quantiles pay (.9); otherwise rho must stay small.
        alpha: probability that rho is not a bound; added to that of the votes.
        soft: the soft rho of Theorem J'.
    """

    def __init__(
        self,
        draws: int = 1024,
        choose: int = 256,
        points: int = 13,
        quantile: float = 0.9,
        alpha: float = 1e-4,
        soft: bool = True,
    ):
        if min(draws, choose, points) < 2:
            raise RequestError(
                f"error.draws, error.choose and error.points must be at least 2, got {draws}, {choose} and {points}"
            )
        check_alpha(alpha)
        if not 0 <= quantile <= 1:
            raise RequestError(f"error.quantile must lie between 0 and 1, got {quantile}")
        self.draws, self.choose, self.points = draws, choose, points
        self.quantile, self.alpha, self.soft = quantile, alpha, soft

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        chosen = yield from sample_defects(smoothed, threat, x, stream, "error-choose", self.choose, self.points)
        value = float(np.quantile(chosen, self.quantile, method="higher")) * UP
        fresh = yield from sample_defects(smoothed, threat, x, stream, "error-bound", self.draws, self.points)
        if self.soft:
            rho = betting_upper(soft_excess(fresh * UP, value), self.alpha)
        else:
            rho = clopper_pearson_upper((fresh * UP > value).sum(), self.draws, self.alpha)
        exhaustive = threat.parameters(self.points)[1]
        return Bound(
            value,
            float(rho),
            self.alpha,
            "sound" if exhaustive else "heuristic",
            {"draws": self.draws, "largest": float(max(chosen.max(), fresh.max())), "soft": self.soft}
            | ({} if exhaustive else {"rests_on": SEARCHED}),
        )


class DistributionBound(ErrorBound):
    """One E for a fraction q_E of all images (DistSPT^D).

    q_E = P_x( P_theta( max_gamma ||defect|| <= E ) >= 1 - rho ). E is chosen on one half of the calibration images. On
    each image of the other half an inner test at level `alpha_inner` says whether it passes; a bad image passes with
    probability up to alpha_inner, so q_E >= (CP_outer - alpha_inner) / (1 - alpha_inner) (theory.md section 5).

    Args:
        calibration: number of calibration images; the caller draws them at random from the data's distribution.
        draws, points: as in `ImageBound`, for each calibration image.
        quantile: of the images' own (1 - rho/2)-quantiles, where E is put.
        rho: mass of parameters allowed beyond E.
        alpha: probability that q_E is not a bound (a one-time failure).
        alpha_inner: level of the inner tests.
    """

    def __init__(
        self,
        calibration: int = 200,
        draws: int = 512,
        points: int = 13,
        quantile: float = 0.98,
        rho: float = 0.02,
        alpha: float = 1e-4,
        alpha_inner: float = 1e-3,
    ):
        for name, level in (("quantile", quantile), ("rho", rho), ("alpha", alpha), ("alpha_inner", alpha_inner)):
            if not 0 < level < 1:
                raise RequestError(f"error.{name} must lie between 0 and 1, got {level}")
        if float(clopper_pearson_upper(0, draws, alpha_inner)) > rho:
            raise RequestError(
                f"no image can pass the inner test: {draws} draws show at best rho = "
                f"{float(clopper_pearson_upper(0, draws, alpha_inner)):.4f}; raise error.draws or error.rho"
            )
        if calibration < 4:
            raise RequestError(f"error.calibration must be at least 4 images, got {calibration}")
        self.calibration = calibration
        self.draws, self.points, self.quantile, self.rho = draws, points, quantile, rho
        self.alpha, self.alpha_inner = alpha, alpha_inner
        self.bound: Bound | None = None

    def fit(
        self,
        smoothed: SmoothedClassifier,
        threat: TransformationThreat,
        images: Iterable[tuple[int, Tensor]],
        seed: int,
    ) -> Bound:
        """Chooses E and bounds q_E on calibration images (prepared by the threat), which are never certified."""
        procedures = (
            (i, sample_defects(smoothed, threat, x, Stream(seed, i), "error-bound", self.draws, self.points))
            for i, x in images
        )
        device = next(smoothed.buffers()).device
        norms = {i: d for i, d, _ in run_rounds(procedures, device)}
        if len(norms) < 2:
            raise RequestError("a bound for the distribution needs calibration images: one half for E, one for q_E")
        rows = np.stack([norms[i] for i in sorted(norms)]) * UP
        choose, test = rows[::2], rows[1::2]
        own = np.quantile(choose, 1 - self.rho / 2, axis=1, method="higher")
        value = float(np.quantile(own, self.quantile, method="higher"))
        beyond = clopper_pearson_upper((test > value).sum(1), self.draws, self.alpha_inner)
        outer = float(clopper_pearson_lower(int((beyond <= self.rho).sum()), len(test), self.alpha))
        q = max(0.0, (outer - self.alpha_inner) / (1 - self.alpha_inner))
        exhaustive = threat.parameters(self.points)[1]
        self.bound = Bound(
            value,
            self.rho,
            self.alpha,
            "distributional" if exhaustive else "heuristic",
            {"q_E": q, "images": len(rows), "draws": self.draws, "soft": False}
            | ({} if exhaustive else {"rests_on": SEARCHED}),
        )
        return self.bound

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        if self.bound is None:
            raise RequestError("fit the distribution bound on calibration images before certifying with it")
        return self.bound
        yield  # a procedure without jobs
