"""What a user sees while something runs."""

import time
from datetime import timedelta

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar


class TrainingProgress(TQDMProgressBar):
    """Lightning's progress bar, with the time that all epochs together still take as `left`."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin, self._done = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        steps = trainer.global_step - self._done
        if steps:
            rest = (time.monotonic() - self._begin) / steps * (trainer.estimated_stepping_batches - trainer.global_step)
            metrics["left"] = str(timedelta(seconds=round(rest)))
        return metrics
