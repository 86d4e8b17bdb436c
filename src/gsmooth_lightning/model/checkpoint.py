"""Weights from files, read without executing anything in them."""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError

PREFIX = "smoothed.base."
"""Where `ClassifierModule` keeps the base network."""


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint of `gsmooth train`, or a plain state dict, into the network (`weights_only=True`).

    Raises:
        RequestError: no such file, not a checkpoint, NaN weights, or keys or shapes that differ (names the first).
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
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise RequestError(f"{path} holds no state dict; save network.state_dict()")
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    expected = network.state_dict()
    missing = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    shapes = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or foreign or shapes:
        parts = [
            f"{what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"
            for what, keys in (("lacks", missing), ("has unknown", foreign), ("has other shapes for", shapes))
            if keys
        ]
        raise RequestError(
            f"{path} does not fit the network: it {' and '.join(parts)}; choose the model it was made for"
        )
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise RequestError(f"{path} holds NaN or infinite weights in {broken[0]}; train again")
    network.load_state_dict(state)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
