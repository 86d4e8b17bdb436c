"""Weights from files, read without executing anything in them."""

import hashlib
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError

WRITTEN = {"checkpoint": ("train", "smoothed.base."), "denoiser_checkpoint": ("denoise", "denoiser.")}
"""Option that names a file of weights -> our command that writes such files, and the prefix of their names in it."""

HOLDERS = ("state_dict", "net", "model")
"""Where checkpoints keep their weights: Lightning's, Cohen's and SmoothAdv's; MACER's; others'."""

NORMALISATION = ("means", "sds", "mean", "std")
"""Names of the statistics that some normalisation layers save."""


def load_weights(network: nn.Module, path: str | Path, option: str = "checkpoint") -> None:
    """Loads weights from a file into the network (`weights_only=True`), as they are:

    checkpoints of `gsmooth train`, plain state dicts, and the layouts of Cohen, SmoothAdv and MACER: a dictionary with
    the weights under one of `HOLDERS`, names with `module.` of a data-parallel wrapper, and the network in second place
    of a sequence behind its normalisation. The normalisation itself is the network's (model.mean, model.std): these
    files do not hold it, and one that does must agree.

    Args:
        network: what they are for.
        path: the file.
        option: names the file (see `WRITTEN`).

    Raises:
        RequestError: no such file, not a checkpoint, NaN weights, another normalisation, or keys or shapes that differ
            (names the first).
    """
    path = Path(str(path))
    command, prefix = WRITTEN[option]
    content = read_checkpoint(path, "checkpoint", command, option)
    state = _weights(content)
    if state is None:
        raise RequestError(f"{path} holds no state dict; save network.state_dict()")
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    expected = network.state_dict()
    state = _without_normalisation(_named_like(state, expected), expected, network, path)
    missing = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    shapes = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or foreign or shapes:
        parts = [
            f"{what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"
            for what, keys in (("lacks", missing), ("has unknown", foreign), ("has other shapes for", shapes))
            if keys
        ]
        if option == "denoiser_checkpoint":
            raise RequestError(
                f"{path} does not fit the denoiser: it {' and '.join(parts)}; give the denoiser's options"
            )
        arch = content.get("arch")
        named = f" (its arch is {arch!r})" if isinstance(arch, str) else ""
        made_for = f"the model it was made for{named}"
        raise RequestError(f"{path} does not fit the network: it {' and '.join(parts)}; choose {made_for}")
    kinds = [key for key in state if state[key].is_floating_point() != expected[key].is_floating_point()]
    if kinds:
        raise RequestError(f"{path} holds {state[kinds[0]].dtype} for {kinds[0]}; save the weights as floating point")
    broken = [key for key, value in state.items() if not torch.isfinite(value.to(expected[key].dtype)).all()]
    if broken:
        raise RequestError(f"{path} holds NaN or infinite weights in {broken[0]}; train again")
    network.load_state_dict(state)


def read_checkpoint(path: str | Path, what: str, command: str, option: str) -> Any:
    """The content of a file that torch wrote, read with weights_only=True.

    Args:
        path: the file.
        what: it holds; command, option: which of our commands writes it, and which option names it: for the message.

    Raises:
        RequestError: no such file, or not one that loads.
    """
    path = Path(str(path))
    if not path.is_file():
        raise RequestError(f"there is no {what} at {path}; train one with `gsmooth {command}`, or correct {option}=...")
    try:
        with warnings.catch_warnings():  # one sentence of ours is enough
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:  # torch's unpickler fails on foreign bytes in many ways
        raise RequestError(f"{path} is not a {what} that loads with weights_only; save a state dict") from failure


def _weights(content: object) -> dict[str, Tensor] | None:
    """The state dict in a file's content."""
    if not isinstance(content, dict):
        return None
    state = next((content[holder] for holder in HOLDERS if isinstance(content.get(holder), dict)), content)
    usual = all(isinstance(key, str) and _is_dense(value) for key, value in state.items())
    return state if state and usual else None


def _is_dense(value: object) -> bool:
    """A tensor with real numbers in it."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_complex())


def _named_like(state: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The weights under the network's names: without wrappers, and in the place where the network keeps its core.

    Of all pairs of a place in the file and a place in the network the first under which every name agrees; without one,
    that with the most names in common, for the message.
    """
    readings = [
        {place + key.removeprefix(inner): value for key, value in state.items()}
        for inner in _places(state)
        for place in _places(expected)
    ]
    readings = [reading for reading in readings if len(reading) == len(state)]  # none overwrites another
    return max(readings, key=lambda reading: (_fits(reading, expected), len(reading.keys() & set(expected))))


def _fits(state: Iterable[str], expected: Collection[str]) -> bool:
    return {key for key in state if key in expected or not _is_statistic(key)} == set(expected)


def _is_statistic(key: str) -> bool:
    return key.split(".")[-1] in NORMALISATION


def _places(keys: Iterable[str]) -> list[str]:
    """Places in sequences and wrappers where all names lie, the normalisation's apart: "", "1.", "1.module.", ..."""
    keys = [key for key in keys if not _is_statistic(key)]
    places = [""]
    while keys:
        heads = {key.removeprefix(places[-1]).split(".")[0] for key in keys}
        head = heads.pop()
        place = f"{places[-1]}{head}."
        if heads or not (head.isdigit() or head == "module") or not all(key.startswith(place) for key in keys):
            break
        places.append(place)
    return places


def _without_normalisation(
    state: dict[str, Tensor], expected: dict[str, Tensor], network: nn.Module, path: Path
) -> dict[str, Tensor]:
    """Drops saved statistics of a normalisation layer after comparing them with the network's own."""
    kept = {}
    own = dict(network.named_buffers())
    for key, value in state.items():
        kind = key.split(".")[-1]
        if key in expected or kind not in NORMALISATION:
            kept[key] = value
            continue
        mine = own.get("0.mean" if kind.startswith("mean") else "0.std")
        if mine is None or mine.numel() != value.numel() or not torch.allclose(mine.flatten(), value.flatten().float()):
            numbers = ", ".join(f"{v:.4g}" for v in value.flatten().tolist())
            raise RequestError(
                f"{path} was trained behind another normalisation: {key} is [{numbers}]; set model.mean and model.std"
            )
    return kept


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
