"""How a training run reports its progress: workers append messages to a file, and the process that waits for them reads it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tlpipeline.progress import Event, Progress


class OnProgress(Protocol):
    """Takes messages for people; unimportant ones may be dropped if they come too often."""

    def __call__(self, done: int, total: int, text: str, important: bool = False) -> None: ...

    def due(self) -> bool:
        """Return whether an unimportant message would be passed on now: making the text may cost a wait for the device."""


class ProgressWriter:
    """Appends messages to a file, unimportant ones at most five times a second. Only the first worker writes.

    Args:
        clock: returns seconds.
    """

    def __init__(self, path: Path, rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.silent, self.last, self.clock = path, rank > 0, 0.0, clock
        if not self.silent:
            path.parent.mkdir(parents=True, exist_ok=True)

    def due(self) -> bool:
        """Return whether a fifth of a second has passed."""
        return not self.silent and self.clock() - self.last >= 0.2

    def __call__(self, done: int, total: int, text: str, important: bool = False) -> None:
        """Append a line if it is due or important."""
        if self.silent or not (important or self.due()):
            return
        self.last = self.clock()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"done": done, "total": total, "text": text}) + "\n")


class ProgressReader:
    """Reads what a `ProgressWriter` appends and passes it on as events."""

    def __init__(self, path: Path, stage: str, progress: Progress) -> None:
        self.path, self.stage, self.progress = path, stage, progress
        self.read = path.stat().st_size if path.exists() else 0

    def __call__(self) -> None:
        """Pass on what is new; an unfinished last line waits."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.read)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self.read += len(complete)
        for line in complete.splitlines():
            self.progress(Event(self.stage, **json.loads(line)))


def clock(seconds: float) -> str:
    """Return minutes:seconds."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def in_validation(accuracy: float, images: int) -> str:
    """Return the accuracy on so many validation images as a phrase."""
    return f"validation accuracy {accuracy:.1%}" if images else "no validation images"
