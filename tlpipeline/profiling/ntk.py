"""The tangent probe: how well fine-tuning by small steps could classify, estimated from gradients without a training step.

For small steps a network moves along its gradients: fine-tuning is then ridge regression on the empirical tangent kernel k(x, x') =
<grad f(x), grad f(x')> (Jacot et al. 2018; Wei, Hu and Steinhardt 2022 find that it predicts how fine-tuned networks generalize). One random
projection of the last features stands for all outputs (Mohamadi et al. 2022), and gradients are kept as count sketches, whose inner products
are those of the gradients in expectation (Charikar et al. 2002). Where this kernel predicts the labels better than the frozen features do,
fine-tuning is likely to gain.
"""

import numpy as np
import torch
from torch import Tensor, nn

from tlpipeline.backbones.features import pool
from tlpipeline.profiling.probes import Matrix

BUCKETS = 1 << 14
AVERAGE = (1,)  # a finer pyramid predicts worse: gradients of single cells depend on position more than on class


class GradientSketcher:
    """Turns images into sketches of their gradients.

    Args:
        trunk: gives the last tap's maps as its only output; it is put into eval mode, and stays as it is otherwise.
        seed: of the projection and of the sketch.
        buckets: numbers of a sketch.
    """

    def __init__(self, trunk: nn.Module, device: torch.device, seed: int, buckets: int = BUCKETS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.trunk, self.device, self.generator = trunk.eval(), device, generator
        self.parameters = list(trunk.parameters())
        count = sum(p.numel() for p in self.parameters)
        self.size = buckets
        self.buckets = torch.randint(0, buckets, (count,), generator=generator).to(device)
        self.signs = (torch.randint(0, 2, (count,), generator=generator) * 2 - 1).float().to(device)
        self.projection: Tensor | None = None

    def sketch(self, batch: Tensor) -> Tensor:
        """Return sketches (batch, buckets) of length one, on the CPU, of inputs (batch, 3, size, size): a forward and a backward pass each."""
        required = [p.requires_grad for p in self.parameters]
        sketches = []
        try:
            for p in self.parameters:
                p.requires_grad_(True)
            for image in torch.split(batch.to(self.device), 1):
                (maps,) = self.trunk(image)
                read = pool(maps, AVERAGE)[0]
                if self.projection is None:
                    self.projection = torch.randn(len(read), generator=self.generator).to(self.device)
                gradients = torch.autograd.grad(read @ self.projection, self.parameters, materialize_grads=True)
                flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
                sketch = torch.zeros(self.size, device=self.device).index_add_(0, self.buckets, flat * self.signs)
                sketches.append((sketch / sketch.norm().clamp(min=1e-12)).cpu())
        finally:
            for p, was in zip(self.parameters, required, strict=True):
                p.requires_grad_(was)
        return torch.stack(sketches)


def tangent_kernel(sketches: Tensor) -> Matrix:
    """Return the centered tangent kernel of images, of gradients of length one: (n, n), its mean diagonal 1.

    Args:
        sketches: (n, buckets), as a `GradientSketcher` gives them.
    """
    x = sketches.double().numpy()
    x = x - x.mean(0)
    kernel = x @ x.T
    return np.asarray(kernel / (kernel.trace() / len(kernel) or 1.0))
