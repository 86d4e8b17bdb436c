"""The interface of a data set, and the two ways of holding one: in memory, or file by file."""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2 import functional

from gsmooth_lightning.errors import RequestError

READ = 2**31
"""Bytes of files that are read to tell one state of a data set from another."""

SPLITS = ("train", "val", "test")


class Inputs(Dataset):
    """Inputs with labels; items are (input, label, index). Images lie in [0, 1], waveforms in [-1, 1]."""

    content_hash: str
    """What a result says about its data: 16 hexadecimal digits, and what they cover where that is not everything."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> tuple[Tensor, int, int]: ...

    @abstractmethod
    def augmented(self, i: int, augment: Callable[[Any], Any]) -> tuple[Tensor, int, int]:
        """An item whose raw input went through a random function (see the subclass for what raw means)."""


class TensorImages(Inputs):
    """Images that fit into memory, stored as whole steps 0..levels. Augmentation sees them as bytes, (c, h, w).

    Batches are cut with one indexing operation (`__getitems__`).

    Raises:
        RequestError: labels outside 0..classes-1, as many labels as images are missing, or (when it is augmented) an
            augmentation that fails.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, levels: int = 255):
        if len(images) != len(labels):
            raise RequestError(f"there are {len(images)} images but {len(labels)} labels; repair the data files")
        check_labels(labels.tolist(), classes)
        self.images, self.labels, self.levels = images, labels.long(), levels  # images: (n, c, h, w)

    @property
    def content_hash(self) -> str:  # type: ignore[override]
        """SHA-256 of pixels and labels, shortened."""
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

    def augmented(self, i: int, augment: Callable[[Any], Any]) -> tuple[Tensor, int, int]:
        image = changed(self.images[i], augment, "data.augment", f"training image {i}")
        steps = image if isinstance(image, Tensor) else functional.pil_to_tensor(image)
        return steps.float() / self.levels, int(self.labels[i]), i


