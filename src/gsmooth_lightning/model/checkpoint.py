"""Weights from files, read without executing anything in them."""

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError

PREFIX = "smoothed.base."
"""Where `ClassifierModule` keeps the base network."""

HOLDERS = ("state_dict", "net", "model")
"""Where checkpoints keep their weights: Lightning's, Cohen's and SmoothAdv's; MACER's; robustness-lib's and timm's."""

NORMALISATION = ("means", "sds", "mean", "std")
"""Names of the statistics that some normalisation layers save."""


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Loads weights from a file into the network (`weights_only=True`), as they are:

    checkpoints of `gsmooth train`, plain state dicts, and the layouts of Cohen, SmoothAdv and MACER: a dictionary with
    the weights under one of `HOLDERS`, names with `module.` of a data-parallel wrapper, and the network in second place
    of a sequence behind its normalisation. The normalisation itself is the network's (model.mean, model.std): these
    files do not hold it, and one that does must agree.

    Raises:
        RequestError: no such file, not a checkpoint, NaN weights, another normalisation, or keys or shapes that differ
            (names the first).
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(
            f"there is no checkpoint at {path}; train one with `gsmooth train`, or correct checkpoint=..."
        )
    try:
        with warnings.catch_warnings():  # one sentence of ours is enough
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:  # torch's unpickler fails on foreign bytes in many ways
        raise RequestError(f"{path} is not a checkpoint that loads with weights_only; save a state dict") from failure
    state = _weights(content)
    if state is None:
        raise RequestError(f"{path} holds no state dict; save network.state_dict()")
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
        arch = content.get("arch")
        made_for = f"the model it was made for (its arch is {arch!r})" if arch else "the model it was made for"
        raise RequestError(f"{path} does not fit the network: it {' and '.join(parts)}; choose {made_for}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise RequestError(f"{path} holds NaN or infinite weights in {broken[0]}; train again")
    network.load_state_dict(state)


def _weights(content: object) -> dict[str, Tensor] | None:
    """The state dict in a file's content."""
    if not isinstance(content, dict):
        return None
    state = next((content[holder] for holder in HOLDERS if isinstance(content.get(holder), dict)), content)
    return state if state and all(isinstance(value, Tensor) for value in state.values()) else None


def _named_like(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """The weights under the network's names: without wrappers, and in the place where the network keeps its core."""
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    plain = {".".join(part for part in key.split(".") if part != "module"): value for key, value in state.items()}
    if set(plain) & set(expected):
        return plain
    inner, place = _core(plain), _core(expected)
    return {place + key.removeprefix(inner): value for key, value in plain.items()}


def _core(keys: Iterable[str]) -> str:
    """The place in a sequence where all names of a network lie, such as "1.", the normalisation's apart; or ""."""
    places = {key.split(".")[0] for key in keys if key.split(".")[-1] not in NORMALISATION}
    place = places.pop() if len(places) == 1 else ""
    return f"{place}." if place.isdigit() else ""


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
