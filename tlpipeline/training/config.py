"""What a training job is given, as plain values, and how it tells what it does."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tlpipeline.progress import Event, Progress


@dataclass(frozen=True)
class TrainingConfig:
    """All that a worker needs, as plain values; paths are absolute.

    Attributes:
        workspace, images, manifest: where the workspace, its images and their manifest are.
        backbone, weights, weights_md5: as in params.yaml.
        decision: case.json, with train.override applied.
        seed, epochs, batch_size, flip, precision, views, budget_minutes: as in params.yaml.
        history: file to which the first worker appends its progress, a JSON line each.
        cache: folder of features and decoded images, "" to keep them in memory; cache_bytes: what decoded images may take of it.
        start: folder of a checkpoint to go on from where this run has none of its own, "" for none: what a race trained.
        parts: at least so many parts of a batch are taken one after the other, because a GPU had no room for fewer.
        race: None, or what the looks of a race need: evidence and rule as JSON, and who was right on validation by the frozen arm (packed).
    """

    workspace: str
    images: str
    manifest: str
    backbone: str
    weights: str
    weights_md5: str
    decision: Mapping[str, Any]
    seed: int
    epochs: int | str
    batch_size: int | str
    flip: bool
    precision: str
    history: str
    views: int = 0
    budget_minutes: float = 0.0
    cache: str = ""
    cache_bytes: float = 0.0
    start: str = ""
    parts: int = 1
    race: Mapping[str, Any] | None = None


class OnProgress(Protocol):
    """Passes on progress; what is not important may be dropped where it comes too often."""

    def __call__(self, done: int, total: int, text: str, important: bool = False) -> None: ...

    def due(self) -> bool:
        """Say whether what is not important would be passed on now: making the text may cost a wait for the device."""


class ProgressWriter:
    """Appends what happens to the history file, what is not important at most five times a second; only the first worker speaks."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.silent, self.last = path, rank > 0, 0.0
        if not self.silent:
            path.parent.mkdir(parents=True, exist_ok=True)

    def due(self) -> bool:
        """Say whether a fifth of a second has passed."""
        return not self.silent and time.monotonic() - self.last >= 0.2

    def __call__(self, done: int, total: int, text: str, important: bool = False) -> None:
        """Append a line, if it is due or important."""
        if self.silent or not (important or self.due()):
            return
        self.last = time.monotonic()
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
    """Return what validation on so many images says, for people."""
    return f"validation accuracy {accuracy:.1%}" if images else "no validation images"
