"""How far a network's layers stretch l2 distances."""

import math

import torch
from torch import nn

from gsmooth_lightning.errors import UncertifiableError

SILU = 1.0999
"""Largest slope of x sigmoid(x), rounded up: 1.09984 at x = 2.3994."""

ROUNDED = 1 + 1e-5
"""What float64 singular values and float32 weights may lack, and more."""


def conv_norm(conv: nn.Conv2d, height: int, width: int) -> float:
    """Bound of ||W||_2 of a convolution of height x width images with black around them.

    Such an image lies on a torus of at least height + kernel - 1 by width + kernel - 1 pixels, and the convolution is
    the circular one there, cropped: its norm is at most the largest spectral norm over the torus' frequencies of the
    (outputs, inputs) matrix that the kernel's Fourier transform is (Sedghi et al. 2019). To keep every a-th row and
    b-th column of the output adds up a b frequencies and divides by their number: the matrices side by side, over
    sqrt(a b).

    Raises:
        UncertifiableError: groups, a dilation, or another padding than zeros.
    """
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        raise UncertifiableError("the norm of this convolution is not known; use groups=1, dilation=1 and zero padding")
    (a, b), (outputs, inputs, *kernel) = conv.stride, conv.weight.shape
    sides = zip((height, width), kernel, (a, b), strict=True)
    rows, columns = (math.ceil((n + k - 1) / stride) for n, k, stride in sides)
    spectrum = torch.fft.fft2(conv.weight.detach().double().cpu(), s=(a * rows, b * columns))
    matrices = spectrum.view(outputs, inputs, a, rows, b, columns).permute(3, 5, 0, 1, 2, 4).flatten(3)
    return float(torch.linalg.svdvals(matrices).amax()) / math.sqrt(a * b) * ROUNDED


def lipschitz_constant(network: nn.Sequential, height: int, width: int) -> float:
    """Product of the layers' constants, for convolutions and SiLU: that of the network in l2, or more.

    Raises:
        UncertifiableError: another layer.
    """
    constant = 1.0
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            constant *= conv_norm(layer, height, width)
            height, width = _after(layer, height, width)
        elif isinstance(layer, nn.SiLU):
            constant *= SILU
        else:
            raise UncertifiableError(
                f"how far {type(layer).__name__} stretches distances is not known; make the encoder of convolutions "
                "and SiLU"
            )
    return constant


def _after(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Size of a convolution's output."""
    assert not isinstance(conv.padding, str)
    sides = zip((height, width), conv.kernel_size, conv.stride, conv.padding, strict=True)
    first, second = (math.floor((side + 2 * pad - kernel) / stride) + 1 for side, kernel, stride, pad in sides)
    return first, second
