"""What happens to an image between the transformation and the noise: a step states its Lipschitz
constant in l2 as `lipschitz`, and that it is linear as `linear`.

One preprocessing object serves training, voting and the error bound.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional

from gsmooth_lightning.errors import RequestError, at_least, check_whole, positive
from gsmooth_lightning.model.fourier import fourier_basis


class Preprocess(nn.Sequential):
    """Steps in order; no steps: the identity."""

    def __init__(self, steps: list[nn.Module] | None = None):
        super().__init__(*(steps or []))

    @property
    def lipschitz(self) -> float:
        """Product of the steps' Lipschitz constants in l2; infinite when a step does not state one."""
        return math.prod(getattr(step, "lipschitz", math.inf) for step in self)


def is_nothing(preprocess: nn.Module) -> bool:
    """Whether preprocessing leaves images as they are."""
    return isinstance(preprocess, nn.Identity) or (isinstance(preprocess, Preprocess) and len(preprocess) == 0)


def lipschitz(preprocess: nn.Module) -> float:
    """What preprocessing states about itself; infinity when it states nothing."""
    return 1.0 if is_nothing(preprocess) else float(getattr(preprocess, "lipschitz", math.inf))


def is_linear(preprocess: nn.Module) -> bool:
    """Whether preprocessing states that it is linear."""
    if isinstance(preprocess, Preprocess):
        return all(getattr(step, "linear", False) for step in preprocess)
    return is_nothing(preprocess) or bool(getattr(preprocess, "linear", False))


def visible(preprocess: nn.Module, x: Tensor) -> Tensor:
    """Pixels of x, (c, h, w), that the vignettes at the beginning keep: (h, w), True or False."""
    kept = torch.ones_like(x[:1])
    for step in preprocess if isinstance(preprocess, Preprocess) else ():
        if not isinstance(step, DiscVignette | RectangleVignette):
            break
        kept = step(kept)
    return kept[0] > 0


class DiscVignette(nn.Module):
    """Keeps the pixels whose centre lies in the largest disc through pixel centres; the others become 0.

    Inside the disc a bilinear rotation never uses anything from outside the image (Fischer et al. 2020, section 7).
    """

    lipschitz = 1.0
    linear = True

    def forward(self, x: Tensor) -> Tensor:
        return x * _disc(*x.shape[-2:], x.device, x.dtype)


class RectangleVignette(nn.Module):
    """Sets a frame of `margin` pixels to 0.

    For translations, black outside the image: a kept pixel lies at least `margin` pixels from the first and last row
    and column, so a move by at most `margin` pixels along each axis (nearest, bilinear; bicubic: margin - 1) computes
    it from the image's own pixels alone. Of psi(psi(x, gamma), theta) nothing that the file's edge cut off is missed
    while |theta_i| <= margin, and in psi(x, gamma + theta) no black is seen while |gamma_i + theta_i| <= margin.

    Args:
        margin: width of the frame in pixels, from 0 on.

    Raises:
        RequestError: a negative margin, or one that leaves nothing of an image.
    """

    lipschitz = 1.0
    linear = True

    def __init__(self, margin: int):
        super().__init__()
        check_whole("preprocess", margin=(margin, 0))
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        m, (h, w) = self.margin, x.shape[-2:]
        if 2 * m >= min(h, w):
            raise RequestError(f"a frame of {m} pixels leaves nothing of images of {h}x{w}; lower margin")
        return pad(x[..., m : h - m, m : w - m], (m, m, m, m))

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class Resize(nn.Module):
    """Resizes images so that the shorter side has `size` pixels; aspect ratio kept, bilinear with antialiasing.

    States no Lipschitz constant: enlarging stretches l2 distances (by 2 where both sides double), and for shrinking
    none is proved here. Error bounds by sampling need none.

    Args:
        size: of the shorter side in pixels.

    Raises:
        RequestError: a size below 1.
    """

    linear = True

    def __init__(self, size: int):
        super().__init__()
        check_whole("preprocess", size=(size, 1))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return functional.resize(x, [self.size], antialias=True)

    def extra_repr(self) -> str:
        return f"{self.size}"


class CenterCrop(nn.Module):
    """The centre of images, size x size pixels.

    Raises:
        RequestError: a size below 1, or images smaller than the crop.
    """

    lipschitz = 1.0
    linear = True

    def __init__(self, size: int):
        super().__init__()
        check_whole("preprocess", size=(size, 1))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.size:
            h, w = x.shape[-2:]
            raise RequestError(f"images of {h}x{w} are smaller than a crop of {self.size}; resize them before it")
        return functional.center_crop(x, [self.size, self.size])

    def extra_repr(self) -> str:
        return f"{self.size}"


