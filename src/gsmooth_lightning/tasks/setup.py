"""From a configuration to objects, and to what a result depends on."""

import logging
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import scipy
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import MPSAccelerator
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from yaml import YAMLError

from gsmooth_lightning import __version__
from gsmooth_lightning.certify.store import Record, digest, holds
from gsmooth_lightning.data.base import describe_subset
from gsmooth_lightning.errors import RequestError, UncertifiableError, check_whole
from gsmooth_lightning.lit import ImageDataModule
from gsmooth_lightning.model import BlackBox, file_hash, fused, load_weights
from gsmooth_lightning.model.fused import BACKENDS, full_float32
from gsmooth_lightning.smoothed import LEVELS, SAMPLE_LEVELS, SmoothedClassifier
from gsmooth_lightning.smoothing import Latent, Law, learned_noise
from gsmooth_lightning.tasks.run import Run
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import Function
from gsmooth_lightning.transform.surrogate import Decoded, Encoder

CLASSIFIER = ("data", "model", "transform", "preprocess", "law", "noise", "threat", "seed")
"""Groups that decide what the smoothed classifier is and what is done to it."""


def check_numbers(cfg: DictConfig) -> None:
    """Refuses numbers of the wrong kind before anything is read or computed."""
    if cfg.shard not in ("images", "draws"):
        raise RequestError(f"shard must be images or draws, got {cfg.shard!r}")
    check_whole("", seed=(cfg.seed, 0), block=(cfg.block, 2))
    check_whole("images", every=(cfg.images.every, 1), in_flight=(cfg.images.in_flight, 1))
    check_whole("train", **{name: (cfg.train[name], 1) for name in ("epochs", "batch_size", "accumulate_grad_batches")})
    if cfg.images.first is not None:
        check_whole("images", first=(cfg.images.first, 1))
    if cfg.data.workers is not None:
        check_whole("data", workers=(cfg.data.workers, 0))


def seeded_network(cfg: DictConfig) -> nn.Module:
    """The base network, with initial weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return instantiate(cfg.model)


def trained_network(cfg: DictConfig, command: str) -> nn.Module:
    """The base network with its weights, behind its denoiser if there is one.

    Raises:
        RequestError: weights without a file, or a file of a denoiser without one.
    """
    check_denoiser(cfg)
    network = seeded_network(cfg)
    if cfg.checkpoint is not None:
        load_weights(network, cfg.checkpoint)
    elif network.state_dict():
        raise RequestError(f"{command} needs a trained network; give checkpoint=FILE, written by `gsmooth train`")
    if cfg.denoiser is None:
        return network
    denoiser = instantiate(cfg.denoiser)
    load_weights(denoiser, cfg.denoiser_checkpoint, "denoiser_checkpoint")
    return nn.Sequential(denoiser, network)


def check_denoiser(cfg: DictConfig) -> None:
    """Refuses a denoiser without a file of weights, and a file without a denoiser."""
    if cfg.denoiser is None and cfg.denoiser_checkpoint is not None:
        raise RequestError("denoiser_checkpoint belongs to a denoiser; give denoiser=dncnn or denoiser=unet")
    if cfg.denoiser is not None and cfg.denoiser_checkpoint is None:
        raise RequestError("a denoiser needs its weights; give denoiser_checkpoint=FILE, written by `gsmooth denoise`")


def weights(cfg: DictConfig) -> dict[str, Any]:
    """What a run's identity holds of the network's weights, and of its denoiser if it has one.

    Raises:
        RequestError: a file that is not there, or a denoiser without one.
    """
    found: dict[str, Any] = {"checkpoint": file_hash_of(cfg.checkpoint, "checkpoint") if cfg.checkpoint else None}
    if cfg.denoiser is not None:
        check_denoiser(cfg)
        made = file_hash_of(cfg.denoiser_checkpoint, "denoiser_checkpoint")
        found["denoiser"] = {"network": plain(cfg.denoiser), "checkpoint": made}
    return found


def drawn(cfg: DictConfig) -> tuple[Any, Any]:
    """The transformation that the classifier draws, and its law: what has no law is not drawn, but certify=cover visits
    it. A composition's law=product may have parts that are null."""
    transform, law = cfg.transform, cfg.law
    if law is None:
        return None, None
    if "parts" in transform and "parts" in law and len(law.parts) == len(transform.parts):
        own = [(part, of) for part, of in zip(transform.parts, law.parts, strict=True) if of is not None]
        if len(own) == 1:
            return instantiate(own[0][0]), instantiate(own[0][1])
    return instantiate(transform), instantiate(law)


