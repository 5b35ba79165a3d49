"""Layouts of folders: which folder of a path is the class, and which one a given split.

Known layouts are `<class>/...`, `{train,val,test}/<class>/...` and `<class>/{train,val,test}/...`. What could be read in two ways is refused
with the setting or the change that says which one is meant.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tlpipeline.data.splits import TEST, TRAIN, VAL
from tlpipeline.errors import DataError

TABLES = (".csv", ".tsv", ".parquet")
# What archives of macOS hold beside the files: it belongs to the system, as dot-files do.
SYSTEM = "__MACOSX"
_SPLIT_WORDS = {
    "train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL, "development": VAL, "test": TEST,
    "testing": TEST,
}  # fmt: skip
_FILLERS = {"", "set", "data", "dataset", "images", "image", "imgs", "img", "split", "folder"}
_NAMED_IN_MESSAGES = 6


@dataclass(frozen=True)
class Layout:
    """How a path is read.

    Attributes:
        label_at: the class is this folder of a path, 0 for the first.
        split_at: the split is this folder, None where splits follow from the content.
        given: the splits that have folders.
    """

    label_at: int = 0
    split_at: int | None = None
    given: frozenset[str] = frozenset()

    @property
    def depth(self) -> int:
        """Folders that a path needs at least."""
        return 1 + max(self.label_at, -1 if self.split_at is None else self.split_at)


def hidden(name: str) -> bool:
    """Return whether a file or folder belongs to the system and not to the user: dot-files, and what macOS adds to archives."""
    return name.startswith(".") or name == SYSTEM


def split_named(name: str) -> str:
    """Return the split that a folder or a word of a table names, such as `Training`, `test_set` or `dev`; "" if it names none."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.casefold()) if word not in _FILLERS]
    if len(words) != 1:
        return ""
    whole = words[0]
    for filler in ("", "set", "data", "images"):
        if filler and not whole.endswith(filler):
            continue
        if (word := whole.removesuffix(filler)) in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return ""


def layout_of(images: Path, class_folder: int | None = None) -> Layout:
    """Return the layout of a folder of images.

    Args:
        class_folder: which folder of a path is the class, from 1; None finds it out.

    Raises:
        DataError: the folders can be read in two ways, a split has no class folders, or one folder or a table lies beside or around the rest.
    """
    if class_folder is not None:
        return Layout(class_folder - 1)
    tops = _folders(images)
    named = {top: split_named(top) for top in tops}
    if sum(map(bool, named.values())) >= 2:
        return _sides(images, named)
    if len(tops) == 1:
        _refuse_wrapping(images, tops[0])
    if len(tops) >= 2 and not any(_has_files(images / top) for top in tops):
        inner = {top: _folders(images / top) for top in tops}
        names = sorted(set().union(*inner.values()))
        splits = {name: split_named(name) for name in names}
        if all(splits.values()) and len(set(splits.values())) >= 2:
            given = frozenset(splits.values())
            _require_train(images, names, given)
            return Layout(0, 1, given)
        same = sum(len(folders) for folders in inner.values()) / (len(names) * len(tops)) if names else 0.0
        if same >= 0.5:
            raise DataError(
                f"expected one folder for each class in {images}, found the folders {_some(tops)}, "
                f"which all hold only folders, of the same names: {_some(names)}. If the inner folders are the classes, set "
                "data.class_folder: 2 (`tlpipeline init --class-folder 2`), and if images of the same outer folder belong together, "
                'data.group: "^[^/]+" too. If the outer folders are the classes, set data.class_folder: 1.'
            )
    if sum(any(word in _SPLIT_WORDS for word in re.split(r"[^a-z0-9]+", top.casefold())) for top in tops) >= 2:
        raise DataError(
            f"expected one folder for each class in {images}, found {_some(tops)}, which are named like splits. Rename them to train, val and "
            "test, with the classes inside. If they are classes, set data.class_folder: 1 (`tlpipeline init --class-folder 1`)."
        )
    return Layout()


def unwrapped(images: Path) -> Path:
    """Return the folder that holds the classes or splits: below folders that hold one folder of folders and nothing else."""
    while True:
        tops = _folders(images)
        if len(tops) != 1 or _has_files(images) or _has_files(images / tops[0]) or not _folders(images / tops[0]):
            return images
        images /= tops[0]


def _sides(images: Path, named: dict[str, str]) -> Layout:
    """Return the layout of folders of which at least two are named like splits."""
    given = frozenset(filter(None, named.values()))
    others = [top for top, split in named.items() if not split]
    if others or len(given) < len(named):
        raise DataError(
            f"expected the folders train, test and optionally val in {images}, or one folder per class, found {', '.join(sorted(named))}. "
            "Leave only train, test and val there, or sort the images by class alone; then their content decides the split."
        )
    _require_train(images, sorted(named), given)
    if unlabeled := [top for top in sorted(named) if _has_files(images / top) and not _folders(images / top)]:
        folder = unlabeled[0]
        raise DataError(
            f"expected class folders in {images / folder}, found files and no folder: images without labels can be neither trained on nor "
            f"evaluated. Sort them as {folder}/<class>/<image>, or move {folder} elsewhere; then a part of the others becomes the "
            f"{named[folder]} split. `tlpipeline predict` labels them later."
        )
    return Layout(1, 0, given)


def _require_train(images: Path, names: Collection[str], given: frozenset[str]) -> None:
    if TRAIN not in given:
        raise DataError(
            f"expected the folders train, test and optionally val in {images}, or one folder per class, found {', '.join(sorted(names))}. "
            "Add train, or sort the images by class alone; then their content decides the split."
        )


def _refuse_wrapping(images: Path, top: str) -> None:
    tables = [entry.name for entry in os.scandir(images) if entry.is_file() and entry.name.lower().endswith(TABLES)]
    if tables:
        raise DataError(
            f"expected one folder for each class in {images}, found one folder, {top}, beside {_some(sorted(tables))}. If the table has the labels "
            f"of the images, name it: `tlpipeline init --images {images} --labels {images / sorted(tables)[0]}`, or data.labels in params.yaml. "
            f"If the folders in {top} are the classes, name {images / top} as the folder of images."
        )
    if not _has_files(images / top) and len(inner := _folders(images / top)) >= 2:
        raise DataError(
            f"expected at least two folders of classes in {images}, found one, {top}, which holds {_some(inner)}. If those are the classes, "
            f"move them up, or name {images / top} as the folder of images (data.images in params.yaml)."
        )


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, without those of the system, sorted."""
    return sorted(entry.name for entry in _entries(folder, os.DirEntry.is_dir))


def _has_files(folder: Path) -> bool:
    return any(True for _ in _entries(folder, os.DirEntry.is_file))


def _entries(folder: Path, wanted: Callable[["os.DirEntry[str]"], bool]) -> "Iterator[os.DirEntry[str]]":
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not hidden(entry.name) and wanted(entry))


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_NAMED_IN_MESSAGES]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
