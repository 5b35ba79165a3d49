"""Gradient accumulation: a batch is taken in parts where a GPU's memory does not hold it as a whole."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tlpipeline.errors import OutOfMemory, TrainingError
from tlpipeline.training.checkpoint import State
from tlpipeline.training.distributed import DistributedContext


class GradientAccumulation:
    """Takes each batch in as many parts as the memory asks for.

    Args:
        least: parts that the recipe asks for.
        part_images: images that a part must have at least: two where batch normalization takes its statistics from it.
        moving_buffers: whether a pass changes buffers of the model, which must be restored before it is repeated.
    """

    def __init__(
        self, model: nn.Module, context: DistributedContext, state: State, least: int, part_images: int, moving_buffers: bool
    ) -> None:
        self.model, self.context, self.state = model, context, state
        self.least, self.part_images, self.moving_buffers = least, part_images, moving_buffers

    @property
    def steps(self) -> int:
        """Parts that a batch is taken in."""
        return max(self.state.gradient_accumulation_steps, self.least)

    def run(self, take: Callable[[int], Tensor], share: int, batch: int) -> Tensor:
        """Return what `take(parts)` returns; where memory runs out, double the parts and take the batch again.

        Args:
            take: computes the gradient of this worker's share of a batch in so many parts.
            share: images of this worker; batch: of all workers.

        Raises:
            OutOfMemory: with several workers, which must all start again with more parts.
            TrainingError: the smallest parts are too large, too.
        """
        # No more parts than the smallest share allows, because all workers must take equally many.
        most = max(batch // (self.context.size * self.part_images), 1)
        steps, before = self.steps, buffers(self.model) if self.moving_buffers else []
        while True:
            self.model.zero_grad()
            try:
                return take(min(steps, most))
            except torch.cuda.OutOfMemoryError as error:
                images = math.ceil(share / min(steps, most))
                message = f"expected room in the GPU's memory for {images} images at a time, found none. "
                if steps >= most:
                    raise TrainingError(message + "Set data.size or train.batch_size lower.") from error
                steps *= 2
                restore(before)
                if self.context.size > 1:
                    # Other workers wait in the middle of this step: only a new start brings all to the same number of parts.
                    raise OutOfMemory(
                        f"{message}Set train.override.gradient_accumulation_steps to {steps} (the batch stays as large), "
                        "or data.size or train.batch_size lower.",
                        steps,
                    ) from error
                self.state.set_accumulation(steps)
                torch.cuda.empty_cache()


def buffers(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the model's buffers, such as the statistics of batch normalization, each with a copy of its value."""
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


def restore(values: list[tuple[Tensor, Tensor]]) -> None:
    """Put back the values that `buffers` returned."""
    for buffer, value in values:
        buffer.copy_(value)
