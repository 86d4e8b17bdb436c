"""Parts of an image that are bounded, and smoothed, apart (k-smoothing: Fischer et al. 2020, section 6.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothing.gaussian import Gaussian

PARTITIONS = ("halves", "quadrants", "channels")


def partition_masks(partition: str | None, shape: tuple[int, ...]) -> Tensor:
    """(k, *shape) bool, each value in one of k parts of images (c, h, w); None: one part, all of it.

    "halves": left and right; "quadrants": top left, top right, bottom left, bottom right; "channels": one each. The
    middle row or column of an odd side belongs to the bottom or right.

    Raises:
        RequestError: unknown partition, or inputs that are no images.
    """
    check_partition(partition)
    if partition is None:
        return torch.ones(1, *shape, dtype=torch.bool)
    if len(shape) != 3:
        raise RequestError(f"a partition into {partition} is for images, not for inputs of shape {shape}")
    channels, h, w = shape
    number = torch.arange(channels)[:, None, None]
    if partition != "channels":
        number = (torch.arange(w) >= w // 2).long() + torch.zeros(channels, h, 1, dtype=torch.long)
        if partition == "quadrants":
            number = number + 2 * (torch.arange(h) >= h // 2)[:, None]
    number = number.expand(shape)
    return torch.stack([number == k for k in range(int(number.max()) + 1)])


def check_partition(partition: str | None) -> None:
    """Raises RequestError unless the name is known."""
    if partition is not None and partition not in PARTITIONS:
        raise RequestError(f"partition must be null or one of {', '.join(PARTITIONS)}, got {partition!r}")


def gaussian_by_part(partition: str, sigma: Sequence[float], shape: Sequence[int]) -> Gaussian:
    """Gaussian noise with one sigma for each part of images of this shape: a diagonal Sigma_eps.

    Raises:
        RequestError: another number of sigmas than of parts.
    """
    masks = partition_masks(partition, tuple(shape))
    if len(sigma) != len(masks):
        raise RequestError(f"{partition} of images of shape {tuple(shape)} need {len(masks)} sigmas, got {len(sigma)}")
    values = torch.tensor(list(sigma), dtype=torch.float64)
    return Gaussian((masks * values.view(-1, 1, 1, 1)).sum(0))
