"""scikit-learn's digits: 1,797 scans of handwritten digits, 8x8 pixels, shipped with the package."""

import torch
from sklearn.datasets import load_digits

from gsmooth_lightning.data.base import ImageData, Inputs, TensorImages

BOUNDS = {"train": (0, 1297), "val": (1297, 1397), "test": (1397, 1797)}


class Digits(ImageData):
    """Pixels are k/16. The file is not shuffled, and neighbours look like one writer's: so the splits are its first
    1,297, next 100 and last 400 images, in order.

    Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (UCI).
    """

    def split(self, name: str, classes: int) -> Inputs:
        images, labels = load_digits(return_X_y=True)
        part = slice(*BOUNDS[name])
        pixels = torch.from_numpy(images[part]).to(torch.uint8).view(-1, 1, 8, 8)
        return TensorImages(pixels, torch.from_numpy(labels[part]), classes, levels=16)

    def describe(self) -> str:
        return "scikit-learn's digits, 8x8; the first 1,297 train, the next 100 validate, the last 400 test"
