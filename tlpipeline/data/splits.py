"""Train, val and test: sides that never move.

An image's side follows from its content: `u = md5(file bytes) / 2^128`; below .70 it is train, below .85 val, else test. Class, path and
seed play no part, so an image keeps its side whatever is added or removed. The few exceptions that small classes need are lines of
`splits.csv`; a given `{train,val,test}/<class>` layout wins over both.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tlpipeline.data.decoding import inspect, read_content
from tlpipeline.errors import DataError

TRAIN, VAL, TEST = "train", "val", "test"
SPLIT_NAMES = (TRAIN, VAL, TEST)
SPLIT_FOLDERS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
TRAIN_BELOW, VAL_BELOW = 0.70, 0.85
MINIMUM_PER_CLASS = 3
_LOOK_INTO_BELOW = 50  # images of a class below which a broken one could be the only one of its side


def split_of(md5: str, carve_val: bool = False) -> str:
    """Return the side that an image's content gives it.

    Args:
        md5: 32 hexadecimal digits.
        carve_val: the test side is given already: keep the share of train to val (70 to 15) among the rest.
    """
    u = int(md5, 16) / 2**128
    if carve_val:
        return TRAIN if u < TRAIN_BELOW / VAL_BELOW else VAL
    return TRAIN if u < TRAIN_BELOW else VAL if u < VAL_BELOW else TEST


def in_selection_half(md5: str) -> bool:
    """Say whether the validation image with this content belongs to the half that may select (a slice point, an epoch); the other half only judges.

    By content, so that it never changes halves. The last digit of the md5 is used, because the first ones give the side.
    """
    return md5[-1] in "02468ace"


def folder_layout(images: Path) -> str:
    """Say which layout this is: "" (by content), "all" (train, val and test are given) or "no val".

    Raises:
        DataError: two folders or more are named as sides, but train or test is not there or other folders stand beside them; by content,
            "train" and "val" would silently become two classes.
    """
    names = {p.name for p in images.iterdir() if p.is_dir() and not p.name.startswith(".")}
    sides = {n for n in names if n.casefold() in SPLIT_FOLDERS}
    if len(sides) < 2:
        return ""
    given = {SPLIT_FOLDERS[n.casefold()] for n in sides}
    if names != sides or not {TRAIN, TEST} <= given:
        raise DataError(
            f"expected the folders train, test and perhaps val in {images}, or else one folder per class, found {', '.join(sorted(names))}. "
            "Give it train and test and nothing else, or sort the images by class alone: then the sides follow from their content."
        )
    return "all" if VAL in given else "no val"


# --- splits.csv ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitException:
    """A line of splits.csv: this content is on this side, whatever the rule says."""

    md5: str
    split: str
    label: str


def read_exceptions(path: Path) -> dict[str, str]:
    """Read splits.csv as md5 to side; a missing file has no exceptions.

    Raises:
        DataError: it is empty or no text, or a line is not `md5,split,label` with a known side.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header, lines = reader.fieldnames, list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_exceptions(path, str(error)) from error
    if header != ["md5", "split", "label"]:
        raise _no_exceptions(path, ",".join(header) if header else "an empty file")
    if others := [line["split"] for line in lines if line["split"] not in SPLIT_NAMES]:
        raise _no_exceptions(path, f"the side {others[0]}")
    return {line["md5"]: line["split"] for line in lines}


def _no_exceptions(path: Path, found: str) -> DataError:
    return DataError(
        f"expected the columns md5,split,label and the sides {', '.join(SPLIT_NAMES)} in {path}, found {found}. "
        f"`git checkout {path.name}` brings back what was recorded."
    )


def write_exceptions(path: Path, new: Iterable[SplitException]) -> None:
    """Append lines to splits.csv (created with its header where it is missing)."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    header = not before
    with path.open("a", newline="", encoding="utf-8") as file:
        if before and not before.endswith("\n"):
            file.write("\n")  # an editor left the last line open
        writer = csv.writer(file, lineterminator="\n")
        if header:
            writer.writerow(["md5", "split", "label"])
        writer.writerows((line.md5, line.split, line.label) for line in new)


def needed_exceptions(
    images: Path, hashes: Mapping[str, str], known: Mapping[str, str], trained_on: Callable[[], frozenset[str]]
) -> tuple[list[SplitException], list[str]]:
    """Find the classes that would have an empty side and give each such side one image.

    The image with the highest u goes to test, the next to val, the lowest to train. Images that a registered version was trained on never
    go to test: the class is then named as not evaluated.

    Args:
        hashes: path below images to md5, of all files.
        known: lines that splits.csv has already.
        trained_on: gives the md5 of all images that a registered version was trained on; asked only where a side is empty.

    Returns:
        The new lines for splits.csv, and remarks.
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
        sides = {md5: known.get(md5) or split_of(md5) for md5 in usable}
        if len(sides) >= MINIMUM_PER_CLASS and set(sides.values()) != set(SPLIT_NAMES):
            lines, remark = _filled(label, sides, trained_on(), frozenset(known))
            new += lines
            remarks += remark
    return new, remarks


def _filled(label: str, sides: dict[str, str], trained_on: frozenset[str], fixed: frozenset[str]) -> tuple[list[SplitException], list[str]]:
    sides = dict(sides)
    lines: list[SplitException] = []
    remarks: list[str] = []
    for side in (TEST, VAL, TRAIN):
        if side in sides.values():
            continue
        # Take from a side that keeps at least one image, and never move what splits.csv already fixed.
        counts = Counter(sides.values())
        free = sorted((md5 for md5, s in sides.items() if counts[s] > 1 and md5 not in fixed and not (side == TEST and md5 in trained_on)))
        if not free:
            remarks.append(f"not {'evaluated' if side == TEST else 'validated'}: {label} has no image that could go to {side}")
            continue
        chosen = free[0] if side == TRAIN else free[-1]
        sides[chosen] = side
        lines.append(SplitException(chosen, side, label))
    return lines, remarks