def pixel_noise(cfg: DictConfig) -> Law | None:
    """The law of the pixel noise: the learned one, where a file of it is named."""
    return instantiate(cfg.noise) if cfg.learned is None else learned_noise(cfg.learned)


def smoothed_classifier(cfg: DictConfig, network: nn.Module) -> SmoothedClassifier:
    """The classifier around a base network, or around nothing (Identity), for a bound that asks none.

    Raises:
        RequestError: a part of a surrogate without the others.
        UncertifiableError: a law of what latent noise draws already.
    """
    transform, law = drawn(cfg)
    preprocess, noise = instantiate(cfg.preprocess), pixel_noise(cfg)
    coded, alone = isinstance(preprocess, Encoder), isinstance(network, nn.Identity)
    if (isinstance(noise, Latent) and not coded) or (not alone and isinstance(network, Decoded) != coded):
        raise RequestError(
            "model=latent and preprocess=latent go together, with noise=latent; use all of them, or none"
        )
    if isinstance(noise, Latent) and law is not None:
        raise UncertifiableError(
            f"noise=latent smooths the parameters, and {transform.name} would be drawn beside it; use law=none"
        )
    return SmoothedClassifier(
        network,
        cfg.data.classes,
        transform,
        preprocess,
        law,
        noise,
        cfg.block,
        SAMPLE_LEVELS if cfg.data.saved == "16bit" else LEVELS,
        cfg.votes,
    )


def data_module(cfg: DictConfig) -> ImageDataModule:
    images = dict(cfg.images)
    split = images.pop("split")
    if split not in ("train", "val", "test"):
        raise RequestError(f"images.split must be train, val or test, got {split!r}")
    source, augment = instantiate(cfg.data.dataset), instantiate(cfg.data.augment)
    size = cfg.train.batch_size
    try:
        return ImageDataModule(
            source, cfg.data.classes, size, augment, cfg.data.workers, split, **images, seed=cfg.seed
        )
    except TypeError as failure:
        raise RequestError(f"images: {failure}; correct the options of images") from failure


def make_trainer(cfg: DictConfig, **options: Any) -> pl.Trainer:
    """The Lightning trainer, without a logger so far (see `open_store`).

    Raises:
        RequestError: several devices without trainer=ddp, or in a sweep whose launcher does not start them; an Apple
            GPU, which has no float64 and is never chosen by itself.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # no advertisements between a user and a table
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if cfg.trainer.get("accelerator") == "auto" and MPSAccelerator.is_available():
        options["accelerator"] = "cpu"
    try:
        trainer = instantiate(cfg.trainer, logger=False, **options)
    except InstantiationException as failure:
        raise RequestError(
            f"trainer: {str(failure.__cause__).splitlines()[0]}; correct trainer or devices"
        ) from failure
    if trainer.strategy.root_device.type == "mps":
        raise RequestError("an Apple GPU has no float64, in which draws and bounds are computed; use trainer=cpu")
    if trainer.world_size == 1:
        return trainer
    if not isinstance(trainer.strategy, DDPStrategy) or "strategy" not in cfg.trainer:
        raise RequestError("several devices are for trainer=ddp; add it, or use devices=1")
    sweep = HydraConfig.get() if HydraConfig.initialized() else None
    if sweep and sweep.mode == RunMode.MULTIRUN and not sweep.launcher._target_.endswith("SlurmLauncher"):
        raise RequestError(
            "a sweep starts one process a job, unless its launcher starts more; use launcher=slurm, or devices=1"
        )
    return trainer


def settings_of(folder: str | Path) -> DictConfig:
    """The configuration that a store was made with. Stores hold values: what was ${surrogate} follows it again.

    Raises:
        RequestError: the store has none that can be read.
    """
    try:
        made = plain(OmegaConf.load(Path(folder) / "config.yaml"))
        if not isinstance(made, dict):
            raise YAMLError("no mapping")
    except (OSError, YAMLError) as failure:
        raise RequestError(f"{folder} has no readable config.yaml; name the folder that a run printed") from failure
    if made.get("surrogate"):
        made = replaced(made, made["surrogate"], "${surrogate}") | {"surrogate": made["surrogate"]}
    return cast(DictConfig, OmegaConf.create(made))


def replaced(node: Any, old: Any, new: Any) -> Any:
    """Nested dictionaries and lists with one value in place of another."""
    if isinstance(node, dict):
        return {key: replaced(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [replaced(value, old, new) for value in node]
    return new if node == old else node


def plain(node: Any) -> Any:
    """A configuration node as plain Python."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def versions() -> dict[str, str]:
    return {
        "gsmooth": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "machine": platform.machine(),
    }


