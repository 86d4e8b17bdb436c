"""A classifier that is seen through its answers alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError


class BlackBox(nn.Module):
    """A classifier of which only labels are known (Salman et al. 2020, section 3.2).

    Args:
        function: inputs (n, c, h, w), float32 on the CPU, in blocks of one size -> their n classes, whole numbers, as a
            list, array or tensor. A function of each input alone that answers the same whenever it is asked: the
            certificate rests on it, and every run checks it on a block.

    Raises:
        RequestError: no function; later: answers that are not n whole numbers.
    """

    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        if not callable(function):
            raise RequestError("model.function must be a Python function of a block of inputs; give it by _target_")
        self.function = function

    def forward(self, x: Tensor) -> Tensor:  # (n, ...) -> (n,)
        try:
            labels = torch.as_tensor(self.function(x.detach().cpu().clone()))
        except Exception as failure:  # whatever the function does
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            raise RequestError(f"the black box fails on a block of {tuple(x.shape)} ({reason}); repair it") from failure
        if labels.shape != (len(x),) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise RequestError(
                f"the black box must return {len(x)} whole numbers for as many inputs, not {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        return labels.to(x.device, torch.int64)


def is_black_box(network: nn.Module) -> bool:
    """Whether a network is one, or has one behind its denoiser."""
    return any(isinstance(part, BlackBox) for part in network.modules())
