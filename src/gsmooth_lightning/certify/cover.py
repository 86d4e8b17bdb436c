"""The cover certificate: slices of the attack's parameters, each held by pixel noise around its middle (TSS; theory.md
section 8)."""

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr
from torch import Tensor

from gsmooth_lightning.certify.additive import check_law
from gsmooth_lightning.certify.base import ABSTAIN, Certificate, Certifier
from gsmooth_lightning.certify.transfer import law_transfer, required
from gsmooth_lightning.confidence import Counts, clopper_pearson_upper, group_sequential, looks_up_to
from gsmooth_lightning.error.movement import middle_images, movements
from gsmooth_lightning.error.rounding import TAIL, file_rounding
from gsmooth_lightning.errors import RequestError, UncertifiableError, check_whole
from gsmooth_lightning.plans import GroupSequential
from gsmooth_lightning.preprocess import lipschitz
from gsmooth_lightning.rounds import together
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    Composition,
    Function,
    Identity,
    Mover,
    Stepwise,
    Transform,
    compute,
    same,
)
from gsmooth_lightning.transform.compose import AFFINE, VISITED

GRIDDED = (
    "the function was tried at the middles of a grid's cells, without a bound of how far it moves images in between"
)
"""What a certificate for a function without a movement bound takes for granted."""

AT_ONCE = 16
"""Slices that are tested side by side."""

MOST_SLICES = 20_000
"""How many slices an image may need before it is left."""

LEFT = f"the range needs more than {MOST_SLICES:,} slices; raise noise.sigma or certify.margins, or narrow the threat"
"""What a certificate says that was left for it."""

ERROR_STEP = 0.02
"""Errors are rounded up to multiples of it, so that few tests have to be computed."""

FAR = 8
"""Slices that move the image by more margins than this are halved; others are cut at once into as many as they need."""

START = 1e-5
"""By how much a pixel of psi(x, 0) may differ from x."""

HOPELESS = 1e-2
"""A failed slice is cut only if its votes, at this level, leave room for the next test."""


@dataclass
class Slice:
    """A part of the attack's parameters.

    Attributes:
        low, high: ends, (dim,).
        error: bound of how far it moves the pixels from the slice's middle, in sigma.
        near: least radius of the threat at which it is met.
        depth: how many slices around it have failed; the level is alpha / 2^(depth + 1).
    """

    low: Tensor
    high: Tensor
    error: float
    near: float
    depth: int


def covered(threat: Threat) -> tuple[Transform, Transform]:
    """The transformation whose parameters are covered, and what comes after it (the identity if nothing does). With
    threat.step it may be any: all parameters there are are listed.

    Raises:
        UncertifiableError: another transformation.
    """
    if not isinstance(threat, TransformationThreat):
        raise UncertifiableError("pixel threats have no parameters to cover; use certify=direct")
    transform = threat.transform
    first, *rest = transform.parts if isinstance(transform, Composition) else (transform,)
    visited = isinstance(first, VISITED) or threat.step is not None
    if not visited or len(rest) > 1 or not all(isinstance(part, AFFINE) for part in rest):
        raise UncertifiableError(
            "covered are rotation, translation, scaling, shear, blurs (not the Gaussian one), pixelation and your own "
            "function, each alone or with brightness or contrast after it; use certify=direct or joint"
        )
    return first, rest[0] if rest else Identity()


