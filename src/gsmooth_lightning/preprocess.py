"""What happens to an image between the transformation and the noise: a step states its Lipschitz
constant in l2 as `lipschitz`.

One preprocessing object serves training, voting and the error bound.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError


class Preprocess(nn.Sequential):
    """Steps in order; no steps: the identity."""

    def __init__(self, steps: list[nn.Module] | None = None):
        super().__init__(*(steps or []))

    @property
    def lipschitz(self) -> float:
        """Product of the steps' Lipschitz constants in l2; infinite when a step does not state one."""
        return math.prod(getattr(step, "lipschitz", math.inf) for step in self)


class DiscVignette(nn.Module):
    """Keeps the pixels whose centre lies in the largest disc through pixel centres; the others become 0.

    Inside the disc a bilinear rotation never uses anything from outside the image (Fischer et al. 2020, section 7).
    """

    lipschitz = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * _disc(*x.shape[-2:], x.device, x.dtype)


class LowPass(nn.Module):
    """Orthogonal projection on the Fourier modes with integer frequencies f1^2 + f2^2 <= bandwidth^2.

    Computed in the real product basis of cosines and sines, in which the projection is a 0/1 mask: two thin matrix
    products a side, faster than an FFT for the small bandwidths in use.

    Args:
        bandwidth: radius of the disc of kept frequencies, in cycles per image side.
    """

    lipschitz = 1.0

    def __init__(self, bandwidth: float):
        super().__init__()
        if not bandwidth >= 0:
            raise RequestError(f"bandwidth must not be negative, got {bandwidth}")
        self.bandwidth = bandwidth

    def forward(self, x: Tensor) -> Tensor:
        rows, columns, mask = _lowpass(*x.shape[-2:], self.bandwidth, x.device, x.dtype)  # (k1, h), (k2, w), (k1, k2)
        coefficients = (rows @ (x @ columns.T)) * mask
        return (rows.T @ coefficients) @ columns

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth:g}"


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


def fourier_basis(length: int, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Orthonormal cosines and sines on `length` points up to `bandwidth`, (k, length), and their frequencies, (k,)."""
    top = min(int(bandwidth), length // 2)
    t = torch.arange(length, dtype=torch.float64) * (2 * torch.pi / length)
    rows, frequencies = [torch.ones(length, dtype=torch.float64)], [0]
    for f in range(1, top + 1):
        rows.append(torch.cos(f * t))
        frequencies.append(f)
        if 2 * f < length:  # the sine of the Nyquist frequency vanishes
            rows.append(torch.sin(f * t))
            frequencies.append(f)
    basis = torch.stack(rows)
    return basis / basis.norm(dim=1, keepdim=True), torch.tensor(frequencies)
