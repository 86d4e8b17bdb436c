"""`gsmooth train`: a base classifier for the smoothing it will be certified under."""

import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.lit import ClassifierModule, ImageDataModule, OptimizedModule, TrainingProgress
from gsmooth_lightning.model import load_weights
from gsmooth_lightning.model.fused import check_runs
from gsmooth_lightning.report.tables import markdown
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.tasks.dashboard import log_weights
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.run import open_store
from gsmooth_lightning.tasks.setup import (
    CLASSIFIER,
    check_numbers,
    data_module,
    file_hash_of,
    identity_of,
    make_trainer,
    plain,
    run_folder,
    seeded_network,
    smoothed_classifier,
    versions,
)
from gsmooth_lightning.threat import Threat

FOR_TRAINER = ("precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
"""Options of Lightning's trainer that change the weights: they stand in `train` and count for a run's identity."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)

RESUME, BEST = "resume", "best"
"""Checkpoints that a running training keeps: its last epoch's end, and the lowest validation loss."""


def train(cfg: DictConfig) -> Path:
    """Trains and returns the checkpoint; an interrupted run goes on, and a finished one is not repeated.

    With `checkpoint` the network starts from those weights.
    """
    if cfg.denoiser is not None:
        raise RequestError("train is for the classifier alone; leave denoiser out, and train that by `gsmooth denoise`")
    identity = training_identity(cfg, "train", (*CLASSIFIER, "objective", "train"))
    identity["start"] = None if cfg.checkpoint is None else file_hash_of(cfg.checkpoint, "checkpoint")

    def module(*optimization: Any) -> ClassifierModule:
        network = seeded_network(cfg)
        if cfg.checkpoint is not None:
            load_weights(network, cfg.checkpoint)
        smoothed, threat = smoothed_classifier(cfg, network), instantiate(cfg.threat)
        if not any(weight.requires_grad for weight in network.parameters()):
            raise RequestError("this network has no weights to train; certify it as it is, or choose another model")
        check_fits(smoothed_classifier(cfg, seeded_network(cfg)), threat, data_module(cfg))
        return ClassifierModule(smoothed, threat, instantiate(cfg.objective), *optimization)

    return fit(cfg, identity, module, "classifier.ckpt")


def training_identity(cfg: DictConfig, command: str, groups: tuple[str, ...]) -> dict[str, Any]:
    """What a training's result depends on, files of weights apart."""
    own = {"command": command, "augment": plain(cfg.data.augment), "versions": versions()}
    return identity_of(cfg, groups) | own


def fit(cfg: DictConfig, identity: dict[str, Any], make: Callable[..., OptimizedModule], name: str) -> Path:
    """Trains what `make(optimizer, scheduler, interval, total_steps)` returns and saves it as a file of that name in
    the run's folder, which it returns; goes on where the same run was interrupted, and repeats no finished one."""
    check_numbers(cfg)
    check_training(cfg)
    keepers, options = keep_checkpoints(cfg), {key: cfg.train[key] for key in FOR_TRAINER}
    trainer = make_trainer(cfg, max_epochs=cfg.train.epochs, callbacks=[*keepers, *callbacks(cfg)], **options)
    data = data_module(cfg)
    if trainer.world_size > 1:
        if identity["command"] != "train":
            raise RequestError(f"gsmooth {identity['command']} learns on one device; use devices=1")
        data.rank, data.world = trainer.global_rank, trainer.world_size
        identity |= {"processes": trainer.world_size}  # they change the weights
    folder = run_folder(cfg, identity["command"], identity)
    checkpoint = folder / name
    for keeper in keepers:
        keeper.dirpath = str(folder)
    batches = min(len(data.train_dataloader()), cfg.train.limit_train_batches or math.inf)
    module = make(
        instantiate(cfg.train.optimizer),
        instantiate(cfg.train.scheduler),
        cfg.train.interval,
        math.ceil(batches / cfg.train.accumulate_grad_batches) * cfg.train.epochs,
    )
    check_optimisation(module)
    data.split("val")  # a missing file is reported before a folder is made
    with open_store(cfg, folder, identity, trainer):
        if checkpoint.exists():
            print(f"already trained: {checkpoint}")
            return checkpoint
        last = folder / f"{RESUME}.ckpt"
        with writing(folder):
            trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
        best = folder / f"{BEST}.ckpt"
        if best.exists():
            kept = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            module.load_state_dict(kept, strict=module.strict_loading)
        check_finite(module, folder)
        save(trainer, checkpoint)
        if trainer.is_global_zero:
            for temporary in (last, best):
                temporary.unlink(missing_ok=True)
        log_weights(trainer.logger, cfg, checkpoint)
    print(f"trained: {checkpoint}")
    return checkpoint


def fit_and_show(cfg: DictConfig, identity: dict[str, Any], make: Callable[..., Any], name: str) -> Path:
    """`fit`, and then, unless it was done before, a validation of what the file holds: prints the module's `measured`,
    and writes it and `picture()` beside the file."""
    file = fit(cfg, identity, make, name)
    if file.with_suffix(".png").exists():
        return file
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    module = make(instantiate(cfg.train.optimizer)).eval()
    module.load_state_dict(state, strict=module.strict_loading)
    torch.manual_seed(cfg.seed)  # the same table whenever it is measured
    make_trainer(cfg, enable_checkpointing=False).validate(module, data_module(cfg), verbose=False)
    table = markdown(module.measured)
    print(table)
    with writing(file.parent):
        file.with_suffix(".md").write_text(table + "\n")
        module.picture().savefig(file.with_suffix(".png"), dpi=100)
    return file


def check_finite(module: torch.nn.Module, folder: Path) -> None:
    """Refuses weights that became NaN or infinite."""
    if not all(bool(torch.isfinite(value).all()) for value in module.state_dict().values()):
        raise RequestError(
            f"the training diverged: weights are NaN or infinite; delete {folder} and train with a lower learning rate"
        )


def keep_checkpoints(cfg: DictConfig) -> list[ModelCheckpoint]:
    """Checkpoints of a running training (Lightning replaces them whole or not at all)."""
    keep: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": True}
    keepers = [ModelCheckpoint(filename=RESUME, **keep)]
    if cfg.train.patience is not None:
        keepers.append(ModelCheckpoint(filename=BEST, monitor="val/loss", **keep))
    return keepers


def callbacks(cfg: DictConfig) -> list[pl.Callback]:
    """The progress bar, the average of the weights and early stopping, as configured."""
    chosen: list[pl.Callback] = []
    if cfg.trainer.enable_progress_bar:
        chosen.append(TrainingProgress())
    if cfg.train.ema is not None:
        average = get_ema_multi_avg_fn(cfg.train.ema)  # by lerp, which leaves weights that are not trained as they are
        chosen.append(WeightAveraging(multi_avg_fn=average))
    if cfg.train.patience is not None:
        chosen.append(EarlyStopping("val/loss", patience=cfg.train.patience))
    return chosen


def check_training(cfg: DictConfig) -> None:
    """Refuses training options that make no sense, before any work."""
    for key in FOR_TRAINER:
        if key in cfg.trainer:
            raise RequestError(f"trainer.{key} changes the weights; set train.{key} instead")
    ema, interval = cfg.train.ema, cfg.train.interval
    if ema is not None and not (isinstance(ema, float) and 0 < ema < 1):
        raise RequestError(f"train.ema must lie between 0 and 1, or be null, got {ema!r}")
    for name in ("patience", "limit_train_batches"):
        if cfg.train[name] is not None:
            check_whole("train", **{name: (cfg.train[name], 1)})
    if interval not in ("step", "epoch"):
        raise RequestError(f"train.interval must be step or epoch, got {interval!r}")


def check_optimisation(module: OptimizedModule) -> None:
    """Builds the optimizer and the schedule once, so that a wrong option is refused before any work."""
    try:
        module.configure_optimizers()
    except (TypeError, ValueError) as failure:
        raise RequestError(f"train.optimizer or train.scheduler: {failure}; correct their options") from failure


@torch.inference_mode()
def check_fits(smoothed: SmoothedClassifier, threat: Threat, data: ImageDataModule) -> None:
    """Refuses a network that fails on the first input it is trained on or validated on, before a folder is made.

    Args:
        smoothed: the classifier, its network with any weights.
        threat, data: what prepares the inputs, and where they come from.

    Raises:
        RequestError: it fails, or returns no logits of that many classes. Where the inputs have different shapes, it
            says that instead: no network fits them all.
    """
    smoothed.eval()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        inputs = loader.dataset
        try:
            x = smoothed.preprocess(threat.prepare(inputs[0][0][None]))
            check_runs(smoothed.base, x)
            smoothed.outputs(x)
        except RequestError:
            first = range(min(data.batch_size, len(inputs)))  # type: ignore[arg-type]
            loader.collate_fn([inputs[i] for i in first])  # refuses different shapes
            raise


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a full disk into the user's sentence; torch's writer makes a RuntimeError of it."""
    try:
        yield
    except (OSError, RuntimeError) as failure:
        reason = str(failure).partition("\n")[0]
        if getattr(failure, "errno", None) not in UNWRITABLE and "PytorchStreamWriter" not in reason:
            raise
        raise RequestError(
            f"cannot write to {folder} ({reason}); free space, and the same command goes on"
        ) from failure


def save(trainer: pl.Trainer, checkpoint: Path) -> None:
    """Writes the checkpoint whole or not at all."""
    temporary = Path(f"{checkpoint}.tmp")
    with writing(checkpoint.parent):
        try:
            trainer.save_checkpoint(temporary, weights_only=True)
            if trainer.is_global_zero:
                os.replace(temporary, checkpoint)
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)


def main() -> None:
    command("train", train)


if __name__ == "__main__":
    main()
