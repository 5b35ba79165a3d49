"""Train, val and test splits that never change.

The split follows from the image's content: u = md5(file bytes) / 2^128. Below 0.70 it is train, below 0.85 val, else test.
Class, path and seed do not matter, so an image keeps its split whatever is added or removed.
The few exceptions for small classes are lines of `splits.csv`. A given `{train,val,test}/<class>` layout wins over both.
"""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tlpipeline.data.decoding import inspect, read_content
from tlpipeline.errors import DataError
from tlpipeline.files import write_bytes

TRAIN, VAL, TEST = "train", "val", "test"
SPLIT_NAMES = (TRAIN, VAL, TEST)
SPLIT_FOLDERS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
TRAIN_BELOW, VAL_BELOW = 0.70, 0.85
MINIMUM_PER_CLASS = 3
_LOOK_INTO_BELOW = 50  # in a class with fewer images, a broken one could be the only one of its split


def split_of(md5: str, carve_val: bool = False) -> str:
    """Return the split of an image by its content.

    Args:
        md5: 32 hexadecimal digits.
        carve_val: the test split is given: divide the rest into train and val at 70 to 15.
    """
    u = int(md5, 16) / 2**128
    if carve_val:
        return TRAIN if u < TRAIN_BELOW / VAL_BELOW else VAL
    return TRAIN if u < TRAIN_BELOW else VAL if u < VAL_BELOW else TEST


def in_selection_half(md5: str) -> bool:
    """Return whether a validation image belongs to the half that selects (a slice point, an epoch). The other half only compares.

    The half follows from the content and never changes: from the last digit of the md5, since the first ones give the split.
    """
    return md5[-1] in "02468ace"


def folder_layout(images: Path) -> str:
    """Return the layout of the image folder: "" (split by content), "all" (train, val and test given) or "no val".

    Raises:
        DataError: at least two folders are named like splits, but train or test is missing or there are other folders. By content,
            "train" and "val" would silently become classes.
    """
    names = {p.name for p in images.iterdir() if p.is_dir() and not p.name.startswith(".")}
    split_folders = {n for n in names if n.casefold() in SPLIT_FOLDERS}
    if len(split_folders) < 2:
        return ""
    splits = {SPLIT_FOLDERS[n.casefold()] for n in split_folders}
    if names != split_folders or not {TRAIN, TEST} <= splits:
        raise DataError(
            f"expected the folders train, test and optionally val in {images}, or one folder per class, found {', '.join(sorted(names))}. "
            "Leave only train, test and val there, or sort the images by class alone; then their content decides the split."
        )
    return "all" if VAL in splits else "no val"


# --- splits.csv ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitException:
    """A line of splits.csv: this content belongs to this split, whatever the rule gives."""

    md5: str
    split: str
    label: str


def read_exceptions(path: Path) -> dict[str, str]:
    """Read splits.csv as a mapping of md5 to split; a missing file has no exceptions.

    Raises:
        DataError: it is empty or not text, a line is not `md5,split,label` with a known split, or two lines give an image different splits.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header, lines = reader.fieldnames, [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_exceptions(path, str(error)) from error
    if header != ["md5", "split", "label"]:
        raise _no_exceptions(path, ",".join(header) if header else "an empty file")
    if unknown := [line["split"] for _, line in lines if line["split"] not in SPLIT_NAMES]:
        raise _no_exceptions(path, f"the split {unknown[0]}")
    first: dict[str, tuple[int, str]] = {}
    for number, line in lines:
        earlier, split = first.setdefault(line["md5"], (number, line["split"]))
        if split != line["split"]:
            raise DataError(
                f"expected one split for each image in {path}, found {split} in line {earlier} and {line['split']} in line {number} for "
                f"{line['md5']}. Remove one of them; `git log -p {path.name}` shows which one is older."
            )
    return {md5: split for md5, (_, split) in first.items()}


def _no_exceptions(path: Path, content: str) -> DataError:
    return DataError(
        f"expected the columns md5,split,label and the splits {', '.join(SPLIT_NAMES)} in {path}, found {content}. "
        f"Run `git checkout {path.name}` to restore the committed file."
    )


def write_exceptions(path: Path, new: Iterable[SplitException]) -> None:
    """Append lines to splits.csv; create it with its header if it is missing."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if not before:
        writer.writerow(["md5", "split", "label"])
    elif not before.endswith("\n"):
        text.write("\n")  # an editor left the last line without an end
    writer.writerows((line.md5, line.split, line.label) for line in new)
    if text.getvalue():
        write_bytes((before + text.getvalue()).encode(), path)


def needed_exceptions(
    images: Path, hashes: Mapping[str, str], known: Mapping[str, str], trained_on: Callable[[], frozenset[str]]
) -> tuple[list[SplitException], list[str]]:
    """Find classes with an empty split, and assign one image to each.

    The image with the highest u goes to test, the next to val, the lowest to train. Images that a registered version was trained on
    never go to test; the class is then reported as not evaluated.

    Args:
        hashes: path below `images` to md5, of all files.
        known: the present lines of splits.csv.
        trained_on: returns the md5s that registered versions were trained on; called only if a split is empty.

    Returns:
        New lines for splits.csv, and remarks for people.
    """
    if not images.is_dir() or folder_layout(images):
        return [], []
    by_label: dict[str, dict[str, str]] = defaultdict(dict)
    labels: dict[str, set[str]] = defaultdict(set)
    for path, md5 in sorted(hashes.items()):
        label, _, rest = path.partition("/")
        if rest and not any(part.startswith(".") for part in path.split("/")):
            by_label[label].setdefault(md5, path)
            labels[md5].add(label)
    new: list[SplitException] = []
    remarks: list[str] = []
    for label, paths in sorted(by_label.items()):
        usable = {md5: path for md5, path in paths.items() if len(labels[md5]) == 1}
        if len(usable) < _LOOK_INTO_BELOW:
            usable = {md5: path for md5, path in usable.items() if not isinstance(inspect(read_content(images / path)), str)}
        splits = {md5: known.get(md5) or split_of(md5) for md5 in usable}
        if len(splits) >= MINIMUM_PER_CLASS and set(splits.values()) != set(SPLIT_NAMES):
            lines, remark = _filled(label, splits, trained_on(), frozenset(known))
            new += lines
            remarks += remark
    return new, remarks


def _filled(
    label: str, splits: dict[str, str], trained_on: frozenset[str], fixed: frozenset[str]
) -> tuple[list[SplitException], list[str]]:
    splits = dict(splits)
    lines: list[SplitException] = []
    remarks: list[str] = []
    for split in (TEST, VAL, TRAIN):
        if split in splits.values():
            continue
        # Take from a split that keeps at least one image, and never move what splits.csv has already fixed.
        counts = Counter(splits.values())
        free = sorted(
            (
                md5
                for md5, split_name in splits.items()
                if counts[split_name] > 1 and md5 not in fixed and not (split == TEST and md5 in trained_on)
            )
        )
        if not free:
            remarks.append(f"not {'evaluated' if split == TEST else 'validated'}: {label} has no image that could go to {split}")
            continue
        chosen = free[0] if split == TRAIN else free[-1]
        splits[chosen] = split
        lines.append(SplitException(chosen, split, label))
    return lines, remarks
