"""How sampling scales: with the network, processes, early stopping, memory, n, images and parameters.

    python benchmarks/scaling.py [networks] [processes] [stopping] [memory] [cost] [--rounds 5]

Without names, all five. Each prints one table of one run. Networks see noisy input; the plain loop is the published one
of Cohen et al. 2019 (core.py, `_sample_noise`) with the plain network, at the better of two batch sizes. On a GPU the
same with its networks in bfloat16 as well.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gsmooth_lightning.certify import FixedN, JointCertifier
from gsmooth_lightning.certify.store import read
from gsmooth_lightning.data import Digits
from gsmooth_lightning.error import ImageBound
from gsmooth_lightning.model import SmallCNN, cifar_resnet, fused, torchvision_model
from gsmooth_lightning.preprocess import DiscVignette, LowPass, Preprocess
from gsmooth_lightning.rounds import run_rounds, workers
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Rotation, Similarity, Transform, Translation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SIGMA = 0.25
UNIT = ([0.0] * 3, [1.0] * 3)
"""Mean and standard deviation of a normalisation that does nothing."""
STORES = Path(__file__).resolve().parent.parent / "results"

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "small CNN": (SmallCNN, (1, 28, 28), 64, 12_800),
    "ResNet-20": (lambda: cifar_resnet(20, 3, 10, *UNIT), (3, 32, 32), 64, 2_560),
    "ResNet-110": (lambda: cifar_resnet(110, 3, 10, *UNIT), (3, 32, 32), 64, 640),
    "ResNet-50": (lambda: torchvision_model("resnet50", 3, 1000, *UNIT), (3, 224, 224), 16, 64),
}
"""name -> network, input, block on the CPU, draws on the CPU; a GPU takes blocks of 512 and 20 times the draws."""


def classifier(name: str, dtype: torch.dtype = torch.float32) -> tuple[SmoothedClassifier, nn.Module, Tensor, str, int]:
    """The smoothed classifier, its plain network, an input, the backend and the draws."""
    make, shape, block, draws = NETWORKS[name]
    if ON_GPU:
        block, draws = 512, 20 * draws // 512 * 512
    torch.manual_seed(0)
    network = make().eval().to(DEVICE)
    x = torch.rand(shape, device=DEVICE)
    fast, backend = fused(network, torch.rand(block, *shape, device=DEVICE), dtype=dtype)
    classes = int(network(x[None]).shape[1])
    return SmoothedClassifier(fast, classes, noise=Gaussian(SIGMA), block=block).to(DEVICE), network, x, backend, draws


@torch.inference_mode()
def plain_loop(network: nn.Module, x: Tensor, draws: int, batch: int, classes: int) -> np.ndarray:
    counts = np.zeros(classes, dtype=int)
    remaining = draws
    while remaining > 0:
        size = min(batch, remaining)
        remaining -= size
        images = x.repeat((size, 1, 1, 1))
        for label in network(images + torch.randn_like(images) * SIGMA).argmax(1).cpu().numpy():
            counts[label] += 1
    return counts


def ours(smoothed: SmoothedClassifier, x: Tensor, draws: int) -> None:
    next(run_rounds([(0, smoothed.sample(x, Stream(0, 0), "estimate", 0, draws))], DEVICE))


def forward(smoothed: SmoothedClassifier, x: Tensor, draws: int) -> None:
    """The optimised network alone, on noisy blocks, over the same workers."""
    noisy = x + SIGMA * torch.randn(smoothed.block, *x.shape, device=DEVICE)

    @torch.inference_mode()
    def one() -> Tensor:
        return smoothed.base(noisy)

    with workers(DEVICE) as run:
        run([one] * (draws // smoothed.block))
    if ON_GPU:
        torch.cuda.synchronize()


def medians(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each case, in turn, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def networks(rounds: int) -> pd.DataFrame:
    dtypes = (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,)
    return pd.DataFrame([throughput(name, dtype, rounds) for name in NETWORKS for dtype in dtypes])


def throughput(name: str, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    smoothed, network, x, backend, draws = classifier(name, dtype)
    batches = (400, 1000) if ON_GPU else (smoothed.block, 4 * smoothed.block)
    cases: dict[str, Callable[[], object]] = {
        f"plain {batch}": lambda b=batch: plain_loop(network, x, draws, b, smoothed.classes) for batch in batches
    }
    cases |= {"forward": lambda: forward(smoothed, x, draws), "ours": lambda: ours(smoothed, x, draws)}
    took = medians(cases, rounds)
    plain = min(seconds for case, seconds in took.items() if case.startswith("plain"))
    return {
        "network": name,
        "dtype, backend, block": f"{str(dtype).removeprefix('torch.')}, {backend}, {smoothed.block}",
        "ours, samples/s": draws / took["ours"],
        "bare forward": draws / took["forward"],
        "plain loop": draws / plain,
        "ours / forward": took["forward"] / took["ours"],
        "ours / plain loop": plain / took["ours"],
    }


def alone(seconds: float, begin: float) -> int:
    """Draws that one process with one thread takes in some seconds from a common moment on."""
    torch.set_num_threads(1)
    smoothed, _, x, _, _ = classifier("small CNN")
    ours(smoothed, x, 1280)
    time.sleep(max(0.0, begin - time.time()))
    start, taken = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        ours(smoothed, x, 1280)
        taken += 1280
    return taken


def processes(rounds: int) -> pd.DataFrame:
    rows, lasting = [], 5.0
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for turn in range(rounds):
            speeds = {}
            for count in (1, 2):
                begin = time.time() + (60 if not turn else 5)
                speeds[count] = sum(f.result() for f in [pool.submit(alone, lasting, begin) for _ in range(count)])
            rows.append({f"{count} process(es), samples/s": n / lasting for count, n in speeds.items()})
            rows[-1]["ratio"] = speeds[2] / speeds[1]
    frame = pd.DataFrame(rows, index=[f"{turn}" for turn in range(1, rounds + 1)])
    return pd.concat([frame, frame.median().to_frame("median").T]).reset_index(names="round")


def stopping(rounds: int) -> pd.DataFrame:
    """Draws that sequential runs took beside what they need: blocks are whole, and tests look at certain n."""
    rows = []
    for folder in sorted((STORES / "objectives").glob("*-0.5")):
        records = read(folder)
        used = sum(sum(r["selection"]) + r["n"] for r in records)
        spent = sum(r["evaluations"] for r in records)
        rows.append(
            {
                "store": f"objectives/{folder.name}",
                "images": len(records),
                "evaluations": spent,
                "of n = 10,000 for each": spent / (len(records) * 10_100),
                "never counted (padding)": spent / used - 1,
            }
        )
    return pd.DataFrame(rows)


def peak(block: int, size: int, n: int) -> float:
    """MiB at most of a process that samples, beyond what it has before the first draw."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    smoothed = SmoothedClassifier(network.eval(), 10, noise=Gaussian(SIGMA), block=block).to(DEVICE)
    x = torch.rand(3, size, size, device=DEVICE)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        ours(smoothed, x, n)
        return torch.cuda.max_memory_allocated() / 2**20
    ours(smoothed, torch.rand(3, 8, 8), block)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    ours(smoothed, x, n)
    return resident("VmHWM") - before


