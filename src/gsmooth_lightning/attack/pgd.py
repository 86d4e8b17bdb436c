"""Projected gradient descent."""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gsmooth_lightning.errors import RequestError

NORMS = ("l2", "linf")

LogProbabilities = Callable[[Tensor], Tensor]
"""Inputs (n, ...) -> log-probabilities (n, classes), differentiable; for a smoothed classifier log of the mean vote."""

Box = tuple[float, float]
"""Range of valid inputs. An input outside it already is not moved further out."""


def pgd(
    log_probabilities: LogProbabilities,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "l2",
    box: Box | None = None,
) -> Tensor:
    """Adversarial inputs x + delta, ||delta|| <= epsilon, from `steps` projected steps up the loss -log p_y.

    delta <- P(delta + step_size g / ||g||_2) for l2, delta <- P(delta + step_size sign g) for linf, from delta = 0; a
    vanishing gradient is replaced by a random direction. Madry et al. 2018; Salman et al. 2019 (SmoothAdv).

    Args:
        log_probabilities: the classifier, see `LogProbabilities`.
        x, y: inputs (n, ...) and labels (n,).
        epsilon: radius, in units of the input.
        steps, step_size: by default step_size = 2 epsilon / steps.
        norm: "l2" or "linf".
        box: range that x + delta is clipped to, or None.

    Raises:
        RequestError: an unknown norm, a negative epsilon or step size, or no steps.
    """
    if norm not in NORMS:
        raise RequestError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not 0 <= epsilon < math.inf or steps < 1 or not (step_size is None or step_size > 0):
        raise RequestError(
            f"PGD needs epsilon >= 0, steps >= 1 and step_size > 0, got {epsilon}, {steps} and {step_size}"
        )
    box = checked_box(box)
    step = 2 * epsilon / steps if step_size is None else step_size
    delta = torch.zeros_like(x)
    for _ in range(steps):
        up, _ = ascent(log_probabilities, x + delta, y)
        delta = delta + step * (up.sign() if norm == "linf" else up)
        delta = inside(x, delta, box)
        delta = delta.clamp(-epsilon, epsilon) if norm == "linf" else shrink(delta, epsilon)
    return x + delta


def ascent(log_probabilities: LogProbabilities, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of steepest ascent of -log p_y, of unit l2 norm, and the predicted classes."""
    kind = x.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    precision = torch.autocast(kind, enabled=False) if half else contextlib.nullcontext()  # float16 gradients vanish
    with torch.inference_mode(False), torch.enable_grad(), precision:
        x, y = x.detach().clone().requires_grad_(), y.clone()  # none of inference mode
        log_p = log_probabilities(x)
        (gradient,) = torch.autograd.grad(-log_p.gather(1, y[:, None]).sum(), x)
    norms = row_norms(gradient)
    flat = (norms == 0) | ~torch.isfinite(norms)
    gradient = torch.where(flat, torch.randn_like(gradient), gradient)
    return gradient / row_norms(gradient), log_p.detach().argmax(1)


def checked_box(box: Sequence[float] | None) -> Box | None:
    """The box; refused if it is not two numbers in order."""
    if box is None:
        return None
    if len(box) != 2 or not box[0] < box[1]:
        raise RequestError(f"box must be [low, high] with low < high, or null, got {box}")
    return box[0], box[1]


def inside(x: Tensor, delta: Tensor, box: Box | None) -> Tensor:
    """delta cut so that x + delta stays in the box."""
    if box is None:
        return delta
    low, high = box
    return (x + delta).clamp(x.clamp(max=low), x.clamp(min=high)) - x


def shrink(delta: Tensor, radius: float | Tensor) -> Tensor:
    """delta with its l2 norm cut to the radius, a number or (n, 1, ...)."""
    return delta * (radius / row_norms(delta).clamp_min(1e-12)).clamp(max=1)


def row_norms(x: Tensor) -> Tensor:
    """l2 norms of the rows, shaped (n, 1, ...)."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
