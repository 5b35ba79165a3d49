"""The tangent probe: the kernel of gradients, sketched, and what it says beside the frozen features."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tlpipeline.backbones import catalogue, taps
from tlpipeline.profiling.ntk import GradientSketcher, tangent_kernel
from tlpipeline.profiling.probes import guesses, leave_one_out, one_hot

CPU = torch.device("cpu")


class Small(nn.Module):
    """Two convolutions with a BatchNorm between them; maps as the only output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.last(torch.relu(self.norm(self.first(x)))),)


def images(count: int, size: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def kernel(net: nn.Module, x: Tensor, seed: int = 0, batch: int = 4) -> np.ndarray:
    sketcher = GradientSketcher(net, CPU, seed)
    return tangent_kernel(torch.cat([sketcher.sketch(part) for part in x.split(batch)]))


def test_the_sketched_kernel_is_the_one_of_the_gradients() -> None:
    net, x = Small(), images(12)
    found = kernel(net, x, seed=3)
    generator = torch.Generator().manual_seed(3)
    count = sum(p.numel() for p in net.parameters())
    for most in (1 << 14, 2):  # the sketch's own draws come first
        torch.randint(0, most, (count,), generator=generator)
    direction = torch.randn(5, generator=generator)
    rows = []
    net.eval()
    for image in x.split(1):
        gradients = torch.autograd.grad(net(image)[0].mean((2, 3))[0] @ direction, list(net.parameters()))
        row = torch.cat([g.reshape(-1) for g in gradients]).double()
        rows.append(row / row.norm())
    exact = torch.stack(rows).numpy()
    exact -= exact.mean(0)
    exact = exact @ exact.T
    assert np.allclose(found, exact / (exact.trace() / 12), atol=0.06)


def test_the_kernel_is_centered_symmetric_positive_and_of_mean_one() -> None:
    found = kernel(Small(), images(10))
    assert np.allclose(found.sum(0), 0, atol=1e-9)
    assert np.allclose(found, found.T)
    assert np.linalg.eigvalsh(found).min() > -1e-9
    assert found.trace() / 10 == pytest.approx(1)


def test_weights_statistics_and_flags_stay_as_they_are() -> None:
    net = Small()
    net.first.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    kernel(net, images(6))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in net.parameters())


def test_batches_and_order_of_the_images_do_not_matter_and_the_seed_does() -> None:
    net, x = Small(), images(8)
    found = kernel(net, x)
    assert np.allclose(kernel(net, x, batch=3), found, atol=1e-5)
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    assert np.allclose(kernel(net, x[order]), found[np.ix_(order, order)], atol=1e-5)
    assert not np.allclose(kernel(net, x, seed=1), found, atol=1e-3)


def test_gradients_read_what_the_last_layer_threw_away() -> None:
    """The last convolution looks at two of six channels; the class stands in another one, which fine-tuning could open again."""
    net = Small()
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.fill_(1.0)
        for i in range(6):
            net.first.weight[i, i % 3, 1, 1] = 1.0
        net.last.weight[:, 2::3] = 0.0  # blue is read by nobody
    x = images(120, seed=5)
    labels = (torch.arange(120) % 2).numpy()
    x[:, 2] += torch.from_numpy(labels * 1.5 - 0.75).float()[:, None, None]
    net.eval()
    with torch.inference_mode():
        features = net(x)[0].mean((2, 3)).double().numpy()
    features -= features.mean(0)
    frozen = features @ features.T
    y = one_hot(labels)
    read = [float((guesses(leave_one_out(k / (k.trace() / 120), y).scores, y) == labels).mean()) for k in (kernel(net, x), frozen)]
    assert read[0] > 0.95
    assert read[1] < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demonstration", "nets:resnet20", "vit_b_16"])
def test_every_kind_of_network_has_a_tangent_kernel(name: str) -> None:
    size = 64 if name == "vit_b_16" else 32
    net = catalogue.load(name, "none", size=size)
    trunk = taps.cut(net, [taps.measure_taps(net, size)[-1].name])
    found = kernel(trunk, images(3, size))
    assert found.shape == (3, 3)
    assert np.isfinite(found).all()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv2d(4096, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.only(x),)


def test_where_weights_share_a_bucket_their_gradients_cancel_instead_of_adding_up() -> None:
    """Two images that touch different weights, 64 of them a bucket: their gradients are as good as orthogonal, and so are the sketches."""
    x = torch.zeros(2, 4096, 1, 1)
    x[0, :2048], x[1, 2048:] = 1.0, 1.0
    net = Wide()
    net.only.bias.requires_grad_(False)
    one, other = GradientSketcher(net, torch.device("cpu"), 0, buckets=64).sketch(x)
    assert abs(float(one @ other)) < 0.5
