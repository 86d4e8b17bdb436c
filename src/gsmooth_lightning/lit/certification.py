"""Per-image work under `Trainer.predict`: certify, bound, attack. Each finished image goes to the store at once."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from gsmooth_lightning.attack import Attack
from gsmooth_lightning.certify import Certifier
from gsmooth_lightning.certify.store import Record, Store
from gsmooth_lightning.error import Bound, CalibratedBound, ErrorBound
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream, content_digest
from gsmooth_lightning.threat import Threat

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

    def predict_step(self, batch: tuple[Iterable[Tensor], Tensor, Tensor], batch_idx: int) -> None:
        """Works on one batch; images of different shapes are a list."""
        with torch.autocast(self.device.type, enabled=False):  # bounds are of images as float32 computes them
            items = [(int(i), int(y), self.threat.prepare(x[None])[0]) for x, y, i in zip(*batch, strict=True)]
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
        base = self.base_classes(images)
        found = self.certifier.certify(self.smoothed, self.threat, images, self.seed, in_flight=len(items))
        for index, certificate in found:
            yield {"index": index, "base": base[index], **asdict(certificate)}

    def base_classes(self, images: list[tuple[int, Tensor]]) -> dict[int, int]:
        """The base classifier's class of each image, images of one shape together."""
        shapes: dict[torch.Size, dict[int, Tensor]] = defaultdict(dict)
        for index, x in images:
            shapes[x.shape][index] = x
        found: dict[int, int] = {}
        for alike in shapes.values():
            classes = self.smoothed.classify_base(torch.stack(list(alike.values())))
            found |= dict(zip(alike, classes.tolist(), strict=True))
        return found


class BoundModule(StoredPrediction):
    """Bounds the interpolation error of images, or measures the defects of a bound's calibration images."""

    def __init__(self, error: ErrorBound, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int = 0):
        super().__init__(smoothed, threat, store, seed)
        self.error = error
        self._threat = error.check(smoothed, threat)

    def records(self, items: Items) -> Iterator[Record]:
        error = self.error
        work: Callable[..., Any] = error.measure if isinstance(error, CalibratedBound) else error.procedure
        procedures = ((i, work(self.smoothed, self._threat, x, Stream(self.seed, i))) for i, _, x in items)
        for index, found, seconds in run_rounds(procedures, self.device, len(items)):
            content = asdict(found) if isinstance(found, Bound) else {"norms": rounded_up(found).tolist()}
            yield {"index": index, **content, "seconds": seconds}


def rounded_up(norms: np.ndarray) -> np.ndarray:
    """To five decimals, which a store keeps."""
    return np.ceil(norms * 1e5) / 1e5


class AttackModule(StoredPrediction):
    """Attacks images. See `attack.Attacked` for what a record holds."""

    def __init__(self, attack: Attack, smoothed: SmoothedClassifier, threat: Threat, store: Store, seed: int = 0):
        super().__init__(smoothed, threat, store, seed)
        self.attack = attack

    def records(self, items: Items) -> Iterator[Record]:
        procedures = ((i, self.attack(self.smoothed, self.threat, x, y, Stream(self.seed, i))) for i, y, x in items)
        for index, attacked, seconds in run_rounds(procedures, self.device, len(items)):
            yield {"index": index, **asdict(attacked), "seconds": seconds}
