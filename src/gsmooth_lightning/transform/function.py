"""Your own function of an image and a few numbers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.transform.base import Transform, check_images


def jpeg(image: Tensor, theta: Tensor) -> Tensor:
    """JPEG at quality 100 - theta, and back; theta = 0 leaves the image alone. An example of a function: with
    threat.step=1 it has finitely many outcomes."""
    if not bool(theta.any()):
        return image
    quality = 100 - int(theta)
    if not 1 <= quality <= 100 or len(image) not in (1, 3):
        raise RequestError("JPEG takes images of one or three channels, and theta from 0 to 99; lower threat.high")
    coded = encode_jpeg((image * 255).round().byte().cpu(), quality=quality)
    return (decode_jpeg(coded) / 255).to(image.device)


class Function(Transform):
    """psi(x, theta) = function(x, theta), clamped to [0, 1]: any Python function of an image, with psi(x, 0) = x.

    certify=cover is `sound` if a movement bound is given, or if the attacker has finitely many parameters
    (threat.step); otherwise it tries a grid, and says `heuristic`.

    Args:
        function: an image, (c, h, w) float32, and parameters, (dim,), to an image of the same shape; deterministic.
        units: unit of each parameter, one to three.
        name: in messages and tables.
        movement: an image, (c, h, w), and boxes low, high, (k, dim), to a bound of
            ||psi(x, theta) - psi(x, middle)||_2 over theta in each box, as float32 rounds it: (k,). `sound` rests on
            it.

    Raises:
        RequestError: something that cannot be called, not one to three parameters; later: a function that changes the
            shape, returns no finite numbers or no tensor, or does not leave the image alone at theta = 0; by
            certify=cover: one that is not deterministic.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        units: Sequence[str],
        name: str = "your function",
        movement: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        if not callable(function) or (movement is not None and not callable(movement)):
            raise RequestError(
                "transform.function and transform.movement must be Python functions; give them by _target_"
            )
        if not isinstance(units, Sequence) or isinstance(units, str) or not 1 <= len(units) <= 3:
            raise RequestError(f"transform.units must list the units of one to three parameters, got {units}")
        self.function, self.bound, self.units, self.name = function, movement, tuple(units), name

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        check_images(x, self.name)
        return torch.stack([self._one(image, own) for image, own in zip(x, theta, strict=True)])

    def _one(self, image: Tensor, theta: Tensor) -> Tensor:
        out = self.function(image, theta)
        if not isinstance(out, Tensor) or out.shape != image.shape or not bool(torch.isfinite(out).all()):
            raise RequestError(
                f"{self.name} must return finite images of shape {tuple(image.shape)}, at theta = {theta.tolist()} too"
            )
        out = out.to(image).clamp(0, 1)
        if not bool(theta.any()) and not torch.allclose(out, image, atol=1e-4):
            raise RequestError(f"{self.name} must leave the image as it is at theta = 0; shift its parameters")
        return out

    def movement(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The bound that was given, (k,) float64.

        Raises:
            RequestError: it returned something else.
        """
        assert self.bound is not None
        moved = self.bound(x, low, high)
        if not isinstance(moved, Tensor) or moved.shape != (len(low),) or not bool((moved >= 0).all()):
            raise RequestError(f"the movement bound of {self.name} must return {len(low)} numbers from 0 on for boxes")
        return moved.double().to(x.device)
