"""Outputs of a stage, which are moved into place all together or not at all."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tlpipeline.files import unlink
from tlpipeline.versioning import lock
from tlpipeline.workspace.layout import OWN


@contextmanager
def atomic_outputs(root: Path, *names: str) -> Iterator[list[Path]]:
    """Give a draft place for each output; move them all into place if the body succeeds, or none of them."""
    drafts = root / OWN / "draft"
    unlink(drafts)
    (drafts / "old").mkdir(parents=True)
    places = [drafts / name.replace("/", "_") for name in names]
    try:
        with lock.disk_errors(root):
            yield places
            _exchange([(place, root / name, drafts / "old" / place.name) for place, name in zip(places, names, strict=True)])
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def _exchange(moves: Sequence[tuple[Path, Path, Path]]) -> None:
    """Move each new output to its target and what stood there aside; if one cannot be moved, put all the old ones back."""
    begun: list[tuple[Path, Path]] = []
    try:
        for new, target, aside in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(target):
                os.replace(target, aside)
            begun.append((target, aside))
            os.replace(new, target)
    except BaseException:
        for target, aside in begun:
            unlink(target)
            if os.path.lexists(aside):
                os.replace(aside, target)
        raise
