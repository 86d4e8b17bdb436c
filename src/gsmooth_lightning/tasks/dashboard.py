"""What commands hand to a Weights & Biases dashboard, where they have one: logger=wandb."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, WandbLogger

from gsmooth_lightning.certify.store import digest, read_identity
from gsmooth_lightning.model import file_hash
from gsmooth_lightning.tasks.launch import MOVABLE, first_process


def start_logger(cfg: DictConfig, folder: Path, command: str) -> Logger:
    """The configured logger, into a folder. A wandb run has the command as its kind, the experiment as its group (what
    its runs have in common), and the configuration."""
    if not cfg.logger._target_.endswith("wandb.logger"):
        return instantiate(cfg.logger, save_dir=str(folder))
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    group = choices.get("experiment") or choices.get("data")
    logger = instantiate(cfg.logger, save_dir=str(folder), job_type=command, group=group)
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    return logger


def close_logger(logger: Logger | None) -> None:
    """Ends a wandb run; the next command in this process starts its own."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()


def used_files(cfg: DictConfig) -> list[tuple[str, str]]:
    """Artifacts that a run was made from, (name, type): files of weights by their hashes, and bounds."""
    found = [(weights_name(cfg[option]), "checkpoint") for option in MOVABLE if cfg.get(option) is not None]
    if cfg.get("bounds") is not None:
        found.append((store_name(cfg.bounds), "store"))
    return found


def weights_name(file: str | Path) -> str:
    return f"checkpoint-{file_hash(file)[:10]}"


def store_name(folder: str | Path) -> str:
    return f"store-{digest(read_identity(folder))}"


def log_weights(logger: Logger | None, cfg: DictConfig, file: Path) -> None:
    """The file that a training made, as an artifact."""
    if isinstance(logger, WandbLogger) and first_process():
        from gsmooth_lightning.report.wandb import link  # wandb takes a second to import

        link(logger, (weights_name(file), "checkpoint", file), used_files(cfg))


def log_store(logger: Logger | None, cfg: DictConfig, folder: Path, shown: str, *content: Any) -> None:
    """What the function `shown` of report.wandb shows of a store, and the store as an artifact."""
    if isinstance(logger, WandbLogger) and first_process():
        from gsmooth_lightning.report import wandb

        getattr(wandb, shown)(logger, *content)
        wandb.link(logger, (store_name(folder), "store", folder), used_files(cfg))


def log_table(
    cfg: DictConfig, command: str, stores: Sequence[Path], folder: Path, columns: Mapping[str, Mapping[str, str]],
    figures: Mapping[str, Figure],
) -> None:  # fmt: skip
    """A report of stores in a run of its own, as an artifact made from them."""
    if cfg.logger is None:
        return
    logger = start_logger(cfg, folder, command)
    if isinstance(logger, WandbLogger):
        from gsmooth_lightning.report.wandb import link, log_report

        log_report(logger, columns, figures)
        names: list[Any] = [(store_name(store), "store") for store in stores if store.is_dir()]
        link(logger, (f"report-{digest({name: 0 for name, _ in names})}", "report", folder), names)
    close_logger(logger)
