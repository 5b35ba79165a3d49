"""Networks of the research grid that torchvision does not have."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Inverted(nn.Module):
    """A 1x1 convolution to six times the channels, a depthwise one, one back to few; around it a shortcut where nothing changes its shape."""

    def __init__(self, channels: int, features: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        self.expand = _convolution(channels, wide, 1) if expand > 1 else nn.Identity()
        self.depthwise = _convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _convolution(wide, features, 1)[:2]
        self.shortcut = stride == 1 and channels == features

    def forward(self, maps: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(maps)))
        return out + maps if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019) without squeeze-and-excitation, ReLU6 for swish; 4.7 million parameters.

    Made for TensorFlow, whose strided convolutions leave a pixel more at the right and at the bottom of maps of an even size.
    """

    transforms: Mapping[str, Any] = {"size": 224, "resize": 256, "mean": (0.498, 0.498, 0.498), "std": (0.502, 0.502, 0.502)}
    # blocks, kernel, stride, expansion, features
    stages = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, 3, 2)
        blocks, channels = [], 32
        for repeats, kernel, stride, expand, features in self.stages:
            for k in range(repeats):
                blocks.append(Inverted(channels, features, kernel, 1 if k else stride, expand))
                channels = features
        self.blocks = nn.ModuleList(blocks)
        self.last = _convolution(channels, 1280, 1)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    @property
    def taps(self) -> tuple[str, ...]:
        """After every block, and after the last convolution."""
        return *(f"blocks.{k}" for k in range(len(self.blocks))), "last"

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for block in self.blocks:
            maps = block(maps)
        return self.head(self.last(maps).mean((2, 3)))


def _convolution(channels: int, features: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that pads as TensorFlow does, its normalization, and ReLU6."""
    around = kernel - stride  # over both sides, of maps whose size the stride divides
    convolution = nn.Conv2d(channels, features, kernel, stride=stride, groups=groups, bias=False)
    normed = nn.BatchNorm2d(features, eps=1e-3, momentum=0.01)
    if not around:
        return nn.Sequential(convolution, normed, nn.ReLU6(inplace=True))
    padded = nn.Sequential(nn.ZeroPad2d((around // 2, around - around // 2) * 2), convolution)
    return nn.Sequential(padded, normed, nn.ReLU6(inplace=True))