class CoverCertifier(Certifier):
    """The attack's parameters are covered by slices. The prediction at a slice's middle t is A, with an l2 radius
    larger than M >= max over the slice of ||P(psi(x, gamma)) - P(psi(x, t))||: then it is A on the whole slice. What
    psi(x, 0) differs from x adds to M: then it is A at the clean image too.

    A is chosen once, on n0 draws at x. A false certificate needs a false slice that passes, and each parameter lies in
    one slice of each depth, so every slice is tested at the full alpha, shared out over depths alone: 2^-(k + 1) of it
    at depth k, on fresh draws (intersection-union). Slices are tested from 0 outward, in each wave those first on which
    the network without noise is least sure; the first that fails, at all depths, ends the certified range. Tests are
    exact group-sequential ones.

    Slices are cut so that gamma moves the pixels by about `margins[depth]` sigma; what files round comes on top. A wide
    slice needs more votes, many narrow ones more tests.

    A transformation with finitely many outcomes, and one whose parameters threat.step lists, has a slice for each of
    them. A user's function without a movement bound is tried at the middles of a grid: `heuristic`.

    After the covered transformation the attacker may change brightness and contrast, against which the classifier is
    smoothed by a law of its own parameters: the two join as in Theorem J, E being M stretched by contrast, e^k of the
    attack and e^(c s) of the law but for a mass TAIL. An l2 ball of the threat adds to M.

    Args:
        n0: draws that choose the class.
        n: most draws for a slice.
        alpha: one minus the confidence of the certificate.
        margins: by how many sigma gamma may move the pixels of a slice, falling, one for each depth.
        cells: of the grid on which a function without a movement bound is tried, along each parameter.

    Raises:
        RequestError: margins that do not fall, or draws that could not pass a slice.
    """

    def __init__(
        self,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 1e-3,
        margins: Sequence[float] = (0.7, 0.35, 0.175),
        cells: int = 20,
    ):
        check_whole("certify", cells=(cells, 1))
        numbers = not isinstance(margins, int | float | str) and all(isinstance(m, int | float) for m in margins)
        self.margins = tuple(margins) if numbers else ()
        if not self.margins or not all(a > b for a, b in itertools.pairwise((*self.margins, 0.0))):
            raise RequestError(f"certify.margins must be positive and falling, such as [0.7,0.35], got {margins}")
        self.plans = [GroupSequential([1.0], n0, n, alpha / 2 ** (k + 1)) for k in range(len(self.margins))]
        self.n0, self.n, self.alpha, self.cells = n0, n, alpha, cells

    # -------------------------------------------------- hypotheses

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        first, rest = covered(threat)
        assert isinstance(threat, TransformationThreat)
        if isinstance(first, Mover) and threat.step is None:
            first.check_movement()
        if min(threat.lows[: first.dim]) < first.lowest:
            raise UncertifiableError(f"{first.name} has no parameters below {first.lowest:g}; set threat.low to it")
        if rest.dim and threat.lows[first.dim :] == threat.highs[first.dim :]:
            raise UncertifiableError(f"{rest.name} has no range in this threat; leave it out")
        if not same(smoothed.transform, rest):
            raise UncertifiableError(
                f"the cover certificate visits the parameters of {first.name} and draws those of {rest.name}, but the "
                f"classifier is smoothed over {smoothed.transform.name}; use law="
                + ("product, whose first part is null" if rest.dim else "none")
            )
        if not isinstance(smoothed.noise, Gaussian) or smoothed.noise.cholesky is not None:
            raise UncertifiableError("the cover certificate needs Gaussian pixel noise; use noise=gaussian")
        if smoothed.votes != "hard":
            raise UncertifiableError("the cover certificate counts hard votes; use votes=hard")
        if not math.isfinite(lipschitz(smoothed.preprocess)):
            raise UncertifiableError(
                "preprocessing must say how much it stretches l2 distances: use steps with an attribute lipschitz"
            )
        if rest.dim:
            if threat.saved != "real":
                raise UncertifiableError(
                    f"files {threat.file()} clip what brightness and contrast change; use threat.saved=real"
                )
            assert smoothed.law is not None
            check_law(rest, smoothed.law, threat.lows[first.dim :])
        if (floor := self.threshold(smoothed, threat, self.margins[-1], 0.0)) >= self.plans[-1].ceiling:
            raise UncertifiableError(
                f"{self.n} draws show at most pA = {self.plans[-1].ceiling:.4g}, and the narrowest slices need "
                f"{floor:.4g}; raise sampling.n or noise.sigma"
            )

    def threshold(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, error: float, slack: float
    ) -> float:
        """The pA that a slice's middle needs when the pixels move by `error` sigma, and brightness and contrast over
        all of their range."""
        first, rest = covered(threat)
        if not rest.dim:
            return float(min(1.0, ndtr(error) * (1 + 1e-12) + slack))
        assert smoothed.law is not None
        left = law_transfer(rest, smoothed.law, threat.lows[first.dim :], threat.highs[first.dim :], error)

        def transfer(p: ArrayLike, _: float) -> np.ndarray:
            return left(np.maximum(np.asarray(p, dtype=float) - slack, 0.0)) - TAIL

        return required(transfer, 1.0)

    # -------------------------------------------------- one image

    def procedure(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Certificate]:
        assert isinstance(threat, TransformationThreat)
        start = start_error(smoothed, threat, x)
        top, selection = yield from self.plans[0].choose(partial(smoothed.sample, x, stream))
        cover = Cover(self, smoothed, threat, x, stream, top, start)
        cover.spent = smoothed.evaluations(0, self.n0)
        yield from cover.visit()
        return Certificate(
            prediction=top if cover.limit > 0 else ABSTAIN,
            radius=min(cover.limit, threat.reach),
            unit=threat.unit,
            guarantee="heuristic" if cover.gridded else "sound",
            alpha=self.alpha,
            selection=selection[:-1].tolist(),
            counts=cover.counts[:-1].tolist(),
            n=int(cover.counts.sum()),
            seed=stream.seed,
            evaluations=cover.spent,
            details={"slices": cover.tested, "slack": cover.slack}
            | ({"rests_on": GRIDDED} if cover.gridded else {})
            | ({"left": LEFT} if cover.left else {}),
        )