def identity_of(cfg: DictConfig, groups: tuple[str, ...]) -> dict[str, Any]:
    """The groups as they decide results: where files lie does not count (their content does), nor how they are read;
    augmentation counts for training alone."""
    if cfg.surrogate is not None:
        cfg = cfg.copy()
        cfg.surrogate = file_hash_of(cfg.surrogate, "surrogate")
    identity = {key: plain(cfg[key]) for key in groups}
    if cfg.learned is not None and "noise" in groups:
        identity["noise"] = file_hash_of(cfg.learned, "learned")
    if "data" in groups:
        for reading in ("workers", "augment"):
            identity["data"].pop(reading)
        for place in ("root", "download"):
            identity["data"]["dataset"].pop(place, None)
    return identity


def file_hash_of(file: str, option: str) -> str:
    """Hash of a file that an option names.

    Raises:
        RequestError: there is none.
    """
    if not Path(str(file)).is_file():
        raise RequestError(f"there is no file {file}; correct {option}=..., or leave it out")
    return file_hash(file)


LIBRARIES = ("gsmooth_lightning", "torch", "torchvision", "torchaudio", "timm")
"""Packages whose versions or names a run's identity holds."""


def own_code(cfg: DictConfig, threat: Threat, classifier: nn.Module) -> dict[str, dict[str, str]]:
    """Hashes of the user's own Python files that decide results: of all parts of the smoothed classifier (networks,
    black boxes, steps of preprocessing), of functions that are certified, of theorems, error bounds and plans."""
    parts = list(classifier.modules())
    if isinstance(threat, TransformationThreat):
        parts += threat.transform.modules()
    used: list[Any] = [type(part) for part in parts]
    used += [own for part in parts if isinstance(part, Function) for own in (part.function, part.bound) if own]
    used += [part.function for part in parts if isinstance(part, BlackBox)]
    for name in targets([plain(cfg.get(group)) for group in ("certify", "error")]):
        try:
            used.append(get_object(name))
        except ImportError as failure:
            raise RequestError(f"there is no {name} to import here; correct _target_ of certify or error") from failure
    names = {getattr(unwrapped(own), "__module__", "") for own in used}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    own = {
        name: file_hash(file) for name, file in sorted(files.items()) if file and name.split(".")[0] not in LIBRARIES
    }
    return {"own code": own} if own else {}


def targets(node: Any) -> list[str]:
    """What nested dictionaries and lists name as _target_."""
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + targets(list(node.values()))
    return [name for part in node for name in targets(part)] if isinstance(node, list) else []


def unwrapped(function: Any) -> Any:
    """The function inside functools.partial, or inside what Hydra wraps it in."""
    while hasattr(function, "func"):
        function = function.func
    return function


def run_folder(cfg: DictConfig, command: str, identity: dict[str, Any]) -> Path:
    """Where results go: store=..., or a folder named after what they depend on."""
    return Path(
        cfg.store or f"runs/{command}-{cfg.data.dataset._target_.rsplit('.', 1)[-1].lower()}-{digest(identity)}"
    )


def calibration_images(cfg: DictConfig) -> DictConfig:
    """The configuration with the images on which a bound for the distribution is calibrated: drawn at random from the
    training split.

    Raises:
        RequestError: there are fewer.
    """
    wanted, total = cfg.error.calibration, len(data_module(cfg).split("train"))
    if wanted > total:
        raise RequestError(f"error.calibration must be at most the {total} training images, got {wanted}")
    chosen = sorted(np.random.default_rng(cfg.seed).permutation(total)[:wanted].tolist())
    images = {"split": "train", "first": None, "every": 1, "indices": chosen}
    return cast(DictConfig, OmegaConf.merge(cfg, {"images": images}))


