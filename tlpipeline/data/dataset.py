"""Images on disk, listed in a manifest: what can be used, on which side, copies once, and remarks for people."""

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image

from tlpipeline.data.decoding import UNREADABLE, available_cpus, decode, describe_error, inspect, read_content
from tlpipeline.data.splits import MINIMUM_PER_CLASS, SPLIT_FOLDERS, TEST, TRAIN, VAL, folder_layout, split_of
from tlpipeline.errors import DataChanged, DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One readable image file: a line of the manifest.

    `duplicate_of` is the path of the copy that is used instead ("" if this one is used): exact copies count once.
    """

    path: str
    md5: str
    label: str
    split: str
    width: int
    height: int
    mode: str
    duplicate_of: str


@dataclass(frozen=True)
class Rejected:
    """A file that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What ingest found: readable images, rejected files, and remarks for people (leaks, classes without test images)."""

    rows: tuple[Row, ...]
    rejected: tuple[Rejected, ...]
    remarks: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their indices: sorted."""
        return tuple(sorted({row.label for row in self.rows}))

    def used(self, *sides: str) -> list[Row]:
        """Return the distinct images of these sides, in the order of their md5, so that file names do not matter."""
        return sorted((r for r in self.rows if r.split in sides and not r.duplicate_of), key=lambda r: r.md5)


def read_image(root: Path, row: Row, at_least: int | None = None) -> Image.Image:
    """Read the image of a manifest row, checking that it is still the one that was listed; `at_least` as for `decode`.

    Raises:
        DataChanged: the file is gone, or its content has another md5 than the manifest says.
        DataError: it cannot be read, or not be decoded here.
    """
    path = root / row.path
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataChanged(f"expected the image {row.path}, which the manifest lists, but it is gone. {_WAY_BACK}") from error
    except OSError as error:
        raise DataError(
            f"expected an image at {path}, but it cannot be read: {error.strerror or error}. Make it readable, then run again."
        ) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != row.md5:
        raise DataChanged(f"expected the image {row.path} as it was listed (md5 {row.md5}), found other content (md5 {found}). {_WAY_BACK}")
    try:
        return decode(content, at_least)
    except UNREADABLE as error:
        # It was decoded when it was listed, by another Pillow perhaps, or with more memory.
        raise DataError(
            f"expected an image at {path}, but it cannot be read: {describe_error(error)}. Replace it or leave it out, and run again."
        ) from error


_WAY_BACK = "The data folder changed while a run was on: start the run again, or restore the images with `dvc checkout`."


# --- listing --------------------------------------------------------------------------------------------------------------------------


def ingest(images: Path, exceptions: Mapping[str, str], progress: Callable[[int, int], None], threads: int | None = None) -> Manifest:
    """Read every file below `images` once and list it, with the side it belongs to.

    Args:
        images: folder of `<class>/...` or of `{train,val,test}/<class>/...`.
        exceptions: md5 to side, from splits.csv; they win over the rule by content, not over a given layout.
        progress: called with (files done, files in all).
        threads: readers; by default one for each CPU that may be used, at least 4 (reading waits for the disk).

    Returns:
        The manifest, its rows sorted by path.

    Raises:
        DataError: the folder is missing or empty, has no class folders, half a layout of sides or files that cannot be opened; it has one
            class only, a class has fewer than 3 distinct images, or no file is an image.
    """
    paths = list_files(images)
    given = folder_layout(images)
    done = 0
    rows: list[Row] = []
    rejected: list[Rejected] = []
    with ThreadPoolExecutor(threads or max(4, available_cpus())) as pool:
        for result in pool.map(lambda path: _inspect(images, path, given), paths):
            done += 1
            progress(done, len(paths))
            if isinstance(result, Row):
                rows.append(result)
            else:
                rejected.append(result)
    rows, conflicting = _without_conflicts(rows)
    rejected += conflicting
    if not rows:
        reasons = Counter(r.reason.split(":")[0] for r in rejected)
        raise DataError(
            f"expected images in {images}, but none of its {len(paths)} files can be used ({_counted(reasons)}). "
            f"The first: {rejected[0].path}: {rejected[0].reason}. Put readable images there, each in one class folder only."
        )
    rows, remarks = _without_copies(rows, given)
    if given:
        exceptions = {}  # a given layout wins over splits.csv too
    rows = [replace(r, split=r.split or exceptions.get(r.md5) or split_of(r.md5, carve_val=given == "no val")) for r in rows]
    _check_classes(images, rows, rejected, given)
    remarks += _empty_sides(rows)
    return Manifest(tuple(sorted(rows, key=lambda r: r.path)), tuple(sorted(rejected, key=lambda r: r.path)), tuple(remarks))


