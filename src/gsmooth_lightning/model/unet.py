"""A U-Net, such as the one that imitates a transformation (GSmooth's H)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError


class Skip(nn.Sequential):
    """x and what the layers make of it, side by side in the channels: (n, c, h, w) -> (n, c + c', h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


def unet(
    inputs: int, outputs: int, widths: Sequence[int], groups: int = 4, option: str = "network.widths"
) -> nn.Sequential:
    """A U-Net (Ronneberger et al. 2015) with GroupNorm, average pooling and SiLU: (n, inputs, h, w) -> (n, outputs, h,
    w), h and w multiples of 2^(len(widths) - 1).

    Args:
        widths: channels on each level, from the finest to the coarsest; multiples of `groups`.
        groups: of each normalisation.
        option: its name, for the message.

    Raises:
        RequestError: no levels, or widths that are no such multiples.
    """
    if not widths or any(width % groups for width in widths):
        raise RequestError(f"{option} must hold the channels of each level, multiples of {groups}, got {list(widths)}")
    first, *rest = widths
    layers = _twice(inputs, first, groups)
    if rest:
        layers += [Skip(nn.AvgPool2d(2), unet(first, first, rest, groups), nn.Upsample(scale_factor=2))]
    return nn.Sequential(*layers, *_twice(2 * first if rest else first, first, groups), nn.Conv2d(first, outputs, 1))


def _twice(inputs: int, outputs: int, groups: int) -> list[nn.Module]:
    """Two layers of convolution, normalisation and SiLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.GroupNorm(groups, outputs), nn.SiLU()]
    return layers
