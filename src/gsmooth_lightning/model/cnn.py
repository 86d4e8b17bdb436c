"""Small convolutional networks for small images."""

from collections.abc import Sequence

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Two or more stages of convolution, batch normalisation, ReLU and 2x2 max pooling, then two linear layers.

    Args:
        channels, size: of the image, size x size pixels or [height, width].
        classes: outputs.
        widths: channels of each stage.
        hidden: width of the hidden linear layer.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int | Sequence[int] = 28,
        classes: int = 10,
        widths: Sequence[int] = (16, 32),
        hidden: int = 64,
    ):
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        stages: list[nn.Module] = []
        for outputs in widths:
            stages += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            stages += [nn.MaxPool2d(2)]
            channels, height, width = outputs, height // 2, width // 2
        self.features = nn.Sequential(*stages)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, classes)
        return self.head(self.features(x))
