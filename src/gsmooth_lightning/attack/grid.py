"""An even grid of parameters."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from gsmooth_lightning.attack.evaluation import Attacked, evaluate, of_parameters
from gsmooth_lightning.errors import check_whole
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import Threat


def grid(
    smoothed: SmoothedClassifier,
    threat: Threat,
    x: Tensor,
    label: int,
    stream: Stream,
    points: int = 21,
    n: int = 128,
) -> Generator[Any, Any, Attacked]:
    """Tries 0 and every point of `TransformationThreat.parameters`, the nearest to 0 first, as a procedure (see
    `rounds`).

    With `threat.step` these are all the parameters there are; otherwise a grid over the threat's box, ends included.

    Args:
        smoothed, threat, x, label, stream: see `Attack`.
        points: values of each parameter, at least 2, or 3 where there are several; for a threat without a step.
        n: votes for each (see `evaluate`).

    Raises:
        RequestError: an effort too small, or more parameters than the threat searches.
    """
    check_whole("attack", points=(points, 2), n=(n, 1))
    threat = of_parameters(threat)
    gammas, _ = threat.parameters(points**threat.transform.dim)
    distances = threat.distance(gammas)
    others = gammas[distances.argsort(stable=True)][int((distances < 1e-6 * threat.reach).sum()) :]
    gammas = torch.cat([torch.zeros(1, threat.transform.dim), others])
    return (yield from evaluate(smoothed, threat, x, label, stream, gammas, n))
