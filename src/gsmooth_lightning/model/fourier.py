"""Real Fourier modes of one side of an image."""

import torch
from torch import Tensor


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
