"""Progress events: stages call a function with an Event, and the caller decides how to show it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Progress of a stage.

    Attributes:
        stage: name of the stage.
        done, total: steps; total is 0 where nothing is counted.
        text: for people, such as `epoch 3/10, loss 0.41, accuracy 92.1 %, 310 images/s, 0:42 left`.
    """

    stage: str
    done: int
    total: int
    text: str = ""


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore the event."""
