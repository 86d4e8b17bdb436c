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

from gsmooth_lightning.certify.additive import check_law, check_stretch
from gsmooth_lightning.certify.base import ABSTAIN, Certificate, Certifier, Limits
from gsmooth_lightning.certify.transfer import law_transfer, required, sampled
from gsmooth_lightning.confidence import Counts, clopper_pearson_upper, group_sequential, looks_up_to
from gsmooth_lightning.error.rounding import TAIL, file_rounding
from gsmooth_lightning.error.slices import GRIDDED, MOST_SLICES, Piece, Slices, covered, start_error
from gsmooth_lightning.errors import RequestError, UncertifiableError, check_whole
from gsmooth_lightning.plans import GroupSequential
from gsmooth_lightning.rounds import together
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Brightness, Mover, Transform, same

AT_ONCE = 16
"""Slices that are tested side by side."""

LEFT = f"the range needs more than {MOST_SLICES:,} slices; raise noise.sigma or certify.margins, or narrow the threat"
"""What a certificate says that was left for it."""

ERROR_STEP = 0.02
"""Errors are rounded up to multiples of it, so that few tests have to be computed."""

HOPELESS = 1e-2
"""A failed slice is cut only if its votes, at this level, leave room for the next test."""


@dataclass
class Slice:
    """A slice of the attack's parameters to test.

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
        check_stretch(smoothed)
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
            return left(sampled(p, slack)) - TAIL

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
            guarantee="heuristic" if cover.pieces.gridded else "sound",
            alpha=self.alpha,
            selection=selection[:-1].tolist(),
            counts=cover.counts[:-1].tolist(),
            n=int(cover.counts.sum()),
            seed=stream.seed,
            evaluations=cover.spent,
            details={"slices": cover.tested, "slack": cover.slack}
            | ({"rests_on": GRIDDED} if cover.pieces.gridded else {})
            | ({"left": LEFT} if cover.left else {}),
        )

    def limits(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Limits]:
        """Of the first slices, each tested to the last draw; those that fail are cut, and cost more."""
        assert isinstance(threat, TransformationThreat)
        cover = Cover(self, smoothed, threat, x, stream, 0, start_error(smoothed, threat, x))
        number = len((yield from cover.slices()))
        chosen, tested = smoothed.evaluations(0, self.n0), number * smoothed.evaluations(0, self.n)
        return Limits(
            chosen + smoothed.evaluations(0, number) + tested,
            min(cover.limit, threat.reach),
            self.alpha,
            f" for {number:,} slices, and more for the parts of those that fail",
        )


class Cover:
    """The slices of one image, and their tests.

    Attributes:
        start: `start_error`, by how much the clean image may be farther from a middle than the files.
        limit: least radius at which a slice has failed.
        left: whether a box needed too many slices.
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
        self.pieces, (_, rest) = Slices(smoothed, threat, x), covered(threat)
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

    def slices(self) -> Generator[Any, Any, list[Slice]]:
        """All of the attacker's parameters."""
        pieces = yield from self.pieces.whole(self.margin(0), self.certifier.cells)
        return self.as_slices(pieces, 0, 0.0)

    def cut(self, low: Tensor, high: Tensor, depth: int) -> Generator[Any, Any, list[Slice]]:
        """Slices of a box at a depth."""
        pieces = yield from self.pieces.cut(low, high, self.margin(depth))
        return self.as_slices(pieces, depth, self.pieces.near(low, high))

    def margin(self, depth: int) -> float:
        """How far gamma may move the pixels of a slice."""
        return self.certifier.margins[depth] * self.sigma / self.stretch

    def as_slices(self, pieces: Sequence[Piece] | None, depth: int, near: float) -> list[Slice]:
        """Slices to test; where there are too many, none, and the box fails from `near` on."""
        if pieces is None:
            self.limit, self.left = min(self.limit, near), True
            return []
        return [Slice(p.low, p.high, self.error(p.moved + p.fixed), p.near, depth) for p in pieces]

    def error(self, moved: float) -> float:
        """How far the pixels of a slice and the clean image are from its middle in sigma, rounded up to a step."""
        moved = self.stretch * (moved + self.start) / self.sigma
        return math.ceil((moved + self.rounding) / ERROR_STEP) * ERROR_STEP

    @torch.inference_mode()
    def sureness(self, wave: Sequence[Slice]) -> Tensor:
        """By how much the network without noise prefers the class in the middle of each slice, (slices,)."""
        images = self.pieces.middles(wave)
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
        stream, image = self.stream.within("estimate", len(self.tested)), self.pieces.middles([s])[0]
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
        if self.pieces.cuts and s.depth + 1 < len(certifier.margins) and self.hopeful(s, count, n):
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
