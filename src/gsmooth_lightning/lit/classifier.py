"""Training a base classifier for the smoothing it will be certified under."""

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import Threat


class ClassifierModule(pl.LightningModule):
    """Trains `smoothed.base` with an objective; logs loss and accuracy at one draw of the smoothing.

    Args:
        smoothed: transformation, preprocessing and laws that the network is trained under.
        threat: prepares the images (enlargement, saved format).
        objective: (smoothed, x, y) -> (loss, logits), e.g. `train.NoiseAugmentation`.
        optimizer: parameters -> optimizer.
        scheduler: (optimizer, total_steps=...) -> learning-rate schedule, stepped every batch; or None.
    """

    def __init__(
        self,
        smoothed: SmoothedClassifier,
        threat: Threat,
        objective: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
    ):
        super().__init__()
        self.smoothed, self.threat, self.objective = smoothed, threat, objective
        self.optimizer, self.scheduler = optimizer, scheduler

    def _step(self, batch: tuple[Tensor, Tensor, Tensor], stage: str) -> Tensor:
        x, y, _ = batch
        loss, logits = self.objective(self.smoothed, self.threat.prepare(x), y)
        accuracy = (logits.argmax(1) == y).float().mean()
        self.log_dict(
            {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(x),
        )
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def configure_optimizers(self):
        optimizer = self.optimizer(self.smoothed.base.parameters())
        if self.scheduler is None:
            return optimizer
        schedule = self.scheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
