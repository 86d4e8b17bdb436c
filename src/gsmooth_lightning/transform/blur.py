"""Gaussian blur as a semigroup, and defocus blur."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform.base import Additive, Mover, check_images


class GaussianBlur(Additive):
    """Blur of variance v >= 0 in pixels^2: the DCT-II coefficients are multiplied by exp(-v lambda / 2), lambda =
    (2 - 2 cos w_i) + (2 - 2 cos w_j), w_i = pi i / h, w_j = pi j / w. Variances add exactly.

    This is the heat semigroup of the pixel grid with reflecting borders: its kernel is nonnegative with row sums 1, so
    images stay in [0, 1] (theory.md section 4). Truncated spatial kernels do not compose.
    """

    units = ("variance, pixels^2",)
    name = "Gaussian blur"
    exact = True
    lowest = 0.0

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        rows, row_rates = _cosines(x.shape[-2], x.device, x.dtype)
        columns, column_rates = _cosines(x.shape[-1], x.device, x.dtype)
        variance = theta[:, :1].to(x.dtype)  # (n, 1)
        vertical = torch.exp(-variance * row_rates)[:, None, :, None]
        horizontal = torch.exp(-variance * column_rates)[:, None, None, :]
        coefficients = (rows @ x @ columns.T) * vertical * horizontal
        return rows.T @ coefficients @ columns

    def values(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Between the image's own least and largest value."""
        return x.double().amin().expand(x.shape), x.double().amax().expand(x.shape)

    def spread(self, low: Tensor, high: Tensor, error: Tensor, least: Tensor, most: Tensor) -> float:
        """Orthogonal up to multipliers between 0 and 1: distances do not grow."""
        return float(error.norm())

    def drift(self, x: Tensor, low: Tensor, high: Tensor, step: Tensor) -> float:
        """The largest of the lambda / 2 is 4."""
        return 4 * float(x.norm()) * float(step[0])


class Defocus(Mover):
    """Mean over a disc of radius theta pixels: k * x with k = w / sum(w), w = clip((theta - d) / edge + 1/2, 0, 1) at a
    distance d from the disc's centre; the image is mirrored outside, its edge pixels once (as by OpenCV).

    GSmooth's Table 1 has radii up to 5 pixels. The defocus blur of the common corruptions (Hendrycks and Dietterich
    2019) has a hard edge, and a Gaussian blur after it.

    Args:
        edge: pixels over which the disc's edge falls off, at most 2: then theta = 0 leaves the image alone.
        alias: sigma of a Gaussian blur of 3 x 3 pixels after it, which theta = 0 leaves as well; 0: none.

    Raises:
        RequestError: another edge or sigma, a negative radius, or one that reaches over the image.
    """

    units = ("pixels",)
    name = "defocus blur"
    lowest = 0.0

    def __init__(self, edge: float = 1.0, alias: float = 0.0):
        super().__init__()
        if not 0 < edge <= 2 or not 0 <= alias < math.inf:
            raise RequestError(f"defocus needs an edge in (0, 2] and alias >= 0, got edge={edge} and alias={alias}")
        self.edge, self.alias = edge, alias

    def reach(self, largest: float) -> int:
        """Pixels each way that a kernel of this radius covers."""
        return max(0, math.ceil(largest + self.edge / 2 - 1)) + (self.alias > 0)

    def weights(self, theta: Tensor, reach: int) -> Tensor:
        """w, (n, 2 reach + 1, 2 reach + 1) float64, for radii (n,)."""
        return ((theta.double()[:, None, None] - _distances(reach, theta.device)) / self.edge + 0.5).clamp(0, 1)

    def softened(self, kernels: Tensor) -> Tensor:
        """Kernels after the Gaussian blur."""
        if not self.alias:
            return kernels
        side = math.exp(-0.5 / self.alias**2)
        taps = torch.tensor([side, 1.0, side], dtype=torch.float64, device=kernels.device) / (1 + 2 * side)
        return functional.conv2d(kernels[:, None], torch.outer(taps, taps)[None, None], padding=1)[:, 0]

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        if bool((theta < 0).any()):
            raise RequestError("a defocus radius cannot be negative; use a one-sided law and threat.low=0")
        reach = self.reach(theta.max().item())
        w = self.weights(theta[:, 0], reach)
        return _convolved(x, self.softened(w / w.sum((1, 2), keepdim=True)), self.name)

    def departure(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """A function whose slope lies between a and b over a length l is within l (b - a) / 4 of its chord; here the
        slope is k' = (w' - k S') / S, S = sum(w), and w and S grow with theta."""
        first, last = low[:, 0].double(), high[:, 0].double()
        length, apart = (last - first)[:, None, None], 1e-7 * (1 + last)  # theta in float32 may pass a kink
        reach = self.reach(float((last + apart).max()))
        a, b = self.weights((first - apart).clamp_min(0), reach), self.weights(last + apart, reach)
        some, all_of = ((b > 0) & (a < 1)) / self.edge, (a > 0) & (b < 1)  # w' = 1 / edge somewhere, or everywhere
        all_of = all_of / self.edge
        s, t = (w.sum((1, 2), keepdim=True) for w in (a, b))
        slow, fast = (slope.sum((1, 2), keepdim=True) for slope in (all_of, some))
        least, most = all_of / t - (b / s) * fast / s, some / s - (a / t) * slow / t
        slope = torch.maximum(least.abs(), most.abs())
        bent = self.softened(length / 4 * (most - least) + 1e-6 * (1 + last[:, None, None]) * slope)  # theta in float32
        images = x.abs().double().expand(len(low), *x.shape)
        rounding = 2 * (bent[0].numel() + 8) * 2.0**-24 * float(x.abs().amax())
        return _convolved(images, bent, self.name) + rounding


def _convolved(x: Tensor, kernels: Tensor, name: str) -> Tensor:
    """Each image, (n, c, h, w), with its own kernel, (n, k, k), mirrored outside."""
    n, (h, w) = len(x), x.shape[-2:]
    reach = kernels.shape[-1] // 2
    if reach >= min(h, w):
        raise RequestError(f"{name} of {reach} pixels reaches over an image of {h} x {w}; lower threat.high")
    padded = functional.pad(x, [reach] * 4, mode="reflect").transpose(0, 1)  # (c, n, ...): a group for each image
    blurred = functional.conv2d(padded.double(), kernels[:, None], groups=n)  # float32 would be TF32 on some devices
    return blurred.transpose(0, 1).to(x.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _distances(reach: int, device: torch.device) -> Tensor:
    """Distance of each tap from the kernel's centre, (2 reach + 1, 2 reach + 1)."""
    along = torch.arange(-reach, reach + 1, dtype=torch.float64, device=device)
    return torch.hypot(along[:, None], along)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _cosines(length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The orthonormal DCT-II basis, (length, length), and the decay of each mode per unit of variance, (length,)."""
    k, t = torch.arange(length, dtype=torch.float64)[:, None], torch.arange(length, dtype=torch.float64)
    basis = torch.cos(math.pi / length * k * (t + 0.5))
    rates = 1 - torch.cos(math.pi / length * k[:, 0])  # (2 - 2 cos w) / 2
    return (basis / basis.norm(dim=1, keepdim=True)).to(device, dtype), rates.to(device, dtype)
