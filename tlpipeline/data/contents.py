"""Bytes of image files: as they are now, or as a version recorded them, whatever happens in the folder meanwhile."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tlpipeline.data.decoding import read_regular


@dataclass(frozen=True)
class PinnedFolder:
    """A folder of images of which a run keeps one version: a file that is gone or altered is read from where the version is kept.

    Attributes:
        path: the folder.
        contents: folder that has each file of the version at `<first 2 digits of its md5>/<the others>`, as DVC's cache has.
    """

    path: Path
    contents: Path


ImageFolder = Path | PinnedFolder


def path_of(folder: ImageFolder) -> Path:
    """Return the path of a folder of images."""
    return folder if isinstance(folder, Path) else folder.path


def contents_of(folder: ImageFolder) -> Path | None:
    """Return where the version of a pinned folder is kept, None for a folder that is read as it is now."""
    return None if isinstance(folder, Path) else folder.contents


def read_recorded(path: Path, md5: str, contents: Path | None = None) -> tuple[bytes, str]:
    """Return the bytes of a file and their md5. If they are not the recorded ones, and `contents` has those, return the recorded ones.

    Args:
        path: of the file.
        md5: that was recorded, "" if it is unknown.
        contents: as for `PinnedFolder`; None reads the file as it is.

    Raises:
        OSError: the file cannot be read, and `contents` does not have it.
    """
    kept = None if contents is None or not md5 else contents / md5[:2] / md5[2:]
    try:
        content = read_regular(path)
    except OSError:
        if kept is None or not kept.is_file():
            raise
        content = read_regular(kept)
    now = _md5(content)
    if now != md5 and kept is not None and kept.is_file():
        content = read_regular(kept)
        now = _md5(content)
    return content, now


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
