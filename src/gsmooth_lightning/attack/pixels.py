"""Attacks on pixels: ours, and adapters for those of torchattacks and foolbox."""

import inspect
import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gsmooth_lightning.attack.evaluation import Attacked, attacked, judge
from gsmooth_lightning.attack.pgd import Box, shrink
from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import SAVED, PixelThreat, Threat

Craft = Callable[[nn.Module, Tensor, Tensor, float, Box], Tensor]
"""(model, inputs (n, ...), labels (n,), epsilon, range of inputs) -> adversarial inputs; the model gives
log-probabilities, (n, classes)."""

ALONE = threading.Lock()
"""Attacks draw from torch's global generator: one at a time, each from its own seed."""


class SoftVotes(nn.Module):
    """log( 1/m sum_i softmax f(preprocess(psi(x, theta_i)) + eps_i) ), (n, ...) -> (n, classes), by fresh draws from
    torch's generator in every call: what an attack on the smoothed classifier climbs (Salman et al. 2019, section 2.2).
    A network that returns labels votes for them, without gradients.

    Args:
        smoothed: the classifier; its laws, and its network unless `network` is given.
        network: the base network in a form that has gradients.
        draws: m, or 0 for the base classifier without noise and transformation.
    """

    def __init__(self, smoothed: SmoothedClassifier, network: nn.Module, draws: int):
        super().__init__()
        self.smoothed, self.network, self.draws, self.evaluations = smoothed, network, draws, 0
        self.eval()

    def train(self, mode: bool = True) -> "SoftVotes":
        """Stays in evaluation mode, which torchattacks takes back after an attack."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.draws > 0
        clean = self.smoothed.training_images(x.repeat_interleave(max(1, self.draws), 0), drawn)
        out = self.network(clean + self.smoothed.training_noise(clean) if drawn else clean)
        self.evaluations += len(out)
        if out.ndim == 1:
            out = torch.log(functional.one_hot(out, self.smoothed.classes) + 1e-12)
        votes = out.double().log_softmax(1).unflatten(0, (len(x), -1))
        return (votes.logsumexp(1) - np.log(votes.shape[1])).to(x.dtype)


def perturb(
    smoothed: SmoothedClassifier,
    threat: Threat,
    x: Tensor,
    label: int,
    stream: Stream,
    craft: Craft,
    epsilons: Sequence[float],
    draws: int = 16,
    n: int = 128,
    network: nn.Module | None = None,
) -> Generator[Any, Any, Attacked]:
    """Tries the clean input, and for each epsilon what `craft` makes against the smoothed and against the base
    classifier, as a procedure (see `rounds`).

    A file is saved so that it stays within epsilon: what was crafted is cut to that norm, and where the file's rounding
    leaves it, rounded towards the clean input. `Attacked.gammas` are the epsilons.

    Args:
        smoothed, threat, x, label, stream: see `Attack`; the threat is one on pixels.
        craft: see `Craft`; e.g. `ours`, `of_torchattacks` or `of_foolbox`.
        epsilons: norms, in the threat's own.
        draws: with which an attack sees the smoothed classifier, in each of its steps.
        n: votes for each (see `evaluate`).
        network: see `SoftVotes`.

    Raises:
        RequestError: a threat by a transformation, no epsilons, an effort too small, or an attack that fails.
    """
    check_whole("attack", draws=(draws, 1), n=(n, 1))
    if not isinstance(threat, PixelThreat):
        raise RequestError("this attack changes pixels; use threat=l2, or attack=worst_of_k for a transformation")
    if isinstance(epsilons, str) or not epsilons or not all(isinstance(e, int | float) and e > 0 for e in epsilons):
        raise RequestError(f"attack.epsilons must list norms above 0, such as [0.25, 0.5], got {epsilons}")
    low, high, _ = SAVED[threat.saved]
    models = [SoftVotes(smoothed, smoothed.base if network is None else network, m) for m in (draws, 0)]

    def crafted(model: SoftVotes, epsilon: float, number: int) -> Tensor:
        devices = [x.device] if x.is_cuda else []
        with ALONE, torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(np.random.SeedSequence((stream.seed, stream.image, number)).generate_state(1)[0]))
            clean, y = x.clone()[None], torch.tensor([label], device=x.device)
            try:
                found = craft(model, clean, y, epsilon, (low, high))
            except (TypeError, ValueError, RuntimeError, AssertionError) as failure:
                reason = (str(failure).splitlines() or [type(failure).__name__])[0]
                raise RequestError(f"the attack failed on image {stream.image} ({reason}); correct attack") from failure
        return within(threat, x, found[0].detach(), epsilon)

    jobs = [partial(crafted, model, e, 2 * k + i) for k, e in enumerate(epsilons) for i, model in enumerate(models)]
    files = torch.stack([x, *(yield jobs)])
    base, votes = yield from judge(smoothed, lambda rows: files[rows], torch.arange(len(files)), stream, n)
    budgets = [[0.0], *([float(e)] for e in epsilons for _ in models)]
    spent = sum(model.evaluations for model in models) + smoothed.evaluations(0, len(files))
    return attacked(
        budgets, threat.distance(files - x), base, votes, label, spent + len(files) * smoothed.evaluations(0, n)
    )


def within(threat: PixelThreat, x: Tensor, found: Tensor, epsilon: float) -> Tensor:
    """The file of `found`, or one on its way from x that lies within epsilon of x: both (c, h, w)."""
    low, high, levels = SAVED[threat.saved]
    delta = torch.where(torch.isfinite(found), found, x).to(x.dtype).clamp(low, high) - x
    if threat.norm == "linf":
        delta = delta.clamp(-epsilon, epsilon)
    elif threat.norm == "l2":
        delta = shrink(delta[None], epsilon)[0]
    else:
        delta = delta * (epsilon / delta.abs().sum().clamp_min(1e-12)).clamp(max=1)
    nearest = threat.save(x + delta)
    if levels is None or float(threat.distance((nearest - x)[None])) <= epsilon:
        return nearest
    return threat.save(x + (delta * levels + 1e-3 * delta.sign()).trunc() / levels)  # whole steps stay whole


def ours(attack: Callable[..., Tensor]) -> Craft:
    """`attack.pgd` or `attack.ddn`."""
    return lambda model, x, y, epsilon, box: attack(model, x, y, epsilon=epsilon, box=box)


def of_torchattacks(make: Callable[..., Callable[[Tensor, Tensor], Tensor]]) -> Craft:
    """An attack called as those of torchattacks: make(model, eps=epsilon)(images, labels) -> images, for images in
    [0, 1]. `eps` is left out where `make` has no such option."""

    def craft(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, box: Box) -> Tensor:
        takes = "eps" in inspect.signature(make).parameters
        return make(model, **({"eps": epsilon} if takes else {}))(x, y)

    return craft


def of_foolbox(attack: Callable[..., tuple[Any, Tensor, Any]]) -> Craft:
    """An attack called as those of foolbox: attack(model, inputs, labels, epsilons=epsilon) -> (raw, clipped,
    success)."""

    def craft(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, box: Box) -> Tensor:
        import foolbox  # optional

        wrapped = foolbox.PyTorchModel(model.eval(), bounds=box, device=x.device)
        return attack(wrapped, x, y, epsilons=epsilon)[1]

    return craft
