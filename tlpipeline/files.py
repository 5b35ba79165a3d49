"""Files that are written completely or not at all: beside their place, flushed to the disk, renamed. And how a system says no."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_disk_full(error: OSError) -> bool:
    """Say whether an error means a full disk or a quota that is used up."""
    return _is(error, NO_ROOM)


def is_permission_error(error: OSError) -> bool:
    """Say whether an error means that this user may not read or write there, or that nobody may write there."""
    return _is(error, NO_RIGHT)


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that there is no memory left. Torch has no type of its own for that on CPUs."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _is(error: OSError, codes: Sequence[int]) -> bool:
    # Copying a folder gathers what went wrong with each file as text, and has no number of its own.
    return error.errno in codes or (isinstance(error, shutil.Error) and any(f"[Errno {code}]" in str(error) for code in codes))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a draft to write, in the same folder; it takes the place of the file if the body succeeds, and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")  # others may write the same file, here or on another machine
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_tensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors; the same tensors give the same bytes.

    Raises:
        OSError: there is no room.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as draft:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, draft, dict(metadata) if metadata else None)
        except SafetensorError as error:
            code = next((code for code in NO_ROOM if f"os error {code}" in str(error)), None)
            if code is None:
                raise
            raise OSError(code, os.strerror(code), str(path)) from error


def write_json(content: Any, path: Path) -> None:
    """Write JSON, keys in their order."""
    write_bytes((json.dumps(content, indent=2) + "\n").encode(), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write bytes."""
    with atomic_write(path) as draft:
        draft.write_bytes(content)


def is_truncated_json(path: Path) -> bool:
    """Say whether a JSON file that others write in place is only partly there, as a kill leaves it; one that is absent is not."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def unlink(path: Path) -> None:
    """Remove a file, a link or a folder before it is written anew (a link into DVC's cache must not be written through)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