def readable(images: Path) -> list[Row]:
    """Return the distinct readable images below a folder, whatever its layout, without labels and sides: for statistics only."""
    found: dict[str, Row] = {}
    for path in sorted(p for p in images.rglob("*") if p.is_file() and not p.name.startswith(".")):
        row = _inspect(images.parent, path, "")
        if isinstance(row, Row):
            found.setdefault(row.md5, replace(row, path=path.relative_to(images).as_posix(), label="", split=""))
    return sorted(found.values(), key=lambda row: row.md5)


def list_files(images: Path) -> list[Path]:
    """Return all files below a folder but the system's own, sorted.

    Raises:
        DataError: it is missing, empty, or has no class folders.
    """
    if not images.is_dir():
        raise DataError(
            f"expected a folder of images at {images}, found {'a file' if images.exists() else 'nothing'}. "
            "Put one folder per class there, or set data.images in params.yaml."
        )
    # A dot-file (.gitignore, .DS_Store) is the system's, not the user's.
    found = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(images, onerror=_unreadable, followlinks=True)
        for name in names
        if not name.startswith(".") and not any(part.startswith(".") for part in Path(folder).relative_to(images).parts)
    )
    if not found:
        raise DataError(f"expected images in {images}, found an empty folder. Put one folder of images per class there.")
    # Neither can be versioned or listed.
    if unnamed := [path for path in found if not _is_text(path)]:
        raise DataError(
            f"expected file names in UTF-8 in {images}, found {len(unnamed)} others, such as {bytes(unnamed[0])!r}. Rename them."
        )
    if gone := [path for path in found if not path.is_file()]:
        raise DataError(
            f"expected files in {images}, found {len(gone)} links to nothing or devices, such as {gone[0]}. "
            "Remove them, or restore what they point to (`dvc checkout`)."
        )
    if not any(len(path.relative_to(images).parts) > 1 for path in found):
        raise DataError(
            f"expected class folders in {images}, found {len(found)} files and no folder. Sort the images as {images.name}/<class>/<image>."
        )
    return found


def linked_folders(images: Path) -> list[Path]:
    """Return the links to folders below a folder."""
    return sorted(Path(folder) / name for folder, folders, _ in os.walk(images) for name in folders if (Path(folder) / name).is_symlink())


def _unreadable(error: OSError) -> None:
    raise DataError(f"expected to read the folder {error.filename}, but: {error.strerror}. Make it readable or remove it, then run again.")


def _is_text(path: Path) -> bool:
    return str(path).encode("utf-8", "replace") == bytes(path)


def _inspect(images: Path, path: Path, given: str) -> Row | Rejected:
    where = path.relative_to(images)
    parts = where.parts
    if len(parts) < (3 if given else 2):
        return Rejected(where.as_posix(), "outside any class folder")
    side = SPLIT_FOLDERS[parts[0].casefold()] if given else ""
    if given == "no val" and side == TRAIN:
        side = ""  # decided by content: val is carved out of train
    content = read_content(path)
    found = inspect(content)
    if isinstance(found, str):
        return Rejected(where.as_posix(), found)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Row(where.as_posix(), md5, parts[1] if given else parts[0], side, *found, "")


