"""A workspace as a place to work in: that it is one, that this user may write it, that one run has it alone, and that there is room."""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tlpipeline.errors import WorkspaceError
from tlpipeline.files import is_disk_full

LOCK = Path(".tlpipeline/lock")
_HOLDER = "TLPIPELINE_LOCK_HOLDER"


def require_workspace(root: Path) -> None:
    """Check that this is a workspace: a git and DVC repository with dvc.yaml.

    Raises:
        WorkspaceError: it is not.
    """
    way_out = "Create one with `tlpipeline init DIR`, or name one with --workspace."
    if not root.is_dir():
        raise WorkspaceError(f"expected a workspace at {root}, found no such folder. {way_out}")
    if not (root / ".git").exists():
        raise WorkspaceError(f"expected a git repository at {root}, found none. {way_out}")
    if not (root / ".dvc").is_dir():
        raise WorkspaceError(f"expected a DVC repository at {root}, found no .dvc folder. {way_out}")
    if not (root / "dvc.yaml").is_file():
        raise WorkspaceError(f"expected the pipeline in {root / 'dvc.yaml'}, found no such file. {way_out}")


@contextmanager
def hold(root: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the workspace: two runs on one never overlap, whichever entrance they came through. The system frees it when a process dies.

    Args:
        wait: seconds to wait for another run to end.

    Raises:
        WorkspaceError: another process holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    path = (root / LOCK).resolve()
    if os.environ.get(_HOLDER) == str(path):
        yield  # a process that the holder itself started
        return
    require_writable(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    holder = path.with_suffix(".holder")
    try:
        lock.acquire(timeout=wait, poll_interval=0.2)
    except Timeout as error:
        who = holder.read_text(encoding="utf-8").strip() if holder.exists() else "another process"
        raise WorkspaceError(
            f"expected to have the workspace {root} alone, but {who} is running in it. Wait for it to end, or stop it; then run again."
        ) from error
    try:
        holder.write_text(f"process {os.getpid()} ({_command(sys.argv)})\n", encoding="utf-8")
        os.environ[_HOLDER] = str(path)
        yield
    finally:
        os.environ.pop(_HOLDER, None)
        holder.unlink(missing_ok=True)
        lock.release()


def _command(words: Sequence[str]) -> str:
    """Return a command for people: of `python -m prefect.engine` the file alone, engine.py, would say nothing."""
    first, *others = (Path(word) for word in words[:3])
    module = f"{first.parent.name}.{first.stem}".removesuffix(".__main__")
    return " ".join([module if first.suffix == ".py" else first.name, *(word.name for word in others)])


def read_only(root: Path) -> Path | None:
    """Return the first of a workspace's own places that this user may not write, None where all can be."""
    places = (root, *(root / name for name in (".tlpipeline", LOCK, ".tlpipeline/cache", ".tlpipeline/models", ".dvc", ".git")))
    return next((place for place in places if place.exists() and not os.access(place, os.W_OK)), None)


def require_writable(root: Path) -> None:
    """Check that this user may write a workspace.

    Raises:
        WorkspaceError: some of it may only be read.
    """
    if place := read_only(root):
        raise WorkspaceError(
            f"expected a workspace that can be written, but {place} can only be read. Change its rights or its owner, or clone the workspace."
        )


def require_unlocked(root: Path) -> None:
    """Check that no other run is in the workspace.

    Raises:
        WorkspaceError: one is.
    """
    with hold(root):
        pass


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Tell a full disk as what it is.

    Raises:
        WorkspaceError: the body found no space left, or the quota used up.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise WorkspaceError(
            f"expected room on the disk of {root}, found none ({error.strerror or os.strerror(errno.ENOSPC)}). What was recorded before is unchanged; free some space "
            "(`dvc gc --workspace` removes unused versions) and run again."
        ) from error