class Cover:
    """The slices of one image, and their tests.

    Attributes:
        start: `start_error`, by how much the clean image may be farther from a middle than the files.
        cuts: whether slices are cut from the range, and those that fail are cut again; otherwise they are listed.
        limit: least radius at which a slice has failed.
        left: whether a box needed more than MOST_SLICES.
        gridded: whether slices are cells of a grid, of which the middles alone are known.
        tested: of each slice (ends, error in sigma, depth, pA needed, votes for the class, draws, passed).
    """

    def __init__(
        self,
        certifier: CoverCertifier,
        smoothed: SmoothedClassifier,
        threat: TransformationThreat,
        x: Tensor,
        stream: Stream,
        top: int,
        start: float,
    ):
        self.certifier, self.smoothed, self.threat, self.x, self.stream = certifier, smoothed, threat, x, stream
        self.first, rest = covered(threat)
        self.gridded = isinstance(self.first, Function) and self.first.bound is None and threat.step is None
        self.cuts = threat.step is None and not isinstance(self.first, Stepwise) and not self.gridded
        self.top, self.start, self.slack = top, start, smoothed.slack(x)
        assert isinstance(smoothed.noise, Gaussian)
        self.sigma = float(smoothed.noise.sigma.min())
        self.stretch, self.rounding = afterwards(smoothed, threat, rest, x) if rest.dim else (1.0, 0.0)
        self.needed = cache(partial(certifier.threshold, smoothed, threat, slack=self.slack))  # of few errors
        self.counts: Counts = np.zeros(smoothed.classes + 1)
        self.limit, self.spent, self.left = math.inf, 0, False
        self.tested: list[list[Any]] = []

    def visit(self) -> Generator[Any, Any, None]:
        """Tests the slices from 0 outward, a wave at a time."""
        slices = yield from self.slices()
        for first in range(0, len(slices), self.smoothed.block):
            wave = [s for s in slices[first : first + self.smoothed.block] if s.near < self.limit]
            if not wave:
                return
            (sure,) = yield [partial(self.sureness, wave)]
            self.spent += self.smoothed.block
            order = np.argsort(sure.cpu().numpy(), kind="stable")
            yield from together((self.hold(wave[i]) for i in order), AT_ONCE)

    # -------------------------------------------------- slices

    def slices(self) -> Generator[Any, Any, list[Slice]]:
        """All of the attacker's parameters: listed by threat.step, by outcome or on a grid, or cut into slices."""
        dim, threat, device = self.first.dim, self.threat, self.x.device
        low, high = (
            torch.tensor(ends[:dim], dtype=torch.float64, device=device) for ends in (threat.lows, threat.highs)
        )
        if threat.step is not None:
            at = threat.parameters(2)[0][:, :dim].unique(dim=0).double().to(device)
            return (yield from self.listed(at, at, at * (1 - 1e-6)))  # a multiple of the step may round up
        if isinstance(self.first, Stepwise):
            nearest, at = (ends.to(device) for ends in self.first.outcomes(float(low), float(high), self.x.shape))
            return (yield from self.listed(at, at, nearest))
        if self.gridded:
            axes = [torch.arange(self.certifier.cells, dtype=torch.float64, device=device)] * dim
            corner, width = torch.cartesian_prod(*axes).view(-1, dim), (high - low) / self.certifier.cells
            lows, highs = low + width * corner, low + width * (corner + 1)
            return (yield from self.listed(lows, highs, torch.zeros_like(lows).clamp(lows, highs)))
        return (yield from self.cut(low, high, 0))

    def listed(self, low: Tensor, high: Tensor, nearest: Tensor) -> Generator[Any, Any, list[Slice]]:
        """A slice for each row, (k, dim): what holds at its middle holds for all of it."""
        middle, slices = (low + high) / 2, []
        for a, b, m, point in zip(*(part.split(AT_ONCE) for part in (low, high, middle, nearest)), strict=True):
            (found,) = yield [partial(movements, self.smoothed, self.threat, self.first, self.x, m, m)]
            ends = zip(a, b, point, found.sum(1).tolist(), strict=True)
            slices += [Slice(i, j, self.error(moved), self.near(p, p), 0) for i, j, p, moved in ends]
        return sorted(slices, key=lambda s: s.near)

    def error(self, moved: float) -> float:
        """How far the pixels of a slice and the clean image are from its middle in sigma, rounded up to a step."""
        moved = self.stretch * (moved + self.start) / self.sigma
        return math.ceil((moved + self.rounding) / ERROR_STEP) * ERROR_STEP

    def cut(self, low: Tensor, high: Tensor, depth: int) -> Generator[Any, Any, list[Slice]]:
        """Slices of a box within which gamma moves the pixels by at most the margin of this depth, by distance from 0.

        Empty where there would be more than MOST_SLICES: the box then fails.
        """
        margin = self.certifier.margins[depth] * self.sigma / self.stretch
        ends = zip(self.threat.highs, self.threat.lows, strict=True)
        width = torch.tensor([b - a for b, a in ends], dtype=torch.float64, device=low.device)[: len(low)]
        slices: list[Slice] = []
        pieces = [(low, high)]
        while pieces:
            if len(slices) + len(pieces) > MOST_SLICES:
                self.limit, self.left = min(self.limit, self.near(low, high)), True
                return []
            lows, highs = (torch.stack(ends) for ends in zip(*pieces, strict=True))
            moved = partial(movements, self.smoothed, self.threat, self.first, self.x)
            found = yield [partial(moved, a, b) for a, b in zip(lows.split(AT_ONCE), highs.split(AT_ONCE), strict=True)]
            pieces = []
            for a, b, (moves, fixed) in zip(lows, highs, torch.cat(found).tolist(), strict=True):
                if moves <= margin:
                    slices.append(Slice(a, b, self.error(moves + fixed), self.near(a, b), depth))
                else:
                    pieces += parts(a, b, int(((b - a) / width.clamp_min(1e-300)).argmax()), moves / margin)
        return sorted(slices, key=lambda s: s.near)

    def near(self, low: Tensor, high: Tensor) -> float:
        """The least radius of the threat within which a parameter of a box lies, rounded down."""
        nearest = torch.zeros(1, len(self.threat.lows), dtype=torch.float64, device=low.device)
        nearest[0, : len(low)] = torch.zeros_like(low).clamp(low, high)
        return float(self.threat.distance(nearest)) * (1 - 1e-12)

    @torch.inference_mode()
    def middles(self, slices: Sequence[Slice]) -> Tensor:
        """What is classified for each slice, (slices, c, h, w)."""
        low, high = (torch.stack(ends) for ends in zip(*((s.low, s.high) for s in slices), strict=True))
        return middle_images(self.threat, self.first, self.x, low, high)

    @torch.inference_mode()
    def sureness(self, wave: Sequence[Slice]) -> Tensor:
        """By how much the network without noise prefers the class in the middle of each slice, (slices,)."""
        images = self.middles(wave)
        padded = torch.cat([images, images[:1].expand(self.smoothed.block - len(images), *self.x.shape)])
        theta = torch.zeros(len(padded), self.smoothed.transform.dim, device=self.x.device)
        out = self.smoothed.outputs(self.smoothed.encode(padded, theta) * (1 / self.smoothed.levels))[: len(wave)]
        if out.ndim == 1:
            return (out == self.top).float()
        others = torch.arange(out.shape[1], device=out.device) != self.top
        return out[:, self.top] - out[:, others].amax(1)

    # -------------------------------------------------- tests

    def hold(self, s: Slice) -> Generator[Any, Any, None]:
        """Tests a slice, and its parts if it fails; `limit` then falls to the nearest part that fails at last."""
        if s.near >= self.limit:
            return
        certifier, plan = self.certifier, self.certifier.plans[s.depth]
        needed = self.needed(s.error)
        stream, image = self.stream.within("estimate", len(self.tested)), self.middles([s])[0]
        record = [s.low.tolist(), s.high.tolist(), s.error, s.depth, needed, 0, 0, False]
        self.tested.append(record)
        count, n = 0, 0
        if needed < plan.ceiling:
            looks = looks_up_to(plan.n, self.smoothed.block, first=self.smoothed.block)
            rule = group_sequential(needed, looks, plan.alpha)
            sample = partial(self.sample, image, stream)
            outcome = yield from plan.test(sample, self.top, np.zeros_like(self.counts), looks, [rule])
            self.counts = self.counts + outcome.counts
            count, n = int(outcome.counts[self.top]), outcome.n
            record[5:] = [count, n, outcome.passed is not None]
            if outcome.passed is not None:
                return
        if self.cuts and s.depth + 1 < len(certifier.margins) and self.hopeful(s, count, n):
            narrower = yield from self.cut(s.low, s.high, s.depth + 1)
            for part in narrower:
                yield from self.hold(part)
        else:
            self.limit = min(self.limit, s.near)

    def sample(self, image: Tensor, stream: Stream, stage: str, first: int, last: int) -> Generator[Any, Any, Counts]:
        """Votes of draws around the middle of a slice."""
        self.spent += self.smoothed.evaluations(first, last)
        return (yield from self.smoothed.sample(image, stream, stage, first, last))

    def hopeful(self, s: Slice, count: int, n: int) -> bool:
        """Whether parts of a slice that failed with these votes may pass."""
        saved = self.certifier.margins[s.depth] - self.certifier.margins[s.depth + 1]
        return n == 0 or bool(clopper_pearson_upper(count, n, HOPELESS) > self.needed(max(0.0, s.error - saved)))


