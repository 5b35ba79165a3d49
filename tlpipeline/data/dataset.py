"""Image folders and their manifest: usable images with their splits, exact copies marked, and remarks for people."""

import csv
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

from PIL import Image

from tlpipeline import records
from tlpipeline.data.classes import ClassMap, require_distinct, vanished
from tlpipeline.data.contents import ImageFolder, contents_of, path_of, read_recorded
from tlpipeline.data.copies import comparable, connected, find_copies
from tlpipeline.data.decoding import MAX_BYTES, MOST_BYTES_A_PIXEL, UNREADABLE, decode, describe_error
from tlpipeline.data.facts import Facts, FactStore, gather
from tlpipeline.data.groups import find_series, group_key
from tlpipeline.data.layouts import SYSTEM, TABLES, hidden
from tlpipeline.data.sources import NONE, Place, Source
from tlpipeline.data.splits import MINIMUM_PER_CLASS, SPLIT_NAMES, TEST, TRAIN, VAL
from tlpipeline.data.tables import ONE_CLASS
from tlpipeline.errors import DataChanged, DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One readable image file: a line of the manifest.

    `duplicate_of` is the path of an exact copy that is used instead, "" if this file is used. Images of the same `group` are not
    independent (frames of a track, patches of a patient) and share a split; "" is an image without a group. Near copies are a group, too,
    unless the user gave groups. They are in several splits only where the splits are given, or were fixed before they met.
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

    @property
    def key(self) -> str:
        """32 hexadecimal digits that decide what the image is used for: those of its group, or of its content."""
        return group_key(self.group) if self.group else self.md5


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
    class_index: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the class map; those that it does not have come last, sorted."""
        return tuple(
            sorted({row.label for row in self.rows}, key=lambda label: (self.class_index.get(label, len(self.class_index)), label))
        )

    @property
    def indices(self) -> tuple[int, ...]:
        """The number of each class in the class map. It never changes, and there are gaps where classes are gone."""
        return tuple(self.class_index.get(label, position) for position, label in enumerate(self.classes))

    def used(self, *splits: str) -> list[Row]:
        """Return the distinct images of these splits, sorted by md5, so that file names do not matter."""
        return sorted((r for r in self.rows if r.split in splits and not r.duplicate_of), key=lambda r: r.md5)


def read_image(root: ImageFolder, row: Row, min_side: int | None = None) -> Image.Image:
    """Read the image of a manifest row and check that its content is the listed one; `min_side` as for `decode`.

    Raises:
        DataChanged: the file is missing, or its md5 differs from the manifest's.
        DataError: it cannot be read or decoded.
    """
    path = path_of(root) / row.path
    try:
        content, md5 = read_recorded(path, row.md5, contents_of(root))
    except FileNotFoundError as error:
        raise DataChanged(f"expected the image {row.path}, which the manifest lists, found no such file. {_WAY_BACK}") from error
    except OSError as error:
        raise DataError(f"Cannot read the image {path}: {error.strerror or error}. Make it readable, then run again.") from error
    if md5 != row.md5:
        raise _changed(row, md5)
    try:
        return decode(content, min_side, most_bytes=max(MAX_BYTES, row.width * row.height * MOST_BYTES_A_PIXEL))
    except UNREADABLE as error:
        # It was decoded when it was listed, perhaps by another version of Pillow or with more memory.
        raise DataError(
            f"Cannot decode the image {path}: {describe_error(error, content)}. Replace or remove it, then run again."
        ) from error


def facts_of(
    images: ImageFolder, rows: Sequence[Row], store: FactStore, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[Row, Facts]]:
    """Yield rows of the manifest with the facts about their images, in no order; images that the store lacks are read.

    Raises:
        DataChanged: an image that is read has another content than the manifest says.
        DataError: an image cannot be read.
    """
    files = [(path_of(images) / row.path, row.md5) for row in rows]
    for number, md5, facts in gather(files, store, progress, contents=contents_of(images)):
        row = rows[number]
        if md5 != row.md5:
            raise _changed(row, md5)
        yield row, facts


def _changed(row: Row, md5: str) -> DataChanged:
    return DataChanged(f"expected the image {row.path} as it was listed (md5 {row.md5}), found other content (md5 {md5}). {_WAY_BACK}")


_INDEX = b"classes"  # name of the numbers of the classes in the manifest, where they are not those of their sorted names
NEAR_COPIES = "near copies of "  # begins the names of groups that near copies make
_MD5 = re.compile("[0-9a-f]{32}")
_FEW = 0.1  # of the files: when more cannot be used, it is told beside the accuracy
_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".tga", ".dds", ".jp2"})
_RESTORE = "Move them away, and run `dvc checkout`, which restores them. If they are right as they are, `touch` them and run again."
_WAY_BACK = f"If the folder of images changed during a run, start the run again. If nobody changed it: {_RESTORE}"


# --- listing --------------------------------------------------------------------------------------------------------------------------


def ingest(
    images: ImageFolder,
    exceptions: Mapping[str, str],
    progress: Callable[[int, int], None],
    threads: int | None = None,
    hashes: Mapping[str, str] | None = None,
    store: FactStore | None = None,
    source: Source | None = None,
    class_map: ClassMap | None = None,
    dropped: Collection[str] = (),
    names: Sequence[str] | None = None,
) -> Manifest:
    """List every file below `images` with its split. A file whose content is known is not opened.

    Args:
        images: folder of images. Of a pinned one, the files in `hashes` are listed, whatever is in the folder now.
        exceptions: key to split, from splits.csv. They win over the rule by content or group, but not over a given layout.
        progress: called with (files done, number of files).
        threads: reading threads; by default one per available CPU and at least 4, since reading waits for the disk.
        hashes: path below `images` to md5, as DVC knows them by size, time and inode; files that it lacks are read.
        store: facts about contents; None knows none.
        source: where classes, given splits and groups come from; None reads the layout of the folders.
        class_map: numbers of the classes, and those that there were before.
        dropped: classes that are gone on purpose.
        names: paths below `images` of the files to list, as `list_files` returns them; None walks the folder.

    Returns:
        The manifest, its rows sorted by path.

    Raises:
        DataError: the folder is missing or empty, its layout or table of labels cannot be used, or it has unreadable files; there is only one
            class, a class has fewer than 3 distinct images, two names of classes look alike, or no file is an image. Or a file that is read
            has another content than `hashes` says.
    """
    contents, images = contents_of(images), path_of(images)
    if contents is None:
        require_folder(images)
    hashes = hashes or {}
    source = source or Source(images)
    class_map = class_map or ClassMap()
    if names is None:
        names = list_files(images, source) if contents is None else _visible(images, hashes, source)
    paths = list(names)
    rows: list[Row] = []
    rejected = [Rejected(path, reason) for path, reason in source.without_file(paths)]
    places: list[tuple[str, Place]] = []  # of the files that may be used
    for relative in paths:
        place = source.place(relative)
        if isinstance(place, str):
            rejected.append(Rejected(relative, place))
        else:
            places.append((relative, place))
    files = [(images / relative, hashes.get(relative, "")) for relative, _ in places]
    altered: dict[str, str] = {}
    pictures: dict[str, bytes] = {}
    store = store or FactStore()
    for number, md5, facts in gather(files, store, progress, threads, contents):
        relative, place = places[number]
        if hashes.get(relative, md5) != md5:
            altered[relative] = md5
        elif facts.reason:
            rejected.append(Rejected(relative, facts.reason))
        else:
            rows.append(Row(relative, md5, place.label, place.split, facts.width, facts.height, facts.mode, "", place.group))
            if comparable(facts):
                pictures[md5] = facts.picture
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
    require_distinct({row.label for row in rows}, source.renames.own)
    source.require_groups({row.group for row in rows})
    if source.given:
        exceptions = {}  # a given layout wins over splits.csv
    given = {row.path: row.split for row in rows}
    rows = [replace(r, split=exceptions.get(r.key) or source.split(r.split, r.key)) for r in rows]
    rows, remarks, divided = _without_copies(rows, given if source.given else {})
    rejected += divided
    _check_classes(images, rows, rejected, source)
    if VAL in source.given and TEST not in source.given:
        remarks.append("layout: there is no test folder, so the images of val are divided by their content: half of them are test images")
    remarks += _left_out(rejected, len(rows)) + _empty_splits(rows) + _divided_groups(rows) + _empty_classes(images, rows, source)
    remarks += vanished(class_map, {row.label for row in rows}, source.renames, dropped)
    if not source.grouped and source.group_setting != NONE:
        used = [(row.path, row.label) for row in rows if not row.duplicate_of]
        remarks += [f"series: {series}" for series in [find_series(used, source.folders)] if series]
    rows = _grouped_copies(rows, pictures, store)
    order = class_map.indices({row.label for row in rows}, source.renames)
    return Manifest(tuple(sorted(rows, key=lambda r: r.path)), tuple(sorted(rejected, key=lambda r: r.path)), tuple(remarks), order)


def readable(images: Path, store: FactStore, progress: Callable[[int, int], None]) -> tuple[list[Row], int]:
    """Return the distinct readable images below a folder of any layout, without labels and splits, and the number of other files.

    Args:
        store: facts about contents, which are kept there.
        progress: called with (files done, number of files).
    """
    rows: dict[str, Row] = {}
    unreadable = 0
    paths = sorted(p for p in images.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(images).parts))
    for number, md5, facts in sorted(gather([(path, "") for path in paths], store, progress), key=lambda read: read[0]):
        if facts.reason:
            unreadable += 1
            continue
        relative = paths[number].relative_to(images).as_posix()
        rows.setdefault(md5, Row(relative, md5, "", "", facts.width, facts.height, facts.mode, ""))
    return sorted(rows.values(), key=lambda row: row.md5), unreadable


def require_folder(images: Path) -> None:
    """Check that there is a folder.

    Raises:
        DataError: there is none.
    """
    if not images.is_dir():
        raise DataError(
            f"expected a folder of images at {images}, found {'a file' if images.exists() else 'nothing'}. "
            "Put one folder per class there, or set data.images in params.yaml."
        )


def list_files(images: Path, source: Source | None = None, links_to: Collection[Path] | None = None) -> list[str]:
    """Return the paths below a folder of all files except those of the system and the table of labels, sorted. The folder is walked once.

    Args:
        source: as for `ingest`; None wants class folders.
        links_to: other folders that links may lead to, such as DVC's cache; None lets links lead anywhere.

    Raises:
        DataError: the folder is missing, empty, or has no class folders, or a link leads to a folder a second time, or out of the folder:
            whatever it points to would be copied, versioned and published.
    """
    require_folder(images)
    allowed = None if links_to is None else [place.resolve() for place in (images, *links_to)]
    names: list[str] = []
    outside: list[Path] = []
    broken: list[str] = []
    for folder, files, refused in _walk_once(images, allowed):
        outside += refused
        # Dot-files (.gitignore, .DS_Store) belong to the system, not to the user.
        if not any(map(hidden, folder.split("/"))):
            visible = {f"{folder}{entry.name}": entry for entry in files if not hidden(entry.name)}
            names += visible
            broken += [name for name, entry in visible.items() if not _is(entry.is_file)]
    if outside:
        raise DataError(
            f"expected images and folders in {images}, found {len(outside)} links that lead outside, such as {min(outside)} to "
            f"{min(outside).resolve()}. What they point to would be versioned and pushed. Copy the images there in place of the links, "
            "or remove the links."
        )
    names.sort(key=lambda name: name.split("/"))
    if source is not None:
        names = [name for name in names if not source.is_table(images, name)]
    if not names:
        raise DataError(f"expected images in {images}, found an empty folder. Put one folder of images per class there.")
    # Such files can be neither versioned nor listed.
    if undecodable := [os.fsencode(images / name) for name in names if not _is_text(name)]:
        raise DataError(
            f"expected file names in UTF-8 in {images}, found {len(undecodable)} others, such as {undecodable[0]!r}. Rename them."
        )
    if broken:
        raise DataError(
            f"expected files in {images}, found {len(broken)} broken links or devices, such as {images / min(broken)}. "
            "Remove them, or restore what they point to (`dvc checkout`)."
        )
    if (source is None or source.table is None) and not any("/" in name for name in names):
        tables = [name for name in names if name.lower().endswith(TABLES)]
        raise DataError(
            f"expected class folders in {images}, found {len(names)} files and no folder. Sort the images as {images.name}/<class>/<image>, "
            f"or name a table with the columns path and label{f', such as {tables[0]}' if tables else ''}: `tlpipeline init --labels FILE`, or "
            "data.labels in params.yaml."
        )
    return names


def _visible(images: Path, names: Iterable[str], source: Source) -> list[str]:
    """Return those of the recorded paths that belong to the user, and not the table of labels, sorted as `list_files` does."""
    paths = (parts for parts in sorted(name.split("/") for name in names) if not any(map(hidden, parts)))
    return [name for name in map("/".join, paths) if not source.is_table(images, name)]


def _walk_once(images: Path, allowed: Collection[Path] | None) -> Iterator[tuple[str, list["os.DirEntry[str]"], list[Path]]]:
    """Yield each folder below a folder ("" or a path that ends in /) with its files, and the links in it that lead elsewhere.

    Args:
        allowed: folders that links are followed to; None follows all.

    Raises:
        DataError: a folder cannot be read, or a link leads to a folder a second time. Two links to their own folder would make a trillion
            paths.
    """
    first: dict[tuple[int, int], str] = {}
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        status = os.stat(images / folder)
        earlier = first.setdefault((status.st_dev, status.st_ino), folder)
        if earlier != folder:
            raise DataError(
                f"expected each folder in {images} once, found {images / folder}, which leads to {images / earlier} again. Remove the link; a "
                "copy of the folder is another folder."
            )
        try:
            with os.scandir(images / folder) as entries:
                listed = list(entries)
        except OSError as error:
            raise _unreadable(error) from error
        links = [Path(entry.path) for entry in listed if allowed is not None and entry.is_symlink()]
        refused = [link for link in links if not any(link.resolve().is_relative_to(place) for place in allowed or ())]
        left_out = {link.name for link in refused}
        listed = [entry for entry in listed if entry.name not in left_out]
        folders = {entry.name for entry in listed if _is(entry.is_dir)}
        waiting += [f"{folder}{name}/" for name in sorted(folders, reverse=True)]
        yield folder, [entry for entry in listed if entry.name not in folders], refused


def _is(kind: Callable[[], bool]) -> bool:
    """Return whether an entry of a folder is of a kind; a link that leads to itself is of none."""
    try:
        return kind()
    except OSError:
        return False


def _unreadable(error: OSError) -> DataError:
    return DataError(f"Cannot read the folder {error.filename}: {error.strerror}. Make it readable or remove it, then run again.")


def _is_text(name: str) -> bool:
    return name.encode("utf-8", "replace") == os.fsencode(name)


def _altered(images: Path, altered: Mapping[str, str], hashes: Mapping[str, str]) -> DataError:
    """Return the error about files whose content is not the one that DVC knows by their size, time and inode."""
    first = min(altered)
    return DataError(
        f"expected the images in {images} as DVC records them, found {len(altered)} with another content though their time and size "
        f"are as before, such as {first} (md5 {altered[first]} for {hashes[first]}). {_RESTORE}"
    )


def _without_conflicts(rows: Sequence[Row]) -> tuple[list[Row], list[Rejected]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        labels[row.md5].add(row.label)
    consistent = [r for r in rows if len(labels[r.md5]) == 1]
    out = [
        Rejected(r.path, f"the same image in several classes: {', '.join(sorted(labels[r.md5]))}") for r in rows if len(labels[r.md5]) > 1
    ]
    return consistent, out


def _without_copies(rows: Sequence[Row], given: Mapping[str, str]) -> tuple[list[Row], list[str], list[Rejected]]:
    """Mark all but one of each set of exact copies.

    In a given layout the copy in test is used, so that the test split stays as given. Without one, copies have different splits only if their
    groups have. Then none of them is used: the rest of one group would be trained on, and the rest of the other one tested.

    Args:
        given: path to given split, {} if there is none.

    Returns:
        The rows, remarks for people, and the copies in groups with different splits.
    """
    rank = {TEST: 0, VAL: 1, TRAIN: 2, "": 2}
    copies_of: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        copies_of[row.md5].append(row)
    marked: list[Row] = []
    divided: list[Rejected] = []
    leaked: Counter[str] = Counter()
    for copies in copies_of.values():
        if not given and len({copy.split for copy in copies}) > 1:
            names = ", ".join(sorted({f"{copy.group or copy.path} ({copy.split})" for copy in copies}))
            divided += [Rejected(copy.path, f"the same image in groups of different splits: {names}") for copy in copies]
            continue
        copies.sort(key=lambda r: (rank[r.split], r.path))
        first = copies[0]
        marked.append(first)
        for copy in copies[1:]:
            marked.append(replace(copy, duplicate_of=first.path))
        own = given.get(first.path) or TRAIN
        for split in {given.get(copy.path) or TRAIN for copy in copies[1:]} - {own}:
            leaked[f"{own} images are also in {split}"] += 1
    if not given:
        return marked, [], divided
    remarks = [
        f"copies: {n} distinct {what}, byte for byte; they are used in {what.split()[0]} only" for what, n in sorted(leaked.items()) if n
    ]
    return marked, remarks, []


def _left_out(rejected: Sequence[Rejected], used: int) -> list[str]:
    """Return a remark with the reasons if more than a few files cannot be used."""
    if len(rejected) <= _FEW * (len(rejected) + used):
        return []
    reasons = Counter(re.sub(r" \(lines? .*| in \S+, which.*", "", file.reason.split(":")[0]) for file in rejected)
    return [f"left out: {len(rejected)} of {len(rejected) + used} files cannot be used ({_counted(reasons)}); quarantine.csv names them"]


def _divided_groups(rows: Sequence[Row]) -> list[str]:
    """Return a remark if groups are on several sides of a given layout; in our own split they never are."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.group and not row.duplicate_of:
            splits[row.group].add(row.split)
    divided = sorted(group for group, names in splits.items() if len(names) > 1)
    if not divided:
        return []
    return [
        f"leak: {len(divided)} of {len(splits)} groups have images in several of the given splits, such as {divided[0]} "
        f"({', '.join(sorted(splits[divided[0]]))}); the accuracy is too high for new groups"
    ]


