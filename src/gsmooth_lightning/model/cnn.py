"""Small convolutional networks for small images."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor, nn

from gsmooth_lightning.errors import check_whole
from gsmooth_lightning.model.fourier import fourier_basis


class SmallCNN(nn.Module):
    """Two or more stages of convolution, batch normalisation, ReLU and 2x2 max pooling, then two linear layers.

    Args:
        channels, size: of the image, size x size pixels or [height, width].
        classes: outputs.
        widths: channels of each stage.
        hidden: width of the hidden linear layer.
        standardize: bring each image to mean 0 and variance 1 first: brightness and contrast then change nothing.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int | Sequence[int] = 28,
        classes: int = 10,
        widths: Sequence[int] = (16, 32),
        hidden: int = 64,
        standardize: bool = False,
    ):
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        stages: list[nn.Module] = [nn.InstanceNorm2d(channels)] if standardize else []
        for outputs in widths:
            stages += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            stages += [nn.MaxPool2d(2)]
            channels, height, width = outputs, height // 2, width // 2
        self.features = nn.Sequential(*stages)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, classes)
        return self.head(self.features(x))


class BandLimit(nn.Module):
    """Drops Fourier modes above `bandwidth` on each side, and samples what is left on a grid of side x side points:
    (n, c, size, size) -> (n, c, side, side).

    White noise of sigma becomes noise of sigma (2 bandwidth + 1) / size; images without such modes lose nothing.

    Args:
        size, side: of the image, and of the result, at least 2 bandwidth + 1.
        bandwidth: in cycles per side.

    Raises:
        RequestError: no bandwidth, or sides too small for it.
    """

    rows: Tensor

    def __init__(self, size: int, side: int, bandwidth: int):
        super().__init__()
        check_whole("model", bandwidth=(bandwidth, 1))
        check_whole("model", size=(size, 2 * bandwidth + 1), side=(side, 2 * bandwidth + 1))
        points = (torch.arange(side, dtype=torch.float64) + 0.5) * size / side - 0.5
        phase = 2 * math.pi / size * (points[:, None] - torch.arange(size))  # (side, size)
        rows = 1 + 2 * torch.stack([torch.cos(f * phase) for f in range(1, bandwidth + 1)]).sum(0)
        self.register_buffer("rows", (rows / size).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.rows.T


class Synthesis(BandLimit):
    """`BandLimit` of the image that coefficients make (`preprocess.Spectrum`): (n, c, k, k) -> (n, c, side, side).

    Args:
        size, side, bandwidth: see `BandLimit`.
    """

    def __init__(self, size: int, side: int, bandwidth: int):
        super().__init__(size, side, bandwidth)
        basis, _ = fourier_basis(size, bandwidth)
        self.rows = (self.rows.double() @ basis.T).float()


class WienerBank(nn.Module):
    """The image, and what it may have been before a Gaussian blur of each of some variances, as channels of mean 0 and
    variance 1: (n, c, h, w) -> (n, c (1 + k), h, w).

    Blur of variance v multiplies the DCT-II coefficients by m = exp(-v lambda / 2) (see `transform.GaussianBlur`); the
    Wiener filter m / (m^2 + 1 / gain^2) takes it back where less than `gain` / 2 does, and drops the rest.

    Args:
        size: of the image, size x size pixels or [height, width].
        channels: c.
        variances: v of each channel, in pixels^2.
        gain: one over the noise's share in the image.
    """

    rows: Tensor
    columns: Tensor
    filters: Tensor

    def __init__(self, size: int | Sequence[int], channels: int, variances: Sequence[float], gain: float):
        super().__init__()
        sides = (size, size) if isinstance(size, int) else tuple(size)
        bases = [torch.from_numpy(dct(np.eye(side), norm="ortho", axis=0)).float() for side in sides]
        decays = [1 - torch.cos(math.pi / side * torch.arange(side)) for side in sides]
        left = torch.stack([torch.exp(-v * (decays[0][:, None] + decays[1])) for v in (0.0, *variances)])
        self.register_buffer("rows", bases[0], persistent=False)
        self.register_buffer("columns", bases[1], persistent=False)
        self.register_buffer("filters", left / (left.square() + gain**-2), persistent=False)
        self.norm = nn.InstanceNorm2d(channels * (1 + len(variances)))

    def forward(self, x: Tensor) -> Tensor:
        coefficients = (self.rows @ x @ self.columns.T)[:, :, None] * self.filters  # (n, c, 1 + k, h, w)
        return self.norm((self.rows.T @ coefficients @ self.columns).flatten(1, 2))


def lowpass_cnn(
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    bandwidth: int = 5,
    side: int = 14,
    widths: Sequence[int] = (32, 64),
    hidden: int = 128,
    spectrum: bool = False,
) -> nn.Sequential:
    """A `SmallCNN` behind a `BandLimit`: for images that preprocessing has low-passed, under much pixel noise.

    With `spectrum` for their coefficients (`preprocess.Spectrum`) instead; the weights of one are the other's.
    """
    first = Synthesis if spectrum else BandLimit
    return nn.Sequential(first(size, side, bandwidth), SmallCNN(channels, side, classes, widths, hidden))


def deblurring_cnn(
    channels: int = 1,
    size: int | Sequence[int] = 28,
    classes: int = 10,
    widths: Sequence[int] = (32, 64),
    hidden: int = 128,
    variances: Sequence[float] = (8, 20, 40),
    gain: float = 300,
) -> nn.Sequential:
    """A `SmallCNN` behind a `WienerBank`: for images that are blurred beyond what a small network undoes by itself."""
    inputs = channels * (1 + len(variances))
    return nn.Sequential(WienerBank(size, channels, variances, gain), SmallCNN(inputs, size, classes, widths, hidden))
