"""A covariance of the pixel noise as something to learn."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.smoothed import LEVELS
from gsmooth_lightning.smoothing import Gaussian, Law, LowRankGaussian

NARROWEST, WIDEST = 1 / LEVELS, 28.0
"""Ends of s: a step of the noise grid; wider noise has no exact sums with images (`SmoothedClassifier`), and where a
network does not look it would grow for ever."""


class Scales(nn.Module):
    """Sigma = diag(s)^2 + U'U with s = exp(log_sigma), from NARROWEST to WIDEST.

    Args:
        initial: the noise to start from, a diagonal Gaussian law.
        shape: of what the noise is added to, (c, h, w) or (c, t).
        tied: sides of the blocks that share one sigma, one for each axis of the shape; null for the whole side. [1,1,1]
            is a sigma for each value, [1,null,null] for each channel, [null,4,4] for each 4 x 4 block of pixels.
        rank: rows of U, which start from standard normals times `start` s; 0 for none.
        start: see rank.

    Raises:
        RequestError: an initial law that is no diagonal Gaussian, blocks of another number of axes, a rank below 0.
    """

    def __init__(
        self,
        initial: Law,
        shape: Sequence[int],
        tied: Sequence[int | None],
        rank: int = 0,
        start: float = 0.01,
    ):
        super().__init__()
        self.shape = tuple(shape)
        if not isinstance(initial, Gaussian) or initial.cholesky is not None:
            raise RequestError("a learned sigma starts from independent Gaussian noise; use noise=gaussian")
        if len(tied) != len(self.shape):
            raise RequestError(f"scales.tied needs {len(self.shape)} sides of a block, one for each axis, got {tied}")
        sides = [side if side is not None else whole for side, whole in zip(tied, self.shape, strict=True)]
        check_whole("scales", rank=(rank, 0), **{f"tied[{k}]": (side, 1) for k, side in enumerate(sides)})
        sigma = initial.sigma.expand(self.shape).log().float()
        for axis, side in enumerate(sides):  # the mean logarithm of each block, which keeps the volume
            parts = sigma.split(side, axis)
            sigma = torch.cat([part.mean(axis, keepdim=True) for part in parts], axis)
        self.sides = sides
        self.log_sigma = nn.Parameter(sigma)
        factors = start * torch.randn(rank, *self.shape, device=sigma.device) * initial.sigma.float()
        self.factors = nn.Parameter(factors) if rank else None

    def sigma(self) -> Tensor:
        """s, of the shape of the noise."""
        s = self.log_sigma.clamp(math.log(NARROWEST), math.log(WIDEST)).exp()
        for axis, (side, whole) in enumerate(zip(self.sides, self.shape, strict=True)):
            s = s.repeat_interleave(side, axis).narrow(axis, 0, whole)
        return s

    def law(self) -> Law:
        """The law at present; what is drawn and measured by it has gradients."""
        return Gaussian(self.sigma()) if self.factors is None else LowRankGaussian(self.sigma(), self.factors)
