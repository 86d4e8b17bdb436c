"""Bounds that `gsmooth bound` made before."""

from collections.abc import Generator, Iterable
from typing import Any

from torch import Tensor

from gsmooth_lightning.error.base import Bound, Conditions, ErrorBound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream, content_digest
from gsmooth_lightning.threat import Threat, TransformationThreat


class StoredBound(ErrorBound):
    """The bounds of a store, by image.

    Args:
        records: of a store written by `gsmooth bound`.
        conditions: what they were made for.
        made_by: the bound that made them.
    """

    def __init__(self, records: Iterable[dict[str, Any]], conditions: Conditions, made_by: ErrorBound):
        fields = ("value", "rho", "alpha", "guarantee", "details", "parts", "curve", "slope")
        self.bounds = {r["index"]: (r["input"], Bound(**{f: r[f] for f in fields if f in r})) for r in records}
        self.conditions, self.made_by = conditions, made_by
        self.partition, self.soft = made_by.partition, made_by.soft
        self.reverse, self.covers_l2, self.latent = made_by.reverse, made_by.covers_l2, made_by.latent

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> TransformationThreat:
        return self.made_by.check(smoothed, threat)

    def procedure(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor, stream: Stream
    ) -> Generator[Any, Any, Bound]:
        self.conditions.check(smoothed, threat)
        if stream.image not in self.bounds:
            raise RequestError(f"the bounds have none for image {stream.image}; run `gsmooth bound` on the same images")
        made_for, bound = self.bounds[stream.image]
        if made_for != content_digest(x):
            raise RequestError(
                f"the bound of image {stream.image} was made for other pixels; run `gsmooth bound` on these files"
            )
        return bound
        yield  # a procedure without jobs
