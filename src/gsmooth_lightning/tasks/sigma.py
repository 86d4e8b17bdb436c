"""`gsmooth sigma`: learns where the noise of a trained classifier may be large."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import SigmaModule
from gsmooth_lightning.model import fused
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import CLASSIFIER, data_module, smoothed_classifier, trained_network, weights
from gsmooth_lightning.tasks.train import fit_and_show, training_identity


def sigma(cfg: DictConfig) -> Path:
    """Learns the noise on training images and returns its file; beside it sigma.md and sigma.png."""
    if cfg.checkpoint is None:
        raise RequestError("sigma needs a trained network; give checkpoint=FILE, written by `gsmooth train`")
    if cfg.noise is None:
        raise RequestError("sigma starts from pixel noise; use noise=gaussian noise.sigma=SIGMA")
    if cfg.learned is not None:
        raise RequestError("sigma starts from noise=gaussian; leave learned out")
    cfg = cfg.copy()
    cfg.train = cfg.learn
    identity = training_identity(cfg, "sigma", (*CLASSIFIER, "scales", "maximise", "train")) | weights(cfg)

    def module(*optimization: Any) -> SigmaModule:
        network = trained_network(cfg, "sigma")
        smoothed, threat = smoothed_classifier(cfg, network), instantiate(cfg.threat)
        maximised = instantiate(cfg.maximise)
        x = threat.prepare(data_module(cfg).split("val")[0][0][None])[0]
        example = smoothed.preprocess(x[None])
        backend = "plain" if cfg.backend == "plain" else "fx"  # compiled networks have no gradient
        smoothed.base, _ = fused(network, example.expand(2, *example.shape[1:]), backend)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            try:
                scales = instantiate(cfg.scales)(smoothed.noise, tuple(example.shape[1:]))
            except TypeError as failure:
                raise RequestError(f"scales: {failure}; correct the options of scales") from failure
        with torch.no_grad():
            smoothed = smoothed.under(scales.law())
        maximised.check(smoothed, threat)
        maximised.votes(smoothed, x[None])  # refuses a network without logits
        return SigmaModule(smoothed, threat, scales, maximised, *optimization)

    return fit_and_show(cfg, identity, module, "sigma.ckpt")


def main() -> None:
    command("sigma", sigma)


if __name__ == "__main__":
    main()
