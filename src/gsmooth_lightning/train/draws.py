"""Several draws of the smoothing at once, for objectives that average over them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gsmooth_lightning.smoothed import SmoothedClassifier


def logits_of_draws(smoothed: SmoothedClassifier, x: Tensor, m: int, semantic: bool) -> Tensor:
    """f(psi(x, theta_i) + eps_i) for m draws of theta and eps: (n, ...) -> (m, n, classes) in float32, under autocast
    too. One pass for all, as in the papers' code: batch statistics are those of all draws."""
    clean = torch.cat([smoothed.training_images(x, semantic) for _ in range(m)])
    return smoothed.base(clean + smoothed.training_noise(clean)).float().unflatten(0, (m, -1))


def noise_draws(smoothed: SmoothedClassifier, clean: Tensor, m: int) -> Tensor:
    """m draws of the pixel noise for a batch, (m, n, ...)."""
    return torch.stack([smoothed.training_noise(clean) for _ in range(m)])


def logits_under(base: nn.Module, inputs: Tensor, noise: Tensor) -> Tensor:
    """f(x + eps_i) for given draws: (n, ...) and (m, n, ...) -> (m, n, classes) in float32, under autocast too."""
    return base((inputs + noise).flatten(0, 1)).float().unflatten(0, (len(noise), -1))


def soft_votes_under(base: nn.Module, noise: Tensor) -> Callable[[Tensor], Tensor]:
    """Inputs (n, ...) -> log( 1/m sum_i softmax f(x + eps_i) ), (n, classes), for given draws: what attacks on the
    smoothed classifier ascend."""
    return lambda inputs: log_mean_softmax(logits_under(base, inputs, noise))


def log_mean_softmax(logits: Tensor) -> Tensor:
    """log( 1/m sum_i softmax f_i ): (m, n, classes) -> (n, classes)."""
    return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))