def _without_conflicts(rows: Sequence[Row]) -> tuple[list[Row], list[Rejected]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        labels[row.md5].add(row.label)
    kept = [r for r in rows if len(labels[r.md5]) == 1]
    out = [
        Rejected(r.path, f"the same image in several classes: {', '.join(sorted(labels[r.md5]))}") for r in rows if len(labels[r.md5]) > 1
    ]
    return kept, out


def _without_copies(rows: Sequence[Row], given: str) -> tuple[list[Row], list[str]]:
    """Mark all but one of each set of exact copies; in a given layout the copy in test stays, so that the test side is as it was given."""
    rank = {TEST: 0, VAL: 1, TRAIN: 2, "": 2}
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.md5].append(row)
    kept: list[Row] = []
    leaked: Counter[str] = Counter()
    for copies in groups.values():
        copies.sort(key=lambda r: (rank[r.split], r.path))
        first = copies[0]
        kept.append(first)
        for copy in copies[1:]:
            kept.append(replace(copy, duplicate_of=first.path))
        for side in {copy.split or TRAIN for copy in copies[1:]} - {first.split or TRAIN}:
            leaked[f"{first.split} images stand in {side} too"] += 1
    if not given:
        return kept, []
    remarks = [
        f"leak: {n} distinct {what}, byte for byte; they are used in {what.split()[0]} only" for what, n in sorted(leaked.items()) if n
    ]
    return kept, remarks


def _check_classes(images: Path, rows: Sequence[Row], rejected: Sequence[Rejected], given: str) -> None:
    counts = Counter(r.label for r in rows if not r.duplicate_of)
    if len(counts) < 2:
        raise DataError(
            f"expected at least two classes in {images}, found one with usable images: {next(iter(counts))}. "
            "Add a folder of images for each further class."
        )
    at = 1 if given else 0
    for parts in (r.path.split("/") for r in rejected):
        if len(parts) > at + 1:
            counts.setdefault(parts[at], 0)  # a class of which nothing can be used is not silently forgotten
    small = {label: n for label, n in counts.items() if n < MINIMUM_PER_CLASS}
    if small:
        raise DataError(
            f"expected at least {MINIMUM_PER_CLASS} distinct usable images in each class, found {_counted(small)} in {images} "
            f"({len(rejected)} files were rejected). Add images to these classes or remove their folders."
        )
    missing = sorted(set(counts) - {r.label for r in rows if r.split == TRAIN and not r.duplicate_of})
    if missing:
        way_out = "Run `tlpipeline data commit`: it gives small classes a side of each kind in splits.csv."
        if given:
            way_out = "Put more images of these classes into its folder train."
        raise DataError(f"expected training images for each class in {images}, found none for {', '.join(missing)}. {way_out}")


def _empty_sides(rows: Sequence[Row]) -> list[str]:
    remarks = []
    labels = sorted({r.label for r in rows})
    for side, consequence in ((VAL, "not validated"), (TEST, "not evaluated")):
        there = {r.label for r in rows if r.split == side and not r.duplicate_of}
        if missing := [label for label in labels if label not in there]:
            remarks.append(f"{consequence}: no {side} image of {', '.join(missing)}")
    return remarks


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {n}" for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- files ----------------------------------------------------------------------------------------------------------------------------


def write_manifest(manifest: Manifest, path: Path, quarantine: Path) -> None:
    """Write the rows as parquet and the rejected files and remarks as csv; the same manifest gives the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f.name: [getattr(row, f.name) for row in manifest.rows] for f in fields(Row)}
    pq.write_table(pa.table(columns), path, compression="zstd")
    with quarantine.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "reason"])
        writer.writerows((r.path, r.reason) for r in manifest.rejected)
        writer.writerows(("", remark) for remark in manifest.remarks)


def read_manifest(path: Path, quarantine: Path | None = None) -> Manifest:
    """Read what `write_manifest` wrote."""
    import pyarrow.parquet as pq

    # A few thousand at a time, and one string for all rows that say the same: of 100,000 images half of the memory.
    columns = [f.name for f in fields(Row)]
    known: dict[str, str] = {}
    rows: list[Row] = []
    for part in pq.ParquetFile(path).iter_batches(4096, columns=columns):
        values = part.to_pydict()
        for name in ("label", "split", "mode", "duplicate_of"):
            values[name] = [known.setdefault(text, text) for text in values[name]]
        rows += [Row(*line) for line in zip(*(values[name] for name in columns), strict=True)]
    if quarantine is None:
        return Manifest(tuple(rows), (), ())
    with quarantine.open(newline="", encoding="utf-8") as file:
        lines = [(line["path"], line["reason"]) for line in csv.DictReader(file)]
    return Manifest(tuple(rows), tuple(Rejected(p, r) for p, r in lines if p), tuple(r for p, r in lines if not p))
