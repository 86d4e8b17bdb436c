"""Any `ImageData` as a LightningDataModule."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, default_collate
from torch.utils.data.distributed import DistributedSampler

from gsmooth_lightning.data import Files, ImageData, Inputs, subset
from gsmooth_lightning.errors import RequestError

MOST_WORKERS = 8


class ImageDataModule(pl.LightningDataModule):
    """Train, val and predict loaders; items are (input, label, index).

    Predict visits a deterministic subset of one split, without the images that are done already; in a batch of images
    of different sizes they come as a list. Training and validation refuse different sizes. Of several processes each
    visits its share (`todo`), in training every world-th input.

    Args:
        dataset: where images come from.
        classes: number of classes; labels outside are refused.
        batch_size: of training and validation.
        augment: random function of a raw training input (see `data.Inputs.augmented`), or None.
        workers: loader processes; None: none for data in memory, one a core (8 at most) for data in files.
        split, first, every, indices: what predict visits (see `data.subset`); indices count within the split.
        in_flight: images in one predict batch.
        seed: of the order of training inputs, their augmentation and all training draws.
    """

    def __init__(
        self,
        dataset: ImageData,
        classes: int,
        batch_size: int = 128,
        augment: Callable[[Any], Any] | None = None,
        workers: int | None = None,
        split: str = "test",
        first: int | None = None,
        every: int = 1,
        indices: Sequence[int] | None = None,
        in_flight: int = 8,
        seed: int = 0,
    ):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # there may be fewer images than processes
        if batch_size < 1 or in_flight < 1:
            raise RequestError(f"batch_size and in_flight must be at least 1, got {batch_size} and {in_flight}")
        self.dataset, self.classes, self.batch_size = dataset, classes, batch_size
        self.augment, self.workers = augment, workers
        self.split_name, self.first, self.every, self.indices = split, first, every, indices
        self.in_flight, self.seed = in_flight, seed
        self.done: Collection[int] = ()
        self.rank, self.world = 0, 1
        self._splits: dict[str, Inputs] = {}

    def split(self, name: str) -> Inputs:
        """A split, read once."""
        if name not in self._splits:
            self._splits[name] = self.dataset.split(name, self.classes)
        return self._splits[name]

    @property
    def visited(self) -> Subset:
        """The images that predict visits in the end, done or not."""
        return subset(self.split(self.split_name), self.first, self.every, self.indices)

    @property
    def todo(self) -> list[int]:
        """This process' share of the images that are not done: every `world`-th from number `rank` on."""
        return [i for i in self.visited.indices if i not in self.done][self.rank :: self.world]

    def image(self, i: int) -> Tensor:
        """Input i of the visited split."""
        return self.split(self.split_name)[i][0]

    def _workers(self, source: Inputs) -> int:
        return self.workers if self.workers is not None else (_cores() if isinstance(source, Files) else 0)

    def train_dataloader(self) -> DataLoader:
        source = self.split("train")
        data = source if self.augment is None else Augmented(source, self.augment)

        def seed() -> tuple[int, ...]:
            return (self.seed, self.trainer.global_step if self.trainer is not None else 0)

        return SeededLoader(data, seed, self.batch_size, self._workers(source), self.rank, self.world)

    def val_dataloader(self) -> DataLoader:
        data = self.split("val")
        return Loader(data, batch_size=self.batch_size, num_workers=self._workers(data), collate_fn=of_one_size)

    def predict_dataloader(self) -> DataLoader:
        if self.trainer is not None and self.trainer.world_size > 1:
            agreed = [self.done]  # a process of an earlier start may have finished an image since the first one looked
            dist.broadcast_object_list(agreed)
            (self.done,) = agreed
        workers = self._workers(self.split(self.split_name))
        data = Subset(self.visited.dataset, self.todo)
        return Loader(data, batch_size=self.in_flight, num_workers=workers, collate_fn=of_any_size)


Item = tuple[Tensor, int, int]


def of_any_size(items: list[Item]) -> list[Any]:
    """A batch [inputs, labels, indices]; inputs of different shapes are a list."""
    inputs, labels, indices = zip(*items, strict=True)
    if len({x.shape for x in inputs}) == 1:
        return default_collate(items)
    return [list(inputs), default_collate(list(labels)), default_collate(list(indices))]


def of_one_size(items: list[Item]) -> list[Any]:
    """A batch [inputs, labels, indices].

    Raises:
        RequestError: inputs of different shapes.
    """
    if len(shapes := {tuple(x.shape) for x, _, _ in items}) > 1:
        raise RequestError(
            f"inputs of different shapes, such as {' and '.join(map(str, sorted(shapes)[:2]))}, make no batch to train "
            "on; set data.dataset.size, or shape them in data.augment"
        )
    return default_collate(items)


def until_failure(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches; when one fails, or nobody wants more, the loader's processes end at once. (Left to the garbage collector
    they hold the command up for seconds, and their queues print tracebacks.)"""
    try:
        yield from batches
    finally:
        stop = getattr(batches, "_shutdown_workers", None)
        if stop is not None:
            stop()


class Loader(DataLoader):
    """A loader that ends its processes when reading fails."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return until_failure(super().__iter__())


class SeededLoader(Loader):
    """Shuffled batches; every pass starts by seeding torch, so that a training resumed at an epoch's end goes on as if
    it had never stopped. (A hook at the epoch's start comes too late: Lightning fetches a resumed epoch's first batch
    before. And workers live for one pass: those that persist would keep their generators' state.)

    Of several processes each reads every world-th input of one order.

    Args:
        data: the training inputs.
        seed: () -> the words of the next pass's seed, the same for all processes.
        batch_size, workers: inputs in a batch of one process; processes that read them.
        rank, world: of this process, and how many there are.
    """

    def __init__(
        self,
        data: Dataset,
        seed: Callable[[], tuple[int, ...]],
        batch_size: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ):
        share = DistributedSampler(data, world, rank) if world > 1 else RandomSampler(data)  # type: ignore[arg-type]
        super().__init__(data, batch_size=batch_size, sampler=share, num_workers=workers, collate_fn=of_one_size)
        self.seed, self.rank = seed, rank

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        words = self.seed()
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(_state(words) % 2**32)
        torch.manual_seed(_state((*words, self.rank)))
        return super().__iter__()


def _state(words: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


class Augmented(Dataset):
    """A split with a random function on every raw input."""

    def __init__(self, source: Inputs, augment: Callable[[Any], Any]):
        self.source, self.augment = source, augment

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self.source.augmented(i, self.augment)


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)
