"""Networks with manners of their own, as users might bring them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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


class HeadFirst(nn.Module):
    """Registers its head before its blocks."""

    taps: tuple[str, ...] = ("first",)
    transforms: Mapping[str, Any] = {"size": 16}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(8, num_classes)
        self.first = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(images).mean((2, 3)))


class NormalizedHead(nn.Module):
    """Normalizes its logits."""

    taps: tuple[str, ...] = ("first",)
    transforms: Mapping[str, Any] = {"size": 16}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(8, num_classes), nn.BatchNorm1d(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(images).mean((2, 3)))


class Lazy(HeadFirst):
    """Leaves the size of its head open."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(10)


class Raising(HeadFirst):
    """Cannot be built."""

    def __init__(self) -> None:
        raise ValueError("no such thing")


class Gray(HeadFirst):
    """Takes one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)


class Tied(Headless):
    """Uses one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second.weight = self.first.weight


class Holding(Headless):
    """Its blocks know each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first.other, self.second.other = self.second, self.first  # type: ignore[assignment]


class Asserting(Headless):
    """Checks a type that every tensor has, but what torch.fx traces with has not."""

    def forward(self, images: Tensor) -> Tensor:
        assert isinstance(images, Tensor)
        return super().forward(images)


class Patches(nn.Module):
    """A small vision transformer of one size, which declares no taps."""

    transforms: Mapping[str, Any] = {"size": 64}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, stride=16)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 17, 8))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), 1, 8), tokens], 1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 0])
