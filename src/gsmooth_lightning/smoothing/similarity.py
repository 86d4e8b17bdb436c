"""What rotation, scaling and translation together do to a Gaussian law of their parameters.

psi(x, (r, s, t)) translates by t, then turns by r and scales by e^s: A (v + t), A = e^s Rot(r). An attack (r, s, t)
moves (R, S, T) ~ N(0, diag(s_r^2, s_s^2, s_t^2 I)) to (r + R, s + S, t + A^-1 T). T is isotropic, so the turn in A^-1
leaves its law as it is: the attacked law is N((r, s, t), diag(s_r^2, s_s^2, e^-2s s_t^2 I)), which is no shift. The
bound is that of contrast and brightness (TSS; theory.md section 4) with a T of two dimensions.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri, xlog1py

from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.smoothing.base import Law
from gsmooth_lightning.smoothing.gaussian import Gaussian


def similarity_transfer(
    p: ArrayLike,
    low: Sequence[float],
    high: Sequence[float],
    sigma: tuple[float, float, float],
    beside: float = 0.0,
) -> np.ndarray:
    """A lower bound of Q(A) over all attacks (r, s, t) between low and high, for events of probability p.

    Two steps, change of variance and shift, in both orders; each order is a valid bound, so the larger counts. A shift
    leaves Phi(z(p) - m). Its size is m = hypot(r / s_r, s / s_s, |t| / (e^-s s_t)) when it comes second, where T has
    the attacked standard deviation, and hypot(r / s_r, s / s_s, |t| / s_t) when it comes first. The change of T's
    standard deviation from s_t to e^-s s_t leaves, by Neyman-Pearson, with |T|^2 / s_t^2 twice a standard exponential,

        s <= 0: 1 - (1 - p)^(e^2s), where the middle becomes rare: P(|T| <= c s_t) = 1 - e^(-c^2 / 2);
        s >= 0: p^(e^2s), where the tails do.

    Either step takes more the further its parameter is from 0, and keeps the order of what it is given. So over the
    attacks with s >= 0 both orders are least at the largest s, |r| and |t|. Over those with s <= 0 they are least at
    the least s and the largest |r| and |t|, but for e^s in the shift, which is largest at s = 0: it is put to 1, and
    the bound holds for every attack of that side. The two sides are the whole box, and the smaller bound counts. |t| is
    largest at a corner.

    Exact for s = 0, and where only T's law counts and t = 0.

    Args:
        p: probabilities.
        low, high: (r, s, t down, t right) ends of the range; 0 lies between them.
        sigma: (s_r, s_s, s_t): one s_t for both directions.
        beside: size of a shift of other Gaussian variables that the attack makes as well, e.g. E of the pixel noise: it
            counts in m by root-sum-square, however it depends on the parameters (Theorem J).
    """
    turn, down, right = (max(-low[k], high[k]) for k in (0, 2, 3))
    lost = 1 - np.asarray(p, dtype=float)  # the complement keeps its digits where p is near 1
    sides = []
    for s in (low[1], high[1]):
        others = np.hypot(np.hypot(turn / sigma[0], s / sigma[1]), beside)
        distance = np.hypot(down, right) / sigma[2]
        variance_first = _shifted(_rescaled(lost, s), np.hypot(others, distance * np.exp(max(s, 0.0))))
        shift_first = _rescaled(_shifted(lost, np.hypot(others, distance)), s)
        sides.append(np.minimum(variance_first, shift_first))
    return 1 - np.maximum(*sides)


def _shifted(lost: np.ndarray, size: float) -> np.ndarray:
    """Phi(z(q) + size) of q that is lost already."""
    return ndtr(ndtri(lost) + size)


def _rescaled(lost: np.ndarray, s: float) -> np.ndarray:
    """q^(e^2s) for s <= 0 and 1 - (1 - q)^(e^2s) for s >= 0, of q that is lost already."""
    power = np.exp(2 * s)
    return lost**power if s <= 0 else -np.expm1(xlog1py(power, -lost))


def similarity_sigma(law: Law) -> tuple[float, float, float]:
    """(s_r, s_s, s_t) of a law of (r, s, t).

    Raises:
        UncertifiableError: a law for which the transfer is not proved: another one than a Gaussian of independent
            parameters, with one s_t for both directions.
    """
    if isinstance(law, Gaussian) and law.cholesky is None and law.sigma.numel() in (1, 4):
        turn, scale, down, right = law.sigma.flatten().expand(4).tolist()
        if down == right:
            return turn, scale, right
    raise UncertifiableError(
        "rotation, scaling and translation together are certified for independent Gaussian parameters and an isotropic "
        "translation; use law=gaussian with law.sigma=[DEGREES,LOG_FACTOR,PIXELS,PIXELS], the last two alike"
    )
