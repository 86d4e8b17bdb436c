"""MNIST and Fashion-MNIST through torchvision, from idx files on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torchvision import datasets

from gsmooth_lightning.data.base import ImageData, Inputs, TensorImages, held_out
from gsmooth_lightning.errors import RequestError

VALIDATION = 5000
"""The last images of the training file are the validation split."""


class MNIST(ImageData):
    """60,000 / 10,000 grey images of 28x28 (LeCun et al. 1998).

    Args:
        root: folder that holds `MNIST/raw` with the four unpacked idx files.
        download: let torchvision fetch them. Off by default.
    """

    source: ClassVar[type[datasets.MNIST]] = datasets.MNIST

    def __init__(self, root: str, download: bool = False):
        self.root, self.download = root, download

    @property
    def names(self) -> Sequence[str]:
        return self.source.classes

    def split(self, name: str, classes: int) -> Inputs:
        folder = Path(self.root) / self.source.__name__ / "raw"
        try:
            files = self.source(self.root, train=name != "test", download=self.download)
        except Exception as failure:  # torchvision raises what its reader happens to stumble over
            missing = "Dataset not found" in str(failure) or isinstance(failure, FileNotFoundError)
            what = "does not hold the idx files" if missing else f"holds a damaged idx file ({failure})"
            raise RequestError(
                f"{folder} {what}; put the four unpacked {self.source.__name__} files there, set data.dataset.root to "
                "the folder above, or set data.dataset.download=true"
            ) from failure
        data = TensorImages(files.data.unsqueeze(1), files.targets, classes)
        return data if name == "test" else held_out(data, name, VALIDATION, classes)

    def describe(self) -> str:
        return f"{self.source.__name__}, 28x28; the last {VALIDATION:,} images of the training file validate"


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al. 2017): the same layout, photographs of clothes."""

    source = datasets.FashionMNIST
