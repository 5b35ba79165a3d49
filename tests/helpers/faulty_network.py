"""A small network whose training passes fail as a test asks: memory runs out, or a gradient is not finite."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BACKBONE = {"backbone": "tests.helpers.faulty_network:network", "weights": "none"}


class Faults:
    """What goes wrong in this process, and what was seen.

    Attributes:
        passes: sizes of the training passes so far.
        not_finite: numbers of passes, from 1 on, that give no finite gradient.
        memory: images for which there is memory.
        before: called with the number of each pass before it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(
        self, not_finite: frozenset[int] = frozenset(), memory: int = 10**9, before: Callable[[int], None] = lambda number: None
    ) -> None:
        self.passes: list[int] = []
        self.not_finite, self.memory, self.before = not_finite, memory, before

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (images,) = inputs
        if not module.training:
            return inputs
        if len(images) > self.memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.passes.append(len(images))
        self.before(len(self.passes))
        return (images * float("nan"),) if len(self.passes) in self.not_finite else inputs


FAULTS = Faults()


class Small(nn.Module):
    """Two convolutions and a linear layer."""

    transforms: Mapping[str, Any] = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    taps = ("conv1", "conv2")

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, stride=2), relu=nn.ReLU()))
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(8, 16, 3, stride=2), relu=nn.ReLU()))
        self.fc = nn.Linear(16, num_classes)
        self.conv1.conv.register_forward_pre_hook(FAULTS)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(images)).mean((2, 3)))


def network(num_classes: int = 10) -> nn.Module:
    return Small(num_classes)
