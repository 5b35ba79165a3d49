"""Networks that a user might bring: the residual networks for CIFAR of He et al. 2015, and some with their own manners."""

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


class Undeclared(nn.Module):
    """Says neither taps nor transforms; its blocks run in another order than they are made, one twice, one writing into its input."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(8, num_classes)
        self.unused = nn.Conv2d(3, 3, 1)
        self.body = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(inplace=True))
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.twice(self.twice(self.stem(images)))
        for block in self.body:
            maps = block(maps)
        return self.head(maps.mean((2, 3)))


class Branching(nn.Module):
    """Looks at its data between two taps."""

    taps = ("first", "second")
    transforms: Mapping[str, Any] = {"size": 16}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(images)
        if maps.mean() > 0:
            maps = self.second(maps)
        return self.head(maps.mean((2, 3)))


class Pair(nn.Module):
    """Gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(images), self.right(images)


class Paired(nn.Module):
    """Its only block gives two tensors; as a tap it is none."""

    transforms: Mapping[str, Any] = {"size": 16}

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, images: Tensor) -> Tensor:
        left, right = self.pair(images)
        return (left + right).mean((2, 3))


class Tapped(Paired):
    """Says that the block with two tensors is a tap."""

    taps = ("pair",)


class Answering(Paired):
    """Returns a dictionary in place of logits."""

    def forward(self, images: Tensor) -> Any:
        return {"logits": super().forward(images)}


class Headless(nn.Module):
    """Ends with its pooled features; nothing was learnt behind its last tap."""

    taps: tuple[str, ...] = ("first", "second")
    transforms: Mapping[str, Any] = {"size": 16}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(images)))).mean((2, 3))


class Tapless(Headless):
    """Says that it has no taps."""

    taps = ()
