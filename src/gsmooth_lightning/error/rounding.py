"""What rounding leaves of an exact transformation's equation: no draws, one bound for every gamma."""

import math

import torch
from torch import Tensor

from gsmooth_lightning.error.base import Bound
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.preprocess import lipschitz
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import is_exact

TAIL = 1e-4
"""Mass of the parameters' law outside which the rounding of the file is not bounded: it is given away as rho."""

GRID = 1.1
"""Two half steps of the grid a pixel, and a tenth for the preprocessing's float32."""


COARSE = 1.001
"""Factor by which it is rounded up."""

STEPS = 30
"""Radii for which it is bounded anew: what a waveform loses by clipping grows with the attack."""


def rounding_bound(smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor) -> Bound:
    """E = `file_rounding` for all but a mass TAIL of the parameters, as a curve where smaller attacks lose less.

    Raises:
        UncertifiableError: it is not finite.
    """
    if threat.l2:
        raise UncertifiableError("changes by threat.l2 beside an exact transformation are not covered; set threat.l2=0")
    steps = STEPS if threat.saved == "16bit" else 1
    ends = [threat.reach * k / steps for k in range(steps + 1)]
    errors = [file_rounding(smoothed, threat.within(end), x) for end in ends[1:]]
    if not math.isfinite(errors[-1]):
        raise UncertifiableError(
            f"what files of {threat.transform.name} round has no finite bound; narrow the law or threat, or use "
            "inputs in [0, 1]"
        )
    errors = [COARSE ** math.ceil(math.log(error, COARSE) + 1e-6) for error in errors]  # equal where nothing is clipped
    rows = [(ends[k], errors[k]) for k in range(steps) if k == 0 or errors[k] > errors[k - 1]]
    return Bound(errors[-1], TAIL, 0.0, "sound", curve=tuple(rows) if len(rows) > 1 else ())


def file_rounding(smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor) -> float:
    """E: for every gamma of the threat and every theta but a mass TAIL of its law, the l2 distance between the encoded
    psi(x', theta), x' the attacked file, and the encoded psi(x, gamma + theta), in units of the pixel noise.

    It adds what the file rounds or clips, stretched by psi(., theta); what the grid of the parameters moves, half a
    step in each of theta, theta + gamma and what gamma scales theta by; and the noise grid's two half steps a pixel.
    """
    transform, law, noise = smoothed.transform, smoothed.law, smoothed.noise
    assert is_exact(transform)
    assert law is not None
    assert isinstance(noise, Gaussian)
    least, most, error = threat.file_error(x)
    theta = torch.stack(law.within(TAIL, transform.dim))  # (2, dim)
    file = transform.spread(least, most, error, *theta)
    gamma = torch.tensor([threat.lows, threat.highs], dtype=torch.float64)
    corners = torch.cartesian_prod(*gamma.T, *theta.T)  # (4^dim, 2 dim)
    attack, drawn = corners.split(transform.dim, 1)
    reached = transform.resolve(attack, drawn)
    scale = (transform.resolve(attack, drawn + 1) - reached).abs().amax(0)
    grid = transform.drift(x.double(), reached.amin(0), reached.amax(0), smoothed.parameter_step * (1 + scale) / 2)
    rounded = GRID * math.sqrt(math.prod(smoothed.encoded_shape(x))) / smoothed.levels
    moved = lipschitz(smoothed.preprocess) * (file + grid) + rounded
    return moved / float(noise.sigma.min()) * (1 + 1e-6)
