"""Gaussian blur as a semigroup."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform.base import Additive, check_images


class GaussianBlur(Additive):
    """Blur of variance v >= 0 in pixels^2: the DCT-II coefficients are multiplied by exp(-v lambda / 2), lambda =
    (2 - 2 cos w_i) + (2 - 2 cos w_j), w_i = pi i / h, w_j = pi j / w. Variances add exactly.

    This is the heat semigroup of the pixel grid with reflecting borders: its kernel is nonnegative with row sums 1, so
    images stay in [0, 1] (theory.md section 4). Truncated spatial kernels do not compose.

    Raises:
        RequestError: a negative variance; that is no blur.
    """

    units = ("variance, pixels^2",)
    name = "Gaussian blur"
    exact = True
    lowest = 0.0

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        if bool((theta < 0).any()):
            raise RequestError("a blur's variance cannot be negative; use a one-sided law and threat.low=0")
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


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _cosines(length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The orthonormal DCT-II basis, (length, length), and the decay of each mode per unit of variance, (length,)."""
    k, t = torch.arange(length, dtype=torch.float64)[:, None], torch.arange(length, dtype=torch.float64)
    basis = torch.cos(math.pi / length * k * (t + 0.5))
    rates = 1 - torch.cos(math.pi / length * k[:, 0])  # (2 - 2 cos w) / 2
    return (basis / basis.norm(dim=1, keepdim=True)).to(device, dtype), rates.to(device, dtype)
