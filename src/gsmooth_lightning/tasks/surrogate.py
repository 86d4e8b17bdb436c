"""`gsmooth surrogate`: a network that imitates the threat's transformation, for smoothing in its latent space."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import SurrogateModule
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import data_module
from gsmooth_lightning.tasks.train import fit_and_show, training_identity
from gsmooth_lightning.threat import TransformationThreat


def surrogate(cfg: DictConfig) -> Path:
    """Trains a surrogate and returns its file; beside it surrogate.md and surrogate.png, how well it imitates."""
    if cfg.checkpoint is not None or cfg.surrogate is not None:
        raise RequestError("a surrogate is trained from new weights; leave checkpoint and surrogate out")
    threat = instantiate(cfg.threat)
    if not isinstance(threat, TransformationThreat):
        raise RequestError("a surrogate imitates a transformation; use threat=zoom_blur or another one")
    identity = training_identity(cfg, "surrogate", ("data", "threat", "seed", "network", "imitation", "train"))

    def module(*optimization: Any) -> SurrogateModule:
        transform = threat.transform
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            try:
                network = instantiate(cfg.network)(transform.name, transform.units, threat.lows, threat.highs)
            except TypeError as failure:
                raise RequestError(f"network: {failure}; correct the options of network") from failure
        network.encoder(threat.prepare(data_module(cfg).split("val")[0][0][None]))  # refuses another size
        return SurrogateModule(network, threat, instantiate(cfg.imitation), *optimization)

    return fit_and_show(cfg, identity, module, "surrogate.ckpt")


def main() -> None:
    command("surrogate", surrogate)


if __name__ == "__main__":
    main()
