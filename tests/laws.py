"""Every smoothing law beside its distribution in SciPy, for the tests of laws."""

import math

import numpy as np
import pytest
from scipy import stats

from gsmooth_lightning.certify import transfer
from gsmooth_lightning.smoothing import Exponential, FoldedNormal, Gaussian, Laplace, Law, Rayleigh, Uniform


class LogRayleigh(stats.rv_continuous):
    """The distribution of ln theta, from SciPy's Rayleigh."""

    def _cdf(self, x):
        return stats.rayleigh.cdf(np.exp(np.minimum(x, 100)))

    def _pdf(self, x):
        return stats.rayleigh.pdf(np.exp(x)) * np.exp(x)

    def _ppf(self, q):
        return np.log(stats.rayleigh.ppf(q))


LAWS = {
    "gaussian": (Gaussian(0.7), stats.norm(scale=0.7)),
    "laplace": (Laplace(0.4), stats.laplace(scale=0.4)),
    "uniform": (Uniform(-1.5, 1.5), stats.uniform(-1.5, 3)),
    "uniform from 0": (Uniform(0, 3), stats.uniform(0, 3)),
    "exponential": (Exponential(2.0), stats.expon(scale=0.5)),
    "folded normal": (FoldedNormal(0.5), stats.halfnorm(scale=0.5)),
    "rayleigh": (Rayleigh(2.0), LogRayleigh()(loc=math.log(2.0))),
}
IN_BOXES = ["gaussian", "laplace", "uniform", "exponential"]
ONE_SIDED = ["exponential", "folded normal"]
every_law = pytest.mark.parametrize("name", LAWS)


def required(law, size):
    """The pA above which the law's transfer leaves more than 1/2."""
    return transfer.required(law.transfer, size)


def law_of(name) -> Law:
    return LAWS[name][0]
