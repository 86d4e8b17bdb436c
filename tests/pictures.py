"""Images that tests attack bounds with: made ones, and real ones."""

import numpy as np
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional

from gsmooth_lightning.data import Digits


def hostile(h, w, channels=1):
    """Noise, a checkerboard, sparse black and white, and one bright pixel."""
    random = np.random.default_rng(h * w)
    noise = random.random((channels, h, w))
    board = np.broadcast_to(np.indices((h, w)).sum(0) % 2, (channels, h, w))
    sparse = (random.random((channels, h, w)) < 0.2).astype(float)
    spot = np.zeros((channels, h, w))
    spot[:, h // 2, w // 2] = 1
    return torch.tensor(np.stack([noise, board, sparse, spot])).float()


def real_digits() -> Tensor:
    """Two handwritten digits that come with scikit-learn, enlarged to 28 x 28 pixels, k/255: (2, 1, 28, 28)."""
    small = torch.stack([Digits().split("test", 10)[i][0] for i in (3, 5)])
    return (functional.interpolate(small, (28, 28), mode="bicubic").clamp(0, 1) * 255).round() / 255


def real_images() -> dict[str, Tensor]:
    """Digits, and a photograph of 32 x 32 pixels that comes with scikit-learn, k/255: name -> (c, h, w)."""
    found = {f"digit {i}": x for i, x in enumerate(real_digits())}
    flower = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None].float()
    found["photograph"] = functional.interpolate(flower[..., :400, 100:500], (32, 32), mode="area")[0].round() / 255
    return found
