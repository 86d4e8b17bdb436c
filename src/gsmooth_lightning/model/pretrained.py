"""Normalisation, and networks by name from torchvision and timm."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision import models

from gsmooth_lightning.errors import RequestError


class Normalize(nn.Module):
    """(x - mean) / std per channel, as the network's first layer: noise and radii stay in the units of the input."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise RequestError(f"mean and std need one value a channel and std must be positive, got {mean} and {std}")
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std  # type: ignore[operator]


class GreyToRGB(nn.Module):
    """Repeats one channel three times."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


def normalized(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """The network behind `Normalize`."""
    return nn.Sequential(Normalize(mean, std), network)


def torchvision_model(
    name: str, channels: int, classes: int, mean: Sequence[float], std: Sequence[float]
) -> nn.Sequential:
    """Any torchvision classifier by name, untrained, behind the normalisation; grey images are repeated.

    Raises:
        RequestError: no such model, or neither 1 nor 3 channels.
    """
    if name not in models.list_models(module=models):
        raise RequestError(f"torchvision has no classifier {name!r}; see torchvision.models.list_models()")
    if channels not in (1, 3):
        raise RequestError(f"torchvision's networks take 1 or 3 channels, not {channels}")
    single = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}  # one output, in training too
    network = models.get_model(name, weights=None, num_classes=classes, **single)
    return normalized(network if channels == 3 else nn.Sequential(GreyToRGB(), network), mean, std)


def timm_model(name: str, channels: int, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """Any timm classifier by name, untrained, behind the normalisation.

    Raises:
        RequestError: no such model.
    """
    import timm  # two seconds that only its networks should pay

    network = None
    with contextlib.suppress(RuntimeError, ValueError):  # "Unknown model", or a name with a foreign prefix
        network = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes)
    if network is None:
        raise RequestError(f"timm has no model {name!r}; see timm.list_models('*part of a name*')")
    return normalized(network, mean, std)
