"""The interface of a data set."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset, Subset

from gsmooth_lightning.errors import RequestError

SPLITS = ("train", "val", "test")


class TensorImages(Dataset):
    """Images that fit into memory, stored as whole steps 0..levels; items are (image in [0, 1], label, index).

    Batches are cut with one indexing operation (`__getitems__`).

    Raises:
        RequestError: labels outside 0..classes-1, or as many labels as images are missing.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, levels: int = 255):
        if len(images) != len(labels):
            raise RequestError(f"there are {len(images)} images but {len(labels)} labels; repair the data files")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise RequestError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but data.classes={classes} allows "
                f"0 to {classes - 1}"
            )
        self.images, self.labels, self.levels = images, labels.long(), levels  # images: (n, c, h, w)

    @property
    def content_hash(self) -> str:
        """SHA-256 of pixels and labels, shortened: what a result says about its data."""
        content = hashlib.sha256(self.images.numpy().tobytes())
        content.update(self.labels.numpy().tobytes())
        return content.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self.images[i].float() / self.levels, int(self.labels[i]), i

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor, int]]:
        images = self.images[indices].float() / self.levels
        return list(zip(images, self.labels[indices], indices, strict=True))


class ImageData(ABC):
    """A data set with the splits train, val and test. Certificates are made on test; val chooses; nothing overlaps."""

    name: str

    @abstractmethod
    def split(self, name: str, classes: int) -> Dataset:
        """One of the splits; items are (image in [0, 1], label, index)."""


def subset(data: Dataset, first: int | None = None, every: int = 1, indices: Sequence[int] | None = None) -> Subset:
    """A deterministic subset: every `every`-th item, at most `first` of them; or the listed indices.

    Raises:
        RequestError: indices that do not exist, or an empty selection.
    """
    total = len(data)  # type: ignore[arg-type]
    if isinstance(indices, str):
        raise RequestError(f"images.indices must be a list such as [0,5,7], got {indices!r}")
    if every < 1 or (first is not None and first < 1):
        raise RequestError(f"images.every and images.first must be at least 1, got every={every}, first={first}")
    chosen = list(indices) if indices is not None else list(range(0, total, every))[:first]
    wrong = [i for i in chosen if not isinstance(i, int) or not 0 <= i < total]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise RequestError(f"images.indices must name images from 0 to {total - 1}, each once, got {wrong or chosen}")
    return Subset(data, chosen)


def describe_subset(first: int | None, every: int, indices: Sequence[int] | None, split: str) -> str:
    """How a subset is stated in tables."""
    if indices is not None:
        return f"{len(indices)} listed images of {split}"
    part = "all" if every == 1 else f"one in {every}"
    return f"{part} of {split}" + ("" if first is None else f", the first {first}")
