"""`gsmooth train`: a base classifier for the smoothing it will be certified under."""

import os
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ClassifierModule
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import (
    CLASSIFIER,
    check_numbers,
    data_module,
    identity_of,
    make_trainer,
    open_store,
    run_folder,
    seeded_network,
    smoothed_classifier,
    versions,
)


def train(cfg: DictConfig) -> Path:
    """Trains and returns the checkpoint; a run that is finished already is not repeated."""
    check_numbers(cfg)
    identity = {"command": "train", **identity_of(cfg, (*CLASSIFIER, "train")), "versions": versions()}
    folder = run_folder(cfg, "train", identity)
    checkpoint = folder / "classifier.ckpt"
    trainer = make_trainer(cfg, max_epochs=cfg.train.epochs, enable_checkpointing=False)
    data = data_module(cfg)
    network = seeded_network(cfg)
    module = ClassifierModule(
        smoothed_classifier(cfg, network),
        instantiate(cfg.threat),
        instantiate(cfg.train.objective),
        instantiate(cfg.train.optimizer),
        instantiate(cfg.train.scheduler),
    )
    check_optimisation(module, network)
    data.split("train")  # a missing file is reported before a folder is made
    with open_store(cfg, folder, identity, trainer):
        if checkpoint.exists():
            print(f"already trained: {checkpoint}")
            return checkpoint
        pl.seed_everything(cfg.seed, verbose=False)
        trainer.fit(module, data)
        save(trainer, checkpoint)
    print(f"trained: {checkpoint}")
    return checkpoint


def check_optimisation(module: ClassifierModule, network: nn.Module) -> None:
    """Builds the optimizer and the schedule once, so that a wrong option is refused before any work."""
    try:
        optimizer = module.optimizer(network.parameters())
        if module.scheduler is not None:
            module.scheduler(optimizer, total_steps=10)
    except (TypeError, ValueError) as failure:
        raise RequestError(f"train.optimizer or train.scheduler: {failure}; correct their options") from failure


def save(trainer: pl.Trainer, checkpoint: Path) -> None:
    """Writes the checkpoint whole or not at all."""
    temporary = Path(f"{checkpoint}.tmp")
    try:
        trainer.save_checkpoint(temporary, weights_only=True)
        os.replace(temporary, checkpoint)
    except (OSError, RuntimeError) as failure:  # torch's writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(failure).splitlines()[0]
        raise RequestError(f"cannot write {checkpoint} ({reason}); free space and train again") from failure


def main() -> None:
    command("train", train)


if __name__ == "__main__":
    main()
