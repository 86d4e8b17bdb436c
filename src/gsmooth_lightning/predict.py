"""The smoothed classifier as something to deploy: prediction with abstention, and a module that exports."""

import contextlib
import io
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import binom
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from gsmooth_lightning.certify.base import ABSTAIN
from gsmooth_lightning.confidence import EARLY, GUARD, Counts, betting_lower, check_alpha, looks_up_to
from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.model import is_black_box
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream, TrainingSource, content_digest
from gsmooth_lightning.threat import Threat

FIRST = 32
"""Draws before the first look; of a few less, all of one class would decide nothing at alpha = 1e-3."""

ABOUT = "gsmooth.json"
"""Extra file of an exported module."""


@dataclass(frozen=True)
class Prediction:
    """With probability at least 1 - alpha over the draws, `prediction` is the smoothed classifier's class or ABSTAIN.

    Attributes:
        prediction: class, or ABSTAIN (-1).
        alpha: probability of another class, at most.
        n: draws that were taken.
        counts: their votes by class, added up.
        evaluations: forward passes of the network, padding included.
        seed, input: the draws' seed, and the digest of the input that addresses them.
    """

    prediction: int
    alpha: float
    n: int
    counts: list[float]
    evaluations: int
    seed: int
    input: str


class Predictor:
    """PREDICT (Cohen et al. 2019), sequential: draws until a class leads for certain, n at most, then abstains.

    Looks at n_1 < ... < n_J = n draws and their levels are fixed beforehand: a_1 = ... = a_(J-1) share EARLY of alpha,
    the last level is the rest. At each look the class with most votes is returned if it `leads` at that level.

    **P(another class than the smoothed classifier's is returned) <= alpha**, whatever the probabilities of the classes
    are: look j errs with probability at most a_j (see `leads`), hence any of them with at most a_1 + ... + a_J = alpha.
    The last look is the test of n draws at (1 - EARLY) alpha: that one may stop early costs 2 % of alpha, no more.

    Under soft votes the class is that with the largest mean vote, and `leads_in_mean` the test.

    Draws are those of the sampler, whose law is within `SmoothedClassifier.slack` of the exact one in total variation:
    a class less than 2 slack below the largest (1e-6 for digits) counts as the largest; no certified image is so near.

    The draws of an input are addressed by its content: a file gets the same answer in every batch, order and process,
    and whoever knows the seed can compute them. An attacker who does may try files until the draws err, one in 1/alpha:
    then deploy with a seed of your own.

    Args:
        smoothed: the classifier.
        n: most draws that are spent on an input.
        alpha: probability of a wrong class.

    Raises:
        RequestError: alpha out of range, or so few draws that no votes decide.
    """

    def __init__(self, smoothed: SmoothedClassifier, n: int = 10_000, alpha: float = 1e-3):
        check_draws(n, alpha)
        self.smoothed, self.alpha = smoothed, alpha
        self.looks = looks_up_to(n, smoothed.block, FIRST)
        early = len(self.looks) - 1
        each = EARLY * alpha / max(1, early)
        self.levels = (*[each] * early, alpha - early * each)

    def stream(self, x: Tensor, seed: int) -> Stream:
        """The draws that belong to an input, (c, h, w): its image number is 64 bits of a hash of its values."""
        return Stream(seed, int(content_digest(x), 16))

    def procedure(self, x: Tensor, stream: Stream) -> Generator[Any, Any, Prediction]:
        """The prediction on a prepared input x, (c, h, w), as a procedure (see `rounds`)."""
        smoothed, soft = self.smoothed, self.smoothed.votes == "soft"
        votes = np.zeros((0, smoothed.classes + 1)) if soft else np.zeros(smoothed.classes + 1, dtype=int)
        seen, evaluations, decided = 0, 0, False
        for look, level in zip(self.looks, self.levels, strict=True):
            new = yield from smoothed.sample(x, stream, "predict", seen, look)
            votes = np.concatenate([votes, new]) if soft else votes + new
            evaluations += smoothed.evaluations(seen, look)
            seen = look
            decided = leads_in_mean(votes[:, :-1], level) if soft else bool(leads(votes[:-1], level))
            if decided:
                break
        counts = (votes.sum(0) if soft else votes)[:-1]
        return Prediction(
            prediction=int(counts.argmax()) if decided else ABSTAIN,
            alpha=self.alpha,
            n=seen,
            counts=counts.tolist(),
            evaluations=evaluations,
            seed=stream.seed,
            input=content_digest(x),
        )


