"""Images per second that the loader delivers from a folder, by the number of its processes, and what they cost.

    python benchmarks/loading.py [--root data/imagenet-sample] [--size 224] [--resize 256] [--images 1000] [--rounds 3]

The folder holds one folder of images a class. Everything is measured in one run, in turn, `rounds` times; medians are
printed. A round starts its loader's processes anew, as a pass of a training does. CPU cores kept busy are process times
of this process and its loader's, divided by wall time; images per CPU second hardly depend on what else runs.
"""

import argparse
import os
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

from gsmooth_lightning.data import ImageFolder, Inputs
from gsmooth_lightning.lit import ImageDataModule

WORKERS = (0, 1, 2)


@dataclass(frozen=True)
class Round:
    """One pass: images a second, and cores kept busy by this process and by the loader's processes."""

    rate: float
    main: float
    children: float


def cpu_seconds(who: int) -> float:
    """User and system time; of children, those that have ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def peak_memory() -> float:
    """Of this process since the last call, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak
    return peak


def measure(loader: DataLoader) -> Round:
    """One pass through a loader whose processes end with it."""
    before = [cpu_seconds(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    start, count = time.perf_counter(), 0
    for images, _, _ in loader:
        count += len(images)
    seconds = time.perf_counter() - start
    after = [cpu_seconds(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    main, children = ((b - a) / seconds for a, b in zip(before, after, strict=True))
    return Round(count / seconds, main, children)


def loader_of(module: ImageDataModule, data: Inputs, images: int) -> DataLoader:
    """A loader with the options of the module's prediction loader, over `images` images: the folder again and again."""
    given = module.predict_dataloader()
    repeated = Subset(data, [i % len(data) for i in range(images)])
    return DataLoader(repeated, batch_size=given.batch_size, num_workers=given.num_workers)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--root", default="data/imagenet-sample", help="folder of folders of images")
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--resize", type=int, default=256)
    options.add_argument("--images", type=int, default=1000, help="images in a round")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()

    source = ImageFolder(given.root, given.size, given.resize)
    classes = sum(entry.is_dir() for entry in os.scandir(given.root))
    data = source.split("test", classes)
    peak_memory()
    listed = peak_memory()
    for i in range(min(given.batch, len(data))):  # the decoder's own start
        data[i]
    rounds: dict[int, list[Round]] = {workers: [] for workers in WORKERS}
    peak: dict[int, float] = {}
    for _ in range(given.rounds):
        for workers in WORKERS:
            module = ImageDataModule(source, classes, in_flight=given.batch, workers=workers)
            peak_memory()
            rounds[workers].append(measure(loader_of(module, data, given.images)))
            peak[workers] = max(peak.get(workers, 0.0), peak_memory())

    cores = len(os.sched_getaffinity(0))
    print(
        f"{len(data)} files in {given.root}, shorter side {given.resize}, centre {given.size}x{given.size}, batches of "
        f"{given.batch}; medians of {given.rounds} rounds of {given.images} images; {cores} cores, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads; {listed:.0f} MiB resident when the folder is listed\n"
    )
    print("| workers | images/s | min..max | images/CPU s | cores: main | cores: workers | peak memory, main |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for workers, measured in rounds.items():
        rates = [r.rate for r in measured]
        main_busy = statistics.median(r.main for r in measured)
        busy = statistics.median(r.children for r in measured)
        print(
            f"| {workers} | {statistics.median(rates):.0f} | {min(rates):.0f}..{max(rates):.0f} | "
            f"{statistics.median(r.rate / (r.main + r.children) for r in measured):.0f} | {main_busy:.2f} | "
            f"{busy:.2f} | {peak[workers]:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
