"""The tangent probe: what the first steps of fine-tuning could read, from gradients, without a training step.

For small steps a network moves along its gradients: fine-tuning is then ridge regression on the empirical tangent kernel k(x, x') =
<grad f(x), grad f(x')> (Jacot et al. 2018; Wei, Hu and Steinhardt 2022 find that it predicts how fine-tuned networks generalise). One random
projection of the last features stands for all outputs (Mohamadi et al. 2022), and gradients are kept as count sketches, whose inner products
are those of the gradients in expectation (Charikar et al. 2002). Where this kernel reads the labels better than the frozen features do,
fine-tuning has something to win.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from tlpipeline.features import pool
from tlpipeline.probes import Matrix

BUCKETS = 1 << 14
AVERAGE = (1,)  # a finer pyramid reads worse here: gradients of single cells say where, not what


def tangent_kernel(trunk: nn.Module, batches: Iterable[Tensor], device: torch.device, seed: int, progress: Callable[[int], None]) -> Matrix:
    """Return the centred tangent kernel of images, of gradients of length one: (n, n), its mean diagonal 1.

    Costs a forward and a backward pass for each image. Weights, buffers and flags stay as they are.

    Args:
        trunk: gives the last tap's maps as its only output; in eval mode.
        batches: inputs (batch, 3, size, size).
        seed: of the projection and of the sketch.
        progress: called with the number of images done so far.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = list(trunk.parameters())
    required = [p.requires_grad for p in parameters]
    count = sum(p.numel() for p in parameters)
    buckets = torch.randint(0, BUCKETS, (count,), generator=generator).to(device)
    signs = (torch.randint(0, 2, (count,), generator=generator) * 2 - 1).float().to(device)
    projection: Tensor | None = None
    sketches: list[Tensor] = []
    trunk.eval()
    try:
        for p in parameters:
            p.requires_grad_(True)
        for batch in batches:
            for image in torch.split(batch.to(device), 1):
                (maps,) = trunk(image)
                read = pool(maps, AVERAGE)[0]
                if projection is None:
                    projection = torch.randn(len(read), generator=generator).to(device)
                gradients = torch.autograd.grad(read @ projection, parameters, materialize_grads=True)
                flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
                sketch = torch.zeros(BUCKETS, device=device).index_add_(0, buckets, flat * signs)
                sketches.append((sketch / sketch.norm().clamp(min=1e-12)).cpu())
            progress(len(sketches))
    finally:
        for p, was in zip(parameters, required, strict=True):
            p.requires_grad_(was)
    x = torch.stack(sketches).double().numpy()
    x -= x.mean(0)
    kernel = x @ x.T
    return np.asarray(kernel / (kernel.trace() / len(kernel) or 1.0))
