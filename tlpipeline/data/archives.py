"""Zip files of images: unpacked beside where they are wanted, and refused where they would do harm."""

import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tlpipeline.data.layouts import SYSTEM
from tlpipeline.errors import DataError

# Images are compressed already. A few flat ones shrink to a hundredth; a bomb to a thousandth and less.
MOST_TIMES = 100
FREE = 10**9  # bytes that an archive may hold whatever its own size
_BLOCK = 2**20
_OTHERS = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")


def is_archive(path: Path) -> bool:
    """Return whether a path is a zip file.

    Raises:
        DataError: it is another kind of archive.
    """
    if path.is_file() and path.suffix.lower() in _OTHERS:
        raise DataError(f"expected a folder of images or a zip file at {path}, found another archive. Unpack it, and name the folder.")
    return path.is_file() and zipfile.is_zipfile(path)


@contextmanager
def unpacked(path: Path | None, free: int = FREE) -> Iterator[Path | None]:
    """Yield a folder: the given one, or one with the content of a zip file that is removed afterwards.

    Args:
        free: bytes that it may hold whatever its own size.

    Raises:
        DataError: the zip file is damaged or encrypted, leads out of its folder, holds links, or would fill the disk.
    """
    if path is None or not is_archive(path):
        yield path
        return
    check(path, free)
    with tempfile.TemporaryDirectory(prefix="tlpipeline-") as place:
        folder = Path(place) / path.stem
        folder.mkdir()
        _unpack(path, folder, free)
        yield folder


def check(path: Path, free: int = FREE) -> None:
    """Check the list of a zip file.

    Args:
        free: as for `unpacked`.

    Raises:
        DataError: as for `unpacked`.
    """
    with _opened(path) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or ":" in name.parts[0:1] or (name.parts and name.parts[0].endswith(":")):
                raise DataError(
                    f"expected paths inside the folder in {path}, found {entry.filename!r}. Unpack it yourself, if you trust it."
                )
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise DataError(f"expected files in {path}, found the link {entry.filename!r}. Pack the files that links lead to.")
            if entry.flag_bits & 1:
                raise DataError(
                    f"expected a zip file without a password at {path}, found {entry.filename!r} encrypted. Unpack it, and name the folder."
                )
        _require_room(path, sum(entry.file_size for entry in archive.infolist()), free)


def _require_room(path: Path, size: int, free: int) -> None:
    limit = max(MOST_TIMES * path.stat().st_size, free)
    if size > limit:
        raise DataError(
            f"expected images in {path}, found {size / 1e9:.1f} GB in a file of {path.stat().st_size / 1e6:.1f} MB, as in a file that is made to fill "
            "a disk. Unpack it yourself, if you trust it, and name the folder."
        )
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if size > room:
        raise DataError(
            f"expected {size / 1e9:.1f} GB for the content of {path} in {tempfile.gettempdir()}, found {room / 1e9:.1f} GB. Set TMPDIR, or unpack it."
        )


def _unpack(path: Path, folder: Path, free: int) -> None:
    """Write the files of a zip file; the sizes in its list may be wrong, so bytes are counted."""
    written = 0
    with _opened(path) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename.replace("\\", "/"))
            if entry.is_dir():
                (folder / name).mkdir(parents=True, exist_ok=True)
            if entry.is_dir() or SYSTEM in name.parts:
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(entry) as packed, target.open("wb") as file:
                    while block := packed.read(_BLOCK):
                        written += len(block)
                        _require_room(path, written, free)
                        file.write(block)
            except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError) as error:
                raise DataError(f"Cannot unpack {entry.filename!r} of {path}: {error}. Unpack it yourself, and name the folder.") from error


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise DataError(f"expected a zip file at {path}, which is damaged: {error}. Fetch it again.") from error
