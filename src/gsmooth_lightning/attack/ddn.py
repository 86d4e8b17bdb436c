"""Decoupled direction and norm."""

import math

import torch
from torch import Tensor

from gsmooth_lightning.attack.pgd import Box, LogProbabilities, ascent, checked_box, inside, row_norms, shrink
from gsmooth_lightning.errors import RequestError


def ddn(
    log_probabilities: LogProbabilities,
    x: Tensor,
    y: Tensor,
    epsilon: float | None = None,
    steps: int = 100,
    gamma: float = 0.05,
    initial: float = 1.0,
    box: Box | None = None,
) -> Tensor:
    """Adversarial inputs of small l2 norm: the smallest found, cut to epsilon; x itself where none was found.

    The norm shrinks by the factor 1 - gamma while x + delta is misclassified and grows by 1 + gamma while it is not;
    the direction follows the gradient with a step that falls from 1 to .01 by a cosine. Rony et al. 2019, Algorithm 1,
    with their levels of quantisation left out; capped at epsilon as in Salman et al. 2019.

    Args:
        log_probabilities, x, y, box: as for `pgd`.
        epsilon: largest norm, or None.
        steps: of the search.
        gamma: relative change of the norm in a step.
        initial: first norm.

    Raises:
        RequestError: numbers that make no search.
    """
    if steps < 1 or not 0 < gamma < 1 or not initial > 0 or not (epsilon is None or epsilon >= 0):
        raise RequestError(
            "DDN needs steps >= 1, 0 < gamma < 1, initial > 0 and epsilon >= 0, got "
            f"{steps}, {gamma}, {initial} and {epsilon}"
        )
    box = checked_box(box)
    shape = (-1, *[1] * (x.ndim - 1))
    delta, best = torch.zeros_like(x), torch.zeros_like(x)
    norm = torch.full_like(row_norms(x), initial)
    smallest = torch.full_like(norm, math.inf)
    for k in range(steps):
        up, predicted = ascent(log_probabilities, x + delta, y)
        adversarial = (predicted != y).view(shape)
        better = adversarial & (row_norms(delta) < smallest)
        best, smallest = torch.where(better, delta, best), torch.where(better, row_norms(delta), smallest)
        delta = delta + up * (0.01 + 0.99 * (1 + math.cos(math.pi * k / steps)) / 2)
        norm = norm * torch.where(adversarial, 1 - gamma, 1 + gamma)
        delta = inside(x, delta * (norm / row_norms(delta).clamp_min(1e-12)), box)
    return x + (best if epsilon is None else shrink(best, epsilon))