class LowPass(nn.Module):
    """Orthogonal projection on the Fourier modes with integer frequencies f1^2 + f2^2 <= bandwidth^2.

    Computed in the real product basis of cosines and sines, in which the projection is a 0/1 mask: two thin matrix
    products a side, faster than an FFT for the small bandwidths in use.

    Args:
        bandwidth: radius of the disc of kept frequencies, in cycles per image side.
    """

    lipschitz = 1.0
    linear = True

    def __init__(self, bandwidth: float):
        super().__init__()
        self.bandwidth = at_least("preprocess.bandwidth", bandwidth, 0)

    def coefficients(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, k1, k2), 0 beyond the disc."""
        rows, columns, mask = self.bases(x)
        return (rows @ (x @ columns.T)) * mask

    def bases(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows (k1, h) and columns (k2, w) of x, and the mask of kept products (k1, k2)."""
        return _lowpass(*x.shape[-2:], self.bandwidth, x.device, x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns, _ = self.bases(x)
        return (rows.T @ self.coefficients(x)) @ columns

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth:g}"


LARGEST = 128
"""Side of an image whose coefficients float32 no longer holds to a quarter of a step of the noise grid: 2^-18."""


class Spectrum(LowPass):
    """The coefficients of `LowPass` instead of the image: noise is then added to each frequency, and a learned sigma is
    one of each frequency. White noise of a sigma is the same in both.

    Computed in float64: a coefficient of an image of side s is up to s, and its rounding to float32 has to stay below a
    quarter of a step of the noise grid, which error bounds allow for.

    Args:
        bandwidth: see `LowPass`.

    Raises:
        RequestError: (when it is used) an image with a side of LARGEST pixels or more.
    """

    def forward(self, x: Tensor) -> Tensor:
        if max(x.shape[-2:]) >= LARGEST:
            raise RequestError(
                f"coefficients of images of {LARGEST} pixels a side are too large for exact noise; use LowPass instead"
            )
        return self.coefficients(x.double()).to(x.dtype)


class GaussianLowPass(nn.Module):
    """Gaussian blur, black outside the image: y = K_h x K_w', K[i, j] = g(i - j) / sum_k g(k), |k| <= 4 sigma + 1/2.

    Lipschitz constant 1 in l2: K is symmetric with nonnegative entries, and a row sums to at most 1 because part of the
    kernel lies outside. So do the columns, hence ||K||_2 <= sqrt(||K||_1 ||K||_inf) <= 1, and the norm of
    x -> K_h x K_w' is the product of both. All weights are nonnegative, so intervals stay narrow (theory.md section 5);
    the slides' filter "G" in place of the DFT's.

    Args:
        sigma: standard deviation in pixels.

    Raises:
        RequestError: sigma not positive and finite.
    """

    lipschitz = 1.0
    linear = True

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = positive("preprocess.sigma", sigma)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return _gaussian(h, self.sigma, x.device, x.dtype) @ (x @ _gaussian(w, self.sigma, x.device, x.dtype))

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}"


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a later gradient may need what is kept
def _disc(h: int, w: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 inside the largest disc through pixel centres, 0 outside, (h, w)."""
    ys, xs = torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2
    return (ys[:, None] ** 2 + xs[None, :] ** 2 <= ((min(h, w) - 1) / 2) ** 2).to(device, dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _lowpass(
    h: int, w: int, bandwidth: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Bases of the rows (k1, h) and columns (k2, w), and the mask of kept products (k1, k2)."""
    rows, f1 = fourier_basis(h, bandwidth)
    columns, f2 = fourier_basis(w, bandwidth)
    mask = f1[:, None] ** 2 + f2[None, :] ** 2 <= bandwidth**2
    return rows.to(device, dtype), columns.to(device, dtype), mask.to(device, dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _gaussian(length: int, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """K of `GaussianLowPass` for one side, (length, length); weights are rounded down."""
    far = int(4 * sigma + 0.5)
    places = torch.arange(-far, far + 1, dtype=torch.float64)
    total = (-(places**2) / (2 * sigma**2)).exp().sum()
    apart = (torch.arange(length)[:, None] - torch.arange(length)[None, :]).double()
    weights = torch.where(apart.abs() <= far, (-(apart**2) / (2 * sigma**2)).exp() / total, 0.0).to(dtype)
    return torch.nextafter(weights, torch.zeros_like(weights)).to(device)
