"""A cache of numbers by image content: each is computed once per image, whatever the file is called.

A column holds one row of fixed width per image, for example the features at one tap of one network.
Rows lie in shards: files that are written to a draft, flushed, renamed, and never changed again.
So no locks are needed, a crash leaves a complete shard or none, and two runs at most compute a row twice.
Shards are memory-mapped and carry a checksum; a damaged one is deleted and computed again.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlpipeline.files import write_json, write_tensors

LABEL = "column.json"
SUFFIX = ".safetensors"
SHARD_ROWS, SHARD_BYTES = 1024, 32 << 20
_STALE_DRAFT_S = _IN_USE_S = 3600.0


@dataclass(frozen=True)
class Shard:
    """A file of rows: md5s of the images as (n, 16) bytes, and their rows (n, ...), memory-mapped."""

    path: Path | None
    names: npt.NDArray[np.uint8]
    rows: Tensor


class MappedRows:
    """Rows of a column in any order, memory-mapped where the column is on disk."""

    def __init__(self, shards: Sequence[Tensor], shard: npt.NDArray[np.int64], position: npt.NDArray[np.int64]) -> None:
        self._shards, self._shard, self._position = shards, shard, position

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def width(self) -> int:
        """Numbers per row, 0 where there is no row."""
        return int(self._shards[0][0].numel()) if self._shards else 0

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64] | slice) -> Tensor:
        """Copy rows into memory: (n, ...), in the order of the indices."""
        shard, position = self._shard[indices], self._position[indices]
        if not len(shard):
            return self._shards[0][:0].clone() if self._shards else torch.zeros(0, 0)
        first = self._shards[0]
        out = torch.empty(len(shard), *first.shape[1:], dtype=first.dtype)
        for number in np.unique(shard):
            rows = np.flatnonzero(shard == number)
            out[torch.from_numpy(rows)] = self._shards[number][torch.from_numpy(position[rows])]
        return out

    def one(self, index: int) -> Tensor:
        """Return one row without copying it."""
        return self._shards[int(self._shard[index])][int(self._position[index])]

    def all(self) -> Tensor:
        """Copy all rows into memory."""
        return self.take(slice(None))

    def concat(self, other: "MappedRows") -> "MappedRows":
        """Return these rows followed by those of another column, still mapped."""
        shard = np.concatenate([self._shard, other._shard + len(self._shards)])
        return MappedRows([*self._shards, *other._shards], shard, np.concatenate([self._position, other._position]))


class FeatureTable:
    """Rows of several columns side by side: (n, width of all), still mapped."""

    def __init__(self, columns: Sequence[MappedRows]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def width(self) -> int:
        """Numbers per row."""
        return sum(column.width for column in self.columns)

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64] | slice) -> Tensor:
        """Copy rows into memory: (n, width), in the order of the indices."""
        parts = [column.take(indices) for column in self.columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def all(self) -> Tensor:
        """Copy all rows into memory."""
        return self.take(slice(None))

    def concat(self, other: "FeatureTable") -> "FeatureTable":
        """Return these rows followed by those of another table."""
        return FeatureTable([a.concat(b) for a, b in zip(self.columns, other.columns, strict=True)])


class Column:
    """One row of numbers per image content.

    Args:
        folder: of its shards; None keeps them in memory for the life of this object.
        grew: called with the size in bytes of each new shard.
    """

    def __init__(self, folder: Path | None, grew: Callable[[int], None] = lambda size: None) -> None:
        self.folder, self._grew = folder, grew
        self._shards: list[Shard] = []
        self._known: set[str] = set()
        self._touched: set[int] = set()
        # Sorted names and the places of their rows: a dictionary would take ten times the memory.
        self._names: _Names = np.zeros(0, dtype="S16")
        self._place = np.zeros((0, 2), dtype=np.int64)
        self._listed = 0
        self.refresh()

    def refresh(self) -> None:
        """Load the shards that other processes have written since."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name in self._known or path.name.startswith("."):
                continue
            shard = _opened(path)
            if shard is not None:
                self._take_over(shard)

    def _take_over(self, shard: Shard) -> None:
        self._shards.append(shard)
        if shard.path is not None:
            self._known.add(shard.path.name)

    def _find(self, md5s: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the position of each image in the sorted names, and whether it is really present."""
        if self._listed < len(self._shards):
            new = list(enumerate(self._shards))[self._listed :]
            names = [self._names, *(shard.names.view("S16").reshape(-1) for _, shard in new)]
            place = [self._place, *(np.stack([np.full(len(s.names), i), np.arange(len(s.names))], 1) for i, s in new)]
            self._names, first = np.unique(np.concatenate(names), return_index=True)
            self._place = np.concatenate(place)[first]
            self._listed = len(self._shards)
        wanted = _bytes(md5s).view("S16").reshape(-1)
        at = np.searchsorted(self._names, wanted)
        inside = at < len(self._names)
        present = inside.copy()
        present[inside] = self._names[at[inside]] == wanted[inside]
        return at, present

    def has(self, md5s: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return for each image whether its row is cached (n,)."""
        return self._find(md5s)[1]

    def rows(self, md5s: Sequence[str]) -> MappedRows:
        """Return the rows of these images, all of which must be cached."""
        at, present = self._find(md5s)
        assert present.all(), f"{(~present).sum()} of {len(present)} rows are not cached"
        places = self._place[at]
        for number in np.unique(places[:, 0]):
            path = self._shards[number].path
            if path is not None and number not in self._touched:
                self._touched.add(int(number))
                with suppress(FileNotFoundError):  # pruned by another run; mapped rows stay readable
                    os.utime(path)
        return MappedRows([shard.rows for shard in self._shards], places[:, 0], places[:, 1])

    def add(self, md5s: Sequence[str], rows: Tensor) -> None:
        """Store these rows; they are safely on the disk when this returns.

        Raises:
            OSError: the disk is full.
        """
        if not len(md5s):
            return
        rows = rows.detach().cpu().contiguous()
        names = _bytes(md5s)
        if self.folder is None:
            self._take_over(Shard(None, names, rows))
            return
        path = self.folder / f"{hashlib.md5(names.tobytes(), usedforsecurity=False).hexdigest()[:12]}-{secrets.token_hex(4)}{SUFFIX}"
        write_tensors({"md5": torch.from_numpy(names.copy()), "rows": rows}, path, {"crc32": str(_checksum(names, rows))})
        shard = _opened(path)
        # If the disk returns other bytes than were written, nothing can be repaired here; the rows in memory are right.
        self._take_over(shard or Shard(None, names, rows))
        self._grew(names.nbytes + rows.nbytes)


_Names = npt.NDArray[np.bytes_]


def _bytes(md5s: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Return md5s as (n, 16) bytes. They can be sorted and compared as strings, because all have the same length."""
    return np.frombuffer(bytes.fromhex("".join(md5s)), dtype=np.uint8).reshape(-1, 16)


def _opened(path: Path) -> Shard | None:
    """Map a shard. Return None if it is gone or damaged; a damaged one is deleted."""
    try:
        with safe_open(path, framework="pt") as file:
            names, rows = file.get_tensor("md5").numpy().copy(), file.get_tensor("rows")
            intact = (file.metadata() or {}).get("crc32") == str(_checksum(names, rows))
    except FileNotFoundError:
        return None
    except SafetensorError:  # truncated, empty, or not a shard
        intact = False
    if intact:
        return Shard(path, names, rows)
    path.unlink(missing_ok=True)
    return None


def _checksum(names: npt.NDArray[np.uint8], rows: Tensor) -> int:
    return zlib.crc32(rows.numpy().reshape(-1).view(np.uint8).data, zlib.crc32(names.tobytes()))


class Store:
    """All columns of a workspace.

    Args:
        folder: of the columns; None keeps everything in memory.
        limit: bytes. Above it, shards that no run used for an hour are deleted, the least recently used first. The rows of the
            present run stay, whatever their size.
        shard_rows, shard_bytes: bounds of one shard: what is not written yet lies in memory.
    """

    def __init__(
        self, folder: Path | None = None, limit: float = math.inf, shard_rows: int = SHARD_ROWS, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.limit, self.shard_rows, self.shard_bytes = folder, limit, shard_rows, shard_bytes
        self._columns: dict[str, Column] = {}
        self._room, self._before = 0.0, time.time() - _IN_USE_S

    def holds(self, key: str) -> bool:
        """Return whether there is a column of this key."""
        folder = self._folder_of(key)
        return key in self._columns or (folder is not None and (folder / LABEL).exists())

    def _folder_of(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()

    def rows_in_shard(self, row_bytes: int) -> int:
        """Return how many rows of so many bytes a shard has room for, at least one."""
        return min(self.shard_rows, max(1, self.shard_bytes // row_bytes))

    def column(self, key: str, label: str) -> Column:
        """Return the column of this key; `label` describes its content to people."""
        if key not in self._columns:
            folder = self._folder_of(key)
            if folder is not None and not (folder / LABEL).exists():
                write_json({"label": label}, folder / LABEL)
            self._columns[key] = Column(folder, self._grew)
        return self._columns[key]

    def _grew(self, size: int) -> None:
        """Prune once more has been written than was free at the last measurement."""
        self._room -= size
        if self.folder is not None and self.limit < math.inf and self._room < 0:
            remaining = prune(self.folder, self.limit, self._before)
            self._room = max(self.limit - remaining, 4 * self.shard_bytes)  # once it is full, it is measured every four shards


# --- size and pruning -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnInfo:
    """A summary of one column: content, number of files, bytes, and time of last use (seconds since 1970)."""

    label: str
    files: int
    bytes: int
    used: float


def info(folder: Path) -> list[ColumnInfo]:
    """Return a summary of each column in a cache folder, the most recently used first."""
    columns = []
    for column_folder in _columns(folder):
        shards = list(_shards(column_folder))
        if shards:
            columns.append(ColumnInfo(_label(column_folder), len(shards), sum(s for _, _, s in shards), max(t for t, _, _ in shards)))
    return sorted(columns, key=lambda column: -column.used)


def _label(folder: Path) -> str:
    try:
        return str(json.loads((folder / LABEL).read_text(encoding="utf-8"))["label"])
    except (OSError, ValueError, KeyError):  # another process is writing it, or it is damaged: the rows do not depend on it
        return "unknown"


def prune(folder: Path, limit: float, before: float = math.inf) -> int:
    """Delete the least recently used shards until at most `limit` bytes remain; return the remaining bytes.

    Runs that have mapped a shard can still read it.

    Args:
        before: delete only shards last used before this time (seconds since 1970).
    """
    shards = sorted(shard for column_folder in _columns(folder) for shard in _shards(column_folder))
    remaining = sum(size for _, _, size in shards)
    for used, path, size in shards:
        if remaining <= limit or used >= before:
            break
        path.unlink(missing_ok=True)
        remaining -= size
    for column_folder in _columns(folder):
        for draft in column_folder.glob(".*.draft"):  # left by killed runs
            with suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime > _STALE_DRAFT_S:
                    draft.unlink()
    return remaining


def clear(folder: Path) -> None:
    """Delete a cache folder."""
    shutil.rmtree(folder, ignore_errors=True)


def _columns(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _shards(folder: Path) -> Iterable[tuple[float, Path, int]]:
    for path in folder.glob(f"*{SUFFIX}"):
        if path.name.startswith("."):
            continue
        with suppress(FileNotFoundError):  # pruned by another run
            status = path.stat()
            yield status.st_mtime, path, status.st_size
