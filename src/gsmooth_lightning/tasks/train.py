"""`gsmooth train`: a base classifier for the smoothing it will be certified under."""

import os
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ClassifierModule
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import (
    CLASSIFIER,
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
    if cfg.train.epochs < 1:
        raise RequestError(f"train.epochs must be at least 1, got {cfg.train.epochs}")
    identity = {"command": "train", **identity_of(cfg, (*CLASSIFIER, "train")), "versions": versions()}
    folder = run_folder(cfg, "train", identity)
    checkpoint = folder / "classifier.ckpt"
    trainer = make_trainer(cfg, max_epochs=cfg.train.epochs, enable_checkpointing=False)
    data = data_module(cfg)
    module = ClassifierModule(
        smoothed_classifier(cfg, seeded_network(cfg)),
        instantiate(cfg.threat),
        instantiate(cfg.train.objective),
        instantiate(cfg.train.optimizer),
        instantiate(cfg.train.scheduler),
    )
    data.split("train")  # a missing file is reported before a folder is made
    open_store(cfg, folder, identity, trainer)
    if checkpoint.exists():
        print(f"already trained: {checkpoint}")
        return checkpoint
    pl.seed_everything(cfg.seed, verbose=False)
    trainer.fit(module, data)
    trainer.save_checkpoint(f"{checkpoint}.tmp", weights_only=True)
    os.replace(f"{checkpoint}.tmp", checkpoint)
    print(f"trained: {checkpoint}")
    return checkpoint


def main() -> None:
    command("train", train)


if __name__ == "__main__":
    main()
