"""Draws that sampling plans save on the logs of Cohen et al. 2019, and the certified accuracy that this costs.

    python benchmarks/samples.py ../shared/data/logs/cohen [--alpha 0.001] [--n 100000] [--block 64]

An image's vote is taken to have the probability p = Phi(radius / sigma) that its log certifies (at an abstention the
radius is 0, and p = 1/2). Nothing is simulated: the law of an image's count is carried from look to look, so that the
mean number of draws and the probability of a certificate are exact. All plans are given the same alpha and at most n
draws; the n0 draws that choose the class come on top, the same for all. Draws are averaged over all images, and a
certificate counts where the log's prediction is correct. For each log and radius:

    certified: by Clopper-Pearson on n draws, in % of the images.
    draws, fewer: mean draws of `GroupSequential([radius])`, and n / draws.
    lost: percentage points of certified accuracy, against `certified`.
    possible: no test of level alpha with the same probabilities of a certificate takes fewer than n / possible draws
        (Wald 1945: E N >= kl(power, alpha) / KL(p, threshold)).
    fewer with 0: `GroupSequential([0, radius])`, which decides the prediction as well; p = 1/2 takes all n draws for
        that.
    fewer, lost anytime: the confidence sequence, which does not know the radius and states the largest it can.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.signal import fftconvolve
from scipy.special import rel_entr
from scipy.stats import binom, norm

from gsmooth_lightning.confidence import Boundary, looks_up_to
from gsmooth_lightning.plans import ConfidenceSequence, GroupSequential
from gsmooth_lightning.report.logs import read_log

FEWER, LOST = 30, 0.05
"""The target."""

RADII = np.arange(0.25, 4, 0.25)
SPREAD = 7.0
"""Standard deviations of a count that are followed; beyond lies a mass of 3e-12."""

Rule = Callable[[int, np.ndarray], np.ndarray]
"""rule(j, counts): what look j makes of an image with these counts, for each state it may be in: the number of the next
state, or -1: left without a certificate, or -2: certified. Shape (states, *counts.shape); the last look leaves none."""


class Replay:
    """The law of the count of votes of probability p, from look to look. p: (images,)."""

    def __init__(self, p: np.ndarray, looks: tuple[int, ...]):
        self.p, self.looks = p, looks
        self.steps = []
        for seen, look in itertools.pairwise((0, *looks)):
            first, counts = window(p, look - seen)
            self.steps.append((first, binom.pmf(counts, look - seen, p[:, None])))

    def __call__(self, rule: Rule, states: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean number of draws and probability of a certificate, both (images,)."""
        active = np.arange(len(self.p))  # images that are still under way
        alive = np.ones((states, len(active), 1)) * (np.arange(states) == 0)[:, None, None]
        low = np.zeros(len(active), dtype=int)  # count that the first entry stands for
        draws, certified = np.zeros(len(active)), np.zeros(len(active))
        for j, (look, (first, pmf)) in enumerate(zip(self.looks, self.steps, strict=True)):
            reached = low + first[active]
            alive = fftconvolve(alive, pmf[None, active], axes=-1).clip(0)
            low, counts = window(self.p[active], look)
            place = counts - reached[:, None]
            inside = (place >= 0) & (place < alive.shape[-1])
            alive = np.take_along_axis(alive, np.where(inside, place, 0)[None], -1) * inside
            then = rule(j, counts)
            draws[active] += look * (alive * (then < 0)).sum((0, 2))
            certified[active] += (alive * (then == -2)).sum((0, 2))
            alive = np.stack([(alive * (then == state)).sum(0) for state in range(states)])
            kept = alive.sum((0, 2)) > 1e-12
            active, low, alive = active[kept], low[kept], alive[:, kept]
            if not kept.any():
                break
        return draws, certified


