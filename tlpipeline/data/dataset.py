"""Image folders and their manifest: usable images with their splits, exact copies marked, and remarks for people."""

import csv
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

from PIL import Image

from tlpipeline import records
from tlpipeline.data.decoding import UNREADABLE, decode, describe_error, read_regular
from tlpipeline.data.facts import Facts, FactStore, gather
from tlpipeline.data.splits import MINIMUM_PER_CLASS, SPLIT_FOLDERS, SPLIT_NAMES, TEST, TRAIN, VAL, folder_layout, split_of
from tlpipeline.errors import DataChanged, DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One readable image file: a line of the manifest.

    `duplicate_of` is the path of an exact copy that is used instead, "" if this file is used. Images of the same `group` are not
    independent (frames of a track, patches of a patient) and always share a split; "" is an image without a group.
    """

    path: str
    md5: str
    label: str
    split: str
    width: int
    height: int
    mode: str
    duplicate_of: str
    group: str = ""


@dataclass(frozen=True)
class Rejected:
    """A file that is not used, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The result of ingest: readable images, rejected files, and remarks for people (leaks, classes without test images)."""

    rows: tuple[Row, ...]
    rejected: tuple[Rejected, ...]
    remarks: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted: the order of their indices."""
        return tuple(sorted({row.label for row in self.rows}))

    def used(self, *splits: str) -> list[Row]:
        """Return the distinct images of these splits, sorted by md5, so that file names do not matter."""
        return sorted((r for r in self.rows if r.split in splits and not r.duplicate_of), key=lambda r: r.md5)


def read_image(root: Path, row: Row, min_side: int | None = None) -> Image.Image:
    """Read the image of a manifest row and check that its content is the listed one; `min_side` as for `decode`.

    Raises:
        DataChanged: the file is missing, or its md5 differs from the manifest's.
        DataError: it cannot be read or decoded.
    """
    path = root / row.path
    try:
        content = read_regular(path)
    except FileNotFoundError as error:
        raise DataChanged(f"expected the image {row.path}, which the manifest lists, found no such file. {_WAY_BACK}") from error
    except OSError as error:
        raise DataError(f"Cannot read the image {path}: {error.strerror or error}. Make it readable, then run again.") from error
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != row.md5:
        raise _changed(row, md5)
    try:
        return decode(content, min_side)
    except UNREADABLE as error:
        # It was decoded when it was listed, perhaps by another version of Pillow or with more memory.
        raise DataError(f"Cannot decode the image {path}: {describe_error(error)}. Replace or remove it, then run again.") from error


def facts_of(
    images: Path, rows: Sequence[Row], store: FactStore, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[Row, Facts]]:
    """Yield rows of the manifest with the facts about their images, in no order; images that the store lacks are read.

    Raises:
        DataChanged: an image that is read has another content than the manifest says.
        DataError: an image cannot be read.
    """
    for number, md5, facts in gather([(images / row.path, row.md5) for row in rows], store, progress):
        row = rows[number]
        if md5 != row.md5:
            raise _changed(row, md5)
        yield row, facts


def _changed(row: Row, md5: str) -> DataChanged:
    return DataChanged(f"expected the image {row.path} as it was listed (md5 {row.md5}), found other content (md5 {md5}). {_WAY_BACK}")


_MD5 = re.compile("[0-9a-f]{32}")
_RESTORE = "Move them away, and run `dvc checkout`, which restores them. If they are right as they are, `touch` them and run again."
_WAY_BACK = f"If the folder of images changed during a run, start the run again. If nobody changed it: {_RESTORE}"


# --- listing --------------------------------------------------------------------------------------------------------------------------


