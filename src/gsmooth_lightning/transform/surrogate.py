"""Networks that imitate a transformation, and what smooths in their latent space (GSmooth; theory.md section 9)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gsmooth_lightning.errors import RequestError, UncertifiableError, check_whole
from gsmooth_lightning.model.checkpoint import read_checkpoint
from gsmooth_lightning.model.norms import lipschitz_constant
from gsmooth_lightning.model.unet import unet
from gsmooth_lightning.transform.base import Transform, check_images

PREFIX = "surrogate."
"""Where `SurrogateModule` keeps the surrogate in its checkpoint."""


class Encoder(nn.Sequential):
    """F2: images (n, c, h, w) -> latents (n, k, h / 2, w / 2), with its Lipschitz constant in l2.

    Args:
        channels: c.
        height, width: of the images.
        latent: k.
        hidden: channels between the two convolutions.
    """

    linear = False

    def __init__(self, channels: int, height: int, width: int, latent: int, hidden: int):
        super().__init__(
            nn.Conv2d(channels, hidden, 4, stride=2, padding=1), nn.SiLU(), nn.Conv2d(hidden, latent, 3, padding=1)
        )
        self.height, self.width, self.size = height, width, (channels, height, width)
        self._lipschitz: float | None = None
        self.register_load_state_dict_post_hook(Encoder._forget)

    def _forget(self, _: object) -> None:
        """The constant was of other weights."""
        self._lipschitz = None

    def forward(self, x: Tensor) -> Tensor:
        """The latents, computed in float64 outside of training: in float32 some devices round like 10 bits (TF32).

        Raises:
            RequestError: images of another size than the surrogate's.
        """
        if (size := tuple(x.shape[1:])) != self.size:
            raise RequestError(
                f"the surrogate is of inputs of {'x'.join(map(str, self.size))}, and these are "
                f"{'x'.join(map(str, size))}; train one of them, or correct data.size, data.enlarge or threat.size"
            )
        if self.training:
            return super().forward(x)
        z = x.double()
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                assert layer.bias is not None
                z = conv2d(z, layer.weight.double(), layer.bias.double(), layer.stride, layer.padding)
            else:
                z = layer(z)
        return z.to(x.dtype)

    @property
    def lipschitz(self) -> float:
        """Product of the layers' spectral norms, rounded up; computed once where the weights are frozen."""
        if any(p.requires_grad for p in self.parameters()):
            return lipschitz_constant(self, self.height, self.width)
        if self._lipschitz is None:
            self._lipschitz = lipschitz_constant(self, self.height, self.width)
        return self._lipschitz