def window(p: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The counts of n draws that matter: the first for each p, and all of them, (images, width)."""
    reach = SPREAD * np.sqrt(n * p * (1 - p)) + 20
    width = min(n, int(2 * reach.max(initial=0))) + 1
    low = np.clip(np.floor(n * p - reach).astype(int), 0, n + 1 - width)
    return low, low[:, None] + np.arange(width)


def one_radius(boundary: Boundary) -> Rule:
    """`GroupSequential([radius])`."""

    def rule(j: int, counts: np.ndarray) -> np.ndarray:
        return np.select([counts >= boundary.reject[j], counts <= boundary.futile[j]], [-2, -1], 0)[None]

    return rule


def prediction_and_radius(prediction: Boundary, radius: Boundary) -> Rule:
    """`GroupSequential([0, radius])`.

    States: 0 nothing decided, 1 and 2 the prediction or the radius passed, 3 the radius given up.
    """

    def rule(j: int, counts: np.ndarray) -> np.ndarray:
        passed = [counts >= b.reject[j] for b in (prediction, radius)]
        failed = [counts <= b.futile[j] for b in (prediction, radius)]
        then = []
        for state in range(4):
            first = passed[0] | (state == 1)
            second = passed[1] | (state == 2)
            gone = (state == 3) | (~second & failed[1])
            none = ~first & failed[0]
            then.append(np.select([none, first & gone, first & second, first, gone, second], [-1, -1, -2, 1, 3, 2], 0))
        return np.stack(then)

    return rule


def sequence(plan: ConfidenceSequence, looks: tuple[int, ...]) -> Callable[[float], Rule]:
    """The confidence sequence, for a certificate of pA > threshold. States: 0 not yet above, 1 above at some look.

    Its bounds are smooth in the count; they are interpolated between 1000 counts of a look, to a tenth of a count.
    """
    nodes = np.sin(np.linspace(0, np.pi / 2, 1000)) ** 2
    outlooks = [plan.outlook(nodes * look, look) for look in looks]

    def for_threshold(threshold: float) -> Rule:
        def rule(j: int, counts: np.ndarray) -> np.ndarray:
            bound, likely, hopeful = (np.interp(counts / looks[j], nodes, values) for values in outlooks[j])
            above = bound > threshold
            left = plan.stops(bound, likely, hopeful, 0.5) | (j == len(looks) - 1)
            return np.stack([np.where(left, -1 - a, 0 + a) for a in (above, np.ones_like(above))])

        return rule

    return for_threshold


def votes_of(path: Path) -> tuple[float, np.ndarray, np.ndarray]:
    """(sigma, p, whether the prediction is correct) of one of Cohen et al.'s logs, named sigma_S."""
    log = pd.DataFrame(read_log(path))
    sigma = float(path.name.removeprefix("sigma_"))
    return sigma, norm.cdf(log["radius"] / sigma), (log["prediction"] == log["label"]).to_numpy()


def fewest(p: np.ndarray, power: np.ndarray, threshold: float, alpha: float) -> np.ndarray:
    """Wald's bound of the mean number of draws of any test of level alpha with this power, (images,)."""
    needed = rel_entr(power, alpha) + rel_entr(1 - power, 1 - alpha)
    brought = rel_entr(p, threshold) + rel_entr(1 - p, 1 - threshold)
    return np.divide(needed, brought, out=np.zeros_like(p), where=p > threshold)


def rows(
    p: np.ndarray,
    correct: np.ndarray,
    thresholds: dict[float, float],
    alpha: float,
    looks: tuple[int, ...],
    anytime: Callable[[float], Rule],
) -> Iterator[dict[str, float]]:
    """The table of one log: a row for each radius, given with the pA it needs."""
    values, image = np.unique(p, return_inverse=True)
    share, right = np.bincount(image) / len(p), np.bincount(image, correct) / len(p)
    n, replay = looks[-1], Replay(values, looks)
    for radius, threshold in thresholds.items():
        power = binom.sf(binom.isf(alpha, n, threshold), n, values)
        rules = GroupSequential([0, radius], n=n, alpha=alpha).rules(looks, {0: 0.5, radius: threshold}.__getitem__)
        draws, certified = replay(one_radius(rules[1]), 1)
        draws_with, _ = replay(prediction_and_radius(*rules), 4)
        draws_anytime, certified_anytime = replay(anytime(threshold), 2)
        yield {
            "radius": radius,
            "certified": 100 * right @ power,
            "draws": share @ draws,
            "fewer": n / (share @ draws),
            "lost": 100 * right @ (power - certified),
            "possible": n / max(1.0, share @ fewest(values, power, threshold, alpha)),
            "fewer with 0": n / (share @ draws_with),
            "fewer anytime": n / (share @ draws_anytime),
            "lost anytime": 100 * right @ (power - certified_anytime),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", type=Path)
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=64)
    options = parser.parse_args()
    alpha, n = options.alpha, options.n
    looks = looks_up_to(n, options.block)
    anytime = sequence(ConfidenceSequence(n=n, alpha=alpha), looks)
    table = []
    for path in sorted(options.logs.rglob("sigma_*")):
        sigma, p, correct = votes_of(path)
        needed = {float(radius): float(norm.cdf(radius / sigma)) for radius in RADII}
        within = {radius: threshold for radius, threshold in needed.items() if threshold < alpha ** (1 / n)}
        log = path.relative_to(options.logs).as_posix().replace("sigma_", "")
        table += [{"log, sigma": log, **row} for row in rows(p, correct, within, alpha, looks, anytime)]
    frame = pd.DataFrame(table)
    print(frame.to_markdown(index=False, floatfmt=("", ".2f", ".2f", ".0f", ".1f", ".3f", ".1f", ".1f", ".1f", ".2f")))
    reached, kept, open_ = frame.fewer >= FEWER, frame.lost <= LOST, frame.possible >= FEWER
    print(
        f"\n{FEWER} times fewer draws at {reached.sum()} of {len(frame)} rows (possible at {open_.sum()}), "
        f"median {frame.fewer.median():.1f}; at most {LOST} points lost at {kept.sum()}, largest {frame.lost.max():.3f}"
    )


if __name__ == "__main__":
    main()
