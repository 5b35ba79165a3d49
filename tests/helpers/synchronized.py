"""Synchronized batch normalization where there is no GPU: what torch computes only there, in plain tensor operations."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

OVER = (0, 2, 3)


def _wide(channels: Tensor) -> Tensor:
    return channels.view(1, -1, 1, 1)


def stats(maps: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of each channel, of this worker's images."""
    return maps.mean(OVER), (maps.var(OVER, correction=0) + eps).rsqrt()


def gather(
    maps: Tensor, means: Tensor, inverses: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of all workers' images, from each one's; the running statistics move towards them."""
    share, total = (counts / counts.sum())[:, None], float(counts.sum())
    mean = (share * means).sum(0)
    variance = (share * (inverses**-2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * total / (total - 1), momentum)
    return mean, (variance + eps).rsqrt()


def elemt(maps: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """Normalize, scale and move."""
    return (maps - _wide(mean)) * _wide(inverse * weight) + _wide(bias)


def backward_reduce(
    slope: Tensor, maps: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *asked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This worker's sums of the gradient, and the gradients of scale and bias."""
    total, product = slope.sum(OVER), (slope * (maps - _wide(mean))).sum(OVER)
    return total, product, product * inverse, total


def backward_elemt(
    slope: Tensor, maps: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, total: Tensor, product: Tensor, counts: Tensor
) -> Tensor:
    """The gradient of the maps, from all workers' sums."""
    n = counts.sum()
    return (slope - _wide(total / n) - (maps - _wide(mean)) * _wide(inverse**2 * product / n)) * _wide(inverse * weight)


plain = nn.SyncBatchNorm.forward


def forward(self: nn.SyncBatchNorm, maps: Tensor) -> Tensor:
    """Do what is done on a GPU."""
    with patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu"):
        return plain(self, maps)


@contextmanager
def synchronized() -> Iterator[None]:
    """Have batch normalization synchronized as if the workers were GPUs with few images each."""
    kernels = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }
    with ExitStack() as patches:
        for name, kernel in kernels.items():
            patches.enter_context(patch.object(torch, name, kernel))
        patches.enter_context(patch.object(nn.SyncBatchNorm, "forward", forward))
        patches.enter_context(
            patch.object(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda self, module: None)
        )
        yield
