"""Atomic writes: a file is written to a draft, flushed and renamed. Also checksums, and tests for kinds of system errors."""

import errno
import hashlib
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

CHECKSUMS = "checksums.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = ("can't allocate memory", "can't start new thread", "bad_alloc")
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means a full disk or an exhausted quota."""
    return _has_code(error, DISK_FULL)


def is_permission_error(error: OSError) -> bool:
    """Return whether an error means a missing permission or a read-only file system."""
    return _has_code(error, NO_PERMISSION)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out, also for a thread. PyTorch and Python have no error type of their own for that."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))


def _has_code(error: OSError, codes: Sequence[int]) -> bool:
    # shutil.Error collects the errors of all files as text, without an error code of its own.
    return error.errno in codes or (isinstance(error, shutil.Error) and any(f"[Errno {code}]" in str(error) for code in codes))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a draft path in the same folder. It replaces the file if the body succeeds, and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")  # another process or machine may write the same file
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
        OSError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as draft:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, draft, dict(metadata) if metadata else None)
        except SafetensorError as error:
            code = next((code for code in DISK_FULL if f"os error {code}" in str(error)), None)
            if code is None:
                raise
            raise OSError(code, os.strerror(code), str(path)) from error


def write_json(content: Any, path: Path) -> None:
    """Write JSON; keys keep their order."""
    write_bytes((json.dumps(content, indent=2) + "\n").encode(), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write bytes."""
    with atomic_write(path) as draft:
        draft.write_bytes(content)


def file_md5(path: Path) -> str:
    """Return the md5 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def write_checksums(folder: Path) -> None:
    """Record the md5 of each file of a folder in its checksums.json."""
    write_json(_checksums(folder), folder / CHECKSUMS)


def damage(folder: Path) -> str:
    """Return how a folder differs from its checksums.json, as a phrase; "" if it does not."""
    try:
        recorded, content = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")), _checksums(folder)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    if not isinstance(recorded, dict):
        return f"{CHECKSUMS} lists no files"
    differing = sorted(name for name in recorded.keys() | content.keys() if recorded.get(name) != content.get(name))
    return f"{', '.join(differing)} changed since it was written" if differing else ""


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(folder).as_posix(): file_md5(path) for path in files}


def is_truncated_json(path: Path) -> bool:
    """Return whether a JSON file is incomplete, as a killed process leaves it; False if it is missing."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def unlink(path: Path) -> None:
    """Remove a file, link or folder before it is written again: writing through a link would change DVC's cache."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
