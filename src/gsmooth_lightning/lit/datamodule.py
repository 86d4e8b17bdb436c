"""Any `ImageData` as a LightningDataModule."""

from collections.abc import Collection, Sequence

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gsmooth_lightning.data import ImageData, subset
from gsmooth_lightning.errors import RequestError


class ImageDataModule(pl.LightningDataModule):
    """Train, val and predict loaders; items are (image in [0, 1], label, index).

    Predict visits a deterministic subset of one split, without the images that are done already.

    Args:
        dataset: where images come from.
        classes: number of classes; labels outside are refused.
        batch_size: of training and validation.
        workers: loader processes; 0 is fastest for data sets in memory.
        split, first, every, indices: what predict visits (see `data.subset`); indices count within the split.
        in_flight: images in one predict batch.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        dataset: ImageData,
        classes: int,
        batch_size: int = 128,
        workers: int = 0,
        split: str = "test",
        first: int | None = None,
        every: int = 1,
        indices: Sequence[int] | None = None,
        in_flight: int = 8,
    ):
        super().__init__()
        if batch_size < 1 or in_flight < 1:
            raise RequestError(f"batch_size and in_flight must be at least 1, got {batch_size} and {in_flight}")
        self.dataset, self.classes, self.batch_size, self.workers = dataset, classes, batch_size, workers
        self.split_name, self.first, self.every, self.indices = split, first, every, indices
        self.in_flight = in_flight
        self.done: Collection[int] = ()
        self._splits: dict[str, Dataset] = {}

    def split(self, name: str) -> Dataset:
        """A split, read once."""
        if name not in self._splits:
            self._splits[name] = self.dataset.split(name, self.classes)
        return self._splits[name]

    @property
    def visited(self) -> Subset:
        """The images that predict visits in the end, done or not."""
        return subset(self.split(self.split_name), self.first, self.every, self.indices)

    def images_by_index(self) -> dict[int, Tensor]:
        """The visited images, (c, h, w), as the data set has them."""
        visited = self.visited
        return {visited.indices[k]: visited[k][0] for k in range(len(visited))}

    def _loader(self, data: Dataset, size: int, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            data, batch_size=size, shuffle=shuffle, num_workers=self.workers, persistent_workers=self.workers > 0
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.split("train"), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.split("val"), self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        visited = self.visited
        todo = [i for i in visited.indices if i not in self.done]
        return self._loader(Subset(visited.dataset, todo), self.in_flight)
