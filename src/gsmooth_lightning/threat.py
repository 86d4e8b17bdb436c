"""What the attacker may do. Certificates, error bounds and tables state it."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from gsmooth_lightning.errors import RequestError, at_least, check_whole
from gsmooth_lightning.stream import Source
from gsmooth_lightning.transform import Transform, compute

SAVED = {"float": (0, 1, None), "8bit": (0, 1, 255), "16bit": (-1, 1, 32768), "real": (-1, 1, None)}
"""Format -> range of clean inputs, and steps between 0 and 1: images as floats or bytes, waveforms as 16-bit samples,
either as real numbers."""

MOST_PARAMETERS = 100_000
"""How many parameters of an attack are searched at most."""


class Threat(ABC):
    """An attack on files: what is done to an image or waveform, and how the result is saved.

    Args:
        saved: "8bit" (images, values k/255), "float" (images, clipped), "16bit" (waveforms, values k/32768), "real"
            (attacked values are passed on as they are, neither rounded nor clipped). It holds for the clean input as
            well.
        size: pixels of the shorter side to which images are enlarged (bicubic, aspect ratio kept) before anything else,
            the attack included; None keeps them.
    """

    unit: str

    @property
    @abstractmethod
    def reach(self) -> float:
        """Radius within which every attack of the threat lies."""

    def __init__(self, saved: str = "8bit", size: int | None = None):
        if saved not in SAVED:
            raise RequestError(f"threat.saved must be one of {', '.join(SAVED)}, got {saved!r}")
        if size is not None:
            check_whole("threat", size=(size, 1))
        self.saved, self.size = saved, size

    @property
    def levels(self) -> int | None:
        """Steps between 0 and 1 in a saved image, None for floats."""
        return SAVED[self.saved][2]

    @property
    def inputs(self) -> str:
        """What the numbers of an input are, for tables."""
        low, high, _ = SAVED[self.saved]
        if self.saved == "real":
            return "values as the data have them; attacked files are not clipped"
        return ("samples" if self.saved == "16bit" else "pixels") + f" in [{low}, {high}]"

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
        if self.size is not None:
            if x.ndim != 4:
                raise RequestError("threat.size enlarges images, and these inputs are none; set it to null")
            x = functional.resize(x, [self.size], InterpolationMode.BICUBIC, antialias=False)
        return self.save(x.clamp(low, high))

    def clip(self, x: Tensor) -> Tensor:
        """Values brought into the format's range, before they are rounded."""
        low, high, levels = SAVED[self.saved]
        if self.saved == "real":
            return x
        return x.clamp(low, high - 1 / levels if levels and low < 0 else high)  # two's complement ends a step below 1

    def save(self, x: Tensor) -> Tensor:
        """What a viewer reads back from the saved file."""
        return self.clip(x if self.levels is None else (x * self.levels).round_().div_(self.levels))

    def file(self) -> str:
        enlarged = f"images enlarged to a shorter side of {self.size} pixels (bicubic), " if self.size else ""
        kept = {"float": "kept as floats", "real": "kept as float32 numbers, not clipped"}
        return enlarged + kept.get(self.saved, f"saved with {self.saved.removesuffix('bit')} bits")

    @abstractmethod
    def describe(self) -> str:
        """One sentence for tables."""


class PixelThreat(Threat):
    """Adds any delta with ||delta|| at most the radius.

    Args:
        norm: "l1", "l2" or "linf".
    """

    def __init__(self, saved: str = "8bit", size: int | None = None, norm: str = "l2"):
        super().__init__(saved, size)
        if norm not in ("l1", "l2", "linf"):
            raise RequestError(f"threat.norm must be l1, l2 or linf, got {norm!r}")
        self.norm = self.unit = norm

    @property
    def reach(self) -> float:
        """Largest radius there is."""
        return math.inf

    def distance(self, delta: Tensor) -> Tensor:
        """Norms of the differences of files, (n, ...) -> (n,) float64: of whole steps, where the format has them."""
        exact = delta.double().flatten(1)
        if self.levels is not None:
            exact = (exact * self.levels).round() / self.levels
        return torch.linalg.vector_norm(exact, {"l1": 1, "l2": 2, "linf": math.inf}[self.norm], 1)

    def describe(self) -> str:
        return f"any change of {self.norm} norm at most the radius ({self.inputs}), {self.file()}"


