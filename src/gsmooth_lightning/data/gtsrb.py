"""The German Traffic Sign Recognition Benchmark through torchvision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.transforms import v2

from gsmooth_lightning.data.base import Files, ImageData, Inputs, read_image
from gsmooth_lightning.errors import RequestError

HELD_OUT = 5


class GTSRB(ImageData):
    """43 classes of traffic signs (Stallkamp et al. 2012), resized to size x size; 15x15 to 250x250 in their files.

    The training file shows each sign in a track of 30 frames (file names TRACK_FRAME.ppm). So validation takes whole
    tracks: one in five of each class.

    Args:
        root: folder that holds `gtsrb/GTSRB/Training`, `gtsrb/GTSRB/Final_Test` and `gtsrb/GT-final_test.csv`.
        size: side of the images in pixels; None: images keep the size they have in their files.
        download: let torchvision fetch them. Off by default.
    """

    def __init__(self, root: str, size: int | None = 32, download: bool = False):
        self.root, self.size, self.download = root, size, download

    def split(self, name: str, classes: int) -> Inputs:
        top = Path(self.root) / "gtsrb"
        try:
            listed = datasets.GTSRB(self.root, "test" if name == "test" else "train", download=self.download)
        except (RuntimeError, OSError, KeyError, TypeError, ValueError) as failure:
            raise RequestError(
                f"{top} does not hold GTSRB/Training, GTSRB/Final_Test and GT-final_test.csv ({failure}); unpack "
                "the data set there, set data.dataset.root to the folder above, or set data.dataset.download=true"
            ) from failure
        files = [(str(Path(path).relative_to(top)), label) for path, label in listed._samples]
        if name != "test":
            files = [(path, _label(path)) for path, _ in files if (_track(path) % HELD_OUT == 0) == (name == "val")]
        return Files(files, top, classes, read_image, self.shape)

    @property
    def shape(self) -> Callable[[Any], Any]:
        return v2.Identity() if self.size is None else v2.Resize([self.size, self.size])

    def describe(self) -> str:
        size = "of their natural size" if self.size is None else f"resized to {self.size}x{self.size}"
        return f"GTSRB, {size}; one track in {HELD_OUT} of the training file validates"


def _label(path: str) -> int:
    """The number that a training folder is named after; torchvision counts the folders that are there."""
    folder = Path(path).parent.name
    if not folder.isdecimal():
        raise RequestError(f"{path} does not lie in a folder named like 00014; use the training images as published")
    return int(folder)


def _track(path: str) -> int:
    stem = Path(path).stem
    if not stem.partition("_")[0].isdecimal() or "_" not in stem:
        raise RequestError(f"{path} is not named TRACK_FRAME; use the training images as published")
    return int(stem.split("_")[0])
