"""An inference-optimised copy of a network. The copy is what is certified and what later predicts."""

import copy
import shutil
import warnings

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model.black_box import BlackBox, is_black_box

BACKENDS = ("auto", "compile", "fx", "plain")
TOLERANCE = 1e-4


def fused(network: nn.Module, example: Tensor, backend: str = "auto") -> tuple[nn.Module, str]:
    """(the network optimised for blocks shaped like `example`, the backend used).

    "compile": torch.compile with frozen weights; needs a C++ compiler (g++) on the CPU. "fx": convolutions with batch
    normalisation folded in, channels-last. "plain": the network itself. "auto": the first of these that works, with a
    warning when it is not "compile". A black box is left as it is, and one network before it optimised.

    Raises:
        RequestError: unknown backend, a network that fails on the example, or logits that differ by more than 1e-4 (of
            the largest logit, if above 1) from the plain network's.
    """
    if backend not in BACKENDS:
        raise RequestError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if is_black_box(network):
        check_runs(network, example)
        if not (type(network) is nn.Sequential and len(network) == 2 and isinstance(network[1], BlackBox)):
            return network, "plain"
        denoiser, used = fused(network[0], example, backend)
        return nn.Sequential(denoiser, network[1]).eval(), used
    network = copy.deepcopy(network).eval().requires_grad_(False)
    check_runs(network, example)
    choices = {"auto": BACKENDS[1:-1], "plain": ()}.get(backend, (backend,))
    for choice in choices:
        try:
            fast = _build(network, example, choice).eval()
            difference = _difference(network, fast, example)
        except Exception as failure:  # compilers fail in many ways; the next choice is slower but equal
            if backend != "auto":
                raise RequestError(
                    f"backend {choice!r} failed on this network ({type(failure).__name__}: "
                    f"{str(failure).splitlines()[0][:200] if str(failure) else ''}); use backend=auto"
                ) from failure
            warnings.warn(f"backend {choice!r} is not available here ({type(failure).__name__}); slower", stacklevel=2)
            continue
        if difference > TOLERANCE:
            raise RequestError(f"backend {choice!r} changes logits by {difference:.1e}; use backend=plain")
        return fast, choice
    return network, "plain"


def check_runs(network: nn.Module, example: Tensor) -> None:
    """Refuses a network that fails on inputs like the example, (n, ...).

    Raises:
        RequestError: it does.
    """
    try:
        with torch.inference_mode():
            network(example)
    except RuntimeError as failure:
        raise RequestError(
            f"the network fails on inputs of shape {tuple(example.shape[1:])} ({str(failure).splitlines()[0]}); check "
            "model against data and preprocess"
        ) from failure


def _build(network: nn.Module, example: Tensor, backend: str) -> nn.Module:
    if backend == "compile":
        if example.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise RuntimeError("no C++ compiler")
        return Compiled(network, example)
    return ChannelsLast(fuse(network))


class Compiled(nn.Module):
    """torch.compile with frozen weights, for one shape of input, one thread and inference mode.

    torch.compile compiles anew when any of these change, and compiling frozen weights a second time crashes the process
    (torch 2.11): so every call is brought to the same form.
    """

    def __init__(self, network: nn.Module, example: Tensor):
        super().__init__()
        self.shape = example.shape
        self.compiled = torch.compile(network, dynamic=False, fullgraph=True)
        self.eval()
        # as an option of torch.compile, freezing comes too late to pack the weights and is two times slower
        with torch._inductor.config.patch(freezing=True):
            self(example)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        if x.shape != self.shape:
            raise RequestError(f"this network was compiled for blocks of {tuple(self.shape)}, not {tuple(x.shape)}")
        x = x.contiguous() if x.is_inference() else x.clone(memory_format=torch.contiguous_format)
        threads = torch.get_num_threads()
        if x.device.type == "cpu" and threads > 1:
            torch.set_num_threads(1)
        try:
            return self.compiled(x)
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


class ChannelsLast(nn.Module):
    """Runs a network in the channels-last layout."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)


def _difference(network: nn.Module, fast: nn.Module, example: Tensor) -> float:
    with torch.inference_mode():
        plain, other = network(example), fast(example)
    return float((plain - other).abs().max() / plain.abs().max().clamp_min(1))
