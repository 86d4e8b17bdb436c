"""A GPU for machines without one: tensors "on cuda" whose numbers lie in main memory.

Every operation is torch's own of the CPU, under the rule of a GPU: tensors that meet lie on one device. torch's
FakeTensor keeps that rule too, but has no numbers, and whatever looks at one (bool, item, nonzero) ends it.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

CROSS = (aten._to_copy.default, aten.copy_.default)
"""Go from one device to another."""

INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor)
"""Take indices from the CPU as well."""


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    _is_param = False
    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnGpu:
        strides, offset, dtype = numbers.stride(), numbers.storage_offset(), numbers.dtype
        made = Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=strides, storage_offset=offset, dtype=dtype, device=CUDA
        )
        made.numbers = numbers
        return made

    def __init__(self, numbers: Tensor):
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.numbers})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        own = self.detach().clone()
        return memo.setdefault(id(self), torch.nn.Parameter(own, self.requires_grad) if self._is_param else own)

    is_leaf = property(lambda self: self.numbers.is_leaf)  # type: ignore[assignment]

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.numbers.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.numbers.requires_grad = value

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return None if self.numbers.grad is None else OnGpu(self.numbers.grad)

    @grad.setter
    def grad(self, value: OnGpu | None) -> None:
        self.numbers.grad = _numbers(value)

    def requires_grad_(self, requires_grad: bool = True) -> OnGpu:
        self.numbers.requires_grad_(requires_grad)
        return self

    def backward(self, *args: Any, **options: Any) -> None:  # type: ignore[override]
        self.numbers.backward(*_numbers(args), **_numbers(options))

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor on the GPU is no NumPy array; use Tensor.cpu()")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a tensor on the GPU, after it is gone")


class Generator(torch.Generator):
    """The CPU's, whichever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls)


class Gpu(TorchDispatchMode):
    """The rule.

    Attributes:
        waits: operations that made the host wait for the device, or sent something there, and how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch then looks for no driver
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = any(isinstance(t, OnGpu) for t in tensors)
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not here and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        with self:  # inference mode leaves what is made of others whole
            if (found := func.decompose(*args, **kwargs)) is not NotImplemented:
                return found
        if func is aten.copy_.default:
            target = args[0].device
        if func not in CROSS:
            check(func, args, tensors)
        graded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        stays = target is None or target.type == "cuda"
        if looks(func, args) or (func in CROSS and (not here or not stays)):
            self.waits[func.name()] += 1
        numbers, options = _numbers((args, dict(kwargs)))
        if "device" in options:
            options["device"] = torch.device("cpu")
        # gradients are those of the numbers: torch's own would ask the driver. Inference tensors have no views
        with torch.inference_mode(False), torch.set_grad_enabled(graded):
            out = func(*numbers, **options)
            if func is aten.copy_.default:
                return args[0]
            if not stays:
                return out
            out = tree_map_only(Tensor, OnGpu, out)
            return return_and_correct_aliasing(func, args, kwargs, out) if here else out


def _numbers(tree: Any) -> Any:
    return tree_map_only(OnGpu, lambda t: t.numbers, tree)


def gradient(outputs: Any, inputs: Any, *args: Any, **options: Any) -> Any:
    """torch.autograd.grad."""
    found = AUTOGRAD(*_numbers((outputs, inputs, *args)), **_numbers(options))
    return tuple(OnGpu(g) if g is not None else None for g in found)


AUTOGRAD = torch.autograd.grad


def check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Tensors that meet lie on the GPU; a single number, of shape (), may be on the CPU in pointwise operations.

    Raises:
        RuntimeError: one does not.
    """
    if func in INDEX:
        tensors = [t for t in (args[0], *args[2:]) if isinstance(t, Tensor)]
    pointwise = torch.Tag.pointwise in func.tags
    for t in tensors:
        if not isinstance(t, OnGpu) and (t.ndim or not pointwise):
            raise RuntimeError(f"{func}: a tensor of shape {tuple(t.shape)} on the CPU meets one on the GPU")


def looks(func: Any, args: Any) -> bool:
    """Whether the result, or its shape, depends on numbers that the host must wait for."""
    if func in INDEX:
        return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


@contextmanager
def pretended() -> Iterator[Gpu]:
    """Within, this machine has one GPU."""
    torch._C._ensureCUDADeviceGuardSet()  # as FakeTensor does: where there is no driver, none is asked
    before = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(enabled=False), Gpu() as gpu:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.autograd, "grad", gradient)
        patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state))
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # .data keeps the old class
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") asks the driver
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
            forget()


def forget() -> None:
    """Empties the package's caches: their keys are devices."""
    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith("gsmooth_lightning") else ():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
