"""CIFAR-10 and CIFAR-100 through torchvision, and CIFAR-10-C."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torchvision import datasets

from gsmooth_lightning.data.base import ImageData, Inputs, TensorImages, bytes_of, held_out
from gsmooth_lightning.errors import RequestError

VALIDATION = 5000
"""The last images of the training batches are the validation split."""

SEVERITIES = 5


class CIFAR10(ImageData):
    """50,000 / 10,000 colour images of 32x32 (Krizhevsky 2009).

    Args:
        root: folder that holds `cifar-10-batches-py` with the batches as published (their MD5s are checked).
        download: let torchvision fetch them. Off by default.
    """

    source: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10

    def __init__(self, root: str, download: bool = False):
        self.root, self.download = root, download

    def split(self, name: str, classes: int) -> Inputs:
        try:
            files = self.source(self.root, train=name != "test", download=self.download)
        except Exception as failure:  # torchvision raises what its reader happens to stumble over
            raise RequestError(
                f"{Path(self.root) / self.source.base_folder} does not hold the batches, or a batch is damaged "
                f"({str(failure).splitlines()[0]}); unpack the python version there, set data.dataset.root to the "
                "folder above, or set data.dataset.download=true"
            ) from failure
        data = TensorImages(bytes_of(files.data), torch.tensor(files.targets), classes)
        return data if name == "test" else held_out(data, name, VALIDATION, classes)

    def describe(self) -> str:
        return f"{self.source.__name__}, 32x32; the last {VALIDATION:,} images of the training batches validate"


class CIFAR100(CIFAR10):
    """CIFAR-100 with its 100 fine labels: `cifar-100-python`."""

    source = datasets.CIFAR100


def read_corruption(
    folder: Path, name: str, options: tuple[str, str] = ("data.dataset.root", "data.dataset.corruption")
) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, labels) of NAME.npy in a CIFAR-10-C folder: (5 n, 32, 32, 3) bytes, mapped from the file, and (5 n,);
    severity s is rows (s - 1) n to s n.

    Args:
        options: what the user sets to name the folder and the corruption.

    Raises:
        RequestError: a file that is missing, damaged, or of another shape.
    """
    file = folder / "labels.npy"
    try:
        labels = np.load(file)
        file = folder / f"{name}.npy"
        pixels = np.load(file, mmap_mode="r")
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 32, 32, 3) or len(labels) % SEVERITIES:
            shape = "x".join(map(str, pixels.shape[1:]))
            raise ValueError(
                f"{len(pixels)} images, {len(labels)} labels, {SEVERITIES} severities, {shape} {pixels.dtype}"
            )
    except FileNotFoundError as failure:
        known = sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels")
        raise RequestError(
            f"{failure.filename} is missing; unpack CIFAR-10-C and correct {options[0]}, or choose {options[1]} from "
            f"{', '.join(known) or 'its files'}"
        ) from failure
    except (OSError, ValueError, EOFError, TypeError) as failure:
        raise RequestError(f"{file} is damaged ({failure}); unpack CIFAR-10-C again") from failure
    return pixels, labels


class CIFAR10C(ImageData):
    """CIFAR-10-C (Hendrycks & Dietterich 2019): the test images of CIFAR-10 under one corruption. A test split only.

    Args:
        root: folder that holds `CIFAR-10-C` with `labels.npy` and one array of 50,000 images a corruption.
        corruption: name of the array's file, e.g. "gaussian_blur".
        severity: 1 to 5.
    """

    def __init__(self, root: str, corruption: str, severity: int):
        if not isinstance(severity, int) or not 1 <= severity <= SEVERITIES:
            raise RequestError(f"data.dataset.severity must be 1 to {SEVERITIES}, got {severity!r}")
        self.root, self.corruption, self.severity = root, corruption, severity

    def split(self, name: str, classes: int) -> Inputs:
        if name != "test":
            raise RequestError("CIFAR-10-C has a test split only; train on data=cifar10 and use images.split=test")
        pixels, labels = read_corruption(Path(self.root) / "CIFAR-10-C", self.corruption)
        size = len(labels) // SEVERITIES
        part = slice((self.severity - 1) * size, self.severity * size)
        return TensorImages(bytes_of(np.array(pixels[part])), torch.tensor(labels[part]), classes)

    def describe(self) -> str:
        return f"CIFAR-10-C, 32x32, corruption {self.corruption} at severity {self.severity}"
