"""A black box: scikit-learn's random forest, fitted on 10,000 of MNIST's training images.

    gsmooth certify experiment=mnist_denoised data.dataset.root=data model=black_box \
      model.function.path=forest.predict denoiser_checkpoint=FILE images.every=100

in this folder, with MNIST in `data`.
"""

from functools import cache

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor
from torchvision.datasets import MNIST


@cache
def forest() -> RandomForestClassifier:
    """The forest, fitted when it is first asked."""
    train = MNIST("data")
    images, labels = train.data[:10_000].flatten(1).numpy() / 255, train.targets[:10_000].numpy()
    return RandomForestClassifier(random_state=0).fit(images, labels)


def predict(x: Tensor) -> np.ndarray:
    """Classes of images in [0, 1], (n, 1, 28, 28) -> (n,)."""
    return forest().predict(x.flatten(1).numpy())