class Files(Inputs):
    """Inputs read from their files one by one, whenever they are asked for.

    Args:
        files: (path below `root`, label).
        root: folder of all files.
        classes: labels must be below.
        read: path -> raw input: a PIL image, or a waveform as a tensor.
        shape: raw input -> one of the data set's size. Augmentation takes the place of it and sees the raw input.

    Raises:
        RequestError: no files, labels outside 0..classes-1, or (when it is read) a file that is missing or damaged, or
            that shape or augmentation fail on.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        root: str | Path,
        classes: int,
        read: Callable[[str], Any],
        shape: Callable[[Any], Any],
    ):
        if not files:
            raise RequestError(f"{root} holds no files for this split; check data.dataset.root")
        check_labels([label for _, label in files], classes)
        self.files, self.root, self.read, self.shape = list(files), Path(root), read, shape

    @property
    def content_hash(self) -> str:  # type: ignore[override]
        """SHA-256 of names, labels and bytes of all files, shortened; beyond `READ` bytes of their sizes instead."""
        content, sizes = hashlib.sha256(), []
        for name, label in self.files:
            path = self.root / name
            if not path.is_file():
                raise RequestError(f"{path} is missing; restore it, or unpack the data set again")
            sizes.append(path.stat().st_size)
            content.update(f"{name} {label} {sizes[-1]}\n".encode())
        if sum(sizes) > READ:
            return f"{content.hexdigest()[:16]} (names, labels and sizes)"
        for name, _ in self.files:
            with open(self.root / name, "rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest())
        return content.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self._item(i, self.shape, "the size in data.dataset")

    def augmented(self, i: int, augment: Callable[[Any], Any]) -> tuple[Tensor, int, int]:
        return self._item(i, augment, "data.augment")

    def _item(self, i: int, change: Callable[[Any], Any], option: str) -> tuple[Tensor, int, int]:
        name, label = self.files[i]
        path = self.root / name
        try:
            read = self.read(str(path))
        except (OSError, SyntaxError, ValueError, RuntimeError, EOFError, Image.DecompressionBombError) as failure:
            what = "is missing" if not path.exists() else f"cannot be read ({first_line(failure)})"
            raise RequestError(f"{path} {what}; restore it, or unpack the data set again") from failure
        raw = changed(read, change, option, path)
        return raw if isinstance(raw, Tensor) else functional.pil_to_tensor(raw).float() / 255, label, i


def read_image(path: str) -> Image.Image:
    """An image in colour.

    Raises:
        ValueError: its pixels have more than 8 bits, which PIL would cut without a word.
    """
    with open(path, "rb") as file:
        image = Image.open(file)
        if image.mode.startswith(("I", "F")) or any(";16" in str(tile) for tile in image.tile):
            raise ValueError("its pixels have more than 8 bits: save it with 8")
        return image.convert("RGB")


class ImageData(ABC):
    """A data set with the splits train, val and test. Certificates are made on test; val chooses; nothing overlaps."""

    @abstractmethod
    def split(self, name: str, classes: int) -> Inputs:
        """One of the splits."""

    @property
    def names(self) -> Sequence[str] | None:
        """Of the classes, in order of the labels, where the data set knows them without its files."""
        return None

    @property
    def shape(self) -> Callable[[Any], Any] | None:
        """How it brings images of any size to its own; None where it does not."""
        return None

    def describe(self) -> str:
        """Where its inputs come from, how they are resized and how they are split, for tables."""
        return type(self).__name__


def changed(raw: Any, change: Callable[[Any], Any], option: str, name: str | Path) -> Any:
    """A raw input after a function of it, an image or a tensor.

    Args:
        raw: the input.
        change: the function.
        option, name: what sets it, and what the input is called: for the message.

    Raises:
        RequestError: it fails, or returns something else.
    """
    try:
        made = change(raw)
        if not isinstance(made, Tensor | Image.Image):
            raise TypeError(f"it returns {type(made).__name__}, not an image or a tensor")
    except (TypeError, ValueError, RuntimeError) as failure:
        raise RequestError(f"{option} fails on {name} ({first_line(failure)}); correct its options") from failure
    return made


def first_line(failure: BaseException) -> str:
    """What went wrong, in one line."""
    return (str(failure) or type(failure).__name__).splitlines()[0]


def check_labels(labels: Sequence[int], classes: int) -> None:
    """Refuses labels outside 0..classes-1."""
    if len(labels) and not 0 <= min(labels) <= max(labels) < classes:
        raise RequestError(
            f"labels run from {min(labels)} to {max(labels)}, but data.classes={classes} allows 0 to {classes - 1}"
        )


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


def describe_subset(
    first: int | None, every: int, indices: Sequence[int] | None, split: str, found: Iterable[int] = ()
) -> str:
    """How a subset is stated in tables; of the images `found` in a store those that an earlier selection added count
    as others."""
    chosen = range(0, sys.maxsize, every)[:first] if indices is None else indices
    others = sum(index not in chosen for index in found)
    beside = f", and {others} of an earlier selection" if others else ""
    if indices is not None:
        return f"{len(indices)} listed images of {split}{beside}"
    part = "all" if every == 1 else f"one in {every}"
    return f"{part} of {split}" + ("" if first is None else f", the first {first}") + beside


def held_out(data: TensorImages, name: str, count: int, classes: int) -> TensorImages:
    """The training file's last `count` images as split "val", the others as "train".

    Raises:
        RequestError: the file holds no more than `count` images.
    """
    if len(data) <= count:
        raise RequestError(
            f"the training files hold {len(data)} images, and the last {count} of them validate: none is left to train "
            "on; unpack the whole data set"
        )
    part = slice(-count, None) if name == "val" else slice(0, -count)
    return TensorImages(data.images[part], data.labels[part], classes, data.levels)


def bytes_of(pixels: Any) -> Tensor:
    """(n, h, w, c) bytes as torchvision keeps them -> (n, c, h, w)."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).contiguous()
