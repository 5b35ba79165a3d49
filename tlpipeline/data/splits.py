"""Train, val and test splits that never change.

The split follows from the image's content: u = md5(file bytes) / 2^128. Below 0.70 it is train, below 0.85 val, else test. Images of a group
share the split that follows from its name: u = md5(name) / 2^128. The md5 that decides is called the key.
Class, path and seed do not matter, so an image keeps its split whatever is added or removed.
The few exceptions for small classes are lines of `splits.csv`. A given `{train,val,test}/<class>` layout wins over both.
"""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipeline.data.decoding import MAX_BYTES, inspect, read_content
from tlpipeline.data.groups import group_key
from tlpipeline.errors import DataError
from tlpipeline.files import write_bytes

if TYPE_CHECKING:
    from tlpipeline.data.sources import Source

TRAIN, VAL, TEST = "train", "val", "test"
SPLIT_NAMES = (TRAIN, VAL, TEST)
TRAIN_BELOW, VAL_BELOW = 0.70, 0.85
MINIMUM_PER_CLASS = 3
MOST_OF_A_CLASS = 0.2  # a larger set of near copies is for training, whatever its content says
_LOOK_INTO_BELOW = 50  # in a class with fewer images, a broken one could be the only one of its split


def split_of(key: str, carve_val: bool = False) -> str:
    """Return the split of an image by its content, or of a group by its name.

    Args:
        key: 32 hexadecimal digits.
        carve_val: the test split is given: divide the rest into train and val at 70 to 15.
    """
    u = int(key, 16) / 2**128
    if carve_val:
        return TRAIN if u < TRAIN_BELOW / VAL_BELOW else VAL
    return TRAIN if u < TRAIN_BELOW else VAL if u < VAL_BELOW else TEST


def in_selection_half(key: str) -> bool:
    """Return whether a validation image belongs to the half that selects (a slice point, an epoch). The other half only compares.

    The half follows from the key and never changes: from its last digit, since the first ones give the split.
    """
    return key[-1] in "02468ace"


