"""Noise that `gsmooth sigma` learned, from its file."""

from pathlib import Path

from torch import Tensor

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model.checkpoint import read_checkpoint
from gsmooth_lightning.smoothing.base import Law
from gsmooth_lightning.smoothing.gaussian import Gaussian
from gsmooth_lightning.smoothing.low_rank import LowRankGaussian


def learned_noise(file: str | Path) -> Law:
    """The law that a file holds: diagonal, or with a covariance of low rank beside the diagonal.

    Raises:
        RequestError: there is no such file, it holds no learned noise, or numbers that are no standard deviations.
    """
    content = read_checkpoint(file, "file of learned noise", "sigma", "learned")
    held = content.get("noise") if isinstance(content, dict) else None
    sigma, factors = (held.get("sigma"), held.get("factors")) if isinstance(held, dict) else (None, None)
    if not isinstance(sigma, Tensor) or not isinstance(factors, Tensor | None):
        raise RequestError(f"{file} holds no learned noise; give a file that `gsmooth sigma` wrote")
    return Gaussian(sigma) if factors is None else LowRankGaussian(sigma, factors)
