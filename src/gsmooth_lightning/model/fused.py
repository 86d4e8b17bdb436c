"""An inference-optimised copy of a network. The copy is what is certified and what later predicts."""

import copy
import shutil
import sys
import warnings

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model.black_box import BlackBox, is_black_box

BACKENDS = ("auto", "compile", "fx", "plain")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""How far logits may move, relative to the largest."""


def fused(
    network: nn.Module, example: Tensor, backend: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, str]:
    """(the network optimised for blocks shaped like `example`, the backend used).

    In another `dtype` than float32 it is another network, which rounds its inputs and weights: certificates are then
    of that one. float32 is all of float32 from here on (see `full_float32`).

    "compile": torch.compile with frozen weights; needs a C++ compiler (g++) on the CPU. "fx": convolutions with batch
    normalisation folded in, channels-last. "plain": the network itself. "auto": the first of these that works, with a
    warning when it is not "compile". A black box is left as it is, and one network before it optimised.

    Raises:
        RequestError: unknown backend, a network that fails on the example, or logits that differ by more than 1e-4 (of
            the largest logit, if above 1; see TOLERANCE) from the plain network's.
    """
    if backend not in BACKENDS:
        raise RequestError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if is_black_box(network):
        if dtype != torch.float32:
            raise RequestError("a black box computes in its own precision; leave dtype out")
        check_runs(network, example)
        if not (type(network) is nn.Sequential and len(network) == 2 and isinstance(network[1], BlackBox)):
            return network, "plain"
        denoiser, used = fused(network[0], example, backend, dtype)
        return nn.Sequential(denoiser, network[1]).eval(), used
    full_float32()
    network = copy.deepcopy(network).eval().requires_grad_(False)
    if dtype != torch.float32:
        network = InDtype(network, dtype)
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
        if difference > TOLERANCE[dtype]:
            raise RequestError(f"backend {choice!r} changes logits by {difference:.1e}; use backend=plain")
        return fast, choice
    return network, "plain"


def full_float32() -> None:
    """In this process, matrix products and convolutions in float32 take all 24 bits of their factors from here on.

    On a GPU torch's convolutions else take 11 (TF32), which moves an optimised network's logits by more than TOLERANCE;
    and matrix products may, where the user or a container asks for it, which error bounds do not allow for.
    """
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]  # else what was set here stays for convolutions
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def check_runs(network: nn.Module, example: Tensor) -> None:
    """Refuses a network that fails on inputs like the example, (n, ...).

    Raises:
        RequestError: it does, or returns no tensor.
    """
    try:
        with torch.inference_mode():
            found = network(example)
    except RequestError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as failure:
        reason = (str(failure) or type(failure).__name__).splitlines()[0]
        raise RequestError(
            f"the network fails on inputs of shape {tuple(example.shape[1:])} ({reason}); check model against data and "
            "preprocess"
        ) from failure
    if not isinstance(found, Tensor):
        raise RequestError(f"the network must return a tensor, not {type(found).__name__}; correct the model")


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
        # a process may compile any number of networks of one class (sweeps, compare); torch stops at the ninth
        many = torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
        # as an option of torch.compile, freezing comes too late to pack the weights and is two times slower;
        # asking the compiler for each kind of vector instructions takes two more processes that import torch; on a
        # GPU, kernels that are chosen by timing them would round otherwise in another process
        on_gpu = example.device.type != "cpu"
        with torch._inductor.config.patch({"freezing": True, "cpp.vec_isa_ok": True, "deterministic": on_gpu}), many:
            self(example)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        if x.shape != self.shape:
            raise RequestError(
                f"this network was compiled for blocks of {tuple(self.shape)}, not {tuple(x.shape)}; use backend=fx "
                "for images of several sizes"
            )
        x = x.contiguous() if x.is_inference() else x.clone(memory_format=torch.contiguous_format)
        threads = torch.get_num_threads()
        if threads > 1:  # on a GPU too: Lightning's launcher of several processes changes them
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


class InDtype(nn.Module):
    """Runs a network in another precision: float32 inputs, (n, ...) -> float32 logits."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(self.dtype)).float()


def described(network: nn.Module) -> str:
    """The form and the precision in which a network computes votes, such as "compile float32"."""
    form = next((form for kind, form in ((Compiled, "compile"), (ChannelsLast, "fx")) if isinstance(network, kind)), "")
    dtypes = [p.dtype for p in network.parameters() if p.is_floating_point()] or [torch.float32]
    return f"{form or 'plain'} {str(dtypes[0]).removeprefix('torch.')}"


def _difference(network: nn.Module, fast: nn.Module, example: Tensor) -> float:
    with torch.inference_mode():
        plain, other = network(example), fast(example)
    return float((plain - other).abs().max() / plain.abs().max().clamp_min(1))
