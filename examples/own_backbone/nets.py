"""The residual networks for CIFAR of He et al. (2015): https://arxiv.org/abs/1512.03385."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters: where the maps shrink, every second pixel, the new channels zero."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.stride, self.new = stride, features - channels

    def forward(self, maps: Tensor) -> Tensor:
        shortcut = functional.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return functional.relu(self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(maps))))) + shortcut)


class CifarResNet(nn.Module):
    """A convolution, three stages of n blocks with 16, 32 and 64 channels, an average, a linear layer: 6n + 2 layers."""

    transforms: Mapping[str, Any] = {"size": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16)
        self.layer2 = self._stage(blocks, 16, 32)
        self.layer3 = self._stage(blocks, 32, 64)
        self.linear = nn.Linear(64, num_classes)

    @property
    def taps(self) -> tuple[str, ...]:
        """After every block."""
        return tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(len(self.layer1)))

    @staticmethod
    def _stage(blocks: int, channels: int, features: int) -> nn.Sequential:
        first = Residual(channels, features, features // channels)
        return nn.Sequential(first, *(Residual(features, features, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        maps = functional.relu(self.bn1(self.conv1(images)))
        return self.linear(self.layer3(self.layer2(self.layer1(maps))).mean((2, 3)))


def resnet20(num_classes: int = 10) -> nn.Module:
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> nn.Module:
    return CifarResNet(9, num_classes)
