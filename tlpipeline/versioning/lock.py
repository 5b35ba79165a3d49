"""The lock of a workspace, which one run holds at a time, and checks that it exists and is writable."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tlpipeline.errors import WorkspaceBusy, WorkspaceError
from tlpipeline.files import is_disk_full

LOCK = Path(".tlpipeline/lock")
RECORDING = Path(".tlpipeline/recording.lock")
ROOM = 8_000_000  # bytes that a run writes before it has computed anything: Prefect's database above all
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
    """Hold the lock of the workspace, so that two runs never overlap, however they were started. It is released if the process dies.

    Args:
        wait: seconds to wait for another run to end.

    Raises:
        WorkspaceBusy: another process holds it.
        WorkspaceError: the workspace cannot be written.
    """
    from filelock import FileLock, Timeout

    path = (root / LOCK).resolve()
    if os.environ.get(_HOLDER) == str(path):
        yield  # the process that holds the lock started this one
        return
    require_writable(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    holder = path.with_suffix(".holder")
    try:
        lock.acquire(timeout=wait, poll_interval=0.2)
    except Timeout as error:
        who = holder.read_text(encoding="utf-8").strip() if holder.exists() else "another process"
        raise WorkspaceBusy(
            f"Another run is using the workspace {root.resolve()}: {who}. Wait for it to end, or stop it; then run again."
        ) from error
    try:
        holder.write_text(f"process {os.getpid()} ({_command(sys.argv)})\n", encoding="utf-8")
        os.environ[_HOLDER] = str(path)
        yield
    finally:
        os.environ.pop(_HOLDER, None)
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def recording(root: Path) -> Iterator[None]:
    """Hold the lock for what DVC and git record, and wait for it. A run holds it for moments, between which its images may be committed.

    It may be held several times by one thread. Whoever wants both locks takes this one first, or does not wait for the other.
    """
    from filelock import FileLock

    path = (root / RECORDING).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, is_singleton=True, poll_interval=0.2):
        yield


def _command(words: Sequence[str]) -> str:
    """Return a command for people, with the module's name for `python -m prefect.engine` instead of the file engine.py."""
    first, *others = (Path(word) for word in words[:3])
    module = f"{first.parent.name}.{first.stem}".removesuffix(".__main__")
    return " ".join([module if first.suffix == ".py" else first.name, *(word.name for word in others)])


def read_only(root: Path) -> Path | None:
    """Return the first place of a workspace that this user may not write, None if all are writable."""
    places = (root, *(root / name for name in (".tlpipeline", LOCK, ".tlpipeline/cache", ".tlpipeline/models", ".dvc", ".git")))
    return next((place for place in places if place.exists() and not os.access(place, os.W_OK)), None)


def require_writable(root: Path) -> None:
    """Check that this user may write the workspace.

    Raises:
        WorkspaceError: some of it is read-only.
    """
    if place := read_only(root):
        raise WorkspaceError(
            f"expected a writable workspace, found {place}, which you may only read. Change its permissions or owner, or clone the workspace."
        )


def require_room(root: Path, least: int = ROOM) -> None:
    """Check that the disk has room for the first records of a run.

    Raises:
        WorkspaceError: it has less than this many bytes.
    """
    if (free := shutil.disk_usage(root).free) < least:
        raise WorkspaceError(
            f"expected room on the disk of {root}, at least {least / 1e6:.0f} MB, found {free / 1e6:.1f} MB. Free some space, and run again."
        )


def require_unlocked(root: Path) -> None:
    """Check that no other run is using the workspace.

    Raises:
        WorkspaceError: one is.
    """
    with hold(root):
        pass


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Report a full disk as a WorkspaceError.

    Raises:
        WorkspaceError: the body found the disk or the quota full.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise WorkspaceError(
            f"expected room on the disk of {root}, found none ({error.strerror or os.strerror(errno.ENOSPC)}). Earlier records are unchanged. "
            "Free some space (`tlpipeline cache clear` frees what can be computed again), then run again."
        ) from error
