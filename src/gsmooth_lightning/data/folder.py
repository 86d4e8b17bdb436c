"""Any folder of images, ImageNet and Restricted ImageNet, through torchvision's ImageFolder."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.transforms import v2

from gsmooth_lightning.data.base import SPLITS, Files, ImageData, Inputs, read_image
from gsmooth_lightning.errors import RequestError

RESTRICTED = {
    "dog": (151, 268),
    "cat": (281, 285),
    "frog": (30, 32),
    "turtle": (33, 37),
    "bird": (80, 100),
    "primate": (365, 382),
    "fish": (389, 397),
    "crab": (118, 121),
    "insect": (300, 319),
}
"""Super-classes of Restricted ImageNet as ranges of ImageNet's classes, ends included (Tsipras et al. 2019)."""


class ImageFolder(ImageData):
    """Images in one folder a class: `root/train/CLASS/*`, `root/val/CLASS/*`, `root/test/CLASS/*`.

    Without a folder `val`, one training image in `validation` validates. Without a folder `test` and `train`, all the
    classes of `root` are the test split.

    Args:
        root: the folder.
        size: side of the images after a centre crop; None: no crop.
        resize: length of the shorter side before the crop; by default `size`. With None for both, images keep the size
            they have in their files.
        validation: see above.
        test: name of the folder of test images.
    """

    def __init__(
        self, root: str, size: int | None, resize: int | None = None, validation: int = 10, test: str = "test"
    ):
        for name, pixels in (("data.size", size), ("data.dataset.resize", resize)):
            if pixels is not None and (not isinstance(pixels, int) or pixels < 1):
                raise RequestError(f"{name} must be a positive number of pixels or null, got {pixels!r}")
        self.root, self.size, self.resize = Path(root), size, size if resize is None else resize
        if self.size is not None and self.resize is not None and self.resize < self.size:
            raise RequestError(f"data.dataset.resize={self.resize} must not be below the crop of data.size={size}")
        if not isinstance(validation, int) or validation < 2:
            raise RequestError(f"data.dataset.validation must be a whole number, at least 2, got {validation!r}")
        self.validation, self.test = validation, test

    def split(self, name: str, classes: int) -> Inputs:
        folder, part = self._place(name)
        try:
            listed = datasets.ImageFolder(folder)
        except (FileNotFoundError, OSError) as failure:
            raise RequestError(
                f"{folder} is not a folder with one folder of images for each class ({failure}); set data.dataset.root"
            ) from failure
        files = [
            (str(Path(path).relative_to(folder)), label)
            for path, label in zip(
                (path for path, _ in listed.samples),
                self.labels([listed.classes[k] for _, k in listed.samples], listed.classes),
                strict=True,
            )
            if label is not None
        ]
        if part is not None:
            files = [file for i, file in enumerate(files) if (i % self.validation == 0) == (part == "val")]
        return Files(files, folder, classes, read_image, self.shape)

    @property
    def shape(self) -> Callable[[Any], Any]:
        steps = [v2.Identity() if self.resize is None else v2.Resize(self.resize)]
        if self.size is not None:
            steps.append(v2.CenterCrop(self.size))
        return v2.Compose(steps)

    def _place(self, name: str) -> tuple[Path, str | None]:
        """Folder of a split, and which part of it ("train" or "val") where two splits share the folder."""
        train, own = self.root / "train", self.root / "val"
        if name == "test":
            folder = self.root / self.test
            flat = not any((self.root / split).is_dir() for split in SPLITS)
            return (self.root if flat else folder), None
        if not train.is_dir():
            raise RequestError(
                f"{train} is missing, so {self.root} has a test split only; put training images there, or use "
                "images.split=test with a network trained elsewhere"
            )
        if own.is_dir() and self.test != "val":
            return (train if name == "train" else own), None
        return train, name

    def labels(self, folders: Sequence[str], classes: Sequence[str]) -> list[int | None]:
        """The label of each image from its folder's name; None leaves it out. Here: the folders' alphabetical order."""
        train = self.root / "train"
        known = sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else classes
        number = {folder: k for k, folder in enumerate(known)}
        unknown = [folder for folder in classes if folder not in number]
        if unknown:
            raise RequestError(
                f"{self.root / self.test} or {self.root / 'val'} holds {unknown[0]!r}, which is no class of {train}; "
                "name the folders alike"
            )
        return [number[folder] for folder in folders]

    def describe(self) -> str:
        resized = "of their natural size" if self.resize is None else f"shorter side resized to {self.resize}"
        cropped = "" if self.size is None else f", then the centre {self.size}x{self.size}"
        return (
            f"{type(self).__name__}: folders of classes, {resized}{cropped}; without a validation folder one training "
            f"image in {self.validation} validates"
        )


class ImageNet(ImageFolder):
    """ILSVRC 2012 in folders: `root/train/n01440764/*.JPEG`, and `root/val` likewise as the test split.

    Labels are ImageNet's 1,000 classes even where a folder holds some of them only.
    """

    def __init__(self, root: str, size: int | None = 224, resize: int | None = 256, validation: int = 50):
        super().__init__(root, size, resize, validation, test="val")

    @property
    def names(self) -> Sequence[str]:
        return list(imagenet_classes())

    def labels(self, folders: Sequence[str], classes: Sequence[str]) -> list[int | None]:
        number = imagenet_classes()
        unknown = [folder for folder in classes if folder not in number]
        if unknown:
            raise RequestError(
                f"{self.root} holds {unknown[0]!r}, which is no class of ImageNet; name folders like n01440764, or use "
                "data=folder"
            )
        return [number[folder] for folder in folders]


class RestrictedImageNet(ImageNet):
    """The nine super-classes of Tsipras et al. 2019, each a range of ImageNet's classes; other images are left out."""

    @property
    def names(self) -> Sequence[str]:
        return list(RESTRICTED)

    def labels(self, folders: Sequence[str], classes: Sequence[str]) -> list[int | None]:
        ranges = list(RESTRICTED.values())
        group = {k: g for g, (low, high) in enumerate(ranges) for k in range(low, high + 1)}
        return [group.get(k) for k in super().labels(folders, classes)]  # type: ignore[arg-type]


@lru_cache
def imagenet_classes() -> dict[str, int]:
    """WordNet identifier -> class number of ImageNet-1k, as timm lists them."""
    from timm.data import ImageNetInfo  # two seconds that only ImageNet should pay

    return {name: k for k, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
