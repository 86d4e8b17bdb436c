"""The latent certificate: an attack moves the law of what a surrogate's decoder sees (theory.md section 9)."""

from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from gsmooth_lightning.certify.base import InterpolatedCertifier
from gsmooth_lightning.certify.transfer import Transfer, sampled
from gsmooth_lightning.error import Bound
from gsmooth_lightning.error.latent import sizes
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Latent
from gsmooth_lightning.threat import Threat

BEYOND = 1e6
"""Displacements in sigma from here on are alike: they leave nothing of a p that votes can show."""


class LatentCertifier(InterpolatedCertifier):
    """Certified where every attack's displacement in latent space is below (z(pA) - z(pB)) / 2, in the norm of the
    noise: ||C^{-1/2} (F2(x') - F2(x))|| for Gaussian parameters, C = A1 s1^2 A1' + s2^2 I.

    For other laws of the parameters an attack leaves of p at least Phi(z(T_law(p; a)) - E), where A1 a + r is the
    displacement and ||r|| = E s2, for any a. Votes are counted at the clean image. The error bound says whose
    displacement it is: of the transformation (`error=latent`), of the surrogate (`latent_surrogate`), or by Corollary 1
    of GSmooth (`corollary`, `corollary_proved`), which is r = (z(pA) - z(pB)) / 2 M*.
    """

    latent = True

    def transfer(self, smoothed: SmoothedClassifier, threat: Threat, bound: Bound, dim: int, slack: float) -> Transfer:
        assert isinstance(smoothed.noise, Latent)
        noise = smoothed.noise
        rows = np.array(bound.curve or [(0.0,) * (noise.dim + 1) + (bound.value,)])
        gauge, error = sizes(noise, rows)
        error = np.minimum(error, BEYOND)

        @cache
        def met(radius: float) -> np.ndarray:
            return rows[:, 0] <= radius

        def transfer(p: ArrayLike, radius: float) -> np.ndarray:
            p, seen = sampled(p, slack)[..., None], met(radius)
            left = ndtri(noise.law.transfer(p, gauge[seen])) - error[seen] - bound.slope * radius
            return ndtr(left).min(-1)

        return transfer