def voting(
    cfg: DictConfig, network: nn.Module, threat: Threat, x: Tensor, done: Callable[[dict[str, Any]], bool] | None = None
) -> tuple[SmoothedClassifier, dict[str, Any]]:
    """The smoothed classifier on the device of a prepared input x, (c, h, w), its network optimised for blocks of
    such inputs; and what of a run's identity it decides.

    done: whether a run of that identity has nothing left to do: its network is not optimised (compiling takes longer
    than all the rest of a run that is finished).
    """
    smoothed = smoothed_classifier(cfg, network.to(x.device)).to(x.device)
    shape = smoothed.encoded_shape(x)
    if cfg.learned is not None and smoothed.noise is not None:
        smoothed.noise.gauge(torch.zeros(1, *shape, device=x.device))  # refuses that of other images
    with torch.inference_mode():
        example = torch.rand(cfg.block, *shape, device=x.device)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(cfg.dtype)
    if dtype is None:
        raise RequestError(f"dtype must be float32, float16 or bfloat16, got {cfg.dtype!r}")
    own = {
        **identity_of(cfg, CLASSIFIER),
        **weights(cfg),
        **machine(cfg, x.device),
        **own_code(cfg, threat, smoothed),
    }
    kind = "" if dtype == torch.float32 else f" {cfg.dtype}"
    for backend in BACKENDS[1:] if cfg.backend == "auto" else (cfg.backend,):
        if done is not None and done(own | {"backend": backend + kind}):
            smoothed.base = network.eval()
            return smoothed, own | {"backend": backend + kind}
    smoothed.base, backend = fused(network, example, cfg.backend, dtype)
    return smoothed, own | {"backend": backend + kind}


def machine(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    """What of a run's identity is about how votes are computed."""
    return {
        "votes": cfg.votes,
        "block": cfg.block,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions(),
    }


def prepare(
    cfg: DictConfig, command: str, groups: tuple[str, ...], with_network: bool = True, to_sample: bool = False
) -> Run:
    """A run that works on a trained classifier, or on one without a network: an error bound asks none.

    Its identity covers the classifier, the images' split, the given groups, the checkpoint's bytes, the kind of votes,
    the block, the network's backend and the versions; not which or how many images are visited, nor the trainer and the
    logger.

    to_sample: draws are taken even if the run is finished.
    """
    check_numbers(cfg)
    full_float32()
    threat: Threat = instantiate(cfg.threat)
    network: nn.Module = trained_network(cfg, command) if with_network else nn.Identity()
    data = data_module(cfg)
    visited = data.visited  # refuses impossible subsets
    trainer = make_trainer(cfg, enable_checkpointing=False, inference_mode=True, enable_progress_bar=False)
    device = trainer.strategy.root_device
    calibration = None
    if "error" in groups and cfg.error is not None and "calibration" in cfg.error:
        if cfg.images.split == "train" and command != "bound":
            raise RequestError("this error bound calibrates on training images; certify images.split=test or val")
        calibration = data.split("train").content_hash
    rest = {
        "command": command,
        "calibration": calibration,
        **identity_of(cfg, groups),
        "images": f"{cfg.images.split} {data.split(cfg.images.split).content_hash}",
        "source": data.dataset.describe(),
    }
    if with_network:

        def done(own: dict[str, Any]) -> bool:
            return holds(run_folder(cfg, command, own | rest), own | rest, visited.indices)

        x = threat.prepare(visited[0][0][None].to(device))[0]
        smoothed, own = voting(cfg, network, threat, x, None if to_sample else done)
    else:
        smoothed = smoothed_classifier(cfg, network).to(device)
        own = {
            **identity_of(cfg, CLASSIFIER),
            "checkpoint": None,
            **machine(cfg, device),
            "backend": None,
            **own_code(cfg, threat, smoothed),
        }
    identity = own | rest
    return Run(cfg, run_folder(cfg, command, identity), identity, smoothed, threat, data, trainer)


def images_in_words(cfg: DictConfig, records: Sequence[Record] = ()) -> str:
    """The images that a run visits; beside them those that are in its store already."""
    found = [record["index"] for record in records]
    return describe_subset(cfg.images.first, cfg.images.every, cfg.images.indices, cfg.images.split, found)
