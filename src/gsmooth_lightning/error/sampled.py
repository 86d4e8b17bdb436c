"""Error bounds by sampling: E and rho from draws of theta, the defect of each maximised over gamma.

The theorems need the bound for *every* gamma of the threat. It is proved by `chords` or `intervals`, or by trying all
parameters where they are finitely many (`threat.step`); on a grid of others it holds for the gammas tried alone, and
says so: `heuristic`.
"""

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from gsmooth_lightning.confidence import (
    betting_lower,
    betting_upper,
    check_alpha,
    clopper_pearson_lower,
    clopper_pearson_upper,
)
from gsmooth_lightning.error.base import (
    SEARCHED,
    Bound,
    Conditions,
    ErrorBound,
    defect_norms,
    norm_of,
    pair_norms,
)
from gsmooth_lightning.error.chords import check_chords, chord_norms
from gsmooth_lightning.error.interval import check_intervals, interval_defects
from gsmooth_lightning.error.rounding import rounding_bound
from gsmooth_lightning.errors import RequestError, UncertifiableError, check_whole
from gsmooth_lightning.rounds import Job
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing.partition import check_partition, partition_masks
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import is_exact, same

SEARCHES = ("chords", "intervals", "grid")

UP = 1 + 1e-6
"""Allowance for float32 when a measured norm becomes a bound."""

Sampled = Generator[list[Job], list[Any], np.ndarray]

# ---------------------------------------------------------------- draws


def sample_pairs(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    x: Tensor,
    stream: Stream,
    stage: str,
    draws: int,
    partition: str | None = None,
) -> Sampled:
    """Defects at `draws` independent theta ~ law and gamma uniform in the threat's box, as a procedure: (draws, parts),
    rounded up."""
    masks, draw = _masks(smoothed, x, partition), threat.drawing(x.device)

    def block(b: int) -> Tensor:
        source = stream.at(stage, b, x.device)
        theta = smoothed.draw_parameters(source, smoothed.block)
        gammas = draw(source, smoothed.block)
        files = threat.apply(x.expand(smoothed.block, *x.shape), gammas)
        return pair_norms(smoothed, x, files, gammas.double(), theta, masks)

    return (yield from in_blocks(smoothed, stream, draws, block))


def _masks(smoothed: SmoothedClassifier, x: Tensor, partition: str | None) -> Tensor:
    return partition_masks(partition, smoothed.encoded_shape(x)).to(x.device)


