"""Training a base classifier for the smoothing it will be certified under."""

from typing import Any

from torch import Tensor, nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit.optimized import OptimizedModule
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import Threat
from gsmooth_lightning.train import NoiseAugmentation


class ClassifierModule(OptimizedModule):
    """Trains `smoothed.base` with an objective; validates it at one draw of the smoothing, whatever the objective.

    Args:
        smoothed: transformation, preprocessing and laws that the network is trained under.
        threat: prepares the inputs (enlargement, saved format).
        objective: (smoothed, x, y, epoch) -> (loss, logits), e.g. `train.NoiseAugmentation`.
        optimization: see `OptimizedModule`.
    """

    def __init__(
        self,
        smoothed: SmoothedClassifier,
        threat: Threat,
        objective: nn.Module,
        *optimization: Any,
    ):
        super().__init__(*optimization)
        self.smoothed, self.threat, self.objective = smoothed, threat, objective
        self.validation = NoiseAugmentation()

    @property
    def network(self) -> nn.Module:
        return self.smoothed.base

    def _step(self, objective: nn.Module, batch: tuple[Tensor, Tensor, Tensor], stage: str) -> Tensor:
        x, y, _ = batch
        found = objective(self.smoothed, self.threat.prepare(x), y, self.current_epoch)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise RequestError(
                f"the objective must return a loss and the logits it was computed from, not {type(found).__name__}; "
                "correct it (objective._target_=...)"
            )
        loss, logits = found
        accuracy = (logits.argmax(1) == y).float().mean()
        self.log_dict(
            {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(x),
            sync_dist=True,
        )
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(self.objective, batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self._step(self.validation, batch, "val")
