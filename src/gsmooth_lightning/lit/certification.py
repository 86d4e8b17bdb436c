"""Per-image work under `Trainer.predict`: certify, bound, attack. Each finished image goes to the store at once."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import pytorch_lightning as pl
import torch
from torch import Tensor

from gsmooth_lightning.attack import worst_of_k
from gsmooth_lightning.certify import Certifier
from gsmooth_lightning.certify.store import Record, Store
from gsmooth_lightning.error import ErrorBound
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream, content_digest
from gsmooth_lightning.threat import Threat, TransformationThreat

Items = list[tuple[int, int, Tensor]]


class StoredPrediction(pl.LightningModule):
    """Work on single images that ends in one record each.

    Args:
        smoothed, threat: the classifier and what is done to it.
        store: where records go.
        seed: of all draws.
    """

    def __init__(self, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int):
        super().__init__()
        self.smoothed, self.threat, self.store, self.seed = smoothed, threat, store, seed
        self.smoothed.eval()

    @abstractmethod
    def records(self, items: Items) -> Iterable[Record]:
        """Records of some clean images, given as (index, label, prepared image), each as soon as it is finished."""

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        images, targets, indices = batch
        prepared = self.threat.prepare(images)
        items = [(int(i), int(y), x) for x, y, i in zip(prepared, targets, indices, strict=True)]
        known = {index: {"label": label, "input": content_digest(x)} for index, label, x in items}
        for record in self.records(items):
            self.store.append({"index": record["index"], **known[record["index"]], **record})

    def configure_optimizers(self) -> None:
        """Nothing is trained."""


class CertificationModule(StoredPrediction):
    """Certifies images. See `Certifier.certify` for what a record holds; `base` is the base classifier's class."""

    def __init__(self, certifier: Certifier, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int = 0):
        super().__init__(smoothed, threat, store, seed)
        self.certifier = certifier

    def records(self, items: Items) -> Iterator[Record]:
        images = [(index, x) for index, _, x in items]
        classes = self.smoothed.classify_base(torch.stack([x for _, x in images]))
        base = {index: int(label) for (index, _), label in zip(images, classes, strict=True)}
        found = self.certifier.certify(self.smoothed, self.threat, images, self.seed, in_flight=len(items))
        for index, certificate in found:
            yield {"index": index, "base": base[index], **asdict(certificate)}


class BoundModule(StoredPrediction):
    """Bounds the interpolation error of images."""

    def __init__(self, error: ErrorBound, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int = 0):
        super().__init__(smoothed, threat, store, seed)
        self.error = error
        self._threat = error.check(smoothed, threat)

    def records(self, items: Items) -> Iterator[Record]:
        procedures = (
            (
                i,
                self.error.procedure(self.smoothed, self._threat, x, Stream(self.seed, i)),
            )
            for i, _, x in items
        )
        for index, bound, seconds in run_rounds(procedures, self.device, len(items)):
            yield {"index": index, **asdict(bound), "seconds": seconds}


class AttackModule(StoredPrediction):
    """Attacks images by the worst of k parameters (`attack.worst_of_k`)."""

    def __init__(
        self, smoothed: SmoothedClassifier, threat: TransformationThreat, store: Store, k: int, n: int, seed: int = 0
    ):
        super().__init__(smoothed, threat, store, seed)
        self.k, self.n, self._threat = k, n, threat

    def records(self, items: Items) -> Iterator[Record]:
        procedures = (
            (
                i,
                worst_of_k(
                    self.smoothed,
                    self._threat,
                    x,
                    y,
                    Stream(self.seed, i),
                    self.k,
                    self.n,
                ),
            )
            for i, y, x in items
        )
        for index, attacked, seconds in run_rounds(procedures, self.device, len(items)):
            yield {"index": index, **asdict(attacked), "seconds": seconds}
