"""Notices when training diverges."""

import torch
from torch import Tensor


class Diverged(Exception):
    """A gradient is not finite."""


class DivergenceGuard:
    """Watches the norms of the gradients.

    Args:
        every: steps between two checks. A check waits for a GPU to finish its work, so GPUs are checked less often.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self.every, self._finite = every, torch.ones((), dtype=torch.bool, device=device)

    def due(self, step: int) -> bool:
        """Return whether a check is due after this step, counted from 1."""
        return step % self.every == 0

    def watch(self, norm: Tensor) -> None:
        """Take in the norm of a step's gradient."""
        self._finite &= torch.isfinite(norm)

    def check(self) -> None:
        """Raise Diverged if a norm since the start was not finite. All workers have the same gradients, so all raise together."""
        if not self._finite:
            raise Diverged("the norm of the gradient is not finite")
