"""Networks of the grids that torchvision does not have: EfficientNet-Lite, Xception, and ViT-S/14 in the layout of DINOv2.

`research.weights` makes the weights files out of public packages. Neither are part of this repository.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the padding before and after, as TensorFlow's "same" has it: the odd pixel goes after."""
    whole = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return whole // 2, whole - whole // 2


class SamePad(nn.Module):
    """Pads maps as TensorFlow's "same" does, by an amount that follows from their size."""

    def __init__(self, kernel: int, stride: int, value: float = 0.0) -> None:
        super().__init__()
        self.kernel, self.stride, self.value = kernel, stride, value

    def forward(self, maps: Tensor) -> Tensor:
        height, width = (_same(size, self.kernel, self.stride) for size in maps.shape[2:])
        return functional.pad(maps, (*width, *height), value=self.value)


# --- EfficientNet-Lite ----------------------------------------------------------------------------------------------------------------


def _convolution(channels: int, features: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True) -> nn.Sequential:
    """Return a convolution that pads as TensorFlow does, its batch normalization, and ReLU6 if it is active."""
    if stride == 1:
        parts: list[nn.Module] = [nn.Conv2d(channels, features, kernel, padding=kernel // 2, groups=groups, bias=False)]
    else:
        parts = [SamePad(kernel, stride), nn.Conv2d(channels, features, kernel, stride=stride, groups=groups, bias=False)]
    return nn.Sequential(*parts, nn.BatchNorm2d(features, eps=1e-3, momentum=0.01), *([nn.ReLU6(inplace=True)] if active else []))


class Inverted(nn.Module):
    """Inverted residual: a 1x1 convolution to more channels, a depthwise one, a 1x1 back; with a shortcut if the shape stays."""

    def __init__(self, channels: int, features: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        self.expand = _convolution(channels, wide, 1) if expand > 1 else nn.Identity()
        self.depthwise = _convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _convolution(wide, features, 1, active=False)
        self.shortcut = stride == 1 and channels == features

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(maps)))
        return out + maps if self.shortcut else out


class EfficientNetLite(nn.Module):
    """EfficientNet (Tan and Le 2019) without squeeze-and-excitation, and with ReLU6 instead of swish.

    `width` scales the channels of the stages, `depth` the blocks of all stages but the first and the last.
    """

    # blocks, kernel, stride, expansion, features of Lite0
    stages = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    width, depth = 1.0, 1.0

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, 3, 2)
        blocks, channels = [], 32
        for stage, (repeats, kernel, stride, expand, lite0) in enumerate(self.stages):
            features = self._wide(lite0)
            for k in range(repeats if stage in (0, len(self.stages) - 1) else self._deep(repeats)):
                blocks.append(Inverted(channels, features, kernel, 1 if k else stride, expand))
                channels = features
        self.blocks = nn.ModuleList(blocks)
        self.last = _convolution(channels, 1280, 1)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(1280, num_classes))

    @classmethod
    def _wide(cls, channels: int) -> int:
        """Return the channels at this width: a multiple of eight, at least 90 % of the scaled number."""
        wanted = channels * cls.width
        near = max(8, int(wanted + 4) // 8 * 8)
        return near + 8 if near < 0.9 * wanted else near

    @classmethod
    def _deep(cls, blocks: int) -> int:
        return int(-(-blocks * cls.depth // 1))

    @property
    def taps(self) -> tuple[str, ...]:
        """After the last convolution, and after 15 blocks evenly spaced up to the last one."""
        kept = sorted({round(k * (len(self.blocks) - 1) / 14) for k in range(15)})
        return *(f"blocks.{k}" for k in kept), "last"

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, size, size) to logits (batch, classes)."""
        maps = self.stem(images)
        for block in self.blocks:
            maps = block(maps)
        return cast(Tensor, self.head(self.last(maps).mean((2, 3))))


class EfficientNetLite0(EfficientNetLite):
    """4.7 million parameters."""

    transforms: Mapping[str, Any] = {"size": 224, "resize": 256, "mean": (0.498, 0.498, 0.498), "std": (0.502, 0.502, 0.502)}

    @property
    def taps(self) -> tuple[str, ...]:
        """After every block, and after the last convolution."""
        return *(f"blocks.{k}" for k in range(len(self.blocks))), "last"


class EfficientNetLite1(EfficientNetLite):
    """5.4 million parameters."""

    transforms: Mapping[str, Any] = {"size": 240, "resize": 272, "mean": (0.498, 0.498, 0.498), "std": (0.502, 0.502, 0.502)}
    width, depth = 1.0, 1.1


class EfficientNetLite2(EfficientNetLite):
    """6.1 million parameters."""

    transforms: Mapping[str, Any] = {"size": 260, "resize": 292, "mean": (0.498, 0.498, 0.498), "std": (0.502, 0.502, 0.502)}
    width, depth = 1.1, 1.2


# --- Xception -------------------------------------------------------------------------------------------------------------------------


def _norm(features: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(features, eps=1e-3, momentum=0.01)


class Separable(nn.Sequential):
    """A depthwise 3x3 convolution, a 1x1 convolution, and batch normalization."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, features, 1, bias=False),
            _norm(features),
        )


class Entry(nn.Module):
    """Two separable convolutions and a pooling to half the side, with a strided 1x1 convolution as shortcut."""

    def __init__(self, channels: int, middle: int, features: int, active_first: bool = True) -> None:
        super().__init__()
        first: list[nn.Module] = [nn.ReLU()] if active_first else []
        self.separable = nn.Sequential(*first, Separable(channels, middle), nn.ReLU(), Separable(middle, features))
        self.pool = nn.Sequential(SamePad(3, 2, float("-inf")), nn.MaxPool2d(3, 2))
        self.shortcut = nn.Sequential(nn.Conv2d(channels, features, 1, stride=2, bias=False), _norm(features))

    def forward(self, maps: Tensor) -> Tensor:
        return cast(Tensor, self.pool(self.separable(maps)) + self.shortcut(maps))


class Middle(nn.Module):
    """Three separable convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.separable = nn.Sequential(*(part for _ in range(3) for part in (nn.ReLU(), Separable(channels, channels))))

    def forward(self, maps: Tensor) -> Tensor:
        return cast(Tensor, self.separable(maps) + maps)


class Xception(nn.Module):
    """Xception (Chollet 2017) as Keras has it, without a head: 20.9 million parameters."""

    transforms: Mapping[str, Any] = {"size": 299, "resize": 333, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, bias=False), _norm(32), nn.ReLU(), nn.Conv2d(32, 64, 3, bias=False), _norm(64), nn.ReLU()
        )
        entries = [Entry(64, 128, 128, active_first=False), Entry(128, 256, 256), Entry(256, 728, 728)]
        self.blocks = nn.ModuleList([*entries, *(Middle(728) for _ in range(8)), Entry(728, 728, 1024)])
        self.last = nn.Sequential(Separable(1024, 1536), nn.ReLU(), Separable(1536, 2048), nn.ReLU())

    @property
    def taps(self) -> tuple[str, ...]:
        """After the stem, every block, and the last two convolutions."""
        return "stem", *(f"blocks.{k}" for k in range(len(self.blocks))), "last"

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, size, size) to pooled features (batch, 2048)."""
        maps = self.stem(images)
        for block in self.blocks:
            maps = block(maps)
        return cast(Tensor, self.last(maps).mean((2, 3)))


# --- DINOv2 ---------------------------------------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """Patch embedding and class token; the positions are resized to the size of the images."""

    def __init__(self, width: int, patch: int, side: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, width, side, side) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, size, size) to tokens (batch, 1 + patches, width); the class token includes its position."""
        patches = self.patches(images)
        positions = functional.interpolate(self.positions, size=patches.shape[2:], mode="bicubic", align_corners=False)
        return torch.cat([self.token.expand(len(images), -1, -1), (patches + positions).flatten(2).transpose(1, 2)], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention with 64 channels a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.joined = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        query, key, value = self.joined(tokens).view(batch, count, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return cast(Tensor, self.out(attended.transpose(1, 2).reshape(batch, count, width)))


class Block(nn.Module):
    """Transformer block with pre-normalization and LayerScale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width)
        self.linear = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.scale1 * self.attention(self.norm1(tokens))
        return cast(Tensor, tokens + self.scale2 * self.linear(self.norm2(tokens)))


class TokenPooling(nn.Module):
    """Map tokens (batch, 1 + patches, width) to the class token and the mean of the patches: (batch, 2 width)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)


class VitSmall14(nn.Module):
    """ViT-S/14 in the layout of DINOv2 (Oquab et al. 2023), without a head: 22 million parameters.

    A tap is a submodule, so each block has a pooling module beside it.
    """

    transforms: Mapping[str, Any] = {"size": 224, "resize": 256, "interpolation": "bicubic"}
    width, depth = 384, 12

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding(self.width, 14, 37)
        self.blocks = nn.ModuleList(Block(self.width) for _ in range(self.depth))
        self.read = nn.ModuleList(TokenPooling() for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.last = TokenPooling()

    @property
    def taps(self) -> tuple[str, ...]:
        """After every block, and after the last normalization."""
        return *(f"read.{k}" for k in range(self.depth)), "last"

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, size, size) to features (batch, 768)."""
        tokens = self.embedding(images)
        for block, read in zip(self.blocks, self.read, strict=True):
            tokens = block(tokens)
            read(tokens)
        return cast(Tensor, self.last(self.norm(tokens)))
