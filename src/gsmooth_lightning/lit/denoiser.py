"""Training a denoiser in front of a classifier that stays as it is."""

from typing import Any

from matplotlib.figure import Figure
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit.optimized import OptimizedModule
from gsmooth_lightning.report.figures import denoising_figure
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import Threat

MEASURED = 1000
"""Validation images on which the denoiser is measured, or a batch more."""

SHOWN = 8
"""Images in the picture."""


class DenoiserModule(OptimizedModule):
    """Trains a denoiser under the smoothing that its classifier will be certified under (Salman et al. 2020).

    Validation measures, on MEASURED images at one draw each, the mean squared error of pixels and the accuracy of the
    classifier on clean, noisy and denoised images. `measured` holds the table of the last one; `picture` shows the
    first images. A wandb logger gets it after each epoch. The checkpoint holds the denoiser alone.

    Args:
        smoothed: the classifier of clean images (or nn.Identity, where there is none) and the laws around it.
        threat: prepares the inputs.
        denoiser: noisy inputs -> inputs.
        denoising: (denoiser, classifier or None, clean, noisy) -> loss, e.g. `train.DenoisingMSE`.
        optimization: see `OptimizedModule`.

    Raises:
        RequestError: no pixel noise.
    """

    def __init__(
        self,
        smoothed: SmoothedClassifier,
        threat: Threat,
        denoiser: nn.Module,
        denoising: nn.Module,
        *optimization: Any,
    ):
        super().__init__(*optimization)
        if smoothed.noise is None:
            raise RequestError("a denoiser takes off pixel noise; use noise=gaussian noise.sigma=SIGMA")
        self.strict_loading = False  # the classifier comes from its own checkpoint
        self.smoothed, self.threat, self.denoiser, self.denoising = smoothed, threat, denoiser, denoising
        self.smoothed.eval().requires_grad_(False)
        self.measured: dict[str, dict[str, str]] = {}
        self._sums: dict[str, Tensor] = {}
        self._images = 0
        self._shown: dict[str, Tensor] = {}

    @property
    def network(self) -> nn.Module:
        return self.denoiser

    @property
    def classifier(self) -> nn.Module | None:
        """f, if there is one."""
        return None if isinstance(self.smoothed.base, nn.Identity) else self.smoothed.base

    def pair(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(x, x + eps) after transformation and preprocessing, at one draw."""
        clean = self.smoothed.training_images(self.threat.prepare(batch[0]))
        return clean, clean + self.smoothed.training_noise(clean)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        clean, noisy = self.pair(batch)
        loss = self.denoising(self.denoiser, self.classifier, clean, noisy)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(clean))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        if self._images >= MEASURED:
            return
        clean, noisy = self.pair(batch)
        loss = self.denoising(self.denoiser, self.classifier, clean, noisy)
        kinds = {"clean": clean, "noisy": noisy, "denoised": self.denoiser(noisy)}
        if not self._images:
            self._shown = {kind: images[:SHOWN] for kind, images in kinds.items()}
        found = {"loss": loss * len(clean)}
        for kind, images in kinds.items():
            found[f"error, {kind}"] = (images - clean).square().flatten(1).mean(1).sum()
            if self.classifier is not None:
                answers = self.classifier(images)
                classes = answers.argmax(1) if answers.ndim == 2 else answers
                found[f"accuracy, {kind}"] = (classes == batch[1]).sum()
        self._sums = {name: value + self._sums.get(name, 0) for name, value in found.items()}
        self._images += len(clean)

    def on_validation_epoch_end(self) -> None:
        means = {name: float(value) / self._images for name, value in self._sums.items()}
        names = {"error": "mean squared error of a pixel", "accuracy": "accuracy of the classifier"}
        self.measured = {
            kind: {row: f"{means[f'{key}, {kind}']:.4f}" for key, row in names.items() if f"{key}, {kind}" in means}
            for kind in self._shown
        }
        logged = {"val/loss": means["loss"], "val/error": means["error, denoised"]}
        if "accuracy, denoised" in means:
            logged["val/accuracy"] = means["accuracy, denoised"]
        self.log_dict(logged, prog_bar=True)
        self._sums, self._images = {}, 0
        if isinstance(self.logger, WandbLogger) and not self.trainer.sanity_checking:
            self.logger.log_image("denoiser", [self.picture()])

    def picture(self) -> Figure:
        """Clean, noisy and denoised images."""
        return denoising_figure(self._shown)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes what `on_save_checkpoint` keeps, for averages of the weights."""
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the denoiser alone."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("denoiser.")}