def check_draws(n: int, alpha: float) -> None:
    """Raises RequestError unless n votes for one class decide at alpha."""
    check_alpha(alpha)
    check_whole("", n=(n, 1))
    least = next(k for k in range(1, 1100) if votes_needed(k, (1 - EARLY) * alpha) <= k)
    if n < least:
        raise RequestError(f"n={n} votes for one class decide nothing at alpha={alpha:g}; take n={least} or more")


# ---------------------------------------------------------------- tests of one look


def votes_needed(total: ArrayLike, level: float) -> np.ndarray:
    """Of `total` votes for two classes, the least number a for one of them with 2 P(Bin(total, 1/2) >= a) <= level;
    total + 1 where there is none."""
    return (binom.isf(level / 2 * (1 - GUARD), total, 0.5) + 1).astype(int)


def leads(counts: Counts, level: float) -> np.ndarray:
    """Whether the class with most votes, (..., classes), is the most probable one: the two-sided binomial test of the
    two largest counts a >= b, 2 P(Bin(a + b, 1/2) >= a) <= level. Wrong with probability at most `level`, without a
    price for the number of classes (Hung & Fithian 2019).

    Proof. Let ties for the lead be broken by a fair draw; a tie passes no test, so that no answer changes. It is enough
    that P(class j leads and passes) <= level P(class j leads) for each class j with p_j <= p_k for some k: the events
    on the right are disjoint. Condition on the counts of all classes but j and k, let c be the largest of them and s
    the sum of the counts of j and k. Now X, the count of j, is Bin(s, q) with q = p_j / (p_j + p_k) <= 1/2. The
    conditional probability of {passes} given {leads}, both increasing in X, grows with q: let q = 1/2. Passing means
    X >= t, for some t: 2 P(Bin(t + b, 1/2) >= t) <= level with b = max(s - t, c).
    If 2c < s, only k can tie with j, so that P(leads) = 1/2, and P(X >= t) <= P(Bin(t + b, 1/2) >= t) <= level / 2
    because t + b >= s.
    If 2c >= s, leading is X > c or rarer by ties, and t > c, b = c. Given that it exceeds c, Bin(m, 1/2) grows with m
    in the likelihood ratio order, and s <= t + c: P(X >= t | X > c) <= P(Bin(t + c) >= t) / P(Bin(t + c) > c), whose
    denominator is at least 1/2, because t + c >= 2c + 1. And {X > c} is part of {leads}.
    """
    second, first = np.moveaxis(np.partition(counts, -2, -1)[..., -2:], -1, 0)
    return first >= votes_needed(first + second, level)


def leads_in_mean(votes: np.ndarray, level: float) -> bool:
    """Whether the class with the largest sum of soft votes, (n, classes) in [0, 1], has the largest mean vote.

    For each other class k, a lower bound of the mean of (1 + F_A - F_k) / 2 at level / (classes - 1) exceeds 1/2. If A
    is not the largest, its bound against the largest is one that fails; A is one of classes - 1 such classes.
    """
    top, *others = np.argsort(-votes.sum(0), kind="stable")
    share = level / len(others)
    return all(betting_lower((1 + votes[:, top] - votes[:, k]) / 2, share) > 0.5 for k in others)


# ---------------------------------------------------------------- a module that exports


class Block(nn.Module):
    """Classes that one block of draws gives an input, (c, h, w) -> (block,); `classes` stands for none."""

    def __init__(self, smoothed: SmoothedClassifier):
        super().__init__()
        self.smoothed = smoothed

    def forward(self, x: Tensor) -> Tensor:
        source = TrainingSource(x.device, torch.float64)  # as nodes of a graph
        return self.smoothed.labels(self.smoothed.draw(x, source, self.smoothed.block))


