"""Gradient ascent on the parameters by expectation over transformation."""

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.attack.evaluation import Attacked, evaluate, of_parameters, permitted
from gsmooth_lightning.attack.worst_of_k import UNIFORM, scattered
from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat, TransformationThreat
from gsmooth_lightning.transform import compute


def eot(
    smoothed: SmoothedClassifier,
    threat: Threat,
    x: Tensor,
    label: int,
    stream: Stream,
    restarts: int = 8,
    steps: int = 20,
    draws: int = 16,
    step_size: float = 0.1,
    n: int = 128,
    network: nn.Module | None = None,
) -> Generator[Any, Any, Attacked]:
    """Climbs the loss (see `losses`) against the smoothed classifier, with fresh draws of (theta, eps) in each step,
    and against the base classifier, theta = eps = 0; then tries 0 and what both ended in, as a procedure (see
    `rounds`).

    gamma <- P( gamma + step_size (1 - t / steps) g / ||g||_2 ),  t = 0, ..., steps - 1

    in shares of each parameter's range, P the projection on the box. Restarts are those of `scattered`. A threat with a
    step is searched between its steps, and the ends are moved onto them.

    Athalye et al. 2018, Synthesizing Robust Adversarial Examples, section 2.

    Args:
        smoothed, threat, x, label, stream: see `Attack`.
        restarts: at least 4.
        steps, draws: of the ascent, and of (theta, eps) in each step.
        step_size: of the first step, as a share of the range.
        n: votes for each of the 2 restarts + 1 parameters tried (see `evaluate`).
        network: the base network in a form that has gradients; by default `smoothed.base`, unless it is compiled.

    Raises:
        RequestError: an effort too small, a step size outside (0, 1], or a transformation or network without gradients.
    """
    check_whole("attack", restarts=(restarts, 4), steps=(steps, 1), draws=(draws, 1), n=(n, 1))
    if not isinstance(step_size, int | float) or not 0 < step_size <= 1:
        raise RequestError(f"attack.step_size must be a share of the range, above 0 and at most 1, got {step_size!r}")
    threat = of_parameters(threat)
    check_gradient(threat, x)

    low, high = torch.tensor(threat.lows, device=x.device), torch.tensor(threat.highs, device=x.device)

    def climb(gammas: Tensor, t: int, averaged: bool) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            image, gammas = x.clone(), gammas.clone().requires_grad_()  # none of inference mode
            noise = torch.zeros_like(smoothed.preprocess(image[None]))
            theta = torch.zeros(1, smoothed.transform.dim, device=x.device)
            if averaged:
                source = stream.at("attack", UNIFORM + 1 + t, x.device)
                theta = smoothed.draw_parameters(source, draws)
                if smoothed.noise is not None:
                    noise = smoothed.noise.sample(source, draws, tuple(noise.shape[1:]))
            loss = losses(smoothed, threat, image, label, gammas, theta, noise, network).sum()
            (up,) = torch.autograd.grad(loss, gammas)
        scaled = functional.normalize(up.nan_to_num() * (high - low), dim=1, eps=torch.finfo(up.dtype).tiny)
        return (gammas.detach() + step_size * (1 - t / steps) * (high - low) * scaled).clamp(low, high)

    start = torch.tensor(scattered(threat, stream, restarts, x.device), dtype=torch.float32, device=x.device)
    against_smoothed, against_base = start, start
    for t in range(steps):
        against_smoothed, against_base = yield [
            partial(climb, against_smoothed, t, True),
            partial(climb, against_base, t, False),
        ]
    tried = torch.cat([start[:1], against_smoothed, against_base])
    gammas = permitted(threat, tried.double().cpu().numpy())
    attacked = yield from evaluate(smoothed, threat, x, label, stream, gammas, n)
    return replace(attacked, evaluations=attacked.evaluations + steps * restarts * (draws + 1))


def losses(
    smoothed: SmoothedClassifier,
    threat: TransformationThreat,
    x: Tensor,
    label: int,
    gammas: Tensor,
    theta: Tensor,
    noise: Tensor,
    network: nn.Module | None = None,
) -> Tensor:
    """1/m sum_i CE( f(preprocess(psi(psi(x, gamma), theta_i)) + eps_i), label ) for each gamma, differentiable in it.

    x: (c, h, w), gammas: (k, dim), theta: (m, dim), noise: (m or 1, ...) -> (k,) float64. The rounding of the file
    passes gradients on unchanged; that of the noise's grid is left out.

    Raises:
        RequestError: the network has no gradients.
    """
    k, m = len(gammas), len(theta)
    with torch.autocast(x.device.type, enabled=False):
        moved = threat.clip(compute(threat.transform, x.expand(k, *x.shape), gammas).to(x.dtype))
        files = moved + (threat.save(moved) - moved).detach()
        seen = smoothed.preprocess(compute(smoothed.transform, files.repeat_interleave(m, 0), theta.repeat(k, 1)))
        inputs = (seen.unflatten(0, (k, m)) + noise).flatten(0, 1).to(x.dtype)
        logits = (smoothed.base if network is None else network)(inputs)
    if gammas.requires_grad and not logits.requires_grad:
        raise RequestError(
            "attack=eot needs a network with gradients, and this one is compiled or returns labels; give it the plain "
            "one, or use attack=grid or attack=worst_of_k"
        )
    target = torch.full((k * m,), label, device=x.device)
    return functional.cross_entropy(logits.double(), target, reduction="none").view(k, m).mean(1)


def check_gradient(threat: TransformationThreat, x: Tensor) -> None:
    """Refuses a threat whose transformation does not move inputs like x, (c, h, w), smoothly with every parameter.

    Raises:
        RequestError: the derivative of a ramp's inner product with its attacked version is 0 in a parameter.
    """
    with torch.inference_mode(False), torch.enable_grad():
        ramp = torch.linspace(0, 1, x.numel(), device=x.device).view(1, *x.shape)
        within = torch.tensor([[0.3 * a + 0.6 * b for a, b in zip(threat.lows, threat.highs, strict=True)]])
        gamma = within.to(x.device).requires_grad_()
        product = (compute(threat.transform, ramp, gamma) * ramp).sum()
        smooth = product.requires_grad and bool(torch.autograd.grad(product, gamma)[0].all())
    if not smooth:
        raise RequestError(
            f"{threat.transform.name} has no gradient in its parameters, since it moves pixels by whole steps; use "
            "attack=grid or attack=worst_of_k"
        )
