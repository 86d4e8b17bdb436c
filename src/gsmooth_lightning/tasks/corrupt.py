"""`gsmooth corrupt`: accuracy of the base and the smoothed classifier under the common corruptions."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from gsmooth_lightning.attack.evaluation import judge
from gsmooth_lightning.certify.store import Record, Store
from gsmooth_lightning.confidence import proportion_interval
from gsmooth_lightning.data import CIFAR10
from gsmooth_lightning.data.base import bytes_of
from gsmooth_lightning.data.cifar import SEVERITIES, read_corruption
from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.lit.certification import Items, StoredPrediction
from gsmooth_lightning.model import file_hash
from gsmooth_lightning.report.tables import markdown, text
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.tasks.launch import command, first_process
from gsmooth_lightning.tasks.run import Run
from gsmooth_lightning.tasks.setup import images_in_words, plain, prepare, run_folder
from gsmooth_lightning.threat import Threat
from gsmooth_lightning.transform.corruptions import corruption

CLEAN = "clean"

PUBLISHED = {
    "zoom_blur": {"TSS": 75.2, "GSmooth": 77.1},
    "defocus_blur": {"TSS": 75.6, "GSmooth": 76.8},
    "pixelate": {"TSS": 76.0, "GSmooth": 76.7},
    "brightness": {"TSS": 71.8, "GSmooth": 72.1},
    "motion_blur": {"TSS": 70.2, "GSmooth": 70.5},
    "gaussian_blur": {"AugMix": 67.4, "TSS": 75.8, "GSmooth": 75.2},
}
"""GSmooth's Table 4, accuracy in % on subsets of CIFAR-10-C, which it does not name; AugMix where it is legible."""


@dataclass(frozen=True)
class Cases:
    """An image clean and under each corruption at each severity: case 0, 1, ...

    Attributes:
        listed: (corruption, severity) of each case.
        pixels: corruption -> the bytes of its file (see `read_corruption`); empty: our transformations make them.
        threat: how images are prepared and saved.
    """

    listed: list[tuple[str, int]]
    pixels: dict[str, np.ndarray]
    threat: Threat

    def files(self, x: Tensor, stream: Stream, cases: Tensor) -> Tensor:
        """The files of some cases, (k, c, h, w), of a prepared image (c, h, w)."""
        return torch.stack([self._file(x, stream, case) for case in cases.tolist()])

    def _file(self, x: Tensor, stream: Stream, case: int) -> Tensor:
        name, severity = self.listed[case]
        if name == CLEAN:
            return x
        if self.pixels:
            row = (severity - 1) * len(self.pixels[name]) // SEVERITIES + stream.image
            return self.threat.prepare(bytes_of(self.pixels[name][[row]]).float().to(x.device) / 255)[0]
        made = corruption(name, severity, min(x.shape[-2:]))
        return self.threat.save(made(x, stream.at("select", case, x.device)))


class CorruptionModule(StoredPrediction):
    """Judges each image in each case, by n votes.

    A record lists `corruption`, `severity`, the `base` classifier's class and the smoothed one's `votes`, (k, classes).
    """

    def __init__(self, run: Run, store: Store, cases: Cases):
        super().__init__(run.smoothed, run.threat, store, run.cfg.seed)
        self.cases, self.n = cases, run.cfg.n

    def records(self, items: Items) -> Iterator[Record]:
        every = torch.arange(len(self.cases.listed))
        streams = [(index, x, Stream(self.seed, index)) for index, _, x in items]
        procedures = (
            (index, judge(self.smoothed, partial(self.cases.files, x, stream), every, stream, self.n))
            for index, x, stream in streams
        )
        names, severities = map(list, zip(*self.cases.listed, strict=True))
        for index, (base, votes), seconds in run_rounds(procedures, self.device, len(items), self.workers):
            judged = {"corruption": names, "severity": severities, "base": base, "votes": votes.tolist()}
            yield {"index": index, **judged, "seconds": seconds}


def corrupt(cfg: DictConfig) -> Path:
    """Judges every visited image and reports; returns the store's folder."""
    check(cfg)
    run = prepare(cfg, "corrupt", ("corruptions", "severities", "n"))
    listed = [(CLEAN, 0), *itertools.product(cfg.corruptions, cfg.severities)]
    cases = Cases(listed, read_files(run), run.threat)
    run.identity["files"] = {name: file_hash(Path(cfg.folder) / f"{name}.npy") for name in cases.pixels}
    run.folder = run_folder(cfg, "corrupt", run.identity)
    image, _, index = run.data.visited[0]
    x = run.threat.prepare(image[None])[0]
    cases.files(x, Stream(cfg.seed, index), torch.arange(len(listed)))  # refuses wrong names before any work
    with run.store() as store:
        records = run.predict(CorruptionModule(run, store, cases))
    if first_process():
        show(run, records)
    return run.folder