def in_blocks(smoothed: SmoothedClassifier, stream: Stream, draws: int, block: Callable[[int], Tensor]) -> Sampled:
    blocks = yield [partial(block, b) for b in range(-(-draws // smoothed.block))]
    return _finite(torch.cat(blocks)[:draws], stream)


def _finite(found: Tensor, stream: Stream) -> np.ndarray:
    norms = found.cpu().numpy() * UP
    if not np.isfinite(norms).all():
        raise RequestError(
            f"image {stream.image} has a defect that is not a number; narrow the law, or check the preprocessing"
        )
    return norms


# ---------------------------------------------------------------- what draws show


def soft_excess(norms: np.ndarray, value: float) -> np.ndarray:
    """2 Phi((d - E0)_+ / 2) - 1: what a defect beyond E0 costs in total variation (Theorem J')."""
    return 2 * norm.cdf(np.maximum(norms - value, 0) / 2) - 1


def beyond(norms: np.ndarray, parts: Sequence[float]) -> np.ndarray:
    """Which draws, (..., parts), have a part beyond its bound: (...)."""
    return np.asarray((norms > np.asarray(parts)).any(-1))


def largest_rho(norms: np.ndarray, parts: Sequence[float], alpha: float, soft: bool) -> np.ndarray:
    """Upper bound of rho at level alpha from draws (..., n, parts): of the mass beyond, or of its soft form."""
    if soft:
        return betting_upper(soft_excess(norms[..., 0], parts[0]), alpha)
    return clopper_pearson_upper(beyond(norms, parts).sum(-1), norms.shape[-2], alpha)


class SampledBound(ErrorBound):
    """What bounds by sampling have in common.

    Args:
        draws: parameters theta that bound rho, for an image.
        search: how the defect is maximised over gamma: "chords" (proved, for any Lipschitz preprocessing; see
            `chord_norms`), "intervals" (proved by interval analysis, for bilinear and nearest interpolation), or "grid"
            (not proved).
        points: gammas on the grid.
        alpha: probability that the bound is none; added to that of the votes.
        soft: the soft rho of Theorem J', for certify=joint.
        partition: "halves", "quadrants", "channels" (one E for each part), or None.
    """

    def __init__(self, draws: int, search: str, points: int, alpha: float, soft: bool, partition: str | None):
        check_whole("error", draws=(draws, 2), points=(points, 2))
        if search not in SEARCHES:
            raise RequestError(f"error.search must be one of {', '.join(SEARCHES)}, got {search!r}")
        if search == "intervals" and partition is not None:
            raise RequestError("intervals bound the whole defect; use error.search=chords with error.partition")
        check_alpha(alpha)
        check_partition(partition)
        if soft and partition is not None:
            raise RequestError(
                "the soft rho is of one E for the whole image; set error.soft=false or error.partition=null"
            )
        self.draws, self.search, self.points, self.alpha = draws, search, points, alpha
        self.soft, self.partition, self.covers_l2 = soft, partition, search == "chords"

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        """As `ErrorBound.check`, and refuses what the search has no proof for."""
        found = super().check(smoothed, threat)
        if is_exact(found.transform) and self.search != "grid":
            self.check_exact(smoothed, found)
        if found.l2 and found.step is not None:
            raise UncertifiableError(
                "threat.step lists all attacks there are, threat.l2 adds others; set threat.step=null or threat.l2=0"
            )
        if self.search != "grid" and found.step is None and not is_exact(found.transform):
            {"chords": check_chords, "intervals": check_intervals}[self.search](smoothed, found)
        return found

    def check_exact(self, smoothed: SmoothedClassifier, threat: TransformationThreat) -> None:
        """Refuses exact transformations, whose error is rounding alone, unless this bound has a proof for them.

        Raises:
            UncertifiableError: always here.
        """
        raise UncertifiableError(
            f"{threat.transform.name} has no interpolation error, and the rounding of each image is bounded without "
            "draws; use error=image"
        )

    def sample(
        self,
        smoothed: SmoothedClassifier,
        threat: TransformationThreat,
        x: Tensor,
        stream: Stream,
        stage: str,
        draws: int,
        ceiling: Sequence[float] | None = None,
    ) -> Sampled:
        """Worst defect over gamma for each of `draws` parameters theta ~ law, as a procedure: (draws, parts), rounded
        up. It need not be found exactly where it is below `ceiling`, (parts,)."""
        masks = _masks(smoothed, x, self.partition)
        if self.search == "grid" or threat.step is not None:
            gammas = threat.parameters(self.points)[0].to(x.device)
            with torch.inference_mode():
                attacked = threat.apply(x.expand(len(gammas), *x.shape), gammas)

            def block(b: int) -> Tensor:
                theta = smoothed.draw_parameters(stream.at(stage, b, x.device), smoothed.block)
                return defect_norms(smoothed, x, attacked, gammas, theta, masks)

            return (yield from in_blocks(smoothed, stream, draws, block))
        sources = (stream.at(stage, b, x.device) for b in range(-(-draws // smoothed.block)))
        theta = torch.cat([smoothed.draw_parameters(source, smoothed.block) for source in sources])[:draws]
        if self.search == "chords":
            return _finite((yield from chord_norms(smoothed, threat, x, theta, masks, ceiling)), stream)
        parts = theta.split(smoothed.block)
        norms = yield [partial(interval_defects, smoothed, threat, x, part) for part in parts]
        return _finite(torch.cat(norms)[:, None], stream)

    def statement(self, threat: TransformationThreat, guarantee: str) -> tuple[str, dict[str, Any]]:
        """The guarantee when the maximum over gamma is proved; otherwise `heuristic`, and why."""
        proved = self.search != "grid" or threat.parameters(self.points)[1]
        return (guarantee, {}) if proved else ("heuristic", {"rests_on": SEARCHED})


class ImageBound(SampledBound):
    """E and rho for this clean image (DistSPT^x; Theorem J, or J' with soft=True).

    Exact transformations have no defect but rounding, which `file_rounding` bounds without draws.

    E is a quantile of `choose` defects, one for each part; rho is bounded at level alpha on `draws` other ones: by
    Clopper-Pearson on the fraction beyond E, or, soft, by a betting bound on the mean cost of the excess.

    Args:
        draws, search, points, alpha, soft, partition: see `SampledBound`.
        choose: parameters theta that choose E.
        quantile: of the defects, where E is put. With soft=True low quantiles pay (.5); otherwise rho must stay small.
    """

    def __init__(
        self,
        draws: int = 512,
        choose: int = 64,
        search: str = "chords",
        points: int = 13,
        quantile: float = 0.5,
        alpha: float = 1e-4,
        soft: bool = True,
        partition: str | None = None,
    ):
        super().__init__(draws, search, points, alpha, soft, partition)
        check_whole("error", choose=(choose, 2))
        if not 0 <= quantile <= 1:
            raise RequestError(f"error.quantile must lie between 0 and 1, got {quantile}")
        self.choose, self.quantile = choose, quantile

    def check_exact(self, smoothed: SmoothedClassifier, threat: TransformationThreat) -> None:
        """Refuses what `rounding_bound` does not cover."""
        if self.partition is not None or not same(smoothed.transform, threat.transform):
            raise UncertifiableError(
                f"the rounding of {threat.transform.name} is bounded as a whole, for a classifier that draws the same "
                "transformation; use error.partition=null and the threat's transform"
            )

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        if is_exact(smoothed.transform) and self.search != "grid":
            return rounding_bound(smoothed, threat, x)
        chosen = yield from self.sample(smoothed, threat, x, stream, "error-choose", self.choose)
        parts = tuple(np.quantile(chosen, self.quantile, axis=0, method="higher").tolist())
        fresh = yield from self.sample(smoothed, threat, x, stream, "error-bound", self.draws, parts)
        rho = largest_rho(fresh, parts, self.alpha, self.soft)
        guarantee, rests_on = self.statement(threat, "sound")
        largest = float(max(chosen.max(), fresh.max()))
        details = {"draws": self.draws, "largest": largest, "soft": self.soft} | rests_on
        return Bound(norm_of(parts), float(rho), self.alpha, guarantee, details, parts)


class CalibratedBound(SampledBound):
    """One bound for all images, from calibration images that are never certified.

    `measure` each of them, `fit` the bound to what was measured; it may then be used under these conditions and no
    others.

    Attributes:
        calibration: number of images, drawn at random from the data's distribution by the caller.
    """

    def __init__(
        self, calibration: int, draws: int, search: str, points: int, alpha: float, soft: bool, partition: str | None
    ):
        super().__init__(draws, search, points, alpha, soft, partition)
        check_whole("error", calibration=(calibration, 4))
        self.calibration = calibration
        self.fitted: tuple[Bound, Conditions] | None = None

    @abstractmethod
    def measure(self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream) -> Sampled:
        """Defects of a calibration image, (draws, parts), as a procedure."""

    @abstractmethod
    def conclude(self, norms: np.ndarray, threat: TransformationThreat) -> Bound:
        """The bound from the defects of all calibration images, (images, draws, parts)."""

    def fit(
        self, norms: Mapping[int, Sequence[Any]], smoothed: SmoothedClassifier, threat: TransformationThreat
    ) -> Bound:
        """Fits the bound to the measured defects of the calibration images, by index.

        Raises:
            RequestError: another number of images than `calibration`.
        """
        if len(norms) != self.calibration:
            raise RequestError(
                f"the bound needs its {self.calibration} calibration images, and {len(norms)} were measured; finish "
                "`gsmooth bound`, or lower error.calibration to the number of training images"
            )
        bound = self.conclude(np.array([norms[i] for i in sorted(norms)], dtype=float), threat)
        self.fitted = bound, Conditions(smoothed, threat)
        return bound

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        if self.fitted is None:
            raise RequestError("fit the bound on calibration images before certifying with it")
        bound, conditions = self.fitted
        conditions.check(smoothed, threat)
        return bound
        yield  # a procedure without jobs


def halves(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images (first axis) at random in two halves: one chooses E, the other tests it."""
    shuffled = norms[np.random.default_rng(0).permutation(len(norms))]
    return shuffled[: len(norms) // 2], shuffled[len(norms) // 2 :]


class DistributionBound(CalibratedBound):
    """One E for a fraction q_E of all images (DistSPT^D).

    q_E = P_x( P_theta( max_gamma ||defect|| <= E ) >= 1 - rho ). E is chosen on one half of the calibration images. On
    each image of the other half an inner test at level `alpha_inner` says whether it passes; a bad image passes with
    probability up to alpha_inner, so q_E >= (CP_outer - alpha_inner) / (1 - alpha_inner) (theory.md section 5).

    Args:
        calibration, draws, search, points, partition: see `CalibratedBound`.
        quantile: of the images' own (1 - rho/2)-quantiles, where E is put; with soft=True of their .9-quantiles.
        rho: mass of parameters allowed beyond E, or the soft rho allowed.
        alpha: probability that q_E is not a bound (a one-time failure).
        alpha_inner: level of the inner tests.
        soft: the inner test is of the soft rho (Theorem J').
    """

    def __init__(
        self,
        calibration: int = 200,
        draws: int = 512,
        search: str = "chords",
        points: int = 13,
        quantile: float = 0.98,
        rho: float = 0.02,
        alpha: float = 1e-4,
        alpha_inner: float = 1e-3,
        soft: bool = False,
        partition: str | None = None,
    ):
        super().__init__(calibration, draws, search, points, alpha, soft, partition)
        for name, level in (("quantile", quantile), ("rho", rho), ("alpha_inner", alpha_inner)):
            if not 0 < level < 1:
                raise RequestError(f"error.{name} must lie between 0 and 1, got {level}")
        best = float(largest_rho(np.zeros((draws, 1)), (1.0,), alpha_inner, soft))
        if best > rho:
            raise RequestError(
                f"no image can pass the inner test: {draws} draws show at best rho = {best:.4f}; raise error.draws or "
                "error.rho"
            )
        self.quantile, self.rho, self.alpha_inner = quantile, rho, alpha_inner

    def measure(self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream) -> Sampled:
        return self.sample(smoothed, threat, x, stream, "error-bound", self.draws)

    def conclude(self, norms: np.ndarray, threat: TransformationThreat) -> Bound:
        choose, test = halves(norms)
        own = np.quantile(choose, 0.9 if self.soft else 1 - self.rho / 2, axis=1, method="higher")  # (images, parts)
        parts = tuple(np.quantile(own, self.quantile, axis=0, method="higher").tolist())
        passed = largest_rho(test, parts, self.alpha_inner, self.soft) <= self.rho
        outer = float(clopper_pearson_lower(int(passed.sum()), len(test), self.alpha))
        q = max(0.0, (outer - self.alpha_inner) / (1 - self.alpha_inner))
        guarantee, rests_on = self.statement(threat, "distributional")
        details = {"q_E": q, "images": len(norms), "draws": self.draws, "soft": self.soft} | rests_on
        return Bound(norm_of(parts), self.rho, self.alpha, guarantee, details, parts)


POOLED = (
    "E is pooled over images and over an attacker who draws gamma at random: it says nothing about one image, nor "
    "about an attacker who chooses"
)


class PooledBound(CalibratedBound):
    """Fischer et al. 2020, section 6 and Tables 1 and 4: P_{theta, gamma, x}( ||defect|| <= E ) >= q_E, with gamma
    uniform over the threat's range. rho = 1 - q_E.

    Heuristic: no statement about this image, nor about the worst gamma. q_E is a betting bound on the mean over images
    of the fraction of their draws within E, so that the draws of one image need not be independent.

    Args:
        calibration, draws, partition, alpha: see `CalibratedBound`.
        value: E in units of the noise, one number or one for each part; None puts it at `quantile` of the draws on one
            half of the images, and bounds q_E on the other.
        quantile: see `value`.
    """

    def __init__(
        self,
        calibration: int = 1000,
        draws: int = 64,
        value: float | Sequence[float] | None = None,
        quantile: float = 0.99,
        alpha: float = 1e-3,
        partition: str | None = None,
    ):
        super().__init__(calibration, draws, "grid", 2, alpha, False, partition)
        if not 0 <= quantile <= 1:
            raise RequestError(f"error.quantile must lie between 0 and 1, got {quantile}")
        try:
            self.value = None if value is None else np.asarray(value, dtype=float).reshape(-1)
        except (TypeError, ValueError) as failure:
            raise RequestError(f"error.value must be a number or a list of numbers, got {value!r}") from failure
        if self.value is not None and not ((self.value >= 0) & np.isfinite(self.value)).all():
            raise RequestError(f"error.value must hold finite numbers from 0 on, got {value!r}")
        self.quantile = quantile

    def measure(self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream) -> Sampled:
        parts = len(_masks(smoothed, x, self.partition))
        if self.value is not None and len(self.value) not in (1, parts):
            raise RequestError(f"error.value has {len(self.value)} numbers for {parts} parts; give one for each")
        return sample_pairs(smoothed, threat, x, stream, "error-bound", self.draws, self.partition)

    def conclude(self, norms: np.ndarray, threat: TransformationThreat) -> Bound:
        if self.value is None:
            choose, norms = halves(norms)
            flat = choose.reshape(-1, choose.shape[-1])
            parts = tuple(np.quantile(flat, self.quantile, axis=0, method="higher").tolist())
        else:
            parts = tuple(np.broadcast_to(self.value, norms.shape[-1:]).tolist())
        q = float(betting_lower(1.0 - beyond(norms, parts).mean(-1), self.alpha))
        details = {"q_E": q, "images": len(norms), "draws": self.draws, "soft": False, "rests_on": POOLED}
        return Bound(norm_of(parts), 1 - q, self.alpha, "heuristic", details, parts)
