"""Networks that take noise off an image, to stand in front of a classifier of clean ones."""

from collections.abc import Sequence

from torch import Tensor, nn

from gsmooth_lightning.errors import check_whole
from gsmooth_lightning.model.unet import unet


class Residual(nn.Module):
    """x less what the layers take for noise: (n, c, h, w) -> (n, c, h, w)."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return x - self.layers(x)


def dncnn(channels: int = 1, depth: int = 17, width: int = 64) -> Residual:
    """DnCNN (Zhang et al. 2017): `depth` convolutions of 3 x 3, ReLU between them and batch normalisation inside.

    Args:
        channels: of the image.
        depth: convolutions, at least 3.
        width: channels between them.

    Raises:
        RequestError: fewer, or no channels.
    """
    check_whole("denoiser", channels=(channels, 1), depth=(depth, 3), width=(width, 1))
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return Residual(nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1)))


def unet_denoiser(channels: int = 1, widths: Sequence[int] = (32, 64)) -> Residual:
    """The U-Net of `unet`, for images whose sides are multiples of 2^(len(widths) - 1).

    Raises:
        RequestError: no channels, or widths that `unet` refuses.
    """
    check_whole("denoiser", channels=(channels, 1))
    return Residual(unet(channels, channels, widths, option="denoiser.widths"))