class Surrogate(Transform):
    """tau(xi, x) = H(F1(xi) + F2(x)), F1(xi) = A1 xi + b1 (GSmooth, Corollary 1): F2 an `Encoder`, H a U-Net on the
    latents' grid whose last channels are the image's finer pixels.

    tau(0, x) is near x, not x itself: theorems count the difference.

    Args:
        of: name of the transformation.
        units: unit of each of its parameters.
        lows, highs: range of the parameters it is trained on; F1 sees them as shares of it.
        channels, size: of the images, size x size pixels or [height, width].
        latent: channels of the latents.
        hidden: of the encoder.
        widths: of the U-Net, from the finest level to the coarsest.

    Raises:
        RequestError: numbers that are not whole, or sizes that do not halve once for each level.
    """

    def __init__(
        self,
        of: str,
        units: Sequence[str],
        lows: Sequence[float],
        highs: Sequence[float],
        channels: int = 1,
        size: int | Sequence[int] = 28,
        latent: int = 8,
        hidden: int = 32,
        widths: Sequence[int] = (32, 64),
    ):
        super().__init__()
        self.trained_on: dict[str, Any] = {
            "of": of,
            "units": list(units),
            "lows": [float(a) for a in lows],
            "highs": [float(b) for b in highs],
            "channels": channels,
            "size": size if isinstance(size, int) else list(size),
            "latent": latent,
            "hidden": hidden,
            "widths": list(widths),
        }
        height, width = (size, size) if isinstance(size, int) else size
        numbers = {"latent": latent, "hidden": hidden} | {f"widths.{i}": w for i, w in enumerate(widths)}
        check_whole("network", **{name: (number, 1) for name, number in numbers.items()})
        if height % 2 ** len(widths) or width % 2 ** len(widths):
            raise RequestError(
                f"a surrogate with {len(widths)} levels needs sides that are multiples of {2 ** len(widths)} pixels, "
                f"and the images are {height}x{width}; give fewer network.widths, or another data.size and data.enlarge"
            )
        self.units, self.name = tuple(units), f"the surrogate of {of}"
        self.scale = [max(-a, b) for a, b in zip(lows, highs, strict=True)]
        self.shape = (latent, height // 2, width // 2)
        self.encoder = Encoder(channels, height, width, latent, hidden)
        self.shift = nn.Linear(len(self.units), latent * height * width // 4)
        self.decoder = nn.Sequential(unet(latent, 4 * channels, widths), nn.PixelShuffle(2))
        nn.init.zeros_(self.shift.bias)

    def parameters_code(self, xi: Tensor) -> Tensor:
        """F1(xi), (n, dim) -> (n, *latent shape)."""
        return self.shift(xi.to(self.shift.weight) / self.shift.weight.new_tensor(self.scale)).unflatten(1, self.shape)

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        return self.decoder(self.parameters_code(theta) + self.encoder(x))

    @property
    def directions(self) -> Tensor:
        """A1, a latent for each parameter's unit: (dim, *latent shape)."""
        return (self.shift.weight / self.shift.weight.new_tensor(self.scale)).T.unflatten(1, self.shape)


def load_surrogate(file: str | Path | None) -> Surrogate:
    """The surrogate of a checkpoint of `gsmooth surrogate`, read with weights_only=True.

    Raises:
        UncertifiableError: no file is named.
        RequestError: no such file, another content, or weights that are not finite.
    """
    if file is None:
        raise UncertifiableError("a surrogate is needed; give surrogate=FILE, written by `gsmooth surrogate`")
    content = read_checkpoint(file, "surrogate", "surrogate", "surrogate")
    try:
        surrogate = Surrogate(**content["hyper_parameters"]["surrogate"])
        state = content["state_dict"]
        surrogate.load_state_dict({k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)})
    except Exception as failure:  # another file's content has any form
        raise RequestError(f"{file} is no surrogate; give a file that `gsmooth surrogate` wrote") from failure
    if not all(bool(torch.isfinite(value).all()) for value in surrogate.state_dict().values()):
        raise RequestError(f"{file} holds NaN or infinite weights; train the surrogate again")
    return surrogate.eval().requires_grad_(False)


def encoder(file: str | None) -> Encoder:
    """F2 of a surrogate: preprocessing that leads into its latent space."""
    return load_surrogate(file).encoder


def directions(file: str | None) -> Tensor:
    """A1 of a surrogate, for `smoothing.Latent`."""
    return load_surrogate(file).directions


class Decoded(nn.Module):
    """The base classifier of latents, f(H(z + b1)): (n, *latent shape) -> (n, classes). H is not trained.

    Args:
        surrogate: whose H and b1 these are.
        classifier: f.

    Raises:
        RequestError: weights are loaded that were trained behind another surrogate.
    """

    shift: Tensor

    def __init__(self, surrogate: Surrogate, classifier: nn.Module):
        super().__init__()
        self.decoder, self.classifier = surrogate.decoder, classifier
        self.register_buffer("shift", surrogate.shift.bias.detach().unflatten(0, surrogate.shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.classifier(self.decoder(z + self.shift))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        own = {prefix + k: v for k, v in self.state_dict().items() if not k.startswith("classifier.")}
        if any(k in state_dict and not torch.equal(state_dict[k].to(v.device), v) for k, v in own.items()):
            raise RequestError(
                "the classifier was trained behind another surrogate; give surrogate=... that one's file"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def decoded(file: str | None, classifier: nn.Module) -> Decoded:
    """`Decoded` of a surrogate's file."""
    return Decoded(load_surrogate(file), classifier)