def ingest(
    images: Path,
    exceptions: Mapping[str, str],
    progress: Callable[[int, int], None],
    threads: int | None = None,
    hashes: Mapping[str, str] | None = None,
    store: FactStore | None = None,
) -> Manifest:
    """List every file below `images` with its split. A file whose content is known is not opened.

    Args:
        images: folder of `<class>/...` or of `{train,val,test}/<class>/...`.
        exceptions: md5 to split, from splits.csv. They win over the rule by content, but not over a given layout.
        progress: called with (files done, number of files).
        threads: reading threads; by default one per available CPU and at least 4, since reading waits for the disk.
        hashes: path below `images` to md5, as DVC knows them by size, time and inode; files that it lacks are read.
        store: facts about contents; None knows none.

    Returns:
        The manifest, its rows sorted by path.

    Raises:
        DataError: the folder is missing or empty, has no class folders, an incomplete layout of splits or unreadable files; there is
            only one class, a class has fewer than 3 distinct images, or no file is an image. Or a file that is read has another content
            than `hashes` says.
    """
    paths = list_files(images)
    layout = folder_layout(images)
    rows: list[Row] = []
    rejected: list[Rejected] = []
    places: list[tuple[str, str, str]] = []  # path, label and split of the files that may be used
    for path in paths:
        relative = path.relative_to(images).as_posix()
        place = _place(relative, layout)
        if place is None:
            rejected.append(Rejected(relative, "outside any class folder"))
        else:
            places.append((relative, *place))
    hashes = hashes or {}
    files = [(images / relative, hashes.get(relative, "")) for relative, _, _ in places]
    altered: dict[str, str] = {}
    for number, md5, facts in gather(files, store or FactStore(), progress, threads):
        relative, label, split = places[number]
        if hashes.get(relative, md5) != md5:
            altered[relative] = md5
        elif facts.reason:
            rejected.append(Rejected(relative, facts.reason))
        else:
            rows.append(Row(relative, md5, label, split, facts.width, facts.height, facts.mode, ""))
    if altered:
        raise _altered(images, altered, hashes)
    rows.sort(key=lambda row: row.path)
    rejected.sort(key=lambda file: file.path)
    rows, conflicting = _without_conflicts(rows)
    rejected += conflicting
    if not rows:
        reasons = Counter(r.reason.split(":")[0] for r in rejected)
        raise DataError(
            f"expected images in {images}, but none of its {len(paths)} files can be used ({_counted(reasons)}). "
            f"The first: {rejected[0].path}: {rejected[0].reason}. Put readable images there, each in only one class folder."
        )
    rows, remarks = _without_copies(rows, layout)
    if layout:
        exceptions = {}  # a given layout wins over splits.csv
    rows = [replace(r, split=r.split or exceptions.get(r.md5) or split_of(r.md5, carve_val=layout == "no val")) for r in rows]
    _check_classes(images, rows, rejected, layout)
    remarks += _empty_splits(rows)
    return Manifest(tuple(sorted(rows, key=lambda r: r.path)), tuple(sorted(rejected, key=lambda r: r.path)), tuple(remarks))


def readable(images: Path) -> list[Row]:
    """Return the distinct readable images below a folder of any layout, without labels and splits: for statistics only."""
    rows: dict[str, Row] = {}
    paths = sorted(p for p in images.rglob("*") if p.is_file() and not p.name.startswith("."))
    for number, md5, facts in gather([(path, "") for path in paths], FactStore()):
        if not facts.reason:
            relative = paths[number].relative_to(images).as_posix()
            rows.setdefault(md5, Row(relative, md5, "", "", facts.width, facts.height, facts.mode, ""))
    return sorted(rows.values(), key=lambda row: row.md5)


def list_files(images: Path) -> list[Path]:
    """Return all files below a folder except dot-files, sorted.

    Raises:
        DataError: the folder is missing, empty, or has no class folders, or a link leads to a folder a second time.
    """
    if not images.is_dir():
        raise DataError(
            f"expected a folder of images at {images}, found {'a file' if images.exists() else 'nothing'}. "
            "Put one folder per class there, or set data.images in params.yaml."
        )
    # Dot-files (.gitignore, .DS_Store) belong to the system, not to the user.
    paths = sorted(
        Path(folder) / name
        for folder, names in _walk_once(images)
        for name in names
        if not name.startswith(".") and not any(part.startswith(".") for part in Path(folder).relative_to(images).parts)
    )
    if not paths:
        raise DataError(f"expected images in {images}, found an empty folder. Put one folder of images per class there.")
    # Such files can be neither versioned nor listed.
    if undecodable := [path for path in paths if not _is_text(path)]:
        raise DataError(
            f"expected file names in UTF-8 in {images}, found {len(undecodable)} others, such as {bytes(undecodable[0])!r}. Rename them."
        )
    if broken := [path for path in paths if not path.is_file()]:
        raise DataError(
            f"expected files in {images}, found {len(broken)} broken links or devices, such as {broken[0]}. "
            "Remove them, or restore what they point to (`dvc checkout`)."
        )
    if not any(len(path.relative_to(images).parts) > 1 for path in paths):
        raise DataError(
            f"expected class folders in {images}, found {len(paths)} files and no folder. Sort the images as {images.name}/<class>/<image>."
        )
    return paths


