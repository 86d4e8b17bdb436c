"""Bounds that `gsmooth bound` made before."""

from collections.abc import Generator, Iterable
from typing import Any

from torch import Tensor

from gsmooth_lightning.error.base import Bound, ErrorBound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream, content_digest
from gsmooth_lightning.threat import TransformationThreat


class StoredBound(ErrorBound):
    """The bounds of a store, by image.

    Args:
        records: of a store written by `gsmooth bound`; the caller checks that it belongs to the same classifier.
    """

    def __init__(self, records: Iterable[dict[str, Any]]):
        fields = ("value", "rho", "alpha", "guarantee", "details")
        self.bounds = {r["index"]: (r["input"], Bound(**{f: r[f] for f in fields})) for r in records}

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        if stream.image not in self.bounds:
            raise RequestError(f"the bounds have none for image {stream.image}; run `gsmooth bound` on the same images")
        made_for, bound = self.bounds[stream.image]
        if made_for != content_digest(x):
            raise RequestError(
                f"the bound of image {stream.image} was made for other pixels; run `gsmooth bound` on these files"
            )
        return bound
        yield  # a procedure without jobs