# --- splits.csv ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitException:
    """A line of splits.csv: this content, or the group with the name of this md5, belongs to this split, whatever the rule gives."""

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
    images: Path,
    hashes: Mapping[str, str],
    known: Mapping[str, str],
    trained_on: Callable[[], frozenset[str]],
    source: "Source",
    before: Mapping[str, str] | None = None,
    most_bytes: int = MAX_BYTES,
) -> tuple[list[SplitException], list[str]]:
    """Find classes with an empty split, and assign one image, or one group, to each. A group that got another name keeps its split.

    The image with the highest u goes to test, the next to val, the lowest to train. Images that a registered version was trained on
    never go to test; the class is then reported as not evaluated.

    Args:
        hashes: path below `images` to md5, of all files.
        known: the present lines of splits.csv.
        trained_on: returns the md5s that registered versions were trained on; called only if a split is empty.
        source: where classes, given splits and groups come from.
        before: md5 of an image to its split until now, {} if there is none.
        most_bytes: memory that decoding an image may take (`decoding.decode`).

    Returns:
        New lines for splits.csv, and remarks for people.
    """
    if source.given:
        return [], []
    by_label: dict[str, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    labels: dict[str, set[str]] = defaultdict(set)
    grouped: set[str] = set()
    for path, md5 in sorted(hashes.items()):
        place = source.place(path)
        if isinstance(place, str):
            continue
        key = group_key(place.group) if place.group else md5
        by_label[place.label][key].append((path, md5))
        labels[md5].add(place.label)
        if place.group:
            grouped.add(key)
    members: dict[str, list[str]] = defaultdict(list)
    for keys in by_label.values():
        for key, files in keys.items():
            members[key] += [md5 for _, md5 in files]
    new = _kept(by_label, members, grouped, known, before or {})
    remarks: list[str] = []
    fixed = dict(known) | {line.md5: line.split for line in new}
    for label, keys in sorted(by_label.items()):
        usable = {key: [(path, md5) for path, md5 in files if len(labels[md5]) == 1] for key, files in keys.items()}
        if sum(map(len, usable.values())) < _LOOK_INTO_BELOW:
            usable = {
                key: [(path, md5) for path, md5 in files if not isinstance(inspect(read_content(images / path), most_bytes), str)]
                for key, files in usable.items()
            }
        splits = {key: fixed.get(key) or split_of(key) for key, files in usable.items() if files}
        images_of_class = len({md5 for files in usable.values() for _, md5 in files})
        if images_of_class < MINIMUM_PER_CLASS or set(splits.values()) == set(SPLIT_NAMES):
            continue
        before_training = trained_on()
        used = frozenset(key for key in splits if not before_training.isdisjoint(members[key]))
        needed = frozenset(key for key in splits if _sole(key, label, by_label, fixed))
        lines, remark = _filled(label, splits, used, frozenset(fixed) | needed)
        fixed |= {line.md5: line.split for line in lines}
        new += lines
        remarks += remark
    return new, remarks


def joined_exceptions(
    sets: Iterable[Sequence[str]],
    label_of: Mapping[str, str],
    known: Mapping[str, str],
    before: Callable[[], Mapping[str, str]],
) -> tuple[list[SplitException], list[str]]:
    """Give the images of each set of near copies one split. No image that has a split is moved.

    New images join the split of those that were there before: of most of them, and of equally many the first of train, val and test. A set
    that is all new goes where its smallest md5 belongs, and to train if it is more than a fifth of its class.

    Args:
        sets: md5s of near copies, all of the images that are there now.
        label_of: class of each image that is there now.
        known: the present lines of splits.csv.
        before: returns the split of each image of an earlier version; called only if there is a set.

    Returns:
        New lines for splits.csv, and remarks for people.
    """
    images_of = Counter(label_of.values())
    lines: list[SplitException] = []
    divided = 0
    earlier: Mapping[str, str] | None = None
    for members in sets:
        earlier = before() if earlier is None else earlier
        fixed = {md5: split for md5 in members if (split := known.get(md5) or earlier.get(md5))}
        counts = Counter(fixed.values())
        divided += len(counts) > 1
        if counts:
            split = min(counts, key=lambda name: (-counts[name], SPLIT_NAMES.index(name)))
        else:
            smallest = min(members)
            split = TRAIN if len(members) > MOST_OF_A_CLASS * images_of[label_of[smallest]] else split_of(group_key(smallest))
        lines += [SplitException(md5, split, label_of[md5]) for md5 in sorted(members) if md5 not in fixed and split_of(md5) != split]
    remarks = (
        [f"near copies: {divided} sets of near copies lie in several splits, where they were before; no image moves"] if divided else []
    )
    return lines, remarks


def _kept(
    by_label: "Mapping[str, Mapping[str, list[tuple[str, str]]]]",
    members: Mapping[str, Sequence[str]],
    grouped: Collection[str],
    known: Mapping[str, str],
    before: Mapping[str, str],
) -> list[SplitException]:
    """Return lines for groups whose images had another split until now, all of them the same: the group got another name."""
    lines = []
    label_of = {key: label for label, keys in sorted(by_label.items(), reverse=True) for key in keys}
    for key in sorted(set(grouped) - set(known)):
        earlier = {before[md5] for md5 in members[key] if md5 in before}
        if len(earlier) == 1 and (split := next(iter(earlier))) != split_of(key) and split in SPLIT_NAMES:
            lines.append(SplitException(key, split, label_of[key]))
    return lines


def _sole(key: str, label: str, by_label: "Mapping[str, Mapping[str, list[tuple[str, str]]]]", fixed: Mapping[str, str]) -> bool:
    """Return whether another class has images in this group and in no other one of its split: moving it would empty that split."""
    split = fixed.get(key) or split_of(key)
    return any(
        key in keys and not any(other != key and (fixed.get(other) or split_of(other)) == split for other in keys)
        for name, keys in by_label.items()
        if name != label
    )


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
