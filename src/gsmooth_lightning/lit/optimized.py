"""What is trained, with an optimizer and a schedule."""

import inspect
from abc import abstractmethod
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn


class OptimizedModule(pl.LightningModule):
    """A network under an optimizer and a schedule.

    Args:
        optimizer: parameters -> optimizer.
        scheduler: (optimizer) -> learning-rate schedule, or None; one that takes `total_steps` is told.
        interval: "step" or "epoch": when the schedule moves on.
        total_steps: of the optimizer, in the whole training.
    """

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """What is trained."""

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        interval: str = "step",
        total_steps: int = 1,
    ):
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.interval, self.total_steps = interval, total_steps

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and schedule, as Lightning takes them; weights that are frozen stay so."""
        optimizer = self.optimizer(p for p in self.network.parameters() if p.requires_grad)
        if self.scheduler is None:
            return optimizer
        told = "total_steps" in inspect.signature(self.scheduler).parameters
        schedule = self.scheduler(optimizer, **({"total_steps": self.total_steps} if told else {}))
        return [optimizer], [{"scheduler": schedule, "interval": self.interval}]  # type: ignore[return-value]
