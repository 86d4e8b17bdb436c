"""Bounds of the defect, and margins of cover slices, a second: ours against loops over theta and over images.

    python benchmarks/errors.py experiment=mnist_rotation data.dataset.root=DIR [overrides of `gsmooth bound`]

Bounds of the defect over all gamma, for one theta: by chords, 512 theta at once, against interval analysis of one
theta after the other (the published method; SPT's C++ takes 1.05, 4.8 and 5.5 s on one core for E below 1, .5 and .3);
and of a received file over all images that it may come from (IndivSPT). Both are compared with a dense search over
gamma, for which one must know the clean image.
Margins of slices: against a loop over TSS's 1,000 sub-samples of a slice from its left end, one image at a time,
through the same rotation and preprocessing and without a remainder (TSS: 1.7 core-minutes an MNIST image). Real images,
one run, medians.
"""

import sys
import time
from functools import partial
from statistics import median

import pandas as pd
import torch
from hydra import compose, initialize_config_module
from torch import Tensor
from tqdm import tqdm

from gsmooth_lightning.error.base import defect_norms
from gsmooth_lightning.error.chords import chord_norms
from gsmooth_lightning.error.interval import interval_defects
from gsmooth_lightning.error.inverse import InverseBound, inverse_norms, sources
from gsmooth_lightning.error.movement import movements
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.tasks.setup import prepare
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Warp

THETA = 512
ALONE = 8
"""Theta that are bounded by intervals."""

SLICE = 0.25
"""Length of a slice, in the unit of the parameter."""

NAMES = ("intervals, one by one", "chords", "chords, E < 1 sigma", "received", "margins, plain loop", "margins")


def main() -> None:
    with initialize_config_module("gsmooth_lightning.conf", version_base="1.3"):
        cfg = compose("bound", sys.argv[1:])
    run = prepare(cfg, "bound", ("error",), with_network=False)
    smoothed, threat, warp = run.smoothed, run.threat, run.threat.transform
    assert isinstance(warp, Warp)
    gammas = threat.parameters(241)[0]
    low = torch.arange(threat.low, threat.high, SLICE, dtype=torch.float64)[:, None]
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    traced = threat.transform.dim == 1 and warp.interpolation == "bilinear"
    ratios: dict[str, list[float]] = {"chords": [], "received": []}
    for k in tqdm(range(len(run.data.visited))):
        x = threat.prepare(run.data.visited[k][0][None])[0]
        theta = smoothed.draw_parameters(Stream(cfg.seed, k).at("error-bound", 0), THETA)
        masks = torch.ones(1, *smoothed.encoded_shape(x))
        chords = partial(by_chords, smoothed, threat, x, theta, masks)
        calls = {
            "intervals, one by one": (partial(one_by_one, smoothed, threat, x, theta[:ALONE]), ALONE),
            "chords": (chords, THETA),
            "chords, E < 1 sigma": (partial(chords, [1.0]), THETA),
            "received": (partial(received, smoothed, threat, x, theta, float(gammas[7 * k % len(gammas)])), THETA),
            "margins, plain loop": (partial(plain_margins, smoothed, warp, x, low[:2]), 2),
            "margins": (partial(margins, smoothed, threat, warp, x, low), len(low)),
        }
        files = threat.apply(x.expand(len(gammas), *x.shape), gammas)
        dense = max(defect_norms(smoothed, x, files, gammas, part, masks).max() for part in theta[:64].split(16))
        for name, (call, number) in calls.items():
            if name == "received" and not traced:
                continue
            start = time.perf_counter()
            found = call()
            seconds[name].append((time.perf_counter() - start) / number)
            if name in ratios:
                ratios[name].append(float(found[:64].max() / dense))
    rates = {name: 1 / median(times) for name, times in seconds.items() if times}
    table = pd.DataFrame({"a second": rates})
    table["ratio"] = [rates[name] / rates[NAMES[0 if "margins" not in name else 4]] for name in rates]
    print(table.to_markdown(floatfmt=",.1f"))
    print(f"{THETA} theta an image: {THETA / rates['chords']:.2f} s, to E < 1 sigma {THETA / rates[NAMES[2]]:.2f} s")
    for name, found in ratios.items():
        if found:
            print(f"largest bound over that of a dense search, {name}: {median(found):.2f}, at most {max(found):.2f}")


def by_chords(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    x: Tensor,
    theta: Tensor,
    masks: Tensor,
    ceiling: list[float] | None = None,
) -> Tensor:
    """Bounds by chords, their jobs on all workers."""
    procedure = chord_norms(smoothed, threat, x, theta, masks, ceiling)
    return next(run_rounds([(0, procedure)], x.device, 1))[1]


def one_by_one(smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, theta: Tensor) -> Tensor:
    """Bounds by interval analysis."""
    return torch.cat([interval_defects(smoothed, threat, x, one) for one in theta.split(1)])


def received(
    smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, theta: Tensor, gamma: float
) -> Tensor:
    """Bounds for the file that gamma makes, its inverse included."""
    bound, file = InverseBound(), threat.apply(x[None], torch.tensor([[gamma]]))[0]
    found = sources(threat, file, bound.pieces, bound.splits, bound.refinements)
    return torch.cat([inverse_norms(smoothed, file, found, part) for part in theta.split(smoothed.block)])


def plain_margins(smoothed: SmoothedClassifier, warp: Warp, x: Tensor, low: Tensor) -> Tensor:
    """Margins of slices, one after the other."""
    return torch.stack([margin(smoothed, warp, x, float(a)) for a in low])


@torch.inference_mode()
def margin(smoothed: SmoothedClassifier, warp: Warp, x: Tensor, left: float) -> Tensor:
    """Largest distance from a slice's left end at 1,000 points, one at a time."""
    start = smoothed.preprocess(warp(x[None], torch.tensor([[left]])))
    points = torch.linspace(left, left + SLICE, 1000)
    return torch.stack([(smoothed.preprocess(warp(x[None], p.view(1, 1))) - start).norm() for p in points]).max()


def margins(smoothed: SmoothedClassifier, threat: TransformationThreat, warp: Warp, x: Tensor, low: Tensor) -> Tensor:
    """Margins of all slices of an image, with their remainders."""
    return torch.cat([movements(smoothed, threat, warp, x, part, part + SLICE) for part in low.split(16)])


if __name__ == "__main__":
    main()
