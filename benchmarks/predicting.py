"""Draws that `gsmooth predict` takes, computed exactly: python benchmarks/predicting.py

For a classifier with two classes, of which the first has probability p: mean draws until the sequential test decides,
the probability that it returns the first class, and that of the test with all n draws (Cohen et al. 2019, PREDICT).
"""

import itertools

import numpy as np
import pandas as pd
from scipy.stats import binom
from torch import nn

from gsmooth_lightning.predict import Predictor, leads
from gsmooth_lightning.smoothed import SmoothedClassifier

N, ALPHA, BLOCK = 10_000, 1e-3, 64


def counts_of_two(look: int) -> np.ndarray:
    first = np.arange(look + 1)
    return np.stack([first, look - first], 1)


def sequential(p: float) -> tuple[float, float]:
    """(mean draws, probability of the first class), by the law of the votes among paths that have not stopped."""
    predictor = Predictor(SmoothedClassifier(nn.Identity(), 2, block=BLOCK), N, ALPHA)
    alive, draws, right = np.ones(1), 0.0, 0.0
    for (seen, look), level in zip(itertools.pairwise((0, *predictor.looks)), predictor.levels, strict=True):
        draws += alive.sum() * (look - seen)
        alive = np.convolve(alive, binom.pmf(np.arange(look - seen + 1), look - seen, p))
        counts = counts_of_two(look)
        decided = leads(counts, level)
        right += alive[decided & (counts[:, 0] > counts[:, 1])].sum()
        alive = np.where(decided, 0.0, alive)
    return draws, right


def main() -> None:
    counts, rows = counts_of_two(N), []
    for p in (0.99, 0.8, 0.7, 0.6, 0.55, 0.52, 0.5):
        draws, right = sequential(p)
        passes = leads(counts, ALPHA) & (counts[:, 0] > counts[:, 1])
        fixed = binom.pmf(counts[:, 0], N, p)[passes].sum()
        rows.append({"p": p, "mean draws": draws, "P(first class)": right, "with all n draws": fixed})
    print(f"n = {N:,}, alpha = {ALPHA:g}, block {BLOCK}")
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".4g"))


if __name__ == "__main__":
    main()
