"""Per-image work under `Trainer.predict`: certify, bound, attack. Each finished image goes to the store at once."""

import contextlib
import os
import signal
import subprocess
import threading
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gsmooth_lightning.attack import Attack
from gsmooth_lightning.certify import Certifier
from gsmooth_lightning.certify.store import Record, Store
from gsmooth_lightning.error import Bound, CalibratedBound, ErrorBound
from gsmooth_lightning.rounds import Job, Run, run_rounds, workers
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream, content_digest
from gsmooth_lightning.threat import Threat

Items = list[tuple[int, int, Tensor]]


class StoredPrediction(pl.LightningModule):
    """Work on single images that ends in one record each, on one process or many.

    Processes share out the images; with `share_draws` all work on every image, and share out the jobs of each round.
    A process that is told to end (SIGTERM) finishes the images in flight first.

    Args:
        smoothed, threat: the classifier and what is done to it.
        store: where records go.
        seed: of all draws.

    Attributes:
        watch: told each record that is stored.
        pulse: called before each round.
    """

    started: ClassVar[set[subprocess.Popen]] = set()  # that this process has started, for whichever run
    share_draws = False
    preempted = False

    def __init__(self, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int):
        super().__init__()
        self.smoothed, self.threat, self.store, self.seed = smoothed, threat, store, seed
        self.parent = os.getppid()
        self.watch: Callable[[Record], None] = lambda record: None
        self.pulse: Callable[[], None] = lambda: None
        self.smoothed.eval()

    @abstractmethod
    def records(self, items: Items) -> Iterable[Record]:
        """Records of some clean images, given as (index, label, prepared image), each as soon as it is finished."""

    def predict_step(self, batch: tuple[Iterable[Tensor], Tensor, Tensor], batch_idx: int) -> None:
        """Works on one batch; images of different shapes are a list."""
        if self.stopping():
            raise StopIteration  # Lightning ends its loop
        with torch.autocast(self.device.type, enabled=False):  # bounds are of images as float32 computes them
            items = [(int(i), int(y), self.threat.prepare(x[None])[0]) for x, y, i in zip(*batch, strict=True)]
            known = {index: {"label": label, "input": content_digest(x)} for index, label, x in items}
            for record in self.records(items):
                if not self.share_draws or self.global_rank == 0:
                    whole = {"index": record["index"], **known[record["index"]], **record}
                    self.store.append(whole)
                    self.watch(whole)

    def configure_optimizers(self) -> None:
        """Nothing is trained."""

    # -------------------------------------------------- one of many processes

    @property
    def world(self) -> int:
        return self.trainer.world_size

    @contextlib.contextmanager
    def workers(self, device: torch.device) -> Iterator[Run]:
        """What runs the jobs of a round (see `rounds`)."""
        with workers(device) as run:

            def beating(jobs: list[Job]) -> list[Any]:
                self.pulse()
                if self.share_draws and self.world > 1:
                    return shared_out(jobs, run, self.global_rank, self.world, device)
                return run(jobs)

            yield beating

    def setup(self, stage: str) -> None:
        """Only the first of a command's trainers starts processes."""
        self.started.update(getattr(self.trainer.strategy.launcher, "procs", ()))

    def on_predict_start(self) -> None:
        """Lightning's own handler of SIGTERM waits for all processes, and leaves the rest to a training loop."""
        self._handle()

    def _handle(self) -> Any:
        if threading.current_thread() is threading.main_thread():
            by_submitit = "SUBMITIT_EXECUTOR" in os.environ  # it queues a job again by a signal of its own
            return signal.signal(signal.SIGTERM, signal.SIG_IGN if by_submitit else self._preempt)
        return None

    @contextlib.contextmanager
    def preemptible(self) -> Iterator[None]:
        """Within, SIGTERM lets this process finish the images in flight, and those that it has started."""
        before = self._handle()
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    def _preempt(self, *_: Any) -> None:
        self.preempted = True
        for child in self.started:
            child.send_signal(signal.SIGTERM)

    def stopping(self) -> bool:
        """Whether no further images are to be begun: this process was told to end, or the first one, which started it,
        is gone. Processes that share out draws stop at the same batch."""
        self.preempted |= self.global_rank > 0 and os.getppid() != self.parent
        if self.share_draws and self.world > 1:
            flag = torch.tensor(int(self.preempted), device=self.device)
            dist.all_reduce(flag)
            self.preempted = bool(flag)
        return self.preempted


def shared_out(jobs: list[Job], run: Run, rank: int, world: int, device: torch.device) -> list[Any]:
    """Results of jobs of which each process runs every world-th; all processes get all results."""
    own = tree_map_only(Tensor, Tensor.cpu, run(jobs[rank::world]))
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, own)
    results: list[Any] = [None] * len(jobs)
    for place, part in enumerate(parts):
        results[place::world] = part
    return tree_map_only(Tensor, lambda result: result.to(device), results)


class CertificationModule(StoredPrediction):
    """Certifies images. See `Certifier.certify` for what a record holds; `base` is the base classifier's class."""

    def __init__(self, certifier: Certifier, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int = 0):
        super().__init__(smoothed, threat, store, seed)
        self.certifier = certifier

    def records(self, items: Items) -> Iterator[Record]:
        images = [(index, x) for index, _, x in items]
        base = self.base_classes(images)
        found = self.certifier.certify(self.smoothed, self.threat, images, self.seed, len(items), self.workers)
        for index, certificate in found:
            yield {"index": index, "base": base[index], **asdict(certificate)}

    def base_classes(self, images: list[tuple[int, Tensor]]) -> dict[int, int]:
        """The base classifier's class of each image, images of one shape together."""
        shapes: dict[torch.Size, dict[int, Tensor]] = defaultdict(dict)
        for index, x in images:
            shapes[x.shape][index] = x
        found: dict[int, int] = {}
        for alike in shapes.values():
            classes = self.smoothed.classify_base(torch.stack(list(alike.values())))
            found |= dict(zip(alike, classes.tolist(), strict=True))
        return found


class BoundModule(StoredPrediction):
    """Bounds the interpolation error of images, or measures the defects of a bound's calibration images."""

    def __init__(self, error: ErrorBound, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int = 0):
        super().__init__(smoothed, threat, store, seed)
        self.error = error
        self._threat = error.check(smoothed, threat)

    def records(self, items: Items) -> Iterator[Record]:
        error = self.error
        work: Callable[..., Any] = error.measure if isinstance(error, CalibratedBound) else error.procedure
        procedures = ((i, work(self.smoothed, self._threat, x, Stream(self.seed, i))) for i, _, x in items)
        for index, found, seconds in run_rounds(procedures, self.device, len(items), self.workers):
            content = asdict(found) if isinstance(found, Bound) else {"norms": rounded_up(found).tolist()}
            yield {"index": index, **content, "seconds": seconds}


def rounded_up(norms: np.ndarray) -> np.ndarray:
    """To five decimals, which a store keeps."""
    return np.ceil(norms * 1e5) / 1e5


class AttackModule(StoredPrediction):
    """Attacks images. See `attack.Attacked` for what a record holds."""

    def __init__(self, attack: Attack, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int = 0):
        super().__init__(smoothed, threat, store, seed)
        self.attack = attack

    def records(self, items: Items) -> Iterator[Record]:
        procedures = ((i, self.attack(self.smoothed, self.threat, x, y, Stream(self.seed, i))) for i, y, x in items)
        for index, attacked, seconds in run_rounds(procedures, self.device, len(items), self.workers):
            yield {"index": index, **asdict(attacked), "seconds": seconds}
