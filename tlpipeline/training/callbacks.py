"""What a caller may do after each epoch of training, such as stop it. A callback must be a small dataclass of plain values: Ray pickles it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tlpipeline.data.dataset import Row
    from tlpipeline.training.checkpoint import State
    from tlpipeline.training.progress import OnProgress


@dataclass(frozen=True)
class EpochEnd:
    """What a callback is given after an epoch.

    Attributes:
        state: where the run stands, this epoch included. A callback may keep JSON values in `state.records`: they are saved with the checkpoint.
        epochs: planned epochs of this phase.
        validation: the validation images.
        correct: which of them the model classified correctly, packed (see `stats.unpack`).
        on_progress: takes messages for people.
    """

    state: "State"
    epochs: int
    validation: "Sequence[Row]"
    correct: str
    on_progress: "OnProgress"


class Callback(Protocol):
    """Runs on every worker with the same values, so that all workers come to the same answer."""

    def on_epoch_end(self, epoch: EpochEnd) -> bool:
        """Return True to stop training after this epoch."""
