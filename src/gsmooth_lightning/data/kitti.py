"""KITTI's object frames through torchvision, as a classification task."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.transforms import v2

from gsmooth_lightning.data.base import Files, ImageData, Inputs, read_image
from gsmooth_lightning.errors import RequestError

CLASSES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")


class Kitti(ImageData):
    """Frames of a car's left colour camera (Geiger et al. 2012); the label is the most frequent kind of object.

    Ties go to the kind named first in `CLASSES`; regions marked DontCare do not count, and frames without any object
    are left out. Only the training frames have labels: sorted by name, the first in each `fold` tests, the second
    validates and the others train; fold=1 leaves a test split only.

    Args:
        root: folder that holds `Kitti/raw/training` with `image_2` and `label_2`.
        size: height and width after resizing.
        fold: see above.
        download: let torchvision fetch them. Off by default.
    """

    def __init__(self, root: str, size: Sequence[int] = (375, 1242), fold: int = 5, download: bool = False):
        if fold < 1:
            raise RequestError(f"data.dataset.fold must be at least 1, got {fold}")
        self.root, self.size, self.fold, self.download = root, list(size), fold, download

    def split(self, name: str, classes: int) -> Inputs:
        top = Path(self.root) / "Kitti" / "raw" / "training"
        try:
            listed = datasets.Kitti(self.root, train=True, download=self.download)
        except (RuntimeError, OSError) as failure:
            raise RequestError(
                f"{top} does not hold image_2 and label_2 ({failure}); unpack the data set there, set "
                "data.dataset.root to the folder above Kitti, or set data.dataset.download=true"
            ) from failure
        labels = {}
        for i, path in enumerate(listed.images):
            try:
                labels[path] = self._label(listed._parse_target(i))
            except (OSError, IndexError, ValueError) as failure:
                what = "is missing" if isinstance(failure, FileNotFoundError) else f"is damaged ({failure})"
                raise RequestError(f"{listed.targets[i]} {what}; unpack the data set again") from failure
        frames = sorted((str(Path(p).relative_to(top)), label) for p, label in labels.items() if label is not None)
        files = [frame for k, frame in enumerate(frames) if _split(k % self.fold) == name]
        return Files(files, top, classes, read_image, self.shape)

    @property
    def names(self) -> Sequence[str]:
        return CLASSES

    @property
    def shape(self) -> Callable[[Any], Any]:
        return v2.Resize(self.size)

    @staticmethod
    def _label(objects: list[dict]) -> int | None:
        counts = Counter(o["type"] for o in objects if o["type"] != "DontCare")
        unknown = set(counts) - set(CLASSES)
        if unknown:
            raise ValueError(f"unknown object {min(unknown)!r}")
        return max(range(len(CLASSES)), key=lambda k: counts[CLASSES[k]]) if counts else None

    def describe(self) -> str:
        height, width = self.size
        return (
            f"KITTI's labelled frames resized to {height}x{width}, label: the most frequent object; in order, of each "
            f"{self.fold} frames the first tests, the second validates and the others train"
        )


def _split(place: int) -> str:
    return {0: "test", 1: "val"}.get(place, "train")
