"""The smoothed classifier: transform, preprocess, add noise, vote."""

import math
from collections.abc import Callable, Generator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gsmooth_lightning.errors import RequestError, check_whole
from gsmooth_lightning.rounds import Job
from gsmooth_lightning.smoothing import Gaussian, Law
from gsmooth_lightning.stream import Source, Stream, TrainingSource, sampling_slack
from gsmooth_lightning.transform import Identity, Transform, compute, is_exact

LEVELS = 255 * 256
"""Steps of the noise grid between 0 and 1 for images: contains the values k/255."""

SAMPLE_LEVELS = 2 * 32768
"""Steps of the noise grid between 0 and 1 for waveforms: contains the values k/32768."""

ROUND = 64
"""Blocks of one image that are worked on in a round: what they leave behind, piece by piece between the large tensors
of later blocks, would let memory grow with n."""

FINER = 32
"""How much finer the noise grid is, at most, under an exact transformation, whose values lie between its points."""

PARAMETER_STEPS = 2.0**30
"""Steps of the grid of an exact transformation's parameters over the span of their law, or more: the grid holds the
whole numbers, by which a cyclic translation moves."""


class SmoothedClassifier(nn.Module):
    """g(x) = argmax_c P( f(preprocess(psi(x, theta)) + epsilon) = c ), theta ~ law, epsilon ~ noise.

    Sound arithmetic: images and noise are rounded to the grid k/levels before they are added, and added exactly, so
    that the network is a function of an integer and no low bit of x leaks through (theory.md section 11). For images on
    the grid, x + round(epsilon) = round(x + epsilon): this is the theorem's classifier with the rounding inside f.

    The network always sees blocks of one fixed shape, because logits move in the sixth digit with the batch shape.

    Preprocessing may change an image's shape: noise, network and error bounds live in the encoded shape.

    Args:
        base: f, (n, c, h, w) -> (n, classes) logits, or (n,) integer labels.
        classes: number of classes.
        transform, law: psi and the law of its parameters, or neither.
        preprocess: between the transformation and the noise.
        noise: law of the pixel noise, or None.
        block: draws that the network sees at once.
        levels: steps of the noise grid between 0 and 1, a multiple of the steps of saved inputs; up to 32 times as many
            are taken under an exact transformation.
        votes: "hard", a draw's vote is f's class, or "soft", it is softmax(f) and g(x) the class with the largest mean:
            the theorems hold for means of functions into [0, 1] as they do for probabilities.
    """

    def __init__(
        self,
        base: nn.Module,
        classes: int,
        transform: Transform | None = None,
        preprocess: nn.Module | None = None,
        law: Law | None = None,
        noise: Law | None = None,
        block: int = 64,
        levels: int = LEVELS,
        votes: str = "hard",
    ):
        super().__init__()
        if block < 2:
            raise RequestError(f"block must be at least 2 draws, got {block}")
        if classes < 2:
            raise RequestError(f"classes must be at least 2, got {classes}")
        check_whole("SmoothedClassifier", levels=(levels, 1))
        if votes not in ("hard", "soft"):
            raise RequestError(f'votes must be "hard" or "soft", got {votes!r}')
        self.base, self.classes, self.block, self.levels, self.votes = base, classes, block, levels, votes
        self._levels = levels
        self.transform = transform if transform is not None else Identity()
        self.preprocess = preprocess if preprocess is not None else nn.Identity()
        self.law, self.noise = law, noise
        if (self.transform.dim > 0) != (law is not None):
            raise RequestError(f"the transformation {self.transform.name} and a law of its parameters go together")
        if law is not None and any(law.within(1e-12, self.transform.dim)[0].lt(torch.tensor(self.transform.least))):
            raise RequestError(
                f"{self.transform.name} has no parameters below {max(self.transform.least):g}; choose a one-sided law"
            )
        self.parameter_step = 0.0  # of the grid of an exact transformation's parameters, a power of two
        if law is not None and is_exact(self.transform):
            low, high = law.span
            self.parameter_step = min(1.0, 2.0 ** math.floor(math.log2((high - low) / PARAMETER_STEPS)))
        farthest = max(map(abs, noise.span)) if noise is not None else 0.0
        if (farthest + 2) * levels > 2**24:
            raise RequestError(
                f"pixel noise is too wide for exact sums: a Gaussian's sigma must be below "
                f"{(2**24 / levels - 2) / 9:.1f}, other laws must lie within +-{2**24 / levels - 2:.0f}"
            )
        if self.parameter_step:
            assert law is not None
            ends = torch.tensor([-1.0, 0, 1]).view(3, 1, 1)
            assert is_exact(self.transform)
            least, most = self.transform.values(ends, *law.within(0.01, self.transform.dim))
            room = 2**24 / levels / (farthest + max(2.0, float(most.max()), -float(least.min())))
            self.levels *= min(FINER, 2 ** int(math.log2(max(1.0, room))))
        self.largest = 2**24 - 1 - math.ceil(farthest * self.levels)

    def under(self, noise: Law) -> "SmoothedClassifier":
        """The same network, transformation and preprocessing under another pixel noise.

        Raises:
            RequestError: the noise is too wide for exact sums.
        """
        parts = (self.transform, self.preprocess, self.law, noise, self.block, self._levels, self.votes)
        return SmoothedClassifier(self.base, self.classes, *parts)

    # -------------------------------------------------- one draw, in two parts

    def encode(self, x: Tensor, theta: Tensor) -> Tensor:
        """What the noise is added to, in whole steps of the grid: round(levels * preprocess(psi(x, theta))), (n, *e).

        x: (n, c, h, w) float32, theta: (n, dim) in any precision, rounded to float32 here and nowhere before if the
        transformation interpolates. Values beyond what sums with the noise can hold are clamped, which brings images
        nearer to each other and nothing else.

        Raises:
            RequestError: images that are not float32, or preprocessing that changes their number.
        """
        if x.dtype != torch.float32:
            raise RequestError(f"images must be float32 for exact noise, not {x.dtype}; set trainer.precision=32-true")
        with torch.autocast(x.device.type, enabled=False):
            y = self.preprocess(compute(self.transform, x, theta))
        if len(y) != len(x):
            raise RequestError(f"preprocessing made {len(y)} images of {len(x)}; use steps that return one for each")
        return (y * self.levels).round_().clamp_(-self.largest, self.largest).float()

    @torch.inference_mode()
    def encoded_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape e of what the noise is added to, for an image x, (c, h, w): that of x unless preprocessing resizes."""
        return tuple(self.preprocess(x[None]).shape[1:])

    def draw(self, x: Tensor, source: Source | TrainingSource, n: int) -> Tensor:
        """n network inputs for one image x: (c, h, w) -> (n, *e), e its encoded shape."""
        theta = self.draw_parameters(source, n)
        steps = self.encode(x.expand(n if self.law else 1, *x.shape), theta)
        if self.noise is None:
            return (steps * (1 / self.levels)).expand(n, *steps.shape[1:])
        noise = self.noise.sample(source, n, tuple(steps.shape[1:])).mul_(self.levels).round_().to(steps.dtype)
        return noise.add_(steps).mul_(1 / self.levels)  # both are whole and below 2^24: the sum is exact

    def draw_parameters(self, source: Source | TrainingSource, n: int) -> Tensor:
        """n draws of theta, (n, dim), in the source's precision; on the grid of an exact transformation."""
        if self.law is None:
            return torch.zeros(n, 0, device=source.device)
        theta, step = self.law.sample(source, n, (self.transform.dim,)), self.parameter_step
        return theta.div_(step).round_().mul_(step) if step else theta

    # -------------------------------------------------- training: draws from torch's generator

    def training_images(self, x: Tensor, semantic: bool = True) -> Tensor:
        """preprocess(psi(x, theta)) with one theta for each image of a batch; theta = 0 unless `semantic`."""
        with torch.autocast(x.device.type, enabled=False):
            if semantic:
                x = self.transform(x, self.draw_parameters(TrainingSource(x.device), len(x)).float())
            return self.preprocess(x)

    def training_noise(self, x: Tensor) -> Tensor:
        """Pixel noise for a batch, shaped like it; zeros without a law of the noise."""
        if self.noise is None:
            return torch.zeros_like(x)
        return self.noise.sample(TrainingSource(x.device), len(x), tuple(x.shape[1:]))

    # -------------------------------------------------- votes

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the network returns, (n, classes) logits or (n,) integer labels.

        Raises:
            RequestError: it returns something else.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            out = self.base(inputs)
        if out.ndim == 2 and out.shape[1] != self.classes:
            raise RequestError(f"the network has {out.shape[1]} outputs, but there are {self.classes} classes")
        if out.ndim != 2 and (out.ndim != 1 or out.is_floating_point()):
            raise RequestError(f"the network must return (n, classes) logits or (n,) labels, not {tuple(out.shape)}")
        return out

    def labels(self, inputs: Tensor) -> Tensor:
        """Classes of network inputs, (n,); `classes` stands for an output that is not finite or not a class."""
        out = self.outputs(inputs)
        if out.ndim == 2:
            return torch.where(torch.isfinite(out).all(1), out.argmax(1), self.classes)
        return torch.where((out >= 0) & (out < self.classes), out, self.classes)

    def soft_votes(self, inputs: Tensor) -> Tensor:
        """Softmax of the logits rounded down to multiples of 2^-24, (n, classes + 1) float64; the last entry is 1 for
        outputs that are not finite.

        Rounding is part of the classifier: sums of votes are exact in any order, and no draw's votes exceed 1 in all.

        Raises:
            RequestError: the network returns labels.
        """
        out = self.outputs(inputs).double()
        if out.ndim != 2:
            raise RequestError("the network returns labels, which are hard votes; use votes=hard, or return logits")
        finite = torch.isfinite(out).all(1, keepdim=True)
        votes = torch.where(finite, out, 0.0).softmax(1).mul_(2**24).floor_().mul_(2**-24)
        return torch.cat([votes * finite, (~finite).double()], 1)

    @torch.inference_mode()
    def classify_base(self, x: Tensor) -> Tensor:
        """Classes that the base classifier gives images without noise or transformation, (n, c, h, w) -> (n,)."""
        zeros = torch.zeros(self.block, self.transform.dim, device=x.device)
        encoded = torch.cat([self.encode(part, zeros[: len(part)]) for part in x.split(self.block)]) * (1 / self.levels)
        padded = torch.cat([encoded, encoded[:1].expand(-len(x) % self.block, *encoded.shape[1:])])
        return torch.cat([self.labels(block) for block in padded.split(self.block)])[: len(x)]

    @torch.inference_mode()
    def block_counts(self, inputs: Callable[[int], Tensor], block: int, first: int, last: int) -> Tensor:
        """Votes of the draws first..last-1 of one block on the device: hard ones counted, (classes + 1,), soft ones
        draw by draw, (last - first, classes + 1)."""
        images = inputs(block)
        if self.votes == "soft":
            return self.soft_votes(images)[first:last]
        labels = self.labels(images)[first:last]
        return (labels[:, None] == torch.arange(self.classes + 1, device=images.device)).sum(0)  # bincount synchronises

    def sample(
        self, x: Tensor, stream: Stream, stage: str, first: int, last: int
    ) -> Generator[list[Job], list[Tensor], np.ndarray]:
        """Votes of the draws first..last-1 of a stage for one image, as a procedure (see `count`)."""
        return self.count(lambda b: self.draw(x, stream.at(stage, b, x.device), self.block), stream, first, last)

    def count(
        self, inputs: Callable[[int], Tensor], stream: Stream, first: int, last: int
    ) -> Generator[list[Job], list[Tensor], np.ndarray]:
        """Votes of the draws first..last-1, as a procedure (see `rounds`); inputs(b): those of block b to the network.

        Hard votes are counted, (classes + 1,); soft ones stay apart, (last - first, classes + 1), as bounds need them.

        Raises:
            RequestError: the network returned a NaN or infinity.
        """
        size = self.block
        jobs: list[Job] = [
            partial(self.block_counts, inputs, b, max(first - b * size, 0), min(last - b * size, size))
            for b in range(first // size, -(-last // size))
        ]
        gathered = torch.cat if self.votes == "soft" else lambda counts: torch.stack(counts).sum(0)
        parts = []
        for begin in range(0, len(jobs), ROUND):
            parts.append(gathered((yield jobs[begin : begin + ROUND])))
        votes = gathered(parts).cpu().numpy()  # the one synchronisation
        if failed := int(votes[..., -1].sum()):
            raise RequestError(
                f"the network returned NaN or infinity on {failed} of {last - first} draws of image {stream.image}, or "
                f"labels beyond {self.classes - 1}; check the network and its weights"
            )
        return votes

    def evaluations(self, first: int, last: int) -> int:
        """Forward passes that `sample` spends on these draws, padding included."""
        return (-(-last // self.block) - first // self.block) * self.block

    # -------------------------------------------------- hypotheses

    def slack(self, x: Tensor) -> float:
        """Total variation between the draws as sampled and as the theorems take them.

        Subtracted from pA once: the certificate is for the classifier under the exact laws, whose pA the sampled
        votes understate by at most this. Theta is rounded to float32 for a transformation that interpolates: a normal
        one meets a grid with 2^24 points in each of the 30 binades between 2^-26 and 13 standard deviations, fewer than
        the 26 * 2^25 allowed for here; below lies a mass of 1.2e-8, within the same allowance; for other laws 26 * 2^28
        allows for every float32. For an exact one it is rounded to the grid of `parameter_step`.
        """
        pixels, dim = 0.0, math.prod(self.encoded_shape(x))
        if self.noise is not None:
            pixels = self.noise.slack(dim, self.levels)
        cells = 2.0**25 if isinstance(self.law, Gaussian) else 2.0**28
        if self.parameter_step:
            assert self.law is not None
            low, high = self.law.span
            cells = (high - low) / self.parameter_step / 26
        return pixels + sampling_slack(self.transform.dim, cells)

    @torch.inference_mode()
    def check_function(self, x: Tensor) -> None:
        """Refuses preprocessing or a base network that is not a function of its one input, or not deterministic; and
        float32 of fewer bits than its own.

        A row's label must not depend on the other rows of its block (batch statistics do), nor on its place among them,
        nor on the call (dropout does): theory.md section 1.
        """
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        if any(backend.fp32_precision in ("tf32", "bf16") for backend in backends):
            raise RequestError(
                "products of float32 are rounded to fewer bits here than error bounds count on; call "
                'torch.set_float32_matmul_precision("highest")'
            )
        for module in self.base.modules():
            if module.training:
                raise RequestError("the network is in training mode; call .eval() first")
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise RequestError(
                    "the network normalises an image with the rest of its batch (batch statistics); certificates need "
                    "a function of one input: use track_running_stats=True"
                )
        source, half = Stream(0, 0).at("select", 0, x.device), self.block // 2
        theta, images = self.draw_parameters(source, 2), torch.stack([x, 1 - x])
        coded, alone = self.encode(images, theta)[0], self.encode(images[:1].expand_as(images), theta)[0]
        rows = self.draw(x, source, self.block)
        others = torch.cat([rows[:half], torch.zeros_like(rows[half:])])
        mixed, beside_others = self.base(rows)[:half], self.base(others)[:half]
        elsewhere = self.base(rows.flip(0)).flip(0)[:half]
        if apart(mixed, beside_others) or apart(mixed, elsewhere) or (coded - alone).abs().max() > 2:
            raise RequestError(
                "the classifier's output for an image depends on the rest of its batch or on chance (batch statistics, "
                "dropout in eval mode); certificates need a function of one input"
            )


def apart(some: Tensor, others: Tensor) -> bool:
    """Whether two outputs for the same inputs, (n, classes) or (n,), differ by more than sums in another order do: by
    1e-4 of the largest logit, or the two largest of each input by that of theirs (classes that are masked by huge
    negative logits hide nothing); labels are equal or not."""
    if not some.is_floating_point():
        return not torch.equal(some, others)
    pairs = [(some, others)]
    if some.ndim == 2 and some.shape[1] > 2:
        pairs.append((some.topk(2, 1).values, others.topk(2, 1).values))
    return any(float((a - b).abs().max()) > 1e-4 * float(a.abs().max()) for a, b in pairs)