def _grouped_copies(rows: Sequence[Row], pictures: Mapping[str, bytes], store: FactStore) -> list[Row]:
    """Return rows in which near copies are groups, unless the user gave them groups."""
    free = {row.md5 for row in rows if not row.group} & pictures.keys()
    sets = connected(find_copies({md5: pictures[md5] for md5 in free}, store))
    group_of = {md5: f"{NEAR_COPIES}{members[0][:12]}" for members in sets for md5 in members}
    return [replace(row, group=group_of[row.md5]) if row.md5 in group_of and not row.group else row for row in rows]


def _empty_classes(images: Path, rows: Sequence[Row], source: Source) -> list[str]:
    """Return remarks about class folders that hold no file, and about hidden folders that hold images."""
    if source.table is not None:
        return []
    depth = source.layout.label_at + 1
    used = {"/".join(row.path.split("/")[:depth]) for row in rows}
    folders = [Path()]
    for _ in range(depth):
        folders = [Path(*folder.parts, entry.name) for folder in folders for entry in _entries(images / folder) if entry.is_dir()]
    empty, concealed = [], []
    for folder in sorted(folders):
        if folder.as_posix() in used or SYSTEM in folder.parts:
            continue
        names = [name for _, _, files in os.walk(images / folder) for name in files]
        if any(map(hidden, folder.parts)):
            pictures = sum(Path(name).suffix.lower() in _ENDINGS for name in names)
            concealed += [f"{folder.as_posix()} ({pictures} image{'s' * (pictures > 1)})"] * (pictures > 0)
        elif all(map(hidden, names)):
            empty.append(f"{folder.as_posix()} ({'only hidden files' if names else 'empty'})")
    remarks = [f"empty: folders without images are no classes: {', '.join(empty)}"] if empty else []
    return remarks + ([f"hidden: folders whose names begin with a dot are not used: {', '.join(concealed)}"] if concealed else [])


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        return list(os.scandir(folder))
    except FileNotFoundError:  # removed while a run lists the version that it keeps
        return []


