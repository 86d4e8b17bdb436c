"""Training a base classifier for the smoothing it will be certified under."""

import inspect
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import Threat
from gsmooth_lightning.train import NoiseAugmentation


class ClassifierModule(pl.LightningModule):
    """Trains `smoothed.base` with an objective; validates it at one draw of the smoothing, whatever the objective.

    Args:
        smoothed: transformation, preprocessing and laws that the network is trained under.
        threat: prepares the inputs (enlargement, saved format).
        objective: (smoothed, x, y, epoch) -> (loss, logits), e.g. `train.NoiseAugmentation`.
        optimizer: parameters -> optimizer.
        scheduler: (optimizer) -> learning-rate schedule, or None; one that takes `total_steps` is told.
        interval: "step" or "epoch": when the schedule moves on.
        total_steps: of the optimizer, in the whole training.
    """

    def __init__(
        self,
        smoothed: SmoothedClassifier,
        threat: Threat,
        objective: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        interval: str = "step",
        total_steps: int = 1,
    ):
        super().__init__()
        self.smoothed, self.threat, self.objective = smoothed, threat, objective
        self.optimizer, self.scheduler = optimizer, scheduler
        self.interval, self.total_steps = interval, total_steps
        self.validation = NoiseAugmentation()

    def _step(self, objective: nn.Module, batch: tuple[Tensor, Tensor, Tensor], stage: str) -> Tensor:
        x, y, _ = batch
        loss, logits = objective(self.smoothed, self.threat.prepare(x), y, self.current_epoch)
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
        return self._step(self.objective, batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self._step(self.validation, batch, "val")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and schedule, as Lightning takes them."""
        optimizer = self.optimizer(self.smoothed.base.parameters())
        if self.scheduler is None:
            return optimizer
        told = "total_steps" in inspect.signature(self.scheduler).parameters
        schedule = self.scheduler(optimizer, **({"total_steps": self.total_steps} if told else {}))
        return [optimizer], [{"scheduler": schedule, "interval": self.interval}]  # type: ignore[return-value]