class TransformationThreat(Threat):
    """Applies psi(., gamma) with gamma between low and high, once, and saves the result.

    Within a radius lie the parameters inside the range that are, each of them, at most so far from 0. Where parameters
    have different units, the radius is a share of the range: within 1 lies all of it.

    The file is the one that this package computes: another library's rotation may round a pixel to the next value.

    Args:
        transform: the attacker's transformation (its interpolation included).
        low, high: ends of the range, one number for all parameters or one for each; 0 lies between them.
        step: None, or the attacker may use only the multiples of `step` within the range: then finitely many attacks
            exist, and a maximum over them is exact.
        l2: the file may then be changed by anything of this l2 norm as well.
    """

    def __init__(
        self,
        transform: Transform,
        low: float | Sequence[float],
        high: float | Sequence[float],
        step: float | None = None,
        saved: str = "8bit",
        size: int | None = None,
        l2: float = 0.0,
    ):
        super().__init__(saved, size)
        if transform.dim == 0:
            raise RequestError(f"a threat by {transform.name} needs a transformation with a parameter")
        self.lows, self.highs = (_for_each("low", low, transform.dim), _for_each("high", high, transform.dim))
        for a, b in zip(self.lows, self.highs, strict=True):
            if not -math.inf < a <= 0 <= b < math.inf or self.lows == self.highs:
                raise RequestError(f"the threat's range must be finite and contain 0 and more, got {low} to {high}")
        if any(a < least for a, least in zip(self.lows, transform.least, strict=True)):
            raise RequestError(
                f"{transform.name} has no parameters below {max(transform.least):g}; set threat.low to it"
            )
        if step is not None and not 0 < step < math.inf:
            raise RequestError(f"threat.step must be positive and finite, or null, got {step}")
        self.transform, self.step, self.l2 = transform, step, at_least("threat.l2", l2, 0)
        self.alike = len(set(transform.units)) == 1
        self.unit = transform.units[0] if self.alike else "share of the range"

    @property
    def low(self) -> float:
        """The range's lower end, of one parameter."""
        (low,) = self.lows
        return low

    @property
    def high(self) -> float:
        """The range's upper end, of one parameter."""
        (high,) = self.highs
        return high

    @property
    def reach(self) -> float:
        """Radius within which the whole range lies."""
        return max(*(-a for a in self.lows), *self.highs) if self.alike else 1.0

    def box(self, radius: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Ends of the range of the parameters within a radius."""
        if self.alike:
            return tuple(max(a, -radius) for a in self.lows), tuple(min(b, radius) for b in self.highs)
        share = min(radius, 1.0)
        return tuple(share * a for a in self.lows), tuple(share * b for b in self.highs)

    def within(self, radius: float) -> "TransformationThreat":
        """The same threat by the parameters within a radius, above 0."""
        narrow = copy.copy(self)
        narrow.lows, narrow.highs = self.box(radius)
        return narrow

    def distance(self, gammas: Tensor) -> Tensor:
        """Smallest radius within which parameters lie, (n, dim) -> (n,)."""
        if self.alike:
            return gammas.abs().amax(1)
        ends = torch.where(gammas < 0, gammas.new_tensor(self.lows), gammas.new_tensor(self.highs))
        return torch.where(gammas == 0, 0.0, gammas / ends).amax(1)

    def apply(self, x: Tensor, gamma: Tensor) -> Tensor:
        """The attacked files: (n, c, h, w) clean images and (n, dim) parameters -> (n, c, h, w) float32.

        Exact transformations are computed in float64, so that a file rounds each value once. Each file is made alone,
        because its last bits would depend on the batch, and with them what a pixel is rounded to.
        """
        rows = zip(x.split(1), gamma.split(1), strict=True)
        return torch.cat([self.save(compute(self.transform, row, own).float()) for row, own in rows])

    def parameters(self, points: int) -> tuple[Tensor, bool]:
        """Parameters to search, (k, dim), and whether they are all there are.

        With `step`: all multiples of it in the range. Otherwise evenly spaced values, the ends included: `points` of
        one parameter; of several, a grid with max(3, points^(1/dim) rounded up) values of each.

        Raises:
            RequestError: more than MOST_PARAMETERS.
        """
        box, dim = list(zip(self.lows, self.highs, strict=True)), len(self.lows)
        if self.step is None:
            side = points if dim == 1 else max(3, math.ceil(points ** (1 / dim) - 1e-9))
            numbers = [range(side if a < b else 1) for a, b in box]  # a range may have no width
        else:
            numbers = [range(-int(-a / self.step + 1e-9), int(b / self.step + 1e-9) + 1) for a, b in box]
        count = math.prod(map(len, numbers))
        if count > MOST_PARAMETERS:
            raise RequestError(
                f"{count:,} parameters are too many to search, at most {MOST_PARAMETERS:,} are possible; narrow the "
                "threat, raise threat.step or set it to null, or search fewer points"
            )
        if self.step is None:
            axes = [torch.linspace(a, b, len(k)) for (a, b), k in zip(box, numbers, strict=True)]
        else:
            axes = [torch.tensor(k, dtype=torch.float64).mul(self.step).float() for k in numbers]
        return torch.cartesian_prod(*axes).reshape(-1, dim), self.step is not None

    def drawing(self, device: torch.device) -> Callable[[Source, int], Tensor]:
        """(source, n) -> n independent parameters, (n, dim) float32 on the device: uniform over the range, or over the
        multiples of the step. What that takes is copied to the device once."""
        lows, highs = (torch.tensor(ends, dtype=torch.float64, device=device) for ends in (self.lows, self.highs))
        listed = None if self.step is None else self.parameters(2)[0].to(device)

        def draw(source: Source, n: int) -> Tensor:
            uniform = source.uniform(n, len(lows))
            drawn = lows + (highs - lows) * uniform if listed is None else listed[(uniform[:, 0] * len(listed)).long()]
            return drawn.float()

        return draw

    def clips(self) -> bool:
        """Whether black and white pixels of an image leave the range of its format; waveforms have headroom, and what
        they lose counts in `file_error`."""
        floor, ceiling, _ = SAVED[self.saved]
        if self.saved not in ("8bit", "float"):
            return False
        span = torch.tensor([self.lows, self.highs], dtype=torch.float64)
        least, most = self.transform.values(torch.tensor([floor, ceiling]).view(2, 1, 1), *span)  # type: ignore
        return bool((least < floor).any() or (most > ceiling).any())

    def file_error(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(least, most, error) for each pixel of the attacked files of a clean file x, (c, h, w) each, float64.

        Every value of psi(x, gamma) lies between least and most, and its file differs from it by at most `error`: by
        half a step of the format, or the rounding to float32, and by what is clipped. A value that no gamma moves is
        saved as it was.
        """
        span = torch.tensor([self.lows, self.highs], dtype=torch.float64)
        least, most = self.transform.values(x, *span)  # type: ignore[operator]  # of a Resolvable
        peak = torch.maximum(least.abs(), most.abs())
        error = peak * 2**-23 + (0.5 / self.levels if self.levels else 0)
        error = error + torch.maximum(most - self.clip(most), self.clip(least) - least)
        return least, most, torch.where(most > least, error, 0.0)

    def describe(self) -> str:
        ranges = ", ".join(
            f"{a:g} to {b:g} {unit}" for a, b, unit in zip(self.lows, self.highs, self.transform.units, strict=True)
        )
        angles = "any real number" if self.step is None else f"multiples of {self.step:g}"
        first = getattr(self.transform, "parts", (self.transform,))[0]
        method = f"; {first.interpolation}" if hasattr(first, "interpolation") else ""
        more = f", then changed by anything of l2 norm up to {self.l2:g}" if self.l2 else ""
        return f"{self.transform.name} by {ranges} ({angles}{method}), once, {self.file()}{more}"


def _for_each(name: str, value: float | Sequence[float], dim: int) -> tuple[float, ...]:
    numbers = [value] * dim if isinstance(value, int | float) else list(value)
    if len(numbers) != dim or not all(isinstance(v, int | float) for v in numbers):
        raise RequestError(
            f"threat.{name} must be one number, or a list with one for each of {dim} parameters, got {value}"
        )
    return tuple(float(v) for v in numbers)
