"""A cache of numbers by image content: what was computed of an image once is never computed again, whatever it is called now.

A column holds one row of fixed width for each image: the features at one tap of one network, say. Its rows lie in shards, files that are
written beside their place, flushed to the disk and renamed, and never touched again; so there is nothing to lock, a crash leaves a whole
shard or none, and two runs at once may at worst write the same row twice. Shards are mapped, not read: what is looked at is in memory only
as long as the system has room. Every shard carries a checksum; one that does not fit is thrown away and computed again.
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
MEASURED_EACH = 4 * SHARD_BYTES  # written between two looks at how large it is, once it is full
_STALE_DRAFT_S = _IN_USE_S = 3600.0


@dataclass(frozen=True)
class Shard:
    """A file of rows: the images' md5 as (n, 16) bytes, and their rows (n, ...), mapped."""

    path: Path | None
    names: npt.NDArray[np.uint8]
    rows: Tensor


class MappedRows:
    """Some rows of a column, in an order of one's own, mapped where the column is on disk."""

    def __init__(self, shards: Sequence[Tensor], shard: npt.NDArray[np.int64], position: npt.NDArray[np.int64]) -> None:
        self._shards, self._shard, self._position = shards, shard, position

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def width(self) -> int:
        """Numbers a row, 0 where there is no row."""
        return int(self._shards[0][0].numel()) if self._shards else 0

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64] | slice) -> Tensor:
        """Copy rows into memory: (n, ...), in the order of the indices."""
        shard, position = self._shard[indices], self._position[indices]
        if not len(shard):
            return self._shards[0][:0].clone() if self._shards else torch.zeros(0, 0)
        first = self._shards[0]
        out = torch.empty(len(shard), *first.shape[1:], dtype=first.dtype)
        for number in np.unique(shard):
            there = np.flatnonzero(shard == number)
            out[torch.from_numpy(there)] = self._shards[number][torch.from_numpy(position[there])]
        return out

    def one(self, index: int) -> Tensor:
        """Return a row as it lies there, not copied."""
        return self._shards[int(self._shard[index])][int(self._position[index])]

    def all(self) -> Tensor:
        """Copy all rows into memory."""
        return self.take(slice(None))

    def concat(self, other: "MappedRows") -> "MappedRows":
        """Return these rows with those of another column below them, still mapped."""
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
        """Numbers a row."""
        return sum(column.width for column in self.columns)

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64] | slice) -> Tensor:
        """Copy rows into memory: (n, width), in the order of the indices."""
        parts = [column.take(indices) for column in self.columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def all(self) -> Tensor:
        """Copy all rows into memory."""
        return self.take(slice(None))

    def concat(self, other: "FeatureTable") -> "FeatureTable":
        """Return this table with another one below it."""
        return FeatureTable([a.concat(b) for a, b in zip(self.columns, other.columns, strict=True)])


class Column:
    """One row of numbers for each image content.

    Args:
        folder: where its shards lie; None keeps them in memory, for the life of this object.
        grew: told the bytes of each shard that was written.
    """

    def __init__(self, folder: Path | None, grew: Callable[[int], None] = lambda size: None) -> None:
        self.folder, self._grew = folder, grew
        self._shards: list[Shard] = []
        self._known: set[str] = set()
        self._touched: set[int] = set()
        # Sorted names, and where their rows are: a dictionary would take ten times the memory.
        self._names: _Names = np.zeros(0, dtype="S16")
        self._place = np.zeros((0, 2), dtype=np.int64)
        self._listed = 0
        self.refresh()

    def refresh(self) -> None:
        """Take notice of the shards that others have written meanwhile."""
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
        """Return where each image stands in the sorted names, and whether it really does."""
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
        there = inside.copy()
        there[inside] = self._names[at[inside]] == wanted[inside]
        return at, there

    def has(self, md5s: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Say of each image whether its row is here."""
        return self._find(md5s)[1]

    def rows(self, md5s: Sequence[str]) -> MappedRows:
        """Return the rows of these images, which must be here."""
        at, there = self._find(md5s)
        assert there.all(), f"{(~there).sum()} of {len(there)} rows are not kept"
        places = self._place[at]
        for number in np.unique(places[:, 0]):
            path = self._shards[number].path
            if path is not None and number not in self._touched:
                self._touched.add(int(number))
                with suppress(FileNotFoundError):  # pruned by another run; what is mapped stays readable
                    os.utime(path)
        return MappedRows([shard.rows for shard in self._shards], places[:, 0], places[:, 1])

    def add(self, md5s: Sequence[str], rows: Tensor) -> None:
        """Keep these rows, safely on the disk when this returns.

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
        # A disk that gives back something else than it was given is past repair here; the rows in hand are right.
        self._take_over(shard or Shard(None, names, rows))
        self._grew(names.nbytes + rows.nbytes)


_Names = npt.NDArray[np.bytes_]


def _bytes(md5s: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Return md5s as (n, 16) bytes; as strings of 16 bytes they sort and compare exactly, because all are equally long."""
    return np.frombuffer(bytes.fromhex("".join(md5s)), dtype=np.uint8).reshape(-1, 16)


def _opened(path: Path) -> Shard | None:
    """Map a shard; one that is torn or damaged is deleted, one that is gone is passed over: None."""
    try:
        with safe_open(path, framework="pt") as file:
            names, rows = file.get_tensor("md5").numpy().copy(), file.get_tensor("rows")
            whole = (file.metadata() or {}).get("crc32") == str(_checksum(names, rows))
    except FileNotFoundError:
        return None
    except SafetensorError:  # cut off, empty, or something else
        whole = False
    if whole:
        return Shard(path, names, rows)
    path.unlink(missing_ok=True)
    return None


def _checksum(names: npt.NDArray[np.uint8], rows: Tensor) -> int:
    return zlib.crc32(rows.numpy().reshape(-1).view(np.uint8).data, zlib.crc32(names.tobytes()))


class Store:
    """All columns of a workspace.

    Args:
        folder: where they lie; None keeps everything in memory.
        limit: bytes. Where what is written would exceed them, what no run has used for an hour goes, the least recently used first. What
            this one works on stays, however large it is: it has to be somewhere.
    """

    def __init__(self, folder: Path | None = None, limit: float = math.inf) -> None:
        self.folder, self.limit = folder, limit
        self._columns: dict[str, Column] = {}
        self._room, self._before = 0.0, time.time() - _IN_USE_S

    def column(self, key: str, label: str) -> Column:
        """Return the column of this key; `label` says to people what it holds."""
        if key not in self._columns:
            place = None if self.folder is None else self.folder / hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
            if place is not None and not (place / LABEL).exists():
                write_json({"label": label}, place / LABEL)
            self._columns[key] = Column(place, self._grew)
        return self._columns[key]

    def _grew(self, size: int) -> None:
        """Make room once more has been written than there was room for when it was last measured."""
        self._room -= size
        if self.folder is not None and self.limit < math.inf and self._room < 0:
            left = prune(self.folder, self.limit, self._before)
            self._room = max(self.limit - left, MEASURED_EACH)


# --- looking after it -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnInfo:
    """One column as people see it: what it holds, how many files and bytes, and when it was used last (seconds since 1970)."""

    label: str
    files: int
    bytes: int
    used: float


def info(folder: Path) -> list[ColumnInfo]:
    """Return what a cache folder holds, what was used last first."""
    found = []
    for place in _columns(folder):
        shards = list(_shards(place))
        if shards:
            found.append(ColumnInfo(_label(place), len(shards), sum(s for _, _, s in shards), max(t for t, _, _ in shards)))
    return sorted(found, key=lambda kept: -kept.used)


def _label(place: Path) -> str:
    try:
        return str(json.loads((place / LABEL).read_text(encoding="utf-8"))["label"])
    except (OSError, ValueError, KeyError):  # another process is at work on it, or it was damaged: the rows do not depend on it
        return "unknown"


def prune(folder: Path, limit: float, before: float = math.inf) -> int:
    """Delete shards, the least recently used first, until at most `limit` bytes are left; return how many bytes are left.

    Runs that have a shard mapped go on reading it.

    Args:
        before: only those that were last used before this time (seconds since 1970).
    """
    shards = sorted(found for place in _columns(folder) for found in _shards(place))
    left = sum(size for _, _, size in shards)
    for used, path, size in shards:
        if left <= limit or used >= before:
            break
        path.unlink(missing_ok=True)
        left -= size
    for place in _columns(folder):
        for draft in place.glob(".*.draft"):  # of runs that were killed
            with suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime > _STALE_DRAFT_S:
                    draft.unlink()
    return left


def clear(folder: Path) -> None:
    """Delete a cache folder."""
    shutil.rmtree(folder, ignore_errors=True)


def _columns(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _shards(place: Path) -> Iterable[tuple[float, Path, int]]:
    for path in place.glob(f"*{SUFFIX}"):
        if path.name.startswith("."):
            continue
        with suppress(FileNotFoundError):  # pruned by another run
            seen = path.stat()
            yield seen.st_mtime, path, seen.st_size
