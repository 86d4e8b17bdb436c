"""A command at work: its store, its processes, and what they tell each other."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import WandbLogger

from gsmooth_lightning.certify.heartbeat import Heartbeat
from gsmooth_lightning.certify.store import Record, Store, read
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ImageDataModule
from gsmooth_lightning.lit.callbacks import ImageProgress
from gsmooth_lightning.lit.certification import StoredPrediction
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.tasks.dashboard import close_logger, start_logger
from gsmooth_lightning.threat import Threat


@dataclass
class Run:
    """One command's run: its parts, its folder and its identity."""

    cfg: DictConfig
    folder: Path
    identity: dict[str, Any]
    smoothed: SmoothedClassifier
    threat: Threat
    data: ImageDataModule
    trainer: pl.Trainer

    @contextlib.contextmanager
    def store(self) -> Iterator[Store]:
        """The store of this run, opened or resumed; `predict` then visits what is left of its images."""
        with open_store(self.cfg, self.folder, self.identity, self.trainer) as store:
            self.data.done = store.done
            yield store

    def predict(self, module: StoredPrediction) -> list[Record]:
        """Works on what is left of the images, shared out between the processes (`shard`); returns the records of the
        finished store. On the first process alone what follows is worth printing.

        Raises:
            KeyboardInterrupt: a process was told to end (SIGTERM); what it had begun is in the store.
            RequestError: another process has ended early.
        """
        trainer, share_images = self.trainer, self.cfg.shard == "images"
        module.share_draws = not share_images
        if share_images:
            self.data.rank, self.data.world = trainer.global_rank, trainer.world_size
        todo = len(self.data.todo) if share_images or trainer.is_global_zero else 0
        heartbeat = Heartbeat(module.store.folder, trainer.global_rank, trainer.world_size, todo)
        progress = ImageProgress(heartbeat, self.cfg.trainer.enable_progress_bar and trainer.is_global_zero)
        live: Callable[[Record], None] | None = None
        if isinstance(trainer.logger, WandbLogger) and trainer.is_global_zero:
            from gsmooth_lightning.report.wandb import Live  # wandb takes a second to import

            live = Live(trainer.logger, self.threat, read(self.folder))

        def watch(record: Record) -> None:
            heartbeat.finished(record["seconds"])
            progress.show()
            if live is not None:
                live(record)

        module.pulse, module.watch = heartbeat.beat, watch
        with ended(heartbeat), others_alive(trainer):
            with module.preemptible(), progress.bar:
                heartbeat.write()
                trainer.predict(module, self.data, return_predictions=False)
                if any_of(trainer, module.preempted):
                    raise KeyboardInterrupt
            missing = set(self.data.visited.indices) - {record["index"] for record in read(self.folder)}
            if any_of(trainer, bool(missing)):
                raise RequestError(
                    f"{self.folder} is not whole: processes differ in device, versions or backend, or an earlier start "
                    "was still at work; use machines and backend=... alike, and run the same command again"
                )
            records = module.store.finish() if trainer.is_global_zero else []
            any_of(trainer, False)  # the store is whole from here on
        return records or read(self.folder)


def any_of(trainer: pl.Trainer, flag: bool) -> bool:
    """Whether the flag is set on any process; waits for all of them."""
    if trainer.world_size == 1:
        return flag
    found = torch.tensor(int(flag), device=trainer.strategy.root_device)
    dist.all_reduce(found)
    return bool(found)


@contextlib.contextmanager
def ended(heartbeat: Heartbeat) -> Iterator[None]:
    """Lets the heartbeat say so when what is within fails."""
    try:
        yield
    except BaseException:
        heartbeat.end()
        raise


@contextlib.contextmanager
def others_alive(trainer: pl.Trainer) -> Iterator[None]:
    """Turns what gloo and NCCL say of processes that are gone into the user's sentence."""
    try:
        yield
    except RuntimeError as failure:
        reason = str(failure).splitlines()[0]
        if trainer.world_size == 1 or not any(word in reason for word in ("gloo", "NCCL", "onnection")):
            raise
        raise RequestError(
            f"another process of this run has ended ({reason}); finished images are kept: run the same command again"
        ) from failure


@contextlib.contextmanager
def open_store(cfg: DictConfig, folder: Path, identity: dict[str, Any], trainer: pl.Trainer) -> Iterator[Store]:
    """A store, with the trainer logging into its folder; the log is closed at the end."""
    settings = OmegaConf.to_yaml(cfg, resolve=True)
    store = Store(folder, identity, settings, trainer.global_rank, trainer.world_size)
    if cfg.logger is not None:
        trainer.logger = start_logger(cfg, folder, identity["command"])
    try:
        yield store
    finally:
        close_logger(trainer.logger)
