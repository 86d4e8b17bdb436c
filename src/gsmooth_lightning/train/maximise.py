"""What a learned sigma maximises: (smoothed, threat, x, y) -> (loss, measures by name)."""

from abc import ABC, abstractmethod
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.special import ndtr, ndtri
from torch.utils.checkpoint import checkpoint

from gsmooth_lightning.confidence import check_alpha
from gsmooth_lightning.error.base import defects
from gsmooth_lightning.errors import RequestError, UncertifiableError, at_least, check_whole, positive
from gsmooth_lightning.preprocess import is_nothing
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, LowRankGaussian
from gsmooth_lightning.stream import TrainingSource
from gsmooth_lightning.threat import PixelThreat, Threat, TransformationThreat
from gsmooth_lightning.transform import Resolvable, compute, is_exact

EDGE = 1e-4
"""Estimated probabilities are kept so far from 1/2 and 1, where z(p) has no logarithm or no gradient."""


class Maximised(nn.Module, ABC):
    """What is maximised over the noise of a smoothed classifier whose network stays as it is.

    p_hat is the mean softmax of the true class over n0 draws, whose gradient reaches the noise through its sample
    (reparametrisation).

    Args:
        n0: draws for each image.
        weight: of -log p_hat, averaged over all images, the failing ones included: how much size is given up for
            accuracy. 0: nothing keeps images right, and the initial sigma decides (the paper's rule).
        n, alpha: of the plan that will certify: sizes are of Wilson's lower bound of p_hat for n votes, a smooth one:
            what n votes cannot show is not worth smaller noise. None: of p_hat itself, as in the paper.
        micro_batch: draws that the network sees at once, or n0 if that is more; a step needs no more memory than these
            do.

    Raises:
        RequestError: numbers of the wrong kind, or a negative weight.
    """

    def __init__(
        self, n0: int = 32, weight: float = 0.0, n: int | None = None, alpha: float = 1e-3, micro_batch: int = 256
    ):
        super().__init__()
        check_whole("maximise", n0=(n0, 1), n=(1 if n is None else n, 1), micro_batch=(micro_batch, 1))
        check_alpha(alpha)
        self.n, self.alpha = n, alpha
        self.n0, self.weight, self.micro_batch = n0, at_least("maximise.weight", weight, 0), micro_batch

    @abstractmethod
    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        """Raises UncertifiableError where this is no size of what the classifier certifies."""

    @abstractmethod
    def size(self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, p: Tensor, right: Tensor) -> Tensor:
        """What is maximised, a number: of images x with probabilities p of their classes, which are `right` or not."""

    def forward(
        self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(-size + weight * mean -log p_hat, {"size", "accuracy"}) of clean images x, (n, c, h, w), of classes y."""
        votes = self.votes(smoothed, x)
        p, right = votes.gather(1, y[:, None])[:, 0], votes.argmax(1) == y
        size = self.size(smoothed, threat, x, self.shown(p), right)
        loss = -size - self.weight * p.clamp_min(EDGE).log().mean()
        return loss, {"size": size.detach(), "accuracy": right.float().mean()}

    def shown(self, p: Tensor) -> Tensor:
        """What n votes show of probabilities: Wilson's lower bound, (p + c/2 - sqrt(c p (1 - p) + c^2 / 4)) / (1 + c)
        with c = z(1 - alpha)^2 / n."""
        if self.n is None:
            return p
        c = NormalDist().inv_cdf(1 - self.alpha) ** 2 / self.n
        return (p + c / 2 - (c * p * (1 - p) + c**2 / 4).sqrt()) / (1 + c)

    def votes(self, smoothed: SmoothedClassifier, x: Tensor) -> Tensor:
        """Mean softmax over n0 draws of each image, (n, classes), some images at a time: the backward pass computes
        each part anew (gradient checkpointing)."""

        def mean_softmax(part: Tensor) -> Tensor:
            clean = smoothed.training_images(part.repeat_interleave(self.n0, 0))
            out = smoothed.outputs(clean + smoothed.training_noise(clean))
            if out.ndim != 2:
                raise RequestError("the network returns labels, which have no gradient; return logits")
            return out.softmax(1).view(len(part), self.n0, -1).mean(1)

        parts = x.split(max(1, self.micro_batch // self.n0))
        return torch.cat([checkpoint(mean_softmax, part, use_reentrant=False) for part in parts])


class CertifiedArea(Maximised):
    """Mean over the images that are right of (sum log sigma_i + D log z(p_hat)) / D: the certified area of Tecot et al.
    2021 (section 4.1), a coordinate. ln det(Sigma) / 2 stands for the sum where Sigma is not diagonal.

    It is the logarithm of the geometric mean of the ellipsoid's axes. (Their Algorithm 1 adds the second term to the
    loss that it minimises, which would lower p_hat: theory.md section 10.)
    """

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        if not isinstance(threat, PixelThreat) or threat.norm != "l2" or smoothed.law is not None:
            raise UncertifiableError(
                "the certified area is of pixel noise alone; use threat=l2, transform=identity and law=none, or "
                "maximise=range for a transformation"
            )
        if not is_nothing(smoothed.preprocess):
            raise UncertifiableError("an area is of changes of pixels; use preprocess=none")

    def size(self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, p: Tensor, right: Tensor) -> Tensor:
        noise, shape = smoothed.noise, smoothed.encoded_shape(x[0])
        assert isinstance(noise, Gaussian | LowRankGaussian)
        radius = ndtri(p[right].double().clamp(0.5 + EDGE, 1 - EDGE))
        area = noise.half_log_det(shape) / torch.Size(shape).numel() + radius.log()
        return area.sum() / right.sum().clamp_min(1)


class CertifiedRange(Maximised):
    """The share of the threat's range that the joint certificate certifies, over all images: the mean over radii r up
    to the threat's reach of sigmoid((z(p_hat) - z(1/2 + rho) - sqrt(r^2 / sigma_theta^2 + E^2)) / width), what is
    certified being where that is positive (Theorem J'). The area below the certified-accuracy curve, made smooth.

    E is the median over draws of theta of the largest defect, over a grid of gammas, in units of the noise; rho what
    the larger ones cost. The certificate proves its own.

    Args:
        draws: of theta, for each image.
        points: gammas on the grid, and radii.
        width: of the sigmoid.
        n0, weight, micro_batch: see `Maximised`.
    """

    def __init__(self, draws: int = 8, points: int = 7, width: float = 0.25, **options: float):
        super().__init__(**options)  # type: ignore[arg-type]
        check_whole("maximise", draws=(draws, 2), points=(points, 2))
        self.draws, self.points, self.width = draws, points, positive("maximise.width", width)

    def check(self, smoothed: SmoothedClassifier, threat: Threat) -> None:
        transform = smoothed.transform
        if not isinstance(threat, TransformationThreat) or not isinstance(smoothed.law, Gaussian):
            raise UncertifiableError(
                "the certified range is of a transformation with a Gaussian law of its parameters; use law=gaussian, "
                "or maximise=area for threat=l2"
            )
        if not isinstance(transform, Resolvable) or is_exact(transform) or not threat.alike:
            raise UncertifiableError(
                f"{transform.name} has no interpolation error, or several units; its noise is not what limits it"
            )
        if isinstance(smoothed.noise, LowRankGaussian):
            raise UncertifiableError("the joint certificate is for noise without correlations; use scales.rank=0")

    def size(self, smoothed: SmoothedClassifier, threat: Threat, x: Tensor, p: Tensor, right: Tensor) -> Tensor:
        assert isinstance(threat, TransformationThreat)
        assert smoothed.law is not None
        found = self.errors(smoothed, threat, x)
        error = found.quantile(0.5, 1, interpolation="higher", keepdim=True)
        rho = (2 * ndtr((found - error).clamp_min(0) / 2) - 1).mean(1)
        radii = torch.linspace(0, threat.reach, self.points, dtype=torch.float64, device=x.device)[1:]
        ends = radii[:, None].expand(-1, smoothed.transform.dim)
        margin = ndtri(p.double().clamp(EDGE, 1 - EDGE)) - ndtri(0.5 + rho.clamp_max(0.5 - EDGE))
        needed = torch.hypot(smoothed.law.gauge(ends), error)
        return ((margin[:, None] - needed) / self.width).sigmoid().mean()

    def errors(self, smoothed: SmoothedClassifier, threat: TransformationThreat, x: Tensor) -> Tensor:
        """max over gamma of the defect's gauge, for draws of theta: (n, draws)."""
        gammas = threat.parameters(self.points)[0].to(x.device)
        n, k, many = len(x), len(gammas), len(x) * self.draws
        with torch.no_grad():
            theta = smoothed.draw_parameters(TrainingSource(x.device), many).double()
            files = threat.save(compute(threat.transform, x.repeat_interleave(k, 0), gammas.repeat(n, 1)).float())
            # one row for each (image, draw, gamma)
            files = files.view(n, 1, k, *x.shape[1:]).expand(-1, self.draws, -1, *x.shape[1:]).flatten(0, 2)
            own = x.repeat_interleave(self.draws * k, 0)
            missed = defects(smoothed, own, files, gammas.double().repeat(many, 1), theta.repeat_interleave(k, 0))
        assert smoothed.noise is not None
        return smoothed.noise.gauge(missed).view(n, self.draws, k).amax(2)
