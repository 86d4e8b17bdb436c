"""What a user sees while something runs."""

import time
from datetime import timedelta

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from tqdm.auto import tqdm

from gsmooth_lightning.certify.heartbeat import Heartbeat, heartbeats, in_time, longest


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


class ImageProgress:
    """A bar of the images that all processes have finished, and the time that the slowest of them still needs.

    Args:
        own: the heartbeat of this process.
        shown: whether there is a bar at all.
    """

    def __init__(self, own: Heartbeat, shown: bool):
        self.own = own
        self.bar = tqdm(
            total=own.todo, unit="image", disable=not shown, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
        )

    def show(self) -> None:
        if self.bar.disable:
            return
        beats = [self.own] + [b for b in heartbeats(self.own.folder) if b.rank != self.own.rank]
        self.bar.total, self.bar.n = sum(b.todo for b in beats), sum(b.done for b in beats)
        self.bar.set_postfix_str(f"left {in_time(longest(beats))}")
