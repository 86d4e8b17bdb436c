"""The whole path at full size: `gsmooth bound`, `attack`, `certify` on ImageNet and KITTI files, with time and memory.

    python benchmarks/full_size.py DATA > results/benchmarks/full_size.md

DATA holds `imagenet-sample` (folders of classes) and `Kitti/raw/training`. The networks are not trained (these files
are too few): the numbers say what a run costs, not how robust a network is.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from hydra import compose, initialize_config_module
from tqdm import tqdm

from gsmooth_lightning.tasks.setup import seeded_network

IMAGES = 5
COMMON = (
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "logger=none",
    "backend=fx",
    f"images.first={IMAGES}",
    "error.draws=64",
    "error.choose=32",
    "error.points=3",
    "sampling.n0=32",
    "sampling.n=64",
    "attack.k=4",
    "attack.n=32",
    "block=32",
)
SETS = {
    "ImageNet, ResNet-50, 224x224": (
        "experiment=fischer_imagenet",
        "data.dataset.root={data}/imagenet-sample",
        "data.enlarge=256",
        "data.dataset.size=256",
        "data.dataset.resize=256",
        "images.every=1",
    ),
    "KITTI, ResNet-18, 375x1242": (
        "data=kitti",
        "data.dataset.root={data}",
        "data.dataset.fold=1",
        "model=torchvision",
        "model.name=resnet18",
        "preprocess.steps.1.bandwidth=50",
        "threat.low=-10",
        "threat.high=10",
    ),
}


def measured(command: str, overrides: tuple[str, ...], store: Path) -> tuple[float, float, list[dict]]:
    """Wall seconds, peak memory in GB and the records of one command in a process of its own."""
    line = [sys.executable, "-m", f"gsmooth_lightning.tasks.{command}", *overrides, f"store={store}"]
    start = time.perf_counter()
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(line)} failed")
    seconds = time.perf_counter() - start
    records = [json.loads(record) for record in (store / "records.jsonl").read_text().splitlines()]
    return seconds, usage.ru_maxrss / 2**20, records


def main(data: str) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in tqdm(SETS.items()):
            overrides = (*COMMON, *(option.format(data=data) for option in options))
            with initialize_config_module("gsmooth_lightning.conf", version_base="1.3"):
                network = seeded_network(compose("certify", list(overrides)))
            checkpoint = Path(folder) / f"{len(rows)}.pt"
            torch.save(network.state_dict(), checkpoint)
            for command in ("bound", "attack", "certify"):
                store = Path(folder) / f"{len(rows)}-{command}"
                seconds, memory, records = measured(command, (*overrides, f"checkpoint={checkpoint}"), store)
                rows.append(
                    {
                        "data and network": name,
                        "command": command,
                        "images": len(records),
                        "evaluations an image": records[0].get("evaluations", ""),
                        "seconds an image": sum(r["seconds"] for r in records) / len(records),
                        "seconds in all": seconds,
                        "peak memory, GB": memory,
                    }
                )
    print(f"`python benchmarks/full_size.py {data}`, torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    print()
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    main(sys.argv[1])
