"""Which numbers are computed in what: bfloat16 inside, float32 where a CPU is faster in it, float32 weights and gradients everywhere."""

import pytest
import torch
from torch import nn

from tlpipeline.backbones.precision import autocast

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """A plain convolution, a depthwise one, a grouped one; remembers what each of them gave."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.grouped = nn.Conv2d(16, 8, 3, groups=2)
        self.gave: dict[str, torch.dtype] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = images
        for name, layer in self.named_children():
            maps = layer(maps)
            self.gave[name] = maps.dtype
        return maps.float().mean((2, 3))


@pytest.fixture
def net() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


def test_on_a_cpu_depthwise_convolutions_are_computed_in_float32_and_all_else_in_bfloat16(net: Mixed) -> None:
    with autocast(CPU, half=True):
        net(torch.randn(2, 3, 12, 12)).sum().backward()
    assert net.gave == {"plain": torch.bfloat16, "depthwise": torch.float32, "grouped": torch.bfloat16}
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_gray_image_s_first_convolution_is_not_depthwise() -> None:
    gray = nn.Conv2d(1, 8, 3)
    with autocast(CPU, half=True):
        assert gray(torch.randn(2, 1, 12, 12)).dtype == torch.bfloat16


def test_without_half_precision_everything_is_what_it_was_and_afterwards_too(net: Mixed) -> None:
    images = torch.randn(2, 3, 12, 12)
    plain = net(images)
    with autocast(CPU, half=False):
        assert torch.equal(net(images), plain)
    assert set(net.gave.values()) == {torch.float32}
    with autocast(CPU, half=True):
        near = net(images)
    assert torch.allclose(near, plain, atol=0.02)
    assert torch.equal(net(images), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net.depthwise(torch.randn(2, 8, 12, 12)).dtype == torch.bfloat16  # the mode went with its block