class Exportable(nn.Module):
    """PREDICT with n draws as a module that `torch.export.export` takes: what it saves needs torch alone to run.

    forward takes a file's values, (c, h, w) float32 of one shape, and returns the class, or ABSTAIN, and the votes by
    class, (classes,), int64 both. The class is returned if it `leads` at alpha. ABSTAIN also where the input has values
    outside the format's range or NaN (pixels from 0 to 255, say), or where the network returned NaN or infinity: such
    draws are missing in the votes.

    Values are brought to the threat's saved format first. The draws come from torch's generator on the device of the
    export: others with every call, reproducible by torch.manual_seed. Calls on one input are tests of their own; each
    errs with probability alpha. The network is the plain one, whose logits are within 1e-4 of an optimised one's, in
    float32: autocast is for others.

    Args:
        smoothed: the classifier, with hard votes and a plain network.
        threat: how its inputs are saved.
        x: a prepared input, (c, h, w): gives shape and device.
        n, alpha: draws, and probability of a wrong class.

    Raises:
        RequestError: a classifier that torch.export does not take, such as a black box; too few draws.
    """

    needed: Tensor

    def __init__(self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, n: int = 1000, alpha: float = 1e-3):
        super().__init__()
        check_draws(n, alpha)
        if is_black_box(smoothed.base):
            raise RequestError(
                "a black box is seen through its answers alone and has nothing to export; use files=PATH"
            )
        if smoothed.votes == "soft":
            raise RequestError("the exported module counts hard votes; use files=PATH, or a run with votes=hard")
        smoothed.check_function(x)
        self.threat, self.n, self.classes, self.block = threat, n, smoothed.classes, smoothed.block
        # what a loop's body holds must be its inputs: exporting it by itself makes them of its constants
        with exporting():
            self.labels = torch.export.export(Block(smoothed).eval(), (x,)).run_decompositions({}).module()
        self.register_buffer("needed", torch.from_numpy(votes_needed(np.arange(n + 1), alpha)).to(x.device))
        self.training = False

    def train(self, mode: bool = True) -> "Exportable":
        """There is no training mode; exported graphs refuse to be asked for one."""
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        file = self.threat.save(x)
        classes = torch.arange(self.classes + 1, device=x.device)

        def unfinished(first: Tensor, votes: Tensor) -> Tensor:
            return first < self.n

        def block(first: Tensor, votes: Tensor) -> tuple[Tensor, Tensor]:
            counted = first + torch.arange(self.block, device=x.device) < self.n
            return first + self.block, votes + ((self.labels(file)[:, None] == classes) & counted[:, None]).sum(0)

        none = torch.zeros(self.classes + 1, dtype=torch.int64, device=x.device)
        _, votes = while_loop(unfinished, block, (none[0], none))
        first, second = votes[:-1].topk(2).values
        valid = (self.threat.clip(x) == x).all() & (votes[-1] == 0)
        decided = valid & (first >= self.needed.take(first + second))
        return torch.where(decided, votes[:-1].argmax(), ABSTAIN), votes[:-1].clone()


def saved(module: Exportable, x: Tensor, about: str) -> bytes:
    """What `torch.export.load` reads: the module for inputs like x, and `about` as the extra file ABOUT.

    Raises:
        RequestError: torch.export does not take the module.
    """
    content = io.BytesIO()
    with exporting():
        torch.export.save(torch.export.export(module, (x,)), content, extra_files={ABOUT: about})
    return content.getvalue()


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Within, torch exports: its failures are one sentence, and its warnings are about itself."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as failure:  # the tracer and the serialiser fail in many ways
        reason = (str(failure) or type(failure).__name__).splitlines()[0]
        raise RequestError(
            f"torch.export does not take this classifier ({reason}); use files=PATH instead"
        ) from failure
