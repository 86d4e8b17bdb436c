"""Movement bounds of cover slices beside the farthest of sampled files, for every transformation that is covered.

    python benchmarks/movements.py data=mnist data.dataset.root=DIR [overrides of `gsmooth bound`]

For each image the range is cut as by certify=cover; in every eighth slice, 60 files are made at random parameters. The
ratio is the bound over the farthest of them, what 8-bit files round included. Transformations with finitely many
outcomes have no movement: their column says how many outcomes there are.
"""

import math
import sys
import time
from statistics import median

import pandas as pd
import torch
from hydra import compose, initialize_config_module
from torch import Tensor
from tqdm import tqdm

from gsmooth_lightning.certify import CoverCertifier
from gsmooth_lightning.certify.cover import Cover, Slice
from gsmooth_lightning.error.movement import middle_images, movements
from gsmooth_lightning.error.slices import MOST_SLICES
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.tasks.setup import prepare
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Stepwise

COVERED = {
    "rotation": (),
    "translation": ("threat.low=-1", "threat.high=1"),
    "scaling": (),
    "shear": (),
    "rotational_blur": (),
    "zoom_blur": (),
    "defocus": (),
    "motion_blur": (),
    "pixelate": (),
    "glass_blur": (),
}
"""Overrides of the configured ranges: translation by four pixels needs more slices than MOST_SLICES."""

FILES = 60


def main() -> None:
    rows = {}
    for name, narrowed in tqdm(COVERED.items()):
        with initialize_config_module("gsmooth_lightning.conf", version_base="1.3"):
            own = [
                f"threat={name}",
                f"transform={name}",
                "law=none",
                "preprocess=lowpass",
                "preprocess.steps.0.bandwidth=8",
            ]
            cfg = compose("bound", [*own, *narrowed, "noise.sigma=0.12", *sys.argv[1:]])
        run = prepare(cfg, "bound", (), with_network=False)
        assert isinstance(run.threat, TransformationThreat)
        finite = isinstance(run.threat.transform, Stepwise)
        counts, seconds, ratios = [], [], []
        for k in range(len(run.data.visited)):
            x = run.threat.prepare(run.data.visited[k][0][None])[0]
            start = time.perf_counter()
            slices = cut(run.smoothed, run.threat, x, k)
            seconds.append(time.perf_counter() - start)
            counts.append(len(slices))
            if not finite:
                ratios += [r for s in slices[::8] if (r := ratio(run.smoothed, run.threat, x, s)) < math.inf]
        rows[run.threat.transform.name] = {
            "range": ", ".join(f"{a:g} to {b:g}" for a, b in zip(run.threat.lows, run.threat.highs, strict=True)),
            "slices": f"{median(counts):.0f}" + (" outcomes" if finite else ""),
            "seconds": f"{median(seconds):.2f}",
            "bound / farthest file": "" if finite else f"{median(ratios):.2f}",
            "at most": "" if finite else f"{max(ratios):.2f}",
        }
    print(pd.DataFrame(rows).T.to_markdown())


def cut(smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, image: int) -> list[Slice]:
    """The slices of an image, as certify=cover cuts them."""
    procedure = Cover(CoverCertifier(), smoothed, threat, x, Stream(0, image), 0, 0.0).slices()
    slices = next(run_rounds([(image, procedure)], x.device, 1))[1]
    assert slices, f"image {image} needs more than {MOST_SLICES} slices"
    return slices


@torch.inference_mode()
def ratio(smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, s: Slice) -> float:
    """The bound of a slice's movement over the farthest file from its middle; inf where none moves."""
    low, high = s.low[None], s.high[None]
    gammas = (low + (high - low) * torch.rand(FILES, len(s.low), dtype=torch.float64)).float()
    middle = smoothed.preprocess(middle_images(threat, threat.transform, x, low, high))
    files = smoothed.preprocess(threat.apply(x.expand(FILES, *x.shape), gammas))
    farthest = (files - middle).flatten(1).norm(dim=1).max()
    return float(movements(smoothed, threat, threat.transform, x, low, high).sum() / farthest)


if __name__ == "__main__":
    main()
