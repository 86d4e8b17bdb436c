"""Networks from torchvision."""

import torch
from torch import Tensor, nn
from torchvision import models

from gsmooth_lightning.errors import RequestError


class Normalize(nn.Module):
    """(x - mean) / std per channel, as the network's first layer: noise and radii stay in the units of [0, 1]."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std  # type: ignore[operator]


class GreyToRGB(nn.Module):
    """Repeats one channel three times."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


def torchvision_model(name: str, channels: int, classes: int) -> nn.Module:
    """Any torchvision classifier by name, untrained, behind the ImageNet normalisation; grey images are repeated.

    Raises:
        RequestError: no such model, or neither 1 nor 3 channels.
    """
    if name not in models.list_models(module=models):
        raise RequestError(f"torchvision has no classifier {name!r}; see torchvision.models.list_models()")
    if channels not in (1, 3):
        raise RequestError(f"torchvision's networks take 1 or 3 channels, not {channels}")
    grey = [GreyToRGB()] if channels == 1 else []
    network = models.get_model(name, weights=None, num_classes=classes)
    return nn.Sequential(*grey, Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), network)