@torch.inference_mode()
def start_error(smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor) -> float:
    """Bound of ||P(file(psi(x, 0))) - P(x)||_2: the class is chosen at x, but slices hold files, and that of 0 may
    differ from x by START a pixel.

    Raises:
        UncertifiableError: a pixel of psi(x, 0) differs from x by more than START.
        RequestError: a user's function that gives two results for the same parameters, at the ends of the range.
    """
    first, _ = covered(threat)
    start = compute(threat.transform, x[None], torch.zeros(1, threat.transform.dim, device=x.device))[0].float()
    if not bool((start - x).abs().max() <= START):
        raise UncertifiableError(
            f"{first.name} at 0 is not the image itself, so that what is covered does not contain it; change its "
            "options or its parameters so that 0 leaves every image alone"
        )
    if isinstance(first, Function):
        ends = threat.parameters(2)[0][[0, -1], : first.dim].to(x.device)
        once, again = (first(x.expand(2, *x.shape), ends) for _ in range(2))
        if not torch.equal(once, again):
            raise RequestError(f"{first.name} must be deterministic: the same image and parameters gave two results")
    return lipschitz(smoothed.preprocess) * float((threat.save(start).double() - x).norm()) * (1 + 1e-9)


def afterwards(
    smoothed: SmoothedClassifier, threat: TransformationThreat, rest: Transform, x: Tensor
) -> tuple[float, float]:
    """(stretch, rounding): what brightness and contrast, but for a mass TAIL of their law, multiply distances of pixels
    by, and what their own rounding adds, in sigma."""
    assert smoothed.law is not None
    own = threat.transform.dim - rest.dim
    lows, highs = threat.lows[own:], threat.highs[own:]
    stretch = 1.0
    if not isinstance(rest, Brightness):
        stretch = math.exp(highs[0] + float(smoothed.law.within(TAIL, rest.dim)[1][0])) * (1 + 1e-9)
    first, _ = covered(threat)
    largest = torch.full_like(x, (first.gain if isinstance(first, Mover) else 1.0) * (1 + threat.l2))
    # twice: compositions that interpolate are computed in float32
    return stretch, 2 * file_rounding(smoothed, TransformationThreat(rest, lows, highs, saved="real"), largest)


def parts(low: Tensor, high: Tensor, axis: int, margins: float) -> list[tuple[Tensor, Tensor]]:
    """A box cut along an axis, by how many margins it moves the image."""
    number = 2 if margins > FAR else math.ceil(1.15 * margins)
    ends = torch.linspace(float(low[axis]), float(high[axis]), number + 1, dtype=torch.float64).tolist()
    found = []
    for a, b in itertools.pairwise(ends):
        lower, upper = low.clone(), high.clone()
        lower[axis], upper[axis] = a, b
        found.append((lower, upper))
    return found
