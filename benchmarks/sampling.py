"""Samples per second of joint certification (rotation and pixel noise, 28x28 CNN), and where the time goes.

    python benchmarks/sampling.py [--draws 20000] [--rounds 7] [--block 64]

Everything is measured in one run, in turn, `rounds` times; medians are printed, and ratios of them. The plain loop is
the sampling loop of Cohen et al.'s published code (one batch after the other, counted on the host) around the same
transformation, preprocessing and plain network, with torch's own normals, at its best batch size. All forward passes
see noisy input (a clean repeated batch runs up to twice as fast).
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gsmooth_lightning.data import Digits
from gsmooth_lightning.model import SmallCNN, fused
from gsmooth_lightning.preprocess import DiscVignette, LowPass, Preprocess
from gsmooth_lightning.rounds import run_rounds, workers
from gsmooth_lightning.smoothed import LEVELS, SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Rotation

SIGMA, ANGLE = 0.35, 30.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def plain_loop(network: torch.nn.Module, smoothed: SmoothedClassifier, x: Tensor, draws: int, batch: int) -> np.ndarray:
    """Cohen et al. 2019, core.py, `_sample_noise`, with a random rotation in front."""
    counts = np.zeros(10, dtype=int)
    remaining = draws
    while remaining > 0:
        size = min(batch, remaining)
        remaining -= size
        images = x.repeat((size, 1, 1, 1))
        theta = torch.randn(size, 1, device=x.device) * ANGLE
        images = smoothed.preprocess(smoothed.transform(images, theta))
        predictions = network(images + torch.randn_like(images) * SIGMA).argmax(1)
        for label in predictions.cpu().numpy():
            counts[label] += 1
    return counts


def ours(smoothed: SmoothedClassifier, x: Tensor, draws: int) -> np.ndarray:
    """The draws as certifiers take them."""
    return next(run_rounds([(0, smoothed.sample(x, Stream(0, 0), "estimate", 0, draws))], x.device))[1]


def spread(part: Callable[[int], object], blocks: int) -> Callable[[], None]:
    """A part of a draw for many blocks, alone, over the same workers as the whole."""

    @torch.inference_mode()
    def one(block: int) -> None:
        part(block)

    def run() -> None:
        with workers(DEVICE) as pool:
            pool([lambda b=b: one(b) for b in range(blocks)])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block", type=int, default=64)
    options = parser.parse_args()
    block = options.block
    draws = options.draws // block * block
    blocks = draws // block

    threat = TransformationThreat(Rotation(), -30, 30, size=28)
    x = threat.prepare(Digits().split("test", 10)[0][0][None])[0].to(DEVICE)
    torch.manual_seed(0)
    network = SmallCNN().eval().to(DEVICE)
    example = x + SIGMA * torch.randn(block, *x.shape, device=DEVICE)
    fast, backend = fused(network, example)
    smoothed = SmoothedClassifier(
        fast, 10, Rotation(), Preprocess([DiscVignette(), LowPass(5)]), Gaussian(ANGLE), Gaussian(SIGMA), block
    ).to(DEVICE)

    with torch.inference_mode():
        repeated = x.expand(block, *x.shape)
        theta = torch.randn(block, 1, device=DEVICE) * ANGLE
        turned = smoothed.transform(repeated, theta).contiguous()
        steps = smoothed.encode(repeated, theta)
        noise = smoothed.noise.sample(Stream(0, 0).at("estimate", 0, DEVICE), block, tuple(x.shape))
        noisy = example.clone()
    parts = {
        "addressed draws": lambda b: smoothed.noise.sample(
            Stream(0, 0).at("estimate", b, DEVICE), block, tuple(x.shape)
        ),
        "transform": lambda b: smoothed.transform(repeated, theta),
        "preprocess, to the grid": lambda b: torch.round(smoothed.preprocess(turned) * LEVELS),
        "noise to the grid, add": lambda b: (steps + noise.mul(LEVELS).round_().to(steps.dtype)) * (1 / LEVELS),
        "forward and count": lambda b: torch.bincount(smoothed.labels(noisy), minlength=11),
    }
    cases: dict[str, Callable[[], object]] = {
        f"plain loop, batch {batch}": lambda batch=batch: plain_loop(network, smoothed, x, draws, batch)
        for batch in (64, 200, 400, 1000)
    }
    cases["bare forward"] = spread(lambda b: fast(noisy), blocks)
    cases |= {f"part: {name}": spread(part, blocks) for name, part in parts.items()}
    cases["ours"] = lambda: ours(smoothed, x, draws)

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(options.rounds + 1):  # the first turn warms up
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    cores = f"{torch.get_num_threads()} cores" if DEVICE.type == "cpu" else torch.cuda.get_device_name()
    print(
        f"{draws} draws, {options.rounds} rounds, {cores}, torch {torch.__version__}, backend {backend}, block {block}"
    )
    print(f"{'':32}{'samples/s':>12}{'us/sample':>12}{'min..max us':>18}")
    for name, values in seconds.items():
        low, high = min(values) / draws * 1e6, max(values) / draws * 1e6
        print(f"{name:32}{draws / median[name]:12.0f}{median[name] / draws * 1e6:12.2f}{f'{low:.1f}..{high:.1f}':>18}")
    plain = min(value for name, value in median.items() if name.startswith("plain"))
    total = sum(value for name, value in median.items() if name.startswith("part"))
    print(f"ours / best plain loop:           {plain / median['ours']:.2f}  (target 3)")
    print(f"ours / (1 / sum of the parts):    {total / median['ours']:.2f}  (target .85)")
    print(f"ours / bare forward:              {median['bare forward'] / median['ours']:.2f}")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(smoothed, x, 10 * draws)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory: {before / 1024:.0f} MiB after n={draws}, {after / 1024:.0f} MiB after n={10 * draws}")


if __name__ == "__main__":
    main()
