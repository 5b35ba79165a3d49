"""Atomic outputs: the files of a stage are moved into place together, or not at all."""

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
    """Yield a draft path for each output; move all outputs into place if the body succeeds, else none."""
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
    """Move each new output to its target, and the old one aside. If a move fails, restore all old outputs."""
    replaced: list[tuple[Path, Path]] = []
    try:
        for new, target, aside in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(target):
                os.replace(target, aside)
            replaced.append((target, aside))
            os.replace(new, target)
    except BaseException:
        for target, aside in replaced:
            unlink(target)
            if os.path.lexists(aside):
                os.replace(aside, target)
        raise
