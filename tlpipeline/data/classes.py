"""Names of classes: one spelling for each, other names that they had, and the class map, in which an index never changes its class.

The class map is `classes.csv`. `data commit` appends a line for each new class. A class that has no images any more keeps its line.
"""

import csv
import io
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tlpipeline import records
from tlpipeline.errors import DataError
from tlpipeline.files import write_bytes

RENAMED_SHARE = 0.5  # of a class that is gone, so many images lie in a new one: it was renamed
_WAY_BACK = "Run `git checkout classes.csv` to restore the committed file."


# --- names ----------------------------------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """Return a class name in one spelling: composed characters (NFC), as Linux writes them, and no spaces at its ends."""
    return unicodedata.normalize("NFC", name).strip()


class Renames:
    """Other names of classes: `data.rename`.

    A name may have been changed several times: {a: b, b: c} makes c of both. A class that is renamed to itself is a class of its own, though its
    name looks like another one.
    """

    def __init__(self, renames: Mapping[str, str] | None = None) -> None:
        given = {canonical(old): canonical(new) for old, new in (renames or {}).items()}
        self.own = frozenset(old for old, new in given.items() if old == new)
        self._next = {old: new for old, new in given.items() if old != new}

    def __call__(self, name: str) -> str:
        """Return the present name of a class."""
        name = canonical(name)
        while name in self._next:
            name = self._next[name]
        return name


def require_distinct(labels: Iterable[str], own: Collection[str] = ()) -> None:
    """Check that a person can tell the names of the classes apart.

    Args:
        own: names that are classes of their own whatever they look like.

    Raises:
        DataError: two names differ only in capitals, spaces or characters that look the same. Single letters may differ in capitals.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for label in sorted(set(labels)):
        if label not in own:
            alike[_looks(label)].append(label)
    pairs = [names for names in alike.values() if len(names) > 1]
    if pairs:
        first = pairs[0]
        kept = max(first, key=lambda name: (name == name.strip(), name))
        others = [name for name in first if name != kept]
        listed = "; ".join(" and ".join(f"{name!r}" for name in names) for names in pairs[:3])
        raise DataError(
            f"expected class names that a person can tell apart, found {listed}. If they are one class, put their images together under one "
            f"name, or set data.rename: {{{others[0]!r}: {kept!r}}}. If they are two, give one another name, or set data.rename: "
            f"{{{others[0]!r}: {others[0]!r}}}."
        )


def _looks(name: str) -> str:
    """Return what two names that look alike have in common."""
    shown = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    shown = " ".join(shown.split())
    return shown if len(shown) == 1 else shown.casefold()


# --- the class map --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassLine:
    """A line of classes.csv.

    Attributes:
        index: never changes, and is never given to another class.
        label: name of the class.
        images: files that it had in the last version in which it had any.
        like: class whose files it has under a new name, "" if none; shared: how many of them.
    """

    index: int
    label: str
    images: int
    like: str = ""
    shared: int = 0


class ClassMap:
    """The content of classes.csv."""

    def __init__(self, lines: Sequence[ClassLine] = ()) -> None:
        self.lines = tuple(lines)

    def known(self, renames: Renames) -> dict[str, int]:
        """Return the index of each class by its present name; a renamed class has the index of its first name."""
        numbers: dict[str, int] = {}
        for line in self.lines:
            numbers.setdefault(renames(line.label), line.index)
        return numbers

    def indices(self, labels: Iterable[str], renames: Renames) -> dict[str, int]:
        """Return the indices of these classes. Those that the map does not have follow in the order of their names."""
        numbers = self.known(renames)
        present = set(labels)
        fresh = enumerate(sorted(present - set(numbers)), len(self.lines))
        return {label: number for label, number in numbers.items() if label in present} | {label: number for number, label in fresh}

    def updated(self, present: Mapping[str, Collection[str]], before: Mapping[str, Collection[str]], renames: Renames) -> "ClassMap":
        """Return the map of a new version of the data.

        Args:
            present, before: md5s of each class, by its present name, in the new version and in the one before; {} if there is none.
        """
        known = self.known(renames)
        lines = [replace(line, images=len(present.get(renames(line.label), ())) or line.images) for line in self.lines]
        gone = {label: frozenset(md5s) for label, md5s in before.items() if label not in present}
        for label in sorted(set(present) - set(known)):
            overlaps = {other: len(md5s & frozenset(present[label])) for other, md5s in gone.items()}
            like = max(sorted(overlaps), key=overlaps.__getitem__, default="")
            if not like or overlaps[like] < RENAMED_SHARE * len(gone[like]):
                lines.append(ClassLine(len(lines), label, len(present[label])))
            else:
                lines.append(ClassLine(len(lines), label, len(present[label]), like, overlaps[like]))
        return ClassMap(lines)


def first_map(labels: Mapping[str, Collection[str]]) -> ClassMap:
    """Return the map of a workspace that had none: its classes in the order that models have had so far.

    Args:
        labels: md5s of each class, as the last run listed them; {} if there was none.
    """
    return ClassMap([ClassLine(index, label, len(labels[label])) for index, label in enumerate(sorted(labels))])


def read_map(path: Path) -> ClassMap:
    """Read classes.csv; a missing file has no classes.

    Raises:
        DataError: it is damaged, or two lines have the same index or class.
    """
    if not path.exists():
        return ClassMap()
    lines = records.read_csv(ClassLine, path, _WAY_BACK, DataError)
    if [line.index for line in lines] != list(range(len(lines))):
        raise records.unlike(path, "its indices are not 0, 1, 2 and so on", _WAY_BACK, DataError)
    if twice := [label for label, number in Counter(line.label for line in lines).items() if number > 1]:
        raise records.unlike(path, f"the class {twice[0]} has two lines", _WAY_BACK, DataError)
    return ClassMap(lines)


def write_map(path: Path, classes: ClassMap) -> None:
    """Write classes.csv; the same map gives the same bytes."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(ClassLine)])
    writer.writerows(asdict(line).values() for line in classes.lines)
    write_bytes(text.getvalue().encode(), path)


def changes(before: ClassMap, after: ClassMap, present: Collection[str], renames: Renames) -> list[str]:
    """Return what a new version of the data does to the classes: sentences about the new ones."""
    known = before.known(renames)
    new = [line for line in after.lines if renames(line.label) not in known and renames(line.label) in present]
    return [f"new class: {line.label} with {line.images} files" for line in new] if before.lines else []


def vanished(classes: ClassMap, present: Collection[str], renames: Renames, dropped: Collection[str]) -> list[str]:
    """Return a sentence about each class of the map that has no images, except those that were dropped on purpose."""
    left_out = {canonical(label) for label in dropped}
    after = {line.like: line for line in classes.lines if line.like and renames(line.label) in present}
    sentences = []
    for line in classes.lines:
        name = renames(line.label)
        if name in present or name in left_out or line.label in left_out:
            continue
        if follower := after.get(line.label):
            sentences.append(
                f"vanished: class {line.label} is gone, and {follower.label} has {follower.shared} of its {line.images} files: if it was renamed, set "
                f"data.rename: {{{line.label}: {follower.label}}}, and the model in production stays comparable"
            )
        else:
            sentences.append(
                f"vanished: class {line.label}, which had {line.images} files, is gone, and a new model cannot predict it. Restore its images, or, if it "
                f"was dropped on purpose, set data.drop: [{line.label}]"
            )
    return sentences
