"""Attacks on pixels: ours, and adapters for those of torchattacks and foolbox."""

import contextlib
import inspect
import math
import random
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
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
"""(model, inputs (n, ...), labels (n,), epsilon, range of inputs) -> adversarial inputs; the model gives logits."""

HALVINGS = 24
"""Of the way from the clean input to what an attack found, to stay within epsilon."""

ALONE = threading.Lock()
"""Attacks draw from global generators: one at a time, each from its own seed."""


class SoftVotes(nn.Module):
    """Logits of the mean vote, log( 1/m sum_i softmax f(preprocess(psi(x, theta_i)) + eps_i) ) less the smallest one,
    (n, ...) -> (n, classes): what an attack on the smoothed classifier climbs (Salman et al. 2019, section 2.2). The
    draws are the same in every call, so that an attack sees one function. A network that returns labels votes for them,
    without gradients.

    Args:
        smoothed: the classifier; its laws, and its network unless `network` is given.
        network: the base network in a form that has gradients.
        draws: m, or 0 for the base classifier without noise and transformation.
        seed: of the draws.
    """

    def __init__(self, smoothed: SmoothedClassifier, network: nn.Module, draws: int, seed: int = 0):
        super().__init__()
        self.smoothed, self.network, self.draws, self.seed = smoothed, network, draws, seed
        self.evaluations = 0
        self.eval()

    def train(self, mode: bool = True) -> "SoftVotes":
        """Stays in evaluation mode, which torchattacks takes back after an attack."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.draws > 0
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(self.seed)
            inputs = self.smoothed.training_images(x.repeat_interleave(max(1, self.draws), 0), drawn)
            if drawn:
                inputs = inputs + self.smoothed.training_noise(inputs)
        out = self.network(inputs)
        self.evaluations += len(out)
        if out.ndim == 1:
            out = torch.log(functional.one_hot(out, self.smoothed.classes) + 1e-12)
        votes = out.double().log_softmax(1).unflatten(0, (len(x), -1))
        logits = votes.logsumexp(1)
        return (logits - logits.amin(1, keepdim=True).detach()).to(x.dtype)


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

    A file is saved so that it stays within epsilon (see `within`). `Attacked.gammas` are the epsilons.

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
    listed = isinstance(epsilons, Sequence) and not isinstance(epsilons, str) and len(epsilons) > 0
    if not listed or any(
        isinstance(e, bool) or not isinstance(e, int | float) or not 0 < e < math.inf for e in epsilons
    ):
        raise RequestError(f"attack.epsilons must list norms above 0, such as [0.25, 0.5], got {epsilons}")
    low, high, _ = SAVED[threat.saved]
    models = [SoftVotes(smoothed, smoothed.base if network is None else network, m) for m in (draws, 0)]

    def crafted(model: SoftVotes, epsilon: float, number: int) -> tuple[Tensor, int]:
        seed = int(np.random.SeedSequence((stream.seed, stream.image, number)).generate_state(1)[0])
        with ALONE, torch.inference_mode(False), torch.enable_grad(), seeded(seed, x.device):
            model.seed, before = seed, model.evaluations
            clean, y = x.clone()[None], torch.tensor([label], device=x.device)
            try:
                found = craft(model, clean, y, epsilon, (low, high))
            except Exception as failure:  # whatever another library does
                reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
                hint = "; labels have no gradients, use an attack that needs none" if "require grad" in reason else ""
                raise RequestError(
                    f"the attack failed on image {stream.image} ({reason}{hint}); correct the options of attack"
                ) from failure
            spent = model.evaluations - before
        if not isinstance(found, Tensor) or found.shape != (1, *x.shape) or not bool(torch.isfinite(found).all()):
            raise RequestError(
                f"the attack must return finite inputs of shape {(1, *x.shape)}, and did not on image {stream.image}; "
                "correct attack.craft"
            )
        return within(threat, x, found[0].detach(), epsilon), spent

    jobs = [partial(crafted, model, e, 2 * k + i) for k, e in enumerate(epsilons) for i, model in enumerate(models)]
    made, spent = zip(*(yield jobs), strict=True)
    files = torch.stack([x, *made])
    base, votes = yield from judge(smoothed, lambda rows: files[rows], torch.arange(len(files)), stream, n)
    budgets = [[0.0], *([float(e)] for e in epsilons for _ in models)]
    judged = smoothed.evaluations(0, len(files)) + len(files) * smoothed.evaluations(0, n)
    return attacked(budgets, threat.distance(files - x), base, votes, label, sum(spent) + judged)


def within(threat: PixelThreat, x: Tensor, found: Tensor, epsilon: float) -> Tensor:
    """The file of `found`, (c, h, w), cut to epsilon: the farthest on the way from x that lies within epsilon of x, by
    bisection, since files round."""
    low, high, _ = SAVED[threat.saved]
    delta = found.to(x.dtype).clamp(low, high) - x
    if threat.norm == "linf":
        delta = delta.clamp(-epsilon, epsilon)
    elif threat.norm == "l2":
        delta = shrink(delta[None], epsilon)[0]
    else:
        delta = delta * (epsilon / delta.abs().sum().clamp_min(1e-12)).clamp(max=1)
    file, near, far, share = x, 0.0, 1.0, 1.0
    for _ in range(HALVINGS):
        tried = threat.save(x + share * delta)
        if float(threat.distance((tried - x)[None])) <= epsilon:
            file, near = tried, share
            if near == 1:
                break
        else:
            far = share
        share = (near + far) / 2
    return file


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators of torch, NumPy and Python under a seed, and as they were afterwards."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)  # noqa: NPY002
            random.setstate(pythons)


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
        try:
            return attack(wrapped, x, y, epsilons=epsilon)[1]
        except ValueError as failure:
            if "init_attack failed" not in str(failure):
                raise
            return x  # a search that found nothing to start from

    return craft