def resident(what: str) -> float:
    """MiB that this process holds, or held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def memory(rounds: int) -> pd.DataFrame:
    cases = [(64, 64, 1_280), (64, 64, 12_800), (64, 64, 128_000), (128, 64, 1_280), (256, 64, 1_280)]
    cases += [(64, 128, 1_280), (64, 256, 1_280)]
    rows = []
    for block, size, n in cases:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a peak is of one process
            mib = pool.submit(peak, block, size, n).result()
        inputs = block * 3 * size**2 * 4 / 2**20
        rows.append({"n": n, "block": block, "size": size, "MiB": mib, "a block of inputs, MiB": inputs})
    return pd.DataFrame(rows)


def cost(rounds: int) -> pd.DataFrame:
    """Seconds of joint certificates, error bound included, against images, n and the transformation's parameters."""
    digits = Digits().split("test", 10)
    preprocess = Preprocess([DiscVignette(), LowPass(5)])
    torch.manual_seed(0)
    network = SmallCNN().eval().to(DEVICE)
    fast, _ = fused(network, torch.rand(64, 1, 28, 28, device=DEVICE))

    def certify(transform: Transform, images: int, n: int) -> Callable[[], object]:
        low, high, law = [-5.0] * transform.dim, [5.0] * transform.dim, [5.0] * transform.dim
        if isinstance(transform, Similarity):
            low, high, law = [-5.0, -0.05, -1.0, -1.0], [5.0, 0.05, 1.0, 1.0], [5.0, 0.05, 1.0, 1.0]
        threat = TransformationThreat(transform, low, high, size=28)
        smoothed = SmoothedClassifier(fast, 10, transform, preprocess, Gaussian(law), Gaussian(SIGMA)).to(DEVICE)
        certifier = JointCertifier(FixedN(100, n, 0.001), ImageBound(draws=256, choose=64, points=3, search="grid"))
        some = [(i, digits[i][0].to(DEVICE)) for i in range(images)]
        return lambda: list(certifier.certify(smoothed, threat, some))

    cases = {(1, images, n): certify(Rotation(), images, n) for images, n in ((2, 2000), (4, 2000), (8, 2000))}
    cases |= {(1, 2, n): certify(Rotation(), 2, n) for n in (4000, 8000)}
    cases |= {(t.dim, 2, 2000): certify(t, 2, 2000) for t in (Translation(), Similarity())}
    took = medians(cases, rounds)  # type: ignore[arg-type]
    names = ("parameters", "images", "n")
    return pd.DataFrame([dict(zip(names, case, strict=True)) | {"seconds": s} for case, s in took.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tables = {f.__name__: f for f in (networks, processes, stopping, memory, cost)}
    parser.add_argument("tables", nargs="*", choices=[[], *tables], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} cores"
    print(f"{where}, torch {torch.__version__}, medians of {options.rounds} rounds")
    for name in options.tables or tables:
        print(f"\n{name}\n{tables[name](options.rounds).to_markdown(index=False, floatfmt='.3g')}", flush=True)


if __name__ == "__main__":
    main()