def check(cfg: DictConfig) -> None:
    """Refuses lists and numbers that are none; the folder, or `corruption`, knows which names there are."""
    for name, known in (("corruptions", str), ("severities", int)):
        values = plain(cfg[name])
        if not isinstance(values, list) or not values or not all(type(v) is known for v in values):
            raise RequestError(f"{name} must be a list such as [{'pixelate' if known is str else 5}], got {values}")
        if len(set(values)) < len(values):
            raise RequestError(f"{name} must list each once, got {values}")
    if not all(1 <= severity <= SEVERITIES for severity in cfg.severities):
        raise RequestError(f"severities must be whole numbers from 1 to {SEVERITIES}, got {plain(cfg.severities)}")
    check_whole("", n=(cfg.n, 1))


def read_files(run: Run) -> dict[str, np.ndarray]:
    """The files of each corruption in a CIFAR-10-C folder, if there is one.

    Raises:
        RequestError: a missing or damaged file, or files of other images than are visited.
    """
    cfg, visited = run.cfg, run.data.visited
    if cfg.folder is None:
        return {}
    pixels = {}
    for name in cfg.corruptions:
        pixels[name], theirs = read_corruption(Path(cfg.folder), name, ("folder", "corruptions"))
    whole = theirs.reshape(SEVERITIES, -1)
    alike = cfg.images.split == "test" and whole.shape[1] == len(run.data.split("test"))
    alike = alike and visited[0][0].shape == (3, 32, 32)
    if not alike or (whole[:, visited.indices] != [visited[i][1] for i in range(len(visited))]).any():
        raise RequestError(
            f"the files in {cfg.folder} are not of the images that are visited; use data=cifar10 and images.split=test"
        )
    return pixels


def columns(records: Sequence[Record], published: bool) -> dict[str, dict[str, str]]:
    """The table: a row for each corruption and classifier; the mean over severities, each severity, GSmooth's Table 4.

    All records have the same cases.
    """
    labels = np.array([record["label"] for record in records])[:, None]
    right = {
        "base": np.array([record["base"] for record in records]) == labels,
        "smoothed": np.array([record["votes"] for record in records]).argmax(-1) == labels,
    }
    names, severities = np.array(records[0]["corruption"]), np.array(records[0]["severity"])
    table: dict[str, dict[str, str]] = defaultdict(dict)
    for name, (classifier, hits) in itertools.product(dict.fromkeys(names.tolist()), right.items()):
        row, own = f"{name}, {classifier}", names == name
        table["mean"][row] = f"{hits[:, own].mean():.1%}"
        if name != CLEAN:
            for severity in severities[own]:
                table[f"severity {severity}"][row] = f"{hits[:, own & (severities == severity)].mean():.1%}"
            for system, percent in PUBLISHED.get(name, {}).items() if published and classifier == "smoothed" else ():
                table[f"{system} (published)"][row] = f"{percent}%"
    return table


def show(run: Run, records: Sequence[Record]) -> None:
    """Writes report.md into the store and prints the table."""
    cfg, n = run.cfg, len(records)
    published = type(run.data.dataset) is CIFAR10
    low, high = proportion_interval((n + 1) // 2, n)
    facts = {
        "images": f"{n} ({images_in_words(cfg, records)})",
        "data": run.identity["source"],
        "corruptions": f"files of {cfg.folder}" if cfg.folder else f"our transformations, {run.threat.file()}",
        "smoothed": f"the class with most of {cfg.n} votes",
        "intervals": f"95 % over images: at most +-{(high - low) / 2:.1%} around an entry of one severity",
    }
    if published:
        facts["published"] = "GSmooth, Table 4; it names neither its severities nor its images"
    table = columns(records, published)
    try:
        (run.folder / "report.md").write_text(markdown({"corrupt": facts}) + "\n\n" + markdown(table) + "\n")
    except OSError as failure:
        raise RequestError(f"cannot write to {run.folder} ({failure.strerror}); free space and run again") from failure
    print(text({"corrupt": facts}), text(table), f"written: {run.folder / 'report.md'}", sep="\n\n")


def main() -> None:
    command("corrupt", corrupt)


if __name__ == "__main__":
    main()
