"""An error bound that nobody measured."""

from collections.abc import Generator
from typing import Any

from torch import Tensor

from gsmooth_lightning.error.base import Bound, ErrorBound
from gsmooth_lightning.errors import at_least
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat


class AssumedBound(ErrorBound):
    """E as given, 0 by default: transformations are taken to compose (BaseSPT). Heuristic.

    Args:
        value: E, in units of the pixel noise.
    """

    def __init__(self, value: float = 0.0):
        self.value = at_least("error.value", value, 0)
        self.free = self.value == 0

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        taken = f"the interpolation error is taken to be at most {self.value:g} sigma, without a measurement"
        return Bound(self.value, 0.0, 0.0, "heuristic", {"rests_on": taken})
        yield  # a procedure without jobs
