"""Progress as a value: stages call a function with an Event, and whoever called the stage decides what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something happened.

    Attributes:
        stage: where.
        done, total: steps; total 0 where there is nothing to count.
        text: for people, such as `epoch 3/10, loss 0.41, accuracy 92.1 %, 310 images/s, 0:42 left`.
    """

    stage: str
    done: int
    total: int
    text: str = ""


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore the event."""
