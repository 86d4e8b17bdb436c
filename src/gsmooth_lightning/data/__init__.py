"""Data sets: images in [0, 1] with labels, from local files."""

from gsmooth_lightning.data.base import ImageData, TensorImages, subset
from gsmooth_lightning.data.digits import Digits
from gsmooth_lightning.data.mnist import MNIST, FashionMNIST

__all__ = ["MNIST", "Digits", "FashionMNIST", "ImageData", "TensorImages", "subset"]
