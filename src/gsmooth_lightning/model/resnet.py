"""Residual networks for small images."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, resnet18

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model.pretrained import normalized


class CifarResNet(nn.Module):
    """ResNet of depth 6 k + 2 for 32x32 images: three stages of k basic blocks with 16, 32 and 64 channels.

    He et al. 2016, section 4.2, with 1x1 convolutions where the shape changes; its state dict has the keys of Cohen's,
    SmoothAdv's and MACER's networks.

    Args:
        depth: 20, 32, 44, 56, 110, ...
        channels, classes: of the images, of the output.

    Raises:
        RequestError: no such depth.
    """

    def __init__(self, depth: int, channels: int = 3, classes: int = 10):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise RequestError(f"model.depth must be 6 k + 2 (20, 32, 44, 56, 110), got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, classes)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


def cifar_resnet(depth: int, channels: int, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """`CifarResNet` behind the normalisation."""
    return normalized(CifarResNet(depth, channels, classes), mean, std)


def small_resnet18(channels: int, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """ResNet-18 for images of about 32x32, behind the normalisation: a first convolution of 3x3 without stride, and no
    max pooling after it."""
    network = resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()  # type: ignore[assignment]
    return normalized(network, mean, std)
