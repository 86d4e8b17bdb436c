"""Learning the noise of a smoothed classifier whose network stays as it is."""

from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit.optimized import OptimizedModule
from gsmooth_lightning.report.figures import sigma_figure, tradeoff_figure
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import LowRankGaussian
from gsmooth_lightning.threat import Threat
from gsmooth_lightning.train import Maximised, Scales

MEASURED = 1000
"""Validation images on which the sigma is measured, or a batch more."""


class SigmaModule(OptimizedModule):
    """Learns `scales`, the covariance of the classifier's pixel noise, by gradient ascent (Tecot et al. 2021).

    Validation measures size and accuracy on MEASURED images, by softmax and n0 draws as in training: what is certified,
    `gsmooth certify` says. `measured` holds the table of the last one; a wandb logger gets the sigma image, and
    accuracy against size so far, after each epoch. The checkpoint holds the noise and no network.

    Args:
        smoothed: the classifier, its network trained; its own noise is not used.
        threat: prepares the inputs.
        scales: what is learned.
        maximised: (smoothed, threat, x, y) -> (loss, measures).
        optimization: see `OptimizedModule`.

    Raises:
        RequestError: the network returns labels, which have no gradient.
    """

    def __init__(
        self, smoothed: SmoothedClassifier, threat: Threat, scales: Scales, maximised: Maximised, *optimization: Any
    ):
        super().__init__(*optimization)
        self.strict_loading = False  # the network comes from its own checkpoint
        self.smoothed, self.threat, self.scales, self.maximised = smoothed, threat, scales, maximised
        self.smoothed.eval().requires_grad_(False)
        self.measured: dict[str, dict[str, str]] = {}
        self._seen: list[tuple[dict[str, Tensor], int]] = []
        self._path: list[tuple[float, float]] = []

    @property
    def network(self) -> nn.Module:
        return self.scales

    def _step(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        x, y, _ = batch
        if not torch.isfinite(self.scales.log_sigma.exp().log()).all():  # 0 has none
            raise RequestError("sigma left all bounds; lower learn.optimizer.lr")
        smoothed = self.smoothed.under(self.scales.law())  # outside this module, and averages of its weights
        loss, measures = self.maximised(smoothed, self.threat, self.threat.prepare(x), y)
        if not torch.isfinite(loss):
            raise RequestError("the size or its gradient is not finite; lower learn.optimizer.lr or noise.sigma")
        return {"loss": loss, **measures}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        found = self._step(batch)
        sizes = {f"train/{name}": value for name, value in found.items()}
        self.log_dict(sizes, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch[0]))
        return found["loss"]

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        if sum(images for _, images in self._seen) < MEASURED:
            self._seen.append((self._step(batch), len(batch[0])))

    def on_validation_epoch_end(self) -> None:
        total = sum(images for _, images in self._seen)
        names = self._seen[0][0]
        means = {name: sum(found[name] * images for found, images in self._seen) / total for name in names}
        self._seen = []
        self.log_dict({f"val/{name}": value for name, value in means.items()}, prog_bar=True)
        sigma = self.scales.sigma().detach()
        rows = {f"{name} (softmax, {total} validation images)": f"{float(means[name]):.4f}" for name in names}
        rows |= {"sigma, geometric mean": f"{float(sigma.log().mean().exp()):.4g}"}
        rows |= {"sigma, least and largest": f"{float(sigma.min()):.4g} to {float(sigma.max()):.4g}"}
        self.measured = {"learned noise": rows}
        self._path.append((float(means["size"]), float(means["accuracy"])))
        if isinstance(self.logger, WandbLogger) and not self.trainer.sanity_checking:
            self.logger.log_image("sigma", [self.picture()])
            self.logger.log_image("tradeoff", [tradeoff_figure({"after each epoch": self._path}, "size")])

    def picture(self) -> Figure:
        """The sigma image."""
        return sigma_figure({"sigma": self.scales.sigma().detach()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes what `on_save_checkpoint` keeps, for averages of the weights."""
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the scales alone, and the law that `learned_noise` reads."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("scales.")}
        law = self.scales.law()
        assert isinstance(law.sigma, Tensor)
        factors = law.factors.detach().cpu() if isinstance(law, LowRankGaussian) else None
        checkpoint["noise"] = {"sigma": law.sigma.detach().cpu(), "factors": factors}
