"""Random draws addressed by (seed, image, stage, block).

A block of draws depends on its address alone: not on the batch size, the number of workers or ranks, what was drawn
before it, or whether the run was resumed. Nothing here touches torch's global generators.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gsmooth_lightning.errors import RequestError

STAGES = ("select", "estimate", "error-choose", "error-bound", "attack", "predict")
"""What draws are for. Draws of one stage are never used for another: selecting and bounding must be independent."""

UNIT_ROUNDOFF = 2.0**-52


class Source:
    """Independent draws at one address.

    On the CPU: NumPy's SFC64 with the 52-bit ziggurat. On a GPU: torch's Philox in float64, seeded with 64 bits of the
    address. Both reach beyond 8.5 standard deviations, where float32 `torch.randn` stops at 5.77.
    """

    def __init__(self, words: tuple[int, ...], device: torch.device):
        sequence = np.random.SeedSequence(words)
        self.device = device
        if device.type == "cpu":
            self._numpy = np.random.Generator(np.random.SFC64(sequence))
        else:
            self._torch = torch.Generator(device)
            self._torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def normal(self, *shape: int) -> Tensor:
        """Standard normals, float64, of the given shape."""
        if self.device.type == "cpu":
            return torch.from_numpy(self._numpy.standard_normal(shape))
        return torch.randn(shape, generator=self._torch, dtype=torch.float64, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform draws of [0, 1), float64, of the given shape."""
        if self.device.type == "cpu":
            return torch.from_numpy(self._numpy.random(shape))
        return torch.rand(shape, generator=self._torch, dtype=torch.float64, device=self.device)

    def exponential(self, *shape: int) -> Tensor:
        """Exponentials of mean 1, float64, of the given shape: quantiles -ln(1 - u), at most 36.8."""
        return self.uniform(*shape).neg_().log1p_().neg_()


class TrainingSource:
    """Draws from torch's global generator: for training and exported modules, where nothing needs an address. Normals
    in float32 end at 5.8 standard deviations."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32):
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        """Standard normals of the given shape."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform draws of [0, 1), of the given shape."""
        return torch.rand(shape, dtype=self.dtype, device=self.device)

    def exponential(self, *shape: int) -> Tensor:
        """Exponentials of mean 1, of the given shape."""
        return self.uniform(*shape).neg_().log1p_().neg_()


@dataclass(frozen=True)
class Stream:
    """All the draws that belong to one image under one seed; of nested smoothing, also those within one outer draw.

    Attributes:
        path: the outer draws, outermost last: (stage, draw) of each, flattened.
    """

    seed: int
    image: int
    path: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.seed < 2**64 and 0 <= self.image < 2**64):
            raise RequestError(f"seed and image must lie in 0..2^64-1, got seed={self.seed}, image={self.image}")

    def at(self, stage: str, block: int, device: torch.device | str = "cpu") -> Source:
        """The source of the draws of one block of one stage (one of `STAGES`)."""
        # The length of the word list separates nothing by itself: SeedSequence hashes trailing zeros alike, so a
        # constant closes the address.
        words = (self.seed, self.image, STAGES.index(stage), block, *self.path, 1)
        return Source(tuple(w & 0xFFFFFFFF for word in words for w in (word, word >> 32)), torch.device(device))

    def within(self, stage: str, draw: int) -> "Stream":
        """The draws inside one draw of a stage."""
        return Stream(self.seed, self.image, (STAGES.index(stage), draw, *self.path))


def content_digest(x: Tensor) -> str:
    """SHA-256 of a clean input's values, shortened: records state it, so that nobody mistakes another file for it."""
    return hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def sampling_slack(coordinates: int, cells: float) -> float:
    """Total variation between `coordinates` rounded draws of `Source.normal` and of the exact normal law.

    On the CPU the float64 sampler's law is a mixture of layers of at least 2^52 equally likely points; on a GPU,
    Box-Muller makes it from two 53-bit uniforms. Rounded to a grid of `cells` steps per standard deviation, a
    coordinate meets at most 26 * cells cell boundaries within +-13 standard deviations; at each the two masses differ
    by at most four points' worth (the boundary, the multiplication by sigma, and the sampler's own tables), and total
    variation adds over independent coordinates.
    The certifier subtracts it from pA.
    """
    return coordinates * (26.0 * cells + 64.0) * 4.0 * UNIT_ROUNDOFF
