"""What the attacker may do. Certificates, error bounds and tables state it."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform import Transform

SAVED = {"float": (0, 1, None), "8bit": (0, 1, 255), "16bit": (-1, 1, 32768), "real": (-1, 1, None)}
"""Format -> range of clean inputs, and steps between 0 and 1: images as floats or bytes, waveforms as 16-bit samples,
either as real numbers."""


class Threat(ABC):
    """An attack on files: what is done to an image or waveform, and how the result is saved.

    Args:
        saved: "8bit" (images, values k/255), "float" (images, clipped), "16bit" (waveforms, values k/32768), "real"
            (attacked values are passed on as they are, neither rounded nor clipped). It holds for the clean input as
            well.
        size: side in pixels to which images are enlarged (bicubic) before anything else; None keeps them.
    """

    unit: str

    def __init__(self, saved: str = "8bit", size: int | None = None):
        if saved not in SAVED:
            raise RequestError(f"threat.saved must be one of {', '.join(SAVED)}, got {saved!r}")
        if size is not None and size < 1:
            raise RequestError(f"threat.size must be a positive number of pixels or null, got {size}")
        self.saved, self.size = saved, size

    @property
    def levels(self) -> int | None:
        """Steps between 0 and 1 in a saved image, None for floats."""
        return SAVED[self.saved][2]

    @property
    def inputs(self) -> str:
        """What the numbers of an input are, for tables."""
        low, high, _ = SAVED[self.saved]
        return {"16bit": "samples", "real": "values"}.get(self.saved, "pixels") + f" in [{low}, {high}]"

    def prepare(self, x: Tensor) -> Tensor:
        """The clean inputs of this threat, (n, c, h, w) images or (n, c, t) waveforms: enlarged, clamped, saved.

        Raises:
            RequestError: NaN or values outside the format's range.
        """
        low, high, _ = SAVED[self.saved]
        if not bool(((x >= low) & (x <= high)).all()):
            raise RequestError(
                f"inputs must hold finite values between {low} and {high} (threat.saved={self.saved}); scale the data "
                "set, or repair its files"
            )
        if self.size is not None and tuple(x.shape[-2:]) != (self.size, self.size):
            x = functional.interpolate(x, size=(self.size, self.size), mode="bicubic", align_corners=False)
        return self.save(x.clamp(low, high))

    def save(self, x: Tensor) -> Tensor:
        """What a viewer reads back from the saved file."""
        low, high, levels = SAVED[self.saved]
        if self.saved == "real":
            return x
        if levels is None:
            return x.clamp(low, high)
        top = high - 1 / levels if low < 0 else high  # two's complement ends one step below 1
        return (torch.round(x * levels) / levels).clamp(low, top)

    def file(self) -> str:
        enlarged = f"images enlarged to {self.size}x{self.size} (bicubic), " if self.size else ""
        kept = {"float": "kept as floats", "real": "kept as real numbers, neither rounded nor clipped"}
        return enlarged + kept.get(self.saved, f"saved with {self.saved.removesuffix('bit')} bits")

    @abstractmethod
    def describe(self) -> str:
        """One sentence for tables."""


class PixelThreat(Threat):
    """Adds any delta with ||delta|| below the radius.

    Args:
        norm: "l2" or "l1".
    """

    def __init__(self, saved: str = "8bit", size: int | None = None, norm: str = "l2"):
        super().__init__(saved, size)
        if norm not in ("l2", "l1"):
            raise RequestError(f"threat.norm must be l2 or l1, got {norm!r}")
        self.norm = self.unit = norm

    def describe(self) -> str:
        return f"any change of {self.norm} norm at most the radius ({self.inputs}), {self.file()}"


class TransformationThreat(Threat):
    """Applies psi(., gamma) with gamma between low and high, once, and saves the result.

    The file is the one that this package computes: another library's rotation may round a pixel to the next value.

    Args:
        transform: the attacker's transformation (its interpolation included).
        low, high: ends of the parameter range; 0 lies between them.
        step: None, or the attacker may use only the multiples of `step` within the range: then finitely many attacks
            exist, and a maximum over them is exact.
    """

    def __init__(
        self,
        transform: Transform,
        low: float,
        high: float,
        step: float | None = None,
        saved: str = "8bit",
        size: int | None = None,
    ):
        super().__init__(saved, size)
        if transform.dim != 1:
            raise RequestError(f"a threat by {transform.name} needs a transformation with one parameter")
        if not -math.inf < low <= 0 <= high < math.inf or low == high:
            raise RequestError(f"the threat's range must be finite and contain 0 and more, got {low} to {high}")
        if step is not None and not step > 0:
            raise RequestError(f"threat.step must be positive or null, got {step}")
        self.transform, self.low, self.high, self.step = transform, float(low), float(high), step
        self.unit = transform.unit

    def apply(self, x: Tensor, gamma: Tensor) -> Tensor:
        """The attacked files: (n, c, h, w) clean images and (n, 1) parameters -> (n, c, h, w)."""
        return self.save(self.transform(x, gamma))

    def parameters(self, points: int) -> tuple[Tensor, bool]:
        """Parameters to search, (k, 1), and whether they are all there are.

        With `step`: every parameter. Otherwise `points` of them, evenly spaced, the ends included.
        """
        if self.step is None:
            return torch.linspace(self.low, self.high, points)[:, None], False
        first, last = -int(-self.low / self.step + 1e-9), int(self.high / self.step + 1e-9)
        return torch.arange(first, last + 1, dtype=torch.float64)[:, None].mul(self.step).float(), True

    def clip(self, radius: float) -> float:
        """A radius counts only as far as the range on both sides reaches."""
        return min(radius, -self.low if self.low < 0 else self.high, self.high if self.high > 0 else -self.low)

    def describe(self) -> str:
        angles = "any real number" if self.step is None else f"multiples of {self.step:g}"
        method = f"; {self.transform.interpolation}" if hasattr(self.transform, "interpolation") else ""
        return (
            f"{self.transform.name} by {self.low:g} to {self.high:g} {self.unit} ({angles}{method}), "
            f"once, {self.file()}"
        )
