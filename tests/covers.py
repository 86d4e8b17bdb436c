"""Images, classifiers and slices for tests of the cover certificate."""

import numpy as np
import torch
from scipy.special import ndtr
from torch import nn

from gsmooth_lightning.data import Digits
from gsmooth_lightning.error.movement import middle_images, movements
from gsmooth_lightning.preprocess import DiscVignette, GaussianLowPass, LowPass, Preprocess
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    Rotation,
    Scaling,
    Shear,
    Translation,
)
from steps import Gain, SoftClip

ROTATION = TransformationThreat(Rotation(), -10, 10)
WIDTHS = {Rotation: 40.0, Scaling: 0.4, Shear: 0.3, Translation: 2.0}
"""Half the range of gamma from which slices are taken."""


class Linear(nn.Module):
    """Class 1 where w.y > b, y the network's input."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = w.double().flatten(), b

    def forward(self, y):
        value = y.double().flatten(1) @ self.w - self.b
        return torch.stack([-value, value], 1)


FILTERS = {
    "nothing": [],
    "disc and low-pass": [DiscVignette(), LowPass(3)],
    "blur": [GaussianLowPass(0.8)],
    "gain": [Gain(2.0)],
    "soft clip": [DiscVignette(), SoftClip()],
}


def digits(*which):
    """Digits of the test split, enlarged to 16x16 pixels, k/255: (n, 1, 16, 16)."""
    images = torch.stack([Digits().split("test", 10)[i][0] for i in which])
    return nn.functional.interpolate(images, scale_factor=2, mode="bilinear").mul(255).round().div(255)


def images(h=12, w=12, channels=1):
    """Noise, a checkerboard (bicubic leaves [0, 1] most there) and a bright disc."""
    random = np.random.default_rng(h + w)
    noise = random.random((channels, h, w))
    board = np.broadcast_to(np.indices((h, w)).sum(0) % 2, (channels, h, w))
    y, x = np.indices((h, w)) - np.array([(h - 1) / 2, (w - 1) / 2]).reshape(2, 1, 1)
    spot = np.broadcast_to(np.exp(-((x - 1) ** 2 + (y + 0.5) ** 2) / (0.1 * h * w)), (channels, h, w))
    return torch.tensor(np.stack([noise, board, spot])).float()


def visiting(steps=(), base=None, sigma=0.5, classes=2, block=16, transform=None, law=None, **options):
    """A classifier that draws no parameters but those of what comes after."""
    network = base or nn.Flatten()
    filters = Preprocess(list(steps))
    return SmoothedClassifier(network, classes, transform, filters, law, Gaussian(sigma), block=block, **options).eval()


def slices(transform, number, width, seed=0):
    """Random slices of the range and two at its edge and middle, (k, dim) each."""
    dim, limit = transform.dim, WIDTHS[type(transform)]
    random = torch.Generator().manual_seed(seed)
    low = (2 * torch.rand(number, dim, generator=random, dtype=torch.float64) - 1) * limit
    low[0] = 0.0
    return low, low + width * limit * (0.2 + torch.rand(number, dim, generator=random, dtype=torch.float64))


def inside(low, high, points):
    """Parameters of one slice: corners, points next to them and to the middle, and random ones, (n, dim)."""
    random = torch.Generator().manual_seed(1)
    corners = torch.cartesian_prod(*torch.stack([low, high], 1)).reshape(-1, len(low))
    rest = torch.rand(points, len(low), generator=random, dtype=torch.float64)
    share = torch.cat([(corners - low) / (high - low), rest, 1 - 0.01 * rest[:4], 0.5 + 0.01 * rest[:2]])
    return low + (high - low) * share


def moved(smoothed, threat, x, gammas, middle):
    """||P(file of gamma) - P(middle)|| as the classifier encodes both, (n,)."""
    files = threat.apply(x.expand(len(gammas), *x.shape), gammas.float())
    free = torch.zeros(len(files) + 1, smoothed.transform.dim)
    coded = smoothed.encode(torch.cat([files, middle[None]]), free).double() / smoothed.levels
    return (coded[:-1] - coded[-1]).flatten(1).norm(dim=1)


def farness(smoothed, threat, x, low, high, points):
    """(bound of the movement of each slice, (k,); how far files in it are from its middle, (k, n))."""
    psi = threat.transform
    middles = middle_images(threat, psi, x, low, high)
    found = [moved(smoothed, threat, x, inside(a, b, points), m) for a, b, m in zip(low, high, middles, strict=True)]
    return movements(smoothed, threat, psi, x, low, high).sum(1), torch.stack(found)


def no_file_moves_farther(threat, images, low, high, points):
    """Files in the slices through five filters: none is farther from the middle than the bound. How many there were."""
    tried = 0
    for x in threat.prepare(images):
        for name, steps in FILTERS.items():
            bounds, found = farness(visiting(steps), threat, x, low, high, points)
            assert (found <= bounds[:, None]).all(), (name, threat.saved)
            tried += found.numel()
    return tried


def linear_case(x, threat, steps, tilt, sigma, turned, **options):
    """A linear classifier that tells x from what it is after `turned`; both smoothed and exact.

    tilt: share of the way to the turned image at which the border lies.
    """
    network = Linear(torch.ones(1), 0.0)
    smoothed = visiting(steps, network, sigma, **options)
    coded = [smoothed.preprocess(threat.apply(x[None], torch.tensor([g])))[0] for g in turned]
    w = (coded[0] - coded[1]).flatten()
    network.w, network.b = w.double(), float(w.double() @ (coded[0] * (1 - tilt) + coded[1] * tilt).double().flatten())
    return smoothed


def exact_p(smoothed, files):
    """P(class 1) of a classifier of pixel noise, (n,)."""
    network, sigma = smoothed.base, float(smoothed.noise.sigma)
    theta = torch.zeros(len(files), smoothed.transform.dim)
    y = smoothed.encode(files, theta).double().flatten(1) / smoothed.levels
    return ndtr(((y @ network.w - network.b) / (network.w.norm() * sigma)).numpy())


def exact_after(smoothed, files, rest):
    """P(class 1) of a linear classifier under random brightness or contrast and pixel noise: exact, or by quadrature
    over the law."""
    network, sigma, s = smoothed.base, float(smoothed.noise.sigma), float(smoothed.law.sigma)
    y, size = files.double().flatten(1), network.w.norm() * sigma
    if isinstance(rest, Brightness):
        return ndtr(((y @ network.w - network.b) / torch.hypot(size, s * network.w.sum())).numpy())
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    values = (y @ network.w)[:, None] * torch.exp(torch.tensor(s * nodes)) - network.b
    return (ndtr((values / size).numpy()) * weights).sum(1) / weights.sum()
