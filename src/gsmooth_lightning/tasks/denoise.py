"""`gsmooth denoise`: a denoiser that makes a classifier of clean images one of noisy images."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import DenoiserModule
from gsmooth_lightning.model import load_weights
from gsmooth_lightning.model.fused import check_runs
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import CLASSIFIER, data_module, file_hash_of, seeded_network, smoothed_classifier
from gsmooth_lightning.tasks.train import fit_and_show, training_identity


def denoise(cfg: DictConfig) -> Path:
    """Trains a denoiser and returns its file; beside it denoiser.md and denoiser.png, what it does to images.

    With `checkpoint` its classifier is measured behind it, and denoising=stability asks it; with `denoiser_checkpoint`
    the denoiser starts from those weights.
    """
    if cfg.denoiser is None:
        raise RequestError("there is no denoiser to train; give denoiser=dncnn or denoiser=unet")
    files = {option: cfg[option] for option in ("checkpoint", "denoiser_checkpoint")}
    identity = training_identity(cfg, "denoise", (*CLASSIFIER, "denoiser", "denoising", "train"))
    identity["start"] = {option: file_hash_of(file, option) for option, file in files.items() if file is not None}

    def module(*optimization: Any) -> DenoiserModule:
        classifier: nn.Module = nn.Identity()
        if cfg.checkpoint is not None:
            classifier = seeded_network(cfg)
            load_weights(classifier, cfg.checkpoint)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            denoiser = instantiate(cfg.denoiser)
        if cfg.denoiser_checkpoint is not None:
            load_weights(denoiser, cfg.denoiser_checkpoint, "denoiser_checkpoint")
        smoothed, threat = smoothed_classifier(cfg, classifier), instantiate(cfg.threat)
        made = DenoiserModule(smoothed, threat, denoiser, instantiate(cfg.denoising), *optimization)
        check_shape(made, threat.prepare(data_module(cfg).split("val")[0][0][None]))
        return made

    return fit_and_show(cfg, identity, module, "denoiser.ckpt")


@torch.no_grad()
def check_shape(module: DenoiserModule, x: torch.Tensor) -> None:
    """Refuses a denoiser that does not return inputs like x, (1, ...), or one that its loss cannot train, and a
    classifier that fails on such inputs.

    Raises:
        RequestError: one of them fails, or the denoiser returns others; see also `train.DenoisingStability`.
    """
    clean, denoiser = module.smoothed.preprocess(x), module.denoiser.eval()
    try:
        shape: object = tuple(denoiser(clean).shape)
    except (RuntimeError, ValueError, TypeError) as failure:
        shape = str(failure).splitlines()[0]
    if shape != tuple(clean.shape):
        raise RequestError(
            f"the denoiser must return inputs of shape {tuple(clean.shape[1:])}, and does not ({shape}); "
            "denoiser=dncnn takes images of any size with denoiser.channels, denoiser=unet those whose sides its "
            "levels halve"
        )
    if module.classifier is not None:
        check_runs(module.classifier, clean)
    module.denoising(denoiser, module.classifier, clean, clean)
    denoiser.train()


def main() -> None:
    command("denoise", denoise)


if __name__ == "__main__":
    main()
