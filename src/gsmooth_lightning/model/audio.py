"""Networks for waveforms."""

from torch import Tensor, nn
from torchaudio.transforms import MFCC
from torchvision import models

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model.pretrained import Normalize


class MFCCNet(nn.Module):
    """Mel-frequency cepstral coefficients of a waveform, taken as an image of one channel by a ResNet.

    Fischer et al. 2020, section 7.3. Differentiable, so that gradients reach the waveform. Energies enter as their
    logarithm, not as decibels relative to the loudest one, which in torchaudio may come from another clip of the batch.

    Args:
        name: torchvision's ResNet, e.g. "resnet18" or "resnet50".
        classes: outputs.
        rate: samples a second.
        coefficients: cepstral coefficients kept.
        window, hop: lengths of the Fourier window and of its step, in samples.
        mels: mel bands.
        gain: of the waveform. The logarithm's floor, 1e-6, then lies at energies of 1e-6 / gain^2, about those of noise
            with sigma .006: without it digital silence would look like nothing the network saw under noise.

    Raises:
        RequestError: no such ResNet.
    """

    def __init__(
        self,
        name: str = "resnet18",
        classes: int = 35,
        rate: int = 16_000,
        coefficients: int = 40,
        window: int = 480,
        hop: int = 160,
        mels: int = 64,
        gain: float = 0.01,
    ):
        super().__init__()
        if not name.startswith("resnet") or name not in models.list_models(module=models):
            raise RequestError(f"model.name must be a ResNet of torchvision such as resnet18, got {name!r}")
        self.mfcc = MFCC(
            rate, coefficients, log_mels=True, melkwargs={"n_fft": window, "hop_length": hop, "n_mels": mels}
        )
        self.gain = gain
        self.scale = Normalize([0.0], [10.0])
        self.network = models.get_model(name, weights=None, num_classes=classes)
        self.network.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (n, 1, t) -> (n, classes)
        return self.network(self.scale(self.mfcc(self.gain * x)))  # (n, 1, coefficients, frames)
