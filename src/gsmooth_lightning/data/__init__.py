"""Data sets: images in [0, 1] or waveforms in [-1, 1] with labels, from local files."""

from gsmooth_lightning.data.base import Files, ImageData, Inputs, TensorImages, subset
from gsmooth_lightning.data.cifar import CIFAR10, CIFAR10C, CIFAR100
from gsmooth_lightning.data.digits import Digits
from gsmooth_lightning.data.folder import ImageFolder, ImageNet, RestrictedImageNet
from gsmooth_lightning.data.gtsrb import GTSRB
from gsmooth_lightning.data.kitti import Kitti
from gsmooth_lightning.data.mnist import MNIST, FashionMNIST
from gsmooth_lightning.data.speech_commands import SpeechCommands, TimeShift

__all__ = [
    "CIFAR10",
    "CIFAR10C",
    "CIFAR100",
    "GTSRB",
    "MNIST",
    "Digits",
    "FashionMNIST",
    "Files",
    "ImageData",
    "ImageFolder",
    "ImageNet",
    "Inputs",
    "Kitti",
    "RestrictedImageNet",
    "SpeechCommands",
    "TensorImages",
    "TimeShift",
    "subset",
]