def _check_classes(images: Path, rows: Sequence[Row], rejected: Sequence[Rejected], source: Source) -> None:
    counts = Counter(r.label for r in rows if not r.duplicate_of)
    if len(counts) < 2:
        raise DataError(
            f"expected at least two classes in {images}, found one with usable images: {next(iter(counts))}. "
            + ("Label images of each further class." if source.table is not None else "Add a folder of images for each further class.")
        )
    for place in (source.place(r.path) for r in rejected):
        if not isinstance(place, str):
            counts.setdefault(place.label, 0)  # a class without any usable image must be reported
    small = {label: n for label, n in counts.items() if n < MINIMUM_PER_CLASS}
    if small:
        numbers = sum(label.replace(".", "", 1).isdigit() for label in counts)
        raise DataError(
            f"expected at least {MINIMUM_PER_CLASS} distinct usable images in each class, found {_counted(small)} in {images} "
            f"({len(rejected)} files were rejected). Add images to these classes or remove "
            + ("their lines from the table." if source.table is not None else "their folders.")
            + (f" {ONE_CLASS}" if numbers > 20 and numbers == len(counts) else "")
        )
    missing = sorted(set(counts) - {r.label for r in rows if r.split == TRAIN and not r.duplicate_of})
    if missing:
        way_out = "Run `tlpipeline data commit`: it gives small classes an image in each split by lines in splits.csv."
        if source.given:
            way_out = "Put more images of these classes into the folder train."
        elif source.grouped and (groups := {r.group for r in rows}) and len(groups) < len(SPLIT_NAMES):
            way_out = f"There are only {len(groups)} groups, and each has one split: use smaller groups, or none."
        elif source.grouped:
            way_out += " A class whose images are all in one group has only one split; add images of other groups."
        raise DataError(f"expected training images for each class in {images}, found none for {', '.join(missing)}. {way_out}")
    if (source.given or source.grouped) and not any(r.split == TEST and not r.duplicate_of for r in rows):
        raise DataError(
            f"expected test images in {images}, found none: a model could not be evaluated. "
            + (
                "Add labeled test images, or leave out the given splits."
                if source.given
                else "Add images, then run `tlpipeline data commit`."
            )
        )


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
    table = pa.table(columns)
    numbered = dict(zip(manifest.classes, manifest.indices, strict=True))
    if list(numbered) != sorted(numbered) or list(numbered.values()) != list(range(len(numbered))):
        table = table.replace_schema_metadata({_INDEX: json.dumps(numbered)})
    pq.write_table(table, path, compression="zstd")
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
    order: dict[str, int] = {}
    for batch in records.read_parquet(path, columns, records.ANEW, error=DataError, optional=later):
        order = _class_index(path, (batch.schema.metadata or {}).get(_INDEX))
        values = batch.to_pydict()
        values |= {name: [default] * batch.num_rows for name, default in later.items() if name not in values}
        for name in ("label", "split", "mode", "duplicate_of", "group"):
            values[name] = [known.setdefault(text, text) for text in values[name]]
        rows += [Row(*line) for line in zip(*(values[name] for name in columns), strict=True)]
    if odd := next((row for row in rows if not _MD5.fullmatch(row.md5) or row.split not in SPLIT_NAMES), None):
        raise records.unlike(path, f"{odd.path} has the md5 {odd.md5!r} and the split {odd.split!r}", records.ANEW, DataError)
    if quarantine is None:
        return Manifest(tuple(rows), (), (), order)
    lines = records.read_csv(Rejected, quarantine, records.ANEW, DataError)
    rejected, remarks = tuple(line for line in lines if line.path), tuple(line.reason for line in lines if not line.path)
    return Manifest(tuple(rows), rejected, remarks, order)


def _class_index(path: Path, content: bytes | None) -> dict[str, int]:
    """Return the numbers of the classes in a manifest, {} if they are those of their sorted names."""
    return {} if content is None else records.parse(dict[str, int], content, str(path), records.ANEW, DataError)
