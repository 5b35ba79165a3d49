"""The time that a run may take."""

import time
from collections.abc import Callable

import torch

from tlpipeline.training.distributed import DistributedContext, broadcast


class TimeBudget:
    """A bound on the seconds of a run, those before an interruption included.

    Args:
        minutes: 0 for no bound.
        before: seconds that the run took before it was interrupted.
        clock: returns seconds.
    """

    def __init__(
        self, minutes: float, context: DistributedContext, before: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self.context, self.before, self.clock = minutes * 60, context, before, clock
        self.started = clock()

    @property
    def spent(self) -> float:
        """Seconds of the run so far; 0 if there is no bound, so that two runs without one write the same bytes."""
        return self.before + self.clock() - self.started if self.seconds else 0.0

    def expired_here(self) -> bool:
        """Return whether the time is up by this worker's own clock."""
        return self.seconds > 0 and self.spent > self.seconds

    def expired(self) -> bool:
        """Return whether the time is up by the first worker's clock. Every worker must call it: one that stops alone leaves the others waiting."""
        if not self.seconds:
            return False
        answer = torch.tensor([float(self.expired_here())])
        broadcast([answer], self.context)
        return bool(answer.item())