def _walk_once(images: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below a folder with the names of its files; links are followed.

    Raises:
        DataError: a link leads to a folder a second time. Two links to their own folder would make a trillion paths.
    """
    first: dict[tuple[int, int], str] = {}
    for folder, _, names in os.walk(images, onerror=_unreadable, followlinks=True):
        status = os.stat(folder)
        earlier = first.setdefault((status.st_dev, status.st_ino), folder)
        if earlier != folder:
            raise DataError(
                f"expected each folder in {images} once, found {folder}, which leads to {earlier} again. Remove the link; a copy of the "
                "folder is another folder."
            )
        yield folder, names


def refuse_outside_links(images: Path, *allowed: Path) -> None:
    """Check that no link below a folder of images leads out of it: whatever it points to would be copied, versioned and published.

    Args:
        allowed: other folders that links may lead to, such as DVC's cache.

    Raises:
        DataError: one does.
    """
    places = [place.resolve() for place in (images, *allowed)]
    links = (Path(folder) / name for folder, *names in os.walk(images) for name in (*names[0], *names[1]))
    outside = sorted(link for link in links if link.is_symlink() and not any(link.resolve().is_relative_to(place) for place in places))
    if outside:
        raise DataError(
            f"expected images and folders in {images}, found {len(outside)} links that lead outside, such as {outside[0]} to "
            f"{outside[0].resolve()}. What they point to would be versioned and pushed. Copy the images there in place of the links, "
            "or remove the links."
        )


def _unreadable(error: OSError) -> None:
    raise DataError(f"Cannot read the folder {error.filename}: {error.strerror}. Make it readable or remove it, then run again.")


def _is_text(path: Path) -> bool:
    return str(path).encode("utf-8", "replace") == bytes(path)


def _altered(images: Path, altered: Mapping[str, str], hashes: Mapping[str, str]) -> DataError:
    """Return the error about files whose content is not the one that DVC knows by their size, time and inode."""
    first = min(altered)
    return DataError(
        f"expected the images in {images} as DVC records them, found {len(altered)} with another content though their time and size "
        f"are as before, such as {first} (md5 {altered[first]} for {hashes[first]}). {_RESTORE}"
    )


def _place(relative: str, layout: str) -> tuple[str, str] | None:
    """Return the label and the given split of a path, None if it is outside any class folder."""
    parts = relative.split("/")
    if len(parts) < (3 if layout else 2):
        return None
    split = SPLIT_FOLDERS[parts[0].casefold()] if layout else ""
    if layout == "no val" and split == TRAIN:
        split = ""  # decided by content: val is taken from train
    return parts[1] if layout else parts[0], split


def _without_conflicts(rows: Sequence[Row]) -> tuple[list[Row], list[Rejected]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        labels[row.md5].add(row.label)
    consistent = [r for r in rows if len(labels[r.md5]) == 1]
    out = [
        Rejected(r.path, f"the same image in several classes: {', '.join(sorted(labels[r.md5]))}") for r in rows if len(labels[r.md5]) > 1
    ]
    return consistent, out


def _without_copies(rows: Sequence[Row], layout: str) -> tuple[list[Row], list[str]]:
    """Mark all but one of each set of exact copies. In a given layout the copy in test is used, so that the test split stays as given."""
    rank = {TEST: 0, VAL: 1, TRAIN: 2, "": 2}
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.md5].append(row)
    marked: list[Row] = []
    leaked: Counter[str] = Counter()
    for copies in groups.values():
        copies.sort(key=lambda r: (rank[r.split], r.path))
        first = copies[0]
        marked.append(first)
        for copy in copies[1:]:
            marked.append(replace(copy, duplicate_of=first.path))
        for split in {copy.split or TRAIN for copy in copies[1:]} - {first.split or TRAIN}:
            leaked[f"{first.split} images are also in {split}"] += 1
    if not layout:
        return marked, []
    remarks = [
        f"leak: {n} distinct {what}, byte for byte; they are used in {what.split()[0]} only" for what, n in sorted(leaked.items()) if n
    ]
    return marked, remarks


def _check_classes(images: Path, rows: Sequence[Row], rejected: Sequence[Rejected], layout: str) -> None:
    counts = Counter(r.label for r in rows if not r.duplicate_of)
    if len(counts) < 2:
        raise DataError(
            f"expected at least two classes in {images}, found one with usable images: {next(iter(counts))}. "
            "Add a folder of images for each further class."
        )
    depth = 1 if layout else 0
    for parts in (r.path.split("/") for r in rejected):
        if len(parts) > depth + 1:
            counts.setdefault(parts[depth], 0)  # a class without any usable image must be reported
    small = {label: n for label, n in counts.items() if n < MINIMUM_PER_CLASS}
    if small:
        raise DataError(
            f"expected at least {MINIMUM_PER_CLASS} distinct usable images in each class, found {_counted(small)} in {images} "
            f"({len(rejected)} files were rejected). Add images to these classes or remove their folders."
        )
    missing = sorted(set(counts) - {r.label for r in rows if r.split == TRAIN and not r.duplicate_of})
    if missing:
        way_out = "Run `tlpipeline data commit`: it gives small classes an image in each split by lines in splits.csv."
        if layout:
            way_out = "Put more images of these classes into the folder train."
        raise DataError(f"expected training images for each class in {images}, found none for {', '.join(missing)}. {way_out}")


def _empty_splits(rows: Sequence[Row]) -> list[str]:
    remarks = []
    labels = sorted({r.label for r in rows})
    for split, consequence in ((VAL, "not validated"), (TEST, "not evaluated")):
        labels_present = {r.label for r in rows if r.split == split and not r.duplicate_of}
        if missing := [label for label in labels if label not in labels_present]:
            remarks.append(f"{consequence}: no {split} image of {', '.join(missing)}")
    return remarks


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {n}" for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- files ----------------------------------------------------------------------------------------------------------------------------


def write_manifest(manifest: Manifest, path: Path, quarantine: Path) -> None:
    """Write the rows as parquet, and the rejected files and remarks as CSV. The same manifest gives the same bytes."""
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
    """Read the files of `write_manifest`; without `quarantine` there are no rejected files and remarks.

    Raises:
        DataError: one of them is missing or damaged.
    """
    # In batches of a few thousand rows, and with one object per distinct string: half the memory for 100,000 images.
    columns = {f.name: f.type for f in fields(Row) if isinstance(f.type, type)}
    later = {f.name: f.default for f in fields(Row) if f.default is not MISSING}  # columns that older versions do not write
    known: dict[str, str] = {}
    rows: list[Row] = []
    for batch in records.read_parquet(path, columns, records.ANEW, error=DataError, optional=later):
        values = batch.to_pydict()
        values |= {name: [default] * batch.num_rows for name, default in later.items() if name not in values}
        for name in ("label", "split", "mode", "duplicate_of", "group"):
            values[name] = [known.setdefault(text, text) for text in values[name]]
        rows += [Row(*line) for line in zip(*(values[name] for name in columns), strict=True)]
    if odd := next((row for row in rows if not _MD5.fullmatch(row.md5) or row.split not in SPLIT_NAMES), None):
        raise records.unlike(path, f"{odd.path} has the md5 {odd.md5!r} and the split {odd.split!r}", records.ANEW, DataError)
    if quarantine is None:
        return Manifest(tuple(rows), (), ())
    lines = records.read_csv(Rejected, quarantine, records.ANEW, DataError)
    return Manifest(tuple(rows), tuple(line for line in lines if line.path), tuple(line.reason for line in lines if not line.path))
